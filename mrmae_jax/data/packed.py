"""Images of any source in a few large files, to be read in any order.

A packed folder holds ArrayRecord shards and `index.json`. A record is one line
of JSON with the name and the label of an image, and for pixels their shape;
after it come the bytes that the source gave. The images of a split follow each
other in the order of the source, so the batches are those of the source. The
index has the class names, the options of the packing, and for each shard its
number of images, size and sha256.
"""

import contextlib
import hashlib
import io
import itertools
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable

import grain
import numpy as np
from array_record.python import array_record_data_source, array_record_module
from PIL import Image

from mrmae_jax.data import augment
from mrmae_jax.data.sources import Source
from mrmae_jax.errors import DataError

FORMAT = "mrmae_jax packed images 1"
INDEX = "index.json"
SHARD_IMAGES = 10_000  # 1 GB of photographs as they come.
THREADS = 8


class PackedSource:
  """One split of a packed folder; the examples are those of its source."""

  def __init__(self, root: str, split: str):
    """Opens a split, after a look at the size of each of its shards.

    Args:
      root: the packed folder.
      split: "train" or "eval", as they were packed.

    Raises:
      DataError: no packed folder, no such split, or a shard that is missing or
        has another size than it was written with.
    """
    root = pathlib.Path(os.path.expanduser(root)).absolute()
    index = _read_index(root)
    self._root, self._split = root, split
    if split not in index["splits"]:
      raise DataError(
        f"packed:{root}: holds {', '.join(index['splits'])}, not {split!r};"
        " pack again with --splits=train,eval, or do without (a run:"
        " holdout_every=0)"
      )
    shards = index["splits"][split]
    for shard in shards:
      _check_size(root, shard)
    self._records = array_record_data_source.ArrayRecordDataSource(
      [f"{root / shard['file']}[0:{shard['images']}]" for shard in shards]
    )
    self.class_names = tuple(index["class_names"])
    digest = hashlib.sha256("".join(s["sha256"] for s in shards).encode())
    self.fingerprint = f"{len(self)} packed images, content {digest.hexdigest()[:12]}"
    classes = f"{len(self.class_names)} classes"
    self.description = (
      f"packed:{root}: {len(self)} images,"
      f" {classes if self.class_names else 'no labels'}; {split} of"
      f" {index['options']['source']}"
    )

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> dict:
    try:
      head, _, image = self._records[int(index)].partition(b"\n")
      about = json.loads(head)
      example = {"label": int(about["label"]), "name": str(about["name"])}
      if "shape" in about:
        image = np.frombuffer(image, np.uint8).reshape(about["shape"])
        if image.ndim != 3 or not image.size:
          raise ValueError(f"pixels of shape {image.shape}")
    except MemoryError:
      raise
    # The reader raises what its C++ has: RuntimeError, ValueError, IndexError.
    except Exception as error:
      raise DataError(
        f"packed:{self._root}: image {index} of {self._split!r} cannot be"
        f" read ({' '.join(str(error).split())}); find the damaged shard with"
        f" mrmae pack --verify={self._root}"
      ) from error
    return {"image": image, **example}

  def name(self, index: int) -> str:
    return f"{self._split}[{index}]"


