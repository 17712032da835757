"""The plain ViT: encoder of MAE (fixed sine-cosine positions) and tower of every teacher (learned positions)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mrmae_jax.models.layers import Block, Mask, layer_norm, patchify, sincos_2d, take_visible, xavier_uniform


class ViT(nn.Module):
  """Pre-norm ViT with a CLS token.

  Attributes:
    patch_size, dim, depth, num_heads, mlp_dim: as in the ViT paper; mlp_dim is 4 * dim in every standard size.
    eps: of every LayerNorm.
    activation: "gelu" (exact) or "quick_gelu" (OpenAI CLIP).
    learned_positions: a trained table of the input's grid, CLS first; else fixed sine-cosine, CLS zero.
    norm_pre: LayerNorm on all tokens before the blocks (CLIP).
    patch_bias: bias of the patch embedding (CLIP has none).
    proj_dim: width of the linear projection after the last norm (CLIP); 0: none.
    dtype: of the computation; parameters are float32.
  """

  patch_size: int = 16
  dim: int = 768
  depth: int = 12
  num_heads: int = 12
  mlp_dim: int = 3072
  eps: float = 1e-6
  activation: str = "gelu"
  learned_positions: bool = False
  norm_pre: bool = False
  patch_bias: bool = True
  proj_dim: int = 0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array, mask: Mask | None = None) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Encodes normalised images.

    Args:
      images: [B, H, W, C], both sides multiples of `patch_size`.
      mask: the visible tokens; None encodes the whole image.

    Returns:
      x: [B, 1 + V, D] after the last norm, CLS first, then the tokens in the order of `mask.ids_keep`.
      out: "raw": [B, 1 + V, D], the residual stream before the last norm;
        "proj": [B, 1 + V, proj_dim], the projection of x, where the model has one.
    """
    b, h, w, _ = images.shape
    grid = (h // self.patch_size, w // self.patch_size)
    x = patchify(images.astype(self.dtype), self.patch_size).reshape(b, grid[0] * grid[1], -1)
    if self.learned_positions:
      pos = self.param("pos_embed", nn.initializers.normal(0.02), (1, 1 + x.shape[1], self.dim))[0]
    else:
      pos = jnp.asarray(sincos_2d(self.dim, grid, cls_token=True))

    if mask is None:
      token_pos = pos[1:]
    else:  # the embedding works patch by patch, so only the visible patches need to be embedded
      x, token_pos = take_visible(x, mask), pos[1:][mask.ids_keep]
    x = nn.Dense(self.dim, use_bias=self.patch_bias, kernel_init=xavier_uniform, dtype=self.dtype, name="patch_embed")(x)
    cls = self.param("cls_token", nn.initializers.normal(0.02), (1, 1, self.dim)) + pos[:1]
    x = jnp.concatenate([jnp.broadcast_to(cls, (b, 1, self.dim)), x + token_pos], axis=1).astype(self.dtype)
    if self.norm_pre:
      x = layer_norm(self.eps, self.dtype, "norm_pre")(x)

    for i in range(self.depth):
      x = Block(self.num_heads, self.mlp_dim, self.eps, self.activation, self.dtype, name=f"blocks_{i}")(x)
    out = {"raw": x}
    x = layer_norm(self.eps, self.dtype, "norm")(x)
    if self.proj_dim:
      out["proj"] = nn.Dense(self.proj_dim, use_bias=False, dtype=self.dtype, name="proj")(x)
    return x, out
