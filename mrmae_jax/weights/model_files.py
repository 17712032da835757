"""Reads and writes trained models: ConvMAE's, MAE's, transformers' ViTMAE and this project's.

Vision towers of other families are read too: BEiT, which is also written, and transformers' ViT,
DINO, DINOv2 and CLIP. So are the segmentation models of ConvMAE, MAE and BEiT.

`read_model` takes any of them and is strict: every tensor is used exactly once, or is listed in the
report as left out by design. Sizes come from what the source states (config.json, a run's
configuration, the metadata in files written here), else from the shapes of its tensors.
`write_model` is the way back: reading a written model gives its parameters bit for bit.

A ConvViT has the names of Alpha-VL/ConvMAE; a ViT has those of facebookresearch/mae (timm) or
transformers. Fused layers, which no published model has, are called "fusion.". Mimic heads stay
behind unless asked for: they belong to one teacher, and only a comparison with that teacher needs
them.
"""

import dataclasses
import json
import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict

from mrmae_jax import interpolation
from mrmae_jax.detection import Rules, make_rules
from mrmae_jax.errors import StorageError, WeightsError, WorkdirError
from mrmae_jax.models import ConvViT, Decoder, ViT, make_decoder, make_encoder
from mrmae_jax.models.layers import Mask, sincos_2d
from mrmae_jax.models.mask_rcnn import MaskRCNN, make_mask_rcnn
from mrmae_jax.models.upernet import Segmenter, make_segmenter
from mrmae_jax.runs import checkpoint
from mrmae_jax.runs.paths import atomic_write
from mrmae_jax.weights import (
  beit,
  convmae,
  detectron2,
  families,
  files,
  mae,
  mmseg,
  networks,
  positions,
  tower_params,
  towers,
)
from mrmae_jax.weights.model_sources import (
  METADATA_KEY,
  METHOD,
  Description,
  Hints,
  check_description,
  describe_source,
  file_encoder,
  input_statistics,
  read_notes,
  with_heads,
)
from mrmae_jax.weights.table import (
  Entry,
  convert,
  decoder_table,
  dense,
  export,
  norm,
  same,
  shape_of,
)

FORMATS = ("convmae", "timm", "hf", "mmseg", "detectron2")
# Families that are encoders too.
STUDENTS = ("BEiT", "DINO", "DINOv2", "DINOv2 with registers", "CLIP")
NO_NORM = "norm (fine-tuning replaces the last norm by fc_norm)"
ABSENT_NORM = "norm (the source does not hold it)"
UNUSED_NORM = "norm (segmentation and detection do not use it)"
NO_DECODER = "no decoder (the source is encoder-only and cannot reconstruct)"
# Fields in which towers differ from MAE's ViT, whose formats have no place for them; and those for
# which BEiT's formats have one.
TOWER_FIELDS = ("activation", "patch_bias", "norm_pre", "gated", "num_registers")
BEIT_FIELDS = ("layer_scale", "positions", "key_bias")
SAME_TABLE = 1e-5  # a stored position table that differs by less is the sine-cosine one


class Report(NamedTuple):
  """The fate of a source's tensors; str() gives it as text, one line per kind.

  Attributes:
    source: file, folder or run.
    model: one line about the encoder.
    loaded: what was loaded.
    new: parts of the model that the source does not hold, by design.
    dropped: parts of the source that the model does not have, by design.
  """

  source: str
  model: str
  loaded: tuple[str, ...]
  new: tuple[str, ...]
  dropped: tuple[str, ...]

  def __str__(self) -> str:
    kinds = {
      "loaded": self.loaded,
      "new by design": self.new,
      "dropped by design": self.dropped,
    }
    lines = [f"  {kind}: {'; '.join(parts)}" for kind, parts in kinds.items() if parts]
    return "\n".join([f"{self.source}: {self.model}", *lines])


class LoadedModel(NamedTuple):
  """A trained model: modules, parameters and what is known of its training.

  Attributes:
    encoder: ConvViT or ViT.
    decoder: Decoder; None if the source has none, or it was not asked for.
    params: {"encoder", "decoder" if there is one, "classifier" if it was fine-tuned, "mimic_heads"
      if asked for}, float32 numpy arrays. A classifier is {"head"} on the normed first token, or
      {"fc_norm", "head"} on the mean token of the last block. A segmentation model has "segmenter",
      the parameters of neck and heads, and "batch_stats", their running statistics; a detector has
      "detector", the parameters of pyramid and heads, and "batch_stats" if it has any.
    grid: (rows, columns) of its position tables.
    mean, std: of its input, one number per channel.
    method: {"mask_ratio", "norm_pix"} of its pre-training; MAE's where the source does not tell.
    has_norm: False where fine-tuning has replaced the last norm by fc_norm; the norm in `params` is
      then a fresh one.
    report: what was loaded, and what was not.
    classes: names of the classifier's classes in the order of the logits; () where the source does
      not tell.
    rule: how its encoder's learned positions are interpolated.
    segmenter: UperNet around the encoder; None if it is another model.
    detector: Mask R-CNN around the encoder; None if it is another model.
    rules: by which the detector detects.
  """

  encoder: ConvViT | ViT
  decoder: Decoder | None
  params: dict[str, Any]
  grid: tuple[int, int]
  mean: tuple[float, ...]
  std: tuple[float, ...]
  method: dict[str, Any]
  has_norm: bool
  report: Report | None
  classes: tuple[str, ...] = ()
  rule: interpolation.Rule = interpolation.BICUBIC
  segmenter: Segmenter | None = None
  detector: MaskRCNN | None = None
  rules: Rules = Rules()


