"""Building blocks of every network: masks, attention, transformer block.

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
from mrmae_jax.models.short_attention import has_short_attention, short_attention

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


class RelativePositions(NamedTuple):
  """The tokens of an attention whose logits get a learned number for each distance in the image.

  The table of distances is [(2 h - 1)(2 w - 1) + 3, heads], as in BEiT. Row (yi - yj + h - 1)
  (2 w - 1) + (xi - xj + w - 1) is for a query patch at row yi, column xi and a key patch at yj, xj.
  The last three rows are for CLS that looks at a patch, for a patch that looks at CLS, and for CLS
  that looks at itself. Without CLS they are absent.

  Attributes:
    grid: (rows, columns) of all patches, visible or not.
    cls_token: CLS comes before the patches.
  """

  grid: tuple[int, int]
  cls_token: bool

  @property
  def num_rows(self) -> int:
    """The number of rows of the table."""
    height, width = self.grid
    return (2 * height - 1) * (2 * width - 1) + 3 * self.cls_token

  def bias(self, table: jax.Array, mask: Mask | None = None) -> jax.Array:
    """Returns what a table adds to the logits.

    It is made of slices and reshapes: the gradient of a lookup would add up in any order on GPUs.

    Args:
      table: [num_rows, heads].
      mask: the visible patches; None: all of them.

    Returns:
      [heads, T, T], or with a mask [B, heads, T, T]; queries first, then keys.
    """
    height, width = self.grid
    distances, cls = jnp.split(table, [(2 * height - 1) * (2 * width - 1)])
    bias = distances.reshape(2 * height - 1, 2 * width - 1, -1).transpose(2, 0, 1)
    bias = _to_pairs(_to_pairs(bias, width).transpose(0, 2, 3, 1), height)
    bias = bias.transpose(0, 3, 1, 4, 2).reshape(-1, height * width, height * width)
    if mask is not None:
      bias = jnp.broadcast_to(
        bias.transpose(1, 2, 0), (len(mask.ids_keep), *bias.shape[1:], len(bias))
      )
      for _ in range(2):  # of the queries, then of the keys
        bias = take_visible(bias, mask).swapaxes(1, 2)
      bias = bias.transpose(0, 3, 1, 2)
    if not self.cls_token:
      return bias
    fill = lambda rows, *shape: jnp.broadcast_to(rows[..., None, None], (*bias.shape[:-2], *shape))
    to_patch, from_patch, to_itself = cls
    tokens = bias.shape[-1]
    top = jnp.concatenate([fill(to_itself, 1, 1), fill(to_patch, 1, tokens)], axis=-1)
    rest = jnp.concatenate([fill(from_patch, tokens, 1), bias], axis=-1)
    return jnp.concatenate([top, rest], axis=-2)


class DecomposedPositions(NamedTuple):
  """The tokens of an attention whose logits get the product of the query and a learned vector for
  each distance, rows and columns apart.

  Source: MViTv2 (Li et al. 2022, arXiv 2112.01526) and detectron2, modeling/backbone/utils.py. The
  tables are [2 h - 1, head_dim] and [2 w - 1, head_dim]; all heads share them. The logit of a query
  q at row yi, column xi and a key at yj, xj grows by q . rows[yi - yj + h - 1] + q . columns[xi -
  xj + w - 1]. This q is not divided by sqrt(head_dim).

  Attributes:
    grid: (rows, columns) of the tokens.
  """

  grid: tuple[int, int]

  def bias(self, q: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Queries [B, heads, T, head_dim] and both tables -> float32 [B, heads, T, T]."""
    height, width = self.grid
    q_map = q.reshape(*q.shape[:2], height, width, -1)
    rows, columns = (_to_pairs(table.T, n).astype(q.dtype) for table, n in zip(tables, self.grid))
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    rows = product("bnyxd,dyk->bnyxk", q_map, rows)
    columns = product("bnyxd,dxk->bnyxk", q_map, columns)
    bias = rows[..., :, None] + columns[..., None, :]
    return bias.reshape(*q.shape[:3], height * width)


