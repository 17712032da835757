"""The plain ViT student: encoder of MAE (facebookresearch/mae models_mae.py)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mrmae_jax.models.layers import (
  Block,
  Dense,
  LayerFusion,
  Mask,
  drop_paths,
  layer_norm,
  patchify,
  position_table,
  rematerialised,
  take_visible,
)


class ViT(nn.Module):
  """Pre-norm ViT with a CLS token.

  Attributes:
    patch_size, dim, depth, num_heads, mlp_dim: as in the ViT paper; mlp_dim is 4 * dim in every standard size.
    fuse_layers: blocks whose outputs are fused with the last one's before the last norm, counted from 0; () for none.
    learned_positions: the position table is a parameter [1, 1 + N, D] instead of a constant, in which CLS has zeros.
    eps: of every LayerNorm.
    drop_path: of the last block; rises linearly from 0.
    remat: of the blocks, see `rematerialised`.
    dtype: of the computation; parameters are float32.
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
  dtype: Any = jnp.float32
  cls_token = True  # not a choice

  @nn.compact
  def __call__(
    self, images: jax.Array, mask: Mask | None = None, keys: jax.Array | None = None
  ) -> tuple[jax.Array, dict[str, Any]]:
    """Encodes normalised images.

    Args:
      images: [B, H, W, C], both sides multiples of `patch_size`.
      mask: the visible tokens, one or several sets for each image; None encodes the whole image.
      keys: [B], one per image, to drop paths by; None drops nothing.

    Returns:
      x: [B, 1 + V, D] after fusion and the last norm, CLS first, then the tokens in the order of `mask.ids_keep`. With k
        sets for each image, B * k rows, those of one image side by side.
      out: "layers": `depth` times [B, 1 + V, D], the output of each block; "attention": float32 [B, V], what the
        last one's CLS attends to.
    """
    b, h, w, _ = images.shape
    grid = (h // self.patch_size, w // self.patch_size)
    x = patchify(images.astype(self.dtype), self.patch_size).reshape(b, grid[0] * grid[1], -1)
    pos = position_table(self, grid, cls_token=True)
    if mask is None:
      token_pos = pos[1:]
    else:  # the embedding works patch by patch, so only the visible patches need to be embedded
      x, token_pos = take_visible(x, mask), pos[1:][mask.ids_keep]
    x = Dense(self.dim, dtype=self.dtype, name="patch_embed")(x)
    cls = self.param("cls_token", nn.initializers.normal(0.02), (1, 1, self.dim)) + pos[:1]
    x = jnp.concatenate(
      [jnp.broadcast_to(cls, (len(x), 1, self.dim)), x + token_pos], axis=1
    ).astype(self.dtype)

    layers = []
    for i, drop in enumerate(drop_paths(self.drop_path, self.depth, keys)):
      block = rematerialised(Block, self.remat)
      x, attention = block(self.num_heads, self.mlp_dim, self.eps, self.dtype, name=f"blocks_{i}")(
        x, drop
      )
      layers.append(x)
    out = {"layers": layers, "attention": attention[:, 1:]}
    if self.fuse_layers:
      x = LayerFusion(self.dtype, name="fusion")([layers[i] for i in self.fuse_layers] + [x])
    return layer_norm(self.eps, self.dtype, "norm")(x), out
