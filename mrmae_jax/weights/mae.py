"""Names of facebookresearch/mae (models_mae.py, models_vit.py) and of transformers' ViTMAE."""

import re
from typing import Any

from mrmae_jax.errors import WeightsError
from mrmae_jax.models.decoder import Decoder
from mrmae_jax.models.vit import ViT
from mrmae_jax.weights.table import (
  Entry,
  conv,
  decomposed,
  dense,
  depth,
  fusion,
  linear,
  mlp_ratio,
  norm,
  pack,
  same,
  shape_of,
  timm_block,
)

MARKERS = ("cls_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight")


def encoder_table(module: ViT) -> list[Entry]:
  """Returns the entries of an encoder."""
  table = [Entry("cls_token", ("cls_token",), same)] if module.cls_token else []
  table += dense("patch_embed", "patch_embed.proj", conv(module.patch_size))
  table += [Entry("pos_embed", ("pos_embed",), same)] if module.learned_positions else []
  for i in range(module.depth):
    table += timm_block(f"blocks_{i}", f"blocks.{i}")
    table += decomposed(module, f"blocks_{i}", f"blocks.{i}")
  return table + fusion(module) + norm("norm", "norm")


def encoder_fields(shapes: dict[str, tuple[int, ...]], source: str) -> dict[str, Any]:
  """Derives fields of ViT from shapes: all but heads, fused layers and the kind of positions.

  Raises:
    WeightsError: a tensor that the sizes depend on is missing or has another rank.
  """
  patch_embed = shape_of(shapes, "patch_embed.proj.weight", 4, source)
  return dict(
    name="vit",
    patch_size=patch_embed[-1],
    dim=patch_embed[0],
    depth=depth(shapes, "blocks", source),
    mlp_dim=shape_of(shapes, "blocks.0.mlp.fc1.weight", 2, source)[0],
  )


# MAE's word for a module -> transformers', inside a block and around the blocks. Names around the
# decoder's blocks are the same in both.
_BLOCK = {
  "norm1": "layernorm_before",
  "attn.proj": "attention.output.dense",
  "norm2": "layernorm_after",
  "mlp.fc1": "intermediate.dense",
  "mlp.fc2": "output.dense",
}
_ENCODER = {
  "cls_token": "embeddings.cls_token",
  "pos_embed": "embeddings.position_embeddings",
  "norm": "layernorm",
  "patch_embed.proj": "embeddings.patch_embeddings.projection",
  "blocks": "encoder.layer",
}
# The files of facebook/vit-mae-*, which every version reads; transformers 5 writes the second form.
DECODER_BLOCKS = ("decoder.decoder_layers", "decoder.decoder_encoder.layer")


def to_hf(entry: Entry, prefix: str = "vit.", decoder_blocks: str = DECODER_BLOCKS[0]) -> Entry:
  """Returns the entry of the same parameter in transformers' names.

  Args:
    entry: of `encoder_table` or `table.decoder_table`.
    prefix: of the encoder; "" in a ViTMAEModel without a decoder.
    decoder_blocks: one of DECODER_BLOCKS.
  """
  module, weight = re.fullmatch(r"(.*?)(\.weight|\.bias|)", entry.theirs[0]).groups()
  block = re.fullmatch(r"(decoder_blocks|blocks)\.(\d+)\.(.*)", module)
  if not block:
    return entry._replace(
      theirs=((prefix + _ENCODER[module] if module in _ENCODER else f"decoder.{module}") + weight,)
    )
  blocks, i, layer = block.groups()
  blocks = f"{prefix}{_ENCODER[blocks]}.{i}." if blocks in _ENCODER else f"{decoder_blocks}.{i}."
  if layer == "attn.qkv":
    return Entry(
      entry.ours,
      tuple(f"{blocks}attention.attention.{x}{weight}" for x in ("query", "key", "value")),
      linear if weight == ".weight" else pack,
    )
  return entry._replace(theirs=(f"{blocks}{_BLOCK[layer]}{weight}",))


