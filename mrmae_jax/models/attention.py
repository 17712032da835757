"""Attention of the transformer blocks: which tokens it works among, what their distances add to its
logits, and the forms in which it is computed.
"""

import functools
from typing import Any, Callable, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mrmae_jax import target
from mrmae_jax.models.layers import (
  Dense,
  Mask,
  add_bias,
  from_blocks,
  select_visible,
  take_visible,
  to_blocks,
  widen,
)
from mrmae_jax.models.short_attention import has_short_attention, short_attention


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


def _fused_attention(q, k, v, implementation, **options):
  q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
  x = jax.nn.dot_product_attention(q, k, v, **options, implementation=implementation)
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
