"""Finds the images that a command reads: those of the run that it is given, or others."""

import os
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from mrmae_jax import config as config_lib
from mrmae_jax import data
from mrmae_jax.data.sources import PLACES
from mrmae_jax.data.sources.base import NothingHeldOut
from mrmae_jax.errors import DataError, UsageError, WorkdirError
from mrmae_jax.runs import checkpoint
from mrmae_jax.runs.paths import is_bucket

# Options of the same names say otherwise
RULES = ("train_split", "eval_split", "data_dir", "holdout_every", "labels", "quarantine")


def find_images(options, models: Sequence[str]) -> ConfigDict:
  """Returns the images that a command reads, in the shape of `config.data`.

  The images of a run are read as the run reads them: with its splits, hold-out and quarantine,
  wherever they lie now. Of other images nothing is held out. The options can say otherwise.

  Args:
    options: `images` and RULES, each None if it was not given.
    models: values of --model or --models; those that are workdirs know their images.

  Raises:
    UsageError: no images were given and there is no run, or the runs differ in what they read.
  """
  runs = {model: run for model in models if (run := read_run_data(model))}
  if not options.images and not runs:
    for model in models:
      is_absent = not is_bucket(model) and not os.path.exists(os.path.expanduser(model))
      if is_absent and model != "pixels":  # which is a model, too
        raise UsageError(f"{model}: no such file or folder")
    raise UsageError(
      f"--images is missing: {', '.join(models)} is not a run, which would know its own images"
    )
  if options.images:
    runs = {model: run for model, run in runs.items() if _has_images(model, run, options.images)}
  images = ConfigDict(config_lib.pretrain().data)
  images.holdout_every = 0
  for key in ("source", *RULES):
    option = "images" if key == "source" else key
    if (given := getattr(options, option)) is not None:
      images[key] = given
    elif runs:
      images[key] = _common_value(key, option, runs)
  return images


def open_images(options, images: ConfigDict, split: str) -> data.Source:
  """Opens a split of what `find_images` has found.

  Raises:
    DataError: the images cannot be opened; if they are those of a run, the text says so.
  """
  try:
    return data.open_split(images, split)
  except DataError as error:
    if options.images or isinstance(error, NothingHeldOut):
      raise
    raise DataError(f"{error}; give --images if the images of the run lie elsewhere now") from error


def find_view(options, model: str) -> dict[str, Any]:
  """Returns how images are shown to a model: {"crop", "exif"}, as in its run unless told otherwise.

  They are arguments of `features.extract`.
  """
  run = _shown_data(model)
  crop = run.eval_crop if options.crop is None else options.crop
  return {"crop": crop, "exif": options.exif or run.exif}


def find_exif(options, model: str) -> str:
  """Returns --exif, or else what the run of the model does, see `data.augment.decode_image`."""
  return options.exif or _shown_data(model).exif


def _shown_data(model: str) -> ConfigDict:
  """Returns `config.data` of a run, or else the defaults."""
  return read_run_data(model) or config_lib.pretrain().data


def skip_options(options) -> data.LoaderOptions:
  """Returns the loader's options of --on_error and --max_skipped."""
  return data.LoaderOptions(on_error=options.on_error, max_skipped=options.max_skipped)


def find_size(options, model) -> tuple[int, int]:
  """Returns (height, width) by --image_size, or else those of the training of a PretrainedModel.

  Raises:
    UsageError: --image_size is not a multiple of the token size.
  """
  if not options.image_size:
    return model.config["image_size"]
  size = options.image_size * (2 if len(options.image_size) == 1 else 1)
  patch = model.network.encoder.patch_size
  if any(side % patch for side in size):
    nearest = ",".join(str(max(1, round(side / patch)) * patch) for side in size)
    raise UsageError(
      f"--image_size={','.join(map(str, options.image_size))} is not a multiple of the model's "
      f"token size {patch}; nearest: {nearest}"
    )
  return tuple(size)


def read_run_data(model: str) -> ConfigDict | None:
  """Returns `config.data` of a run; None for a model that is not a run."""
  try:
    stored = checkpoint.read_config(model)["data"]
  except WorkdirError:
    return None
  return ConfigDict(dict(config_lib.pretrain().data) | stored)  # older runs lack keys


def _has_images(model: str, run: ConfigDict, source: str) -> bool:
  """Returns whether a source holds the images of a run, here or moved."""
  if _place(source) == _place(run.source):
    return True
  try:
    moved = data.open_split(ConfigDict(dict(run) | {"source": source}), "train")
    return moved.fingerprint == checkpoint.read_identity(model).get("train images")
  except (DataError, WorkdirError):
    return False


def _place(source: str) -> str:
  """Returns a source with the real path of its folder."""
  kind, _, address = source.partition(":")
  if kind not in PLACES:
    return source
  return f"{kind}:{os.path.realpath(os.path.expanduser(address))}"


def _common_value(key: str, option: str, runs: dict[str, ConfigDict]) -> Any:
  """Returns the value of a key that all runs have.

  Raises:
    UsageError: they have several.
  """
  values = {model: run[key] for model, run in runs.items()}
  same = {_place(value) if key == "source" else value for value in values.values()}
  if len(same) > 1:
    differing = ", ".join(f"{value!r} in {model}" for model, value in values.items())
    raise UsageError(f"config.data.{key} is {differing}; choose with --{option}=VALUE")
  return next(iter(values.values()))
