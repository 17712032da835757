"""Names of UperNet in mmsegmentation: the published files of ConvMAE, MAE and BEiT.

A file holds `backbone.*`, the encoder in its authors' names and the neck; `decode_head.*`; and
`auxiliary_head.*`. Sources: Alpha-VL/ConvMAE SEG, implus/mae_segmentation, microsoft/unilm
beit2/semantic_segmentation.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp

from mrmae_jax.errors import WeightsError
from mrmae_jax.models import ConvViT, ViT
from mrmae_jax.models.upernet import Segmenter, usual_levels
from mrmae_jax.weights import beit, convmae, families, mae
from mrmae_jax.weights.table import (
  Entry,
  conv,
  conv2d,
  dense,
  running_norm,
  same,
  shape_of,
  upsample,
)
from mrmae_jax.weights.tensor import Tensor

BACKBONE = "backbone."
HEADS = ("decode_head.", "auxiliary_head.")
# Counters of steps and numbers of table rows, which say nothing of a model.
CONSTANTS = r"(.*\.)?(num_batches_tracked|relative_position_index)"
POOL_SCALES = (1, 2, 3, 6)  # of every published model; names and shapes do not tell them
NAMING = "mmsegmentation's names"


def head_table(num_scales: int, has_aux: bool) -> list[Entry]:
  """Returns the entries of both heads.

  Args:
    num_scales: number of pooled maps.
    has_aux: there is an auxiliary head.
  """
  modules = {f"psp_modules_{i}": (f"psp_modules.{i}.1", 1) for i in range(num_scales)}
  modules |= {f"lateral_convs_{i}": (f"lateral_convs.{i}", 1) for i in range(3)}
  modules |= {f"fpn_convs_{i}": (f"fpn_convs.{i}", 3) for i in range(3)}
  modules |= {name: (name, 3) for name in ("bottleneck", "fpn_bottleneck")}
  heads = {"decode_head": modules}
  if has_aux:
    heads["auxiliary_head"] = {"convs_0": ("convs.0", 3)}
  table = []
  for head, parts in heads.items():
    for name, (theirs, size) in parts.items():
      ours, theirs = f"{head}/{name}", f"{head}.{theirs}"
      layout = conv(1) if size == 1 else conv2d
      table.append(Entry(f"segmenter/{ours}/conv/kernel", (f"{theirs}.conv.weight",), layout))
      table += running_norm("segmenter", f"{ours}/bn", f"{theirs}.bn")
    table += dense(f"segmenter/{head}/conv_seg", f"{head}.conv_seg", conv(1))
  return table


def segmenter_table(module: Segmenter) -> list[Entry]:
  """Returns the entries of every parameter and running statistic, but for the unused last norm."""
  if isinstance(module.encoder, ConvViT):
    encoder = [e for e in convmae.encoder_table(module.encoder) if not e.ours.startswith("norm/")]
    neck = dense("segmenter/neck/conv", "fpn.0", conv2d) + running_norm(
      "segmenter", "neck/bn", "fpn.1"
    )
  else:
    encoder = families.name_table(families.BEIT[0], "", module.encoder, has_norm=False)
    neck = running_norm("segmenter", "neck/bn", "fpn1.1")
    for ours, theirs in (("up4_0", "fpn1.0"), ("up4_1", "fpn1.3"), ("up2", "fpn2.0")):
      neck.append(Entry(f"segmenter/neck/{ours}/up/kernel", (f"{theirs}.weight",), upsample))
      neck.append(Entry(f"segmenter/neck/{ours}/bias", (f"{theirs}.bias",), same))
  encoder = [entry._replace(ours=f"encoder/{entry.ours}") for entry in encoder]
  backbone = [
    entry._replace(theirs=tuple(BACKBONE + name for name in entry.theirs))
    for entry in encoder + neck
  ]
  return backbone + head_table(len(module.pool_scales), module.aux_channels > 0)


def encoder_fields(
  tensors: dict[str, Tensor], grid: tuple[int, int] | None, source: str
) -> tuple[dict[str, Any], tuple[int, int] | None]:
  """Derives fields of the encoder from its tensors: all but heads.

  Args:
    tensors: those of the backbone, without that word.
    grid: (rows, columns) as the user states it; None: square, or as the file tells.
    source: file, for messages.

  Returns:
    Fields of ConvViT or ViT with "name", and (rows, columns), None if only the position table tells
    them.

  Raises:
    WeightsError: it is neither of them, or parts of it are missing.
  """
  shapes = {name: tensor.shape for name, tensor in tensors.items()}
  if shapes.keys() >= set(convmae.MARKERS):
    fields = convmae.encoder_fields(shapes, source) | dict(learned_positions=True, eps=1e-5)
    return fields, grid
  fields = mae.encoder_fields(shapes, source)
  differences, grid = beit.describe(tensors, families.BEIT[0], "", fields["depth"], grid, source)
  return fields | differences | {"learned_positions": differences["positions"] == "table"}, grid


def head_fields(
  shapes: dict[str, tuple[int, ...]], pool_scales: tuple[int, ...], source: str
) -> dict[str, Any]:
  """Derives fields of Segmenter from the shapes of the heads.

  Args:
    shapes: of the tensors of the heads.
    pool_scales: as the file notes them; (): those of every published model.
    source: file, for messages.

  Raises:
    WeightsError: a tensor that the sizes depend on is missing, or the pooled maps are too many or
      too few.
  """
  pool_scales = tuple(pool_scales or POOL_SCALES)
  matches = [re.fullmatch(r"decode_head\.psp_modules\.(\d+)\..*", name) for name in shapes]
  scales = {match[1] for match in matches if match}
  if len(scales) != len(pool_scales):
    raise WeightsError(
      f"{source} does not fit the model: decode_head.psp_modules has {len(scales)} pooled maps, "
      f"expected {len(pool_scales)} as in UperNet (another decode head?)"
    )
  aux = "auxiliary_head.convs.0.conv.weight"
  has_aux = any(name.startswith(HEADS[1]) for name in shapes)
  return dict(
    num_classes=shape_of(shapes, "decode_head.conv_seg.weight", 4, source)[0],
    channels=shape_of(shapes, "decode_head.bottleneck.conv.weight", 4, source)[0],
    aux_channels=shape_of(shapes, aux, 4, source)[0] if has_aux else 0,
    pool_scales=pool_scales,
  )


def choose_levels(encoder: ConvViT | ViT, levels: tuple[int, ...], source: str) -> tuple[int, ...]:
  """Returns the blocks that give the levels: the user's, or the usual ones; () of a ConvViT.

  Raises:
    WeightsError: they are not four blocks of the encoder.
  """
  if isinstance(encoder, ConvViT):
    return ()
  levels = tuple(levels or usual_levels(encoder.depth))
  if len(levels) != 4 or not all(type(x) is int and 0 <= x < encoder.depth for x in levels):
    raise WeightsError(
      f"{source}: levels={levels} are not four of the blocks 0 to {encoder.depth - 1}"
    )
  return levels


def describe(module: Segmenter) -> str:
  """Returns a few words about neck and heads for people."""
  aux = f", auxiliary head of {module.aux_channels} channels" if module.aux_channels else ""
  return f"UperNet of {module.channels} channels, {module.num_classes} classes{aux}"


def segmenter_shapes(module: Segmenter, grid: tuple[int, int], channels: int, source: str):
  """Returns the shapes of "encoder" without its last norm, "segmenter" and "batch_stats".

  Raises:
    WeightsError: the grid of the position tables is too small for the deepest level.
  """
  least = 3 if isinstance(module.encoder, ConvViT) else 2
  if min(grid) < least:
    raise WeightsError(
      f"{source}: UperNet needs at least {least} x {least} tokens, its position tables have "
      f"{grid[0]} x {grid[1]}; give grid=(rows, columns) of the images that it was trained with"
    )
  height, width = (side * module.encoder.patch_size for side in grid)
  pixels = jax.ShapeDtypeStruct((1, height, width, channels), jnp.float32)
  shapes = jax.eval_shape(module.init, jax.random.key(0), pixels)
  encoder = shapes["params"].pop("encoder")
  del encoder["norm"]
  return {
    "encoder": encoder,
    "segmenter": shapes["params"],
    "batch_stats": shapes["batch_stats"],
  }
