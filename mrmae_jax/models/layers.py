"""Building blocks of every network: masks, patches, positions, activations, dense layers, norms,
dropped paths, the fusion of layers.

Everything is written for bfloat16 compute with float32 parameters. Linen casts parameters to
`dtype` at use. LayerNorm statistics and softmax accumulate in float32.
"""

import dataclasses
import functools
from typing import Any, Callable, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mrmae_jax import target
from mrmae_jax.interpolation import BICUBIC, matrix
from mrmae_jax.models import row_kernels
from mrmae_jax.models.row_kernels import has_row_kernels

xavier_uniform = nn.initializers.xavier_uniform()


class Mask(NamedTuple):
  """The tokens that the encoder sees: V of N for each of B masks; tokens are numbered row by row.

  An image may have several masks, side by side: row b * k + i holds mask i of image b.

  Attributes:
    ids_keep: int32 [B, V], the visible tokens, in the order in which the encoder processes them.
    ids_restore: int32 [B, N], position of each token in the shuffled order, whose first V entries
      are the visible tokens.
  """

  ids_keep: jax.Array
  ids_restore: jax.Array

  @classmethod
  def of_all(cls, images: int, tokens: int) -> "Mask":
    """Returns the mask that shows all tokens of each image, in their order."""
    ids = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (images, tokens))
    return cls(ids, ids)

  @property
  def masked(self) -> "Mask":
    """Returns the mask that shows what this one hides."""
    tokens, visible = self.ids_restore.shape[1], self.ids_keep.shape[1]
    return Mask(
      jnp.argsort(self.ids_restore, axis=1)[:, visible:], (self.ids_restore - visible) % tokens
    )

  @property
  def removed(self) -> jax.Array:
    """Returns bool [B, N], True where the token is masked."""
    return self.ids_restore >= self.ids_keep.shape[1]


def take_rows(x: jax.Array, ids: jax.Array) -> jax.Array:
  """Selects rows of each example: [B, N, ...] by int32 [B, M] -> [B, M, ...]."""
  return jax.vmap(lambda row, i: jnp.take(row, i, axis=0, mode="clip"))(x, ids)


def _take(x, mask):
  ids = mask.ids_keep.reshape(len(x), -1)  # all masks of an image at once
  return take_rows(x, ids).reshape(*mask.ids_keep.shape, *x.shape[2:])


def _put(x, mask):
  removed = mask.removed.reshape(mask.removed.shape + (1,) * (x.ndim - 2))
  return jnp.where(
    removed, jnp.zeros((), x.dtype), take_rows(x, jnp.minimum(mask.ids_restore, x.shape[1] - 1))
  )


# The two moves are each other's transpose. Saying so keeps scatter-adds, slow on every backend, out
# of the backward pass.
@jax.custom_vjp
def take_visible(x: jax.Array, mask: Mask) -> jax.Array:
  """Selects visible tokens in the order of `mask.ids_keep`: [B, N, ...] -> [B * k, V, ...].

  k is the number of masks for each image.
  """
  return _take(x, mask)


@jax.custom_vjp
def put_visible(x: jax.Array, mask: Mask) -> jax.Array:
  """Returns visible tokens to their places, zeros elsewhere: [B, V, ...] -> [B, N, ...]."""
  return _put(x, mask)


def _take_bwd(residuals, dy):
  empty, mask = residuals
  dx = _put(dy, mask)
  return dx.reshape(len(empty), -1, *dx.shape[1:]).sum(1), None  # over the masks of an image


take_visible.defvjp(lambda x, mask: (_take(x, mask), (x[:, :0], mask)), _take_bwd)
put_visible.defvjp(lambda x, mask: (_put(x, mask), mask), lambda mask, dy: (_take(dy, mask), None))


