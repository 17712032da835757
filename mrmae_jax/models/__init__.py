"""Networks: flax.linen and nothing of ours but each other."""

from mrmae_jax.models.convvit import ConvViT
from mrmae_jax.models.vit import ViT


def make_encoder(fields, dtype):
  """The encoder of a configuration's `encoder` section: its name and the fields of that module."""
  fields = dict(fields)
  return {"convvit": ConvViT, "vit": ViT}[fields.pop("name")](dtype=dtype, **fields)
