"""Views of images with objects: large-scale jitter, and boxes and masks that follow it.

The laws are detectron2's (data/transforms/augmentation_impl.py, data/detection_utils.py).
"""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mrmae_jax.boxes import interpolate
from mrmae_jax.data import augment
from mrmae_jax.data.scenes import exif_advice
from mrmae_jax.data.sources import Source, segmentations
from mrmae_jax.data.sources.annotations import MIN_SIDE
from mrmae_jax.data.views import Views
from mrmae_jax.errors import DataError

NO_MASK = "has no segmentation; add masks, or train boxes alone with config.rcnn.masks=False"
MASK_SIDE = 56  # of the masks of a batch, each in the box of its object


class Jitter(NamedTuple):
  """The change of an image: it is mirrored, resized, then cut.

  Attributes:
    old: (height, width) of the image.
    is_mirrored: left and right are exchanged.
    resized: (height, width).
    corner: (top, left) of the part that is shown.
    shown: (height, width) of it.
  """

  old: tuple[int, int]
  is_mirrored: bool
  resized: tuple[int, int]
  corner: tuple[int, int]
  shown: tuple[int, int]

  def image(self, image: np.ndarray, resample=Image.Resampling.BILINEAR) -> np.ndarray:
    """Applies it to uint8 [H, W, C]."""
    image = np.ascontiguousarray(image[:, ::-1]) if self.is_mirrored else image
    if self.resized != self.old:
      image = augment.resize_pillow(image, self.resized, resample)
    (top, left), (height, width) = self.corner, self.shown
    return image[top : top + height, left : left + width]

  def points(self, points: np.ndarray) -> np.ndarray:
    """Applies it to (x, y), float64 [N, 2]; they may come to lie outside of what is shown."""
    factor = np.divide(self.resized, self.old)[::-1]
    x, y = points.T
    moved = np.stack([self.old[1] - x if self.is_mirrored else x, y], axis=-1)
    return moved * factor - self.corner[::-1]


def draw_jitter(
  old: tuple[int, int],
  size: tuple[int, int],
  rng: np.random.Generator,
  scale: tuple[float, float],
  flip: bool,
) -> Jitter:
  """Draws large-scale jitter (arXiv 2012.07177).

  The image is resized to fit into a random multiple of `size`, which is cut at a random place.

  Args:
    old: (height, width) of the image.
    size: (height, width) of the view.
    rng: of all random numbers.
    scale: range of the multiple.
    flip: mirror half of the images.
  """
  is_mirrored = flip and rng.random() < 0.5
  return make_jitter(old, size, is_mirrored, rng.uniform(*scale), rng.random())


def make_jitter(old, size, is_mirrored: bool, scale: float, fraction: float) -> Jitter:
  """Returns the jitter of random numbers; `fraction` is the place of the part, for both axes."""
  factor = min(scale * new / side for new, side in zip(size, old))
  resized = tuple(max(1, round(side * factor)) for side in old)
  corner = tuple(round(max(side - new, 0) * fraction) for side, new in zip(resized, size))
  return Jitter(old, is_mirrored, resized, corner, tuple(map(min, resized, size)))


def fit(old: tuple[int, int], size: tuple[int, int]) -> Jitter:
  """Returns how an image of (height, width) `old` is seen in evaluation: as large as fits."""
  factor = min(new / side for new, side in zip(size, old))
  resized = tuple(max(1, int(side * factor + 0.5)) for side in old)
  return Jitter(old, False, resized, (0, 0), resized)


def move_object(
  box: np.ndarray, segmentation: Any, jitter: Jitter
) -> tuple[np.ndarray, np.ndarray | None]:
  """Returns the box of what is shown of an object, float64 [4], and its mask, bool [H, W].

  The box is that of the mask, if there is one.

  Args:
    box: [4], in the image.
    segmentation: see `Annotations.segmentation`.
    jitter: of the image.
  """
  height, width = jitter.shown
  if segmentation is None:
    corners = jitter.points(box.reshape(2, 2))
    corners = np.clip(corners, 0, (width, height))
    return np.concatenate([corners.min(0), corners.max(0)]), None
  if isinstance(segmentation, list) and isinstance(segmentation[0], list):
    rings = [jitter.points(np.reshape(ring, (-1, 2))) for ring in segmentation]
    mask = segmentations.to_mask([ring.reshape(-1).tolist() for ring in rings], jitter.shown)
    return box_of_polygons(rings, jitter.shown), mask
  whole = segmentations.to_mask(segmentation, jitter.old).astype(np.uint8)[..., None]
  bits = jitter.image(whole, Image.Resampling.NEAREST)[..., 0] > 0
  return segmentations.box_of_masks(bits[None])[0].astype(np.float64), bits


