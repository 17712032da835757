"""Accuracy of a fine-tuned model, or of several as one: of all images and of each class."""

import csv
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mrmae_jax.cli import classifiers as lib
from mrmae_jax.cli.features import show_progress
from mrmae_jax.data.sources.listing import first_names
from mrmae_jax.errors import DataError, UsageError, printable
from mrmae_jax.runs import supervision
from mrmae_jax.runs.paths import atomic_write, require_writable
from mrmae_jax.viz import plot

MAX_ROWS = 20  # of classes that are printed
TOP = 5


class Counts(NamedTuple):
  """Counts of right and wrong predictions on labelled images.

  Attributes:
    confusion: int64 [C, C], images by true and predicted class.
    top5: int64 [C], images of each class that is among the five most probable ones.
  """

  confusion: np.ndarray
  top5: np.ndarray

  @property
  def images(self) -> np.ndarray:
    """Images of each class, int64 [C]."""
    return self.confusion.sum(1)

  @property
  def accuracy(self) -> dict[str, float]:
    """{"top1", "top5", "per_class"} in [0, 1]: of all images, and the mean over the classes."""
    images, hits = self.images, self.confusion.diagonal()
    return {
      "top1": float(hits.sum() / images.sum()),
      "top5": float(self.top5.sum() / images.sum()),
      "per_class": float((hits[images > 0] / images[images > 0]).mean()),
    }


def count(scores: np.ndarray, labels: np.ndarray) -> Counts:
  """Counts the images of scores [N, C] for classes int [N]."""
  classes = scores.shape[1]
  best = np.argsort(-scores, axis=1, kind="stable")[:, :TOP]
  confusion = np.bincount(labels * classes + best[:, 0], minlength=classes**2)
  hits = (best == labels[:, None]).any(1)
  return Counts(confusion.reshape(classes, classes), np.bincount(labels[hits], minlength=classes))


def run(options) -> str:
  """Carries out `mrmae evaluate`; returns a table for people.

  Raises:
    UsageError, WeightsError, DataError: options, models or images that do not fit.
  """
  if options.out:
    require_writable(options.out)
  classifiers = lib.load_classifiers(options)
  source = lib.open_source(options)
  labels = _find_labels(source, classifiers.class_names)
  class_names = tuple(map(printable, classifiers.class_names))
  print(source.description, flush=True)
  with supervision.supervised(hang_s=0):
    counts = _count_all(classifiers, source, labels, options)
  result = {
    "images": int(counts[options.models[0]].images.sum()),
    "source": source.description,
    "average": options.average,
    "accuracy": {name: value.accuracy for name, value in counts.items()},
  }
  *_, last = counts.values()
  rows = class_rows(last, class_names)
  lines = _describe(result, rows, last, class_names)
  if options.out:
    _write(Path(options.out).expanduser(), result, rows, last.confusion, class_names)
    lines.append(f"wrote result.json, classes.csv, confusion.csv and .png to {options.out}")
  return "\n".join(lines)


def _find_labels(source, class_names: tuple[str, ...]) -> np.ndarray:
  """Returns the position among the models' classes of each class of the images, by its name.

  Raises:
    DataError: the images have no labels.
    UsageError: they have classes that the models do not know.
  """
  if not source.class_names:
    raise DataError(
      f"{source.description}: no labels to measure by; put each class into a sub-folder of its own,"
      " or classify the images with mrmae predict"
    )
  if unknown := set(source.class_names) - set(class_names):
    raise UsageError(
      f"{len(unknown)} of the {len(source.class_names)} classes of the images are not among the"
      f" {len(class_names)} of the model: {first_names(unknown)}; it knows"
      f" {first_names(class_names)}; rename the classes of the images ({source.description}) or"
      " leave these out"
    )
  return lib.find_positions(source.class_names, class_names)


