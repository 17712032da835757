"""Scenes: images with a class for every pixel, in ADE20K's layout."""

import collections
import csv
import os
from typing import Any

import numpy as np

from mrmae_jax.constants import IGNORED
from mrmae_jax.data import augment
from mrmae_jax.data.sources.archive import is_file, open_file
from mrmae_jax.data.sources.base import (
  Source,
  SplitRules,
  describe_classes,
  hold_out,
  holdout_note,
)
from mrmae_jax.data.sources.folder import FolderSource, check_root
from mrmae_jax.data.sources.listing import (
  Listing,
  describe_suffixes,
  first_names,
  is_folder,
  list_images,
  subfolders,
)
from mrmae_jax.data.sources.splits import find_splits
from mrmae_jax.errors import DataError

LAYOUT = "images/{training,validation} and annotations/{training,validation}"
LABEL_SUFFIX = ".png"
CLASSES, ADE_CLASSES = "classes.txt", ("objectInfo150.txt", "objectInfo150.csv")
MAX_NAMES = 3  # of files without a partner that a message lists


class ScenesSource:
  """Image files and the label files that belong to them, read when they are asked for."""

  is_known_by_names = True

  def __init__(
    self,
    images: FolderSource,
    labels: FolderSource,
    classes: tuple[str, ...],
    zero_is_unlabelled: bool,
  ):
    """Joins a source of images and one of label files in the same order; see `read_label`."""
    self._images, self._labels = images, labels
    self._zero_is_unlabelled = zero_is_unlabelled
    self.class_names = classes
    self.description, self.left_out = images.description, images.left_out
    self.fingerprint = f"{images.fingerprint}; labels: {labels.fingerprint}"

  def __len__(self) -> int:
    return len(self._images)

  def __getitem__(self, index: int) -> dict[str, Any]:
    image, file = self._images[index], self._labels[index]
    count, name = len(self.class_names), file["name"]
    label = read_label(file["image"], name, count, self._zero_is_unlabelled)
    return image | {"label": label, "label_name": name}

  def name(self, index: int) -> str:
    return self._images.name(index)


def make_source(address: str, split: str, rules: SplitRules) -> Source:
  """Opens a split; with `rules.zero_is_unlabelled` None its images alone.

  Raises:
    DataError: images, labels or the names of the classes are missing.
  """
  root = _find_root(address)
  splits = find_splits(os.path.join(root, "images"), rules)
  is_held_out = splits.eval_root is None
  folder = splits.train_root if split == "train" or is_held_out else splits.eval_root
  listing, notes = list_images(folder), [splits.note]
  indices = range(len(listing.paths))
  if is_held_out:
    indices = hold_out(len(indices), split, rules.holdout_every, f"scenes:{root}")
    notes.append(holdout_note(split, rules.holdout_every))
  parts, classes = [listing.left_out], ()
  if has_labels := rules.zero_is_unlabelled is not None:
    classes = read_classes(root, rules.zero_is_unlabelled)
    annotations = _find_annotations(root, folder)
    files = list_images(annotations)
    labels = _pair(listing.paths, files, folder, annotations)
    parts.append(_describe_others(files))
  left_out = "; ".join(filter(None, parts))
  left_out = f"left out: {left_out}" if left_out else ""
  kinds = describe_classes(classes) if has_labels else "labels are not read"
  head = f"scenes:{folder}: {len(indices)} images, {kinds}"
  description = "; ".join(filter(None, (head, *notes, left_out)))
  images = FolderSource(folder, [listing.paths[i] for i in indices], description, left_out=left_out)
  if not has_labels:
    return images
  labels = FolderSource(annotations, [labels[i] for i in indices], f"labels: {annotations}")
  return ScenesSource(images, labels, classes, rules.zero_is_unlabelled)


def _find_root(address: str) -> str:
  """Returns the folder, on disk or in an archive, that holds images/ and annotations/."""
  root = check_root("scenes", address, f"a directory, a .zip or .tar with {LAYOUT}")
  inner = [os.path.join(root, name) for name in subfolders(root)]
  roots = [folder for folder in (root, *inner) if is_folder(os.path.join(folder, "images"))]
  if not roots or roots[0] != root and len(roots) > 1:
    raise DataError(f"scenes:{root}: no images/; expected {LAYOUT}")
  return roots[0]


