"""Names of Alpha-VL/ConvMAE (models_convmae.py; models_convvit.py for fine-tuning)."""

import re
from typing import Any

from mrmae_jax.errors import WeightsError
from mrmae_jax.models.convvit import ConvViT
from mrmae_jax.models.decoder import Decoder
from mrmae_jax.weights.table import (
  Entry,
  conv,
  count_blocks,
  dense,
  depthwise,
  norm,
  same,
  timm_block,
)

# No other family has all of these.
MARKERS = (
  "patch_embed1.proj.weight",
  "patch_embed4.weight",
  "blocks1.0.conv1.weight",
  "blocks3.0.attn.qkv.weight",
)


def encoder(module: ConvViT) -> list[Entry]:
  """Every parameter of an encoder. Fusion of layers is ours, and so are its names."""
  table, token_size = [], module.patch_size
  for stage, p in enumerate(module.patch_sizes, 1):
    name = f"patch_embed{stage}"
    table += dense(f"{name}/proj", f"{name}.proj", conv(p)) + norm(f"{name}/norm", f"{name}.norm")
  for stage in (1, 2):
    token_size //= module.patch_sizes[stage - 1]
    name = f"stage{stage}_output_decode"
    table += dense(name, name, conv(token_size)) if module.fuse_stages else []
    for i in range(module.depths[stage - 1]):
      ours, theirs = f"blocks{stage}_{i}", f"blocks{stage}.{i}"
      table += norm(f"{ours}/norm1", f"{theirs}.norm1") + norm(f"{ours}/norm2", f"{theirs}.norm2")
      table += [
        Entry(f"{ours}/depthwise_kernel", (f"{theirs}.attn.weight",), depthwise),
        Entry(f"{ours}/depthwise_bias", (f"{theirs}.attn.bias",), same),
      ]
      for layer, name in (
        ("conv1", "conv1"),
        ("conv2", "conv2"),
        ("fc1", "mlp.fc1"),
        ("fc2", "mlp.fc2"),
      ):
        table += dense(f"{ours}/{layer}", f"{theirs}.{name}", conv(1))
  for i in range(module.depth):
    table += timm_block(f"blocks3_{i}", f"blocks3.{i}")
  for name, there in (("cls_token", module.cls_token), ("pos_embed", module.learned_positions)):
    table += [Entry(name, (name,), same)] if there else []
  return table + fusion(module) + dense("patch_embed4", "patch_embed4") + norm("norm", "norm")


def fusion(module) -> list[Entry]:
  """The fusion of layers of either encoder, under a prefix of ours: no published model has it."""
  depths = [f"fusion/depth_{i}" for i in range(len(module.fuse_layers))]
  table = [entry for name in depths for entry in dense(name, name.replace("/", "."))]
  return table + [Entry("fusion/weights", ("fusion.weights",), same)] if depths else []


def decoder(module: Decoder) -> list[Entry]:
  """Every parameter of a decoder; MAE (facebookresearch/mae models_mae.py) uses the same names."""
  table = [Entry("mask_token", ("mask_token",), same)]
  table += (
    dense("embed", "decoder_embed") + norm("norm", "decoder_norm") + dense("pred", "decoder_pred")
  )
  table += [Entry("pos_embed", ("decoder_pos_embed",), same)] if module.learned_positions else []
  for i in range(module.depth):
    table += timm_block(f"blocks_{i}", f"decoder_blocks.{i}")
  return table


def fields(shapes: dict[str, tuple[int, ...]], source: str) -> dict[str, Any]:
  """The fields of ConvViT that shapes tell: all but heads, fused layers and the kind of its positions.

  Raises:
    WeightsError: a tensor that would tell is missing or has another rank.
  """
  projections = [
    shape_of(shapes, f"patch_embed{stage}.proj.weight", 4, source) for stage in (1, 2, 3)
  ]
  dims = tuple(shape[0] for shape in projections)
  hidden = [
    shape_of(shapes, f"blocks{stage}.0.mlp.fc1.weight", 2 if stage == 3 else 4, source)[0]
    for stage in (1, 2, 3)
  ]
  return dict(
    name="convvit",
    patch_sizes=tuple(shape[-1] for shape in projections),
    embed_dims=dims,
    depths=tuple(depth(shapes, f"blocks{stage}", source) for stage in (1, 2, 3)),
    mlp_ratios=tuple(map(mlp_ratio, hidden, dims)),
    cls_token="cls_token" in shapes,
    fuse_stages="stage1_output_decode.weight" in shapes,
  )


def decoder_fields(shapes: dict[str, tuple[int, ...]], source: str) -> dict[str, Any]:
  """The fields of Decoder that shapes tell: all but heads and the kind of its positions; {} without a decoder."""
  if "decoder_embed.weight" not in shapes:
    return {}
  dim = shape_of(shapes, "decoder_embed.weight", 2, source)[0]
  return dict(
    out_dim=shape_of(shapes, "decoder_pred.weight", 2, source)[0],
    dim=dim,
    depth=depth(shapes, "decoder_blocks", source),
    mlp_ratio=mlp_ratio(shape_of(shapes, "decoder_blocks.0.mlp.fc1.weight", 2, source)[0], dim),
  )


def shape_of(shapes, name: str, rank: int, source: str) -> tuple[int, ...]:
  """The shape of a tensor that must be there."""
  if len(shapes.get(name, ())) != rank:
    found = f"has shape {tuple(shapes[name])}" if name in shapes else "is missing"
    raise WeightsError(
      f"{source} does not fit the model: {name} {found}, expected {rank} axes (a part of a file, or another "
      "model?)"
    )
  return shapes[name]


def depth(shapes, blocks: str, source: str) -> int:
  """How many blocks there are; holes show as missing tensors."""
  return count_blocks(
    (found[1] for found in (re.match(rf"{blocks}\.([0-9]+)\.", name) for name in shapes) if found),
    blocks,
    source,
  )


def mlp_ratio(hidden: int, width: int) -> float:
  """The ratio with which int(width * ratio) is the hidden width, whatever the division rounds away."""
  ratio = hidden / width
  return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width
