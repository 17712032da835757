"""Depthwise convolution: on whole maps, and on the visible blocks of masked maps.

On maps it is shift-and-add instead of `lax.conv`: XLA's grouped convolution is many times slower on
CPU and depends on the algorithms that cuDNN finds on GPU. On visible blocks Hopper GPUs have
kernels of our own, for which `ConvViT` cuts whole images into blocks too, and other NVIDIA GPUs
take products of matrices. The gradient of the input is the same operator with the kernel turned by
180 degrees. The gradient of the kernel is a sum over all positions, for each of which there is a
form that suits the platform; all give the same numbers.

The operators take a kernel [k, k, C] with k odd, have stride 1 and zero padding ("same"), as torch
computes it, and sum in float32.
"""

import functools

import jax
import jax.numpy as jnp

from mrmae_jax import target
from mrmae_jax.models import blockwise_kernels
from mrmae_jax.models.blockwise_kernels import find_visible, has_blockwise_kernels, neighbors
from mrmae_jax.models.layers import (
  Mask,
  add_bias,
  from_blocks,
  put_visible,
  take_rows,
  take_visible,
  to_blocks,
  widen,
)


def _crops(x, size):
  """Returns what each tap of a kernel reads of [..., H + size - 1, W + size - 1, C].

  These are size * size crops [..., H, W, C].
  """
  height, width = (side - size + 1 for side in x.shape[-3:-1])
  crop = lambda i, j: widen(x[..., i : i + height, j : j + width, :])
  return [crop(i, j) for i in range(size) for j in range(size)]


