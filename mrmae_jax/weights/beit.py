"""Tells what files of BEiT and BEiT V2 hold, and refuses what does not fit together.

The names are rows of `families.FAMILIES`; the network is a ViT with relative positions. Sources:
microsoft/unilm beit2/modeling_finetune.py and modeling_pretrain.py, timm models/beit.py,
transformers models/beit.
"""

import math
import re
from typing import Any

import numpy as np

from mrmae_jax.errors import WeightsError
from mrmae_jax.models.attention import RelativePositions
from mrmae_jax.models.vit import ViT
from mrmae_jax.weights.families import BEIT, HF_ACTIVATIONS, Family, find_family, name_table
from mrmae_jax.weights.table import Entry, dense, norm
from mrmae_jax.weights.tensor import Tensor

NAME = BEIT[0].name
STATISTICS_NOTE = (
  "its images are taken as normalized by ImageNet's mean and std, as of V2; for V1 give mean=(0.5, "
  "0.5, 0.5), std=(0.5, 0.5, 0.5)"
)
_FORMS = {"timm": BEIT[0], "hf": BEIT[-1]}
_INDEX = "relative_position_index"


def arrange(tensors: dict[str, Tensor], source: str) -> dict[str, Tensor]:
  """Returns the tensors of a BEiT with a table of relative positions for each block.

  Pre-training shares one table; fine-tuning copies it into each block. transformers' network of
  pre-training keeps the last norm outside of the tower, to which it comes here. The tensors of
  another model stay as they are.

  Raises:
    WeightsError: there are both kinds of tables.
  """
  found = find_family({name: tensor.shape for name, tensor in tensors.items()})
  if not found or found[0].name != NAME:
    return tensors
  (family, prefix), tensors = found, dict(tensors)
  names = family.names
  for kind in ("weight", "bias"):
    if prefix and (outer := tensors.pop(f"{names.norm}.{kind}", None)):
      tensors[f"{prefix}{names.norm}.{kind}"] = outer
  shared = tensors.pop(prefix + names.shared, None)
  if shared is None:
    return tensors
  tensors.pop((prefix + names.shared).replace("relative_position_bias_table", _INDEX), None)
  block = re.escape(prefix) + names.block.replace(".", r"\.").format("([0-9]+)") + r"\..*"
  numbers = {match[1] for match in (re.fullmatch(block, name) for name in tensors) if match}
  for number in sorted(numbers):
    name = f"{prefix}{names.block.format(number)}.{names.relative}"
    if name in tensors:
      raise WeightsError(
        f"{source} is damaged: it holds {prefix}{names.shared}, one table for all blocks, and "
        f"{name}; remove one of them"
      )
    tensors[name] = shared
  return tensors


def describe(
  tensors: dict[str, Tensor],
  family: Family,
  prefix: str,
  depth: int,
  grid: tuple[int, int] | None,
  source: str,
) -> tuple[dict[str, Any], tuple[int, int]]:
  """Determines what differs among models of this family, and the grid of the position tables.

  Args:
    tensors: as `arrange` returns them. Only indices and biases of keys are read.
    family, prefix: how they are called.
    depth: number of blocks.
    grid: (rows, columns) as the user or config.json states it; None: square, or as the indices in
      the file tell.
    source: file or folder, for messages.

  Returns:
    Fields of ViT, and (rows, columns).

  Raises:
    WeightsError: parts are missing in some blocks, keys have a bias, or tables fit no grid.
  """
  names = family.names
  in_blocks = lambda *parts: [
    f"{prefix}{names.block.format(i)}.{part}" for i in range(depth) for part in parts
  ]
  has_scales = _has_all(tensors, in_blocks(names.scale1, names.scale2), source)
  has_biases = _has_all(tensors, in_blocks(names.q_bias, names.v_bias), source)
  has_relative = _has_all(tensors, in_blocks(names.relative), source)
  for name in in_blocks(names.k_bias):
    if has_biases and name in tensors and np.any(tensors[name].read()):
      raise WeightsError(f"{source}: {name} is not zero; keys of BEiT have no bias")
  has_table = f"{prefix}{names.pos_embed}" in tensors
  if has_relative:
    grid = _find_grid(tensors, in_blocks(names.relative), grid, source)
  elif not has_table:
    raise WeightsError(
      f"{source} holds no positions, neither {prefix}{names.pos_embed} nor "
      f"{in_blocks(names.relative)[0]}"
    )
  else:  # at least one patch, so that too few rows are misshapen
    grid = grid or (max(1, math.isqrt(tensors[f"{prefix}{names.pos_embed}"].shape[-2] - 1)),) * 2
  table = tensors.get(in_blocks(names.relative)[0])
  return dict(
    **({"num_heads": table.shape[1]} if table else {}),
    positions="table" if has_table else "none",
    relative_positions=has_relative,
    layer_scale=has_scales,
    key_bias=not has_biases,
  ), grid


def _has_all(tensors: dict[str, Tensor], names: list[str], source: str) -> bool:
  """Returns whether tensors of all blocks exist; WeightsError if some do and some do not."""
  missing = [name for name in names if name not in tensors]
  if missing and len(missing) < len(names):
    present = next(name for name in names if name in tensors)
    raise WeightsError(
      f"{source} does not fit the model: missing: {', '.join(missing[:5])}"
      f"{', ...' if missing[5:] else ''}, beside {present}; all blocks have them, or none"
    )
  return not missing