def read_model(
  path: str | Path,
  *,
  decoder: bool = True,
  mimic_heads: bool = False,
  learned_positions: bool = False,
  dtype: str = "float32",
  **hints,
) -> LoadedModel:
  """Reads a trained model.

  Args:
    path: the workdir of a run; a file of weights in ConvMAE's or MAE's names (.safetensors, .pth);
      a ViTMAE folder; a folder or file of a vision tower.
    decoder: read the decoder too, if there is one.
    mimic_heads: read the mimic heads of a run too: {name of the loss: parameters}.
    learned_positions: keep the encoder's position table as a parameter, e.g. to train it, even if
      it is the sine-cosine one.
    dtype: of the modules' computation.
    **hints: fields of `Hints`, for files that do not tell.

  Raises:
    WeightsError: there is nothing, it is another model, or tensors are missing, unknown, misshapen
      or not finite.
  """
  # A bucket holds runs alone.
  if "://" not in str(path):
    path = Path(os.path.expanduser(path))
    if not os.path.isdir(path / "checkpoints"):
      return _read_files(path, Hints(**hints), decoder, learned_positions, jnp.dtype(dtype))
  if hints.get("weights"):
    raise WeightsError(f"--weights={hints['weights']}: {path} is a run, which holds one network")
  return _read_run(path, decoder, mimic_heads, learned_positions, jnp.dtype(dtype))


