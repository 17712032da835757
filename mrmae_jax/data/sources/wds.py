"""Images in tar shards as WebDataset writes them, read in any order.

Files of one name up to its first dot are a sample: an image, and in `.cls` its class. Shards are
not unpacked or copied; their members are listed once, when the source is opened.
"""

import bisect
import collections
import fnmatch
import functools
import glob
import hashlib
import itertools
import os
from typing import Any, NamedTuple

import numpy as np

from mrmae_jax.data.sources.archive import Archive, open_archive
from mrmae_jax.data.sources.base import (
  SplitRules,
  describe_classes,
  first_line,
  hold_out,
  holdout_note,
)
from mrmae_jax.data.sources.labels import sort_classes
from mrmae_jax.data.sources.listing import (
  ARRAY_SUFFIX,
  IMAGE_SUFFIXES,
  describe_suffixes,
  first_names,
)
from mrmae_jax.data.sources.splits import split_words
from mrmae_jax.errors import DataError

CLASS_SUFFIX = ".cls"


class Sample(NamedTuple):
  """An image of a shard: its member, and its class, "" for none."""

  name: str
  label: str


class WdsSource:
  """The samples of shards, in the order of the shards."""

  is_known_by_names = True

  def __init__(
    self, shards: list["_Shard"], indices: np.ndarray, classes, description: str, left_out: str
  ):
    """Describes the samples at `indices` of all that the shards hold.

    Args:
      shards: the files.
      indices: int [N], sorted.
      classes: names of the classes, or ().
      description: one line for the log.
      left_out: the files that are no images and no classes, a part of the description.
    """
    self.left_out = left_out
    self._shards, self._indices = shards, indices
    self._top = os.path.commonpath([os.path.dirname(shard.archive.path) for shard in shards])
    self._ends = list(itertools.accumulate(len(shard.samples) for shard in shards))
    self.class_names, self.description = classes, description
    self._label_of = {name: label for label, name in enumerate(classes)}

  def _find(self, index: int) -> tuple["_Shard", Sample]:
    """Returns the shard and the sample of image `index`."""
    place = int(self._indices[index])
    i = bisect.bisect_right(self._ends, place)
    shard, past = self._shards[i], place - self._ends[i]  # past the shard's end: negative
    return shard, shard.samples[past]

  @functools.cached_property
  def fingerprint(self) -> str:
    digest = hashlib.sha256()
    for shard, sample in map(self._find, range(len(self))):
      name = self._name(shard, sample)
      digest.update(f"{name}\0{sample.label}\0".encode(errors="surrogateescape"))
    return f"{len(self)} samples, names and classes {digest.hexdigest()[:12]}"

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: int) -> dict[str, Any]:
    shard, sample = self._find(index)
    path = f"{shard.archive.path}/{sample.name}"
    try:
      image = shard.archive.read(sample.name)
    except OSError as error:
      raise DataError(
        f"{path}: cannot be read ({error.strerror}); it was there when the shards were listed,"
        " restore it or start again without it"
      ) from error
    return {"image": image, "label": self._label_of.get(sample.label, -1), "name": path}

  def name(self, index: int) -> str:
    return self._name(*self._find(index))

  def _name(self, shard: "_Shard", sample: Sample) -> str:
    return f"{os.path.relpath(shard.archive.path, self._top)}/{sample.name}"


class _Shard(NamedTuple):
  """The samples of a shard, and how many of its files have another suffix than those of images."""

  archive: Archive
  samples: list[Sample]
  other_suffixes: collections.Counter


def make_source(address: str, split: str, rules: SplitRules) -> WdsSource:
  """Opens the shards of a split, told by the words in their names, or holds samples out."""
  train_paths, eval_paths = _find_splits(address, _find_shards(address), rules)
  train = _open_shards(train_paths)
  labels = _labels(train)
  classes = sort_classes(labels) if "" not in labels and len(set(labels)) > 1 else ()
  if not eval_paths:
    kept = hold_out(len(labels), split, rules.holdout_every, f"wds:{address}")
    return _make_source(address, train, kept, classes, "", holdout_note(split, rules.holdout_every))
  note = f"train: {_names(train_paths)}, eval: {_names(eval_paths)}"
  if split == "train":
    return _make_source(address, train, np.arange(len(labels)), classes, "", note)
  evaluation, problem = _open_shards(eval_paths), ""
  labels = _labels(evaluation)
  if unknown := set(labels) - set(classes):
    problem = f"{first_names(unknown - {''})} among them are no classes of the training images"
    problem = "some have none" if "" in unknown else problem
    classes = ()
  return _make_source(address, evaluation, np.arange(len(labels)), classes, problem, note)


def _make_source(address, shards, indices, classes, problem: str, note: str) -> WdsSource:
  described = describe_classes(classes) + (f" ({problem})" if problem else "")
  head = f"wds:{address}: {len(indices)} images in {len(shards)} shards, {described}"
  others = sum((shard.other_suffixes for shard in shards), collections.Counter())
  left_out = f"left out: {describe_suffixes(others)}" if others else ""
  description = "; ".join(filter(None, (head, note, left_out)))
  return WdsSource(shards, indices, classes, description, left_out)


def _labels(shards: list[_Shard]) -> list[str]:
  return [sample.label for shard in shards for sample in shard.samples]


def _names(paths: list[str]) -> str:
  first, last = os.path.basename(paths[0]), os.path.basename(paths[-1])
  return first if len(paths) == 1 else f"{first} to {last}"


