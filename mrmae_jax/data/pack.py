"""Writes the images of a source as a packed folder; `data/sources/packed.py` has its format."""

import contextlib
import dataclasses
import io
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from array_record.python import array_record_module
from PIL import Image

from mrmae_jax.data import augment
from mrmae_jax.data.loader import LoaderOptions, warn_of_skipped
from mrmae_jax.data.sources import Source
from mrmae_jax.data.sources.packed import FORMAT, INDEX, file_sha256, packed_root
from mrmae_jax.errors import DataError
from mrmae_jax.runs.paths import atomic_folder

SHARD_IMAGES = 10_000  # 1 GB of photographs at their usual size
THREADS = 8


def write_packed(
  sources: dict[str, Source],
  root: str | os.PathLike,
  options: dict[str, Any],
  *,
  short_side: int = 0,
  quality: int = 95,
  shards: int = 0,
  loader: LoaderOptions = LoaderOptions(),
  progress: Callable[[int], None] = lambda count: None,
) -> None:
  """Packs sources into a new folder, which appears complete or not at all.

  Every image is decoded once, to check that it can be. The shards hold the bytes of the source.
  With `short_side`, larger images are resized by the same filter and rounding as the evaluation
  view (Pillow's bicubic, the longer side rounded down) and encoded as JPEG with 4:2:0 chroma;
  images that are not RGB stay pixels.

  Args:
    sources: the splits by name, "train" and "eval" or one of them.
    root: the folder, which may not exist.
    options: JSON values that the index keeps; descriptions give its "source".
    short_side: largest shorter side in pixels; 0 keeps all images as they are.
    quality: quality of these JPEGs, 1 to 100.
    shards: files per split; 0 for one per SHARD_IMAGES.
    loader: with on_error="skip" images that cannot be read are left out, up to max_skipped.
    progress: called with the number of images done since the last call.

  Raises:
    DataError: an image cannot be decoded or encoded, naming it, or too many of them; the splits
      have different classes.
    OSError: the folder cannot be written, or something exists at `root`.
  """
  if len({source.class_names for source in sources.values()}) > 1:
    raise DataError(
      "the splits have different classes: "
      + ", ".join(f"{name} {len(source.class_names)}" for name, source in sources.items())
      + "; pack them one by one with --splits"
    )
  with atomic_folder(packed_root(root)) as folder:
    splits = {}
    for split, source in sources.items():
      record = _Record(source, short_side, quality, skip=loader.on_error == "skip")
      count = min(shards or -(-len(source) // SHARD_IMAGES), len(source))
      splits[split] = _write_split(folder, split, record, count, loader, progress)
    index = dict(
      format=FORMAT,
      options=options,
      class_names=next(iter(sources.values())).class_names,
      splits=splits,
    )
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def _write_split(
  folder: pathlib.Path,
  split: str,
  record: "_Record",
  count: int,
  loader: LoaderOptions,
  progress: Callable[[int], None],
) -> list[dict[str, Any]]:
  """Writes `count` shards; returns their entries of the index."""
  total, skipped = len(record.source), {}
  dataset = grain.MapDataset.range(total).map(record)
  dataset = dataset.to_iter_dataset(grain.ReadOptions(THREADS, 4 * THREADS))
  entries = []
  with contextlib.closing(iter(dataset)) as records:
    for i, indices in enumerate(np.array_split(range(total), count)):
      path = folder / f"{split}-{i:05d}-of-{count:05d}.array_record"
      numbered = zip(indices, itertools.islice(records, len(indices)))
      images = _write_shard(path, _good_records(numbered, total, loader, skipped), progress)
      if not images:
        path.unlink()
        continue
      entries.append(
        dict(
          file=path.name,
          images=images,
          bytes=path.stat().st_size,
          sha256=file_sha256(path),
        )
      )
  if not entries:
    raise DataError(f"none of the images of {record.source.description} can be read")
  return entries


def _good_records(
  numbered: Iterator[tuple[int, bytes | str]], total: int, loader: LoaderOptions, skipped: dict
) -> Iterator[bytes]:
  """Yields the records of images that could be read, and adds the others to `skipped`."""
  for index, record in numbered:
    if isinstance(record, bytes):
      yield record
      continue
    skipped[int(index)] = record
    warn_of_skipped(skipped, total, loader, "it is left out")


def _write_shard(
  path: pathlib.Path, records: Iterator[bytes], progress: Callable[[int], None]
) -> int:
  """Writes records to a file; returns their number."""
  count = 0
  # One image per chunk, to read them in any order; JPEGs do not compress.
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
  try:
    for record in records:
      writer.write(record)
      count += 1
      progress(1)
    writer.close()
  except RuntimeError as error:  # its C++ code reports a full disk so
    raise OSError(f"{path.parent} cannot be written: {error}") from error
  return count


@dataclasses.dataclass(frozen=True)
class _Record:
  """Maps the index of an image to its record; with `skip` to the reason why there is none."""

  source: Source
  short_side: int
  quality: int
  skip: bool

  def __call__(self, index: int) -> bytes | str:
    try:
      return self._make(index)
    except DataError as error:
      if not self.skip:
        raise
      return str(error)

  def _make(self, index: int) -> bytes:
    example = self.source[index]
    header = {"name": example["name"], "label": example["label"]}
    image, pixels = example["image"], augment.pixels(example)
    if self.short_side and min(pixels.shape[:2]) > self.short_side:
      image = self._shrink(pixels, example["name"], augment.orientation_of(image))
    if isinstance(image, np.ndarray):
      header["shape"], image = image.shape, image.tobytes()
    return json.dumps(header).encode() + b"\n" + image

  def _shrink(self, pixels: np.ndarray, name: str, orientation: int) -> bytes | np.ndarray:
    """Returns a JPEG of the resized image with its orientation, or its pixels if not RGB."""
    height, width, channels = pixels.shape
    short = min(height, width)
    size = height * self.short_side // short, width * self.short_side // short
    resized, buffer = augment.resize_pillow(pixels, size), io.BytesIO()
    if channels != 3:
      return resized
    exif = Image.Exif()
    if orientation != 1:
      exif[augment.ORIENTATION] = orientation
    options = {"quality": self.quality, "subsampling": "4:2:0", "exif": exif}
    try:
      Image.fromarray(resized).save(buffer, "JPEG", **options)
    except OSError as error:  # more than 65,500 pixels on a side
      raise DataError(
        f"{name}: {height} x {width} pixels cannot be encoded at {size[0]} x {size[1]}: {error};"
        " remove it"
      ) from error
    return buffer.getvalue()
