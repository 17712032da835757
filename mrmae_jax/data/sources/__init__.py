"""Sources of images, one module per kind: digits, a folder, a prepared tfds dataset, packed shards,
scenes with a class for every pixel, images with objects.

A module KIND has `make_source(address, split, rules)`, and is imported when it is needed. Its kind
is listed in KINDS; pictures that are drawn have modules of their own, those in DRAWN.
"""

import importlib
import os

from mrmae_jax.data.sources.base import (
  NothingHeldOut,
  Source,
  SplitRules,
  check_same_classes,
  sample_contents,
)
from mrmae_jax.data.sources.quarantine import FilteredSource
from mrmae_jax.errors import DataError, printable
from mrmae_jax.runs.paths import is_bucket

__all__ = [
  "Source",
  "check_same_classes",
  "describe_kinds",
  "open_source",
  "open_split",
  "sample_contents",
]

KINDS = {  # kind -> how it is written
  "digits": "digits",
  "folder": "folder:/path/to/images",
  "wds": "wds:/path/{000..123}.tar",
  "hf": "hf:name[:config] or hf:/path",
  "tfds": "tfds:name[/config][:version]",
  "packed": "packed:/path",
  "scenes": "scenes:/path or scenes:digits",
  "coco": "coco:/path or coco:digits",
}
PLACES = ("folder", "packed", "scenes", "coco")  # kinds whose address is a path
DRAWN = {"scenes:digits": "digit_scenes", "coco:digits": "digit_objects"}  # dataset -> module
PACKAGES = {  # module -> the packages that it needs beside numpy and Pillow
  "digits": "scikit-learn",
  "digit_scenes": "scikit-learn",
  "digit_objects": "scikit-learn",
  "tfds": "tensorflow-datasets array_record importlib_resources",
  "packed": "array_record",
  "hf": "'mrmae_jax[hf]'",
}


def describe_kinds(config) -> str:
  """Returns how datasets are written that a task can learn from, for its `config.data`."""
  # Of all tasks only detection has the key max_boxes, and segmentation zero_is_unlabelled.
  if "max_boxes" in config:
    return f"{KINDS['coco']}, images with boxes"
  if "zero_is_unlabelled" in config:
    return f"{KINDS['scenes']}, images with a class for every pixel"
  *others, last = KINDS.values()
  return f"{', '.join(others)} or {last}"


def open_split(config, split: str) -> Source:
  """Opens a split of the dataset of a run's `config.data`; see `open_source`.

  Raises:
    DataError: the images cannot be opened; or the task learns from a class for every pixel, its
      `config.data` has a key zero_is_unlabelled, and there are none, or the key is not set; or it
      learns from objects, its `config.data` has a key max_boxes, and there are none.
  """
  has_objects, has_scenes = (key in config for key in ("max_boxes", "zero_is_unlabelled"))
  needed = "coco:" if has_objects else "scenes:" if has_scenes else ""
  if not config.source.startswith(needed):
    raise DataError(f"source={config.source!r} given; expected {describe_kinds(config)}")
  if has_scenes and config.zero_is_unlabelled is None:
    raise DataError(
      "zero_is_unlabelled is not set; expected True if the value 0 in label files means"
      " unlabelled and 1 is the first class, as in ADE20K, False if 0 is the first class"
    )
  return open_source(
    config.source,
    split,
    train_split=config.train_split,
    eval_split=config.eval_split,
    data_dir=config.data_dir,
    holdout_every=config.holdout_every,
    labels=config.get("labels", ""),  # runs of earlier versions lack the key
    quarantine=config.quarantine,
    zero_is_unlabelled=config.get("zero_is_unlabelled"),
    max_dropped=config.max_skipped if has_objects else None,
  )


def with_absolute_path(spec: str) -> str:
  """Returns a dataset with a path that means the same in any working directory."""
  kind, _, address = spec.partition(":")
  if kind not in PLACES or spec in DRAWN or not address or is_bucket(address):
    return spec
  return f"{kind}:{os.path.abspath(os.path.expanduser(address))}"


def open_source(
  spec: str,
  split: str,
  *,
  train_split: str = "train",
  eval_split: str = "test",
  data_dir: str = "",
  holdout_every: int = 10,
  labels: str = "",
  quarantine: str = "",
  zero_is_unlabelled: bool | None = None,
  max_dropped: float | None = None,
) -> Source:
  """Opens one split of a dataset.

  Args:
    spec: how the dataset is written, see KINDS. The path of a folder may be that of a .zip or .tar.
    split: "train" or "eval".
    train_split: sub-folder or tfds split (slicing allowed) behind "train". A folder dataset may
      spell it in another way, see `splits.split_kind`; "." makes the folder one tree of classes.
    eval_split: the same for "eval". A folder dataset without it falls back to validation images,
      test images, and then to held-out training images.
    data_dir: tfds only: where datasets were prepared, or the directory of one prepared dataset
      (the one with dataset_info.json), on disk or gs://; "" is tfds' default.
    holdout_every: where the data has no splits, every k-th image (index % k == k - 1 in sorted
      order) is "eval" and the rest "train"; 0 trains on everything.
    labels: of a folder: a table of labels, see `labels.read_labels`; "" if sub-folders are classes.
    quarantine: a file that lists images to be left out, see `FilteredSource`. The split of the
      other images does not depend on it. "" for none.
    zero_is_unlabelled: of scenes: see `scenes.read_label`; None for the images without labels.
    max_dropped: of COCO: largest share of annotations that cannot be used; None for the images
      without objects.

  Raises:
    DataError: the images cannot be opened.
  """
  if split not in ("train", "eval"):
    raise DataError(f"split {split!r} given; expected 'train' or 'eval'")
  if holdout_every < 0 or holdout_every == 1:
    raise DataError(
      f"holdout_every={holdout_every} given; expected 0 (train on everything) or at least 2 (1"
      " would leave nothing to train on)"
    )
  kind, _, address = spec.partition(":")
  if kind not in KINDS or bool(address) != (":" in KINDS[kind]):
    hint = f" (folder:{spec}?)" if os.path.isdir(os.path.expanduser(spec)) else ""
    raise DataError(f"dataset {spec!r} given; expected {describe_kinds({})}{hint}")
  if labels and kind != "folder":
    raise DataError(
      f"labels={labels!r} given; a table of labels is for folders and archives (folder:/path),"
      f" {spec!r} has its own"
    )
  name = DRAWN.get(spec, kind)
  try:
    module = importlib.import_module(f"{__name__}.{name}")
  except ImportError as error:
    raise DataError(
      f"dataset {spec!r} needs packages that are not installed ({error}); run `pip install"
      f" {PACKAGES[name]}`"
    ) from error
  rules = SplitRules(
    train_split, eval_split, data_dir, holdout_every, labels, zero_is_unlabelled, max_dropped
  )
  source = module.make_source(address, split, rules)
  for text in ("description", "left_out"):  # with names of files and folders
    if hasattr(source, text):
      setattr(source, text, printable(getattr(source, text)))
  if not quarantine:
    return source
  return FilteredSource(source, _splits_in(module, address, split, rules), quarantine)


def _splits_in(module, address: str, split: str, rules: SplitRules) -> tuple[str, ...]:
  """Returns the splits whose images a split holds: both where nothing is held out."""
  if split == "train" and not rules.holdout_every:
    try:
      module.make_source(address, "eval", rules)
    except NothingHeldOut:
      return "train", "eval"
    except DataError:  # what is wrong with the other split is no matter here
      pass
  return (split,)
