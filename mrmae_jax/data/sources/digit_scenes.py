"""Scenes that are drawn of the handwritten digits, which come with scikit-learn."""

from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mrmae_jax.data.sources.base import SplitRules, describe_classes, holdout_note
from mrmae_jax.data.sources.digits import DigitsSource
from mrmae_jax.data.sources.scenes import to_classes

DIGIT_SCENES = {"train": 2000, "eval": 200}
INK = 0.3  # a pixel belongs to a digit from this share of its color on


class Drawing(NamedTuple):
  """How scenes of digits look; ranges are (lowest, highest).

  Attributes:
    sides: lengths that a side of a scene may have.
    digits: how many are tried; one that is too near to another is left out.
    digit_sides: their size in pixels.
    ground: values of the ground's channels.
    noise: its standard deviation.
    inks: ranges of the values of a digit's channels, one of which is drawn.
  """

  sides: tuple[int, ...]
  digits: tuple[int, int]
  digit_sides: tuple[int, int]
  ground: tuple[int, int]
  noise: tuple[int, int]
  inks: tuple[tuple[int, int], ...]


SCENES = Drawing(  # one digit, as large as those that the demo has pre-trained
  sides=(32,),
  digits=(1, 1),
  digit_sides=(24, 32),
  ground=(0, 99),
  noise=(2, 10),
  inks=((180, 255),),
)


class DigitScenes:
  """Scenes of handwritten digits on textured grounds; the digits of the splits are different ones.

  Scene `index` of a split is always the same. In its label 0 is the ground, d + 1 the digit d.
  """

  def __init__(self, split: str, holdout_every: int, zero_is_unlabelled: bool | None):
    """Chooses the digits; see `read_label`. With `zero_is_unlabelled` None there are no labels."""
    self._digits = DigitsSource(split, holdout_every)
    self._split, self._zero_is_unlabelled = split, zero_is_unlabelled
    names = ("ground", *self._digits.class_names)
    self.class_names = () if zero_is_unlabelled is None else names[zero_is_unlabelled:]
    self.description = (
      f"scenes:digits: {len(self)} scenes of {len(self._digits)} digits,"
      f" {describe_classes(self.class_names)}; {holdout_note(split, holdout_every)}"
    )
    self.fingerprint = self.description

  def __len__(self) -> int:
    return DIGIT_SCENES[self._split]

  def __getitem__(self, index: int) -> dict[str, Any]:
    image, digits = draw_digits(self._digits, self._split, index, SCENES)
    name = self.name(index)
    example = {"image": image, "label": -1, "name": name}
    if self._zero_is_unlabelled is None:
      return example
    stored = np.zeros(image.shape[:2], np.uint8)
    for digit, mask in digits:
      stored[mask] = digit + 1
    label = to_classes(stored, name, len(self.class_names), self._zero_is_unlabelled)
    return example | {"label": label, "label_name": f"label of {name}"}

  def name(self, index: int) -> str:
    return f"digits/{self._split}_{index:04d}"


def draw_digits(
  digits: DigitsSource, split: str, index: int, drawing: Drawing
) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
  """Draws the scene `index` of a split.

  Returns:
    The image, uint8 [H, W, 3], and of each digit in it the number and the pixels, bool [H, W].
  """
  rng = np.random.default_rng((list(DIGIT_SCENES).index(split), index))
  image, drawn = _draw_ground(rng, drawing), []
  is_taken = np.zeros(image.shape[:2], bool)
  for _ in range(rng.integers(*drawing.digits, endpoint=True)):
    example = digits[int(rng.integers(len(digits)))]
    mask = _draw_digit(example, image, is_taken, rng, drawing)
    is_taken |= mask
    if mask.any():
      drawn.append((example["label"], mask))
  return image, drawn


def _draw_ground(rng: np.random.Generator, drawing: Drawing) -> np.ndarray:
  """Returns blotches of color under noise, uint8 [H, W, 3]."""
  height, width = rng.choice(drawing.sides, 2)
  low, high = drawing.ground
  coarse = Image.fromarray(rng.integers(low, high + 1, (4, 4, 3), dtype=np.uint8))
  blotches = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
  noise = rng.normal(0, rng.uniform(*drawing.noise), blotches.shape)
  return np.clip(blotches + noise, 0, 255).astype(np.uint8)


def _draw_digit(
  example, image: np.ndarray, is_taken: np.ndarray, rng: np.random.Generator, drawing: Drawing
) -> np.ndarray:
  """Draws a digit where no other is near; returns its pixels, bool [H, W]."""
  side = int(rng.integers(*drawing.digit_sides, endpoint=True))
  top, left = (int(rng.integers(length - side + 1)) for length in is_taken.shape)
  box = slice(top, top + side), slice(left, left + side)
  low, high = drawing.inks[rng.integers(len(drawing.inks))]
  ink = rng.integers(low, high + 1, 3)
  glyph = Image.fromarray(example["image"][:, :, 0])
  share = np.asarray(glyph.resize((side, side), Image.Resampling.BICUBIC)) / 255
  mask = np.zeros_like(is_taken)
  mask[box] = share >= INK
  rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
  if is_taken[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].any():
    return np.zeros_like(is_taken)
  image[box] = image[box] * (1 - share[..., None]) + ink * share[..., None]
  return mask


def make_source(address: str, split: str, rules: SplitRules) -> DigitScenes:
  """Opens a split of scenes:digits."""
  del address
  return DigitScenes(split, rules.holdout_every, rules.zero_is_unlabelled)
