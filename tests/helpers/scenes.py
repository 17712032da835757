"""Scenes for tests: a few colored squares on a ground."""

import numpy as np

from tests.helpers.images import photo


class Squares:
  """A source of scenes of many sizes; the class of a pixel is the color of its square.

  The first rows of each scene are not labelled.
  """

  class_names = ("ground", "red", "green", "blue")

  def __init__(self, count, seed=0, sizes=(30, 60)):
    self._scenes = [self._draw(np.random.default_rng((seed, i)), sizes) for i in range(count)]
    self.description = self.fingerprint = f"squares: {count} scenes"

  def _draw(self, rng, sizes):
    height, width = rng.integers(*sizes, 2)
    image, label = photo(height, width, int(rng.integers(99))) // 2, np.zeros((height, width), int)
    for _ in range(3):
      color, top, left = rng.integers(3), rng.integers(height - 12), rng.integers(width - 12)
      image[top : top + 12, left : left + 12] = 0
      image[top : top + 12, left : left + 12, color] = 250
      label[top : top + 12, left : left + 12] = color + 1
    label[:2] = 255
    return image, label.astype(np.uint8)

  def __len__(self):
    return len(self._scenes)

  def __getitem__(self, index):
    image, label = self._scenes[index]
    return {"image": image, "label": label, "name": self.name(index), "label_name": ""}

  def name(self, index):
    return f"squares/{index}"
