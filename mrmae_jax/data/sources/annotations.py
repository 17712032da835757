"""Reads the annotations of COCO's JSON files, and checks every value before anything uses it.

Nothing here needs pycocotools, whose C code trusts what it is given.
"""

import collections
import functools
import json
import math
import os
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from mrmae_jax.data.augment import MAX_PIXELS
from mrmae_jax.data.sources.archive import open_file
from mrmae_jax.errors import DataError

KEYS = ("images", "annotations", "categories")
MIN_SIDE = 1e-5  # of a box in pixels; what is smaller cannot be learned
MAX_OUTSIDE = 0.2  # share of boxes beyond their image, above which they are no x, y, width, height
NO_MASK = b"null"
MAX_NAMES = 3  # that a message lists
COUNT_DIGITS = 7  # of a run in a compressed string: 35 bits


class Annotations(NamedTuple):
  """Images and their objects, as arrays: a million dictionaries would fill each worker's memory.

  Attributes:
    image_ids: int64 [I], ascending.
    file_names: of the images.
    sizes: int64 [I, 2], (height, width).
    category_ids: ascending; the class of an object is the place of its category here.
    class_names: of the categories.
    starts: int64 [I + 1]; the objects of image i are starts[i] to starts[i + 1].
    ids: int64 [A], of the objects.
    boxes: float64 [A, 4], (x1, y1, x2, y2).
    areas: float64 [A], nan where it is not given.
    classes: int32 [A].
    is_crowd: bool [A], a region of many objects.
    is_usable: bool [A], whether a box has a size and lies in its image.
    has_mask: bool [A].
    segments: JSON of all segmentations, one after the other, see `segmentation`.
    segment_starts: int64 [A + 1], their places.
    note: which annotations were dropped, "" for none.
  """

  image_ids: np.ndarray
  file_names: tuple[str, ...]
  sizes: np.ndarray
  category_ids: tuple[int, ...]
  class_names: tuple[str, ...]
  starts: np.ndarray
  ids: np.ndarray
  boxes: np.ndarray
  areas: np.ndarray
  classes: np.ndarray
  is_crowd: np.ndarray
  is_usable: np.ndarray
  has_mask: np.ndarray
  segments: bytes
  segment_starts: np.ndarray
  note: str

  @property
  def is_trained(self) -> np.ndarray:
    """Tells which objects are learned, bool [A]; all of them are measured."""
    return self.is_usable & ~self.is_crowd

  def segmentation(self, index: int) -> Any:
    """Returns the mask of an object: polygons, the counts of an RLE, or None.

    Polygons are a list of [x0, y0, x1, y1, ...]. Counts are a list of run lengths or COCO's
    compressed string.
    """
    start, end = self.segment_starts[index : index + 2]
    return json.loads(self.segments[start:end])


def read_annotations(path: str, max_dropped: float) -> Annotations:
  """Reads a file of annotations, once a process.

  Args:
    path: of the file, on disk or in an archive.
    max_dropped: largest share of annotations that cannot be used.

  Raises:
    DataError: the file is not COCO's, contradicts itself, or too many annotations are unusable.
  """
  modified = os.stat(path).st_mtime_ns if os.path.isfile(path) else 0
  return _read(path, max_dropped, modified)


@functools.lru_cache(maxsize=2)  # of training and of evaluation; a run asks half a dozen times
def _read(path: str, max_dropped: float, modified: int) -> Annotations:
  del modified  # a file that was written anew is another one
  document = _parse(path)
  images = _read_images(document["images"], path)
  category_ids, class_names = _read_categories(document["categories"], path)
  rows = _read_objects(document["annotations"], images, category_ids, path)
  _check_boxes(rows, images, path)
  rows, note = _drop(rows, max_dropped, path)
  rows.sort(key=lambda row: (row.image, row.id))
  per_image = np.bincount([row.image for row in rows], minlength=len(images))
  starts = lambda lengths: np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
  column = lambda name, dtype: np.array([getattr(row, name) for row in rows], dtype)
  return Annotations(
    np.array([image.id for image in images], np.int64),
    tuple(image.file_name for image in images),
    np.array([image.size for image in images], np.int64).reshape(-1, 2),
    category_ids,
    class_names,
    starts(per_image),
    column("id", np.int64),
    column("box", np.float64).reshape(-1, 4),
    column("area", np.float64),
    column("class_", np.int32),
    column("is_crowd", bool),
    column("is_usable", bool),
    np.array([row.segment != NO_MASK for row in rows], bool),
    b"".join(row.segment for row in rows),
    starts([len(row.segment) for row in rows]),
    note,
  )


