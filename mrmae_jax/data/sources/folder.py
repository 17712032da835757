"""Image files in a folder: photographs, and .npy files of any number of channels."""

import hashlib
import math
import os
from typing import Any

import numpy as np

from mrmae_jax.data.sources.base import (
  SplitRules,
  describe_classes,
  first_line,
  hold_out,
  holdout_note,
)
from mrmae_jax.data.sources.listing import ARRAY_SUFFIX, Listing, first_names, list_images
from mrmae_jax.data.sources.splits import find_splits
from mrmae_jax.errors import DataError

MAX_ARRAY_BYTES = 512 * 2**20  # of pixels in a .npy file, as many as the largest RGB image takes


class FolderSource:
  """Image files under one directory, read when they are asked for.

  The examples of .npy files hold pixels, those of other files encoded bytes.
  """

  def __init__(
    self,
    root: str,
    paths: list[str],
    class_names: tuple[str, ...],
    description: str,
    left_out: str = "",
  ):
    """Describes the files without reading them.

    Args:
      root: directory.
      paths: of the files, relative to `root`; if there are classes, each starts with one.
      class_names: the classes, or ().
      description: one line for the log.
      left_out: what of `root` is not among `paths` and not held out, a part of the description.
    """
    self._root = root
    self._paths = paths
    label_of = {name: label for label, name in enumerate(class_names)}
    self._labels = np.array(
      [label_of.get(path.split(os.sep, 1)[0], -1) for path in paths], np.int32
    )
    self.class_names = class_names
    self.description = description
    self.left_out = left_out

  @property
  def fingerprint(self) -> str:
    names = "\0".join(self._paths).encode(errors="surrogateescape")
    digest = hashlib.sha256(names).hexdigest()[:12]
    return f"{len(self._paths)} files, names {digest}"

  def __len__(self) -> int:
    return len(self._paths)

  def __getitem__(self, index: int) -> dict[str, Any]:
    path = os.path.join(self._root, self._paths[index])
    read = _read_array if path.lower().endswith(ARRAY_SUFFIX) else _read_bytes
    try:
      image = read(path)
    except OSError as error:
      raise DataError(
        f"{path}: cannot be read ({error.strerror}); it was there when the folder was listed,"
        " restore it or start again without it"
      ) from error
    return {"image": image, "label": int(self._labels[index]), "name": path}

  def name(self, index: int) -> str:
    return self._paths[index]


def make_source(address: str, split: str, rules: SplitRules) -> FolderSource:
  """Applies the split rules of `open_source` to one directory."""
  splits = find_splits(_check_root(address, rules), rules)
  train = list_images(splits.train_root)
  class_names = _class_names(train.paths)
  if splits.eval_root is None:
    indices = hold_out(len(train.paths), split, rules.holdout_every, f"folder:{splits.train_root}")
    paths = [train.paths[i] for i in indices]
    note = holdout_note(split, rules.holdout_every)
    return _make_source(
      splits.train_root, paths, class_names, train, _no_labels(train.paths), note, splits.note
    )
  if split == "train":
    return _make_source(
      splits.train_root, train.paths, class_names, train, _no_labels(train.paths), splits.note
    )
  evaluation = list_images(splits.eval_root)
  problem, note = "", ""
  if not class_names:
    problem = "the training images have none"
  elif problem := _unknown_classes(evaluation.paths, class_names, splits.train_root):
    class_names = ()
  else:
    folders = set(map(_first_folder, evaluation.paths))
    if missing := [name for name in class_names if name not in folders]:
      note = f"no images of {len(missing)} of its classes: {first_names(missing)}"
  return _make_source(
    splits.eval_root, evaluation.paths, class_names, evaluation, problem, note, splits.note
  )


def _make_source(
  root: str, paths: list[str], class_names, listing: Listing, problem: str, *notes: str
) -> FolderSource:
  """Returns a source of `paths` below `root`.

  Args:
    root, paths, class_names: as in `FolderSource`.
    listing: of `root`.
    problem: why there are no classes.
    *notes: parts of the description.
  """
  classes = describe_classes(class_names) + (f" ({problem})" if problem and not class_names else "")
  left_out = f"left out: {listing.left_out}" if listing.left_out else ""
  head = f"folder:{root}: {len(paths)} images, {classes}"
  description = "; ".join(filter(None, (head, *notes, left_out)))
  return FolderSource(root, paths, class_names, description, left_out)


