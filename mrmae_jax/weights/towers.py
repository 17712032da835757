"""Determines the vision tower of a folder, a file, a preset or a run, before any value is read.

config.json, the names of tensors and their shapes describe the tower; they must agree.
"""

import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from mrmae_jax.constants import IMAGENET_MEAN, IMAGENET_STD
from mrmae_jax.errors import StorageError, WeightsError, WorkdirError
from mrmae_jax.models import ViT, make_encoder
from mrmae_jax.runs import checkpoint
from mrmae_jax.weights import beit, files, hub, networks
from mrmae_jax.weights.families import (
  FAMILIES,
  HF_ACTIVATIONS,
  MODEL_TYPES,
  Family,
  identify,
  projection_name,
)
from mrmae_jax.weights.model_sources import Description, check_description, read_notes
from mrmae_jax.weights.table import MAX_SIZE, check_fields, count_blocks

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_HALF = ((0.5,) * 3, (0.5,) * 3)
_STATISTICS = {"CLIP": (CLIP_MEAN, CLIP_STD), "SigLIP": _HALF, "SigLIP 2 NaFlex": _HALF}
_SIZES = {192: "Ti", 384: "S", 768: "B", 1024: "L", 1280: "H", 1536: "g"}


class Tower(NamedTuple):
  """A teacher's network, before its values are read.

  Attributes:
    source: its file or folder, or another name for messages.
    description: one line for people.
    module: the network, a ViT; or the encoder of a run.
    mean, std: of its input.
    path: weight file, Hugging Face folder or workdir; None: the weights are random, or still to be
      fetched.
    family, prefix: how its tensors are called; None: it is the encoder of a run.
    table_grid: (rows, columns) of the stored position table; None: it has no table, or a fixed one.
    weights: which of several networks in a file, see `networks.open_network`.
    has_norm: its files hold the last norm; fine-tuned ones of BEiT do not.
    notes: what a file that was written here states; None: another file.
  """

  source: str
  description: str
  module: Any
  mean: tuple[float, ...]
  std: tuple[float, ...]
  path: Path | None = None
  family: Family | None = None
  prefix: str = ""
  table_grid: tuple[int, int] | None = None
  weights: str = ""
  has_norm: bool = True
  notes: Description | None = None


class Overrides(NamedTuple):
  """Facts about a tower that a user states, which overrule the files.

  Attributes:
    num_heads, activation: fields of ViT.
    grid: (rows, columns) of BEiT's tables of relative positions, where these are not square.
  """

  num_heads: int = 0
  activation: str = ""
  grid: tuple[int, int] | None = None

  def apply(self, fields: dict[str, Any]) -> dict[str, Any]:
    given = {"num_heads": self.num_heads, "activation": self.activation}
    return fields | {name: value for name, value in given.items() if value}


def open_tower(
  path: str | Path, name: str, overrides: Overrides, dtype, weights: str = ""
) -> Tower:
  """Determines the tower in a folder or file, or that of a preset.

  Args:
    path: Hugging Face folder, or file of weights; "": the preset's configuration is fetched from
      the hub, and its weights are left there.
    name: a key of `hub.PRESETS`, which the tower must be; "" accepts any.
    overrides: what the user states.
    dtype: of the computation.
    weights: which of several networks in a file, see `networks.open_network`.

  Raises:
    WeightsError: there is nothing, it is not a supported tower, or not that of the preset.
  """
  place = Path(os.path.expanduser(path)) if path else None
  has_norm, notes = True, None
  if place is None:
    folder = hub.fetch(name, hub.CONFIG_FILES)
    family, fields, table_grid = _configured_tower(folder, name)
    fields, prefix = overrides.apply(fields), ""
  else:
    files.weight_files(place)  # raises where there is nothing
    folder = place if place.is_dir() else place.parent
    tensors = networks.open_network(place, weights).tensors
    if notes := read_notes(place, "timm's names"):
      check_description(notes, len(tensors), str(place))
    family, prefix, fields, table_grid = _stored_tower(
      tensors, place, folder, name, overrides, notes
    )
    has_norm = family.name != beit.NAME or f"{prefix}{family.names.norm}.weight" in tensors
  source = str(place or folder)
  check_fields(ViT, fields, source)
  module = ViT(**fields, dtype=jnp.dtype(dtype))
  if module.dim % module.num_heads:
    raise WeightsError(
      f"{source}: width {module.dim} does not divide into {module.num_heads} heads; check num_heads"
    )
  if name:
    _check_preset(name, module, table_grid, source)
  statistics = folder / "preprocessor_config.json" if family.model_types else None
  channels = None if family.name == beit.NAME else 3
  mean, std = files.image_statistics(statistics, *_statistics(family), channels)
  if notes:
    mean, std = notes.mean, notes.std
  return Tower(
    source=source,
    description=f"{family.name} {_size_name(module)}",
    module=module,
    mean=mean,
    std=std,
    path=place,
    family=family,
    prefix=prefix,
    table_grid=table_grid,
    weights=weights,
    has_norm=has_norm,
    notes=notes,
  )


