"""Views: functions that turn one example of a source into the arrays of one row of a batch.

A view is a picklable callable (example, rng) -> {name: numpy array}. The example is what
`source[index]` gives. The view takes all its random numbers from `rng`, a numpy Generator, and
raises DataError if it cannot decode the example. Its output has the same names, shapes and dtypes
for every example: they are those of the batch.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from mrmae_jax.data import augment, randaugment
from mrmae_jax.errors import DataError

View = Callable[[dict[str, Any], np.random.Generator], dict[str, np.ndarray]]


class Views(NamedTuple):
  """The views of a task: `train` is random, `eval` is not."""

  train: View
  eval: View


@dataclasses.dataclass(frozen=True)
class ImageView:
  """Decodes an image and transforms it: {"image": uint8 [H, W, C], "label": int32 []}.

  Attributes:
    channels: C; see `augment.with_channels`.
    transforms: functions (image, rng) -> image, applied in this order.
    exif: see `augment.decode_image`.
  """

  channels: int
  transforms: tuple[Callable[[np.ndarray, np.random.Generator], np.ndarray], ...]
  exif: str = "ignore"

  def __call__(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    image = augment.pixels(example, self.channels, self.exif)
    for transform in self.transforms:
      image = transform(image, rng)
    return {"image": image, "label": np.int32(example["label"])}


def image_views(config) -> Views:
  """Returns the views of tasks on single images, as `config.data` describes them.

  A linear probe crops by the rule of MAE's, `single_try` of `augment.crop_box`.

  Raises:
    DataError: a value that does not fit.
  """
  data, size = config.data, tuple(config.image_size)
  mean, std = tuple(data.mean), tuple(data.std)
  policy = randaugment.parse(data.randaug)
  if policy and len(mean) != 3:
    raise DataError(f"randaug={data.randaug!r} given; of {len(mean)} channels expected ''")
  if not 0 <= data.erase_prob <= 1:
    raise DataError(f"erase_prob={data.erase_prob} given; expected 0 to 1")
  transforms = [
    functools.partial(
      augment.random_resized_crop,
      size=size,
      scale=tuple(data.crop_scale),
      single_try=config.task == "probe",
      resize=augment.resizer(data.resize),
    )
  ]
  if data.flip:
    transforms.append(augment.random_flip)
  if policy:
    fill = randaugment.mean_color(mean)
    transforms.append(functools.partial(randaugment.randaugment, policy=policy, fill=fill))
  if data.erase_prob:
    transforms.append(
      functools.partial(augment.random_erase, prob=data.erase_prob, mean=mean, std=std)
    )
  return Views(
    ImageView(len(mean), tuple(transforms), data.exif),
    center_view(size, data.eval_crop, len(mean), data.exif),
  )


@dataclasses.dataclass(frozen=True)
class PairView:
  """Transforms an image twice, each time at random: {"image": uint8 [2, H, W, C], "label": int32}.

  Attributes:
    view: the view of a single image.
  """

  view: ImageView

  def __call__(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    decoded = example | {"image": augment.pixels(example, self.view.channels, self.view.exif)}
    first, second = self.view(decoded, rng), self.view(decoded, rng)
    return {"image": np.stack([first["image"], second["image"]]), "label": first["label"]}


def pair_views(config) -> Views:
  """Returns the views of tasks that compare two crops of an image; in evaluation there is one.

  Raises:
    DataError: a value that does not fit.
  """
  views = image_views(config)
  return Views(PairView(views.train), views.eval)


def center_view(
  image_size: tuple[int, int], crop_pct: float, channels: int = 3, exif: str = "ignore"
) -> ImageView:
  """Returns the view of evaluation, a central crop; see `augment.center_crop`.

  Args:
    image_size: (H, W) of the output.
    crop_pct: share of the resized image's sides that the crop keeps, in (0, 1].
    channels: C of the output; see `augment.with_channels`.
    exif: see `augment.decode_image`.

  Raises:
    DataError: crop_pct is out of range.
  """
  if not 0 < crop_pct <= 1:
    raise DataError(f"crop_pct={crop_pct} given; expected 0 < crop_pct <= 1")
  crop = functools.partial(_center_crop, size=tuple(image_size), crop_pct=crop_pct)
  return ImageView(channels, (crop,), exif)


def _center_crop(image, rng, size, crop_pct):
  del rng
  return augment.center_crop(image, size, crop_pct)
