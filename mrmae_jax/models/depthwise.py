"""Depthwise convolution: on whole maps, and on the visible blocks of masked maps.

It is shift-and-add instead of `lax.conv`: XLA's grouped convolution is many times slower on CPU and
depends on the algorithms that cuDNN finds on GPU. The gradient of the input is the same operator
with the kernel turned by 180 degrees. The gradient of the kernel is a sum over all positions, for
each of which there is a form that suits the platform; all give the same numbers.

The operators take a kernel [k, k, C] with k odd, have stride 1 and zero padding ("same"), as torch
computes it, and sum in float32.
"""

import functools

import jax
import jax.numpy as jnp

from mrmae_jax.models.layers import (
  Mask,
  from_blocks,
  put_visible,
  take_rows,
  take_visible,
  to_blocks,
)


def _widen(x):
  """Returns x in float32, or in float64 if it is that."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _crops(x, size):
  """Returns what each tap of a kernel reads of [..., H + size - 1, W + size - 1, C].

  These are size * size crops [..., H, W, C].
  """
  height, width = (side - size + 1 for side in x.shape[-3:-1])
  crop = lambda i, j: _widen(x[..., i : i + height, j : j + width, :])
  return [crop(i, j) for i in range(size) for j in range(size)]


def _stencil(x, kernel):
  """Convolves without padding: [..., H + k - 1, W + k - 1, C] -> [..., H, W, C]."""
  taps = _widen(kernel.reshape(-1, kernel.shape[-1]))
  return sum(crop * tap for crop, tap in zip(_crops(x, len(kernel)), taps)).astype(x.dtype)


def _turn(kernel):
  return kernel[::-1, ::-1]


def _pad(x, size):
  """Returns maps [B, H, W, C] with the zeros around them that a kernel reads."""
  return jnp.pad(x, ((0, 0), (size // 2,) * 2, (size // 2,) * 2, (0, 0)))


def _on_map(x, kernel):
  return _stencil(_pad(x, len(kernel)), kernel)


@jax.custom_vjp
def depthwise_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Convolves maps: [B, H, W, C] with a kernel [k, k, C] -> [B, H, W, C]."""
  return _on_map(x, kernel)


def _by_taps(x, dy, size):
  """The gradient of the kernel as one reduction per tap: [size * size, C].

  x is padded, [..., H + size - 1, W + size - 1, C], dy [..., H, W, C].
  """
  positions, dy = tuple(range(dy.ndim - 1)), _widen(dy)
  return jnp.stack([jnp.sum(crop * dy, positions) for crop in _crops(x, size)])