def _read_run(
  path: str | Path, with_decoder: bool, with_heads: bool, learned_positions: bool, dtype
) -> LoadedModel:
  """Reads the newest checkpoint of a run."""
  try:
    config = checkpoint.read_config(path)
    if config["task"] == "probe":
      raise WeightsError(
        f"{path} probes {config['init_from'] or 'random weights'} and holds no encoder; load that "
        "instead"
      )
    if config["task"] == "self_distill":
      raise WeightsError(
        f"{path} is a run of mrmae teacher; its teacher is the folder {path}/teacher, or that of "
        "--out, for config.teacher.path and transformers' ViTModel"
      )
    if config["task"] in ("segment", "detect"):
      return _read_run_with_heads(path, config, dtype)
    optional = ("decoder",) * with_decoder + ("mimic_heads",) * with_heads
    stored = checkpoint.read_params(path, "encoder", "fc_norm", "head", *optional)
  except (StorageError, WorkdirError) as error:
    raise WeightsError(str(error)) from None
  params = stored.params
  classifier = {part: params.pop(part) for part in ("fc_norm", "head") if part in params}
  data, method = config["data"], config.get("method", {})
  encoder = make_encoder(config["encoder"], dtype)
  if classifier:  # fine-tuning leaves fusion out
    params["classifier"] = classifier
    encoder = encoder.clone(fuse_layers=())
    if isinstance(encoder, ConvViT):
      encoder = encoder.clone(fuse_stages=False)
  grid = tuple(side // encoder.patch_size for side in config["image_size"])
  if learned_positions and not encoder.learned_positions:
    encoder = encoder.clone(learned_positions=True)
    params["encoder"]["pos_embed"] = constant_positions(encoder, grid, isinstance(encoder, ViT))
  decoder = None
  if "decoder" in params:
    decoder = make_decoder(config["decoder"], encoder, len(data["mean"]), dtype)
  dropped = tuple(
    "decoder (not asked for)" if part == "decoder" else part.replace("_", " ")
    for part in stored.others
  )
  return LoadedModel(
    encoder=encoder,
    decoder=decoder,
    params=params,
    grid=grid,
    mean=tuple(data["mean"]),
    std=tuple(data["std"]),
    method={
      "mask_ratio": method.get("mask_ratio", 0.75),
      "norm_pix": method.get("norm_pix", True),
    },
    has_norm="fc_norm" not in classifier,
    report=Report(
      f"{path} after {stored.step} steps", describe(encoder), _count_params(params), (), dropped
    ),
    classes=tuple(stored.identity.get("classes", ())),
  )


def _read_run_with_heads(path: str | Path, config: dict[str, Any], dtype) -> LoadedModel:
  """Reads the newest checkpoint of a run of segmentation or detection."""
  if is_detector := config["task"] == "detect":
    stages = range(config["rcnn"]["stages"])
    parts = ("pyramid", "rpn_head", *(f"box_heads_{stage}" for stage in stages), "mask_head")
    make_network, heads, describe_heads = make_mask_rcnn, config["rcnn"], detectron2.describe
  else:
    parts = ("neck", "decode_head", "auxiliary_head")
    make_network, heads, describe_heads = make_segmenter, config["upernet"], mmseg.describe
  stored = checkpoint.read_params(path, "encoder", *parts, with_extra=True)
  classes, data = tuple(stored.identity["classes"]), config["data"]
  network = make_network(config["encoder"], heads, len(classes), dtype)
  params = {
    "encoder": stored.params["encoder"],
    "detector" if is_detector else "segmenter": {
      name: stored.params[name] for name in parts if name in stored.params
    },
  }
  if stored.extra:
    params["batch_stats"] = stored.extra
  model = f"{describe(network.encoder)}, {describe_heads(network)}"
  return _with_heads(
    network,
    params,
    grid=tuple(side // network.encoder.patch_size for side in config["image_size"]),
    mean=tuple(data["mean"]),
    std=tuple(data["std"]),
    method=METHOD,
    report=Report(f"{path} after {stored.step} steps", model, _count_params(params), (), ()),
    classes=classes,
    rules=make_rules(heads) if is_detector else Rules(),
  )


def _with_heads(network: Segmenter | MaskRCNN, params: dict[str, Any], **fields) -> LoadedModel:
  """Returns a model of segmentation or detection, given other fields of `LoadedModel`."""
  kind = "detector" if isinstance(network, MaskRCNN) else "segmenter"
  return LoadedModel(
    encoder=network.encoder,
    decoder=None,
    params=params,
    has_norm=False,
    **{kind: network},
    **fields,
  )


class _Inventory:
  """The tensors of a source that must still be used, and the lines of its report."""

  def __init__(self, tensors: dict[str, files.Tensor]):
    self.tensors = dict(tensors)
    self.loaded, self.new, self.dropped = [], [], []

  @property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in self.tensors.items()}

  def drop(self, names: list[str], reason: str) -> None:
    for name in names:
      del self.tensors[name]
    self.dropped.append(reason)


def _read_files(
  path: Path, hints: Hints, with_decoder: bool, learned_positions: bool, dtype
) -> LoadedModel:
  """Reads a file or folder of weights in foreign names."""
  source, network = str(path), networks.open_network(path, hints.weights)
  if network.heads:
    return _read_segmenter(path, network, hints, dtype)
  if network.is_detector:
    return _read_detector(path, network, hints, dtype)
  if family := _find_tower(path, network.tensors):
    return _read_tower(path, network, family, hints, dtype)
  inventory = _Inventory(network.tensors)
  inventory.dropped += network.left_out
  description = describe_source(path, inventory.tensors)
  check_description(description, len(inventory.tensors), source)
  encoder = file_encoder(description, hints, dtype, source)
  decoder = _file_decoder(inventory, description, hints, with_decoder, dtype, source)

  is_vit, pos_embed = isinstance(encoder, ViT), description.their_name("pos_embed")
  grid = _find_grid(inventory.shapes, pos_embed, encoder, hints.grid or description.grid, source)
  patch_embed = description.their_name(f"patch_embed{'' if is_vit else 1}.proj.weight")
  channels = shape_of(inventory.shapes, patch_embed, 4, source)[1]
  mean, std = input_statistics(hints, description, channels, source)
  if not is_vit and encoder.cls_token and _fold_cls_row(inventory.tensors, grid):
    inventory.loaded.append("CLS's row of the position table (as a part of cls_token)")
  table = _Table(pos_embed, grid, is_vit, keep=learned_positions)
  encoder = _settle_positions(inventory, encoder, table, source)
  if decoder is not None:
    name = description.their_name("decoder_pos_embed")
    table = _Table(name, grid, bool(encoder.cls_token), keep=False)
    decoder = _settle_positions(inventory, decoder, table, source)
  if not is_vit and not encoder.fuse_stages:
    inventory.new.append(
      "no fusion of the convolutional stages (the source does not hold its layers)"
    )
  classifier, num_classes, has_norm = _find_classifier(inventory, description, source)

  expected = param_shapes(encoder, decoder, grid, classifier, num_classes, channels)
  if not has_norm:
    del expected["encoder"]["norm"]
  entries = map(description.rename, name_table(encoder, decoder, classifier, has_norm))
  params = convert(inventory.tensors, list(entries), expected, source=source)
  if not has_norm:
    params["encoder"]["norm"] = tower_params.fresh_norm(encoder.dim)
    inventory.new.append(NO_NORM if classifier else ABSENT_NORM)
  report = Report(
    source,
    f"{describe(encoder)}, {description.naming}"
    + (f" behind {network.wrapper!r}" if network.wrapper else ""),
    (*_count_params(params), *inventory.loaded),
    tuple(inventory.new),
    tuple(inventory.dropped),
  )
  return LoadedModel(
    encoder=encoder,
    decoder=decoder,
    params=params,
    grid=grid,
    mean=mean,
    std=std,
    method=description.method,
    has_norm=has_norm,
    report=report,
    classes=tuple(description.classes),
  )


def _find_tower(path: Path, tensors: dict[str, files.Tensor]) -> families.Family | None:
  """Returns the family of a vision tower; None for MAE, ViTMAE, ConvMAE and what is unknown."""
  found = families.find_family({name: tensor.shape for name, tensor in tensors.items()})
  if not found or {"decoder_embed.weight", "decoder.decoder_embed.weight"} & tensors.keys():
    return None
  family, _ = found
  if family.names.block == "blocks.{}" and not family.names.scale1:
    return None  # MAE has timm's names too
  config = _folder(path) / "config.json"
  is_vit_mae = config.is_file() and files.read_json(config).get("model_type") == "vit_mae"
  return None if is_vit_mae else family


def _folder(path: Path) -> Path:
  return path if path.is_dir() else path.parent


def _describe_segmenter(path: Path, tensors: dict[str, files.Tensor], hints: Hints) -> Description:
  """Returns what a segmentation model notes about itself, or else what its tensors tell.

  Args:
    path: of the file.
    tensors: those of the backbone.
    hints: of the user.
  """
  description, source = read_notes(path, mmseg.NAMING), str(path)
  if description is None:
    fields, grid = mmseg.encoder_fields(tensors, hints.grid, source)
    description = Description(mmseg.NAMING, lambda entry: entry, fields, {}, grid)
  check_description(description, len(tensors), source)
  return description


def _read_segmenter(path: Path, network: networks.Network, hints: Hints, dtype) -> LoadedModel:
  """Reads a segmentation model in mmsegmentation's names."""
  source, tensors = str(path), network.tensors
  description = _describe_segmenter(path, tensors, hints)
  if "num_heads" in description.encoder:  # notes or tables of relative positions tell
    hints = hints._replace(num_heads=0)
  encoder, grid = file_encoder(description, hints, dtype, source), hints.grid or description.grid
  shapes = {name: tensor.shape for name, tensor in tensors.items()}
  if encoder.learned_positions:
    grid = _find_grid(shapes, "pos_embed", encoder, grid, source)
  elif not grid:
    raise WeightsError(f"{source} does not tell the grid of its tables; give grid=(rows, columns)")
  patch_embed = f"patch_embed{'' if isinstance(encoder, ViT) else 1}.proj.weight"
  channels = shape_of(shapes, patch_embed, 4, source)[1]
  mean, std = input_statistics(hints, description, channels, source)
  head_shapes = {name: tensor.shape for name, tensor in network.heads.items()}
  noted = description.segmenter
  segmenter = Segmenter(
    encoder,
    **mmseg.head_fields(head_shapes, noted.get("pool_scales", ()), source),
    levels=mmseg.choose_levels(encoder, hints.levels or noted.get("levels", ()), source),
    dtype=dtype,
  )
  params = convert(
    {mmseg.BACKBONE + name: x for name, x in tensors.items()} | network.heads,
    mmseg.segmenter_table(segmenter),
    mmseg.segmenter_shapes(segmenter, grid, channels, source),
    ignore=(mmseg.CONSTANTS,),
    source=source,
  )
  statistics = len(jax.tree.leaves(params["batch_stats"]))
  loaded = _count_params({name: params[name] for name in ("encoder", "segmenter")})
  params["encoder"]["norm"] = tower_params.fresh_norm(encoder.dim)
  classes = tuple(description.classes) or files.read_classes(path)
  _check_classes(classes, segmenter.num_classes, source)
  constants = [x for x in (*tensors, *network.heads) if re.fullmatch(mmseg.CONSTANTS, x)]
  dropped = [f"{len(constants)} counters and table indices"] if constants else []
  model = f"{describe(encoder)}, {mmseg.describe(segmenter)}, {mmseg.NAMING}"
  return _with_heads(
    segmenter,
    params,
    grid=grid,
    mean=mean,
    std=std,
    method=description.method,
    report=Report(
      source,
      model,
      (*loaded, f"running statistics ({statistics} tensors)"),
      (UNUSED_NORM,),
      (*network.left_out, *dropped),
    ),
    classes=classes,
  )


def _read_detector(path: Path, network: networks.Network, hints: Hints, dtype) -> LoadedModel:
  """Reads a detector in detectron2's names."""
  source, tensors = str(path), network.tensors
  shapes = {name: tensor.shape for name, tensor in tensors.items()}
  fields = detectron2.detector_fields(shapes, source)
  backbone = detectron2.BACKBONE + detectron2.NETS[fields["pyramid_kind"]]
  of_encoder = {
    name.removeprefix(backbone): x for name, x in shapes.items() if name.startswith(backbone)
  }
  description = read_notes(path, detectron2.NAMING)
  if description is None:
    noted, grid = detectron2.encoder_fields(of_encoder, source)
    description = Description(detectron2.NAMING, lambda entry: entry, noted, {}, grid)
  check_description(description, len(tensors), source)
  encoder, grid = file_encoder(description, hints, dtype, source), tuple(description.grid)
  more, rules = detectron2.read_notes(description.detector)
  detector = MaskRCNN(encoder, **fields, **more, dtype=dtype)
  patch_embed = f"patch_embed{'' if isinstance(encoder, ViT) else 1}.proj.weight"
  channels = shape_of(of_encoder, patch_embed, 4, source)[1]
  mean, std = input_statistics(hints, description, channels, source)
  size = tuple(side * encoder.patch_size for side in grid)
  params = convert(
    tensors,
    detectron2.detector_table(detector),
    detectron2.detector_shapes(detector, size, channels),
    ignore=(detectron2.CONSTANTS,),
    source=source,
  )
  loaded = _count_params(params)
  params["encoder"]["norm"] = tower_params.fresh_norm(encoder.dim)
  classes = tuple(description.classes)
  _check_classes(classes, detector.num_classes, source)
  constants = [x for x in tensors if re.fullmatch(detectron2.CONSTANTS, x)]
  dropped = [f"{len(constants)} constants and counters"] if constants else []
  return _with_heads(
    detector,
    params,
    grid=grid,
    mean=mean,
    std=std,
    method=description.method,
    report=Report(
      source,
      f"{describe(encoder)}, {detectron2.describe(detector)}, {detectron2.NAMING}",
      loaded,
      (UNUSED_NORM,),
      (*network.left_out, *dropped),
    ),
    classes=classes,
    rules=rules,
  )


def _read_tower(
  path: Path, network: networks.Network, family: families.Family, hints: Hints, dtype
) -> LoadedModel:
  """Reads a vision tower as an encoder, with the classifier of a ViTForImageClassification."""
  source, has_config = str(path), bool(family.model_types)
  overrides = towers.Overrides(0 if has_config else hints.num_heads, grid=hints.grid)
  tower = towers.open_tower(path, "", overrides, dtype, hints.weights)
  if family.name not in STUDENTS:
    raise WeightsError(
      f"{source} is {tower.description}, which loads as a teacher alone (config.teacher.path); "
      f"encoders are {', '.join(STUDENTS)}"
    )
  encoder_params, _ = tower_params.read_params(tower, tower.table_grid)
  params, classes = {"encoder": encoder_params}, ()
  entries = families.name_table(family, tower.prefix, tower.module, tower.has_norm)
  others = network.tensors.keys() - {name for entry in entries for name in entry.theirs}
  config = files.read_json(_folder(path) / "config.json") if has_config else {}
  table = _classifier_table(tower, network.tensors.keys())
  if table and not tower.has_norm and len(table) == 2:
    raise WeightsError(
      f"{source} is damaged: it holds {table[0].theirs[0]}, but neither of the norms before it, "
      f"{family.names.norm} and {family.names.fc_norm}"
    )
  if table:
    classifier = _read_classifier(network.tensors, table, tower.module.dim, source)
    params["classifier"] = classifier
    classes = _class_names(config, len(classifier["head"]["bias"]))
    others -= {name for entry in table for name in entry.theirs}
  dropped = _describe_parts(others)
  if encoder_params.pop("proj", None):
    dropped.add("projection")
  encoder = tower.module.clone(proj_dim=0)
  naming = f"{family.name}'s blocks" + (f" behind {network.wrapper!r}" if network.wrapper else "")
  notes, new = tower.notes if family.name == beit.NAME else None, (NO_DECODER,)
  if not tower.has_norm:
    new += (NO_NORM if "classifier" in params else ABSENT_NORM,)
  has_both = encoder.relative_positions and encoder.positions == "table"
  both = ("a position table beside the relative positions",) if has_both else ()
  if family.name == beit.NAME and not has_config and not notes and not hints.mean:
    naming += f"; {beit.STATISTICS_NOTE}"
  return LoadedModel(
    encoder=encoder,
    decoder=None,
    params=params,
    grid=tower.table_grid,
    mean=tuple(hints.mean or tower.mean),
    std=tuple(hints.std or tower.std),
    method=notes.method if notes else METHOD,
    has_norm=tower.has_norm,
    report=Report(
      source,
      f"{describe(encoder)}, {naming}",
      (*_count_params(params), *both),
      new,
      (*network.left_out, *sorted(dropped)),
    ),
    classes=tuple(notes.classes) if notes else classes,
    rule=family.rule,
  )


def _describe_parts(names: set[str]) -> set[str]:
  """Returns the parts of a file to which `names` belong: first words, or names that stand alone."""
  constants = {name for name in names if name.endswith("relative_position_index")}
  parts = Counter(name.split(".")[0] for name in names - constants)
  described = {name if parts[x := name.split(".")[0]] == 1 else x for name in names - constants}
  return described | ({"relative_position_index (computed here)"} if constants else set())


def _classifier_table(tower: towers.Tower, names) -> list[Entry]:
  """Returns the entries of the classifier of a tower, [] without one.

  Args:
    tower: whose classifier it is.
    names: of the tensors of its file.
  """
  theirs = tower.family.names
  table = dense("head", theirs.classifier) if theirs.classifier else []
  if not table or table[0].theirs[0] not in names:
    return []
  fc_norm = norm("fc_norm", tower.prefix + theirs.fc_norm) if theirs.fc_norm else []
  return [*(fc_norm if fc_norm and fc_norm[0].theirs[0] in names else []), *table]


def _read_classifier(tensors, table: list[Entry], dim: int, source: str):
  """Returns the parameters of a classifier, given its entries."""
  shapes = {name: x.shape for name, x in tensors.items()}
  (count,) = shape_of(shapes, table[-1].theirs[0], 1, source)
  parts = _classifier_shapes(dim, count)
  names = {name for entry in table for name in entry.theirs}
  return convert(
    {name: tensors[name] for name in names if name in tensors},
    table,
    {part: parts[part] for part in dict.fromkeys(entry.ours.split("/")[0] for entry in table)},
    source=source,
  )


def _class_names(config: dict[str, Any], count: int) -> tuple[str, ...]:
  """Returns the names of the classes in a config.json of transformers; () if it tells none."""
  labels = config.get("id2label") or {}
  classes = tuple(str(labels.get(str(i), f"LABEL_{i}")) for i in range(count))
  # transformers makes up LABEL_0 where it knows no names.
  return () if classes[0] == "LABEL_0" else classes


def _file_decoder(
  inventory: _Inventory,
  description: Description,
  hints: Hints,
  with_decoder: bool,
  dtype,
  source: str,
) -> Decoder | None:
  """Returns the decoder that a file describes.

  Drops its tensors where it is incomplete or not asked for.
  """
  tensors = inventory.tensors
  if description.their_name("decoder_embed.weight") not in tensors:
    inventory.new.append(NO_DECODER)
    rest = map(description.their_name, ("mask_token", "decoder_pos_embed"))
    if rest := [name for name in rest if name in tensors]:  # as in ConvMAE v2
      inventory.drop(rest, f"{', '.join(rest)} (of a decoder that the source does not hold)")
    return None
  if not with_decoder:
    names = [name for name in tensors if name.startswith(("decoder", "mask_token"))]
    inventory.drop(names, "decoder (not asked for)")
    return None
  fields = description.decoder or {}
  if "dim" not in fields:
    raise WeightsError(
      f"{source} is damaged: it holds a decoder, of which it notes nothing; write it again"
    )
  usual = 16 if fields["dim"] == 512 else 0
  fields = with_heads(fields, fields["dim"], hints.decoder_heads, usual, "decoder_heads", source)
  return Decoder(**fields, dtype=dtype)


def _find_classifier(
  inventory: _Inventory, description: Description, source: str
) -> tuple[tuple[str, ...], int, bool]:
  """Finds the classifier of a fine-tuned model.

  Returns:
    The names of its parts, () for none; its number of classes; whether the last norm exists.
  """
  tensors, classifier = inventory.tensors, ()
  if "head.0.running_mean" in tensors:
    names = [name for name in tensors if name.startswith("head.")]
    inventory.drop(names, "head (a linear probe behind BatchNorm)")
  is_replaced = "fc_norm.weight" in tensors or not description.has_norm
  has_norm = "norm.weight" in tensors or not is_replaced
  if "head.weight" in tensors:
    classifier = ("fc_norm", "head") if "fc_norm.weight" in tensors else ("head",)
  elif "fc_norm.weight" in tensors and not has_norm:
    names = [name for name in tensors if name.startswith("fc_norm.")]
    inventory.drop(names, "fc_norm (of a classifier that the source does not hold)")
  num_classes = tensors["head.weight"].shape[0] if classifier else 0
  _check_classes(description.classes, num_classes, source)
  return classifier, num_classes, has_norm


def _check_classes(classes: tuple[str, ...], count: int, source: str) -> None:
  """WeightsError if a source names classes, and not as many as it holds."""
  if classes and len(classes) != count:
    raise WeightsError(
      f"{source} is damaged: it names {len(classes)} classes and holds {count}; write it again"
    )


def _find_grid(shapes, name: str, encoder, grid, source: str) -> tuple[int, int]:
  """Returns (rows, columns) of the encoder's position table: `grid` if it fits, or a square without
  it.
  """
  num_rows = shape_of(shapes, name, 3, source)[1]
  # ConvMAE v2 has a CLS token; whether its published tables have a row for that is unknown.
  for cls_rows in (1,) if isinstance(encoder, ViT) else (0, 1) if encoder.cls_token else (0,):
    candidate = tuple(grid) if grid else (math.isqrt(num_rows - cls_rows),) * 2
    if math.prod(candidate) == num_rows - cls_rows:
      return candidate
  expected = f"a grid of {grid[0]}x{grid[1]}" if grid else "square"
  raise WeightsError(
    f"{source}: {name} has {num_rows} rows, which is not {expected}; give grid=(rows, columns) of "
    "tokens in the images that it was trained with"
  )


def _fold_cls_row(tensors, grid: tuple[int, int]) -> bool:
  """Adds the CLS row of a ConvViT's position table to cls_token; returns whether there was one.

  Our ConvViT has no position for CLS. The sum says the same.
  """
  table = np.asarray(tensors["pos_embed"], np.float32)
  cls, tensors["pos_embed"] = np.split(table, [table.shape[1] - math.prod(grid)], axis=1)
  if cls.any():
    tensors["cls_token"] = np.asarray(tensors["cls_token"], np.float32) + cls
  return bool(cls.any())


class _Table(NamedTuple):
  """A stored position table.

  Attributes:
    name: of the tensor.
    grid: (rows, columns).
    has_cls: it has a row for CLS before the grid.
    keep: it must stay a parameter.
  """

  name: str
  grid: tuple[int, int]
  has_cls: bool
  keep: bool


def _settle_positions(inventory: _Inventory, module, table: _Table, source: str):
  """Returns the module with constant positions if the stored table is the sine-cosine one.

  The positions stay a parameter if the table is another one, or if `table.keep` asks for it.
  """
  name, (rows, columns) = table.name, table.grid
  expected = (1, table.has_cls + rows * columns, module.dim)
  if name not in inventory.tensors or inventory.tensors[name].shape != expected:
    problem = "is missing"
    if name in inventory.tensors:
      problem = f"has shape {tuple(inventory.tensors[name].shape)}"
    raise WeightsError(f"{source} does not fit the model: {name} {problem}, expected {expected}")
  stored = np.asarray(inventory.tensors[name], np.float32)
  difference = np.abs(stored - constant_positions(module, table.grid, table.has_cls)).max()
  # `not <=` also holds for a difference that is not a number.
  is_learned = bool(table.keep or module.learned_positions or not difference <= SAME_TABLE)
  if is_learned:
    inventory.loaded.append(f"{name} ({rows}x{columns} tokens)")
  else:
    accuracy = f" to {difference:.0e}" if difference else ""
    inventory.drop([name], f"{name} (the sine-cosine table{accuracy})")
  return module.clone(learned_positions=is_learned)


def param_shapes(
  encoder,
  decoder,
  grid: tuple[int, int],
  classifier: tuple[str, ...] = (),
  classes: int = 0,
  channels: int = 3,
) -> dict[str, Any]:
  """Returns the shapes of all parameters of a model.

  Args:
    encoder: its module.
    decoder: its module, or None.
    grid: (rows, columns) of its position tables.
    classifier: names of its parts, () for none.
    classes: their number.
    channels: of the images.
  """
  tokens, key = math.prod(grid), jax.random.key(0)
  height, width = (side * encoder.patch_size for side in grid)
  pixels = jax.ShapeDtypeStruct((1, height, width, channels), jnp.float32)
  shapes = {"encoder": jax.eval_shape(encoder.init, key, pixels)["params"]}
  if decoder is not None:
    visible = jax.ShapeDtypeStruct((1, 1 + encoder.cls_token, encoder.dim), jnp.float32)
    mask = Mask(jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, tokens), jnp.int32))
    init = lambda x: decoder.init(key, x, mask, grid)
    shapes["decoder"] = jax.eval_shape(init, visible)["params"]
  if classifier:
    parts = _classifier_shapes(encoder.dim, classes)
    shapes["classifier"] = {name: parts[name] for name in classifier}
  return shapes