def random_tower(name: str, overrides: Overrides, dtype) -> Tower:
  """Returns the tower of a preset for random weights, from its sizes alone.

  Raises:
    WeightsError: no name is given.
  """
  if not name:
    raise WeightsError(f"teacher.path=random needs teacher.name, one of {', '.join(hub.PRESETS)}")
  model_type = next(
    [*family.model_types][-1]
    for family in FAMILIES
    if family.name == hub.PRESETS[name].family and family.model_types
  )
  family, fields, table_grid = tower_config(hub.preset_config(name, model_type), name)
  module = ViT(**overrides.apply(fields), dtype=jnp.dtype(dtype))
  mean, std = _statistics(family)
  return Tower(
    source=f"random {name}",
    description=f"{family.name} {_size_name(module)} with random weights",
    module=module,
    mean=mean,
    std=std,
    family=family,
    table_grid=table_grid,
  )


def trained_encoder(workdir: str, dtype) -> Tower:
  """Returns the encoder of the run in a workdir.

  Raises:
    WeightsError: there is no run.
  """
  path = Path(os.path.expanduser(workdir))
  try:
    config = checkpoint.read_config(path)
    if config.get("task") == "self_distill":
      raise WeightsError(
        f"teacher.path=checkpoint:{path} is a run of mrmae teacher; give the folder that it wrote, "
        f"--out or teacher.path={path}/teacher"
      )
    return Tower(
      source=f"{path}",
      description=f"encoder of {path}",
      module=make_encoder(config["encoder"], jnp.dtype(dtype)),
      mean=tuple(config["data"]["mean"]),
      std=tuple(config["data"]["std"]),
      path=path,
    )
  except (StorageError, WorkdirError) as error:
    raise WeightsError(f"teacher.path=checkpoint:{error}") from None
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise WeightsError(
      f"teacher.path=checkpoint:{path}: config.json there is not that of a run: {error!r}"
    ) from None


def _statistics(family: Family) -> tuple[tuple[float, ...], tuple[float, ...]]:
  return _STATISTICS.get(family.name, (IMAGENET_MEAN, IMAGENET_STD))


def _size_name(module: ViT) -> str:
  letter = _SIZES.get(module.dim)
  return f"ViT{f'-{letter}' if letter else ''}/{module.patch_size}"


def _configured_tower(folder: Path, name: str):
  """Determines the tower of a preset of which only config.json is on disk."""
  if not (folder / "config.json").is_file():
    raise WeightsError(
      f"{folder}: the hub's copy of {hub.PRESETS[name].repo} holds no config.json; fetch it again"
    )
  config = files.read_json(folder / "config.json")
  if "model_type" not in config:
    raise WeightsError(f"{folder / 'config.json'} holds no model_type; fetch it again")
  return tower_config(config, str(folder / "config.json"))


