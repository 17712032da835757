"""Images of any source in a few large files, to be read in any order; `data/pack.py` writes them.

A packed folder holds ArrayRecord shards and `index.json`. A record is one line of JSON with the
name and the label of an image, and for pixels their shape; after it come the bytes that the source
gave. The images of a split follow each other in the order of the source, so the batches are those
of the source. The index has the class names, the options of the packing, and for each shard its
number of images, size and sha256.
"""

import bisect
import hashlib
import itertools
import json
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from array_record.python import array_record_data_source

from mrmae_jax.data.sources.archive import file_version
from mrmae_jax.data.sources.base import SplitRules, describe_classes
from mrmae_jax.errors import DataError, MissingSplitError
from mrmae_jax.runs.paths import read_regular

FORMAT = "mrmae_jax packed images 1"
INDEX = "index.json"


class PackedSource:
  """One split of a packed folder; the examples are those of its source."""

  def __init__(self, root: str, split: str):
    """Opens a split after checking the size of each of its shards.

    Args:
      root: the packed folder.
      split: "train" or "eval", as they were packed.

    Raises:
      DataError: not a packed folder, a split that it does not hold, or a shard that is missing or
        has another size than it was written with.
    """
    root = packed_root(root)
    index = _read_index(root)
    self._root, self._split = root, split
    if split not in index["splits"]:
      raise MissingSplitError(
        f"packed:{root}: holds {', '.join(index['splits'])}, not {split!r}; pack again with"
        " --splits=train,eval, and --holdout_every=10, say, if the source has no such split"
      )
    shards = index["splits"][split]
    for shard in shards:
      _check_size(root, shard)
    paths = [root / shard["file"] for shard in shards]
    self._versions = {path: file_version(path.stat()) for path in paths}
    self._ends = list(itertools.accumulate(shard["images"] for shard in shards))
    self._changed = set()  # shards that are no longer the same; None in a process that must look
    self._records = array_record_data_source.ArrayRecordDataSource(
      [f"{root / shard['file']}[0:{shard['images']}]" for shard in shards]
    )
    self.class_names = tuple(index["class_names"])
    digest = hashlib.sha256("".join(shard["sha256"] for shard in shards).encode())
    self.fingerprint = f"{len(self)} packed images, content {digest.hexdigest()[:12]}"
    self.description = (
      f"packed:{root}: {len(self)} images, {describe_classes(self.class_names)}; {split} of"
      f" {index['options']['source']}"
    )

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> dict[str, Any]:
    try:
      self._check_version(int(index))
      head, _, image = self._records[int(index)].partition(b"\n")
      header = json.loads(head)
      example = {"label": int(header["label"]), "name": str(header["name"])}
      if "shape" in header:
        image = np.frombuffer(image, np.uint8).reshape(header["shape"])
        if image.ndim != 3 or not image.size:
          raise ValueError(f"pixels of shape {image.shape}")
    except MemoryError:
      raise
    # The reader raises errors of its C++ code: RuntimeError, ValueError, IndexError.
    except Exception as error:
      raise DataError(
        f"packed:{self._root}: image {index} of {self._split!r} cannot be read"
        f" ({' '.join(str(error).split())}); find the damaged shard with"
        f" mrmae pack --verify={self._root}"
      ) from error
    return {"image": image, **example}

  def __getstate__(self):
    return self.__dict__ | {"_changed": None}

  def _check_version(self, index: int) -> None:
    """Raises ValueError if the shard of an image was changed before this process has opened it."""
    if self._changed is None:
      is_same = lambda path, version: path.is_file() and file_version(path.stat()) == version
      self._changed = {
        path for path, version in self._versions.items() if not is_same(path, version)
      }
    path = list(self._versions)[bisect.bisect(self._ends, index)]
    if path in self._changed:
      raise ValueError(f"{path.name} was changed after it was opened")

  def name(self, index: int) -> str:
    return f"{self._split}[{index}]"


def make_source(address: str, split: str, rules: SplitRules) -> PackedSource:
  del rules  # packing fixed the splits
  return PackedSource(address, split)


def verify_packed(
  root: str | os.PathLike, progress: Callable[[int], None] = lambda count: None
) -> str:
  """Reads every shard of a packed folder; returns a line about them.

  Args:
    root: the folder.
    progress: called with the number of images checked since the last call.

  Raises:
    DataError: not a packed folder; or the first shard that is missing or whose size or sha256
      differs from the index.
  """
  root = packed_root(root)
  shards = [shard for split in _read_index(root)["splits"].values() for shard in split]
  for shard in shards:
    _check_size(root, shard)
    if (digest := file_sha256(root / shard["file"])) != shard["sha256"]:
      raise DataError(
        f"{root / shard['file']}: was changed: its sha256 is {digest}, expected"
        f" {shard['sha256']}; copy it again, or pack again"
      )
    progress(shard["images"])
  images = sum(shard["images"] for shard in shards)
  return f"{root}: {images} images in {len(shards)} shards are as written"


def count_packed(root: str | os.PathLike) -> int:
  """Returns the number of images in all splits of a packed folder, by its index."""
  splits = _read_index(packed_root(root))["splits"]
  return sum(shard["images"] for split in splits.values() for shard in split)


def packed_root(root: str | os.PathLike) -> pathlib.Path:
  return pathlib.Path(os.path.expanduser(root)).absolute()


def file_sha256(path: pathlib.Path) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _read_index(root: pathlib.Path) -> dict[str, Any]:
  """Reads the index of a packed folder and checks the type of every value.

  The folder may come from a stranger: the check makes sure that its shards are files in it.
  """
  try:
    index = json.loads(read_regular(root / INDEX))
    if index["format"] != FORMAT:
      raise ValueError(f"format {index['format']!r}, expected {FORMAT!r}")
    if not all(isinstance(name, str) for name in index["class_names"]):
      raise ValueError("class_names are not names")
    str(index["options"]["source"])
    for name, shards in index["splits"].items():
      if not isinstance(shards, list) or not shards:
        raise ValueError(f"{name} has no shards")
      for shard in shards:
        _check_shard(name, shard)
  except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
    raise DataError(
      f"packed:{root}: not a packed folder ({INDEX}: {error}); make one with"
      " mrmae pack --source=SOURCE --out=DIR"
    ) from error
  return index


def _check_shard(split: str, shard: dict[str, Any]) -> None:
  file, counts = shard["file"], (shard["images"], shard["bytes"])
  if not re.fullmatch(r"\w[\w.-]*", file, re.ASCII):
    raise ValueError(f"{split} is in {file!r}, which is not a file in this folder")
  are_integers = all(type(count) is int for count in counts)
  if not are_integers or not 0 < counts[0] <= counts[1]:
    raise ValueError(f"{file} has images and bytes {counts}")
  if not re.fullmatch("[0-9a-f]{64}", shard["sha256"]):
    raise ValueError(f"{file} has no sha256")


def _check_size(root: pathlib.Path, shard: dict[str, Any]) -> None:
  path = root / shard["file"]
  size = path.stat().st_size if path.is_file() else None
  if size != shard["bytes"]:
    state = "is missing" if size is None else f"has {size:,} bytes"
    raise DataError(
      f"{path}: {state}, expected {shard['bytes']:,} bytes; copy it again, or pack again"
    )
