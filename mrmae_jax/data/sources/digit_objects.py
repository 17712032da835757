"""Pictures of scattered handwritten digits, which come with scikit-learn, as objects."""

from typing import Any

import numpy as np

from mrmae_jax.data.sources.annotations import encode_mask
from mrmae_jax.data.sources.base import SplitRules, describe_classes, holdout_note
from mrmae_jax.data.sources.digit_scenes import DIGIT_SCENES, Drawing, draw_digits
from mrmae_jax.data.sources.digits import DigitsSource
from mrmae_jax.data.sources.segmentations import Objects, box_of_masks

SCATTERED = Drawing(  # digits as those that the demo has pre-trained
  sides=(64,),
  digits=(2, 12),
  digit_sides=(26, 36),
  ground=(0, 60),
  noise=(2, 8),
  inks=((180, 255),),
)


class DigitObjects:
  """Scattered handwritten digits, each an object with its exact box and mask."""

  most_objects, has_all_masks = SCATTERED.digits[1], True

  def __init__(self, split: str, holdout_every: int):
    self._digits, self._split = DigitsSource(split, holdout_every), split
    self.class_names = self._digits.class_names
    self.category_ids = tuple(range(1, len(self.class_names) + 1))
    self.description = (
      f"coco:digits: {len(self)} images of {len(self._digits)} scattered digits,"
      f" {describe_classes(self.class_names)}; {holdout_note(split, holdout_every)}"
    )
    self.fingerprint = self.description

  def __len__(self) -> int:
    return DIGIT_SCENES[self._split]

  def __getitem__(self, index: int) -> dict[str, Any]:
    image, _ = self._draw(index)
    example = {"image": image, "label": -1, "name": self.name(index)}
    return example | {"id": self.image_id(index), "objects": self.objects(index)}

  def _draw(self, index: int):
    return draw_digits(self._digits, self._split, index, SCATTERED)

  def objects(self, index: int) -> Objects:
    """Returns the digits of scene `index`."""
    image, digits = self._draw(index)
    masks = np.array([mask for _, mask in digits], bool).reshape(-1, *image.shape[:2])
    return Objects(
      image.shape[:2],
      np.arange(1, len(digits) + 1) + 100 * index,
      box_of_masks(masks).astype(np.float64),
      np.array([digit for digit, _ in digits], np.int32),
      np.zeros(len(digits), bool),
      np.ones(len(digits), bool),
      masks.sum((1, 2)).astype(np.float64),
      tuple(map(encode_mask, masks)),
    )

  def image_id(self, index: int) -> int:
    return index + 1

  def name(self, index: int) -> str:
    return f"digits/{self._split}_{index:04d}"


def make_source(address: str, split: str, rules: SplitRules) -> DigitObjects:
  """Opens a split of coco:digits."""
  del address
  return DigitObjects(split, rules.holdout_every)
