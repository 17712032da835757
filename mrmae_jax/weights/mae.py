"""Names of facebookresearch/mae (models_mae.py), pre-training model."""

from mrmae_jax.weights.convmae import IGNORE, decoder
from mrmae_jax.weights.table import Entry, conv, dense, norm, same, timm_block

__all__ = ["IGNORE", "decoder", "encoder"]


def encoder(depth: int) -> list[Entry]:
  """The ViT encoder with its CLS token."""
  table = [Entry("cls_token", ("cls_token",), same), *dense("patch_embed", "patch_embed.proj", conv)]
  for i in range(depth):
    table += timm_block(f"blocks_{i}", f"blocks.{i}")
  return table + norm("norm", "norm")