def _find_annotations(root: str, folder: str) -> str:
  """Returns the folder of the labels that belong to a folder of images."""
  part = os.path.normpath(
    os.path.join("annotations", os.path.relpath(folder, os.path.join(root, "images")))
  )
  if not is_folder(os.path.join(root, part)):
    raise DataError(f"scenes:{root}: no {part}; expected {LAYOUT}")
  return os.path.join(root, part)


def _pair(images: list[str], files: Listing, folder: str, annotations: str) -> list[str]:
  """Returns the label file of each image, the .png of the same path but for the suffix.

  Raises:
    DataError: an image or a label has no partner, or two images have the same one.
  """
  stem = lambda path: os.path.splitext(path)[0]
  labels = {stem(path): path for path in files.paths if _is_label(path)}
  stems = collections.Counter(map(stem, images))
  shared = [path for path in images if stems[stem(path)] > 1]
  missing = [path for path in images if stem(path) not in labels]
  unused = [path for name, path in labels.items() if name not in stems]
  if shared:
    raise DataError(
      f"{folder}: {first_names(shared, MAX_NAMES)} differ in their suffix alone, so that they would"
      " share a label; rename or remove some"
    )
  if missing or unused:
    others = _describe_others(files)
    kinds = f", found {others} (only PNG keeps classes)" if others else ""
    raise DataError(
      f"{folder}: {len(missing)} of {len(images)} images have no label:"
      f" {first_names(missing, MAX_NAMES)}; {len(unused)} of {len(labels)} labels have no image:"
      f" {first_names(unused, MAX_NAMES)}; looked in {annotations} for files of the same name with"
      f" the suffix {LABEL_SUFFIX}{kinds}; add the missing files, or remove the others"
    )
  return [labels[stem(path)] for path in images]


def _is_label(path: str) -> bool:
  return path.lower().endswith(LABEL_SUFFIX)


def _describe_others(files: Listing) -> str:
  """Returns "3 .jpg of annotations" for the files that are no labels, "" if all are."""
  suffixes = (os.path.splitext(path)[1].lower() for path in files.paths if not _is_label(path))
  others = files.other_suffixes + collections.Counter(suffixes)
  return f"{describe_suffixes(others)} of annotations" if others else ""


def read_classes(root: str, zero_is_unlabelled: bool) -> tuple[str, ...]:
  """Returns the names of the classes of a folder of scenes.

  Line k of classes.txt, from 0, names the value k, or k + 1 with `zero_is_unlabelled`. ADE20K's own
  table serves too.

  Raises:
    DataError: there is no such file, a name is empty or there twice, or there are too many.
  """
  paths = [os.path.join(root, name) for name in (CLASSES, *ADE_CLASSES)]
  path = next(filter(is_file, paths), None)
  if not path:
    raise DataError(
      f"scenes:{root}: no {CLASSES}; expected the name of a class in each line, that of the value"
      f" {int(zero_is_unlabelled)} in the first (ADE20K's {ADE_CLASSES[0]} serves too)"
    )
  try:
    with open_file(path) as file:
      text = file.read().decode("utf-8-sig").rstrip()
  except (OSError, UnicodeDecodeError) as error:
    raise DataError(f"{path}: cannot be read ({error}); expected names in UTF-8") from error
  lines = text.splitlines()
  names = [line.strip() for line in lines] if path == paths[0] else _ade_names(lines, path)
  twice = [name for name, count in collections.Counter(names).items() if count > 1]
  if "" in names or twice:
    problem = (
      f"name {names.index('') + 1} is empty" if "" in names else f"{twice[0]!r} stands twice"
    )
    raise DataError(f"{path}: {problem}; expected another name in each line")
  most = IGNORED - zero_is_unlabelled
  if not 2 <= len(names) <= most:
    raise DataError(
      f"{path}: {len(names)} names; expected 2 to {most} classes, as {IGNORED} means ignored"
    )
  return tuple(names)