def _classifier_shapes(dim: int, classes: int) -> dict[str, Any]:
  """Returns the shapes of the parts that a classifier may have."""
  leaf = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  return {
    "fc_norm": {"scale": leaf(dim), "bias": leaf(dim)},
    "head": {"kernel": leaf(dim, classes), "bias": leaf(classes)},
  }


def name_table(encoder, decoder, classifier: tuple[str, ...], has_norm: bool) -> list[Entry]:
  """Returns the entries of every parameter of a model, in ConvMAE's or MAE's names."""
  family = convmae if isinstance(encoder, ConvViT) else mae
  layers = {"fc_norm": norm, "head": dense}
  parts = {
    "encoder": [
      entry
      for entry in family.encoder_table(encoder)
      if has_norm or not entry.ours.startswith("norm/")
    ],
    "decoder": decoder_table(decoder) if decoder is not None else [],
    "classifier": [entry for name in classifier for entry in layers[name](name, name)],
  }
  return [e._replace(ours=f"{part}/{e.ours}") for part, entries in parts.items() for e in entries]


def constant_positions(module, grid: tuple[int, int], cls_token: bool) -> np.ndarray:
  """Returns the sine-cosine table float32 [1, T, D] of an encoder or decoder."""
  return sincos_2d(module.dim, grid, cls_token)[None]


