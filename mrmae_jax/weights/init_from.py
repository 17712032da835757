"""Reads the weights that a run starts from, `config.init_from`: a run, or a file of weights."""

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from mrmae_jax.errors import WeightsError
from mrmae_jax.models import ConvViT, ViT
from mrmae_jax.weights import loaded_model, readers

# Fields of an encoder that change no parameter which other tasks take.
FREE_FIELDS = {"sparse", "drop_path", "remat", "fuse_stages", "fuse_layers", "eps"}
# Parameters of an encoder that serve pre-training alone.
FUSION = ("stage1_output_decode", "stage2_output_decode", "fusion")


def read_source(
  config,
  encoder: ConvViT | ViT,
  new: tuple[str, ...] = (),
  free: tuple[str, ...] = (),
  **options,
) -> loaded_model.LoadedModel:
  """Reads the model of `config.init_from`, whose encoder must be `encoder`.

  Args:
    config: validated configuration.
    encoder: that of the run.
    new: fields of the encoder that it may have and the source not.
    free: other fields in which both may differ.
    **options: of `readers.read_model`: decoder, mimic_heads, decoder_heads.

  Raises:
    WeightsError: it does not load, or is another architecture; every difference is named.
  """
  source = readers.read_model(
    config.init_from,
    num_heads=config.encoder.num_heads,
    learned_positions=encoder.learned_positions,
    **options,
  )
  if len(source.mean) != len(config.data.mean):
    raise WeightsError(
      f"config.init_from={config.init_from} takes images of {len(source.mean)} channels, "
      f"config.data.mean has {len(config.data.mean)}; weights cannot be converted "
      "between numbers of channels: give images, mean and std of as many channels, or "
      "config.init_from= (empty) to start from random weights"
    )
  added = {field for field in new if getattr(encoder, field)}
  if different := _differences(source.encoder, encoder, FREE_FIELDS | added | set(free)):
    raise WeightsError(
      f"config.init_from={config.init_from} is another architecture: {'; '.join(different)}. "
      f"Set config.encoder to that of the checkpoint{_options(source.encoder, config.encoder)}"
    )
  return source


def _differences(theirs, ours, free: set[str]) -> list[str]:
  """Returns one text for each field, but those in `free`, in which two modules differ.

  Of a ConvViT and a ViT that is their kind alone.
  """
  theirs, ours = (loaded_model.module_fields(module) for module in (theirs, ours))
  if theirs.get("name") != ours.get("name"):
    return [f"{theirs['name']} there, {ours['name']} here"]
  return [
    f"{key} {theirs.get(key)!r} there, {ours.get(key)!r} here"
    for key in sorted((ours.keys() | theirs.keys()) - free)
    if theirs.get(key) != ours.get(key)
  ]


def different_fields(theirs, ours, names: Iterable[str]) -> dict[str, str]:
  """Returns {name: text} of each of the named fields in which two modules differ."""
  return {
    name: f"{name} {getattr(theirs, name)} there, {getattr(ours, name)} here"
    for name in names
    if getattr(theirs, name) != getattr(ours, name)
  }


def different_classes(config, source, num_classes: int, class_names: tuple[str, ...]) -> str:
  """Returns how the classes of a model and of the images of a run differ.

  Args:
    config: of the run.
    source: the model.
    num_classes: of the model.
    class_names: of the images.
  """
  only = lambda a, b: ", ".join([x for x in a if x not in b][:5]) or "none"
  if not source.classes:
    names = "there they have no names"
  elif set(source.classes) == set(class_names):
    names = "they are the same in another order"
  else:
    there, here = only(source.classes, class_names), only(class_names, source.classes)
    names = f"only there: {there}; only here: {here}"
  return (
    f"config.init_from={config.init_from} tells {num_classes} classes apart, "
    f"{config.data.source} has {len(class_names)}; {names}"
  )


