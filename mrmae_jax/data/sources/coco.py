"""Images with boxes, classes and masks of their objects: COCO's JSON."""

import hashlib
import os
from typing import Any

import numpy as np

from mrmae_jax.data.sources.annotations import Annotations, read_annotations
from mrmae_jax.data.sources.archive import is_file
from mrmae_jax.data.sources.base import (
  Source,
  SplitRules,
  describe_classes,
  hold_out,
  holdout_note,
)
from mrmae_jax.data.sources.folder import FolderSource, check_root
from mrmae_jax.data.sources.listing import first_names, is_folder, list_images, subfolders
from mrmae_jax.data.sources.segmentations import Objects
from mrmae_jax.data.sources.splits import Splits, find_splits
from mrmae_jax.errors import DataError, MissingSplitError

LAYOUT = "SPLIT/ or images/SPLIT/, and annotations/instances_SPLIT.json"
FOLDER = "annotations"
EVAL_NAMES = ("validation", "val", "valid", "test")  # of a file beside images without splits
ROBOFLOW = "_annotations.coco.json"  # beside the images themselves
MAX_NAMES = 3  # of files that a message lists


class CocoSource:
  """Image files with the objects of a file of annotations.

  Its examples have two fields more: "id" of the image, and `Objects`. Its order is that of the
  ids.

  Attributes:
    category_ids: of the classes.
    most_objects: that any of the images has, or more.
    has_all_masks: whether each of the objects to learn has a mask.
  """

  is_known_by_names = True

  def __init__(
    self,
    images: FolderSource,
    annotations: Annotations,
    kept: np.ndarray,
    description: str,
    left_out: str,
  ):
    """Joins a source of images with their annotations.

    Args:
      images: of the split.
      annotations: of these and others.
      kept: the place of each image among those of `annotations`.
      description: one line for the log.
      left_out: a part of it, see `Source`.
    """
    self._images, self._annotations, self._kept = images, annotations, kept
    self.class_names, self.category_ids = annotations.class_names, annotations.category_ids
    self.description, self.left_out = description, left_out
    self.most_objects = int(np.diff(annotations.starts)[kept].max())
    self.has_all_masks = not _count(annotations, annotations.is_trained & ~annotations.has_mask)[
      kept
    ].any()

  @property
  def fingerprint(self) -> str:
    digest = hashlib.sha256(repr(self.category_ids + self.class_names).encode())
    a = self._annotations
    for x in (a.image_ids, a.sizes, a.starts, a.ids, a.boxes, a.areas, a.classes, a.is_crowd):
      digest.update(x.tobytes())
    digest.update(a.segments)
    return f"{self._images.fingerprint}; annotations: {digest.hexdigest()[:12]}"

  def __len__(self) -> int:
    return len(self._images)

  def __getitem__(self, index: int) -> dict[str, Any]:
    image_id = int(self._annotations.image_ids[self._kept[index]])
    return self._images[index] | {"id": image_id, "objects": self.objects(index)}

  def objects(self, index: int) -> Objects:
    """Returns the objects of image `index` without reading its file."""
    a, image = self._annotations, self._kept[index]
    rows = slice(a.starts[image], a.starts[image + 1])
    return Objects(
      tuple(map(int, a.sizes[image])),
      a.ids[rows],
      a.boxes[rows],
      a.classes[rows],
      a.is_crowd[rows],
      a.is_trained[rows],
      a.areas[rows],
      tuple(map(a.segmentation, range(rows.start, rows.stop))),
    )

  def image_id(self, index: int) -> int:
    return int(self._annotations.image_ids[self._kept[index]])

  def name(self, index: int) -> str:
    return self._images.name(index)


def make_source(address: str, split: str, rules: SplitRules) -> Source:
  """Opens a split; with `rules.max_dropped` None its images alone.

  Images of training show at least one object.

  Raises:
    DataError: images or annotations are missing, or contradict each other.
  """
  root = _find_root(address)
  inner = os.path.join(root, "images")
  splits = find_splits(inner if is_folder(inner) else root, rules)
  is_held_out = splits.eval_root is None
  folder = splits.train_root if split == "train" or is_held_out else splits.eval_root
  if rules.max_dropped is None:
    return _images_alone(folder, split, rules, splits)
  path = find_annotations(root, folder, split, rules, is_held_out)
  annotations = read_annotations(path, rules.max_dropped)
  notes, indices = [splits.note], np.arange(len(annotations.image_ids))
  train_path = path
  if split == "eval" or is_held_out:
    train_path = find_annotations(root, splits.train_root, "train", rules, is_held_out)
    same = annotations if train_path == path else read_annotations(train_path, rules.max_dropped)
    _check_categories(same, annotations, train_path, path)
  eval_path = path
  if is_held_out and split == "train":
    eval_path = find_annotations(root, folder, "eval", rules, is_held_out)
  if is_held_out and train_path == eval_path:
    indices = hold_out(len(indices), split, rules.holdout_every, f"coco:{root}")
    notes.append(holdout_note(split, rules.holdout_every))
  return _join(folder, path, annotations, indices, split, notes)