def params_at(model: LoadedModel, grid: tuple[int, int]) -> dict[str, Any]:
  """Returns `model.params` for images of another grid.

  Learned position tables are interpolated by `model.rule`: bicubically, as in MAE and DeiT, or as
  the family of a tower does it; tables of relative positions as BEiT does it.
  """
  if _is_backbone(model.encoder):
    return _detector_params_at(model, grid)
  return positions.resize_tables(model.params, model.grid, grid, model.rule)


def _is_backbone(encoder) -> bool:
  """Returns whether an encoder has what detection adds to one."""
  return bool(encoder.window or encoder.distances != "none" or encoder.position_grid)


def _detector_params_at(model: LoadedModel, grid: tuple[int, int]) -> dict[str, Any]:
  """Returns the parameters of a detector's encoder, whose positions have a grid of their own."""
  encoder = model.params["encoder"]
  if not model.encoder.position_grid:
    encoder = positions.resize_tables(encoder, model.grid, grid, model.rule)
  shapes = param_shapes(model.encoder, None, grid, channels=len(model.mean))["encoder"]
  if "global_distances" in shapes and model.grid != grid:
    raise WeightsError(
      f"a model with distances='shared' takes images of {model.grid[0]} x {model.grid[1]} tokens "
      f"alone, not {grid[0]} x {grid[1]}"
    )
  return model.params | {"encoder": positions.fit_distances(encoder, shapes)}