def write(
  sources: dict[str, Source],
  root: str | os.PathLike,
  options: dict,
  *,
  short_side: int = 0,
  quality: int = 95,
  shards: int = 0,
  progress: Callable[[int], None] = lambda count: None,
) -> None:
  """Packs sources into a new folder, which appears whole or not at all.

  Every image is decoded once, to know that it can be. What is written are the
  bytes of the source; with `short_side` images larger than that are resized, by
  the same filter and rounding as the evaluation view (Pillow's bicubic, the
  longer side rounded down), and encoded as JPEG with 4:2:0 chroma. Images that
  are not RGB stay pixels.

  Args:
    sources: the splits by name, "train" and "eval" or one of them.
    root: the folder, which may not exist.
    options: JSON values that the index keeps; "source" is what descriptions
      name.
    short_side: in pixels, of images that are larger; 0 keeps all as they are.
    quality: of these JPEGs, 1 to 100.
    shards: files per split; 0 for one per SHARD_IMAGES.
    progress: called with the number of images done since the last call.

  Raises:
    DataError: an image cannot be decoded or encoded, naming it; the splits have
      different classes.
    OSError: the folder cannot be written, or there is something at `root`.
  """
  if len({source.class_names for source in sources.values()}) > 1:
    raise DataError(
      "the splits have different classes: "
      + ", ".join(f"{k} {len(s.class_names)}" for k, s in sources.items())
      + "; pack them one by one with --splits"
    )
  root = pathlib.Path(os.path.expanduser(root)).absolute()
  with _whole_folder(root) as unfinished:
    splits = {}
    for split, source in sources.items():
      count = min(shards or -(-len(source) // SHARD_IMAGES), len(source))
      records = (
        grain.MapDataset.range(len(source))
        .map(_Record(source, short_side, quality))
        .to_iter_dataset(grain.ReadOptions(THREADS, 4 * THREADS))
      )
      splits[split] = []
      with contextlib.closing(iter(records)) as records:
        for i, part in enumerate(np.array_split(range(len(source)), count)):
          path = unfinished / f"{split}-{i:05d}-of-{count:05d}.array_record"
          _write_shard(path, itertools.islice(records, len(part)), progress)
          splits[split].append(
            dict(
              file=path.name,
              images=len(part),
              bytes=path.stat().st_size,
              sha256=_sha256(path),
            )
          )
    index = dict(
      format=FORMAT,
      options=options,
      class_names=next(iter(sources.values())).class_names,
      splits=splits,
    )
    (unfinished / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def _write_shard(path: pathlib.Path, records, progress) -> None:
  # One image per chunk, to read them in any order; JPEGs do not compress.
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
  try:
    for record in records:
      writer.write(record)
      progress(1)
    writer.close()
  except RuntimeError as error:  # What its C++ has for a full disk.
    raise OSError(f"{path.parent} cannot be written: {error}") from error


def verify(
  root: str | os.PathLike,
  progress: Callable[[int], None] = lambda count: None,
) -> str:
  """Reads every shard of a packed folder; returns a line about them.

  Args:
    root: the folder.
    progress: called with the number of images checked since the last call.

  Raises:
    DataError: no packed folder; or the first shard that is missing or whose
      size or sha256 is another than when it was written.
  """
  root = pathlib.Path(os.path.expanduser(root)).absolute()
  shards = [s for split in _read_index(root)["splits"].values() for s in split]
  for shard in shards:
    _check_size(root, shard)
    if (found := _sha256(root / shard["file"])) != shard["sha256"]:
      raise DataError(
        f"{root / shard['file']}: was changed: its sha256 is {found},"
        f" expected {shard['sha256']}; copy it again, or pack again"
      )
    progress(shard["images"])
  images = sum(shard["images"] for shard in shards)
  return f"{root}: {images} images in {len(shards)} shards are as written"


def count_images(root: str | os.PathLike) -> int:
  """Images in all splits of a packed folder, by its index."""
  splits = _read_index(pathlib.Path(os.path.expanduser(root)))["splits"]
  return sum(shard["images"] for split in splits.values() for shard in split)


def _read_index(root: pathlib.Path) -> dict:
  """The index of a packed folder, every value of the kind that it must be.

  The folder may come from a stranger: its shards are files in it.
  """
  try:
    index = json.loads((root / INDEX).read_text())
    if index["format"] != FORMAT:
      raise ValueError(f"format {index['format']!r}, expected {FORMAT!r}")
    if not all(isinstance(name, str) for name in index["class_names"]):
      raise ValueError("class_names are no names")
    str(index["options"]["source"])
    for name, shards in index["splits"].items():
      if not isinstance(shards, list) or not shards:
        raise ValueError(f"{name} has no shards")
      for shard in shards:
        file, counts = shard["file"], (shard["images"], shard["bytes"])
        if not re.fullmatch(r"\w[\w.-]*", file, re.ASCII):
          raise ValueError(f"{name} is in {file!r}, no file of its own")
        whole = all(type(count) is int for count in counts)
        if not whole or not 0 < counts[0] <= counts[1]:
          raise ValueError(f"{file} has images and bytes {counts}")
        if not re.fullmatch("[0-9a-f]{64}", shard["sha256"]):
          raise ValueError(f"{file} has no sha256")
  except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
    raise DataError(
      f"packed:{root}: no packed folder ({INDEX}: {error}); make one with"
      " mrmae pack --source=SOURCE --out=DIR"
    ) from error
  return index


def _check_size(root: pathlib.Path, shard: dict) -> None:
  path = root / shard["file"]
  size = path.stat().st_size if path.is_file() else None
  if size != shard["bytes"]:
    state = "is missing" if size is None else f"has {size:,} bytes"
    raise DataError(
      f"{path}: {state}, expected {shard['bytes']:,} bytes; copy it again, or pack again"
    )


def _sha256(path: pathlib.Path) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _whole_folder(path: pathlib.Path):
  """A folder that becomes `path` when the block ends well, else is gone."""
  if path.exists():
    raise FileExistsError(f"{path} exists; give another name or remove it")
  unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  unfinished.mkdir(parents=True)
  try:
    yield unfinished
    unfinished.rename(path)
  finally:
    shutil.rmtree(unfinished, ignore_errors=True)


class _Record:
  """Index -> the record of that image."""

  def __init__(self, source: Source, short_side: int, quality: int):
    self._source, self._short_side = source, short_side
    self._quality = quality

  def __call__(self, index: int) -> bytes:
    example = self._source[index]
    about = {"name": example["name"], "label": example["label"]}
    image, pixels = example["image"], augment.pixels(example)
    if self._short_side and min(pixels.shape[:2]) > self._short_side:
      image = self._shrink(pixels, example["name"])
    if isinstance(image, np.ndarray):
      about["shape"], image = image.shape, image.tobytes()
    return json.dumps(about).encode() + b"\n" + image

  def _shrink(self, pixels: np.ndarray, name: str) -> bytes | np.ndarray:
    """A JPEG of the resized image, or its pixels if it is not RGB."""
    height, width, channels = pixels.shape
    short = min(height, width)
    size = height * self._short_side // short, width * self._short_side // short
    resized, buffer = augment.resize_pillow(pixels, size), io.BytesIO()
    if channels != 3:
      return resized
    try:
      Image.fromarray(resized).save(buffer, "JPEG", quality=self._quality, subsampling="4:2:0")
    except OSError as error:  # More than 65,500 pixels on a side.
      raise DataError(
        f"{name}: {height} x {width} pixels cannot be encoded at {size[0]} x"
        f" {size[1]}: {error}; remove it"
      ) from error
    return buffer.getvalue()
