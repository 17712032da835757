"""Views of scenes: an image and the class of every pixel, resized, cropped and mirrored together.

The laws are mmsegmentation's (datasets/pipelines/transforms.py).
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from mrmae_jax.bilinear import fit_size, resize_image
from mrmae_jax.constants import IGNORED
from mrmae_jax.data import augment, photometric
from mrmae_jax.data.sources import Source
from mrmae_jax.data.sources.listing import first_names
from mrmae_jax.data.views import Views
from mrmae_jax.errors import DataError

CROP_TRIES = 10  # the box after these is taken unseen
COUNT = 100  # labels that `describe_labels` reads
MAX_SHARES = 20  # that it lists


def decode_scene(
  example: dict[str, Any], channels: int, exif: str = "ignore"
) -> tuple[np.ndarray, np.ndarray]:
  """Returns an image uint8 [H, W, C] and its label uint8 [H, W], 255 for ignored pixels.

  Args:
    example: of a source of scenes.
    channels: C; see `augment.with_channels`.
    exif: see `augment.decode_image`; labels are not turned.

  Raises:
    DataError: the image cannot be decoded, or the label has another size.
  """
  image = augment.pixels(example, channels, exif)
  check_size(example, image.shape[:2], exif)
  return image, example["label"]


def check_size(example: dict[str, Any], size: tuple[int, int], exif: str = "ignore") -> None:
  """Raises DataError unless the label of an example has the (height, width) of its image."""
  height, width = example["label"].shape
  if (height, width) == tuple(size):
    return
  advice = exif_advice(example["image"], size, (height, width), "the label", exif)
  advice = advice or "write the label again at the size of its image, or remove both"
  raise DataError(
    f"{example['label_name']}: {height} x {width}, its image is {size[0]} x {size[1]}; {advice}"
  )


def exif_advice(
  image, size: tuple[int, int], expected: tuple[int, int], kind: str, exif: str
) -> str:
  """Returns what to do if an image was turned by its EXIF and `kind` not, or the reverse, or "".

  Args:
    image: of an example.
    size: (height, width) that it was decoded to.
    expected: (height, width) that `kind` has.
    kind: "the label", for the message.
    exif: see `augment.decode_image`.
  """
  is_turned = tuple(size) == tuple(expected)[::-1] and augment.orientation_of(image) > 4
  if not is_turned:
    return ""
  if exif == "apply":
    return f"{kind} is as the image is stored, without its EXIF: set config.data.exif=ignore"
  return f"{kind} is upright and the image is turned by its EXIF: set config.data.exif=apply"


@dataclasses.dataclass(frozen=True)
class SceneView:
  """A random part of a scene: {"image": uint8 [H, W, C], "label": uint8 [H, W]}.

  What lies beyond the scene is the mean pixel, and is ignored.

  Attributes:
    size: (H, W).
    mean: of pixels in [0, 1], one per channel.
    scale: range of the sizes of the scene, relative to that of the evaluation, see `fit_size`.
    max_share: largest share of one class in a crop, see `choose_corner`.
    flip: mirror half of the scenes.
    photometric: change colors, see `photometric.distort`.
    resize: "pillow" or "cv2", whose rules of nearest neighbors differ by a fraction of a pixel.
    exif: see `augment.decode_image`.
  """

  size: tuple[int, int]
  mean: tuple[float, ...]
  scale: tuple[float, float] = (1.0, 1.0)
  max_share: float = 1.0
  flip: bool = False
  photometric: bool = False
  resize: str = "pillow"
  exif: str = "ignore"

  def __call__(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    image, label = decode_scene(example, len(self.mean), self.exif)
    size = fit_size(label.shape, min(self.size), rng.uniform(*self.scale))
    label = resize_label(label, size, self.resize)
    top, left = choose_corner(label, self.size, self.max_share, _draw_corners(size, self.size, rng))
    box = slice(top, top + self.size[0]), slice(left, left + self.size[1])
    label, image = label[box], _resize(image, size, box, self.resize)
    if self.flip and rng.random() < 0.5:
      image, label = image[:, ::-1], label[:, ::-1]
    if self.photometric:
      image = photometric.distort(image, photometric.draw_distortion(rng))
    inside = tuple(slice(side) for side in label.shape)
    padded = {
      "image": np.empty((*self.size, len(self.mean)), np.uint8),
      "label": np.full(self.size, IGNORED, np.uint8),
    }
    padded["image"][:] = np.rint(255 * np.asarray(self.mean))
    padded["image"][inside], padded["label"][inside] = image, label
    return padded


def scene_views(config) -> Views:
  """Returns the views of segmentation, as `config.data` describes them.

  That of evaluation shows a part of the scene at the size of evaluation, always the same one. A
  measurement needs whole scenes, see `decode_scene`.

  Raises:
    DataError: a value that does not fit.
  """
  data, mean = config.data, tuple(config.data.mean)
  augment.resizer(data.resize)
  if data.photometric and len(mean) != 3:
    raise DataError(
      f"photometric=True given; images of {len(mean)} channels have no hue: set photometric=False"
    )
  train = SceneView(
    size=tuple(config.image_size),
    mean=mean,
    scale=tuple(data.scale),
    max_share=data.max_share,
    flip=data.flip,
    photometric=data.photometric,
    resize=data.resize,
    exif=data.exif,
  )
  calm = dict(scale=(1.0, 1.0), max_share=1.0, flip=False, photometric=False)
  return Views(train, dataclasses.replace(train, **calm))


def choose_corner(
  label: np.ndarray,
  size: tuple[int, int],
  max_share: float,
  corners: Iterator[tuple[int, int]],
) -> tuple[int, int]:
  """Returns the upper left corner of a crop that shows more than one class.

  It is the first of `corners` whose crop has several classes, the largest with less than
  `max_share` of the labelled pixels; or else the eleventh. With `max_share` 1 it is the first.

  Args:
    label: uint8 [H, W].
    size: (height, width) of the crop; a smaller label is taken whole.
    max_share: in (0, 1].
    corners: (top, left), drawn at random.
  """
  for _ in range(CROP_TRIES if max_share < 1 else 0):
    top, left = next(corners)
    crop = label[top : top + size[0], left : left + size[1]]
    counts = count_pixels(crop)[:IGNORED]
    if (counts > 0).sum() > 1 and counts.max() / counts.sum() < max_share:
      return top, left
  return next(corners)


def _draw_corners(
  size: tuple[int, int], crop: tuple[int, int], rng: np.random.Generator
) -> Iterator[tuple[int, int]]:
  """Yields (top, left) of crops, uniform over all that fit."""
  while True:
    yield tuple(int(rng.integers(max(old - new, 0) + 1)) for old, new in zip(size, crop))


def resize_label(label: np.ndarray, size: tuple[int, int], resize: str = "pillow") -> np.ndarray:
  """Resizes uint8 [H, W] to `size` by nearest neighbors, Pillow's or OpenCV's."""
  if resize == "cv2":
    cv2 = augment.load_cv2()
    return cv2.resize(label, size[::-1], interpolation=cv2.INTER_NEAREST)
  return np.asarray(Image.fromarray(label).resize(size[::-1], Image.Resampling.NEAREST))


def _resize(image: np.ndarray, size: tuple[int, int], box, resize: str) -> np.ndarray:
  """Returns a box of an image that is resized to `size`, bilinearly and without antialiasing."""
  if resize != "cv2":
    return resize_image(image, size, box)
  cv2 = augment.load_cv2()
  resized = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
  return resized.reshape(*size, -1)[box]  # cv2 drops the axis of one channel


def count_pixels(label: np.ndarray) -> np.ndarray:
  """Returns how many pixels of a label have each value, int [256]."""
  return np.bincount(label.reshape(-1), minlength=256)


def label_shares(counts: np.ndarray, classes: tuple[str, ...]) -> tuple[dict[str, float], float]:
  """Returns {class: its share of all pixels}, and the share of pixels without a class.

  Args:
    counts: see `count_pixels`.
    classes: their names.
  """
  total = max(int(counts.sum()), 1)
  shares = {name: int(count) / total for name, count in zip(classes, counts)}
  return shares, int(counts[IGNORED]) / total


def describe_labels(source: Source, should_skip: bool = False) -> str:
  """Returns the shares of the classes in the first labels of a source.

  Args:
    source: of scenes, with labels.
    should_skip: leave out scenes that cannot be read.

  Raises:
    DataError: no pixel has a class, or a scene cannot be read.
  """
  counts, number = np.zeros(256, np.int64), min(COUNT, len(source))
  for index in range(number):
    try:
      counts += count_pixels(source[index]["label"])
    except DataError:
      if not should_skip:
        raise
  classes, unlabelled = label_shares(counts, source.class_names)
  if not any(classes.values()):
    raise DataError(
      f"no labelled pixel in the first {number} files; is zero_is_unlabelled right?"
      f" ({source.description})"
    )
  ranks = sorted(classes.items(), key=lambda item: -item[1])
  listed = [f"{name}: {share:.1%}" for name, share in ranks[:MAX_SHARES] if share]
  absent = [name for name, share in classes.items() if not share]
  rest = sum(map(bool, classes.values())) - len(listed)
  parts = (
    f"pixels of the first {number} labels: {', '.join(listed)}",
    f"{rest} more classes" if rest else "",
    f"unlabelled: {unlabelled:.1%}",
    f"no pixel of {first_names(absent)}" if absent else "",
  )
  return "; ".join(filter(None, parts))