def _parse(path: str) -> dict[str, list]:
  """Returns the document of a file; each of KEYS is a list of dictionaries."""
  try:
    with open_file(path) as file:
      document = json.load(file)
  except (OSError, ValueError, RecursionError) as error:
    raise DataError(f"{path}: cannot be read as JSON ({error}); replace it") from error
  expected = f"expected COCO's annotations, an object with the lists {', '.join(KEYS)}"
  if not isinstance(document, dict):
    first = document[0] if isinstance(document, list) and document else None
    is_result = isinstance(first, dict) and "score" in first
    hint = " that looks like results of a detector" if is_result else ""
    raise DataError(f"{path}: is a {type(document).__name__}{hint}; {expected}")
  missing = [key for key in KEYS if not isinstance(document.get(key), list)]
  if missing:
    keys = ", ".join(map(str, document)) or "none"
    raise DataError(
      f"{path}: no list {', '.join(missing)}; found the keys {keys[:200]}; {expected}"
    )
  for key in KEYS:
    for i, row in enumerate(document[key]):
      if not isinstance(row, dict):
        raise DataError(f"{path}: entry {i} of {key} is {row!r:.50}; expected an object")
  return document


class _Image(NamedTuple):
  id: int
  file_name: str
  size: tuple[int, int]


def _read_images(rows: list[dict], path: str) -> list[_Image]:
  """Returns the images by ascending id."""
  images = []
  for row in rows:
    image_id, name = _id(row, "id", "an image", path), row.get("file_name")
    size = row.get("height"), row.get("width")
    if not isinstance(name, str) or not name:
      raise DataError(f"{path}: image {image_id} has file_name={name!r:.50}; expected a text")
    parts = name.replace("\\", "/").split("/")
    if os.path.isabs(name) or ".." in parts:
      raise DataError(
        f"{path}: image {image_id} has file_name={name!r}; expected a path below the images' folder"
      )
    if not all(type(side) is int and side > 0 for side in size) or math.prod(size) > MAX_PIXELS:
      raise DataError(
        f"{path}: image {image_id} has height={size[0]!r:.20}, width={size[1]!r:.20}; expected"
        f" whole numbers of pixels, at most {MAX_PIXELS:,} in all"
      )
    images.append(_Image(image_id, os.path.normpath("/".join(parts)), size))
  _check_unique((image.id for image in images), "images", path)
  return sorted(images)


def _read_categories(rows: list[dict], path: str) -> tuple[tuple[int, ...], tuple[str, ...]]:
  """Returns ids and names by ascending id."""
  names = {}
  for row in rows:
    category_id, name = _id(row, "id", "a category", path), row.get("name")
    if not isinstance(name, str) or not name:
      raise DataError(f"{path}: category {category_id} has name={name!r:.50}; expected a text")
    names[category_id] = name
  _check_unique((row["id"] for row in rows), "categories", path)
  if not names:
    raise DataError(f"{path}: no categories; expected at least one, {{'id': 1, 'name': 'cat'}}")
  twice = [name for name, count in collections.Counter(names.values()).items() if count > 1]
  if twice:
    raise DataError(f"{path}: several categories are called {twice[0]!r}; rename or merge them")
  category_ids = tuple(sorted(names))
  return category_ids, tuple(names[x] for x in category_ids)


def _id(row: dict, key: str, kind: str, path: str) -> int:
  value = row.get(key)
  if type(value) is not int or abs(value) >= 2**63:
    raise DataError(f"{path}: {kind} has {key}={value!r:.50}; expected a whole number")
  return value


def _check_unique(ids: Iterable[int], kind: str, path: str) -> None:
  twice = [x for x, count in collections.Counter(ids).items() if count > 1]
  if twice:
    raise DataError(
      f"{path}: {len(twice)} ids of {kind} stand there twice: {_first(twice)}; expected another id"
      " for each"
    )


def _first(values: list) -> str:
  more = f" and {len(values) - MAX_NAMES} more" if len(values) > MAX_NAMES else ""
  return ", ".join(map(str, values[:MAX_NAMES])) + more


class _Object(NamedTuple):
  """An annotation; `image` and `class_` are places, `problem` says why it is not used."""

  id: int
  image: int
  class_: int
  box: tuple[float, ...]
  area: float
  is_crowd: bool
  is_usable: bool
  segment: bytes
  problem: str


