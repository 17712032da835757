"""A prepared tfds dataset, opened with its code or from its files alone."""

import os
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from mrmae_jax.data.sources.base import SplitRules, describe_classes, first_line
from mrmae_jax.errors import DataError, WorkdirError
from mrmae_jax.runs import paths


class TfdsSource:
  """One split of a tfds dataset prepared in the array_record format.

  Only the features `image` and (if it is there) `label` are parsed, and images stay encoded: tfds'
  own decoding is slower and needs OpenCV for speed.
  """

  def __init__(self, name: str, directory: str, split: str):
    self._name = name
    self._directory = directory
    self._split = split
    self._records = None
    features = self._open()
    self.class_names = tuple(getattr(features.get("label"), "names", ()))
    self.fingerprint = (
      f"tfds:{name} split {split}: {len(self)} images, {describe_classes(self.class_names)}"
    )
    self.description = f"{self.fingerprint} ({directory})"

  def _open(self) -> dict[str, Any]:
    """Opens the record files; returns the features that are read."""
    dataset = f"dataset 'tfds:{self._name}' in {self._directory}"
    try:
      builder = tfds.builder_from_directory(self._directory)
    except Exception as error:
      raise DataError(
        f"{dataset} cannot be read ({first_line(error)}); {_prepare_hint(self._name)}"
      ) from error
    features = _select_features(dict(builder.info.features.items()), dataset)
    formats = {form.value for form in builder.info.available_file_formats()}
    if "array_record" not in formats:
      raise DataError(
        f"{dataset} was prepared as {', '.join(sorted(formats))}; expected array_record: move it"
        f" away and {_prepare_hint(self._name)}"
      )
    try:
      self._records = builder.as_data_source(
        self._split,
        deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
        file_format="array_record",
      )
    except Exception as error:
      raise DataError(
        f"{dataset}: split {self._split!r} cannot be read ({first_line(error)}); its splits are"
        f" {', '.join(builder.info.splits)}; choose with train_split and eval_split"
      ) from error
    self._features = tfds.features.FeaturesDict(features)
    self._decoders = {"image": tfds.decode.SkipDecoding()}
    return features

  def __getstate__(self):
    # Readers stay in their process; another one opens its own.
    return self.__dict__ | {"_records": None, "_features": None, "_decoders": None}

  def __len__(self) -> int:
    if self._records is None:
      self._open()
    return len(self._records)

  def __getitem__(self, index: int) -> dict[str, Any]:
    if self._records is None:
      self._open()
    try:
      example = self._features.deserialize_example_np(self._records[index], decoders=self._decoders)
    except MemoryError:
      raise
    # The reader raises errors of its C++ code: RuntimeError, ValueError, IndexError.
    except Exception as error:
      raise DataError(
        f"{self.name(index)}: cannot be read from {self._directory} ({first_line(error)}); copy or"
        " prepare the dataset again"
      ) from error
    image = example["image"]
    if isinstance(image, np.ndarray) and image.shape[-1] == 1:
      image = np.repeat(image, 3, axis=2)
    return {"image": image, "label": int(example.get("label", -1)), "name": self.name(index)}

  def name(self, index: int) -> str:
    return f"tfds:{self._name}/{self._split}[{index}]"


def make_source(address: str, split: str, rules: SplitRules) -> TfdsSource:
  """Finds a prepared tfds dataset and opens one of its splits."""
  directory = os.path.expanduser(rules.data_dir)
  try:
    folder = paths.open_folder(directory)
  except WorkdirError as error:
    raise DataError(f"dataset 'tfds:{address}', data_dir: {error}") from error
  if not paths.is_file(folder / "dataset_info.json"):
    directory = _find_prepared(address, directory, rules.data_dir)
  if not paths.is_bucket(directory) and (special := paths.find_special(directory)):
    raise DataError(f"dataset 'tfds:{address}': {directory}/{special[0]} is no file; remove it")
  split_name = rules.train_split if split == "train" else rules.eval_split
  return TfdsSource(address, directory, split_name)


def _find_prepared(name: str, directory: str, data_dir: str) -> str:
  """Returns the directory of a dataset that was prepared under `directory`."""
  try:
    builder = tfds.builder(name, data_dir=directory or None)
    is_prepared = builder.is_prepared()
  # tfds reports bad names, configs and versions as AssertionError, ValueError and
  # DatasetNotFoundError, the last listing some thousand names.
  except Exception as error:
    raise DataError(
      f"dataset 'tfds:{name}' cannot be opened ({first_line(error)}); check name, config and"
      " version against https://www.tensorflow.org/datasets/catalog, and set data_dir"
      f" ({data_dir or 'default'!r} now) to where it was prepared"
    ) from error
  if not is_prepared:
    raise DataError(
      f"dataset 'tfds:{name}' is not prepared in {builder.data_dir};"
      f" {_prepare_hint(name, data_dir)}, or set data_dir to where it is"
    )
  return str(builder.data_dir)


def _select_features(stored: dict[str, Any], dataset: str) -> dict[str, Any]:
  """Returns the features "image" and, if there is one, "label" among those of a dataset."""
  image, label = stored.get("image"), stored.get("label")
  is_encoded = isinstance(image, tfds.features.Image) and image.np_dtype != np.float32
  is_pixels = (
    type(image) is tfds.features.Tensor
    and image.np_dtype == np.uint8
    and len(image.shape) == 3
    and image.shape[-1] in (1, 3)
  )
  if not (is_encoded or is_pixels):
    raise DataError(
      f"{dataset} has no image to read: feature 'image' is {image!r}; expected an integer image, or"
      f" a uint8 [H, W, 1 or 3] tensor; its features are {', '.join(stored)}; choose another"
      " dataset"
    )
  # Other labels (several per image, free text) are not a class index.
  if isinstance(label, tfds.features.ClassLabel):
    return {"image": image, "label": label}
  return {"image": image}


def _prepare_hint(name: str, data_dir: str = "") -> str:
  where = f", data_dir={data_dir!r}" if data_dir else ""
  return (
    f"run `tfds.builder({name!r}, file_format='array_record'{where}).download_and_prepare()` once"
    " (some datasets need TensorFlow for that, none to be read)"
  )
