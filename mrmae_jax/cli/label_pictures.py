"""Pictures of what a segmentation model finds in images: `mrmae predict --out=DIR`."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from mrmae_jax import pretrained
from mrmae_jax.checks import MAX_SCALE
from mrmae_jax.cli import classifiers
from mrmae_jax.cli.evaluate import write_csv
from mrmae_jax.cli.features import show_progress
from mrmae_jax.cli.images import find_exif, skip_options
from mrmae_jax.data import augment
from mrmae_jax.data.loader import warn_of_skipped
from mrmae_jax.errors import DataError, UsageError
from mrmae_jax.runs import supervision
from mrmae_jax.runs.paths import atomic_folder
from mrmae_jax.viz.grid import class_colors, paint_classes

MOST_CLASSES = 256  # of a picture with a palette


def run(options) -> str:
  """Writes the labels of all images, the images under their colors, and a table of the classes.

  Raises:
    UsageError, WeightsError, DataError: options, a model or images that do not fit.
  """
  out = Path(options.out).expanduser()
  if out.exists():
    raise UsageError(f"{out} exists; give another name or remove it")
  path, model, names = _load(options)
  source = classifiers.open_source(options)
  files = _find_files(source)
  print(f"{model.report}\n{source.description}", flush=True)
  counts = np.zeros(len(names), np.int64)
  with supervision.supervised(hang_s=0), atomic_folder(out) as folder:
    written, labels = 0, _segment(model, source, options, find_exif(options, path))
    for (index,), image, label in show_progress(labels, len(source)):
      counts += np.bincount(label.reshape(-1), minlength=len(names))
      _write(folder, files[index], image, label)
      written += 1
    shares = counts / max(counts.sum(), 1)
    rows = zip(range(len(names)), names, map(_hex, class_colors(len(names))), shares)
    shown = ((*row, f"{share:.6g}") for *row, share in rows)
    write_csv(folder / "classes.csv", ("value", "class", "color", "share of pixels"), shown)
  return f"wrote {options.out}: labels, overlays and classes.csv of {written} images"


def _load(options):
  """Returns the path, the model and the names of its classes.

  Raises:
    UsageError: the model does not segment, or options are for classifiers.
  """
  if len(options.models) != 1:
    raise UsageError(f"--models={','.join(options.models)}: segmentation takes one model")
  if options.crop is not None or options.average != "probabilities":
    raise UsageError("--crop and --average are for classifiers; leave them out with --out=DIR")
  if not options.scales or max(options.scales) > MAX_SCALE:
    raise UsageError(
      f"--scales={','.join(map(str, options.scales))}: give numbers above 0 and at most {MAX_SCALE}"
    )
  (path,) = options.models
  model = pretrained.load(path, num_heads=options.num_heads, decoder=False)
  if model.network.segmenter is None:
    raise UsageError(
      f"{path} does not segment; --out={options.out} must end in .csv or .parquet for a "
      "classifier, and a folder takes a run of mrmae segment or a file in mmsegmentation's names"
    )
  count = model.config["classes"]
  if count > MOST_CLASSES:
    raise UsageError(f"{path} has {count} classes; pictures hold at most {MOST_CLASSES}")
  if not model.class_names and not options.classes:
    return path, model, tuple(f"class {i}" for i in range(count))
  return path, model, classifiers.class_names(path, model, options.classes)


def _find_files(source) -> list[str]:
  """Returns the name of the pictures of each image, with folders; UsageError if two share one."""
  files = {}
  for index in range(len(source)):
    name = PurePosixPath(source.name(index))
    parts = [part for part in name.parts if part not in ("/", "..")]
    file = str(PurePosixPath(*parts).with_suffix(".png"))
    if file in files:
      raise UsageError(
        f"{source.name(files[file])} and {name} would both be written as labels/{file}; rename one"
      )
    files[file] = index
  return list(files)


def _segment(
  model, source, options, exif: str
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
  """Yields ([index], image uint8 [H, W, C], labels [H, W]) of all images that can be read."""
  loader, channels, skipped = skip_options(options), len(model.network.mean), {}
  look = dict(mode=options.mode, scales=options.scales, flip=options.flip)
  for index in range(len(source)):
    try:
      image = augment.pixels(source[index], channels, exif)
    except DataError as error:
      if loader.on_error != "skip":
        raise
      skipped[index] = str(error)
      warn_of_skipped(skipped, len(source), loader, "it has no labels")
      continue
    yield [index], image, model.segment([image], **look)[0]


def _write(folder: Path, file: str, image: np.ndarray, label: np.ndarray) -> None:
  """Writes labels/FILE, whose values are classes, and overlays/FILE."""
  picture = Image.fromarray(label)
  picture.putpalette(class_colors(MOST_CLASSES).tobytes())  # numbers to programs, colors to people
  gray = image[:, :, :1] if image.shape[2] != 3 else image
  overlay = Image.fromarray(paint_classes(gray, label))
  for kind, x in (("labels", picture), ("overlays", overlay)):
    path = folder / kind / file
    path.parent.mkdir(parents=True, exist_ok=True)
    x.save(path)


def _hex(color: np.ndarray) -> str:
  return f"#{bytes(color).hex()}"
