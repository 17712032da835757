"""Writes trained models so that others can read them, in ConvMAE's, timm's or transformers' names.

Segmentation models take mmsegmentation's names, detectors detectron2's. It is the way back of
`readers.read_model`, which reads what was written with the same parameters, bit for bit.
"""

import json
from pathlib import Path
from typing import Any

from absl import logging

from mrmae_jax.errors import WeightsError
from mrmae_jax.models import ViT
from mrmae_jax.runs.paths import atomic_write
from mrmae_jax.weights import beit, detectron2, files, mae, mmseg
from mrmae_jax.weights.loaded_model import (
  LoadedModel,
  constant_positions,
  describe,
  is_backbone,
  module_fields,
  name_table,
)
from mrmae_jax.weights.model_sources import METADATA_KEY, same_names
from mrmae_jax.weights.table import Entry, export, same

FORMATS = ("convmae", "timm", "hf", "mmseg", "detectron2")
# Fields in which towers differ from MAE's ViT, whose formats have no place for them; and those for
# which BEiT's formats have one.
TOWER_FIELDS = ("activation", "patch_bias", "norm_pre", "gated", "num_registers")
BEIT_FIELDS = ("layer_scale", "positions", "key_bias")


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
  rename = (lambda entry: mae.to_hf(entry, prefix)) if form == "hf" else same_names
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
  if form != "detectron2" and is_backbone(model.encoder):
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
