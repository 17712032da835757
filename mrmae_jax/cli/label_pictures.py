"""Pictures of the class of every pixel, by a segmentation model."""

from pathlib import Path

import numpy as np
from PIL import Image

from mrmae_jax.cli import classifiers
from mrmae_jax.cli.evaluate import write_csv
from mrmae_jax.errors import UsageError
from mrmae_jax.viz.grid import class_colors, paint_classes

MOST_CLASSES = 256  # of a picture with a palette


class LabelPictures:
  """Writes labels, images under their colors, and a table of the classes."""

  def __init__(self, folder: Path, path: str, model, source, options):
    """Finds the names of the classes.

    Args:
      folder: to write into.
      path: of the model, for messages.
      model: that segments.
      source: of the images; not used.
      options: of the command.

    Raises:
      UsageError: too many classes, or --classes does not fit.
    """
    del source
    self._folder, self._model = folder, model
    self._look = dict(mode=options.mode, scales=options.scales, flip=options.flip)
    count = model.config["classes"]
    if count > MOST_CLASSES:
      raise UsageError(f"{path} has {count} classes; pictures hold at most {MOST_CLASSES}")
    self._names = tuple(f"class {i}" for i in range(count))
    if model.class_names or options.classes:
      self._names = classifiers.class_names(path, model, options.classes)
    self._counts = np.zeros(count, np.int64)

  def add(self, index: int, file: str, image: np.ndarray) -> None:
    """Writes labels/FILE, whose values are classes, and overlays/FILE."""
    del index
    label = self._model.segment([image], **self._look)[0]
    self._counts += np.bincount(label.reshape(-1), minlength=len(self._counts))
    picture = Image.fromarray(label)
    picture.putpalette(class_colors(MOST_CLASSES).tobytes())  # numbers to programs, colors to us
    gray = image[:, :, :1] if image.shape[2] != 3 else image
    overlay = Image.fromarray(paint_classes(gray, label))
    for kind, x in (("labels", picture), ("overlays", overlay)):
      path = self._folder / kind / file
      path.parent.mkdir(parents=True, exist_ok=True)
      x.save(path)

  def finish(self) -> str:
    """Writes classes.csv; returns what the folder holds."""
    shares = self._counts / max(self._counts.sum(), 1)
    colors = map(color_text, class_colors(len(self._names)))
    rows = zip(range(len(self._names)), self._names, colors, shares)
    shown = ((*row, f"{share:.6g}") for *row, share in rows)
    write_csv(self._folder / "classes.csv", ("value", "class", "color", "share of pixels"), shown)
    return "labels, overlays and classes.csv"


def color_text(color: np.ndarray) -> str:
  """Returns a color uint8 [3] as "#rrggbb"."""
  return f"#{bytes(color).hex()}"
