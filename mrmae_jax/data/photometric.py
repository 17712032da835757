"""Random changes of brightness, contrast, saturation and hue, as published recipes of segmentation.

The law is mmsegmentation's PhotoMetricDistortion, with OpenCV's 8-bit HSV in numpy.
"""

from typing import NamedTuple

import numpy as np

BRIGHTNESS = 32.0  # largest change
FACTORS = (0.5, 1.5)  # of contrast and saturation
HUES = 18  # draws from -18 to 17, of 180
_LEVELS = np.arange(256, dtype=np.float32)
_BITS = 12
# Reciprocals as integers, 0 for 0: of the value for the saturation, of the chroma for the hue
_SATURATION, _HUE = (
  np.concatenate([[0], np.rint((top << _BITS) / (unit * np.arange(1, 256)))]).astype(np.int32)
  for top, unit in ((255, 1), (180, 6))
)
# How much the saturation takes from red, green and blue, for each hue: float32 [180]. In a sixth of
# the circle one channel loses nothing (0), one all (1), and one goes from the one to the other.
_SIXTHS = np.arange(180, dtype=np.float32) * np.float32(6 / 180)
_WAY = _SIXTHS - np.floor(_SIXTHS)
_NOTHING, _ALL = np.zeros_like(_WAY), np.ones_like(_WAY)
_LOSSES = tuple(
  np.choose(_SIXTHS.astype(int), losses)
  for losses in (
    (_NOTHING, _WAY, _ALL, _ALL, 1 - _WAY, _NOTHING),
    (1 - _WAY, _NOTHING, _NOTHING, _WAY, _ALL, _ALL),
    (_ALL, _ALL, 1 - _WAY, _NOTHING, _NOTHING, _WAY),
  )
)


class Distortion(NamedTuple):
  """Changes of an image, None for one that is left out.

  Attributes:
    brightness: added to all values.
    contrast: factor of all values.
    saturation: factor of the saturation.
    hue: added to the hue, whose circle has 180 steps.
    contrast_first: change the contrast before saturation and hue, not after them.
  """

  brightness: float | None
  contrast: float | None
  saturation: float | None
  hue: int | None
  contrast_first: bool


def draw_distortion(rng: np.random.Generator) -> Distortion:
  """Draws changes, each with probability one half."""
  is_drawn = rng.random(4) < 0.5
  values = (
    rng.uniform(-BRIGHTNESS, BRIGHTNESS),
    rng.uniform(*FACTORS),
    rng.uniform(*FACTORS),
    int(rng.integers(-HUES, HUES)),
  )
  drawn = (value if keep else None for value, keep in zip(values, is_drawn))
  return Distortion(*drawn, contrast_first=bool(rng.random() < 0.5))


def distort(image: np.ndarray, change: Distortion) -> np.ndarray:
  """Returns a changed RGB image; after each change values are clipped and truncated to integers.

  Args:
    image: uint8 [H, W, 3]; not changed.
    change: what is changed, in the order brightness, contrast, saturation, hue, or contrast last.
  """
  if change.brightness is not None:
    image = _truncate(_LEVELS + np.float32(change.brightness))[image]
  for is_first in (True, False):
    if change.contrast is not None and change.contrast_first == is_first:
      image = _truncate(_LEVELS * np.float32(change.contrast))[image]
    if is_first and change.saturation is not None:
      hue, saturation, value = to_hsv(image)
      saturation = _truncate(_LEVELS * np.float32(change.saturation))[saturation]
      image = to_rgb(hue, saturation, value)
    if is_first and change.hue is not None:
      hue, saturation, value = to_hsv(image)
      shifted = (np.arange(180) + change.hue) % 180
      image = to_rgb(shifted[hue], saturation, value)
  return image


def _truncate(x: np.ndarray) -> np.ndarray:
  return np.clip(x, 0, 255).astype(np.uint8)


def to_hsv(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns hue in 0..179, saturation and value in 0..255 of an image uint8 [H, W, 3]."""
  red, green, blue = np.moveaxis(image, 2, 0).astype(np.int32)
  value = np.maximum(np.maximum(red, green), blue)
  chroma = value - np.minimum(np.minimum(red, green), blue)
  half = 1 << (_BITS - 1)
  saturation = (chroma * _SATURATION[value] + half) >> _BITS
  hue = np.where(
    value == red,
    green - blue,
    np.where(value == green, blue - red + 2 * chroma, red - green + 4 * chroma),
  )
  hue = (hue * _HUE[chroma] + half) >> _BITS
  hue += 180 * (hue < 0)
  return hue, saturation, value


def to_rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
  """Returns uint8 [H, W, 3] of integer arrays [H, W], see `to_hsv`."""
  # OpenCV multiplies by reciprocals, which decides values near an integer.
  shares = _LEVELS * np.float32(1 / 255)
  saturation, value = shares[saturation], shares[value]
  channels = [value * (1 - saturation * loss[hue]) * np.float32(255) for loss in _LOSSES]
  return np.stack(channels, axis=2).astype(np.uint8)
