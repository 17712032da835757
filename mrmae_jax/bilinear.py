"""Bilinear resizing without antialiasing, as matrices for networks and in numpy for images."""

import numpy as np


def bilinear_taps(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns for each of `new` rows the old rows before and after it, and its way to the second.

  Centers are half-pixel, rows beyond the edge repeat it, and nothing is smoothed when it shrinks:
  torch's interpolate with align_corners=False, OpenCV's INTER_LINEAR.
  """
  center = np.maximum((np.arange(new) + 0.5) * old / new - 0.5, 0)
  low = np.minimum(center.astype(int), old - 1)
  return low, np.minimum(low + 1, old - 1), (center - low).astype(np.float32)


def bilinear_matrix(old: int, new: int) -> np.ndarray:
  """Returns float32 [new, old]: new rows as weighted means of old rows; see `bilinear_taps`."""
  low, high, way = bilinear_taps(old, new)
  matrix, rows = np.zeros((new, old), np.float32), np.arange(new)
  matrix[rows, low] = 1 - way
  matrix[rows, high] += way
  return matrix


def fit_size(size: tuple[int, int], short: int, scale: float = 1.0) -> tuple[int, int]:
  """Returns the (height, width) to which an image is resized, its aspect kept.

  It is as large as fits into 4 `short` x `short`, both times `scale`.
  """
  factor = min(int(4 * short * scale) / max(size), int(short * scale) / min(size))
  return tuple(max(1, int(side * factor + 0.5)) for side in size)


def resize_image(
  image: np.ndarray,
  size: tuple[int, int],
  box: tuple[slice, slice] = (slice(None), slice(None)),
) -> np.ndarray:
  """Resizes uint8 [H, W, C] bilinearly without antialiasing, OpenCV's INTER_LINEAR to one level.

  Only a `box` of rows and columns of the result is computed and returned.
  """
  if image.shape[:2] == tuple(size):
    return image[box]
  taps = [
    [x[part] for x in bilinear_taps(old, new)] for old, new, part in zip(image.shape, size, box)
  ]
  x = image[tuple(slice(low[0], high[-1] + 1) for low, high, _ in taps)]
  for axis, (low, high, way) in enumerate(taps):
    way = way.reshape(-1, *(1,) * (2 - axis))
    x = x.take(low - low[0], axis) * (1 - way) + x.take(high - low[0], axis) * way
  return np.rint(x).astype(np.uint8)