def _stored_tower(
  tensors,
  path: Path,
  folder: Path,
  name: str,
  overrides: Overrides,
  notes: Description | None,
):
  """Determines the tower of the tensors in a folder or file, or a file written here with `notes`.

  Returns:
    Family, prefix of the names, fields of ViT, and the grid of the position table.
  """
  source, config = str(path), {}
  if (folder / "config.json").is_file():
    config = files.read_json(folder / "config.json")
  configured = None
  if "model_type" in config:
    configured = tower_config(config, str(folder / "config.json"))
  shapes = {key: tensor.shape for key, tensor in tensors.items()}
  family, prefix, markers = identify(shapes, source)
  if name and family.name != hub.PRESETS[name].family:
    raise WeightsError(
      f"{source} looks like {family.name} (found {markers}); {name} asked, which is "
      f"{hub.PRESETS[name].family}"
    )
  sizes, num_positions = tower_shapes(family, prefix, shapes, source)
  grid = (math.isqrt(num_positions),) * 2
  if family.name == beit.NAME:
    stated = configured[2] if configured and family.model_types else notes and notes.grid
    given = overrides.grid or stated
    fields, grid = beit.describe(tensors, family, prefix, sizes["depth"], given, source)
    sizes |= fields
    if notes:
      return family, prefix, sizes | _noted_fields(notes), grid
  if not family.model_types:
    has_relative = sizes.get("relative_positions", False)  # whose grid is known
    if math.prod(grid) != num_positions and not has_relative:
      raise WeightsError(
        f"{source}: a position table of {num_positions} patches is not square; give a Hugging Face "
        "folder"
      )
    return family, prefix, _complete(family, sizes, source, name, overrides), grid
  if configured is None:
    raise WeightsError(
      f"{source} has Hugging Face's names of {family.name}, but {folder} has no config.json, which "
      "tells heads, activation and eps; fetch it from the same place"
    )
  if configured[0].name != family.name:
    raise WeightsError(
      f"{source} looks like {family.name} (found {markers}); its config.json says "
      f"{config['model_type']}, which is {configured[0].name}"
    )
  _, fields, configured_grid = configured
  _check_agreement(family, sizes, num_positions, fields, configured_grid, source)
  is_beit = family.name == beit.NAME
  return family, prefix, overrides.apply(fields | sizes), grid if is_beit else configured_grid


def _noted_fields(notes: Description) -> dict[str, Any]:
  """Returns the fields of the encoder of a file that was written here."""
  as_tuple = lambda x: tuple(x) if isinstance(x, list) else x
  return {key: as_tuple(x) for key, x in notes.encoder.items() if key != "name"}


def _check_agreement(family: Family, sizes, num_positions: int, fields, grid, source: str) -> None:
  """WeightsError if tensors and config.json disagree on a size."""
  for key, word in (
    ("dim", "width"),
    ("depth", "depth"),
    ("patch_size", "patch size"),
    ("mlp_dim", "MLP width"),
    ("num_registers", "number of registers"),
  ):
    if sizes[key] != fields[key]:
      raise WeightsError(
        f"{source} has {word} {sizes[key]}, its config.json says {fields[key]}; fetch both from "
        "one place"
      )
  if grid and num_positions and math.prod(grid) != num_positions:
    side, cls = math.isqrt(num_positions), "+1" if family.names.cls_token else ""
    raise WeightsError(
      f"{source}: position table is {side}x{side}{cls} for patch {sizes['patch_size']}; its "
      f"config.json's image_size gives {grid[0]}x{grid[1]}; fetch both from the same place"
    )


