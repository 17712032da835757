"""Finds the folders of a data set that hold its splits, by their names."""

import functools
import itertools
import os
import re
from typing import NamedTuple

from mrmae_jax.data.sources.base import SplitRules
from mrmae_jax.data.sources.listing import (
  first_names,
  has_images,
  is_folder,
  loose_images,
  subfolders,
)
from mrmae_jax.errors import DataError

# Spellings of a split, in lower case
SPELLINGS = {
  "train": ("train", "training", "trn", "trainval"),
  "val": (
    *("val", "vali", "valid", "validation", "validate", "validating", "eval", "evaluation"),
    *("dev", "devel", "development", "holdout", "heldout"),
  ),
  "test": ("test", "testing", "tst"),
}
# Words that may stand beside one of a split: seg_train, ILSVRC2012_img_val, PublicTest
FILLERS = (
  *("set", "sets", "data", "dataset", "images", "image", "imgs", "img", "pictures", "photos"),
  *("samples", "split", "folder", "dir", "seg", "ilsvrc", "imagenet", "coco", "public", "private"),
)
WHOLE = ("", ".")  # values of train_split: the folder is one tree, whatever its folders are called
MAX_DEPTH = 4  # of folders that hold nothing but another one, as archives have them


class Splits(NamedTuple):
  """Where the splits of a folder lie.

  Attributes:
    train_root: folder of the training images.
    eval_root: folder of the images to measure on; None: they are held out of the training images.
    note: which folder is what, and which are left out; "" for a folder without splits.
  """

  train_root: str
  eval_root: str | None
  note: str


def split_kind(name: str) -> str:
  """Returns the key of SPELLINGS that a folder's name stands for, "" for another name.

  Case, digits and FILLERS do not count: TRAIN, train2017, training_set and seg_train are "train".
  """
  kinds = split_words(name)
  return kinds[0] if len(kinds) == 1 else ""


def split_words(name: str) -> list[str]:
  """Returns the key of SPELLINGS, or "", for each word of a name that is not among FILLERS."""
  if not name.isascii():
    return []
  words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]
  return [_word_kind(word) for word in words if word not in FILLERS]


def _word_kind(word: str) -> str:
  stems = {word, *(word.removesuffix(filler) for filler in FILLERS)}  # trainset
  return next((kind for kind, words in SPELLINGS.items() if stems.intersection(words)), "")


@functools.lru_cache(maxsize=4)  # a run asks half a dozen times
def find_splits(root: str, rules: SplitRules) -> Splits:
  """Finds the folders of the splits below `root`.

  Args:
    root: an existing directory.
    rules: `train_split` and `eval_split` name folders. Where these do not exist, another spelling
      of the same word does, see `split_kind`; a folder to measure on may be of validation or, if
      there is none, of test images. `train_split="."` makes `root` one tree.

  Raises:
    DataError: the names are ambiguous, or a split has no folder. The text says what to do.
  """
  if rules.train_split in WHOLE:
    return Splits(root, None, "")
  root = _unwrap(root, rules)
  names = subfolders(root)
  train = _find_folder(root, names, rules.train_split, "train_split", ("train",))
  others = [name for name in names if name != train]
  evaluation = _find_folder(root, others, rules.eval_split, "eval_split", ("val", "test"))
  if not train:
    if evaluation:
      # Read as one tree, the splits would pass for classes, or mix.
      raise DataError(
        f"folder:{root}: has {evaluation!r} but no {rules.train_split!r}; name the training"
        " sub-folder with train_split, or give train_split=. if all sub-folders are classes"
      )
    _check_no_inner_splits(root, names)
    return Splits(root, None, "")
  others = [
    f"{name}/" for name in others if name != evaluation and has_images(os.path.join(root, name))
  ]
  if loose := loose_images(root):
    others.append(f"{len(loose)} image{'s' * (len(loose) > 1)} beside them")
  if others and not evaluation and rules.train_split == "train":
    _check_no_class(root, train, others)
  eval_note = f"{evaluation}/" if evaluation else f"held out of {train}/"
  left_out = f", left out: {first_names(others)}" if others else ""
  return Splits(
    _inner_folder(os.path.join(root, train)),
    _inner_folder(os.path.join(root, evaluation)) if evaluation else None,
    f"train: {train}/, eval: {eval_note}{left_out}",
  )