def describe(encoder) -> str:
  """Returns one line about an encoder for people."""
  if isinstance(encoder, ViT):
    return (
      f"ViT/{encoder.patch_size}, width {encoder.dim}, depth {encoder.depth}, "
      f"{encoder.num_heads} heads"
    )
  by = lambda values: "/".join(f"{value:g}" for value in values)
  return (
    f"ConvViT/{encoder.patch_size}, widths {by(encoder.embed_dims)}, depths {by(encoder.depths)}, "
    f"{encoder.num_heads} heads, MLP ratios {by(encoder.mlp_ratios)}"
    f"{', CLS token' if encoder.cls_token else ''}"
  )


def module_fields(module) -> dict[str, Any]:
  """Returns the fields of an encoder or decoder as JSON values, without the dtype.

  `make_encoder` and Decoder take them.
  """
  fields = {
    field.name: getattr(module, field.name)
    for field in dataclasses.fields(module)
    if field.name not in ("parent", "name", "dtype")
  }
  if isinstance(module, Decoder):
    return fields
  return {"name": "vit" if isinstance(module, ViT) else "convvit"} | fields


def _count_params(params) -> tuple[str, ...]:
  """Returns one line per part of a parameter tree: its numbers of tensors and parameters."""
  flat = {name: flatten_dict(part, sep="/").values() for name, part in params.items()}
  return tuple(
    f"{name} ({len(leaves)} tensors, {sum(x.size for x in leaves):,} parameters)"
    for name, leaves in flat.items()
  )


