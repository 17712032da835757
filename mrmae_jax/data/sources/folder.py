"""Image files in a folder or an archive: photographs, and .npy files of any number of channels."""

import functools
import hashlib
import io
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from mrmae_jax.data.sources.archive import (
  COMPRESSED,
  SUFFIXES,
  is_file,
  open_archive,
  split_archive,
)
from mrmae_jax.data.sources.base import (
  SplitRules,
  describe_classes,
  first_line,
  hold_out,
  holdout_note,
)
from mrmae_jax.data.sources.labels import TINY_IMAGENET, read_labels, sort_classes
from mrmae_jax.data.sources.listing import (
  ARRAY_SUFFIX,
  Listing,
  first_names,
  is_folder,
  list_images,
)
from mrmae_jax.data.sources.splits import find_splits
from mrmae_jax.errors import DataError
from mrmae_jax.runs.paths import describe_irregular

MAX_FILE_BYTES = 2**30  # of an image file
MAX_ARRAY_BYTES = 512 * 2**20  # of pixels in a .npy file, as many as the largest RGB image takes


class FolderSource:
  """Image files under one directory or in an archive, read when they are asked for.

  The examples of .npy files hold pixels, those of other files encoded bytes.
  """

  is_known_by_names = True

  def __init__(
    self,
    root: str,
    paths: list[str],
    description: str,
    *,
    classes: tuple[str, ...] = (),
    labels: Sequence[str] = (),
    left_out: str = "",
  ):
    """Describes the files without reading them.

    Args:
      root: directory, archive, or directory in an archive.
      paths: of the files, relative to `root`.
      description: one line for the log.
      classes: names of the classes, or ().
      labels: the class of each file, if there are classes.
      left_out: what of `root` is not among `paths` and not held out, a part of the description.
    """
    self._root = root
    self._paths = paths
    self._archive, self._inner = split_archive(root) or (None, "")
    label_of = {name: label for label, name in enumerate(classes)}
    names = labels if classes else [""] * len(paths)
    self._labels = np.array([label_of.get(name, -1) for name in names], np.int32)
    in_names = all(map(str.__eq__, names, map(_first_folder, paths)))
    self._label_digest = "" if not classes or in_names else _digest(labels)
    self.class_names = classes
    self.description = description
    self.left_out = left_out

  @property
  def fingerprint(self) -> str:
    labels = f", labels {self._label_digest}" if self._label_digest else ""
    return f"{len(self._paths)} files, names {_digest(self._paths)}{labels}"

  def __len__(self) -> int:
    return len(self._paths)

  def __getitem__(self, index: int) -> dict[str, Any]:
    path = os.path.join(self._root, self._paths[index])
    try:
      with self._open(self._paths[index]) as file:
        is_array = path.lower().endswith(ARRAY_SUFFIX)
        image = _read_array(file, path) if is_array else file.read()
    except OSError as error:
      raise DataError(
        f"{path}: cannot be read ({error.strerror}); it was there when the folder was listed,"
        " restore it or start again without it"
      ) from error
    return {"image": image, "label": int(self._labels[index]), "name": path}

  def _open(self, path: str) -> BinaryIO:
    if self._archive is None:
      path = os.path.join(self._root, path)
      _check_file(path)
      return open(path, "rb")
    return io.BytesIO(self._archive.read(os.path.join(self._inner, path)))

  def name(self, index: int) -> str:
    return self._paths[index]


class _Images(NamedTuple):
  """The images of a split before any are held out.

  Attributes:
    root: directory.
    listing: of it.
    labels: the class of each image, "" for none.
    classes: all of these in order; () if there are images without a class, or less than two.
    problem: why there are no classes, "" if nothing looks like some.
  """

  root: str
  listing: Listing
  labels: list[str]
  classes: tuple[str, ...]
  problem: str


def make_source(address: str, split: str, rules: SplitRules) -> FolderSource:
  """Applies the split rules of `open_source` to one directory or archive."""
  expected = (
    "a directory of images, a .zip or .tar, or one of these with the sub-folders"
    f" {rules.train_split!r} and {rules.eval_split!r}"
  )
  root = check_root("folder", address, expected)
  splits = find_splits(root, rules)
  train = _find_images(splits.train_root, root, rules)
  classes = train.classes
  if splits.eval_root is None:
    count = len(train.labels)
    kept = hold_out(count, split, rules.holdout_every, f"folder:{splits.train_root}")
    note = holdout_note(split, rules.holdout_every)
    return _make_source(train, classes, train.problem, note, splits.note, kept=kept)
  if split == "train":
    return _make_source(train, classes, train.problem, splits.note)
  evaluation = _find_images(splits.eval_root, root, rules)
  problem, note = "", ""
  if not classes:
    problem = "the training images have none"
  elif problem := _unknown_classes(evaluation, classes, splits.train_root):
    classes = ()
  elif missing := set(classes) - set(evaluation.labels):
    note = f"no images of {len(missing)} of its classes: {first_names(missing)}"
  return _make_source(evaluation, classes, problem, note, splits.note)