def _stencil(x, kernel):
  """Convolves without padding: [..., H + k - 1, W + k - 1, C] -> [..., H, W, C]."""
  taps = widen(kernel.reshape(-1, kernel.shape[-1]))
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
  positions, dy = tuple(range(dy.ndim - 1)), widen(dy)
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
    here = widen(cut(dy, (rows, w)))
    return [total + crop * here for total, crop in zip(sums, near)], None

  zeros = jnp.zeros((1, rows, w, c), widen(x[:0]).dtype)
  sums, _ = jax.lax.scan(add, [zeros] * size**2, jnp.arange(b * h // rows))
  return jnp.stack([total.sum((0, 1, 2)) for total in sums])


def _kernel_gradient(x, dy, size):
  """Returns the gradient of the kernel [size, size, C] from maps of the input and the output."""
  # The bands walk over the batch, which then could not be divided among devices.
  has_bands = target.platform() == "cpu" and jax.device_count() == 1
  dkernel = (_by_bands if has_bands else _by_taps)(_pad(x, size), dy, size)
  return dkernel.reshape(size, size, -1)


def _depthwise_bwd(residuals, dy):
  x, kernel = residuals
  dkernel = _kernel_gradient(x, dy, len(kernel))
  return _on_map(dy, _turn(kernel)), dkernel.astype(kernel.dtype)


depthwise_conv.defvjp(lambda x, kernel: (_on_map(x, kernel), (x, kernel)), _depthwise_bwd)


def blockwise_conv(
  x: jax.Array,
  kernel: jax.Array,
  mask: Mask,
  grid: tuple[int, int],
  before: jax.Array | None = None,
  after: jax.Array | None = None,
) -> jax.Array:
  """Convolves a map whose visible blocks are given; the others are zero.

  On Hopper GPUs a kernel of our own reads the blocks (blockwise_kernels.py). On other NVIDIA GPUs
  each block gets a window, what the kernel reads for it, and the convolution of the windows is a
  product of matrices for each channel. Elsewhere the blocks are put into a map and taken out again.

  Args:
    x: [B, V, s, s, C], the blocks in the order of `mask.ids_keep`.
    kernel: [k, k, C].
    mask: which of the blocks are visible.
    grid: (rows, columns) of all blocks.
    before: float32 [C], is added to the visible blocks; None adds nothing.
    after: float32 [C], is added to the result; None adds nothing.

  Returns:
    The visible blocks of the result, [B, V, s, s, C].
  """
  if has_blockwise_kernels(x.dtype, x.shape[2], x.shape[-1], len(kernel)):
    before, after = (jnp.zeros(x.shape[-1]) if y is None else y for y in (before, after))
    return blockwise_kernels.blockwise_conv(x, kernel, before, after, neighbors(mask, grid))
  y = _blockwise_conv(add_bias(x, before), kernel, mask, grid)
  return y if after is None else y + after.astype(y.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _blockwise_conv(x, kernel, mask, grid):
  return (_on_windows if target.compute_capability() else _by_map)(x, kernel, mask, grid)


def _blockwise_bwd(grid, residuals, dy):
  x, kernel, mask = residuals
  form = _on_windows_bwd if target.compute_capability() else _by_map_bwd
  dx, dkernel = form(x, kernel, dy, mask, grid)
  return dx, dkernel.astype(kernel.dtype), None


_blockwise_conv.defvjp(
  lambda x, kernel, mask, grid: (_blockwise_conv(x, kernel, mask, grid), (x, kernel, mask)),
  _blockwise_bwd,
)


def _to_map(x, mask, grid):
  return from_blocks(put_visible(x, mask), grid)


def _by_map(x, kernel, mask, grid):
  y = _on_map(_to_map(x, mask, grid), kernel)
  return take_visible(to_blocks(y, x.shape[2]), mask)


def _by_map_bwd(x, kernel, dy, mask, grid):
  dkernel = _kernel_gradient(*(_to_map(y, mask, grid) for y in (x, dy)), len(kernel))
  return _by_map(dy, _turn(kernel), mask, grid), dkernel


def _on_windows(x, kernel, mask, grid):
  return _product(_windows(x, mask, grid, len(kernel)), kernel)


def _on_windows_bwd(x, kernel, dy, mask, grid):
  size, side = len(kernel), x.shape[2]
  near, near_dy = (_windows(y, mask, grid, size) for y in (x, dy))
  # dy itself, but in the layout of the windows: with dy two layouts of it would be read.
  inside = slice(size // 2, size // 2 + side)
  dkernel = _product_gradient(near, near_dy[:, inside, inside], size)
  return _product(near_dy, _turn(kernel)), dkernel


def _windows(x, mask, grid, size):
  """Gathers what the kernel reads for each block, w = s + size - 1 positions a side.

  [B, V, s, s, C] -> [C, w, w, B, V], with zeros for what is not visible.
  """
  b, _, side, _, c = x.shape
  offsets = jnp.arange(-(size // 2), side + size // 2)
  row = ((mask.ids_keep // grid[1])[..., None] * side + offsets)[..., :, None]
  column = ((mask.ids_keep % grid[1])[..., None] * side + offsets)[..., None, :]
  place = find_visible(row // side, column // side, mask, grid)
  index = jnp.maximum(place, 0) * side**2 + row % side * side + column % side
  near = take_rows(x.reshape(b, -1, c), index.reshape(b, -1)).reshape(*index.shape, c)
  near = jnp.where((place >= 0)[..., None], near, jnp.zeros((), x.dtype))
  # XLA would fuse this gather into whatever reads it, and lay it out so that reading x is slow.
  return jax.lax.optimization_barrier(near.transpose(4, 2, 3, 0, 1))


def _flat(x):
  """[C, s, s, B, V] -> [C, s * s, B * V]."""
  return x.reshape(len(x), x.shape[1] ** 2, -1)


def _matrices(kernel, side):
  """Returns the convolution of a window as a matrix for each channel: [C, s * s, w * w]."""
  at = lambda y, x: jnp.pad(kernel, ((y, side - 1 - y), (x, side - 1 - x), (0, 0)))
  rows = [at(y, x).reshape(-1, kernel.shape[-1]).T for y in range(side) for x in range(side)]
  return jnp.stack(rows, axis=1)


def _product(near, kernel):
  """Convolves windows without padding, as a product for each channel.

  [C, w, w, B, V] -> [B, V, s, s, C]. It takes more FLOPs than the stencil, but in units that are
  made for products. The kernel is rounded to the dtype of the windows; sums are float32.
  """
  c, wide, _, b, v = near.shape
  side = wide - len(kernel) + 1
  matrices = _matrices(kernel.astype(near.dtype), side)
  y = jnp.einsum("cqp,cpn->cqn", matrices, _flat(near), precision=jax.lax.Precision.HIGHEST)
  return y.reshape(c, side, side, b, v).transpose(3, 4, 1, 2, 0)


def _product_gradient(near, dy, size):
  """Returns the gradient of the kernel [size, size, C] of `_product`.

  near is [C, w, w, B, V], dy [C, s, s, B, V].
  """
  dmatrices = jnp.einsum(
    "cqn,cpn->cqp",
    _flat(dy),
    _flat(near),
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=widen(dy[:0]).dtype,
  )
  kernel = jax.ShapeDtypeStruct((size, size, len(near)), dmatrices.dtype)
  (dkernel,) = jax.linear_transpose(lambda k: _matrices(k, dy.shape[1]), kernel)(dmatrices)
  return dkernel
