"""Reads trained models: ConvMAE's, MAE's, transformers' ViTMAE and this project's.

Vision towers of other families are read too: BEiT and transformers' ViT, DINO, DINOv2 and CLIP. So
are the segmentation models of ConvMAE, MAE and BEiT, and detectors.

`read_model` takes any of them and is strict: every tensor is used exactly once, or is listed in the
report as left out by design. Sizes come from what the source states (config.json, a run's
configuration, the metadata in files written here), else from the shapes of its tensors.

A ConvViT has the names of Alpha-VL/ConvMAE; a ViT has those of facebookresearch/mae (timm) or
transformers. Fused layers, which no published model has, are called "fusion.". Mimic heads stay
behind unless asked for: they belong to one teacher, and only a comparison with that teacher needs
them.
"""

import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from mrmae_jax.detection import Rules, make_rules
from mrmae_jax.errors import StorageError, WeightsError, WorkdirError
from mrmae_jax.models import ConvViT, Decoder, ViT, make_decoder, make_encoder
from mrmae_jax.models.mask_rcnn import MaskRCNN, make_mask_rcnn
from mrmae_jax.models.upernet import Segmenter, make_segmenter
from mrmae_jax.runs import checkpoint
from mrmae_jax.weights import (
  beit,
  detectron2,
  families,
  files,
  mmseg,
  networks,
  tower_params,
  towers,
)
from mrmae_jax.weights.loaded_model import (
  LoadedModel,
  Report,
  classifier_shapes,
  constant_positions,
  describe,
  name_table,
  param_shapes,
)
from mrmae_jax.weights.model_sources import (
  METHOD,
  Description,
  Hints,
  check_description,
  describe_source,
  file_encoder,
  input_statistics,
  read_notes,
  same_names,
  with_heads,
)
from mrmae_jax.weights.table import Entry, convert, dense, norm, shape_of

# Families that are encoders too.
STUDENTS = ("BEiT", "DINO", "DINOv2", "DINOv2 with registers", "CLIP")
NO_NORM = "norm (fine-tuning replaces the last norm by fc_norm)"
ABSENT_NORM = "norm (the source does not hold it)"
UNUSED_NORM = "norm (segmentation and detection do not use it)"
NO_DECODER = "no decoder (the source is encoder-only and cannot reconstruct)"
SAME_TABLE = 1e-5  # a stored position table that differs by less is the sine-cosine one


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
  if unknown := hints.keys() - set(Hints._fields):
    raise TypeError(f"unknown: {', '.join(sorted(unknown))}; expected {', '.join(Hints._fields)}")
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
  patch_embed = description.their_name(_patch_embed(encoder))
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


def _patch_embed(encoder: ConvViT | ViT) -> str:
  """Returns the name of the kernel that reads the image, in the authors' names."""
  return f"patch_embed{'' if isinstance(encoder, ViT) else 1}.proj.weight"


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
    description = Description(mmseg.NAMING, same_names, fields, {}, grid)
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
  channels = shape_of(shapes, _patch_embed(encoder), 4, source)[1]
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
    description = Description(detectron2.NAMING, same_names, noted, {}, grid)
  check_description(description, len(tensors), source)
  encoder, grid = file_encoder(description, hints, dtype, source), tuple(description.grid)
  more, rules = detectron2.read_notes(description.detector)
  detector = MaskRCNN(encoder, **fields, **more, dtype=dtype)
  channels = shape_of(of_encoder, _patch_embed(encoder), 4, source)[1]
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
  parts = classifier_shapes(dim, count)
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


def _count_params(params) -> tuple[str, ...]:
  """Returns one line per part of a parameter tree: its numbers of tensors and parameters."""
  flat = {name: flatten_dict(part, sep="/").values() for name, part in params.items()}
  return tuple(
    f"{name} ({len(leaves)} tensors, {sum(x.size for x in leaves):,} parameters)"
    for name, leaves in flat.items()
  )