def _options(encoder, section) -> str:
  """Returns the options that make a configuration's `encoder` that of a checkpoint, if any do."""
  fields = loaded_model.module_fields(encoder)
  if fields["name"] != section.name:
    is_beit = fields["name"] == "vit" and fields["relative_positions"]
    kind = "beitv2" if is_beit else fields["name"]
    return f": a configuration whose encoder is {kind}"
  words = [
    f"--config.encoder.{key}={str(value).replace(' ', '')}"
    for key, value in fields.items()
    if key in section and key not in FREE_FIELDS - {"eps"} and section[key] != value
  ]
  return f": {' '.join(words)}" if words else ""


def encoder_params(
  config, source: loaded_model.LoadedModel, encoder: ConvViT | ViT
) -> tuple[dict[str, np.ndarray], list[str]]:
  """Returns a model's parameters of `encoder` for the images of a run, and notes for the log.

  The parameters are {path joined by "/": array}. Positions have the grid of the images, or that of
  the encoder's own table.
  """
  grid = _grid(config, encoder)
  if not source.encoder.position_grid:
    grid = tuple(encoder.position_grid) or grid
  params = flatten_dict(loaded_model.params_at(source, grid)["encoder"], sep="/")
  notes = [f"starting from {source.report}"]
  if source.encoder.eps != encoder.eps:
    notes.append(f"eps of its norms was {source.encoder.eps:g}, here it is {encoder.eps:g}")
  for name in ("mean", "std"):
    theirs, ours = getattr(source, name), tuple(config.data[name])
    if not np.allclose(theirs, ours, atol=1e-3):
      text = lambda values: ",".join(f"{value:.3g}" for value in values)
      notes.append(f"{name} of its images was {text(theirs)}, config.data.{name} is {text(ours)}")
  size = lambda grid: f"{grid[0]}x{grid[1]}"
  for name, words in (
    ("pos_embed", "position table"),
    ("relative_positions", "tables of distances"),
  ):
    if source.grid != grid and any(path.split("/")[-1] == name for path in params):
      notes.append(f"{words} {size(source.grid)} interpolated to {size(grid)}")
  return params, notes


def _grid(config, encoder) -> tuple[int, int]:
  height, width = config.image_size
  return height // encoder.patch_size, width // encoder.patch_size


def read_student(config, model, shapes) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
  """Reads a student to pre-train further: its encoder, decoder and mimic heads, where they fit.

  Args:
    config: validated configuration of pre-training.
    model: `mrmae.Model`, the student of the run.
    shapes: of its parameters.

  Returns:
    {path joined by "/": array} and lines for the log, which name what starts anew.

  Raises:
    WeightsError: see `read_source`.
  """
  source = read_source(
    config, model.encoder, mimic_heads=True, decoder_heads=config.decoder.num_heads
  )
  _, notes = encoder_params(config, source, model.encoder)
  params = flatten_dict(loaded_model.params_at(source, _grid(config, model.encoder)), sep="/")
  stale = ()  # of the same shape, but of another place in the network
  if source.encoder.fuse_layers != model.encoder.fuse_layers:
    stale += ("encoder/fusion/",)
  if source.decoder is not None:
    if different := _differences(source.decoder, model.decoder, {"remat", "eps"}):
      notes.append(f"another decoder: {'; '.join(different)}")
      stale += ("decoder/",)
  expected = {name: x.shape for name, x in flatten_dict(shapes, sep="/").items()}
  fitting = {
    name: x
    for name, x in params.items()
    if x.shape == expected.get(name) and not name.startswith(stale)
  }
  for label, names in (
    ("left out", params.keys() - fitting.keys()),
    ("new, with random weights", expected.keys() - fitting.keys()),
  ):
    if names:
      notes.append(f"{label}: {', '.join(sorted(set(map(_part, names))))}")
  return fitting, ("\n  ".join(notes),)


def _part(name: str) -> str:
  """Returns the part of a student that a parameter belongs to, for people."""
  part, *rest = name.split("/")
  return (
    part if part == "decoder" else " ".join((part.removesuffix("s").replace("_", " "), rest[0]))
  )


def digest(params: dict[str, Any]) -> str:
  """Returns the sha256 of parameters, which tells runs with other starts apart."""
  arrays = (np.ascontiguousarray(params[name]).tobytes() for name in sorted(params))
  return hashlib.sha256(b"".join(arrays)).hexdigest()
