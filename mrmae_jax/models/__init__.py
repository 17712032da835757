"""Networks in flax.linen. They import each other and the lowest floor of this project alone."""

import jax
import jax.numpy as jnp
import numpy as np

from mrmae_jax.models.attention import DecomposedPositions, RelativePositions, attention_weights
from mrmae_jax.models.convvit import ConvViT
from mrmae_jax.models.decoder import Decoder
from mrmae_jax.models.vit import ViT

ENCODERS = {"convvit": ConvViT, "vit": ViT}


def make_encoder(fields, dtype) -> ConvViT | ViT:
  """Returns the encoder that a configuration's `encoder` section describes.

  Args:
    fields: mapping with "name", a key of ENCODERS, and fields of that module; lists become tuples.
    dtype: of the computation.
  """
  fields = {
    key: tuple(value) if isinstance(value, list) else value for key, value in dict(fields).items()
  }
  return ENCODERS[fields.pop("name")](dtype=dtype, **fields)


def make_plain_encoder(fields, dtype) -> ConvViT | ViT:
  """Returns the encoder of `make_encoder` without fusion layers, which serve pre-training alone.

  models_convvit.py of ConvMAE leaves them out too.
  """
  fields = dict(fields) | {"fuse_layers": ()}
  if fields["name"] == "convvit":
    fields["fuse_stages"] = False
  return make_encoder(fields, dtype)


def make_decoder(fields, encoder, channels: int, dtype) -> Decoder:
  """Returns the decoder that a configuration's `decoder` section describes, for an encoder's
  patches.

  As in ConvMAE, its MLP ratio is that of the encoder's first stage; MAE's encoder has one ratio
  throughout. The decoder keeps for the backward pass what the encoder keeps.
  """
  ratio = encoder.mlp_ratios[0] if isinstance(encoder, ConvViT) else 4
  return Decoder(
    encoder.patch_size**2 * channels, mlp_ratio=ratio, remat=encoder.remat, dtype=dtype, **fields
  )


def encode(encoder, params, pixels: jax.Array, normed: bool | None = None) -> dict[str, jax.Array]:
  """Encodes images with nothing masked.

  Args:
    encoder: ConvViT or ViT.
    params: its parameters.
    pixels: normalized images [B, H, W, C], both sides multiples of the encoder's `patch_size`.
    normed: True returns the tokens after fusion and the last norm, False those of the last block.
      None returns what fine-tuning starts from: ConvMAE drops fusion and norm, MAE keeps the norm.

  Returns:
    "tokens" float32 [B, N, D] row by row; "pooled" [B, D], their mean; "cls" [B, D] if the encoder
    has a CLS token; "stage1", "stage2" [B, H/p, W/p, D'], the feature maps of a ConvViT's stages.
  """
  x, out = encoder.apply({"params": params}, pixels)
  normed = isinstance(encoder, ViT) if normed is None else normed
  x = (x if normed else out["layers"][-1]).astype(jnp.float32)
  tokens = x[:, int(encoder.cls_token) :]
  features = {"tokens": tokens, "pooled": tokens.mean(1)}
  if encoder.cls_token:
    features["cls"] = x[:, 0]
  maps = {name: out[name].astype(jnp.float32) for name in ("stage1", "stage2") if name in out}
  return features | maps


def head_attention(encoder, params, pixels: jax.Array) -> jax.Array:
  """Returns the attention of every token in each head of the last block, with nothing masked.

  It is recomputed from the block's queries and keys, so that training does not carry this array.

  Args:
    encoder, params, pixels: as in `encode`.

  Returns:
    float32 [B, heads, T, T]. Rows (queries) sum to 1. T counts the N tokens row by row, after CLS
    where there is one; registers are left out.

  Raises:
    ValueError: the last block works inside of windows.
  """
  if encoder.window and encoder.depth - 1 not in encoder.global_blocks:
    raise ValueError("the last block attends inside of windows alone; it has no map of the image")
  block = f"{'blocks' if isinstance(encoder, ViT) else 'blocks3'}_{encoder.depth - 1}"
  attention_params, bias = params[block]["attn"], None
  is_qkv = lambda module, _: module.path == (block, "attn", "qkv")
  _, captured = encoder.apply(
    {"params": params}, pixels, capture_intermediates=is_qkv, mutable=["intermediates"]
  )
  (qkv,) = captured["intermediates"][block]["attn"]["qkv"]["__call__"]
  q, k, _ = jnp.split(qkv, 3, axis=-1)
  if "q_bias" in attention_params:
    q = q + attention_params["q_bias"].astype(q.dtype)
  q, k = (y.reshape(*y.shape[:2], encoder.num_heads, -1).swapaxes(1, 2) for y in (q, k))
  grid = tuple(side // encoder.patch_size for side in pixels.shape[1:3])
  if "relative_positions" in attention_params:
    relative = RelativePositions(grid, bool(encoder.cls_token))
    bias = relative.bias(attention_params["relative_positions"])
  elif encoder.distances == "decomposed":
    tables = [attention_params[name] for name in ("rel_pos_h", "rel_pos_w")]
    bias = DecomposedPositions(grid).bias(q, tables)
  elif encoder.distances == "shared":
    bias = RelativePositions(grid, False).bias(params["global_distances"])
  weights = attention_weights(q, k, bias)
  if registers := getattr(encoder, "num_registers", 0):
    first = int(encoder.cls_token)
    kept = np.r_[:first, first + registers : weights.shape[-1]]
    weights = weights[:, :, kept][..., kept]
    weights /= weights.sum(-1, keepdims=True)
  return weights
