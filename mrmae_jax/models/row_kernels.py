"""LayerNorm and GELU: GPU kernels that read each row once, forwards and backwards.

XLA computes a LayerNorm in four kernels, of which three read the row, and its gradient in three
more. Those of this file do it in one each, and take in what stands beside it: the residual addition
with the bias of the product before it, and the gradient of the residual stream. GELU's do with half
of the instructions of `erf`.

Arrays are [B, T, D] here: T rows of each of B images. A program of a kernel works on some rows of
one image. It writes its own sums over rows, [B, S, n D] for S programs; XLA adds them up. Several
sums of a program lie side by side in one array, as XLA takes a kernel for each array.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from mrmae_jax import target
from mrmae_jax.models import kernels


class Tile(NamedTuple):
  """How a kernel walks over the rows of an image.

  Attributes:
    rows, columns: that a program processes at once.
    most: rows of a program.
    warps: of a program.
  """

  rows: int
  columns: int
  most: int
  warps: int


PROCESSORS = 132  # of an H100 or H200


def _norm_tile(shape, per_thread, per_processor):
  """Returns the tile of a LayerNorm: two whole rows at once; all programs run at the same time.

  Args:
    shape: (B, T, D).
    per_thread: numbers of each array in a thread, at most.
    per_processor: channels of all programs that one processor runs at the same time, which is
      bounded by their registers.
  """
  images, tokens, width = shape
  programs = max(1, PROCESSORS * max(1, per_processor // width) // images)
  rows = pl.cdiv(pl.cdiv(tokens, programs), 2) * 2
  return Tile(2, width, rows, pl.next_power_of_2(pl.cdiv(2 * width, 32 * per_thread)))


def _activation_tile(shape, rows, columns, most):
  """Returns a tile of at most `columns` columns, with a warp for each 256 of them."""
  columns = min(columns, shape[2] & -shape[2])
  count = pl.cdiv(shape[1], most)
  most = pl.cdiv(pl.cdiv(shape[1], count), rows) * rows
  return Tile(rows, columns, most, max(1, columns // 256))


# Measured on an H200 with 49 to 784 rows of 256 to 3,072 channels in 256 images.
norm_tile = functools.partial(_norm_tile, per_thread=48, per_processor=6144)
norm_gradient_tile = functools.partial(_norm_tile, per_thread=24, per_processor=4096)
activation_tile = functools.partial(_activation_tile, rows=4, columns=1024, most=4)
activation_gradient_tile = functools.partial(_activation_tile, rows=2, columns=512, most=64)


def has_row_kernels(dtype, width: int) -> bool:
  """Returns whether the device that is traced for has these kernels for rows of so many channels.

  They were measured with 256 to 3,072 channels.
  """
  fits = width % 64 == 0 and width <= 8192 and len(_pieces(width)) <= 3
  return fits and kernels.have_device(dtype)


def _pieces(width: int) -> list[tuple[int, int]]:
  """Cuts columns into (start, size), each size a power of 2, which Triton asks for."""
  sizes = [1 << i for i in reversed(range(width.bit_length())) if width >> i & 1]
  return [(sum(sizes[:i]), size) for i, size in enumerate(sizes)]


class _Rows:
  """Some rows of a program, in pieces of columns, for loads and stores."""

  def __init__(self, start, exist, pieces):
    self.rows, self.exist, self.pieces = pl.ds(start, len(exist)), exist, pieces

  def _mask(self, size):
    return jnp.broadcast_to(self.exist[:, None], (len(self.exist), size))

  def load(self, ref):
    """Reads a number for each row, [P] -> [rows]; or pieces [rows, columns] of [P, D]."""
    if len(ref.shape) == 1:
      return triton.load(ref.at[self.rows], mask=self.exist, other=0.0)
    return tuple(
      triton.load(ref.at[self.rows, pl.ds(start, size)], mask=self._mask(size), other=0.0)
      for start, size in self.pieces
    )

  def store(self, ref, values):
    """Writes what `load` reads."""
    if len(ref.shape) == 1:
      triton.store(ref.at[self.rows], values, mask=self.exist)
      return
    for (start, size), value in zip(self.pieces, values):
      at = ref.at[self.rows, pl.ds(start, size)]
      triton.store(at, value.astype(ref.dtype), mask=self._mask(size))


def _vector(ref, pieces):
  """Reads pieces [1, columns] of an array [D]."""
  return [triton.load(ref.at[pl.ds(start, size)])[None] for start, size in pieces]


def _store_sums(ref, pieces, *sums):
  """Writes arrays of pieces [1, columns] side by side to an array [n D]."""
  width = ref.shape[0] // len(sums)
  for i, parts in enumerate(sums):
    for (start, size), part in zip(pieces, parts):
      triton.store(ref.at[pl.ds(i * width + start, size)], part[0])


def _walk(tile, tokens, pieces, refs, step, carry=()):
  """Calls `step` for a few rows of a program at a time; returns the last carry.

  Args:
    tile: of the kernel.
    tokens: T.
    pieces: see `_pieces`.
    refs: what is read, before anything is computed.
    step: (rows, what they hold in each of `refs` in float32, carry) -> carry.
    carry: the first one.
  """
  first = pl.program_id(1) * tile.most

  def walk(i, carry):
    start = i * tile.rows
    rows = _Rows(start, first + start + jnp.arange(tile.rows) < tokens, pieces)
    found = [rows.load(ref) for ref in refs]
    return step(rows, *jax.tree.map(lambda x: x.astype(jnp.float32), found), carry)

  return jax.lax.fori_loop(0, tile.most // tile.rows, walk, carry)


def _mean(parts, width):
  """Returns the mean of each row: [rows, columns] pieces -> [rows, 1]."""
  return sum(part.sum(axis=1) for part in parts)[:, None] * (1 / width)


def _norm_kernel(x, *refs, tile, tokens, eps, has_branch):
  """Normalizes rows.

  Args:
    x: [B, T, D].
    refs: if `has_branch`, what is added to x: branch [B, T, D] and its bias [D]; scale, shift [D].
      Then the outputs: if `has_branch` the sum [B, T, D]; y [B, T, D]; mean, inverse [B, T].
    tile: the `Tile`.
    tokens: T.
    eps: added to the variance.
    has_branch: something is added to x before.
  """
  if has_branch:
    branch, bias, scale, shift, total, y, mean, inverse = refs
  else:
    scale, shift, y, mean, inverse = refs
  width = x.shape[-1]
  pieces = _pieces(width)
  scales, shifts = _vector(scale, pieces), _vector(shift, pieces)
  biases = _vector(bias, pieces) if has_branch else None

  def step(rows, parts, *others):
    *added, carry = others
    if has_branch:
      parts = [a + (b + c) for a, b, c in zip(parts, added[0], biases)]
      parts = [part.astype(x.dtype).astype(jnp.float32) for part in parts]
      rows.store(total, parts)
    average = _mean(parts, width)
    centered = [part - average for part in parts]
    factor = jax.lax.rsqrt(_mean([part * part for part in centered], width) + eps)
    rows.store(y, [a * (factor * b) + c for a, b, c in zip(centered, scales, shifts)])
    rows.store(mean, average[:, 0])
    rows.store(inverse, factor[:, 0])
    return carry

  _walk(tile, tokens, pieces, (x, branch) if has_branch else (x,), step)


def _norm_gradient_kernel(x, scale, mean, inverse, dy, *refs, tile, tokens, has_stream, has_branch):
  """Computes the gradients of `_norm_kernel`.

  Args:
    x: [B, T, D], what was normalized.
    scale, mean, inverse, tile, tokens, has_branch: see `_norm_kernel`.
    dy: [B, T, D], the gradient of y.
    refs: if `has_stream`, another gradient of x [B, T, D]. Then the outputs: dx [B, T, D], and the
      sums over rows [n D] for scale and shift, and if `has_branch` for the branch's bias.
    has_stream: x has another use.
  """
  streams, (dx, sums) = refs[:has_stream], refs[has_stream:]
  width = x.shape[-1]
  pieces = _pieces(width)
  scales = _vector(scale, pieces)
  zeros = tuple(jnp.zeros((1, size), jnp.float32) for _, size in pieces)

  def step(rows, values, gradients, average, factor, *others):
    *added, totals = others
    average, factor = average[:, None], factor[:, None]
    normal = [(value - average) * factor for value in values]
    weighted = [a * b for a, b in zip(gradients, scales)]
    offset, slope = _mean(weighted, width), _mean([a * b for a, b in zip(weighted, normal)], width)
    parts = [factor * (a - offset - b * slope) for a, b in zip(weighted, normal)]
    for stream in added:
      parts = [a + b for a, b in zip(parts, stream)]
    rows.store(dx, parts)
    sums_of = [a * b for a, b in zip(gradients, normal)], gradients, parts
    add = lambda total, part: total + part.sum(axis=0, keepdims=True)
    return tuple(tuple(map(add, *both)) for both in zip(totals, sums_of))

  refs = x, dy, mean, inverse, *streams
  totals = _walk(tile, tokens, pieces, refs, step, (zeros,) * (2 + has_branch))
  _store_sums(sums, pieces, *totals)


# Phi(-x) = exp(-x^2 / 2) * (a1 u + ... + a5 u^5), u = 1 / (1 + P x), for x >= 0: the form of
# Abramowitz and Stegun, 7.1.26, with numbers fitted to the smallest relative error, 3.3e-5 up to
# x = 14. bfloat16 rounds to 4e-3. The numbers add up to Phi(0).
LOG2_E = math.log2(math.e)
P = 0.375
TAIL = (0.14907033, 0.15764639, 0.08384275, 0.19992137, -0.09048084)


def _gelu(x):
  """Returns GELU, and what its gradient needs: Phi(-|x|) and exp(-x^2 / 2)."""
  size = jnp.abs(x)
  u = kernels.reciprocal(kernels.fma(size, P, 1.0))
  density = kernels.exp2(x * x * (-0.5 * LOG2_E))
  total = functools.reduce(lambda total, a: kernels.fma(u, total, a), reversed(TAIL))
  tail = total * u * density
  return kernels.fma(size, -tail, jnp.maximum(x, 0.0)), tail, density


def _gelu_gradient(x):
  _, tail, density = _gelu(x)
  return kernels.fma(x, density * (2 * math.pi) ** -0.5, jnp.where(x > 0, 1 - tail, tail))


def _quick_sigmoid(x):
  return kernels.reciprocal(1 + kernels.exp2(x * (-1.702 * LOG2_E)))


def _quick_gelu_gradient(x):
  y = _quick_sigmoid(x)
  return kernels.fma(1.702 * x, y * (1 - y), y)


# {activation: (itself, its gradient)}, both float32 -> float32
ACTIVATIONS = {
  "gelu": (lambda x: _gelu(x)[0], _gelu_gradient),
  "quick_gelu": (lambda x: x * _quick_sigmoid(x), _quick_gelu_gradient),
}


def _activation_kernel(x, bias, y, *, tile, tokens, name):
  """Computes an activation of x + bias: [B, T, D], [D] -> [B, T, D]."""
  pieces = _pieces(x.shape[-1])
  [biases] = _vector(bias, pieces)
  function = ACTIVATIONS[name][0]

  def step(rows, parts, carry):
    rows.store(y, [function(parts[0] + biases)])
    return carry

  _walk(tile, tokens, pieces, (x,), step)


def _activation_gradient_kernel(x, bias, dy, dx, d_bias, *, tile, tokens, name):
  """Computes the gradient of x [B, T, D], and its sum over rows [D]."""
  pieces = _pieces(x.shape[-1])
  [biases] = _vector(bias, pieces)
  function = ACTIVATIONS[name][1]

  def step(rows, parts, gradients, total):
    gradient = gradients[0] * function(parts[0] + biases)
    rows.store(dx, [gradient])
    return total + gradient.sum(axis=0, keepdims=True)

  total = _walk(tile, tokens, pieces, (x, dy), step, jnp.zeros(biases.shape, jnp.float32))
  _store_sums(d_bias, pieces, [total])


def _call(kernel, make_tile, arrays, outputs, sums=0, **options):
  """Runs a kernel on arrays; the first is [B, T, D].

  Args:
    kernel: takes the arrays, the outputs, `tile`, `tokens` and the options.
    make_tile: (B, T, D) -> its Tile.
    arrays: by their rank "rows" [B, T, D], "numbers" [B, T], or [D].
    outputs: "rows" or "numbers".
    sums: the number n of sums that each program writes after them: [B, S, n D]. More than one only
      where a program has all columns.
    **options: of the kernel.

  Returns:
    The outputs, and the sums added up for each image: [B, n D]. How many programs an image has
    depends on the number of images, and so on that of the devices.
  """
  images, tokens, width = arrays[0].shape
  tile = make_tile(arrays[0].shape)
  programs = pl.cdiv(tokens, tile.most)
  place = lambda image, part, column: (image, part, column)
  specs = {
    "rows": pl.BlockSpec((None, tile.most, tile.columns), place),
    "numbers": pl.BlockSpec((None, tile.most), lambda image, part, column: (image, part)),
    "sums": pl.BlockSpec((None, None, sums * tile.columns), place),
    "vector": pl.BlockSpec((tile.columns,), lambda image, part, column: (column,)),
  }
  shapes = {
    "rows": jax.ShapeDtypeStruct((images, tokens, width), arrays[0].dtype),
    "numbers": jax.ShapeDtypeStruct((images, tokens), jnp.float32),
    "sums": jax.ShapeDtypeStruct((images, programs, sums * width), jnp.float32),
  }
  kinds = {1: "vector", 2: "numbers", 3: "rows"}
  outputs = outputs + ["sums"] * (sums > 0)
  found = pl.pallas_call(
    functools.partial(kernel, tile=tile, tokens=tokens, **options),
    grid=(images, programs, width // tile.columns),
    in_specs=[specs[kinds[array.ndim]] for array in arrays],
    out_specs=[specs[what] for what in outputs],
    out_shape=[shapes[what] for what in outputs],
    compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=1),
    interpret=target.platform() != "gpu",
    name=kernel.__name__.strip("_"),
  )(*arrays)
  return [x.sum(1) if what == "sums" else x for what, x in zip(outputs, found)]


@functools.cache
def _norm(has_branch):
  """Returns a function of eps and the arrays that `_norm_kernel` takes, for several devices."""
  branch, total = ("b t d, d, ", "b t d, ") if has_branch else ("", "")

  @kernels.on_each_device(f"b t d, {branch}d, d -> {total}b t d, b t, b t")
  def norm(eps, *arrays):
    outputs = ["rows"] * (1 + has_branch) + ["numbers"] * 2
    return _call(_norm_kernel, norm_tile, arrays, outputs, eps=eps, has_branch=has_branch)

  return norm


@functools.cache
def _norm_gradient(has_stream, has_branch):
  """Returns a function of None and the arrays that `_norm_gradient_kernel` takes."""
  stream = ", b t d" if has_stream else ""

  @kernels.on_each_device(f"b t d, d, b t, b t, b t d{stream} -> b t d, b s")
  def gradient(_, *arrays):
    options = {"sums": 2 + has_branch, "has_stream": has_stream, "has_branch": has_branch}
    return _call(_norm_gradient_kernel, norm_gradient_tile, arrays, ["rows"], **options)

  return gradient


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def add_and_norm(eps: float, x, scale, shift, branch=None, bias=None):
  """Computes LayerNorm(x), or of x + branch + bias: the sum and its norm, both [B, T, D].

  The sum is rounded to its dtype before it is normalized. Without a branch it is x. Statistics and
  gradients are float32; it has neither `jax.jvp` nor `jax.vmap`.

  Args:
    eps: added to the variance.
    x: [B, T, D].
    scale, shift: float32 [D].
    branch: [B, T, D] or None.
    bias: float32 [D], there if the branch is.
  """
  return _add_and_norm(eps, x, scale, shift, branch, bias)[0]


def _add_and_norm(eps, x, scale, shift, branch, bias):
  added = () if branch is None else (branch, bias)
  *total, y, mean, inverse = _norm(bool(added))(eps, x, *added, scale, shift)
  total = _hold_rows(total[0]) if added else x
  return (total, y), ((total, scale, mean, inverse), added[1:])


def _hold_rows(x):
  """Returns x [B, T, D], which XLA knows as rows [B * T, D].

  `layers.add_branch` adds a product to it. XLA lets cuBLAS write the sum where x was, if nothing
  else reads these rows, and does not see who reads them in another shape, such as the gradient. So
  it wrote over a copy of x in each block, 0.4 ms of a step of MR-MAE-B on an H200.
  """
  return jax.lax.optimization_barrier(x.reshape(-1, x.shape[-1])).reshape(x.shape)


def _add_and_norm_fwd(eps, *primals):
  return _add_and_norm(eps, *(x if x is None else x.value for x in primals))


def _add_and_norm_bwd(eps, residuals, gradients):
  saved, biases = residuals
  d_total, dy = gradients
  streams = [] if isinstance(d_total, SymbolicZero) else [d_total]
  dy = jnp.zeros_like(saved[0]) if isinstance(dy, SymbolicZero) else dy
  dx, sums = _norm_gradient(bool(streams), bool(biases))(None, *saved, dy, *streams)
  d_scale, d_shift, *d_bias = sums.sum(0).reshape(-1, dx.shape[2])
  return dx, d_scale, d_shift, *((dx, *d_bias) if biases else (None, None))


add_and_norm.defvjp(_add_and_norm_fwd, _add_and_norm_bwd, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def activate(name: str, x: jax.Array, bias: jax.Array) -> jax.Array:
  """Computes an activation of x + bias, in float32: [B, T, D] -> [B, T, D].

  Args:
    name: a key of ACTIVATIONS.
    x: [B, T, D].
    bias: float32 [D].
  """
  return _activation(name, x, bias)


@kernels.on_each_device("b t d, d -> b t d")
def _activation(name, x, bias):
  return _call(_activation_kernel, activation_tile, (x, bias), ["rows"], name=name)[0]


@kernels.on_each_device("b t d, d, b t d -> b t d, b d")
def _activation_gradient(name, x, bias, dy):
  arrays, make_tile = (x, bias, dy), activation_gradient_tile
  return _call(_activation_gradient_kernel, make_tile, arrays, ["rows"], sums=1, name=name)


def _activate_bwd(name, residuals, dy):
  dx, sums = _activation_gradient(name, *residuals, dy)
  return dx, sums.sum(0)


activate.defvjp(lambda name, *arrays: (_activation(name, *arrays), arrays), _activate_bwd)