def _complete(family: Family, sizes, source: str, name: str, overrides: Overrides):
  """Fields of ViT for a file without config.json.

  Heads have 64 channels in all models that are published in this way; wider ones need
  `num_heads`, but for DINOv2 and for BEiT, whose tables tell. A gated MLP, which DINOv2's largest
  has, always uses SiLU.
  """
  width, num_heads = sizes["dim"], overrides.num_heads or sizes.get("num_heads")
  if not num_heads and (width % 64 or width > 1024 and not family.name.startswith("DINOv2")):
    raise WeightsError(
      f"{source} does not tell the number of heads, and width {width} is none of the usual ones "
      "with 64 channels a head; give num_heads"
    )
  activation = family.fields.get("activation") or ("quick_gelu" if name else "")
  if not overrides.activation and not activation:
    raise WeightsError(
      f"{source}: CLIP in timm's names does not tell its activation; give activation='quick_gelu' "
      "(OpenAI's weights) or 'gelu' (most others), or a name"
    )
  usual = {"num_heads": width // 64, "activation": "silu" if sizes["gated"] else activation}
  return overrides.apply(family.fields | usual) | sizes


def _check_preset(name: str, module: ViT, table_grid, source: str) -> None:
  """WeightsError if a tower does not have the sizes of the preset that its name promises."""
  preset = hub.PRESETS[name]
  if (module.dim, module.depth, module.patch_size) != (preset.dim, preset.depth, preset.patch):
    raise WeightsError(
      f"{source} is {_size_name(module)} (width {module.dim}, depth {module.depth}); preset {name} "
      f"needs {preset.dim}/{preset.depth}/{preset.patch}"
    )
  side = preset.side // preset.patch
  if table_grid and table_grid != (side, side):
    raise WeightsError(
      f"{source} has a position table of {table_grid[0]}x{table_grid[1]}; preset {name} needs "
      f"{side}x{side}"
    )


def tower_shapes(
  family: Family, prefix: str, shapes: dict[str, tuple[int, ...]], source: str
) -> tuple[dict[str, Any], int]:
  """Derives sizes of a tower from the shapes of its tensors.

  Returns:
    Fields of ViT, and the number of patches in its position table (0: it has no table).

  Raises:
    WeightsError: a tensor that the sizes depend on is missing, or has another rank.
  """
  names = family.names

  def shape(name, *ranks):
    if prefix + name not in shapes:
      raise WeightsError(
        f"{source} does not fit the model: missing: {prefix + name} (a part of a sharded file, or "
        "another model?)"
      )
    if len(shapes[prefix + name]) not in ranks:
      raise WeightsError(
        f"{source} does not fit the model: misshapen: {prefix + name} "
        f"{tuple(shapes[prefix + name])}"
      )
    return shapes[prefix + name]

  block = names.block.format(0) + "."
  gated = bool(family.gated_fc1) and f"{prefix}{block}{family.gated_fc1[0]}.weight" in shapes
  width, mlp_dim = shape(f"{block}{family.gated_fc2 if gated else names.fc2}.weight", 2)
  if gated and family.gated_fc1 == names.fc1:  # timm's names are the same: the width tells
    gated = shape(f"{block}{names.fc1[0]}.weight", 2)[0] == 2 * mlp_dim
  patch_embed = shape(f"{names.patch_embed}.weight", family.patch_rank)
  patch = math.isqrt(patch_embed[1] // 3) if family.patch_rank == 2 else patch_embed[-1]
  registers = shape(names.registers, 3)[1] if names.registers else 0
  has_cls_row = bool(names.cls_token) and family.cls_position
  # BEiT has a table or not.
  has_table = names.pos_embed and (not names.relative or prefix + names.pos_embed in shapes)
  table = shape(names.pos_embed, 2, 3)[-2] - has_cls_row if has_table else 0
  projection = shapes.get(projection_name(names, prefix), (0, 0))
  blocks = re.compile(
    re.escape(prefix) + names.block.replace(".", r"\.").format(r"([0-9]+)") + r"\..*"
  )
  depth = count_blocks(
    (match[1] for match in map(blocks.fullmatch, shapes) if match),
    names.block.format("N").rstrip(".N"),
    source,
  )
  fields = dict(
    patch_size=patch,
    dim=width,
    depth=depth,
    mlp_dim=mlp_dim,
    gated=gated,
    num_registers=registers,
    proj_dim=projection[1 if names.proj == "proj" else 0],
    learned_positions=bool(has_table),
    attention_pool=f"{prefix}{names.head}.probe" in shapes,
  )
  return fields, table


def tower_config(
  config: dict[str, Any], source: str
) -> tuple[Family, dict[str, Any], tuple[int, int] | None]:
  """Derives a tower from Hugging Face's config.json; absent keys have transformers' values.

  Returns:
    The family (the first of its namings), fields of ViT, and the grid of the position table, None
    without one.

  Raises:
    WeightsError: the model is not supported, or a value is not a size.
  """
  try:
    kind = config["model_type"]
    if kind not in MODEL_TYPES:
      raise WeightsError(
        f"{source}: model_type {str(kind)[:40]!r} is not supported; supported: "
        f"{', '.join(MODEL_TYPES)}"
      )
    family = MODEL_TYPES[kind]
    has_proj = kind == "clip" or "CLIPVisionModelWithProjection" in config.get("architectures", ())
    proj_dim = config.get("projection_dim", 512) if has_proj else 0
    if kind in ("clip", "siglip", "siglip2"):  # text and vision
      # Old CLIP files have both dictionaries; there vision_config_dict counts.
      config = config.get("vision_config_dict") or config.get("vision_config") or {}
    config = family.model_types[kind] | config
    fields, grid = _config_fields(family, config, proj_dim, source)
  except WeightsError:
    raise
  except (TypeError, ValueError, ArithmeticError, LookupError) as error:
    raise WeightsError(f"{source} holds a size that is none: {error}") from None
  check_fields(ViT, fields, source)
  if grid and not all(type(side) is int and 0 < side <= MAX_SIZE for side in grid):
    raise WeightsError(f"{source} holds a size that is none: a grid of {str(grid)[:60]} patches")
  return family, fields, grid


def _config_fields(family: Family, config: dict[str, Any], proj_dim: int, source: str):
  """Derives fields of ViT and the table's grid from a complete configuration.

  Odd values raise TypeError, ValueError, ArithmeticError or LookupError.
  """
  hidden_act = config["hidden_act"]
  if hidden_act not in HF_ACTIVATIONS:
    raise WeightsError(
      f"{source}: hidden_act {str(hidden_act)[:40]!r} is not supported; supported: "
      f"{', '.join(HF_ACTIVATIONS)}"
    )
  patch, side = (
    x if isinstance(x, (list, tuple)) else (x, x)
    for x in (config["patch_size"], config["image_size"])
  )
  if patch[0] != patch[1]:
    raise WeightsError(
      f"{source}: patches of {patch[0]}x{patch[1]} pixels are not supported; they must be square"
    )
  fields = family.fields | dict(
    patch_size=patch[0],
    dim=config["hidden_size"],
    depth=config["num_hidden_layers"],
    num_heads=config["num_attention_heads"],
    mlp_dim=config["intermediate_size"] or int(config["hidden_size"] * config["mlp_ratio"]),
    eps=config["layer_norm_eps"],
    activation=HF_ACTIVATIONS[hidden_act],
    gated=bool(config.get("use_gated_mlp") or config.get("use_swiglu_ffn")),
    proj_dim=proj_dim,
    num_registers=config.get("num_register_tokens", 0),
    learned_positions=bool(family.names.pos_embed),
    attention_pool=bool(config.get("vision_use_head")),
  )
  if config.get("use_swiglu_ffn"):
    # transformers' Dinov2SwiGLUFFN: two thirds of the width, rounded up, and always SiLU.
    fields |= dict(mlp_dim=(int(fields["mlp_dim"] * 2 / 3) + 7) // 8 * 8, activation="silu")
  if "rope_theta" in config:
    return fields | dict(rope_theta=float(config["rope_theta"])), None
  if "num_patches" in config:
    return fields, (math.isqrt(config["num_patches"]),) * 2
  return fields, (side[0] // patch[0], side[1] // patch[0])