def _find_grid(
  tensors: dict[str, Tensor], tables: list[str], grid: tuple[int, int] | None, source: str
) -> tuple[int, int]:
  """Returns the (rows, columns) of patches to which tables of relative positions belong."""
  for name in tables:
    shape, first = tuple(tensors[name].shape), tuple(tensors[tables[0]].shape)
    if len(shape) != 2 or shape != first and not grid:
      raise WeightsError(
        f"{source} does not fit the model: {tables[0]} is {first}, {name} {shape}; all blocks have "
        "tables of one grid, [rows, heads]"
      )
    _check_rows(name, shape[0], grid, source)
  rows = shape[0]
  indices = {
    index: tensors[index].read()
    for index in (table.replace("relative_position_bias_table", _INDEX) for table in tables)
    if index in tensors
  }
  if grid:
    fitting = [tuple(grid)]
  elif indices:
    first_index = next(iter(indices.values()))
    patches = len(first_index) - 1 if first_index.ndim == 2 else 0
    fitting = [(h, patches // h) for h in range(1, patches + 1) if patches % h == 0]
    fitting = [x for x in fitting if RelativePositions(x, True).num_rows == rows]
  else:
    fitting = [(max(1, round((math.sqrt(max(rows - 3, 0)) + 1) / 2)),) * 2]
    _check_rows(tables[0], rows, fitting[0], source)
  for index, values in indices.items():
    fitting = [x for x in fitting if np.array_equal(values, relative_index(x))]
    if not fitting:
      raise WeightsError(
        f"{source}: {index} differs from BEiT's (query minus key, then the three rows for CLS)"
        f"{f' of a grid of {grid[0]} x {grid[1]}' if grid else ''}; its table would be misread"
      )
  return fitting[0]


def _check_rows(name: str, rows: int, grid: tuple[int, int] | None, source: str) -> None:
  """WeightsError if a table of relative positions does not have the rows of a grid."""
  if not grid or rows == (expected := RelativePositions(tuple(grid), True).num_rows):
    return
  raise WeightsError(
    f"{source}: {name} has {rows} rows, expected (2h-1)(2w-1)+3, {expected} for {grid[0]} x "
    f"{grid[1]}; give grid=(rows, columns) of patches in the images that it was trained with"
  )


def relative_index(grid: tuple[int, int]) -> np.ndarray:
  """Returns the row of the table for each pair of tokens, int64 [1 + N, 1 + N], CLS first."""
  height, width = grid
  rows, columns = np.divmod(np.arange(height * width), width)
  distance = lambda x, side: x[:, None] - x + side - 1
  num_rows = RelativePositions(grid, True).num_rows
  index = np.pad(
    distance(rows, height) * (2 * width - 1) + distance(columns, width), ((1, 0), (1, 0))
  )
  index[0], index[:, 0], index[0, 0] = num_rows - 3, num_rows - 2, num_rows - 1
  return index


def write_table(
  encoder: ViT, form: str, classifier: tuple[str, ...], has_norm: bool
) -> list[Entry]:
  """Returns the entries of every parameter of a model for the format "timm" or "hf"."""
  family = _FORMS[form]
  prefix = "beit." if form == "hf" and classifier else ""
  layers = {"fc_norm": norm, "head": dense}
  names = {"fc_norm": prefix + family.names.fc_norm, "head": family.names.classifier}
  parts = {
    "encoder": name_table(family, prefix, encoder, has_norm),
    "classifier": [entry for name in classifier for entry in layers[name](name, names[name])],
  }
  return [e._replace(ours=f"{part}/{e.ours}") for part, entries in parts.items() for e in entries]


def hf_config(
  encoder: ViT, grid: tuple[int, int], channels: int, classes: tuple[str, ...]
) -> dict[str, Any]:
  """Returns the config.json of a model, but for its pooling; without `classes` it classifies
  nothing.
  """
  rows, columns = (side * encoder.patch_size for side in grid)
  words = {ours: theirs for theirs, ours in HF_ACTIVATIONS.items()}
  labels = {str(i): name for i, name in enumerate(classes)}
  return {
    "architectures": ["BeitForImageClassification" if classes else "BeitModel"],
    "model_type": "beit",
    "hidden_size": encoder.dim,
    "num_hidden_layers": encoder.depth,
    "num_attention_heads": encoder.num_heads,
    "intermediate_size": encoder.mlp_dim,
    "hidden_act": words[encoder.activation],
    "layer_norm_eps": encoder.eps,
    "image_size": rows if rows == columns else [rows, columns],
    "patch_size": encoder.patch_size,
    "num_channels": channels,
    "use_mask_token": False,
    "use_absolute_position_embeddings": encoder.positions == "table",
    "use_relative_position_bias": True,
    "use_shared_relative_position_bias": False,
    "layer_scale_init_value": 0.1 if encoder.layer_scale else 0.0,
    "drop_path_rate": encoder.drop_path,
    "attention_probs_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0,
    "initializer_range": 0.02,
  } | ({"id2label": labels, "label2id": {x: int(i) for i, x in labels.items()}} if classes else {})