def write_model(model: LoadedModel, out: str | Path, form: str) -> None:
  """Writes a model so that others, and `read_model`, can read it; files appear complete or not at
  all.

  Args:
    model: as `read_model` gives it; `encoder_only(model)` leaves decoder and classifier out.
    out: a .safetensors file; with "hf" a folder, which receives config.json,
      preprocessor_config.json and model.safetensors.
    form: "convmae": a ConvViT in ConvMAE's names; "timm": a ViT in those of timm and MAE; "hf": a
      ViT as transformers' ViTMAE. A ViT with relative positions takes BEiT's names of timm, or is
      transformers' Beit. "mmseg": a segmentation model in mmsegmentation's names. "detectron2": a
      detector in detectron2's names.

  Raises:
    WeightsError: this model cannot take that form.
  """
  out, is_vit = Path(out).expanduser(), isinstance(model.encoder, ViT)
  _check_form(model, out, form)
  if form in ("mmseg", "detectron2"):
    (_write_segmenter if form == "mmseg" else _write_detector)(model, out)
    return
  if _is_beit(model.encoder):
    model = _with_stored_positions(model)
  classifier, params = tuple(model.params.get("classifier", ())), model.params
  prefix = "" if model.decoder is None else "vit."
  rename = (lambda entry: mae.to_hf(entry, prefix)) if form == "hf" else lambda entry: entry
  if not model.has_norm:
    encoder = {name: x for name, x in params["encoder"].items() if name != "norm"}
    params = params | {"encoder": encoder}
  if _is_beit(model.encoder):
    entries = beit.write_table(model.encoder, form, classifier, model.has_norm)
  else:
    entries = name_table(model.encoder, model.decoder, classifier, model.has_norm)
    entries = [rename(entry) for entry in entries]
  tensors = export(params, entries)
  for module, name, has_cls in (
    (model.encoder, "pos_embed", is_vit),
    (model.decoder, "decoder_pos_embed", bool(model.encoder.cls_token)),
  ):
    is_constant = module is not None and not module.learned_positions
    if is_constant and not _is_beit(module):  # a constant of ours, a tensor of theirs
      (name,) = rename(Entry("", (name,), same)).theirs
      tensors[name] = constant_positions(module, model.grid, has_cls)
  if form == "hf":
    _write_hf_configs(model, out)
    files.write_safetensors(out / "model.safetensors", tensors)
    return
  files.write_safetensors(out, tensors, {METADATA_KEY: json.dumps(_notes(model))})


def _notes(model: LoadedModel) -> dict[str, Any]:
  """Returns what a written file notes about its model, see `Description`."""
  return {
    "encoder": module_fields(model.encoder),
    "decoder": model.decoder and module_fields(model.decoder),
    "grid": model.grid,
    "mean": model.mean,
    "std": model.std,
    "method": model.method,
    "classes": model.classes,
  } | ({} if model.has_norm or "classifier" in model.params else {"has_norm": False})


def _write_segmenter(model: LoadedModel, out: Path) -> None:
  """Writes a segmentation model as a .safetensors file."""
  encoder = {name: x for name, x in model.params["encoder"].items() if name != "norm"}
  tensors = export(model.params | {"encoder": encoder}, mmseg.segmenter_table(model.segmenter))
  segmenter = {x: getattr(model.segmenter, x) for x in ("levels", "pool_scales")}
  notes = _notes(model) | {"segmenter": segmenter}
  files.write_safetensors(out, tensors, {METADATA_KEY: json.dumps(notes)})


def _write_detector(model: LoadedModel, out: Path) -> None:
  """Writes a detector as a .safetensors file."""
  encoder = {name: x for name, x in model.params["encoder"].items() if name != "norm"}
  tensors = export(model.params | {"encoder": encoder}, detectron2.detector_table(model.detector))
  notes = _notes(model) | {"detector": detectron2.notes(model.detector, model.rules)}
  files.write_safetensors(out, tensors, {METADATA_KEY: json.dumps(notes)})


def _is_beit(module) -> bool:
  """Returns whether a network has relative positions, for which BEiT's formats have a place."""
  return isinstance(module, ViT) and module.relative_positions