def _ade_names(lines: list[str], path: str) -> list[str]:
  """Returns the classes of ADE20K's table: the first synonym, or all where two share the first."""
  rows = list(csv.DictReader(lines, delimiter="\t" if "\t" in "".join(lines) else ","))
  if not rows or "Name" not in rows[0]:
    raise DataError(f"{path}: no column 'Name'; expected ADE20K's table, or write {CLASSES}")
  names = [(row["Name"] or "").strip() for row in rows]
  first = [name.replace(",", ";").split(";")[0] for name in names]
  counts = collections.Counter(first)
  return [short if counts[short] == 1 else name for short, name in zip(first, names)]


def read_label(data: bytes, name: str, num_classes: int, zero_is_unlabelled: bool) -> np.ndarray:
  """Decodes a label file to the class of every pixel, uint8 [H, W], IGNORED where there is none.

  Nothing else maps stored values to classes. A palette is not looked up: its indices are the
  values. The EXIF orientation is ignored.

  Args:
    data: content of the file.
    name: of the file, for messages.
    num_classes: K.
    zero_is_unlabelled: the value 0 means unlabelled and 1 is class 0, as in ADE20K; otherwise 0 is
      class 0. The value 255 is ignored either way.

  Raises:
    DataError: the file is damaged or not an index PNG, or a value is no class.
  """

  def convert(picture):
    is_index = picture.format == "PNG" and picture.mode.startswith(("1", "L", "P", "I"))
    is_index = is_index and len(picture.getbands()) == 1
    values = np.asarray(picture) if is_index else None
    return values, picture.mode, picture.format, len(picture.getbands())

  stored, mode, form, channels = augment.convert_file(data, name, convert)
  if form != "PNG":
    raise DataError(
      f"{name}: label is a {form} file; compression invents classes; expected an index PNG, written"
      " from what the labels were made of"
    )
  if stored is None:
    raise DataError(
      f"{name}: label has {channels} channels; expected an index PNG, a class in each pixel"
      " (docs/segment.md shows how colors become classes)"
    )
  if mode.startswith("I") and stored.max() >= IGNORED:
    raise DataError(
      f"{name}: label has 16 bits and values up to {stored.max()}; expected at most {IGNORED - 1},"
      " as maps of more classes are not read; write it with 8 bits"
    )
  if mode == "L" and (bits := data[24]) < 8:  # Pillow stretches gray of few bits to 0..255
    stored = stored // (255 // (2**bits - 1))
  return to_classes(stored.astype(np.uint8), name, num_classes, zero_is_unlabelled)


def to_classes(
  stored: np.ndarray, name: str, num_classes: int, zero_is_unlabelled: bool
) -> np.ndarray:
  """Returns the classes that stored values mean, both uint8 [H, W]; see `read_label`."""
  first = int(zero_is_unlabelled)
  last = first + num_classes - 1
  counts = np.bincount(stored.reshape(-1), minlength=256)
  values = np.flatnonzero(counts)
  if num_classes == 2 and values.tolist() == [0, IGNORED]:
    raise DataError(
      f"{name}: values 0 and {IGNORED} only: {IGNORED} means ignored. Store the second class as 1"
      " and set zero_is_unlabelled=False"
    )
  unknown = values[(values > last) & (values < IGNORED)]
  if len(unknown):
    more = f" (and {len(unknown) - 1} other values)" if len(unknown) > 1 else ""
    is_shifted = not first and unknown.tolist() == [num_classes]
    raise DataError(
      f"{name}: value {unknown[0]} in {counts[unknown[0]]:,} pixels{more}; expected {first} to"
      f" {last} for {num_classes} classes{', 0 for unlabelled' if first else ''}, {IGNORED} for"
      f" ignored pixels; {'is zero_is_unlabelled right? Or ' if is_shifted else ''}add the names of"
      " the classes, or correct the label"
    )
  table = np.full(256, IGNORED, np.uint8)
  table[first : last + 1] = np.arange(num_classes)
  return table[stored]
