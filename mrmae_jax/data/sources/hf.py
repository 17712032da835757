"""Hugging Face data sets: of the hub, saved by `save_to_disk`, or folders of parquet and arrow."""

import functools
import hashlib
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc

from mrmae_jax.data.sources.base import (
  SplitRules,
  describe_classes,
  first_line,
  hold_out,
  holdout_note,
)
from mrmae_jax.data.sources.labels import LABEL_COLUMNS, sort_classes
from mrmae_jax.data.sources.listing import first_names
from mrmae_jax.data.sources.splits import split_kind
from mrmae_jax.errors import DataError
from mrmae_jax.runs.paths import read_regular

IMAGE_COLUMNS = ("image", "img", "jpg", "png", "picture", "photo")
FILES = {".parquet": "parquet", ".arrow": "arrow"}


class HfSource:
  """The images of a split, read from memory-mapped files when they are asked for."""

  def __init__(self, address: str, split: str, dataset, labels: np.ndarray, indices: np.ndarray):
    """Describes the rows at `indices`; `make_source` completes it.

    Args:
      address: of the dataset.
      split: its name there.
      dataset: `datasets.Dataset` with the column "image", not decoded.
      labels: int32, of all rows; -1 for none.
      indices: int [N], sorted.
    """
    self._address, self._split, self._dataset = address, split, dataset
    self._labels, self._indices = labels, indices
    self.class_names, self.description = (), ""

  @functools.cached_property
  def fingerprint(self) -> str:
    # The sizes tell images apart, and stand apart from their bytes.
    sizes = [
      np.asarray(pc.fill_null(pc.binary_length(chunk.field("bytes")), 0))
      for chunk in self._dataset.data.column("image").chunks
    ]
    arrays = [*sizes, self._labels, self._indices]
    digest = hashlib.sha256(b"".join(x.astype(np.int64).tobytes() for x in arrays))
    return f"{len(self)} images of {self._split}, sizes and labels {digest.hexdigest()[:12]}"

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: int) -> dict[str, Any]:
    row, name = int(self._indices[index]), f"hf:{self._address}/{self.name(index)}"
    try:
      image = self._dataset[row]["image"] or {}
      content, path = image.get("bytes"), image.get("path")
      if content is None and path and "://" not in path:
        content = read_regular(Path(path))
    except MemoryError:
      raise
    # Arrow raises errors of its C++ code: ArrowInvalid, OSError, IndexError.
    except Exception as error:
      raise DataError(
        f"{name}: cannot be read ({first_line(error)}); copy or download the dataset again"
      ) from error
    if content is None:
      raise DataError(f"{name}: holds no image, but {path or 'nothing'}; leave the row out")
    return {"image": content, "label": int(self._labels[row]), "name": name}

  def name(self, index: int) -> str:
    return f"{self._split}[{self._indices[index]}]"


def make_source(address: str, split: str, rules: SplitRules) -> HfSource:
  """Opens one split of a dataset, or holds rows out of the training split."""
  splits = _load(address)
  train = _find_split(address, splits, rules.train_split, "train_split", ("train",))
  evaluation = _find_split(address, splits, rules.eval_split, "eval_split", ("val", "test"))
  if not train:
    raise DataError(
      f"hf:{address}: has the splits {', '.join(splits)}, and none to train on; name one with"
      " train_split"
    )
  evaluation = "" if evaluation == train else evaluation
  name = evaluation if split == "eval" and evaluation else train
  dataset, column = splits[name], _label_column(splits[train])
  labels = _read_labels(splits[train], column)
  classes, problem = _find_classes(splits[train], column, labels)
  if name != train and classes:
    labels = _read_labels(dataset, column)
    if unknown := set(labels) - set(classes):
      known = f"{first_names(unknown - {''})} are no classes of {train}"
      problem, classes = f"{labels.count('')} have none" if "" in unknown else known, ()
  label_of = {label: i for i, label in enumerate(classes)}
  codes = [label_of.get(label, -1) for label in labels] if classes else [-1] * len(dataset)
  kept, note = np.arange(len(dataset)), f"{name} of {', '.join(splits)}"
  if not evaluation:
    kept = hold_out(len(dataset), split, rules.holdout_every, f"hf:{address}")
    note += f", {holdout_note(split, rules.holdout_every)}"
  source = HfSource(address, name, _raw_images(address, dataset), np.array(codes, np.int32), kept)
  source.class_names = classes
  described = describe_classes(classes) + (f" ({problem})" if problem else "")
  of_column = f" by {column!r}" if classes and column != "label" else ""
  source.description = f"hf:{address}: {len(kept)} images, {described}{of_column}; {note}"
  return source


