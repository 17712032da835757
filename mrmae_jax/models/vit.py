"""The plain ViT: MAE's encoder and the vision tower of every teacher."""

import functools
from typing import Any, Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mrmae_jax.models.attention import Scope, attention_scopes
from mrmae_jax.models.block import Block, rematerialize
from mrmae_jax.models.layers import (
  Dense,
  LayerFusion,
  LayerNorm,
  Mask,
  activate,
  drop_paths,
  patchify,
  position_table,
  prepend,
  take_visible,
  xavier_uniform,
)

POSITIONS = ("table", "rope", "none")


class ViT(nn.Module):
  """Pre-norm Vision Transformer with a field for each difference between families.

  The defaults are MAE's encoder (facebookresearch/mae models_mae.py).

  Attributes:
    patch_size, dim, depth, num_heads, mlp_dim: as in the ViT paper; `mlp_dim` is 4 * dim in every
      standard size, and the width of each half of a gated MLP.
    eps: epsilon of every LayerNorm.
    cls_token: prepend a CLS token. SigLIP has none.
    num_registers: tokens between CLS and the patches that no output shows (Darcet et al. 2024,
      arXiv 2309.16588).
    positions: "table" adds a table to the patches and to CLS, but not to registers; "rope" rotates
      the queries and keys of the patches (DINOv3); "none" does neither (BEiT).
    relative_positions: every block has a table of distances, see `attention.RelativePositions`.
      Registers have no place in it.
    key_bias: see `attention.Attention`.
    learned_positions: the table is a parameter [1, T, D] instead of the sine-cosine constant.
    rope_theta: base of the rotary periods.
    patch_bias: the patch embedding has a bias (CLIP's has none).
    norm_pre: apply a LayerNorm to all tokens before the blocks (CLIP).
    activation: a key of `layers.ACTIVATIONS`.
    gated: the MLP is gated, see `Block`.
    layer_scale: blocks have learned gains on both branches, see `Block`.
    fuse_layers: blocks, counted from 0, whose outputs are fused with the last one's before the last
      norm; () for none.
    proj_dim: width of the linear projection after the last norm (CLIP); 0 for none.
    attention_pool: add an attention-pooling head (SigLIP).
    drop_path: drop rate of the last block; it rises linearly from 0.
    window: side, in tokens, of the windows in which blocks attend; 0: all blocks attend to all
      tokens. Windows and distances are for detection, with the whole image and without CLS.
    global_blocks: blocks, counted from 0, that attend to all tokens nevertheless.
    distances: "decomposed": blocks have tables of vectors for distances, see
      `attention.DecomposedPositions` (ViTDet); "shared": there is one table of numbers for the
      blocks with windows and one for the others (ConvMAE's detection); "none".
    position_grid: (rows, columns) of the position table, which is interpolated to the image in
      every pass; (): the image's.
    remat: what the backward pass recomputes, see `rematerialize`.
    dtype: of the computation. Parameters are float32; LayerNorm, softmax and rotation compute in
      float32.
  """

  patch_size: int = 16
  dim: int = 768
  depth: int = 12
  num_heads: int = 12
  mlp_dim: int = 3072
  fuse_layers: tuple[int, ...] = ()
  learned_positions: bool = False
  eps: float = 1e-6
  drop_path: float = 0.0
  remat: str = "none"
  cls_token: bool = True
  num_registers: int = 0
  positions: str = "table"
  rope_theta: float = 100.0
  relative_positions: bool = False
  key_bias: bool = True
  patch_bias: bool = True
  norm_pre: bool = False
  activation: str = "gelu"
  gated: bool = False
  layer_scale: bool = False
  proj_dim: int = 0
  attention_pool: bool = False
  window: int = 0
  global_blocks: tuple[int, ...] = ()
  distances: str = "none"
  position_grid: tuple[int, ...] = ()
  dtype: Any = jnp.float32

  @property
  def can_select(self) -> bool:
    """Whether the last block may work on some of the patches alone: no rotation and no learned
    distances tell it where they are, and CLS has an attention before they are known.
    """
    has_places = self.positions == "rope" or self.relative_positions or self.distances != "none"
    is_whole = not (self.window or self.fuse_layers or self.attention_pool)
    return bool(self.cls_token) and is_whole and not has_places

  @nn.compact
  def __call__(
    self,
    images: jax.Array,
    mask: Mask | None = None,
    keys: jax.Array | None = None,
    select: Callable[[jax.Array], Mask] | None = None,
  ) -> tuple[jax.Array, dict[str, Any]]:
    """Encodes normalized images.

    The output has T tokens: CLS if there is one, then the visible patches.

    Args:
      images: [B, H, W, C], both sides multiples of `patch_size`.
      mask: the visible patches, one or several sets for each image; None encodes the whole image.
        positions="rope" takes none.
      keys: [B], one key per image, which decide the dropped paths; None drops nothing.
      select: out["attention"] of the whole image -> one mask for each image. The last block, and
        what follows it, works on CLS and the patches that are visible in it alone. It needs
        `can_select`, and no `mask`.

    Returns:
      x: [B, T, D] after fusion and the last norm. Patches come in the order of `mask.ids_keep`, or
        row by row without a mask. With k sets for each image, B * k rows, those of one image side
        by side.
      out: "layers": `depth` times [B, T, D], the residual stream after each block;
        "attention": float32 [B, V], from CLS, or the pooling head's query, to the V visible patches
        in the last block; mean over the heads. Weights on CLS and registers are dropped, the rest
        is not renormalized. Absent without CLS and head;
        "proj": [B, T, proj_dim], the projection of x, if proj_dim > 0;
        "pooled": [B, D], the output of the pooling head, if there is one;
        "mask": what `select` gave, if there is one.
    """
    if mask is not None and self.positions == "rope":
      raise ValueError("positions='rope' takes no mask")
    if select is not None and (mask is not None or not self.can_select):
      raise ValueError("select needs CLS, tables of positions and the whole image")
    if self.relative_positions and self.num_registers:
      raise ValueError(f"{self.num_registers} registers have no relative positions")
    grid = tuple(side // self.patch_size for side in images.shape[1:3])
    x, rotate = self._embed(images, mask, grid)
    if self.norm_pre:
      x = LayerNorm(self.eps, self.dtype, name="norm_pre")(x)

    scopes = attention_scopes(self, grid, mask)
    first_patch = self.cls_token + self.num_registers
    layers = []
    for i, drop in enumerate(drop_paths(self.drop_path, self.depth, keys)):
      block = functools.partial(self._block(i, scopes[i], rotate), drop=drop)
      if select is not None and i == self.depth - 1:
        x, attention, chosen = _end_with(block, x, select, first_patch)
      else:
        known = mask if self.relative_positions else None
        x, attention = block(x, mask=known, bias=scopes[i].bias)
      layers.append(_cut(x, self.cls_token, first_patch))
    out, x = {"layers": layers}, layers[-1]
    if select is not None:
      out["mask"] = chosen
    if self.cls_token:
      out["attention"] = attention[:, first_patch:]
    if self.fuse_layers:
      x = LayerFusion(self.dtype, name="fusion")([layers[i] for i in self.fuse_layers] + [x])
    x = LayerNorm(self.eps, self.dtype, name="norm")(x)
    if self.proj_dim:
      out["proj"] = Dense(self.proj_dim, use_bias=False, dtype=self.dtype, name="proj")(x)
    if self.attention_pool:
      out["pooled"], out["attention"] = AttentionPool(
        self.num_heads, self.mlp_dim, self.eps, self.activation, self.dtype, name="head"
      )(x)
    return x, out

  def _block(self, i: int, scope: Scope, rotate: Callable | None) -> nn.Module:
    """Returns block i, whose attention works among the tokens of a scope."""
    return rematerialize(Block, self.remat)(
      num_heads=self.num_heads,
      mlp_dim=self.mlp_dim,
      eps=self.eps,
      activation=self.activation,
      gated=self.gated,
      layer_scale=self.layer_scale,
      rotate=rotate,
      key_bias=self.key_bias,
      relative=scope.relative,
      windows=scope.windows,
      dtype=self.dtype,
      name=f"blocks_{i}",
    )

  def _embed(self, images: jax.Array, mask: Mask | None, grid: tuple[int, int]):
    """Embeds patches and prepends CLS and registers, all with their positions.

    Returns:
      Tokens [B, CLS + registers + V, D], and the rotation of positions="rope", or None.
    """
    x = patchify(images.astype(self.dtype), self.patch_size)
    x = x.reshape(images.shape[0], grid[0] * grid[1], -1)
    if mask is not None:  # the embedding works patch by patch: embed the visible patches alone
      x = take_visible(x, mask)
    x = Dense(self.dim, use_bias=self.patch_bias, dtype=self.dtype, name="patch_embed")(x)

    normal = nn.initializers.normal(0.02)
    rotate, prefix = None, []
    # The order of the parameters decides their random numbers: first positions, then CLS.
    if self.positions == "table":
      pos = position_table(self, grid, self.cls_token, self.position_grid)
      patches = pos[self.cls_token :]
      x = x + (patches if mask is None else patches[mask.ids_keep])
    elif self.positions == "rope":
      rotate = rotation(grid, self.dim // self.num_heads, self.rope_theta)
    if self.cls_token:
      cls = self.param("cls_token", normal, (1, 1, self.dim))
      prefix.append(cls + pos[:1] if self.positions == "table" else cls)
    if self.num_registers:
      prefix.append(self.param("registers", normal, (1, self.num_registers, self.dim)))
    if prefix:
      x = prepend(jnp.concatenate(prefix, axis=1), x)
    return x.astype(self.dtype), rotate


def _cut(x: jax.Array, start: int, stop: int) -> jax.Array:
  """Returns [B, T, D] without the tokens from `start` to `stop`, the registers."""
  return x if start == stop else jnp.concatenate([x[:, :start], x[:, stop:]], axis=1)


def _end_with(block: Callable, x: jax.Array, select: Callable, prefix: int):
  """Runs a block for CLS and selected patches alone; all tokens [B, T, D] are keys.

  It is called for CLS first, whose attention the selection may follow. XLA computes what both calls
  have in common, norm and keys, once.

  Args:
    block: a `Block`.
    x: its input.
    select: see `ViT.__call__`.
    prefix: number of tokens before the patches, which stay.

  Returns:
    [B, prefix + V, D], the attention of CLS, and the masks.
  """
  places = Mask.of_all(*x.shape[:2]).ids_keep
  _, attention = block(x, only=Mask(places[:, :1], places))
  mask = select(attention[:, prefix:])
  ids = (jnp.concatenate([places[:, :prefix], prefix + ids], axis=1) for ids in mask)
  return block(x, only=Mask(*ids))[0], attention, mask


def rotation(
  grid: tuple[int, int], head_dim: int, theta: float
) -> Callable[[jax.Array], jax.Array]:
  """Returns DINOv3's rotary positions (Siméoni et al. 2025, arXiv 2508.10104).

  The result turns the last N tokens of [B, heads, T, head_dim]. Patch centers lie in [-1, 1] on
  each axis. Channel k turns by 2 pi * coordinate * theta^(-4k / head_dim). The first quarter of the
  channels uses the row, the second the column. The other half repeats both: channel k turns
  together with channel k + head_dim / 2.
  """
  rows, columns = np.meshgrid(*((2 * np.arange(n) + 1) / n - 1 for n in grid), indexing="ij")
  periods = theta ** (4 * np.arange(head_dim // 4) / head_dim)
  angles = np.concatenate(
    [2 * np.pi * axis.reshape(-1, 1) / periods for axis in (rows, columns)] * 2, axis=1
  )
  cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

  def rotate(x):
    prefix, x = x[:, :, : -len(angles)], x[:, :, -len(angles) :]
    a, b = jnp.split(x, 2, axis=-1)
    turned = x.astype(jnp.float32) * cos
    turned += jnp.concatenate([-b, a], axis=-1).astype(jnp.float32) * sin
    return jnp.concatenate([prefix, turned.astype(x.dtype)], axis=2)

  return rotate


class AttentionPool(nn.Module):
  """SigLIP's head: a learned query attends to all tokens, and an MLP with a residual follows.

  The reference is google-research/big_vision models/vit.py, MAPHead. The attributes are those of
  `ViT`.
  """

  num_heads: int
  mlp_dim: int
  eps: float
  activation: str
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[B, N, D] -> pooled [B, D], and the query's attention, float32 [B, N], averaged over the
    heads.
    """
    dense = lambda features, name: Dense(features, dtype=self.dtype, name=name)
    b, n, d = x.shape
    probe = self.param("probe", xavier_uniform, (1, 1, d)).astype(self.dtype)
    # One packed weight as in the files. Keys of the probe and queries of the tokens are unused.
    qkv = dense(3 * d, "qkv")(jnp.concatenate([jnp.broadcast_to(probe, (b, 1, d)), x], axis=1))
    q, k, v = qkv.reshape(b, n + 1, 3, self.num_heads, -1).transpose(2, 0, 3, 1, 4)
    logits = jnp.einsum(
      "bhd,bhkd->bhk", q[:, :, 0], k[:, :, 1:], preferred_element_type=jnp.float32
    )
    attention = jax.nn.softmax(logits * q.shape[-1] ** -0.5, axis=-1)
    x = jnp.einsum("bhk,bhkd->bhd", attention.astype(self.dtype), v[:, :, 1:]).reshape(b, d)
    x = dense(d, "proj")(x)
    h = LayerNorm(self.eps, self.dtype, name="norm")(x)
    h = activate(self.activation, *dense(self.mlp_dim, "fc1")(h, apart=True))
    return x + dense(d, "fc2")(h), attention.mean(1)