def _make_source(images: _Images, classes, problem: str, *notes: str, kept=None) -> FolderSource:
  """Returns a source of images.

  Args:
    images: of the split.
    classes: names of the classes, or ().
    problem: why there are no classes.
    *notes: parts of the description.
    kept: indices of the images that are not held out; None for all.
  """
  listing, indices = images.listing, range(len(images.labels)) if kept is None else kept
  described = describe_classes(classes) + (f" ({problem})" if problem and not classes else "")
  left_out = f"left out: {listing.left_out}" if listing.left_out else ""
  head = f"folder:{images.root}: {len(indices)} images, {described}"
  return FolderSource(
    images.root,
    [listing.paths[i] for i in indices],
    "; ".join(filter(None, (head, *notes, left_out))),
    classes=classes,
    labels=[images.labels[i] for i in indices],
    left_out=left_out,
  )


def _find_images(folder: str, root: str, rules: SplitRules) -> _Images:
  """Lists the images of a split, the directory `folder` of the dataset `root`, and their labels.

  Raises:
    DataError: as in `list_images` and `read_labels`; or the table has labels for some of the
      images alone.
  """
  listing, table = list_images(folder), rules.labels
  tiny = os.path.join(folder, TINY_IMAGENET)
  if not table and is_file(tiny):
    table, root = tiny, folder
  if not table:
    labels = list(map(_first_folder, listing.paths))
    classes = tuple(sorted(set(labels))) if _are_classes(labels) else ()
    return _Images(folder, listing, labels, classes, _no_labels(listing.paths))
  below = os.path.relpath(folder, root)
  in_root = [os.path.normpath(os.path.join(below, path)) for path in listing.paths]
  table = os.path.abspath(os.path.expanduser(table))
  modified = os.stat(table).st_mtime_ns if os.path.isfile(table) else 0
  label_of = _table_labels(table, root, modified)
  labels = [label_of[path] for path in in_root]
  unlabelled = [path for path, label in zip(in_root, labels) if not label]
  if 0 < len(unlabelled) < len(labels):
    raise DataError(
      f"labels {table}: has no row for {len(unlabelled)} of the {len(labels)} images of {folder}:"
      f" {first_names(unlabelled)}; add their labels, or move them out of the dataset"
    )
  classes = sort_classes(labels) if _are_classes(labels) else ()
  problem = f"no image is in {table}" if unlabelled else f"all are {labels[0]!r} in {table}"
  return _Images(folder, listing, labels, classes, "" if classes else problem)


@functools.lru_cache(maxsize=4)  # a run asks half a dozen times
def _table_labels(table: str, root: str, modified: int) -> dict[str, str]:
  """Returns {path: label, "" for none} of all images below `root` by a table."""
  del modified  # a table that was written anew is another one
  paths = list_images(root).paths
  return dict(zip(paths, read_labels(table, paths)))


def _are_classes(labels: list[str]) -> bool:
  """Returns whether every image has a class, of which there are at least two."""
  return "" not in labels and len(set(labels)) > 1


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


def _unknown_classes(images: _Images, classes: tuple[str, ...], train_root: str) -> str:
  """Returns which labels of evaluation images are no class of the training images, or ""."""
  unknown = set(images.labels) - set(classes)
  if not unknown:
    return ""
  if "" in unknown:
    if images.problem:
      return images.problem
    count = images.labels.count("")
    return f"{count} lie outside of class folders as {first_names(classes)} of {train_root} are"
  return (
    f"{first_names(unknown)} {'is' if len(unknown) == 1 else 'are'} not among the classes of"
    f" {train_root}: {first_names(classes)}"
  )


def _check_file(path: str) -> None:
  """Raises DataError for what would be read for ever: a pipe, a socket, a device, a huge file."""
  if problem := describe_irregular(path, MAX_FILE_BYTES):
    raise DataError(f"{path}: {problem}: remove it")


def _digest(names: Iterable[str]) -> str:
  return hashlib.sha256("\0".join(names).encode(errors="surrogateescape")).hexdigest()[:12]


def _first_folder(path: str) -> str:
  """Returns the first-level directory of a path, "" for a file beside the directories."""
  return path.split(os.sep, 1)[0] if os.sep in path else ""


def check_root(kind: str, address: str, expected: str) -> str:
  """Returns the absolute path of an existing directory or archive.

  Args:
    kind: of the source, for messages.
    address: the path.
    expected: what should lie there, for messages.

  Raises:
    DataError: there is no such folder on this machine.
  """
  if "://" in address:
    raise DataError(
      f"{kind}:{address}: a folder of images must be on a disk; from a bucket prepared datasets are"
      " read (tfds:NAME with data_dir=gs://BUCKET/FOLDER), folders once they are mounted (gcsfuse,"
      " say)"
    )
  root = os.path.abspath(os.path.expanduser(address))
  if os.path.isfile(root) and root.lower().endswith((*SUFFIXES, *COMPRESSED)):
    open_archive(root)
  elif not is_folder(root):
    state = "is a file" if os.path.exists(root) else "does not exist"
    raise DataError(f"{kind}:{root}: {state}; expected {expected}")
  return root


def _read_array(file: BinaryIO, path: str) -> np.ndarray:
  """Reads the image in a .npy file, uint8 [H, W, C]; an array [H, W] is one channel.

  No pickle is read, and no memory taken for pixels before the header is known.

  Raises:
    DataError: the array is not an image, is larger than MAX_ARRAY_BYTES, or is damaged.
    OSError: the file cannot be read.
  """
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
