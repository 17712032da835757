"""The parts of pre-training that are thrown away afterwards: MAE's decoder and the mimic heads."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mrmae_jax.models.block import Block, rematerialize
from mrmae_jax.models.layers import (
  Dense,
  LayerNorm,
  Mask,
  activate,
  position_table,
  prepend,
  put_visible,
)


class Decoder(nn.Module):
  """MAE's decoder: a small ViT on visible tokens and mask tokens, with one output vector per token.

  Attributes:
    out_dim: length of a prediction, patch_size^2 * channels.
    dim, depth, num_heads, mlp_ratio: sizes of the transformer. ConvMAE takes mlp_ratio from its
      first encoder stage.
    learned_positions: the position table is a parameter, for published weights with tables of their
      own.
    remat: what the backward pass recomputes, see `rematerialize`.
    eps: epsilon of every LayerNorm.
    dtype: of the computation; parameters are float32.
  """

  out_dim: int
  dim: int = 512
  depth: int = 8
  num_heads: int = 16
  mlp_ratio: float = 4
  learned_positions: bool = False
  remat: str = "none"
  eps: float = 1e-6
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, tokens: jax.Array, mask: Mask, grid: tuple[int, int], everywhere: bool = True
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Predicts tokens of the image from the visible ones.

    Args:
      tokens: [B, V, D], or [B, 1 + V, D] with a leading CLS token; visible tokens in the order of
        `mask.ids_keep`.
      mask: the mask of these tokens.
      grid: (rows, columns) of tokens; rows * columns = N.
      everywhere: predict every token. False predicts the masked tokens alone; the others end before
        the last block's MLP.

    Returns:
      prediction: float32 [B, N, out_dim], row by row, without CLS; or [B, N - V, out_dim] in the
        order of `mask.masked`.
      out: "tokens": [B, N or N - V, dim], the input of the last Linear layer.
    """
    x = Dense(self.dim, dtype=self.dtype, name="embed")(tokens)
    mask_token = self.param("mask_token", nn.initializers.normal(0.02), (1, 1, self.dim)).astype(
      self.dtype
    )
    cls, visible = jnp.split(x, [x.shape[1] - mask.ids_keep.shape[1]], axis=1)
    x = jnp.where(mask.removed[..., None], mask_token, put_visible(visible, mask))
    x = prepend(cls, x) if cls.shape[1] else x
    x = x + position_table(self, grid, cls_token=bool(cls.shape[1])).astype(self.dtype)
    block = rematerialize(Block, self.remat)
    for i in range(self.depth):
      only = mask.masked if i == self.depth - 1 and not everywhere else None
      x, _ = block(
        self.num_heads,
        int(self.dim * self.mlp_ratio),
        self.eps,
        dtype=self.dtype,
        name=f"blocks_{i}",
      )(x, only=only)
    x = LayerNorm(self.eps, self.dtype, name="norm")(x)
    out = {"tokens": x[:, cls.shape[1] :] if everywhere else x}
    prediction = Dense(self.out_dim, dtype=self.dtype, name="pred")(out["tokens"])
    return prediction.astype(jnp.float32), out


class MimicHead(nn.Module):
  """Maps student tokens to the teacher's width: [B, T, D] -> float32 [B, T, out_dim].

  Attributes:
    out_dim: the teacher's width.
    kind: "linear"; "norm_linear", with a LayerNorm before it; or "mlp", Linear-GELU-Linear of the
      student's width.
    dtype: of the computation; parameters are float32.
  """

  out_dim: int
  kind: str = "linear"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    x = tokens
    if self.kind == "norm_linear":
      x = LayerNorm(1e-6, self.dtype, name="norm")(x)
    elif self.kind == "mlp":
      hidden = Dense(x.shape[-1], dtype=self.dtype, name="hidden")
      x = activate("gelu", *hidden(x, apart=True))
    x = Dense(self.out_dim, dtype=self.dtype, name="linear")(x)
    return x.astype(jnp.float32)