class Windows(NamedTuple):
  """Square windows of a map, inside which tokens attend to each other.

  Zeros at the right and at the bottom fill the last windows. As in ViTDet they are keys like all
  others.

  Attributes:
    grid: (rows, columns) of the tokens.
    side: of a window, in tokens.
  """

  grid: tuple[int, int]
  side: int

  def cut(self, x: jax.Array) -> jax.Array:
    """[B, rows * columns, D] -> [B * windows, side * side, D]."""
    height, width = self.grid
    x = x.reshape(x.shape[0], height, width, -1)
    x = jnp.pad(x, ((0, 0), (0, -height % self.side), (0, -width % self.side), (0, 0)))
    return to_blocks(x, self.side).reshape(-1, self.side**2, x.shape[-1])

  def join(self, x: jax.Array) -> jax.Array:
    """Undoes `cut`."""
    height, width = self.grid
    counts = (-(-height // self.side), -(-width // self.side))
    x = x.reshape(-1, counts[0] * counts[1], self.side, self.side, x.shape[-1])
    x = from_blocks(x, counts)[:, :height, :width]
    return x.reshape(x.shape[0], height * width, -1)


class Scope(NamedTuple):
  """The tokens among which the attention of a block works, see `attention_scopes`.

  Attributes:
    windows, relative: fields of `Block`.
    bias: argument of `Block`.
  """

  windows: Windows | None = None
  relative: RelativePositions | DecomposedPositions | None = None
  bias: jax.Array | None = None


DISTANCES = ("none", "decomposed", "shared")


def attention_scopes(encoder: nn.Module, grid: tuple[int, int], mask: Mask | None) -> list[Scope]:
  """Returns the scope of each block of a ViT, or of a ConvViT's transformer stage.

  Args:
    encoder: its fields `window`, `global_blocks` and `distances` say what the blocks do. With
      distances="shared" it gets the parameters "window_distances" and "global_distances", tables
      of `RelativePositions`.
    grid: (rows, columns) of the image.
    mask: as the encoder gets it.
  """
  if not encoder.window and encoder.distances == "none":
    is_beit = encoder.relative_positions
    relative = RelativePositions(grid, encoder.cls_token) if is_beit else None
    return [Scope(relative=relative)] * encoder.depth
  if mask is not None or encoder.cls_token or getattr(encoder, "num_registers", 0):
    raise ValueError("windows and distances take neither a mask nor CLS nor registers")

  def scope(kind: str, area: tuple[int, int], windows: Windows | None) -> Scope:
    if encoder.distances == "decomposed":
      return Scope(windows, DecomposedPositions(area))
    if encoder.distances == "none":
      return Scope(windows)
    relative = RelativePositions(area, False)
    shape = (relative.num_rows, encoder.num_heads)
    table = encoder.param(f"{kind}_distances", nn.initializers.zeros, shape)
    return Scope(windows, bias=relative.bias(table))

  is_global = [not encoder.window or i in encoder.global_blocks for i in range(encoder.depth)]
  kinds = {}
  if not all(is_global):
    kinds[False] = scope("window", (encoder.window,) * 2, Windows(grid, encoder.window))
  if any(is_global):
    kinds[True] = scope("global", grid, None)
  return [kinds[x] for x in is_global]


def _to_pairs(x: jax.Array, n: int) -> jax.Array:
  """Spreads numbers for distances over pairs: [..., 2 n - 1] -> [..., n, n].

  Entry (i, j) is x[i - j + n - 1]. Rows of 2 n numbers, one after the other, and cut at every 2 n -
  1st, move on by one each time.
  """
  lead = x.shape[:-1]
  x = jnp.pad(x[..., ::-1], [(0, 0)] * len(lead) + [(0, 1)])
  x = jnp.broadcast_to(x[..., None, :], (*lead, n, 2 * n)).reshape(*lead, -1)
  return x[..., : n * (2 * n - 1)].reshape(*lead, n, 2 * n - 1)[..., n - 1 :]


def has_fused_attention(dtype: Any, head_dim: int) -> bool:
  """Returns whether cuDNN's attention can be used by the device that is traced for.

  It needs bfloat16, heads of at most 128 channels in multiples of 8, and an NVIDIA GPU from Ampere
  on.
  """
  if dtype != jnp.bfloat16 or head_dim % 8 or head_dim > 128:
    return False
  return target.compute_capability() >= 8


def _wide_product(axes, a, b):
  return jnp.einsum(axes, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def attention_weights(q: jax.Array, k: jax.Array, bias: jax.Array | None = None) -> jax.Array:
  """Computes softmax(q k^T / sqrt(head_dim) + bias), float32 [B, heads, S, T]; float64 of that.

  Args:
    q: [B, heads, S, head_dim].
    k: [B, heads, T, head_dim].
    bias: float32 [heads, S, T] or [B, heads, S, T]; None adds nothing.
  """
  logits = _wide_product("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5
  return jax.nn.softmax(logits if bias is None else logits + bias, axis=-1)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None) -> jax.Array:
  """Computes softmax(q k^T / sqrt(head_dim) + bias) v, [B, heads, S, head_dim].

  On GPUs the weights stay in cuDNN's kernel; `short_attention` has kernels of our own. cuDNN's is
  asked for by name: `jax.nn.dot_product_attention` would not choose it itself, and is slower than
  the explicit form on CPU. A bias takes the explicit form: cuDNN's kernel was not tested with the
  gradient of one.

  Args:
    q: [B, heads, S, head_dim].
    k, v: [B, heads, T, head_dim].
    bias: see `attention_weights`.
  """
  if bias is None and has_fused_attention(q.dtype, q.shape[-1]):
    return fused_attention(q, k, v)
  return explicit_attention(q, k, v, bias)


def explicit_attention(
  q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None
) -> jax.Array:
  """Computes `attend` by products of matrices that XLA knows.

  Its gradient is written out, but for TPUs; it has no `jax.jvp` then. With the weights P, the
  output y = P v and its gradient dy, that of the logits is P * (dy v^T - sum(dy * y)), whose sum is
  one over channels. It equals the sum of P * (dy v^T) over keys (Dao et al. 2022, arXiv 2205.14135,
  appendix B.2), which JAX derives and which takes a CPU two to three times as long. A whole step on
  a TPU v5e would move 3 to 7 % more bytes, on a v6e 1 % fewer.
  """
  form = _explicit_attention if target.platform() == "tpu" else _explicit_attention_own_gradient
  return form(q, k, v, bias)


def _explicit_attention(q, k, v, bias):
  return _explicit_attention_fwd(q, k, v, bias)[0]


def _explicit_attention_fwd(q, k, v, bias):
  weights = attention_weights(q, k, bias).astype(v.dtype)
  y = weights @ v
  return y, (q, k, v, bias, weights, y)


def _explicit_attention_bwd(residuals, dy):
  q, k, v, bias, weights, y = residuals
  d_weights = _wide_product("bhqd,bhkd->bhqk", dy, v)
  mean = (widen(dy) * widen(y)).sum(-1, keepdims=True)
  d_logits = widen(weights) * (d_weights - mean)
  d_bias = None
  if bias is not None:
    d_bias = d_logits.sum(0) if bias.ndim == 3 else d_logits
  d_products = (d_logits * q.shape[-1] ** -0.5).astype(q.dtype)
  dq = jnp.einsum("bhqk,bhkd->bhqd", d_products, k)
  dk = jnp.einsum("bhqk,bhqd->bhkd", d_products, q)
  dv = jnp.einsum("bhqk,bhqd->bhkd", weights, dy)
  return dq, dk, dv, d_bias


_explicit_attention_own_gradient = jax.custom_vjp(_explicit_attention)
_explicit_attention_own_gradient.defvjp(_explicit_attention_fwd, _explicit_attention_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def fused_attention(
  q: jax.Array, k: jax.Array, v: jax.Array, implementation: str = "cudnn"
) -> jax.Array:
  """Computes `attend` by JAX's kernels ("cudnn", "xla"), which count heads behind tokens.

  JAX does not differentiate cuDNN's kernel for an odd number of tokens, such as 49 visible ones.
  Where there is a gradient they get one more token, which nobody attends to.
  """
  return _fused_attention(q, k, v, implementation)


def _fused_attention(q, k, v, implementation, **lengths):
  q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
  x = jax.nn.dot_product_attention(q, k, v, **lengths, implementation=implementation)
  return x.swapaxes(1, 2)


def _padded_attention(q, k, v, implementation):
  batch, (queries, keys) = len(q), (x.shape[2] for x in (q, k))
  lengths = {}
  if queries % 2 or keys % 2:
    lengths = {
      "query_seq_lengths": jnp.full(batch, queries, jnp.int32),
      "key_value_seq_lengths": jnp.full(batch, keys, jnp.int32),
    }
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, x.shape[2] % 2), (0, 0))) for x in (q, k, v))
  return _fused_attention(q, k, v, implementation, **lengths)[:, :, :queries]


