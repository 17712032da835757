"""Objects of an image, and their masks in COCO's forms; pycocotools is here and in the measure."""

from typing import Any, NamedTuple

import numpy as np

from mrmae_jax.errors import DataError


class Objects(NamedTuple):
  """The annotations of an image.

  Attributes:
    size: (height, width) of the image.
    ids: int64 [N], of the annotations.
    boxes: float64 [N, 4], (x1, y1, x2, y2) in pixels.
    classes: int32 [N].
    is_crowd: bool [N], regions of many objects.
    is_trained: bool [N], others, whose box has a size inside of the image.
    areas: float64 [N], in pixels; nan where it is not given.
    segmentations: of each, see `Annotations.segmentation`.
  """

  size: tuple[int, int]
  ids: np.ndarray
  boxes: np.ndarray
  classes: np.ndarray
  is_crowd: np.ndarray
  is_trained: np.ndarray
  areas: np.ndarray
  segmentations: tuple[Any, ...]


def load_pycocotools():
  """Returns the module pycocotools.mask.

  Raises:
    DataError: it is not installed.
  """
  try:
    from pycocotools import mask
  except ImportError as error:
    raise DataError(
      f'masks and COCO\'s measures need pycocotools ({error}): pip install "mrmae_jax[detect]"'
    ) from error
  return mask


def to_rle(segmentation: Any, size: tuple[int, int]) -> dict[str, Any]:
  """Returns the compressed RLE of a mask.

  Args:
    segmentation: see `Annotations.segmentation`; it was checked when it was read.
    size: (height, width) of the image.
  """
  mask = load_pycocotools()
  if isinstance(segmentation, str):
    return {"size": list(size), "counts": segmentation.encode()}
  if segmentation and isinstance(segmentation[0], list):
    return mask.merge(mask.frPyObjects(segmentation, *size))
  return mask.frPyObjects({"size": list(size), "counts": segmentation}, *size)


def to_mask(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
  """Returns the pixels of a mask, bool [H, W]; see `to_rle`."""
  return load_pycocotools().decode(to_rle(segmentation, size)).astype(bool)


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
  """Returns the RLE of a mask bool [H, W] as COCO's files have it, its counts as text."""
  rle = load_pycocotools().encode(np.asfortranarray(mask, np.uint8))
  return {"size": list(mask.shape), "counts": rle["counts"].decode()}


def box_of_masks(masks: np.ndarray) -> np.ndarray:
  """Returns the boxes of masks bool [N, H, W], float32 [N, 4]; zeros for empty ones.

  The last pixel is inside: a mask of one pixel has a box of side 1.
  """
  ends = []
  for axis in (1, 2):  # of columns, then of rows
    lines = masks.any(axis)
    length = lines.shape[1]
    first, last = lines.argmax(1), length - lines[:, ::-1].argmax(1)
    ends.append(np.where(lines.any(1), [first, last], 0))
  (left, right), (top, bottom) = ends
  return np.stack([left, top, right, bottom], axis=-1).astype(np.float32)