def _read_objects(rows, images: list[_Image], category_ids, path: str) -> list[_Object]:
  """Returns the annotations of images and categories that exist.

  Raises:
    DataError: one belongs to another image or category.
  """
  _check_unique((_id(row, "id", "an annotation", path) for row in rows), "annotations", path)
  places = {
    "image_id": {image.id: i for i, image in enumerate(images)},
    "category_id": {x: i for i, x in enumerate(category_ids)},
  }
  for key, known in places.items():
    kind = f"annotation without {key}"
    strangers = [row["id"] for row in rows if _id(row, key, kind, path) not in known]
    if strangers:
      values = sorted({row[key] for row in rows} - known.keys())
      raise DataError(
        f"{path}: {len(strangers)} annotations have an unknown {key}: {_first(values)} (annotations"
        f" {_first(strangers)}); add what has this id, or remove the annotations"
      )
  return [
    _read_object(
      row, places["image_id"][row["image_id"]], places["category_id"][row["category_id"]], images
    )
    for row in rows
  ]


def _read_object(row: dict, image: int, class_: int, images: list[_Image]) -> _Object:
  height, width = size = images[image].size
  numbers = _numbers(row.get("bbox"))
  crowd, problem, is_usable = row.get("iscrowd", 0), "", True
  area = _numbers([row.get("area")])
  segment, is_valid_mask = _read_segmentation(row.get("segmentation"), size)
  if numbers is None or len(numbers) != 4 or min(numbers[2:]) < 0 or max(abs(numbers)) > MAX_PIXELS:
    problem, numbers = "the box is not x, y, width, height", np.zeros(4)
  elif crowd not in (0, 1):
    problem = "iscrowd is neither 0 nor 1"
  elif not is_valid_mask:
    problem = f"the segmentation is {segment}"
  x, y, w, h = map(float, numbers)
  if not problem:
    inside = min(x + w, width) - max(x, 0), min(y + h, height) - max(y, 0)
    is_usable = min(inside) > MIN_SIDE
  return _Object(
    row["id"],
    image,
    class_,
    (x, y, x + w, y + h),
    math.nan if area is None or area[0] < 0 else float(area[0]),
    bool(crowd) if not problem else False,
    is_usable,
    segment.encode() if is_valid_mask else b"",
    problem,
  )


def _numbers(values: Any) -> np.ndarray | None:
  """Returns a list of finite numbers as float64, None for anything else."""
  if not isinstance(values, list) or not set(map(type, values)) <= {int, float}:
    return None
  try:
    numbers = np.array(values, np.float64)
  except OverflowError:
    return None
  return numbers if np.isfinite(numbers).all() else None


def _read_segmentation(value: Any, size: tuple[int, int]) -> tuple[str, bool]:
  """Returns (JSON of what `Annotations.segmentation` gives, True) or (why not, False)."""
  if not value:
    return NO_MASK.decode(), True
  if isinstance(value, dict):
    try:
      counts = check_rle(value, size)
    except ValueError as error:
      return str(error), False
    return json.dumps(counts, separators=(",", ":")), True
  if not isinstance(value, list):
    return "neither polygons nor an RLE", False
  polygons = [ring for ring in value if _is_polygon(ring, size)]
  if not polygons:
    return "not polygons of at least 3 points", False
  return json.dumps(polygons, separators=(",", ":")), True


def _is_polygon(ring: Any, size: tuple[int, int]) -> bool:
  """Tells a ring of at least 3 points, none further away than the image is large.

  pycocotools takes memory for the way from point to point.
  """
  numbers = _numbers(ring)
  if numbers is None or len(numbers) < 6 or len(numbers) % 2:
    return False
  height, width = size
  points = numbers.reshape(-1, 2) / (width, height)
  return bool(np.abs(points - 0.5).max() <= 1.5)


def check_rle(rle: dict, size: tuple[int, int]) -> str | list[int]:
  """Returns the counts of a run-length encoded mask that pycocotools may be given.

  Args:
    rle: {"size": [height, width], "counts": list or compressed string}.
    size: (height, width) of the image.

  Raises:
    ValueError: why it is not a mask of this size.
  """
  text, counts = rle.get("counts"), rle.get("counts")
  if rle.get("size") != list(size):
    raise ValueError(f"an RLE of size {rle.get('size')!r:.30}, its image is {list(size)}")
  if isinstance(text, str):
    counts = parse_counts(text)
  elif not isinstance(counts, list) or not all(type(x) is int for x in counts):
    raise ValueError("an RLE whose counts are neither a text nor whole numbers")
  if not len(counts) or min(counts) < 0 or max(counts) > math.prod(size):
    raise ValueError("an RLE with runs that do not fit into its image")
  counts = np.asarray(counts, np.int64)
  if counts.sum() != math.prod(size):
    raise ValueError(f"an RLE of {counts.sum()} pixels, its image has {math.prod(size)}")
  if isinstance(text, str) and counts[1:].all():
    return text
  return _without_empty_runs(counts).tolist()