_DEFAULTS = dict(  # of transformers' ViTMAEConfig, for keys that are left out
  hidden_size=768,
  num_hidden_layers=12,
  num_attention_heads=12,
  intermediate_size=3072,
  hidden_act="gelu",
  layer_norm_eps=1e-12,
  image_size=224,
  patch_size=16,
  num_channels=3,
  decoder_num_attention_heads=16,
  decoder_hidden_size=512,
  decoder_num_hidden_layers=8,
  decoder_intermediate_size=2048,
  mask_ratio=0.75,
  norm_pix_loss=False,
)


def hf_fields(
  config: dict[str, Any], source: str
) -> tuple[dict[str, Any], dict[str, Any], tuple[int, int], dict[str, Any]]:
  """Reads config.json.

  Returns:
    Fields of ViT, fields of Decoder, the grid of the position tables, {"mask_ratio", "norm_pix"}.

  Raises:
    WeightsError: it is another model or activation, patches are not square, or a value is not a
      size.
  """
  if config.get("model_type") != "vit_mae":
    raise WeightsError(
      f"{source}: model_type is {config.get('model_type')!r}, expected 'vit_mae'; other models "
      "load as teachers, with --config.teacher.path"
    )
  c = _DEFAULTS | config
  if c["hidden_act"] != "gelu":
    raise WeightsError(
      f"{source}: hidden_act is {c['hidden_act']!r}, expected 'gelu', which MAE has"
    )
  try:
    patch, side = (
      tuple(x) if isinstance(x, list) else (x, x) for x in (c["patch_size"], c["image_size"])
    )
    if patch[0] != patch[1]:
      raise WeightsError(
        f"{source}: patches of {patch[0]}x{patch[1]} pixels are not supported; they must be square"
      )
    fields = dict(
      name="vit",
      patch_size=patch[0],
      dim=c["hidden_size"],
      depth=c["num_hidden_layers"],
      num_heads=c["num_attention_heads"],
      mlp_dim=c["intermediate_size"],
      eps=c["layer_norm_eps"],
    )
    width, hidden = c["decoder_hidden_size"], c["decoder_intermediate_size"]
    if not all(type(x) is int and x > 0 for x in (width, hidden)):  # their ratio alone is kept
      raise WeightsError(
        f"{source}: decoder_hidden_size={width!r:.60}, decoder_intermediate_size={hidden!r:.60} "
        "given; expected whole numbers from 1"
      )
    decoder_fields = dict(
      out_dim=patch[0] ** 2 * c["num_channels"],
      dim=width,
      depth=c["decoder_num_hidden_layers"],
      num_heads=c["decoder_num_attention_heads"],
      mlp_ratio=mlp_ratio(hidden, width),
      eps=c["layer_norm_eps"],
    )
    grid = (side[0] // patch[0], side[1] // patch[0])
    method = dict(mask_ratio=c["mask_ratio"], norm_pix=c["norm_pix_loss"])
  except (TypeError, ArithmeticError, LookupError) as error:
    raise WeightsError(f"{source} holds a size that is none: {error}") from None
  return fields, decoder_fields, grid, method


def hf_config(
  module: ViT,
  decoder_module: Decoder | None,
  grid: tuple[int, int],
  channels: int,
  method: dict[str, Any],
) -> dict[str, Any]:
  """Returns the config.json of a model: `hf_fields` backwards."""
  rows, columns = (side * module.patch_size for side in grid)
  c = {
    "architectures": ["ViTMAEModel"],
    "model_type": "vit_mae",
    "hidden_size": module.dim,
    "num_hidden_layers": module.depth,
    "num_attention_heads": module.num_heads,
    "intermediate_size": module.mlp_dim,
    "hidden_act": "gelu",
    "layer_norm_eps": module.eps,
    "image_size": rows if rows == columns else [rows, columns],
    "patch_size": module.patch_size,
    "num_channels": channels,
    "qkv_bias": True,
    "mask_ratio": method["mask_ratio"],
    "norm_pix_loss": method["norm_pix"],
    "attention_probs_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0,
    "initializer_range": 0.02,
  }
  if decoder_module is None:
    return c
  return c | {
    "architectures": ["ViTMAEForPreTraining"],
    "decoder_hidden_size": decoder_module.dim,
    "decoder_num_hidden_layers": decoder_module.depth,
    "decoder_num_attention_heads": decoder_module.num_heads,
    "decoder_intermediate_size": int(decoder_module.dim * decoder_module.mlp_ratio),
  }
