"""Depthwise convolution of visible blocks: GPU kernels that read the blocks where they are.

A program walks over some visible blocks of an image. For each position of the window around a
block it reads the channels once, and adds them to all outputs that they take part in. So no window
is written; in depthwise.py XLA writes four numbers for each that it reads.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from mrmae_jax import target
from mrmae_jax.models import kernels

CHANNELS = 256  # of a program, at most
WARP_CHANNELS = 64  # of a warp: two for each thread, which are read at once
FORWARD_BLOCKS = 7  # of a program, at most
BACKWARD_BLOCKS = 25


def has_blockwise_kernels(dtype, side: int, channels: int, size: int) -> bool:
  """Returns whether the device that is traced for has these kernels.

  They were measured with blocks of 2 and 4 positions a side and kernels of 5.

  Args:
    dtype: of the blocks.
    side: of a block, in positions.
    channels: C.
    size: side of the kernel.
  """
  fits = size == 5 and side in (2, 4) and channels % WARP_CHANNELS == 0
  return fits and kernels.have_device(dtype)


def neighbors(mask, grid: tuple[int, int]) -> jax.Array:
  """Returns where the 3 x 3 blocks around each visible block are: int32 [B, V, 9].

  These are places among the visible blocks, row by row, and -1 for what is not visible.
  """
  steps = jnp.arange(-1, 2)
  row = (mask.ids_keep // grid[1])[..., None, None] + steps[:, None]
  column = (mask.ids_keep % grid[1])[..., None, None] + steps
  return find_visible(row, column, mask, grid).reshape(*mask.ids_keep.shape, 9)


def find_visible(row: jax.Array, column: jax.Array, mask, grid: tuple[int, int]) -> jax.Array:
  """Returns the places of blocks among the visible ones, -1 for others and those beyond the grid.

  Args:
    row, column: int32 [B, ...] of the blocks, two shapes that broadcast.
    mask: which blocks are visible.
    grid: (rows, columns) of all blocks.
  """
  is_inside = (row >= 0) & (row < grid[0]) & (column >= 0) & (column < grid[1])
  block = jnp.where(is_inside, row * grid[1] + column, 0)
  place = jnp.take_along_axis(mask.ids_restore, block.reshape(len(block), -1), axis=1)
  place = place.reshape(block.shape)
  return jnp.where(is_inside & (place < mask.ids_keep.shape[1]), place, -1)


def _window(ref, places, size, missing):
  """Yields (row, column, float32 [C]) of each position of the window around a block.

  Args:
    ref: [V, s, s, C].
    places: 9 numbers, the block's row of `neighbors`.
    size: side of the kernel; the window is s + size - 1 positions wide.
    missing: [C], of positions that are not visible.
  """
  side, channels = ref.shape[1], ref.shape[-1]
  offsets = range(-(size // 2), side + size // 2)
  for (i, y), (j, x) in itertools.product(enumerate(offsets), repeat=2):
    place = places[3 * (y // side + 1) + x // side + 1]
    at = ref.at[jnp.maximum(place, 0), np.int32(y % side), np.int32(x % side)]
    mask = jnp.broadcast_to(place >= 0, (channels,))
    yield i, j, triton.load(at, mask=mask, other=missing).astype(jnp.float32)


def _outputs(i, j, side, size):
  """Yields each (output, tap) that a position of the window takes part in, as numbers by rows."""
  for y, x in itertools.product(range(side), repeat=2):
    if 0 <= i - y < size and 0 <= j - x < size:
      yield y * side + x, (i - y) * size + j - x


def _add(total, a, b):
  """Returns total + a * b; None is zero."""
  return a * b if total is None else kernels.fma(a, b, total)


def _walk(near, blocks, visible, step, carry=()):
  """Calls `step` for the blocks of a program; returns the last carry.

  Args:
    near: see `_conv_kernel`.
    blocks: their number.
    visible: of all blocks, those from this one on do not exist.
    step: (block, whether it exists, its row of `near`, carry) -> carry.
    carry: the first one.
  """
  first = pl.program_id(1) * blocks
  find = lambda block: tuple(triton.load(near.at[block, np.int32(i)]) for i in range(9))

  def walk(i, carry):
    places, carry = carry
    block = first + i
    following = find(block + 1)  # while this block is computed
    return following, step(block, block < visible, places, carry)

  return jax.lax.fori_loop(0, blocks, walk, (find(first), carry))[1]


def _store(ref, block, exists, values):
  """Writes the channels of each position of a block of [V, s, s, C]."""
  side, channels = ref.shape[1], ref.shape[-1]
  for i, value in enumerate(values):
    at = ref.at[block, np.int32(i // side), np.int32(i % side)]
    triton.store(at, value.astype(ref.dtype), mask=jnp.broadcast_to(exists, (channels,)))


def _taps(kernel):
  return [triton.load(kernel.at[np.int32(i)]) for i in range(kernel.shape[0])]


def _conv_kernel(x, kernel, before, after, near, y, *, size, blocks):
  """Convolves x + before, and adds `after`.

  Args:
    x: [V, s, s, C], the visible blocks of an image.
    kernel: float32 [size^2, C].
    before, after: float32 [C].
    near: see `neighbors`, with a row more than there are blocks in all programs; nothing is
      visible from those that do not exist.
    y: [V, s, s, C], the output.
    size: side of the kernel.
    blocks: that the program walks over.
  """
  visible, side = x.shape[:2]
  taps, offset, last = _taps(kernel), before[...].astype(x.dtype), after[...]
  missing, offset = -offset, offset.astype(jnp.float32)  # such that their sum is zero

  def step(block, exists, places, carry):
    totals = [last] * side**2
    for i, j, value in _window(x, places, size, missing):
      value += offset
      for output, tap in _outputs(i, j, side, size):
        totals[output] = _add(totals[output], value, taps[tap])
    _store(y, block, exists, totals)
    return carry

  _walk(near, blocks, visible, step)


def _conv_gradient_kernel(
  x, kernel, before, near, dy, dx, d_kernel, d_before, d_after, *, size, blocks
):
  """Computes the gradients of `_conv_kernel`.

  Both read the window of dy: the gradient of x is its convolution with the kernel turned by 180
  degrees, that of the kernel its products with x.

  Args:
    x, kernel, before, near, size, blocks: see `_conv_kernel`.
    dy: [V, s, s, C].
    dx: [V, s, s, C], an output.
    d_kernel: float32 [size^2, C], an output: the sum over the blocks of the program.
    d_before, d_after: float32 [C], outputs: the sums over these blocks.
  """
  visible, side = x.shape[:2]
  channels = x.shape[-1]
  taps, offset = _taps(kernel)[::-1], before[...].astype(x.dtype)
  missing, offset = -offset, offset.astype(jnp.float32)
  zero = jnp.zeros((channels,), jnp.float32)

  def step(block, exists, places, sums):
    d_taps, of_x, of_y = list(sums[0]), sums[1], sums[2]
    exist = jnp.broadcast_to(exists, (channels,))
    inputs = [
      triton.load(x.at[block, np.int32(i), np.int32(j)], mask=exist, other=missing) + offset
      for i, j in itertools.product(range(side), repeat=2)
    ]
    totals = [None] * side**2
    nothing = jnp.zeros((channels,), dy.dtype)
    for i, j, value in _window(dy, places, size, nothing):
      for output, tap in _outputs(i, j, side, size):
        totals[output] = _add(totals[output], value, taps[tap])
        d_taps[tap] = _add(d_taps[tap], value, inputs[output])
      if 0 <= i - size // 2 < side and 0 <= j - size // 2 < side:
        of_y += value
    _store(dx, block, exists, totals)
    return tuple(d_taps), of_x + sum(totals), of_y

  d_taps, of_x, of_y = _walk(near, blocks, visible, step, ((zero,) * size**2, zero, zero))
  for i, total in enumerate(reversed(d_taps)):
    triton.store(d_kernel.at[np.int32(i)], total)
  d_before[...], d_after[...] = of_x, of_y


def _call(kernel, arrays, outputs, most):
  """Runs a kernel on arrays, of which the first are x and the convolution's kernel.

  Args:
    kernel: takes the arrays, the outputs, `size` and `blocks`.
    arrays: by their rank blocks [B, V, s, s, C], neighbors [B, V, 9], taps [k^2, C], or [C].
    outputs: "blocks", or sums of each program: "taps" [B, S, k^2, C], "vector" [B, S, C].
    most: blocks of a program, at most.

  Returns:
    The outputs, the sums added up for each image: [B, k^2, C], [B, C].
  """
  images, visible, side, _, width = arrays[0].shape
  taps, programs = len(arrays[1]), pl.cdiv(visible, most)
  count = pl.cdiv(visible, programs)
  rows = programs * count + 1  # of neighbors
  more = ((0, 0), (0, rows - visible), (0, 0))
  arrays = [jnp.pad(x, more, constant_values=-1) if x.ndim == 3 else x for x in arrays]
  channels = min(CHANNELS, width & -width)
  blocks = pl.BlockSpec(
    (None, visible, side, side, channels), lambda image, part, column: (image, 0, 0, 0, column)
  )
  takes = {
    5: blocks,
    3: pl.BlockSpec((None, rows, 9), lambda image, part, column: (image, 0, 0)),
    2: pl.BlockSpec((taps, channels), lambda image, part, column: (0, column)),
    1: pl.BlockSpec((channels,), lambda image, part, column: (column,)),
  }
  place = lambda image, part, column: (image, part, column)
  gives = {
    "blocks": blocks,
    "taps": pl.BlockSpec(
      (None, None, taps, channels), lambda image, part, column: (image, part, 0, column)
    ),
    "vector": pl.BlockSpec((None, None, channels), place),
  }
  shapes = {
    "blocks": jax.ShapeDtypeStruct(arrays[0].shape, arrays[0].dtype),
    "taps": jax.ShapeDtypeStruct((images, programs, taps, width), jnp.float32),
    "vector": jax.ShapeDtypeStruct((images, programs, width), jnp.float32),
  }
  warps = max(1, channels // WARP_CHANNELS)
  found = pl.pallas_call(
    functools.partial(kernel, size=math.isqrt(taps), blocks=count),
    grid=(images, programs, width // channels),
    in_specs=[takes[array.ndim] for array in arrays],
    out_specs=[gives[what] for what in outputs],
    out_shape=[shapes[what] for what in outputs],
    compiler_params=triton.CompilerParams(num_warps=warps, num_stages=1),
    interpret=target.platform() != "gpu",
    name=kernel.__name__.strip("_"),
  )(*arrays)
  return [x if what == "blocks" else x.sum(1) for what, x in zip(outputs, found)]


@kernels.on_each_device("b v s r c, k c, c, c, b v n -> b v s r c")
def _forward(_, *arrays):
  return _call(_conv_kernel, arrays, ["blocks"], FORWARD_BLOCKS)[0]


@kernels.on_each_device("b v s r c, k c, c, b v n, b v s r c -> b v s r c, b k c, b c, b c")
def _backward(_, *arrays):
  outputs = ["blocks", "taps", "vector", "vector"]
  return _call(_conv_gradient_kernel, arrays, outputs, BACKWARD_BLOCKS)


@jax.custom_vjp
def blockwise_conv(x, kernel, before, after, near):
  """Convolves visible blocks of x + before, all others being zero, and adds `after`.

  Everything is summed in float32; `before` is rounded to the dtype of x. It has neither `jax.jvp`
  nor `jax.vmap`.

  Args:
    x: [B, V, s, s, C].
    kernel: float32 [k, k, C].
    before, after: float32 [C].
    near: see `neighbors`.

  Returns:
    [B, V, s, s, C].
  """
  return _forward(None, x, _flat(kernel), before, after, near)


def _flat(kernel):
  return kernel.reshape(-1, kernel.shape[-1])


def _blockwise_conv_fwd(x, kernel, before, after, near):
  return blockwise_conv(x, kernel, before, after, near), (x, kernel, before, near)


def _blockwise_conv_bwd(residuals, dy):
  x, kernel, before, near = residuals
  dx, *sums = _backward(None, x, _flat(kernel), before, near, dy)
  d_kernel, d_before, d_after = (total.sum(0) for total in sums)
  return dx, d_kernel.reshape(kernel.shape), d_before, d_after, None


blockwise_conv.defvjp(_blockwise_conv_fwd, _blockwise_conv_bwd)
