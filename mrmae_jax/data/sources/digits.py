"""The handwritten digits that come with scikit-learn."""

from typing import Any

import numpy as np
from PIL import Image
from sklearn import datasets

from mrmae_jax.data.sources.base import SplitRules, hold_out, holdout_note

SIDE = 32


class DigitsSource:
  """The 1,797 handwritten digits that come with scikit-learn.

  8x8 images with values 0..16, enlarged to 32x32 with Pillow's bicubic filter. Nearest-neighbor
  would make 4x4 blocks of one value: a small patch then has no variance, and the per-patch
  normalized reconstruction target is 0 / 0.
  """

  def __init__(self, split: str, holdout_every: int):
    digits = datasets.load_digits()
    indices = hold_out(len(digits.target), split, holdout_every, "digits")
    small = np.round(digits.images[indices] * (255 / 16)).astype(np.uint8)
    self._images = np.stack(
      [Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for image in small]
    )  # uint8 [N, 32, 32]; __getitem__ makes the three equal channels
    self._labels = digits.target[indices]
    self._indices = indices
    self.class_names = tuple(str(name) for name in digits.target_names)
    self.description = (
      f"digits: {len(self)} images, 10 classes; {holdout_note(split, holdout_every)}"
    )
    self.fingerprint = self.description

  def __len__(self) -> int:
    return len(self._images)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return {
      "image": np.repeat(self._images[index][:, :, None], 3, axis=2),
      "label": int(self._labels[index]),
      "name": self.name(index),
    }

  def name(self, index: int) -> str:
    return f"digits/{self._indices[index]:04d}"


def make_source(address: str, split: str, rules: SplitRules) -> DigitsSource:
  del address
  return DigitsSource(split, rules.holdout_every)