@functools.lru_cache(maxsize=4)  # a run asks half a dozen times
def _load(address: str) -> dict[str, datasets.Dataset]:
  """Returns the splits of a dataset by name.

  Raises:
    DataError: it cannot be found or read.
  """
  path = os.path.expanduser(address)
  is_local = os.path.exists(path) or address.startswith(("/", ".", "~"))
  try:
    if not is_local:
      name, _, config = address.partition(":")
      splits = datasets.load_dataset(name, config or None)
    elif os.path.isfile(path):
      kind = FILES.get(os.path.splitext(path)[1].lower())
      if not kind:
        raise ValueError(f"a file, expected {' or '.join(FILES)}, or a folder of them")
      splits = datasets.load_dataset(kind, data_files=path)
    elif {"dataset_dict.json", "state.json"}.intersection(os.listdir(path)):
      splits = datasets.load_from_disk(path)
    else:
      splits = datasets.load_dataset(path)
  # The library and Arrow raise errors of many types here: ConnectionError, ArrowInvalid, ...
  except Exception as error:
    advice = (
      "copy it again, or write it with save_to_disk or to_parquet"
      if is_local
      else "check the name on https://huggingface.co/datasets, a configuration comes after a colon"
      " (hf:NAME:CONFIG); without a network download it first and give its folder"
    )
    raise DataError(
      f"hf:{address}: cannot be opened ({first_line(error.__cause__ or error)}); {advice}"
    ) from error
  return dict(splits) if isinstance(splits, dict) else {"train": splits}


def _find_split(address: str, splits, wanted: str, key: str, kinds: tuple[str, ...]) -> str:
  """Returns the name of a split: `wanted`, or one of the same meaning; "" if there is none."""
  if wanted in splits:
    return wanted
  if not split_kind(wanted):
    raise DataError(
      f"hf:{address}: has no split {wanted!r}, which {key} names; its splits are"
      f" {', '.join(splits)}"
    )
  for kind in dict.fromkeys((split_kind(wanted), *kinds)):
    if same := [name for name in splits if split_kind(name) == kind]:
      return same[0]
  return ""


def _raw_images(address: str, dataset: datasets.Dataset) -> datasets.Dataset:
  """Returns the dataset with its images alone, as encoded bytes in the column "image"."""
  features = dataset.features
  images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
  named = [name for name in IMAGE_COLUMNS if name in features]
  names = [name for name in named if name in images] or images or named
  if not names or (len(names) > 1 and names == images):
    raise DataError(
      f"hf:{address}: has {len(names)} columns of images among {', '.join(features)}; expected one,"
      f" or one named {IMAGE_COLUMNS[0]}: keep it with select_columns"
    )
  dataset = dataset.select_columns(names[0])
  if names[0] != "image":
    dataset = dataset.rename_column(names[0], "image")
  try:
    return dataset.cast_column("image", datasets.Image(decode=False))
  except Exception as error:  # Arrow has several types
    raise DataError(
      f"hf:{address}: the column {names[0]!r} holds {features[names[0]]}, not images; write it with"
      " the feature datasets.Image()"
    ) from error


def _label_column(dataset: datasets.Dataset) -> str:
  """Returns the column with one class for each image, "" if there is none.

  It is one with a usual name, or else the first of the type ClassLabel.
  """
  features = dataset.features
  is_label = lambda feature: (
    isinstance(feature, datasets.ClassLabel)
    or (
      isinstance(feature, datasets.Value)
      and feature.dtype.startswith(("int", "uint", "string", "large_string"))
    )
  )
  usual = [name for name in LABEL_COLUMNS if name in features and is_label(features[name])]
  typed = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
  return next(iter(usual + typed), "")


def _read_labels(dataset: datasets.Dataset, column: str) -> list[str]:
  """Returns the name of the class of each row, "" for none."""
  if column not in dataset.features:
    return [""] * len(dataset)
  values = dataset.select_columns(column).with_format("arrow")[:][column].to_pylist()
  if isinstance(feature := dataset.features[column], datasets.ClassLabel):
    known = range(feature.num_classes)
    return [feature.names[x] if x in known else "" for x in values]
  return ["" if x is None else str(x) for x in values]


def _find_classes(dataset, column: str, labels: list[str]) -> tuple[tuple[str, ...], str]:
  """Returns the classes of training images in order, or () and why there are none."""
  if not column:
    return (), ""
  if "" in labels:
    return (), f"{labels.count('')} of {len(labels)} have none in {column!r}"
  feature = dataset.features[column]
  if isinstance(feature, datasets.ClassLabel):
    return tuple(feature.names), ""
  return sort_classes(labels), ""