def box_of_polygons(rings: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
  """Returns the box of the part of polygons that lies in an image; zeros without any.

  It is that of the corners, of the crossings with the border, and of the image's own corners that
  lie inside.

  Args:
    rings: float64 [P, 2] each.
    size: (height, width) of the image.
  """
  height, width = size
  points = [_clip_edges(ring, size) for ring in rings]
  frame = np.array([(0, 0), (width, 0), (0, height), (width, height)], np.float64)
  points += [frame[_is_inside(frame, ring)] for ring in rings]
  points = np.concatenate(points)
  return np.concatenate([points.min(0), points.max(0)]) if len(points) else np.zeros(4)


def _clip_edges(ring: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Returns both ends of what each edge of a ring shows of itself in an image, [2 N, 2]."""
  way = np.roll(ring, -1, axis=0) - ring
  first, last = np.zeros(len(ring)), np.ones(len(ring))
  for axis, side in enumerate(size[::-1]):
    parallel = way[:, axis] == 0
    step = np.where(parallel, 1, way[:, axis])
    ends = -ring[:, axis] / step, (side - ring[:, axis]) / step
    is_out = parallel & ((ring[:, axis] < 0) | (ring[:, axis] > side))
    first = np.where(parallel, first, np.maximum(first, np.minimum(*ends)))
    last = np.where(parallel, np.where(is_out, -1, last), np.minimum(last, np.maximum(*ends)))
  shown = first <= last
  ends = [ring[shown] + time[shown, None] * way[shown] for time in (first, last)]
  return np.clip(np.concatenate(ends), 0, size[::-1])


def _is_inside(points: np.ndarray, ring: np.ndarray) -> np.ndarray:
  """Tells which points [N, 2] a ring encloses: a ray to the right crosses it oddly often."""
  x, y = points.T[..., None]
  (x1, y1), (x2, y2) = ring.T, np.roll(ring, -1, axis=0).T
  crosses = (y1 > y) != (y2 > y)
  at = x1 + (y - y1) / np.where(crosses, y2 - y1, 1) * (x2 - x1)
  return (crosses & (at > x)).sum(1) % 2 == 1


def crop_mask(mask: np.ndarray, box: np.ndarray, side: int = MASK_SIDE) -> np.ndarray:
  """Returns the part of a mask bool [H, W] in a box, uint8 [side, side], 255 inside.

  It is ROIAlign's. Of a large box whole pixels are averaged before, to two a cell at least.
  """
  low = np.maximum(np.floor(box[:2]) - 1, 0).astype(int)
  high = np.minimum(np.ceil(box[2:]) + 1, mask.shape[::-1]).astype(int)
  factors = np.maximum((box[2:] - box[:2]) // (2 * side), 1).astype(int)
  part = Image.fromarray(mask[low[1] : high[1], low[0] : high[0]].astype(np.uint8) * 255)
  part = np.asarray(part.reduce(tuple(map(int, factors))), np.float32)
  corners = (box - np.tile(low, 2)) / np.tile(factors, 2)
  for axis in (0, 1):
    start, end, length = corners[1 - axis], corners[3 - axis], part.shape[axis]
    samples = max(1, math.ceil((end - start) / side - 1e-6))
    share = (np.arange(side * samples) + 0.5) / (side * samples)
    places = start + share * (end - start) - 0.5
    pooled = interpolate(part, places, axis)
    is_near = ((places >= -1) & (places <= length)).reshape((-1, 1) if axis == 0 else (1, -1))
    shape = (side, samples, -1) if axis == 0 else (side, side, samples)
    part = (pooled * is_near).reshape(shape).mean(axis + 1)
  return np.rint(part).astype(np.uint8)


def decode_image(example: dict[str, Any], channels: int, exif: str = "ignore") -> np.ndarray:
  """Returns the image of an example with objects, uint8 [H, W, C].

  Raises:
    DataError: it cannot be decoded, or its size is not that of its annotations.
  """
  image = augment.pixels(example, channels, exif)
  check_size(example, image.shape[:2], exif)
  return image


def check_size(example: dict[str, Any], size: tuple[int, int], exif: str = "ignore") -> None:
  """Raises DataError unless the annotations of an example are for an image of its size."""
  height, width = example["objects"].size
  if (height, width) == tuple(size):
    return
  advice = exif_advice(example["image"], size, (height, width), "the annotation", exif)
  advice = advice or "restore the image that was annotated, or correct height and width"
  raise DataError(
    f"{example['name']}: {size[0]} x {size[1]} pixels, annotated as {height} x {width} (image"
    f" {example['id']}); {advice}"
  )


@dataclasses.dataclass(frozen=True)
class DetectionView:
  """A random part of an image and its objects.

  Its rows are {"image": uint8 [H, W, C], zeros beyond "size"; "size": int32 [2], (height, width);
  "boxes": float32 [M, 4] in pixels; "classes": int32 [M], -1 fills up; "masks": uint8 [M,
  MASK_SIDE, MASK_SIDE], each in its box, 255 inside}.

  Attributes:
    image_size: (H, W).
    channels: C.
    max_boxes: M; of more objects the largest are kept.
    scale: see `draw_jitter`.
    flip: mirror half of the images.
    has_masks: whether rows have masks.
    exif: see `augment.decode_image`.
  """

  image_size: tuple[int, int]
  channels: int
  max_boxes: int
  scale: tuple[float, float] = (1.0, 1.0)
  flip: bool = False
  has_masks: bool = True
  exif: str = "ignore"

  def __call__(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    image = decode_image(example, self.channels, self.exif)
    jitter = draw_jitter(image.shape[:2], self.image_size, rng, self.scale, self.flip)
    row = pad_image(jitter.image(image), self.image_size)
    return row | self._objects(example["objects"], jitter)

  def _objects(self, objects: segmentations.Objects, jitter: Jitter) -> dict[str, np.ndarray]:
    kept = []
    for index in np.flatnonzero(objects.is_trained):
      segmentation = objects.segmentations[index] if self.has_masks else None
      if self.has_masks and segmentation is None:
        raise DataError(f"annotation {objects.ids[index]} {NO_MASK}")
      box, mask = move_object(objects.boxes[index], segmentation, jitter)
      sides = box[2:] - box[:2]
      if sides.min() > MIN_SIDE:
        kept.append((sides.prod(), box, objects.classes[index], mask))
    kept = sorted(kept, key=lambda item: -item[0])[: self.max_boxes]
    row = {
      "boxes": np.zeros((self.max_boxes, 4), np.float32),
      "classes": np.full(self.max_boxes, -1, np.int32),
    }
    if self.has_masks:
      row["masks"] = np.zeros((self.max_boxes, MASK_SIDE, MASK_SIDE), np.uint8)
    for i, (_, box, class_, mask) in enumerate(kept):
      row["boxes"][i], row["classes"][i] = box, class_
      if self.has_masks:  # polygons below a pixel fill their box as far as one can see
        row["masks"][i] = crop_mask(mask, box) if mask.any() else 255
    return row


@dataclasses.dataclass(frozen=True)
class WholeView:
  """A whole image, as large as fits: {"image": uint8 [H, W, C], "size": int32 [2]}.

  Attributes:
    image_size: (H, W).
    channels: C.
    exif: see `augment.decode_image`.
  """

  image_size: tuple[int, int]
  channels: int
  exif: str = "ignore"

  def __call__(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    del rng
    image = decode_image(example, self.channels, self.exif)
    return pad_image(fit(image.shape[:2], self.image_size).image(image), self.image_size)


def detection_views(config, has_masks: bool) -> Views:
  """Returns the views of detection, as `config.data` describes them.

  That of evaluation shows whole images, without their objects.

  Args:
    config: of the run.
    has_masks: whether rows of training have masks.

  Raises:
    DataError: masks need pycocotools, which is not installed.
  """
  if has_masks:
    segmentations.load_pycocotools()  # in a loader its absence would be that of an image
  data, size, channels = config.data, tuple(config.image_size), len(config.data.mean)
  train = DetectionView(
    image_size=size,
    channels=channels,
    max_boxes=data.max_boxes,
    scale=tuple(data.scale),
    flip=data.flip,
    has_masks=has_masks,
    exif=data.exif,
  )
  return Views(train, WholeView(size, channels, data.exif))


def check_objects(source: Source, max_boxes: int, has_masks: bool) -> str:
  """Returns a note on images with more objects than a batch holds, "" without any.

  Args:
    source: of images with objects.
    max_boxes: see `DetectionView`.
    has_masks: whether each object needs a mask.

  Raises:
    DataError: objects have none.
  """
  if source.most_objects <= max_boxes and (source.has_all_masks or not has_masks):
    return ""
  images, extra, maskless = 0, 0, []
  for index in range(len(source)):
    objects = source.objects(index)
    trained = np.flatnonzero(objects.is_trained)
    images += len(trained) > max_boxes
    extra += max(len(trained) - max_boxes, 0)
    maskless += [str(objects.ids[i]) for i in trained if objects.segmentations[i] is None]
  if maskless and has_masks:
    more = f" and {len(maskless) - 1} others" if len(maskless) > 1 else ""
    raise DataError(f"{source.description}: annotation {maskless[0]}{more} {NO_MASK}")
  if not extra:
    return ""
  return (
    f"{images} images have more than config.data.max_boxes={max_boxes} objects: the smallest"
    f" {extra} of theirs are not trained on"
  )


def pad_image(image: np.ndarray, size: tuple[int, int]) -> dict[str, np.ndarray]:
  """Returns {"image", "size"}: an image with zeros to its right and below it."""
  padded = np.zeros((*size, image.shape[2]), np.uint8)
  padded[: image.shape[0], : image.shape[1]] = image
  return {"image": padded, "size": np.array(image.shape[:2], np.int32)}
