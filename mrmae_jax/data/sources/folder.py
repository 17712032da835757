"""Image files in a folder: photographs, and .npy files of any number of channels."""

import collections
import functools
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
from mrmae_jax.errors import DataError

ARRAY_SUFFIX = ".npy"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ARRAY_SUFFIX, ".png", ".webp")
MAX_ARRAY_BYTES = 512 * 2**20  # of pixels in a .npy file, as many as the largest RGB image takes
EVAL_FOLDERS = ("val", "validation", "test")  # in this order, where eval_split is absent


class FolderSource:
  """Image files under one directory, read when they are asked for.

  The examples of .npy files hold pixels, those of other files encoded bytes.
  """

  def __init__(self, root: str, paths: list[str], class_names: tuple[str, ...], description: str):
    """`paths` are relative to `root`; if there are classes, each starts with one."""
    self._root = root
    self._paths = paths
    label_of = {name: label for label, name in enumerate(class_names)}
    self._labels = np.array(
      [label_of.get(path.split(os.sep, 1)[0], -1) for path in paths], np.int32
    )
    self.class_names = class_names
    self.description = description

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
  root, train_split = _check_root(address, rules), rules.train_split
  eval_folders = [
    name
    for name in dict.fromkeys((rules.eval_split, *EVAL_FOLDERS))
    if name and name != train_split and os.path.isdir(os.path.join(root, name))
  ]
  train_root = os.path.join(root, train_split)
  if not train_split or not os.path.isdir(train_root):
    if eval_folders:
      # Read as one tree, the splits would pass for classes, or mix.
      raise DataError(
        f"folder:{root}: has {eval_folders[0]!r} but no {train_split!r}; name the training"
        " sub-folder with train_split"
      )
    train_root = root
  paths, class_names = _list_images(train_root)

  if not eval_folders:
    indices = hold_out(len(paths), split, rules.holdout_every, f"folder:{train_root}")
    paths = [paths[i] for i in indices]
    note = holdout_note(split, rules.holdout_every)
    description = f"{_describe(train_root, paths, class_names)}; {note}"
    return FolderSource(train_root, paths, class_names, description)
  if split == "train":
    return FolderSource(train_root, paths, class_names, _describe(train_root, paths, class_names))
  eval_root = os.path.join(root, eval_folders[0])
  eval_paths, eval_classes = _list_images(eval_root)
  if eval_classes != class_names:
    raise DataError(_class_difference(train_root, class_names, eval_root, eval_classes))
  return FolderSource(
    eval_root, eval_paths, eval_classes, _describe(eval_root, eval_paths, eval_classes)
  )


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


@functools.lru_cache(maxsize=4)  # a run asks half a dozen times
def _list_images(root: str) -> tuple[list[str], tuple[str, ...]]:
  """Returns sorted relative image paths and the class names; lists a folder once a process.

  The classes are the first-level directories that hold images, provided that every image lies in
  one and that there are at least two; otherwise the images have no labels. Hidden files and
  directories are skipped. Symbolic links are followed; a directory reached twice is read once, so
  that links cannot loop.
  """

  def refuse(error: OSError):
    # Skipping a folder that cannot be listed would quietly train on less data.
    raise DataError(
      f"{error.filename}: cannot be listed ({error.strerror}); make it readable or move it out of"
      " the dataset"
    )

  paths, other_suffixes, visited = [], collections.Counter(), set()
  for directory, subdirectories, files in os.walk(root, followlinks=True, onerror=refuse):
    real = os.path.realpath(directory)
    if real in visited:
      subdirectories.clear()
      continue
    visited.add(real)
    relative = os.path.relpath(directory, root)
    subdirectories[:] = sorted(name for name in subdirectories if not name.startswith("."))
    for name in files:
      if name.startswith("."):
        continue
      suffix = os.path.splitext(name)[1].lower()
      if suffix in IMAGE_SUFFIXES:
        paths.append(name if relative == "." else os.path.join(relative, name))
      else:
        other_suffixes[suffix or "no suffix"] += 1
  if not paths:
    others = ", ".join(f"{count} {suffix}" for suffix, count in other_suffixes.most_common(5))
    raise DataError(
      f"folder:{root}: no images; looked for {', '.join(IMAGE_SUFFIXES)} at any depth, found"
      f" {others or 'no files'}; point at the images or convert them"
    )
  paths.sort()
  is_nested = all(os.sep in path for path in paths)
  names = tuple(sorted({path.split(os.sep, 1)[0] for path in paths}))
  return paths, names if is_nested and len(names) > 1 else ()


def _describe(root: str, paths: list[str], class_names: tuple[str, ...]) -> str:
  return f"folder:{root}: {len(paths)} images, {describe_classes(class_names)}"


def _class_difference(train_root, train_classes, eval_root, eval_classes) -> str:
  """Returns the message about splits whose class folders differ."""

  def first_names(names):
    names = sorted(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more if names else "none"

  return (
    f"the classes of {train_root} ({len(train_classes)}) and {eval_root} ({len(eval_classes)}) must"
    f" agree; only in training: {first_names(set(train_classes) - set(eval_classes))}; only in"
    f" evaluation: {first_names(set(eval_classes) - set(train_classes))}; make the class folders"
    " equal or choose another folder with eval_split"
  )


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