def parse_counts(text: str) -> np.ndarray:
  """Returns the run lengths in COCO's compressed string, int64.

  Each character holds 5 bits and whether more follow, the sign last; from the fourth run on it is
  the difference to the run two places before.

  Raises:
    ValueError: the string is cut off or was not written like this.
  """
  if not text.isascii() or not text:
    raise ValueError("an RLE whose text is empty or not ASCII")
  codes = np.frombuffer(text.encode(), np.uint8).astype(np.int64) - 48
  is_last = codes < 32
  if codes.min() < 0 or codes.max() > 63 or not is_last[-1]:
    raise ValueError("an RLE whose text is damaged or cut off")
  ends = np.flatnonzero(is_last)
  begins = np.concatenate([[0], ends[:-1] + 1])
  lengths = ends - begins + 1
  if lengths.max() > COUNT_DIGITS:
    raise ValueError("an RLE whose text has a run that is too long")
  digit = np.arange(len(codes)) - np.repeat(begins, lengths)
  values = np.add.reduceat((codes & 31) << (5 * digit), begins)
  values -= np.where(codes[ends] & 16, 1 << (5 * lengths), 0)
  values[1::2] = np.cumsum(values[1::2])
  values[2::2] = np.cumsum(values[2::2])
  return values


def _without_empty_runs(counts: np.ndarray) -> np.ndarray:
  """Joins runs that only an empty one separates; the first one, of zeros, may be empty."""
  bits = np.arange(len(counts)) % 2
  bits, counts = bits[counts > 0], counts[counts > 0]
  starts = np.flatnonzero(np.concatenate([[True], bits[1:] != bits[:-1]]))
  return np.concatenate([[0] * int(bits[0]), np.add.reduceat(counts, starts)]).astype(np.int64)


def encode_mask(mask: np.ndarray) -> list[int]:
  """Returns the run lengths of a mask bool [H, W], down its columns and zeros first."""
  flat = np.concatenate([[False], mask.T.reshape(-1)])
  changes = np.flatnonzero(flat[1:] != flat[:-1])
  return np.diff(np.concatenate([[0], changes, [mask.size]])).tolist()


def _check_boxes(rows: list[_Object], images: list[_Image], path: str) -> None:
  """Raises DataError if the boxes are no x, y, width and height in pixels."""
  readable = [row for row in rows if not row.problem]
  if not readable:
    return
  corners = np.array([row.box for row in readable])
  sizes = np.array([images[row.image].size[::-1] for row in readable])
  is_outside = (corners[:, 2:] > sizes + 1).any(1)
  expected = "expected x, y, width, height in pixels"
  if corners.max() <= 1 and sizes.min() > 1:
    raise DataError(f"{path}: no box reaches beyond 1, as if sides were 1 long; {expected}")
  if is_outside.mean() > MAX_OUTSIDE:
    first = _first([row.id for row, outside in zip(readable, is_outside) if outside])
    raise DataError(
      f"{path}: {is_outside.mean():.0%} of the boxes end outside of their image (annotations"
      f" {first}), which looks like x1, y1, x2, y2, or like images whose height and width are"
      f" exchanged; {expected}"
    )


def _drop(rows: list[_Object], max_dropped: float, path: str) -> tuple[list[_Object], str]:
  """Returns the annotations without those that cannot be read, and a note on unusable ones.

  Raises:
    DataError: more than `max_dropped` of them are unusable.
  """
  by_problem = collections.defaultdict(list)
  for row in rows:
    problem = row.problem or ("" if row.is_usable else "the box has no size inside of its image")
    if problem:
      by_problem[problem].append(row.id)
  count = sum(map(len, by_problem.values()))
  worst = sorted(by_problem.items(), key=lambda item: -len(item[1]))
  causes = [f"{len(ids)}: {problem} (annotation {_first(ids)})" for problem, ids in worst]
  note = f"{count} of {len(rows)} annotations are not used: {'; '.join(causes[:MAX_NAMES])}"
  if count > max_dropped * len(rows):
    raise DataError(
      f"{path}: {note}; expected at most the share config.data.max_skipped={max_dropped:g}; correct"
      " the file, or raise the share"
    )
  return [row for row in rows if not row.problem], note if count else ""