def _fused_attention_fwd(q, k, v, implementation):
  return jax.vjp(lambda *x: _padded_attention(*x, implementation), q, k, v)


fused_attention.defvjp(_fused_attention_fwd, lambda implementation, pull, dy: pull(dy))


class Attention(nn.Module):
  """Multi-head self-attention with packed weights in torch's order (query-key-value, heads,
  head_dim).

  Attributes:
    num_heads: divides the width.
    rotate: rotary positions, queries or keys [B, heads, T, head_dim] -> the same; None: no
      rotation.
    key_bias: query, key and value have one packed bias. False: query and value have biases
      `q_bias` and `v_bias` [D] and the key, whose bias the softmax does not see, has none (BEiT).
    relative: the tokens, for a table `relative_positions` of learned distances, or for the two
      tables `rel_pos_h` and `rel_pos_w`; None: no table.
    dtype: of the computation.
  """

  num_heads: int
  rotate: Callable[[jax.Array], jax.Array] | None = None
  key_bias: bool = True
  relative: RelativePositions | DecomposedPositions | None = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    only: Mask | None = None,
    mask: Mask | None = None,
    bias: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[B, T, D] -> [B, T, D] and its bias [D], which is to be added, and the first token's
    attention, float32 [B, T], a mean over the heads.

    The first token is CLS, where there is one. Its row costs nothing unless it is used: jit drops
    it. If `only` is given, queries are computed for its V visible tokens alone: [B, V, D]. They
    attend to all T tokens. `mask` says which patches the tokens are, for `relative`; None: all.
    `bias`, float32 [heads, T, T], is added to the logits where `relative` is None.
    """
    dim = x.shape[-1]
    qkv = Dense(3 * dim, use_bias=self.key_bias, dtype=self.dtype, name="qkv")
    first, second, third = (slice(i * dim, (i + 1) * dim) for i in range(3))
    has_bias = bias is not None or self.relative is not None
    is_fused = not has_bias and has_fused_attention(self.dtype, dim // self.num_heads)
    is_plain = not has_bias and self.rotate is None and self.key_bias
    packed = None  # products and bias, as our kernels read them
    if is_plain and has_short_attention(self.dtype, x.shape[1], dim // self.num_heads):
      if only is None:
        parts = [qkv(x, apart=True)]
      else:
        rest = slice(dim, None)
        parts = [qkv(select_visible(x, only), first, True), qkv(x, rest, True)]
      packed = tuple(product for product, _ in parts), jnp.concatenate([bias for _, bias in parts])
      sums = [jnp.split(add_bias(*part), part[1].size // dim, axis=-1) for part in parts]
      q, k, v = sum(sums, start=[])
    elif is_fused and x.shape[1] % 2 == 0:
      # cuDNN reads three arrays. Three products write them; one would be followed by a pass that
      # cuts its result apart. With an odd number of tokens there is such a pass, which pads.
      q = qkv(x if only is None else select_visible(x, only), first)
      k, v = qkv(x, second), qkv(x, third)
    elif only is None:
      q, k, v = jnp.split(qkv(x), 3, axis=-1)
    else:
      q = qkv(select_visible(x, only), first)
      k, v = jnp.split(qkv(x, slice(dim, None)), 2, axis=-1)
    if not self.key_bias:
      q, v = (
        y + self.param(name, nn.initializers.zeros, (dim,)).astype(self.dtype)
        for name, y in (("q_bias", q), ("v_bias", v))
      )
    q, k, v = (y.reshape(*y.shape[:2], self.num_heads, -1).swapaxes(1, 2) for y in (q, k, v))
    if self.rotate is not None:
      q, k = self.rotate(q), self.rotate(k)
    if isinstance(self.relative, RelativePositions):
      shape = (self.relative.num_rows, self.num_heads)
      table = self.param("relative_positions", nn.initializers.zeros, shape)
      bias = self.relative.bias(table, mask)
    elif self.relative is not None:
      shapes = [(2 * side - 1, q.shape[-1]) for side in self.relative.grid]
      tables = [
        self.param(name, nn.initializers.zeros, shape)
        for name, shape in zip(("rel_pos_h", "rel_pos_w"), shapes)
      ]
      bias = self.relative.bias(q, tables)
    first_bias = None if bias is None else bias[..., :1, :]
    first = attention_weights(q[:, :, :1], k, first_bias)[:, :, 0].mean(1)
    if packed is None:
      x = attend(q, k, v, bias).swapaxes(1, 2)
      x = x.reshape(*x.shape[:2], dim)
    else:
      x = short_attention(*packed, self.num_heads)
    return *Dense(dim, dtype=self.dtype, name="proj")(x, apart=True), first


class Block(nn.Module):
  """Pre-norm transformer block: x += scale1 * attention(norm1(x)); x += scale2 * mlp(norm2(x)).

  Attributes:
    num_heads: divides the width.
    mlp_dim: hidden width of the MLP; of each half if it is gated.
    eps: epsilon of both LayerNorms.
    activation: a key of ACTIVATIONS.
    gated: the MLP is fc2(activation(a) * b) with [a, b] = fc1(x) (SwiGLU, Shazeer 2020,
      arXiv 2002.05202), instead of fc2(activation(fc1(x))).
    layer_scale: `scale1` and `scale2` are learned gains per channel (Touvron et al. 2021,
      arXiv 2103.17239); otherwise both are 1.
    rotate, key_bias, relative: see `Attention`.
    windows: attention works inside of them; None: on all tokens.
    dtype: of the computation; parameters are float32.
  """

  num_heads: int
  mlp_dim: int
  eps: float = 1e-6
  activation: str = "gelu"
  gated: bool = False
  layer_scale: bool = False
  rotate: Callable[[jax.Array], jax.Array] | None = None
  key_bias: bool = True
  relative: RelativePositions | DecomposedPositions | None = None
  windows: Windows | None = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    drop: DropPath = DropPath(),
    only: Mask | None = None,
    mask: Mask | None = None,
    bias: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """[B, T, D] -> [B, T, D], and the first token's attention [B, T] (see `Attention`).

    If `only` is given, the output holds its V visible tokens alone: [B, V, D]. They attend to all T
    tokens; the other tokens end before the MLP. `mask`, `bias`: see `Attention`.
    """
    dense = lambda features, name: Dense(features, dtype=self.dtype, name=name)
    attend_to = Attention(
      self.num_heads, self.rotate, self.key_bias, self.relative, self.dtype, name="attn"
    )
    norm = lambda name: LayerNorm(self.eps, self.dtype, name=name)
    x, h = norm("norm1").of_sum(x)
    h = h if self.windows is None else self.windows.cut(h)
    h, h_bias, attention = attend_to(h, only, mask, bias)
    h = h if self.windows is None else self.windows.join(h)
    branch = drop(0, *self._scale("scale1", h, h_bias))
    x, h = norm("norm2").of_sum(select_visible(x, only), *branch)
    h, h_bias = dense(self.mlp_dim * (1 + self.gated), "fc1")(h, apart=True)
    if self.gated:
      h, gate = jnp.split(add_bias(h, h_bias), 2, axis=-1)
      h = activate(self.activation, h) * gate
    else:
      h = activate(self.activation, h, h_bias)
    branch = self._scale("scale2", *dense(x.shape[-1], "fc2")(h, apart=True))
    return add_branch(x, *drop(1, *branch)), attention

  def _scale(self, name, x, bias):
    if not self.layer_scale:
      return x, bias
    gain = self.param(name, nn.initializers.ones, x.shape[-1:])
    return add_bias(x, bias) * gain.astype(self.dtype), None


REMAT_POLICIES = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}


def rematerialize(
  block: type[nn.Module], remat: str, static_argnums: tuple[int, ...] = ()
) -> type[nn.Module]:
  """Returns a class of blocks whose backward pass recomputes activations: less memory, same
  numbers.

  Args:
    block: class of modules.
    remat: "none" recomputes nothing; "dots" keeps the results of matrix products and recomputes
      norms and activations; "full" keeps the inputs alone and costs a third more work.
    static_argnums: positions of the arguments of __call__ that are not arrays; `self` has position
      0.
  """
  if remat == "none":
    return block
  return nn.remat(block, policy=REMAT_POLICIES[remat], static_argnums=static_argnums)


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
