"""Names of Alpha-VL/ConvMAE (models_convmae.py; models_convvit.py for fine-tuning)."""

from typing import Any

from mrmae_jax.models.convvit import ConvViT
from mrmae_jax.weights.table import (
  Entry,
  conv,
  decomposed,
  dense,
  depth,
  depthwise,
  fusion,
  mlp_ratio,
  norm,
  same,
  shape_of,
  timm_block,
)

# No other family has all of these.
MARKERS = (
  "patch_embed1.proj.weight",
  "patch_embed4.weight",
  "blocks1.0.conv1.weight",
  "blocks3.0.attn.qkv.weight",
)


def encoder_table(module: ConvViT) -> list[Entry]:
  """Returns the entries of an encoder."""
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
    ours, theirs = f"blocks3_{i}", f"blocks3.{i}"
    table += timm_block(ours, theirs) + decomposed(module, ours, theirs)
    if module.relative_positions:
      name = f"{theirs}.attn.relative_position_bias_table"
      table.append(Entry(f"{ours}/attn/relative_positions", (name,), same))
    if module.layer_scale:
      table += [Entry(f"{ours}/scale{k}", (f"{theirs}.gamma_{k}",), same) for k in (1, 2)]
  for name, exists in (("cls_token", module.cls_token), ("pos_embed", module.learned_positions)):
    table += [Entry(name, (name,), same)] if exists else []
  return table + fusion(module) + dense("patch_embed4", "patch_embed4") + norm("norm", "norm")


def encoder_fields(shapes: dict[str, tuple[int, ...]], source: str) -> dict[str, Any]:
  """Derives fields of ConvViT from shapes: all but fused layers and the kind of positions.

  Heads show in a table of relative positions alone.

  Raises:
    WeightsError: a tensor that the sizes depend on is missing or has another rank.
  """
  projections = [
    shape_of(shapes, f"patch_embed{stage}.proj.weight", 4, source) for stage in (1, 2, 3)
  ]
  dims = tuple(shape[0] for shape in projections)
  hidden = [
    shape_of(shapes, f"blocks{stage}.0.mlp.fc1.weight", 2 if stage == 3 else 4, source)[0]
    for stage in (1, 2, 3)
  ]
  table = shapes.get("blocks3.0.attn.relative_position_bias_table", ())
  return dict(
    **({"num_heads": table[1]} if len(table) == 2 else {}),
    name="convvit",
    patch_sizes=tuple(shape[-1] for shape in projections),
    embed_dims=dims,
    depths=tuple(depth(shapes, f"blocks{stage}", source) for stage in (1, 2, 3)),
    mlp_ratios=tuple(map(mlp_ratio, hidden, dims)),
    cls_token="cls_token" in shapes,
    fuse_stages="stage1_output_decode.weight" in shapes,
    relative_positions=bool(table),
    layer_scale="blocks3.0.gamma_1" in shapes,
  )