def _find_shards(address: str) -> list[str]:
  """Returns the sorted paths of the shards of a pattern, or of a folder.

  Raises:
    DataError: there is none, or one that a pattern names is missing.
  """
  if "://" in address or address.startswith("pipe:"):
    raise DataError(
      f"wds:{address}: shards must be on a disk, to be read in any order; copy them, or mount the"
      " bucket (gcsfuse, say)"
    )
  pattern = os.path.abspath(os.path.expanduser(address))
  if os.path.isdir(pattern):
    pattern = os.path.join(pattern, "**", "*.tar")
  paths = []
  for part in _expand_braces(pattern):
    matches = glob.glob(part, recursive=True) if glob.has_magic(part) else [part]
    if not matches or not os.path.isfile(matches[0]):
      raise DataError(
        f"wds:{address}: {part} does not exist; expected the paths of .tar files, with * or"
        " {000..123} for numbers, or a folder that holds them"
      )
    paths += matches
  return sorted(set(paths))


def _expand_braces(pattern: str) -> list[str]:
  """Returns the patterns that one with {000..123} or {a,b} stands for."""
  if "{" not in pattern:
    return [pattern]
  try:
    import braceexpand
  except ImportError as error:
    raise DataError(
      f"wds:{pattern}: braces need the wds extra: pip install 'mrmae_jax[wds]', or write * for them"
    ) from error
  try:
    return list(braceexpand.braceexpand(pattern))
  except braceexpand.UnbalancedBracesError as error:
    raise DataError(f"wds:{pattern}: {first_line(error)}; close each brace") from error


def _find_splits(address: str, paths: list[str], rules: SplitRules):
  """Returns the shards to train on, and those to measure on, [] if these are held out.

  Raises:
    DataError: some names have the word of a split and others have none, or no shard is to train on.
  """
  if rules.train_split == ".":
    return paths, []
  top = os.path.commonpath(map(os.path.dirname, paths))
  kinds = {path: _split_kind(path, top, address) for path in paths}
  select = lambda wanted, *kinds_: _select(paths, kinds, wanted, *kinds_)
  train = select(rules.train_split, "train")
  evaluation = select(rules.eval_split, "val", "test")
  if not train and not evaluation:
    return paths, []
  untold = [path for path in paths if path not in {*train, *evaluation} and not kinds[path]]
  if not train or untold:
    names = first_names(map(os.path.basename, untold or paths))
    raise DataError(
      f"wds:{address}: the names of {names} do not say whether they are for training, as others do"
      " for their split; put train or val into the name of each shard or of its folder, or give"
      " train_split=. to train on all of them"
    )
  return train, [path for path in evaluation if path not in train]


def _select(paths: list[str], kinds: dict[str, str], wanted: str, *fallbacks: str) -> list[str]:
  """Returns the shards of a split: of the word `wanted`, or of the first fallback that has some."""
  if wanted not in ("train", "validation") and (
    matches := [path for path in paths if fnmatch.fnmatch(os.path.basename(path), f"*{wanted}*")]
  ):
    return matches
  groups = ([path for path in paths if kinds[path] == kind] for kind in fallbacks)
  return next(filter(None, groups), [])


def _split_kind(path: str, top: str, address: str) -> str:
  """Returns the split whose word the name of a shard has, or else its folder below `top`."""
  folder, name = os.path.split(os.path.relpath(path, top))
  for text in (name.removesuffix(".tar"), folder):
    kinds = set(filter(None, split_words(text)))
    if len(kinds) > 1:
      raise DataError(
        f"wds:{address}: {text} has the words of several splits ({', '.join(sorted(kinds))});"
        " rename it, or give train_split=. to train on all shards"
      )
    if kinds:
      return kinds.pop()
  return ""


def _open_shards(paths: list[str]) -> list[_Shard]:
  return [_read_shard(path, os.stat(path).st_mtime_ns) for path in paths]


@functools.lru_cache(maxsize=None)  # a run asks half a dozen times
def _read_shard(path: str, modified: int) -> _Shard:
  """Lists the samples of a shard and reads their classes.

  Raises:
    DataError: it is damaged, holds no image, or a sample with two images or an unusable class.
  """
  del modified  # a shard that was written anew is another one
  archive = open_archive(path)
  images, labels, others = {}, {}, collections.Counter()
  for name in archive.sizes:
    folder, base = os.path.split(name)
    key = os.path.join(folder, base.split(".", 1)[0])
    suffix = os.path.splitext(base)[1].lower()
    if suffix == CLASS_SUFFIX:
      labels[key] = archive.read(name).decode("utf-8", "replace").strip()
    elif suffix in IMAGE_SUFFIXES and suffix != ARRAY_SUFFIX:
      if key in images:
        raise DataError(
          f"{path}: the sample {key} has two images, {images[key]} and {name}; leave one"
        )
      images[key] = name
    else:
      others[suffix or "no suffix"] += 1
  if not images:
    raise DataError(
      f"{path}: no images; it holds {first_names(archive.sizes)}; a sample has an image as .jpg,"
      " .png or another suffix of an image, and its class as .cls"
    )
  if alone := labels.keys() - images.keys():
    raise DataError(
      f"{path}: {len(alone)} samples have a class and no image that is read, the first:"
      f" {min(alone)}; write the shard again"
    )
  missing = [key for key in images if not labels.get(key)]
  if labels and missing:
    raise DataError(
      f"{path}: {len(missing)} of its {len(images)} samples have no class, the first: {missing[0]};"
      " write the shard again"
    )
  samples = [Sample(name, labels.get(key, "")) for key, name in images.items()]
  return _Shard(archive, samples, others)