def _count_all(classifiers, source, labels: np.ndarray, options) -> dict[str, Counts]:
  """Returns the counts of each model by its path and, of several, those of the "ensemble"."""
  names = [*options.models, "ensemble"] if len(options.models) > 1 else options.models
  total = dict.fromkeys(names)
  batches = lib.classify(classifiers, source, options)
  for _, positions, logits in show_progress(batches, len(source)):
    if len(logits) > 1:
      logits.append(lib.combine(logits, options.average))
    for name, x in zip(names, logits):
      batch = count(x, labels[positions])
      total[name] = Counts(*map(np.add, total[name], batch)) if total[name] else batch
  if not all(total.values()) or not total[names[0]].images.sum():
    raise DataError(f"{source.description}: not one image could be read")
  return total


def class_rows(counts: Counts, class_names: tuple[str, ...]) -> list[dict[str, Any]]:
  """Returns a row per class; a share of no images is None.

  "accuracy" is the share of the images of the class that are predicted as such (recall),
  "precision" the share of the images predicted as the class that are of it.
  """
  share = lambda part, whole: float(part / whole) if whole else None
  columns = (counts.images, counts.confusion.sum(0), counts.confusion.diagonal(), counts.top5)
  return [
    {
      "class": name,
      "images": int(images),
      "predicted": int(predicted),
      "correct": int(correct),
      "accuracy": share(correct, images),
      "precision": share(correct, predicted),
      "top5": share(top5, images),
    }
    for name, images, predicted, correct, top5 in zip(class_names, *columns)
  ]


def _describe(result: dict, rows: list[dict], counts: Counts, class_names) -> list[str]:
  """Returns the lines that are printed."""
  head = f"{result['images']} images, {int((counts.images > 0).sum())} classes"
  if missing := [row["class"] for row in rows if not row["images"]]:
    head += f"; no images of {len(missing)} classes that the model knows: {first_names(missing)}"
  if len(result["accuracy"]) > 1:
    head += f"; ensemble: mean of the {result['average']}"
  lines = [head] + [
    f"top-1 {value['top1']:.2%}  top-5 {value['top5']:.2%}  "
    f"mean of the classes {value['per_class']:.2%}  {name}"
    for name, value in result["accuracy"].items()
  ]
  measured = sorted((row for row in rows if row["images"]), key=lambda row: row["accuracy"])
  if len(measured) > MAX_ROWS:
    lines.append(f"the {MAX_ROWS} classes of the lowest accuracy:")
  percent = lambda value: "     -" if value is None else f"{value:6.1%}"
  lines += [
    f"  accuracy {percent(row['accuracy'])}  precision {percent(row['precision'])}"
    f"  images {row['images']:5d}  {row['class']}"
    for row in measured[:MAX_ROWS]
  ]
  return lines + _confusions(counts.confusion, class_names)


def _confusions(confusion: np.ndarray, class_names) -> list[str]:
  """Returns a line about the most frequent confusions, none if there are none."""
  wrong = confusion * ~np.eye(len(confusion), dtype=bool)
  order = np.argsort(-wrong, axis=None, kind="stable")[:5]
  pairs = [np.unravel_index(i, wrong.shape) for i in order]
  texts = [f"{class_names[i]} as {class_names[j]} ({wrong[i, j]})" for i, j in pairs if wrong[i, j]]
  return [f"most frequent confusions: {', '.join(texts)}"] if texts else []


def _write(folder: Path, result: dict, rows: list[dict], confusion, class_names) -> None:
  """Writes the files of --out."""
  if folder.exists() and not folder.is_dir():
    raise UsageError(f"--out={folder} is a file; give a folder")
  with atomic_write(folder / "result.json") as temporary:
    temporary.write_text(json.dumps(result | {"classes": rows}, indent=2) + "\n")
  with atomic_write(folder / "classes.csv") as temporary:
    write_csv(temporary, rows[0].keys(), [row.values() for row in rows])
  table = [[name, *line.tolist()] for name, line in zip(class_names, confusion)]
  with atomic_write(folder / "confusion.csv") as temporary:
    write_csv(temporary, ["true class", *class_names], table)
  plot.confusion_plot(confusion, class_names, folder / "confusion.png")


def write_csv(path: Path, header, rows) -> None:
  """Writes a table, a line to a row; names of files that are not text keep their bytes."""
  escape = lambda cell: printable(cell) if isinstance(cell, str) else cell
  with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerows(map(escape, row) for row in (header, *rows))