def _by_bands(x, dy, size):
  """The same for CPUs.

  XLA:CPU makes each tap a slow pass over everything. Here all taps visit one band of rows after the
  other while it is in the cache, and only products are added up, position by position: 13 times as
  fast on 8 x 56 x 56 x 256.
  """
  b, h, w, c = dy.shape
  rows = max(n for n in range(1, h + 1) if h % n == 0 and n * w * c <= max(2**13, w * c))

  def add(sums, band):
    image, row = band // (h // rows), band % (h // rows) * rows
    cut = lambda y, shape: jax.lax.dynamic_slice(y, (image, row, 0, 0), (1, *shape, c))
    near = _crops(cut(x, (rows + size - 1, w + size - 1)), size)
    here = _widen(cut(dy, (rows, w)))
    return [total + crop * here for total, crop in zip(sums, near)], None

  zeros = jnp.zeros((1, rows, w, c), _widen(x[:0]).dtype)
  sums, _ = jax.lax.scan(add, [zeros] * size**2, jnp.arange(b * h // rows))
  return jnp.stack([total.sum((0, 1, 2)) for total in sums])


def _kernel_gradient(x, dy, size):
  """Returns the gradient of the kernel [size, size, C] from maps of the input and the output."""
  by_taps, by_bands = (functools.partial(form, size=size) for form in (_by_taps, _by_bands))
  # The bands walk over the batch, which then could not be divided among devices.
  forms = dict(cpu=by_bands) if jax.device_count() == 1 else {}
  dkernel = jax.lax.platform_dependent(_pad(x, size), dy, **forms, default=by_taps)
  return dkernel.reshape(size, size, -1)


def _depthwise_bwd(residuals, dy):
  x, kernel = residuals
  dkernel = _kernel_gradient(x, dy, len(kernel))
  return _on_map(dy, _turn(kernel)), dkernel.astype(kernel.dtype)


depthwise_conv.defvjp(lambda x, kernel: (_on_map(x, kernel), (x, kernel)), _depthwise_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def blockwise_conv(x: jax.Array, kernel: jax.Array, mask: Mask, grid: tuple[int, int]) -> jax.Array:
  """Convolves a map whose visible blocks are given; the others are zero.

  On NVIDIA GPUs each block gets a window, what the kernel reads for it. Elsewhere the blocks are
  put into a map and taken out again.

  Args:
    x: [B, V, s, s, C], the blocks in the order of `mask.ids_keep`.
    kernel: [k, k, C].
    mask: which of the blocks are visible.
    grid: (rows, columns) of all blocks.

  Returns:
    The visible blocks of the result, [B, V, s, s, C].
  """

  def on_windows(x):
    return _stencil(_windows(x, mask, grid, len(kernel)), kernel)

  def on_map(x):
    y = _on_map(_to_map(x, mask, grid), kernel)
    return take_visible(to_blocks(y, x.shape[2]), mask)

  return jax.lax.platform_dependent(x, cuda=on_windows, default=on_map)


def _to_map(x, mask, grid):
  return from_blocks(put_visible(x, mask), grid)


def _windows(x, mask, grid, size):
  """Gathers [B, V, s + size - 1, s + size - 1, C] around each block, zeros for invisible ones."""
  b, v, side, _, c = x.shape
  offsets = jnp.arange(-(size // 2), side + size // 2)
  row = ((mask.ids_keep // grid[1])[..., None] * side + offsets)[..., :, None]
  column = ((mask.ids_keep % grid[1])[..., None] * side + offsets)[..., None, :]
  is_inside = (row >= 0) & (row < grid[0] * side) & (column >= 0) & (column < grid[1] * side)
  block = jnp.where(is_inside, row // side * grid[1] + column // side, 0)
  place = jnp.take_along_axis(mask.ids_restore, block.reshape(b, -1), axis=1).reshape(block.shape)
  index = jnp.minimum(place, v - 1) * side**2 + row % side * side + column % side
  near = take_rows(x.reshape(b, -1, c), index.reshape(b, -1)).reshape(*index.shape, c)
  near = jnp.where((is_inside & (place < v))[..., None], near, jnp.zeros((), x.dtype))
  # XLA would fuse this gather into whatever reads it, and compute anew for each tap where to read.
  # The map, with which it does so, takes 2.3 to 3.4 times as long as these windows on an H200.
  return jax.lax.optimization_barrier(near)


def _by_products(near, dy):
  """The gradient of the kernel [k, k, C] as products of matrices.

  For each channel all positions of the windows [B, V, s + k - 1, s + k - 1, C] are multiplied with
  all positions of their blocks [B, V, s, s, C], and summed over the blocks. A tap is the sum of the
  pairs at its distance.
  """
  wide, side, c = near.shape[2], dy.shape[2], dy.shape[-1]
  flat = lambda x: x.reshape(-1, x.shape[2] ** 2, c)
  pairs = jnp.einsum(
    "npc,nqc->cpq", flat(near), flat(dy), preferred_element_type=_widen(dy[:0]).dtype
  ).reshape(c, wide, wide, side, side)
  inside = [(y, x) for y in range(side) for x in range(side)]
  taps = range(wide - side + 1)
  return jnp.stack(
    [jnp.stack([sum(pairs[:, y + i, x + j, y, x] for y, x in inside) for j in taps]) for i in taps]
  )


def _blockwise_bwd(grid, residuals, dy):
  x, kernel, mask = residuals
  size = len(kernel)
  dkernel = jax.lax.platform_dependent(
    x,
    dy,
    cuda=lambda x, dy: _by_products(_windows(x, mask, grid, size), dy),
    default=lambda x, dy: _kernel_gradient(*(_to_map(y, mask, grid) for y in (x, dy)), size),
  )
  dx = blockwise_conv(dy, _turn(kernel), mask, grid)
  return dx, dkernel.astype(kernel.dtype), None


blockwise_conv.defvjp(
  lambda x, kernel, mask, grid: (blockwise_conv(x, kernel, mask, grid), (x, kernel, mask)),
  _blockwise_bwd,
)