def _join(
  folder: str, path: str, annotations: Annotations, indices: np.ndarray, split: str, notes
) -> CocoSource:
  """Returns the images of a folder with their annotations.

  Args:
    folder: of the images.
    path: of the annotations.
    annotations: of this file.
    indices: of the images among them that belong to the split.
    split: "train" or "eval".
    notes: parts of the description.
  """
  per_image = _count(annotations, annotations.is_trained)
  empty = np.flatnonzero(per_image[indices] == 0)
  if len(empty) == len(indices):
    raise MissingSplitError(
      f"coco:{folder}: {path} annotates no object in its {len(indices)} images; expected at least"
      " one; name another split with config.data.train_split or eval_split"
    )
  if split == "train":
    indices = np.delete(indices, empty)
    if len(empty):
      notes.append(f"{len(empty)} images without objects are not trained on")
  names = [annotations.file_names[i] for i in indices]
  listed = list_images(folder)
  files = set(listed.paths)
  missing = [name for name in names if name not in files]
  if missing:
    raise DataError(
      f"{path}: {len(missing)} of {len(names)} images are not in {folder}:"
      f" {first_names(missing, MAX_NAMES)}; add them, or remove their entries"
    )
  unnamed = len(files.difference(annotations.file_names))
  parts = [f"{unnamed} images without an entry" if unnamed else "", annotations.note]
  left_out = "; ".join(filter(None, (listed.left_out, *parts)))
  left_out = f"left out: {left_out}" if left_out else ""
  maskless = _count(annotations, annotations.is_trained & ~annotations.has_mask)[indices].sum()
  lack = f", {maskless} of them without a mask" if maskless else ""
  head = (
    f"coco:{folder}: {len(names)} images, {per_image[indices].sum()} objects of"
    f" {describe_classes(annotations.class_names)}{lack}, annotations: {os.path.basename(path)}"
  )
  description = "; ".join(filter(None, (head, *notes, left_out)))
  images = FolderSource(folder, names, description)
  return CocoSource(images, annotations, indices, description, left_out)


def _count(annotations: Annotations, is_counted: np.ndarray) -> np.ndarray:
  """Returns how many annotations count in each image, int64 [I].

  Args:
    annotations: A of them.
    is_counted: bool [A].
  """
  counts = np.concatenate([[0], np.cumsum(is_counted)])[annotations.starts]
  return np.diff(counts)


def _images_alone(folder: str, split: str, rules: SplitRules, splits: Splits) -> FolderSource:
  """Returns the images of a folder; nothing reads their annotations."""
  listing, note = list_images(folder), ""
  indices = range(len(listing.paths))
  if splits.eval_root is None:
    indices = hold_out(len(indices), split, rules.holdout_every, f"coco:{folder}")
    note = holdout_note(split, rules.holdout_every)
  left_out = f"left out: {listing.left_out}" if listing.left_out else ""
  head = f"coco:{folder}: {len(indices)} images, annotations are not read"
  description = "; ".join(filter(None, (head, splits.note, note, left_out)))
  return FolderSource(folder, [listing.paths[i] for i in indices], description, left_out=left_out)


def _find_root(address: str) -> str:
  """Returns the folder, on disk or in an archive, that holds annotations/, or the given one."""
  root = check_root("coco", address, f"a directory, a .zip or .tar with {LAYOUT}")
  inner = [os.path.join(root, name) for name in subfolders(root)]
  roots = [folder for folder in (root, *inner) if is_folder(os.path.join(folder, FOLDER))]
  return roots[0] if len(roots) == 1 else root


def find_annotations(
  root: str, folder: str, split: str, rules: SplitRules, is_held_out: bool
) -> str:
  """Returns the path of the annotations of a split.

  Args:
    root: of the data set.
    folder: of the split's images.
    split: "train" or "eval".
    rules: of the run.
    is_held_out: there are no folders for the splits. Files may name them, or there is one file.

  Raises:
    MissingSplitError: there is none for evaluation.
    DataError: there is none for training, or there are several.
  """
  names = [os.path.basename(folder)]
  if is_held_out:
    names += [rules.train_split] if split == "train" else [rules.eval_split, *EVAL_NAMES]
  places = dict.fromkeys((os.path.join(root, FOLDER), root))
  forms = ("instances_{}.json", "{}.json")
  tried = [os.path.join(x, form.format(name)) for name in names for x in places for form in forms]
  tried.append(os.path.join(folder, ROBOFLOW))
  if is_held_out:
    words = (os.path.join(x, f"{word}.json") for x in places for word in ("instances", FOLDER))
    tried += words
  tried = list(dict.fromkeys(tried))
  paths = [path for path in tried if is_file(path)]
  key = f"config.data.{split}_split"
  if not paths and is_held_out and split == "eval":
    return find_annotations(root, folder, "train", rules, is_held_out)
  if not paths:
    raise (DataError if split == "train" else MissingSplitError)(
      f"coco:{root}: no annotations of {split!r}; looked for"
      f" {', '.join(os.path.relpath(path, root) for path in tried)}; expected {LAYOUT}, in COCO's"
      f" format (convert YOLO's .txt and VOC's .xml), or name the split with {key}"
    )
  if len(paths) > 1:
    found = ", ".join(os.path.relpath(path, root) for path in paths)
    raise DataError(
      f"coco:{root}: several files may annotate {split!r}: {found}; expected one: rename the"
      f" others, or name the split with {key}"
    )
  return paths[0]


def _check_categories(train: Annotations, other: Annotations, train_path: str, path: str) -> None:
  """Raises DataError unless two files declare the same categories."""
  ours, theirs = (dict(zip(x.category_ids, x.class_names)) for x in (train, other))
  if ours == theirs:
    return
  only = lambda a, b: first_names(f"{i}: {a[i]}" for i in a if b.get(i) != a[i])
  raise DataError(
    f"{path} and {train_path} declare other categories; only the first: {only(theirs, ours)}; only"
    f" the second: {only(ours, theirs)}; write both with the same list"
  )