def _find_folder(root: str, names: list[str], wanted: str, key: str, kinds) -> str:
  """Returns the folder of a split among `names`, "" if there is none.

  Args:
    root: the data set.
    names: its folders.
    wanted: the value of `key`.
    key: "train_split" or "eval_split".
    kinds: keys of SPELLINGS that serve, after that of `wanted`.
  """
  wanted_kind = split_kind(wanted)
  is_default = wanted in ("train", "validation")
  is_path = os.path.basename(wanted) != wanted
  if wanted and not is_default and (wanted in names or is_path or not wanted_kind):
    folder = os.path.normpath(wanted)
    if not is_folder(os.path.join(root, folder)):
      raise DataError(
        f"folder:{root}: has no sub-folder {wanted!r}, which {key} names; its sub-folders are"
        f" {first_names(names)}"
      )
    return folder
  for kind in dict.fromkeys((wanted_kind, *kinds)):
    same = [name for name in names if kind and split_kind(name) == kind]
    with_images = [name for name in same if has_images(os.path.join(root, name))]
    if len(with_images) > 1:
      raise DataError(
        f"folder:{root}: {', '.join(f'{name}/' for name in with_images)} all mean {kind!r}; name"
        f" one with {key}=./{with_images[0]}, say, or give train_split=. if all sub-folders are"
        " classes"
      )
    if same:
      return (with_images or same)[0]
  return ""


def _check_no_class(root: str, train: str, others: list[str]) -> None:
  """Refuses a lone training folder that may be a class or an album of that name among others."""
  if train == "train" and subfolders(os.path.join(root, train)):
    return
  raise DataError(
    f"folder:{root}: {train}/ may be the training images, or one folder among"
    f" {first_names(others)}; give train_split=. to read all of them, train_split=./{train} to"
    " train on that one alone"
  )


def _check_no_inner_splits(root: str, names: list[str]) -> None:
  """Refuses classes that hold the splits, of which all would be trained on."""
  inner = []
  for name in names:
    inner = subfolders(os.path.join(root, name))
    kinds = set(map(split_kind, inner))
    if "train" not in kinds or not kinds & {"val", "test"}:
      return
  if inner:
    raise DataError(
      f"folder:{root}: the splits lie inside of its sub-folders ({name}/ holds"
      f" {first_names(f'{folder}/' for folder in inner)}); move them to SPLIT/CLASS, use"
      f" folder:{root}/{name}, or give train_split=. to train on everything"
    )


def _unwrap(root: str, rules: SplitRules) -> str:
  """Returns the folder below `root` that holds splits, if only folders around it lie above."""
  folder = root
  for _ in range(MAX_DEPTH):
    names = subfolders(folder)
    kinds = set(map(split_kind, names)) - {""}
    if kinds or is_folder(os.path.join(folder, rules.train_split)):
      # A lone `train` deep below is no reason to read the folder in another way.
      return folder if "train" in kinds and len(kinds) > 1 else root
    with_images = (name for name in names if has_images(os.path.join(folder, name)))
    inner = list(itertools.islice(with_images, 2))
    if len(inner) != 1 or loose_images(folder):
      return root
    folder = os.path.join(folder, inner[0])
  return root


def _inner_folder(root: str) -> str:
  """Returns the folder with the images of a split: of seg_train/seg_train the inner one.

  The inner folder of `train/train` is not taken: it would rename the images of earlier runs.
  """
  name, inner = os.path.basename(root), subfolders(root)
  is_doubled = len(inner) == 1 and split_kind(name) and split_kind(inner[0]) == split_kind(name)
  if name == "train" or not is_doubled or loose_images(root):
    return root
  return os.path.join(root, inner[0])
