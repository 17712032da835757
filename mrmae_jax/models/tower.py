"""The vision tower of every frozen teacher: one pre-norm ViT with switches for all in which CLIP, DINO and others differ."""

from typing import Any, Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mrmae_jax.models.layers import (
  Attention,
  Dense,
  Mask,
  gelu,
  layer_norm,
  patchify,
  quick_gelu,
  take_visible,
  xavier_uniform,
)

ACTIVATIONS = {
  "gelu": gelu,
  "gelu_tanh": jax.nn.gelu,
  "quick_gelu": quick_gelu,
  "silu": jax.nn.silu,
}


class Tower(nn.Module):
  """ViT tower.

  Attributes:
    patch_size, dim, depth, num_heads: as in the ViT paper.
    mlp_dim: hidden width of the MLP; of each half, if it is gated.
    eps: of every LayerNorm.
    activation: a key of ACTIVATIONS: exact, tanh and sigmoid form of GELU, or SiLU.
    gated: the MLP is fc2(activation(a) * b) with [a, b] = fc1(x) (SwiGLU, Shazeer 2020, arXiv 2002.05202).
    layer_scale: learned gains on both branches of a block (Touvron et al. 2021, arXiv 2103.17239).
    cls_token: there is one; SigLIP has none.
    num_registers: tokens between CLS and the patches that no output shows (Darcet et al. 2024, arXiv 2309.16588).
    positions: "table": learned for the input's grid, CLS first where there is one, none for registers; "rope": rotary, on
      patches only (DINOv3).
    rope_theta: base of the rotary periods.
    norm_pre: LayerNorm on all tokens before the blocks (CLIP).
    patch_bias: bias of the patch embedding (CLIP has none).
    proj_dim: width of the linear projection after the last norm (CLIP); 0: none.
    probe: attention-pool head (SigLIP).
    dtype: of the computation; parameters are float32, LayerNorm, softmax and rotation are computed in float32.
  """

  patch_size: int = 16
  dim: int = 768
  depth: int = 12
  num_heads: int = 12
  mlp_dim: int = 3072
  eps: float = 1e-6
  activation: str = "gelu"
  gated: bool = False
  layer_scale: bool = False
  cls_token: bool = True
  num_registers: int = 0
  positions: str = "table"
  rope_theta: float = 100.0
  norm_pre: bool = False
  patch_bias: bool = True
  proj_dim: int = 0
  probe: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, images: jax.Array, mask: Mask | None = None
  ) -> tuple[jax.Array, dict[str, Any]]:
    """Encodes normalised images. T tokens come out: CLS, where there is one, then the N patches row by row.

    Args:
      images: [B, H, W, C], both sides multiples of `patch_size`.
      mask: the visible tokens, for towers with a position table; None encodes the whole image.

    Returns:
      x: [B, T, D] after the last norm.
      out: "layers": `depth` times [B, T, D], the residual stream after each block;
        "attention": float32 [B, N], what CLS (or the probe) attends to among the patches in the last block (or in the
        head), mean over the heads: CLS's own and the registers' share is cut off, the rest not renormalised;
        "proj": [B, T, proj_dim], the projection of x, and "pooled": [B, D], the head's output, where the model has them.
    """
    if mask is not None and self.positions != "table":
      raise ValueError(f"a mask needs positions='table', not {self.positions!r}")
    b, h, w, _ = images.shape
    grid = (h // self.patch_size, w // self.patch_size)
    n = grid[0] * grid[1]
    x = patchify(images.astype(self.dtype), self.patch_size).reshape(b, n, -1)
    if (
      mask is not None
    ):  # the embedding works patch by patch, so only the visible patches need to be embedded
      x = take_visible(x, mask)
    x = Dense(self.dim, use_bias=self.patch_bias, dtype=self.dtype, name="patch_embed")(x)

    normal = nn.initializers.normal(0.02)
    prefix = [self.param("cls_token", normal, (1, 1, self.dim))] if self.cls_token else []
    rotate = None
    if self.positions == "table":
      pos = self.param("pos_embed", normal, (1, len(prefix) + n, self.dim))
      patches = pos[:, len(prefix) :]
      x = x + (patches if mask is None else patches[0][mask.ids_keep])
      prefix = [token + pos[:, :1] for token in prefix]
    else:
      rotate = _rotation(grid, self.dim // self.num_heads, self.rope_theta)
    if self.num_registers:
      prefix.append(self.param("registers", normal, (1, self.num_registers, self.dim)))
    x = jnp.concatenate(
      [*(jnp.broadcast_to(p, (b, *p.shape[1:])) for p in prefix), x], axis=1
    ).astype(self.dtype)
    if self.norm_pre:
      x = layer_norm(self.eps, self.dtype, "norm_pre")(x)

    first_patch = self.cls_token + self.num_registers
    shown = lambda x: (
      jnp.concatenate([x[:, : self.cls_token], x[:, first_patch:]], axis=1)
      if self.num_registers
      else x
    )
    layers = []
    for i in range(self.depth):
      x, attention = _Block(
        self.num_heads,
        self.mlp_dim,
        self.eps,
        self.activation,
        self.gated,
        self.layer_scale,
        rotate,
        self.dtype,
        name=f"blocks_{i}",
      )(x)
      layers.append(shown(x))
    out = {"layers": layers}
    x = layer_norm(self.eps, self.dtype, "norm")(layers[-1])
    if self.cls_token:
      out["attention"] = attention[:, first_patch:]
    if self.proj_dim:
      out["proj"] = Dense(self.proj_dim, use_bias=False, dtype=self.dtype, name="proj")(x)
    if self.probe:
      out["pooled"], out["attention"] = _AttentionPool(
        self.num_heads, self.mlp_dim, self.eps, self.activation, self.dtype, name="head"
      )(x)
    return x, out


def _rotation(
  grid: tuple[int, int], head_dim: int, theta: float
) -> Callable[[jax.Array], jax.Array]:
  """Rotary positions of DINOv3 (Siméoni et al. 2025, arXiv 2508.10104): turns the last N tokens of [B, heads, T, head_dim].

  Patch centres lie in [-1, 1] on each axis; the angle of channel k is 2 pi * coordinate * theta^(-4k / head_dim), the row's
  for the first quarter of the channels, the column's for the second, both again for the other half, which they turn with.
  """
  rows, columns = np.meshgrid(*((2 * np.arange(n) + 1) / n - 1 for n in grid), indexing="ij")
  periods = theta ** (4 * np.arange(head_dim // 4) / head_dim)
  angles = np.concatenate(
    [2 * np.pi * axis.reshape(-1, 1) / periods for axis in (rows, columns)] * 2, axis=1
  )
  cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

  def rotate(x):
    still, x = x[:, :, : -len(angles)], x[:, :, -len(angles) :]
    a, b = jnp.split(x, 2, axis=-1)
    turned = (
      x.astype(jnp.float32) * cos + jnp.concatenate([-b, a], axis=-1).astype(jnp.float32) * sin
    )
    return jnp.concatenate([still, turned.astype(x.dtype)], axis=2)

  return rotate


class _Block(nn.Module):
  """x += scale1 * attention(norm1(x)); x += scale2 * mlp(norm2(x)). The arguments are those of `Tower`."""

  num_heads: int
  mlp_dim: int
  eps: float
  activation: str
  gated: bool
  layer_scale: bool
  rotate: Callable[[jax.Array], jax.Array] | None
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[B, T, D] -> [B, T, D], and the first token's attention [B, T] (see `Attention`)."""
    dense = lambda features, name: Dense(features, dtype=self.dtype, name=name)

    def scaled(name, y):
      return (
        y * self.param(name, nn.initializers.ones, y.shape[-1:]).astype(self.dtype)
        if self.layer_scale
        else y
      )

    mixed, attention = Attention(self.num_heads, self.rotate, self.dtype, name="attn")(
      layer_norm(self.eps, self.dtype, "norm1")(x)
    )
    x = x + scaled("scale1", mixed)
    h = dense(self.mlp_dim * (1 + self.gated), "fc1")(layer_norm(self.eps, self.dtype, "norm2")(x))
    h, *up = jnp.split(h, 1 + self.gated, axis=-1)
    h = ACTIVATIONS[self.activation](h)
    return x + scaled("scale2", dense(x.shape[-1], "fc2")(h * up[0] if up else h)), attention


class _AttentionPool(nn.Module):
  """SigLIP's head (google-research/big_vision models/vit.py, MAPHead): a learned query attends to all tokens, then an MLP."""

  num_heads: int
  mlp_dim: int
  eps: float
  activation: str
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[B, N, D] -> pooled [B, D], and what the probe attends to: float32 [B, N], mean over the heads."""
    dense = lambda features, name: Dense(features, dtype=self.dtype, name=name)
    b, n, d = x.shape
    probe = self.param("probe", xavier_uniform, (1, 1, d)).astype(self.dtype)
    # One packed weight as in the files. Keys of the probe and queries of the tokens are computed and not used.
    qkv = dense(3 * d, "qkv")(jnp.concatenate([jnp.broadcast_to(probe, (b, 1, d)), x], axis=1))
    q, k, v = qkv.reshape(b, n + 1, 3, self.num_heads, -1).transpose(2, 0, 3, 1, 4)
    logits = jnp.einsum(
      "bhd,bhkd->bhk", q[:, :, 0], k[:, :, 1:], preferred_element_type=jnp.float32
    )
    attention = jax.nn.softmax(logits * q.shape[-1] ** -0.5, axis=-1)
    x = jnp.einsum("bhk,bhkd->bhd", attention.astype(self.dtype), v[:, :, 1:]).reshape(b, d)
    x = dense(d, "proj")(x)
    h = dense(self.mlp_dim, "fc1")(layer_norm(self.eps, self.dtype, "norm")(x))
    return x + dense(d, "fc2")(ACTIVATIONS[self.activation](h)), attention.mean(1)
