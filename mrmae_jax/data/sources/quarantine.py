"""A source without the images that a quarantine list names."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from mrmae_jax.data.sources.base import Source
from mrmae_jax.errors import DataError
from mrmae_jax.runs.paths import read_regular


class FilteredSource:
  """A source without the images that a quarantine list names.

  The list is JSON, `{"train": {NAME: REASON, ...}, "eval": {...}}`, as `mrmae verify` writes it. A
  list of names may take the place of an inner object, and a split may be absent. Names are those
  of `Source.name`.
  """

  def __init__(self, source: Source, splits: tuple[str, ...], path: str):
    """Finds the listed images in the source.

    Args:
      source: of images.
      splits: whose images it holds: "train" or "eval", both where nothing is held out.
      path: file of the list.

    Raises:
      DataError: the list cannot be read, a name belongs to no image, or nothing remains.
    """
    names = _read_list(path, splits)
    excluded = {name: i for i in range(len(source)) if (name := source.name(i)) in names}
    if unknown := sorted(names - excluded.keys()):
      raise DataError(
        f"quarantine {path}: {len(unknown)} of its {len(names)} {' and '.join(map(repr, splits))}"
        " images are not in"
        f" {source.description}: {', '.join(unknown[:3])}{', ...' if len(unknown) > 3 else ''};"
        " write it again with mrmae verify and the options of this run"
      )
    if len(excluded) == len(source):
      raise DataError(f"quarantine {path} leaves nothing of {source.description}")
    self._source = source
    self._indices = np.delete(np.arange(len(source)), list(excluded.values()))
    self.class_names = source.class_names
    for name in ("category_ids", "most_objects", "has_all_masks"):  # of images with objects
      if hasattr(source, name):
        setattr(self, name, getattr(source, name))
    self.description = f"{source.description}; without {len(excluded)} of these in quarantine"
    self.left_out = getattr(source, "left_out", "")
    self.is_known_by_names = getattr(source, "is_known_by_names", False)
    digest = hashlib.sha256("\0".join(excluded).encode(errors="surrogateescape"))
    self.fingerprint = (
      f"{source.fingerprint}, without {len(excluded)}, names {digest.hexdigest()[:12]}"
    )

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self._source[int(self._indices[index])]

  def objects(self, index: int):
    """Returns the objects of an image, see `segmentations.Objects`."""
    return self._source.objects(int(self._indices[index]))

  def image_id(self, index: int) -> int:
    return self._source.image_id(int(self._indices[index]))

  def name(self, index: int) -> str:
    return self._source.name(int(self._indices[index]))


def _read_list(path: str, splits: tuple[str, ...]) -> set[str]:
  try:
    listed = json.loads(read_regular(Path(path).expanduser()))
    if not isinstance(listed, dict) or not listed.keys() <= {"train", "eval"}:
      raise ValueError("expected an object with 'train' and 'eval'")
    return {name for split in splits for name in listed.get(split, ())}
  except (OSError, ValueError, TypeError, RuntimeError) as error:  # of JSON that is nested, no home
    raise DataError(
      f"quarantine {path}: cannot be read ({error}); write it with mrmae verify --quarantine=FILE"
    ) from error