def _class_names(paths: list[str]) -> tuple[str, ...]:
  """Returns the classes of a tree.

  They are the first-level directories that hold images, provided that every image lies in one and
  that there are at least two; otherwise the images have no labels.
  """
  names = tuple(sorted(set(map(_first_folder, paths))))
  return names if len(names) > 1 and "" not in names else ()


def _no_labels(paths: list[str]) -> str:
  """Returns why a tree has no classes, "" if it has some, or if nothing looks like classes."""
  folders = set(map(_first_folder, paths))
  if folders == {""} or len(folders) > 1 and "" not in folders:
    return ""
  if "" not in folders:
    return f"all in one folder, {folders.pop()}/"
  loose = [path for path in paths if not _first_folder(path)]
  names = first_names(f"{name}/" for name in folders if name)
  verb = "lies" if len(loose) == 1 else "lie"
  return f"{first_names(loose)} {verb} outside of the folders {names}"


def _unknown_classes(paths: list[str], class_names: tuple[str, ...], train_root: str) -> str:
  """Returns which folders of evaluation images are no class of the training images, or ""."""
  folders = set(map(_first_folder, paths))
  unknown = folders - set(class_names)
  if not unknown:
    return ""
  if "" in unknown:
    count = sum(not _first_folder(path) for path in paths)
    return f"{count} lie outside of class folders as {first_names(class_names)} of {train_root} are"
  return (
    f"{first_names(unknown)} {'is' if len(unknown) == 1 else 'are'} not among the classes of"
    f" {train_root}: {first_names(class_names)}"
  )


def _first_folder(path: str) -> str:
  """Returns the first-level directory of a path, "" for a file beside the directories."""
  return path.split(os.sep, 1)[0] if os.sep in path else ""


def _check_root(address: str, rules: SplitRules) -> str:
  """Returns the absolute path of an existing directory."""
  if "://" in address:
    raise DataError(
      f"folder:{address}: a folder of images must be on a disk; from a bucket prepared datasets are"
      " read (tfds:NAME with data_dir=gs://BUCKET/FOLDER), folders once they are mounted (gcsfuse,"
      " say)"
    )
  root = os.path.abspath(os.path.expanduser(address))
  if not os.path.isdir(root):
    state = "is a file" if os.path.exists(root) else "does not exist"
    raise DataError(
      f"folder:{root}: {state}; expected a directory of images, or one with the sub-folders"
      f" {rules.train_split!r} and {rules.eval_split!r}"
    )
  return root


def _read_bytes(path: str) -> bytes:
  with open(path, "rb") as file:
    return file.read()


def _read_array(path: str) -> np.ndarray:
  """Reads the image in a .npy file, uint8 [H, W, C]; an array [H, W] is one channel.

  No pickle is read, and no memory taken for pixels before the header is known.

  Raises:
    DataError: the array is not an image, is larger than MAX_ARRAY_BYTES, or is damaged.
    OSError: the file cannot be read.
  """
  with open(path, "rb") as file:
    try:
      version = np.lib.format.read_magic(file)
      header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
      }[version]
      shape, _, dtype = header(file)
    except OSError:
      raise
    # numpy parses the header as Python, and hostile text raises errors of any type there.
    except Exception as error:
      raise DataError(
        f"{path}: not an array ({first_line(error)}); write it with numpy.save, or remove it"
      ) from error
    if dtype != np.uint8 or len(shape) not in (2, 3) or min(shape) < 1:
      raise DataError(
        f"{path}: holds {dtype} of shape {shape}; expected uint8 [H, W, C], or [H, W] of one"
        " channel; bring it to 0..255 and this order"
      )
    if math.prod(shape) > MAX_ARRAY_BYTES:
      raise DataError(
        f"{path}: its header claims the shape {shape}, at most {MAX_ARRAY_BYTES:,} values are read;"
        " cut it into parts"
      )
    file.seek(0)
    try:
      image = np.load(file, allow_pickle=False)
    except ValueError as error:
      raise DataError(f"{path}: is damaged ({first_line(error)}); replace or remove it") from error
  return image.reshape(*shape[:2], -1)