def _with_stored_positions(model: LoadedModel) -> LoadedModel:
  """Returns a BEiT with its sine-cosine table, if it has one, as a parameter."""
  encoder = model.encoder
  if encoder.positions == "none" or encoder.learned_positions:
    return model
  table = {"pos_embed": constant_positions(encoder, model.grid, encoder.cls_token)}
  params = model.params | {"encoder": model.params["encoder"] | table}
  return model._replace(encoder=encoder.clone(learned_positions=True), params=params)


def _check_form(model: LoadedModel, out: Path, form: str) -> None:
  """WeightsError if a model cannot be written to `out` in that form."""
  is_vit = isinstance(model.encoder, ViT)
  if form not in FORMATS:
    raise WeightsError(f"format {form!r} is not one of {', '.join(FORMATS)}")
  if (model.detector is not None) != (form == "detectron2"):
    raise WeightsError(
      f"a detector cannot be written as {form!r}; use detectron2, or for its encoder mrmae export"
      if model.detector is not None
      else "the format detectron2 is for detectors; this one has no roi_heads"
    )
  if (model.segmenter is not None) != (form == "mmseg"):
    raise WeightsError(
      f"a segmentation model cannot be written as {form!r}; use mmseg, or --parts=encoder"
      if model.segmenter is not None
      else "the format mmseg is for segmentation models; this one has no decode_head"
    )
  if form != "detectron2" and _is_backbone(model.encoder):
    raise WeightsError(
      "the encoder of a detector (windows, tables of distances, a grid of positions) has a place "
      "in the format detectron2 alone, with its detector: --parts=all"
    )
  if form not in ("mmseg", "detectron2") and is_vit == (form == "convmae"):
    raise WeightsError(
      f"a {describe(model.encoder)} cannot be written as {form!r}; use "
      f"{'timm or hf' if is_vit else 'convmae'}"
    )
  if form != "hf" and (out.is_dir() or out.suffix != ".safetensors"):
    raise WeightsError(f"{out}: format {form} is one file; name it *.safetensors")
  if form == "hf" and out.is_file():
    raise WeightsError(f"{out} is a file; format hf is a folder")
  if form in ("mmseg", "detectron2"):
    return
  plain, is_beit = ViT(), _is_beit(model.encoder)
  fields = TOWER_FIELDS + (() if is_beit else BEIT_FIELDS)
  if is_vit and (special := [x for x in fields if getattr(model.encoder, x) != getattr(plain, x)]):
    raise WeightsError(
      f"a ViT with {', '.join(special)} has no place in the format {form}; hand it on with mrmae "
      "export"
    )
  if is_beit and model.decoder is not None:
    raise WeightsError(
      f"a ViT with relative_positions takes the names of BEiT, which have no decoder; the format "
      f"{form} holds the encoder: --parts=encoder"
    )
  if is_beit and form == "hf" and (model.encoder.fuse_layers or model.encoder.key_bias):
    raise WeightsError(
      "transformers' Beit has no place for fused layers or a bias of the keys; use timm"
    )
  if is_beit:
    return
  has_extras = "classifier" in model.params or model.encoder.fuse_layers or not model.has_norm
  if form == "hf" and has_extras:
    raise WeightsError(
      "ViTMAE has no place for a classifier, fused layers, or an encoder that fine-tuning has left "
      "without its last norm; use timm, or for a classifier the encoder alone"
    )


def hf_preprocessor(size: tuple[int, int], mean, std) -> dict[str, Any]:
  """Returns the content of a preprocessor_config.json for images of (height, width)."""
  return {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "resample": 3,
    "size": {"height": size[0], "width": size[1]},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(mean),
    "image_std": list(std),
  }


def _write_hf_configs(model: LoadedModel, folder: Path) -> None:
  """Writes config.json and preprocessor_config.json of a folder of transformers."""
  height, width = (side * model.encoder.patch_size for side in model.grid)
  preprocessor = hf_preprocessor((height, width), model.mean, model.std)
  if _is_beit(model.encoder):
    config = beit.hf_config(model.encoder, model.grid, len(model.mean), _labels(model))
    config["use_mean_pooling"] = (
      "fc_norm" in model.params.get("classifier", {}) or not model.has_norm
    )
    if height != width:
      logging.warning(
        "%s: images of %dx%d are not square; transformers 5 reads such tables of relative "
        "positions with rows and columns exchanged and gives other numbers. This project and timm "
        "read them right.",
        folder,
        height,
        width,
      )
  else:
    config = mae.hf_config(model.encoder, model.decoder, model.grid, len(model.mean), model.method)
  for name, content in (("config", config), ("preprocessor_config", preprocessor)):
    with atomic_write(folder / f"{name}.json") as tmp:
      tmp.write_text(json.dumps(content, indent=2) + "\n")


def _labels(model: LoadedModel) -> tuple[str, ...]:
  """Returns the names of the classes, transformers' own where they are unknown; () for none."""
  if "classifier" not in model.params:
    return ()
  count = len(model.params["classifier"]["head"]["bias"])
  return model.classes or tuple(f"LABEL_{i}" for i in range(count))


def untrained(model: LoadedModel, seed: int = 0) -> LoadedModel:
  """Returns the encoder of a model with fresh weights, for comparison."""
  height, width = (side * model.encoder.patch_size for side in model.grid)
  pixels = jnp.zeros((1, height, width, len(model.mean)))
  params = jax.jit(model.encoder.init)(jax.random.key(seed), pixels)["params"]
  return model._replace(
    decoder=None, segmenter=None, detector=None, params={"encoder": params}, classes=()
  )


def encoder_only(model: LoadedModel) -> LoadedModel:
  """Returns a model without its decoder, classifier, segmentation and detection."""
  params = {"encoder": model.params["encoder"]}
  return model._replace(decoder=None, segmenter=None, detector=None, params=params, classes=())
