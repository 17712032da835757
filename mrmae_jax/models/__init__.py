"""Networks: flax.linen and nothing of ours but each other."""

import jax
import jax.numpy as jnp

from mrmae_jax.models.convvit import ConvViT
from mrmae_jax.models.decoder import Decoder
from mrmae_jax.models.layers import attention_weights
from mrmae_jax.models.vit import ViT


def make_encoder(fields, dtype):
  """The encoder of a configuration's `encoder` section, or its JSON: its name and the fields of that module."""
  fields = {
    key: tuple(value) if isinstance(value, list) else value for key, value in dict(fields).items()
  }
  return {"convvit": ConvViT, "vit": ViT}[fields.pop("name")](dtype=dtype, **fields)


def make_decoder(fields, encoder, channels: int, dtype) -> Decoder:
  """The decoder of a configuration's `decoder` section for the patches of an encoder.

  As in ConvMAE, its MLP ratio is that of the encoder's first stage; MAE's encoder has the same ratio throughout. What is kept for
  the backward pass is what the encoder keeps.
  """
  ratio = encoder.mlp_ratios[0] if isinstance(encoder, ConvViT) else 4
  return Decoder(
    encoder.patch_size**2 * channels, mlp_ratio=ratio, remat=encoder.remat, dtype=dtype, **fields
  )


def encode(encoder, params, pixels: jax.Array, normed: bool | None = None) -> dict[str, jax.Array]:
  """What an encoder makes of whole images, nothing masked.

  Args:
    encoder: ConvViT or ViT.
    params: its parameters.
    pixels: normalised images [B, H, W, C], both sides multiples of its `patch_size`.
    normed: take the tokens after fusion and the last norm; else those of the last block. None: what fine-tuning starts from,
      where ConvMAE drops fusion and norm and MAE keeps the norm.

  Returns:
    "tokens" float32 [B, N, D] row by row, "pooled" [B, D] their mean, and where the encoder has them "cls" [B, D] and the
    feature maps "stage1", "stage2" [B, H/p, W/p, D'].
  """
  x, out = encoder.apply({"params": params}, pixels)
  normed = isinstance(encoder, ViT) if normed is None else normed
  x = (x if normed else out["layers"][-1]).astype(jnp.float32)
  tokens = x[:, int(encoder.cls_token) :]
  found = {"tokens": tokens, "pooled": tokens.mean(1)} | (
    {"cls": x[:, 0]} if encoder.cls_token else {}
  )
  return found | {
    name: out[name].astype(jnp.float32) for name in ("stage1", "stage2") if name in out
  }


def head_attention(encoder, params, pixels: jax.Array) -> jax.Array:
  """What each token of whole images attends to in each head of an encoder's last block, nothing masked.

  Computed again from the block's queries and keys, so that training, which needs no such array, does not carry it.

  Args:
    encoder, params, pixels: as in `encode`.

  Returns:
    float32 [B, heads, T, T], rows (queries) add up to 1; T = N tokens, row by row, with CLS before them where there is one.
  """
  block = f"{'blocks' if isinstance(encoder, ViT) else 'blocks3'}_{encoder.depth - 1}"
  wanted = lambda module, _: module.path == (block, "attn", "qkv")
  _, found = encoder.apply(
    {"params": params}, pixels, capture_intermediates=wanted, mutable=["intermediates"]
  )
  (qkv,) = found["intermediates"][block]["attn"]["qkv"]["__call__"]
  q, k, _ = (
    y.reshape(*y.shape[:2], encoder.num_heads, -1).swapaxes(1, 2)
    for y in jnp.split(qkv, 3, axis=-1)
  )
  return attention_weights(q, k)