def select_visible(x: jax.Array, only: Mask | None) -> jax.Array:
  """Selects the visible patch tokens and drops prefix tokens such as CLS: [B, T, ...] -> [B, V,
  ...].

  The patches are the last N of the T tokens. Without a mask it returns x itself.
  """
  return x if only is None else take_visible(x[:, x.shape[1] - only.ids_restore.shape[1] :], only)


def prepend(tokens: jax.Array, x: jax.Array) -> jax.Array:
  """Puts tokens [1 or B, P, D] before those of each image, [B, T, D]: [B, P + T, D]."""
  # To all images first, so that their gradient sums up theirs alone.
  tokens = jnp.broadcast_to(tokens, (x.shape[0], *tokens.shape[1:]))
  if not target.compute_capability():
    return jnp.concatenate([tokens, x], axis=1)
  # On an H200 the concatenation of 1 and 196 tokens takes 184 us, and this sum 54. On TPUs it would
  # be a pass over memory more.
  first, rest = tokens.shape[1], x.shape[1]
  pad = lambda x, before, after: jnp.pad(x, ((0, 0), (before, after), (0, 0)))
  return pad(tokens, 0, rest) + pad(x, first, 0)


def patchify(x: jax.Array, p: int) -> jax.Array:
  """Cuts maps into p x p patches: [..., H, W, C] -> [..., H/p, W/p, p*p*C].

  A patch is in (row, column, channel) order. A convolution with stride = kernel = p is this
  followed by a Dense layer.
  """
  *lead, h, w, c = x.shape
  x = x.reshape(*lead, h // p, p, w // p, p, c)
  return jnp.moveaxis(x, -4, -3).reshape(*lead, h // p, w // p, p * p * c)


def to_blocks(x: jax.Array, s: int) -> jax.Array:
  """Cuts maps into a list of s x s blocks: [B, H, W, C] -> [B, (H/s)*(W/s), s, s, C]."""
  b, h, w, c = x.shape
  return patchify(x, s).reshape(b, (h // s) * (w // s), s, s, c)


def from_blocks(x: jax.Array, grid: tuple[int, int]) -> jax.Array:
  """Joins blocks into maps: [B, gh*gw, s, s, C] -> [B, gh*s, gw*s, C]; undoes `to_blocks`."""
  b, _, s, _, c = x.shape
  gh, gw = grid
  return x.reshape(b, gh, gw, s, s, c).swapaxes(2, 3).reshape(b, gh * s, gw * s, c)


def widen(x: jax.Array) -> jax.Array:
  """Returns x in float32, or in float64 if it is that."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def gelu(x: jax.Array) -> jax.Array:
  """Exact GELU in the erf form that torch uses.

  `jax.nn.gelu(approximate=False)` goes through the slower erfc. bfloat16 is computed in float32 and
  rounded once, as torch does it; rounding after each operation takes an H200 a fourth longer. But
  TPUs compute in bfloat16 from v6e on, for which XLA would write arrays of float32.
  """
  wide = x if target.platform() == "tpu" else widen(x)
  return (0.5 * wide * (1.0 + jax.lax.erf(wide * np.asarray(np.sqrt(0.5), wide.dtype)))).astype(
    x.dtype
  )


def quick_gelu(x: jax.Array) -> jax.Array:
  """The sigmoid approximation that OpenAI's CLIP was trained with (openai/CLIP clip/model.py)."""
  return x * jax.nn.sigmoid(np.asarray(1.702, x.dtype) * x)


ACTIVATIONS = {
  "gelu": gelu,
  "gelu_tanh": jax.nn.gelu,
  "quick_gelu": quick_gelu,
  "silu": jax.nn.silu,
}


def activate(name: str, x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
  """Computes an activation of x + bias: [B, ..., D] -> the same.

  Args:
    name: a key of ACTIVATIONS.
    x: [B, ..., D].
    bias: float32 [D]; None adds nothing.
  """
  if name in row_kernels.ACTIVATIONS and _has_kernels(x):
    bias = jnp.zeros(x.shape[-1:]) if bias is None else bias
    return row_kernels.activate(name, _rows(x), bias).reshape(x.shape)
  return ACTIVATIONS[name](add_bias(x, bias))


def add_bias(x: jax.Array, bias: jax.Array | None) -> jax.Array:
  """Adds what `Dense` gives apart: [..., D] and [D] -> [..., D]; None adds nothing.

  It adds rows [N, D], which a product of matrices has written, whatever the leading axes.
  """
  if bias is None:
    return x
  return (x.reshape(-1, x.shape[-1]) + bias.astype(x.dtype)).reshape(x.shape)


def add_branch(x: jax.Array, branch: jax.Array, bias: jax.Array | None = None) -> jax.Array:
  """Adds a branch and its bias to the residual stream: twice [B, ..., D] and [D] -> [B, ..., D]."""
  branch = add_bias(branch, bias)
  if not _has_kernels(x):
    return x + branch
  flat = lambda x: x.reshape(-1, x.shape[-1])  # see row_kernels._hold_rows
  return (flat(x) + flat(branch)).reshape(x.shape)


def _has_kernels(x):
  """Returns whether `row_kernels` take an array, which then is [B, ..., D]."""
  return x.ndim > 1 and x.size > 0 and has_row_kernels(x.dtype, x.shape[-1])


def _rows(x):
  """[B, ..., D] -> [B, T, D]."""
  return x.reshape(len(x), -1, x.shape[-1])


def sincos_2d(dim: int, grid: tuple[int, int], cls_token: bool = False) -> np.ndarray:
  """Returns MAE's fixed 2-D sine-cosine position table (util/pos_embed.py), float32 [N, dim].

  With CLS it is [1 + N, dim], the first row zero. The first half of the channels encodes the
  column, the second half the row. Each half is sines, then cosines, of frequencies 10000^(-k /
  (dim/4)).
  """
  if dim % 4:
    raise ValueError(f"a 2-D sine-cosine position table needs a width divisible by 4, got {dim}")
  omega = 10000.0 ** (-np.arange(dim // 4, dtype=np.float64) / (dim // 4))
  rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
  angles = [axis.reshape(-1, 1) * omega for axis in (columns, rows)]
  table = np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1)
  if cls_token:
    table = np.concatenate([np.zeros((1, dim)), table])
  return table.astype(np.float32)


def combine(x: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
  """Resizes or pools maps by a matrix for each axis: [B, h, w, C] -> [B, H, W, C].

  Args:
    x: [B, h, w, C].
    rows: [H, h].
    columns: [W, w].
  """
  rows, columns = (jnp.asarray(matrix, x.dtype) for matrix in (rows, columns))
  precise = jax.lax.Precision.HIGHEST  # TPUs would round float32 to bfloat16
  x = jnp.einsum("pr,brcd->bpcd", rows, x, precision=precise)
  return jnp.einsum("qc,bpcd->bpqd", columns, x, precision=precise)


def position_table(
  module: nn.Module,
  grid: tuple[int, int],
  cls_token: bool = False,
  stored: tuple[int, int] | tuple[()] = (),
) -> jax.Array:
  """Returns the positions of a module with fields `dim` and `learned_positions`: float32 [T, dim].

  T is rows * columns of the grid, plus 1 for a CLS row before them. Learned positions are the
  module's parameter "pos_embed" [1, T, dim], which belongs to one grid and starts as the
  sine-cosine table.

  Args:
    module: of the network.
    grid: (rows, columns) of the image.
    cls_token: there is a CLS row.
    stored: (rows, columns) of the table, which is interpolated bicubically to `grid`; (): the same.
  """
  stored = tuple(stored) or grid
  table = lambda: jnp.asarray(sincos_2d(module.dim, stored, cls_token))
  learned = module.learned_positions
  pos = module.param("pos_embed", lambda key: table()[None])[0] if learned else table()
  if stored == grid:
    return pos
  cls, patches = jnp.split(pos, [int(cls_token)])
  moves = (matrix(old, new, BICUBIC) for old, new in zip(stored, grid))
  patches = combine(patches.reshape(1, *stored, -1), *moves).reshape(-1, module.dim)
  return jnp.concatenate([cls, patches])


class Dense(nn.Module):
  """A Linear layer as one product of two matrices, whatever the leading axes.

  For the product over several leading axes of `nn.Dense`, XLA:CPU transposes both sides first, for
  every gradient of a kernel and with the whole chain of residual additions before it: 40 % of a
  base-size step. TPUs would pad 49 tokens to 56.

  Attributes:
    features: width of the output.
    use_bias: add a bias.
    kernel_init, bias_init: initializers; by default MAE's, xavier-uniform and zeros.
    dtype: of the computation; parameters are float32.
  """

  features: int
  use_bias: bool = True
  kernel_init: Callable = xavier_uniform
  bias_init: Callable = nn.initializers.zeros
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, x: jax.Array, columns: slice = slice(None), apart: bool = False
  ) -> jax.Array | tuple[jax.Array, jax.Array]:
    """[..., D] -> [..., features], or the given columns of the output alone.

    With `apart` it is the product [..., features] and the bias, float32 [features] or None, instead
    of their sum.
    """
    kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))[
      :, columns
    ].astype(self.dtype)
    y = x.reshape(-1, x.shape[-1]).astype(self.dtype) @ kernel
    bias = None
    if self.use_bias:
      bias = self.param("bias", self.bias_init, (self.features,))[columns]
      y = y if apart else add_bias(y, bias)
    y = y.reshape(*x.shape[:-1], -1)
    return (y, bias) if apart else y


def _moments(x, eps):
  """Returns the mean and 1 / sqrt(variance + eps) of each row: [N, D] -> twice [N, 1].

  It reads the row twice: E[x^2] - E[x]^2 loses digits on CLIP's large residual channels.
  """
  x = widen(x)
  mean = x.mean(axis=-1, keepdims=True)
  return mean, jax.lax.rsqrt(jnp.square(x - mean).mean(axis=-1, keepdims=True) + eps)


def _apply_norm(x, scale, bias, moments):
  mean, inverse = moments
  return (widen(x) - mean) * (inverse * scale) + bias


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
  """Computes (x - mean) / sqrt(variance + eps) * scale + bias of each row, in float32: [N, D].

  Its gradient is written out (Ba et al. 2016, arXiv 1607.06450, with the chain rule); it has no
  `jax.jvp`. With y the rows without scale and bias, dy the gradient of the output and w = dy *
  scale, that of x is (w - mean(w) - y * mean(w * y)) / sqrt(variance + eps). For what JAX derives,
  XLA writes y in float32 on GPUs; forwards and backwards take a CPU a third longer.
  """
  return _apply_norm(x, scale, bias, _moments(x, eps))


def _layer_norm_fwd(x, scale, bias, eps):
  moments = _moments(x, eps)
  y = _apply_norm(x, scale, bias, moments)
  if target.compute_capability():
    # Otherwise XLA computes them anew for the backward pass, and writes rows in float32.
    moments = jax.lax.optimization_barrier(moments)
  return y, (x, scale, moments)


def _layer_norm_bwd(eps, residuals, dy):
  x, scale, (mean, inverse) = residuals
  y = (widen(x) - mean) * inverse
  w = dy * scale
  average = lambda rows: rows.mean(axis=-1, keepdims=True)
  dx = inverse * (w - average(w) - y * average(w * y))
  return dx.astype(x.dtype), (dy * y).sum(0), dy.sum(0)


layer_norm.defvjp(_layer_norm_fwd, _layer_norm_bwd)


class LayerNorm(nn.Module):
  """LayerNorm over the last axis; statistics and gradient are float32.

  Hopper GPUs have kernels of our own (row_kernels.py), for which the first axis is that of the
  images. Elsewhere it works on rows [N, D], whatever the leading axes: on GPUs XLA cuts [B, 197,
  768] into tiles of one token of 16 images, which takes twice as long as row by row.

  Attributes:
    eps: added to the variance.
    dtype: of the result; parameters are float32.
  """

  eps: float
  dtype: Any = jnp.float32

  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, ..., D] -> [B, ..., D]."""
    return self.of_sum(x)[1]

  @nn.compact
  def of_sum(
    self, x: jax.Array, branch: jax.Array | None = None, bias: jax.Array | None = None
  ) -> tuple[jax.Array, jax.Array]:
    """Returns x + branch + bias, and its norm; without a branch x itself.

    Who goes on with both spares a GPU two passes over the sum, and one over its gradient.

    Args:
      x: [B, ..., D].
      branch: the shape of x.
      bias: float32 [D], as `Dense` gives it apart.
    """
    shape, width = x.shape, x.shape[-1]
    scale = self.param("scale", nn.initializers.ones, (width,))
    shift = self.param("bias", nn.initializers.zeros, (width,))
    if x.dtype == self.dtype and _has_kernels(x):
      added = ()
      if branch is not None:
        added = _rows(branch), jnp.zeros(width) if bias is None else bias
      both = row_kernels.add_and_norm(self.eps, _rows(x), scale, shift, *added)
      return tuple(y.reshape(shape) for y in both)
    x = x if branch is None else add_branch(x, branch, bias)
    y = layer_norm(x.reshape(-1, width), scale, shift, self.eps)
    return x, y.astype(self.dtype).reshape(shape)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["keys"], meta_fields=["rate"])
@dataclasses.dataclass(frozen=True)
class DropPath:
  """Stochastic depth of one block (Huang et al. 2016, arXiv 1603.09382): drops branches, image by
  image.

  Attributes:
    rate: probability that a branch is dropped; a branch that stays is scaled by 1 / (1 - rate).
    keys: [B], one key per image, of this block alone; None drops nothing.
  """

  rate: float = 0.0
  keys: jax.Array | None = None

  def __call__(
    self, branch: int, x: jax.Array, bias: jax.Array | None = None
  ) -> tuple[jax.Array, jax.Array | None]:
    """Drops a branch, [B, ..., D], to which a bias [D] is still to be added; returns such a pair.

    The two branches of a block are dropped independently.
    """
    if self.keys is None or not self.rate:
      return x, bias
    x = add_bias(x, bias)
    keep = jax.vmap(
      lambda key: jax.random.bernoulli(jax.random.fold_in(key, branch), 1 - self.rate)
    )(self.keys)
    keep = keep.reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.where(keep, x / (1 - self.rate), jnp.zeros((), x.dtype)), None


def drop_paths(rate: float, depth: int, keys: jax.Array | None) -> list[DropPath]:
  """Returns a DropPath for each of `depth` blocks; the rate rises linearly from 0 to `rate`.

  Args:
    rate: of the last block.
    depth: number of blocks.
    keys: [B], one key per image; None drops nothing.
  """
  fold = jax.vmap(jax.random.fold_in, (0, None))
  return [
    DropPath(rate * i / max(depth - 1, 1), None if keys is None else fold(keys, i))
    for i in range(depth)
  ]


class LayerFusion(nn.Module):
  """Adds streams of several depths with learned softmax weights.

  This is MFF (open-mmlab/mmpretrain mff.py). All streams but the deepest pass through a Linear
  layer of their own.
  """

  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, depths: list[jax.Array]) -> jax.Array:
    """Streams [B, T, D], the deepest last -> [B, T, D]."""
    *shallow, last = depths
    streams = [
      Dense(last.shape[-1], dtype=self.dtype, name=f"depth_{i}")(x) for i, x in enumerate(shallow)
    ] + [last]
    weights = jax.nn.softmax(self.param("weights", nn.initializers.zeros, (len(streams),))).astype(
      self.dtype
    )
    return sum(weight * x for weight, x in zip(weights, streams))
