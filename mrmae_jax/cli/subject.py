"""Opens the model, the images and the teacher that `mrmae visualize` shows."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from mrmae_jax import config as config_lib
from mrmae_jax import data, pretrained
from mrmae_jax.cli import show_teacher
from mrmae_jax.cli.images import find_exif, find_images, find_size, open_images, skip_options
from mrmae_jax.data.sources import archive
from mrmae_jax.data.sources.folder import FolderSource
from mrmae_jax.errors import WeightsError, WorkdirError
from mrmae_jax.runs import checkpoint, supervision
from mrmae_jax.viz.grid import bands_shown
from mrmae_jax.weights import hub, loaded_model

BATCH_SIZE = 64  # images that are loaded at a time


class Subject(NamedTuple):
  """A model and the images on which it is shown.

  Attributes:
    model: `pretrained.PretrainedModel`, with the mimic heads of a run that has some.
    images: uint8 [B, H, W, C].
    source: where they come from.
    indices: of the images in the source.
    config: image size, encoder, masking and teacher, in the shape of `config.pretrain()`.
    teacher_out: TeacherOutput of the images; None without a teacher.
    teacher: its description, or why there is none.
    options: of the command.
  """

  model: Any
  images: np.ndarray
  source: Any
  indices: list[int]
  config: ConfigDict
  teacher_out: Any
  teacher: str
  options: Any

  @property
  def token_size(self) -> int:
    """The side of a token in pixels."""
    return self.model.network.encoder.patch_size

  @property
  def grid(self) -> tuple[int, int]:
    """The number of (rows, columns) of tokens."""
    return self.images.shape[1] // self.token_size, self.images.shape[2] // self.token_size

  @property
  def num_tokens(self) -> int:
    """The number of tokens of an image."""
    return self.grid[0] * self.grid[1]

  @property
  def bands(self) -> list[int]:
    """The channels that are shown as red, green and blue."""
    return bands_shown(self.config)[0]

  @property
  def pixels(self) -> np.ndarray:
    """The images as they are shown, float32 [B, H, W, 3] in [0, 1]."""
    return self.images[..., self.bands] / np.float32(255)

  @property
  def mask_ratio(self) -> float:
    """The mask ratio of the model's training."""
    return self.model.network.method["mask_ratio"]

  @property
  def norm_pix(self) -> bool:
    """Whether the decoder predicts normalized patches."""
    if self.options.norm_pix is None:
      return self.model.network.method["norm_pix"]
    return self.options.norm_pix

  def num_visible(self, ratio: float) -> int:
    """Returns how many patches `mrmae.sample_mask` leaves."""
    return int(self.num_tokens * (1 - ratio))


def open_subject(options, needs_teacher: bool) -> Subject:
  """Loads the model, the images and, if it is needed, the teacher."""
  model = pretrained.load(
    options.model,
    num_heads=options.num_heads,
    weights=options.weights,
    decoder_heads=options.decoder_heads,
    mimic_heads=True,
  )
  try:
    run_config = checkpoint.read_config(options.model)
  except WorkdirError:  # the model is not a run
    run_config = {}
  size = find_size(options, model)
  source = _open_source(options)
  indices = spaced_indices(len(source), options.count)
  config = _make_config(options, model, size, run_config)
  shape = (*size, len(model.network.mean))
  loader = skip_options(options)
  indices, images = read_all(source, indices, shape, loader, config.data.exif)
  print(f"{model.report}\n{source.description}", flush=True)
  teacher_out, teacher = None, ""
  if needs_teacher:
    teacher_out, teacher = _run_teacher(options, config, images)
  return Subject(model, images, source, indices, config, teacher_out, teacher, options)


class _Subset:
  """The images of a source at `indices`, in their order."""

  def __init__(self, source, indices: list[int]):
    self._source = source
    self._indices = indices
    self.class_names = source.class_names
    self.description = source.description
    self.fingerprint = ""

  def __len__(self):
    return len(self._indices)

  def __getitem__(self, index: int):
    return self._source[self._indices[index]]


def read_images(
  source,
  indices: list[int],
  shape: tuple[int, ...],
  loader: data.LoaderOptions,
  exif: str = "ignore",
) -> Iterator[tuple[list[int], np.ndarray]]:
  """Yields the images at `indices` in batches: (their indices, uint8 [b, H, W, C]).

  Args:
    source: the images.
    indices: which of them.
    shape: [..., H, W, C].
    loader: with on_error="skip" images that cannot be read are left out.
    exif: see `data.augment.decode_image`.
  """
  *_, height, width, channels = shape
  batches = data.eval_batches(
    _Subset(source, indices),
    data.center_view((height, width), 1.0, channels, exif),
    batch_size=min(BATCH_SIZE, len(indices)),
    options=loader,
  )
  begin = 0
  try:
    for batch in batches:
      supervision.beat()
      valid = batch["valid"]
      yield list(itertools.compress(indices[begin:], valid)), batch["image"][valid]
      begin += len(valid)
  finally:
    batches.close()


def read_all(
  source,
  indices: list[int],
  shape: tuple[int, ...],
  loader: data.LoaderOptions,
  exif: str = "ignore",
) -> tuple[list[int], np.ndarray]:
  """Returns all that `read_images` yields: indices, uint8 [B, H, W, C]."""
  parts, images = zip(*read_images(source, indices, shape, loader, exif))
  return sum(parts, []), np.concatenate(images)


def spaced_indices(total: int, limit: int) -> list[int]:
  """Returns the indices of up to `limit` of `total` images, evenly spaced; 0 for all."""
  count = min(limit, total) if limit else total
  return [i * total // count for i in range(count)]


def image_name(source, index: int) -> str:
  """Returns the folder and file of an image."""
  return "/".join(source[index]["name"].split("/")[-2:])


def _open_source(options):
  """Opens the images of the options, or else those of the run: of these the held-out ones."""
  if options.images:
    path = Path(options.images).expanduser()
    if path.is_file() and path.suffix.lower() not in archive.SUFFIXES:
      return FolderSource(str(path.parent.absolute()), [path.name], f"{path}: one image")
    if path.exists():
      options.images = f"folder:{path}"
  images = find_images(options, [options.model])
  if options.split or not images.holdout_every:
    return open_images(options, images, options.split or "train")
  return open_images(options, images, "eval")


def _make_config(options, model, size: tuple[int, int], run_config: dict[str, Any]) -> ConfigDict:
  """Makes a configuration of pre-training from the model's, with the teacher of the options."""
  network = model.network
  config = config_lib.pretrain()
  config.encoder = ConfigDict(loaded_model.module_fields(network.encoder))
  config.image_size = size
  config.seed = options.seed
  config.data.update(mean=network.mean, std=network.std, exif=find_exif(options, options.model))
  config.method.update(network.method | run_config.get("method", {}))
  config.teacher.update(run_config.get("teacher", {}))
  config.teacher.dtype = "float32"
  if options.teacher:
    is_preset = options.teacher in hub.PRESETS
    config.teacher.name = options.teacher if is_preset else ""
    config.teacher.path = "" if is_preset else options.teacher
  return config


def _run_teacher(options, config: ConfigDict, images: np.ndarray):
  """Returns the teacher's output and its description; without one, None and the reason."""
  if not (config.teacher.name or config.teacher.path):
    return None, "there is no teacher; give one with --teacher"
  try:
    description, teacher_out = show_teacher.run_teacher(config, images)
  except WeightsError as error:
    if options.teacher:
      raise
    return None, f"the run's teacher cannot be loaded ({error}); give it with --teacher"
  return teacher_out, description
