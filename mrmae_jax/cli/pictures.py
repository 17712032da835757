"""Writes a folder of pictures of classes or objects: `mrmae predict --out=DIR`."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from mrmae_jax import pretrained
from mrmae_jax.checks import MAX_SCALE
from mrmae_jax.cli import classifiers, label_pictures, object_pictures
from mrmae_jax.cli.features import show_progress
from mrmae_jax.cli.images import find_exif, skip_options
from mrmae_jax.data import augment
from mrmae_jax.data.loader import warn_of_skipped
from mrmae_jax.errors import DataError, UsageError
from mrmae_jax.runs import supervision
from mrmae_jax.runs.paths import atomic_folder


def run(options) -> str:
  """Writes what the model finds in all images, and the images under it.

  Raises:
    UsageError, WeightsError, DataError: options, a model or images that do not fit.
  """
  out = Path(options.out).expanduser()
  if out.exists():
    raise UsageError(f"{out} exists; give another name or remove it")
  path, model = _load(options)
  is_detector = model.network.detector is not None
  source = classifiers.open_source(options, has_objects=is_detector)
  files = _find_files(source)
  with supervision.supervised(hang_s=0), atomic_folder(out) as folder:
    kind = object_pictures.ObjectPictures if is_detector else label_pictures.LabelPictures
    pictures, written = kind(folder, path, model, source, options), 0
    print(f"{model.report}\n{source.description}", flush=True)
    images = _read_images(source, len(model.network.mean), options, find_exif(options, path))
    for (index,), image in show_progress(images, len(source)):
      pictures.add(index, files[index], image)
      written += 1
    contents = pictures.finish()
  return f"wrote {options.out}: {contents} of {written} images"


def _load(options):
  """Returns the path and the model.

  Raises:
    UsageError: the model tells neither pixels nor objects apart, or options are for other models.
  """
  if len(options.models) != 1:
    raise UsageError(
      f"--models={','.join(options.models)}: segmentation and detection take one model"
    )
  if options.crop is not None or options.average != "probabilities":
    raise UsageError("--crop and --average are for classifiers; leave them out with --out=DIR")
  if not options.scales or max(options.scales) > MAX_SCALE:
    raise UsageError(
      f"--scales={','.join(map(str, options.scales))}: give numbers above 0 and at most {MAX_SCALE}"
    )
  (path,) = options.models
  model = pretrained.load(path, num_heads=options.num_heads, decoder=False)
  segmenter, detector = model.network.segmenter, model.network.detector
  if segmenter is None and detector is None:
    raise UsageError(
      f"{path} finds neither classes of pixels nor objects; --out={options.out} must end in .csv "
      "or .parquet for a classifier, and a folder takes a run of mrmae segment or mrmae detect, or "
      "a file in the names of mmsegmentation or detectron2"
    )
  if detector is not None and (options.mode != "slide" or options.scales != (1.0,) or options.flip):
    raise UsageError(f"--mode, --scales and --flip are for segmentation; {path} detects objects")
  if segmenter is not None and options.min_score is not None:
    raise UsageError(f"--min_score is for detection; {path} tells pixels apart")
  return path, model


def _find_files(source) -> list[str]:
  """Returns the name of the pictures of each image, with folders; UsageError if two share one."""
  files = {}
  for index in range(len(source)):
    name = PurePosixPath(source.name(index))
    parts = [part for part in name.parts if part not in ("/", "..")]
    file = str(PurePosixPath(*parts).with_suffix(".png"))
    if file in files:
      raise UsageError(
        f"{source.name(files[file])} and {name} would both be written as overlays/{file}; rename "
        "one"
      )
    files[file] = index
  return list(files)


def _read_images(
  source, channels: int, options, exif: str
) -> Iterator[tuple[list[int], np.ndarray]]:
  """Yields ([index], image uint8 [H, W, C]) of all images that can be read."""
  loader, skipped = skip_options(options), {}
  for index in range(len(source)):
    try:
      yield [index], augment.pixels(source[index], channels, exif)
    except DataError as error:
      if loader.on_error != "skip":
        raise
      skipped[index] = str(error)
      warn_of_skipped(skipped, len(source), loader, "nothing is found in it")
