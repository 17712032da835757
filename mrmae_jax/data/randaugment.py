"""RandAugment in timm's "increasing" variant, with which MAE and ConvMAE fine-tune.

Cubuk et al. 2020, arXiv 1909.13719. Operations, their ranges and the law of the draws are those of
timm 0.3.2, data/auto_augment.py, called by `create_transform` with bicubic interpolation and the
mean color as filling. Given the same argument, each operation gives timm's pixels.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from mrmae_jax.errors import DataError

BICUBIC = Image.Resampling.BICUBIC
MAX_MAGNITUDE = 10.0
MAX_COUNT = 100
APPLIED = 0.5  # probability of each drawn operation


class Policy(NamedTuple):
  """The content of a string such as "rand-m9-mstd0.5-inc1".

  Attributes:
    magnitude: mean strength of the operations, 0 to 10.
    magnitude_std: standard deviation of the normal law from which the strength of each operation
      is drawn; the draw is clipped to [0, 10].
    count: operations drawn for each image, with replacement; each is applied with probability one
      half.
  """

  magnitude: float = MAX_MAGNITUDE
  magnitude_std: float = 0.0
  count: int = 2


class Op(NamedTuple):
  """One operation.

  Attributes:
    argument: strength -> argument of `apply`; the strength is magnitude / 10, in [0, 1], and
      negative in half of the draws if `is_signed`.
    is_signed: whether the operation has two directions.
    apply: (picture, argument, fill) -> picture; `fill` is the color of pixels from outside the
      picture.
  """

  argument: Callable[[float], float]
  is_signed: bool
  apply: Callable[[Image.Image, float, tuple[int, int, int]], Image.Image]


def _affine(matrix):
  """Makes an affine operation: output pixel (x, y) is input (a x + b y + c, d x + e y + f).

  `matrix` makes the six numbers out of the argument and the picture's size.
  """
  return lambda picture, argument, fill: picture.transform(
    picture.size, Image.Transform.AFFINE, matrix(argument, *picture.size), BICUBIC, fillcolor=fill
  )


def _enhance(kind) -> Op:
  """Makes an operation that blends with a degenerate picture.

  A factor of 1 changes nothing, so the increasing variant moves away from it on either side.
  """
  return Op(
    lambda s: max(0.1, 1 + 0.9 * s),
    True,
    lambda picture, factor, fill: kind(picture).enhance(factor),
  )


def _table(values):
  """Makes an operation on single values: `values` makes a table of 256 out of the argument."""
  return lambda picture, argument, fill: picture.point(values(argument) * len(picture.getbands()))


def _posterized(bits):
  """Keeps the highest `bits` bits of each value.

  At full strength `bits` is 0 and the picture black, as Pillow did until it refused 0.
  """
  return [i & (0xFF00 >> bits) for i in range(256)]


def _brightened(amount):
  """Brightens the dark half of the values."""
  return [min(255, i + amount) if i < 128 else i for i in range(256)]


OPS = {  # by timm's names
  "AutoContrast": Op(lambda s: s, False, lambda picture, _, __: ImageOps.autocontrast(picture)),
  "Equalize": Op(lambda s: s, False, lambda picture, _, __: ImageOps.equalize(picture)),
  "Invert": Op(lambda s: s, False, lambda picture, _, __: ImageOps.invert(picture)),
  "Rotate": Op(
    lambda s: 30 * s,
    True,
    lambda picture, degrees, fill: picture.rotate(degrees, BICUBIC, fillcolor=fill),
  ),
  "PosterizeIncreasing": Op(lambda s: 4 - int(4 * s), False, _table(_posterized)),
  "SolarizeIncreasing": Op(
    lambda s: 256 - int(256 * s), False, lambda picture, first, _: ImageOps.solarize(picture, first)
  ),
  "SolarizeAdd": Op(lambda s: int(110 * s), False, _table(_brightened)),
  "ColorIncreasing": _enhance(ImageEnhance.Color),
  "ContrastIncreasing": _enhance(ImageEnhance.Contrast),
  "BrightnessIncreasing": _enhance(ImageEnhance.Brightness),
  "SharpnessIncreasing": _enhance(ImageEnhance.Sharpness),
  "ShearX": Op(lambda s: 0.3 * s, True, _affine(lambda shear, w, h: (1, shear, 0, 0, 1, 0))),
  "ShearY": Op(lambda s: 0.3 * s, True, _affine(lambda shear, w, h: (1, 0, 0, shear, 1, 0))),
  "TranslateXRel": Op(
    lambda s: 0.45 * s, True, _affine(lambda share, w, h: (1, 0, share * w, 0, 1, 0))
  ),
  "TranslateYRel": Op(
    lambda s: 0.45 * s, True, _affine(lambda share, w, h: (1, 0, 0, 0, 1, share * h))
  ),
}


def parse(text: str) -> Policy | None:
  """Parses timm's notation, e.g. "rand-m9-mstd0.5-inc1", in any order after "rand".

  "n3" draws three operations. "" turns RandAugment off and gives None.

  Raises:
    DataError: a part is unknown, repeated or out of range, or "inc1" is missing; timm's other
      variant is not implemented.
  """
  if not text:
    return None
  name, *parts = text.split("-")
  values = {}
  for part in parts:
    match = re.fullmatch(r"(mstd|m|n|inc)(\d+(?:\.\d+)?)", part)
    if match and match[1] not in values:
      values[match[1]] = float(match[2])
    else:
      values["unknown"] = part
  count = values.get("n", 2.0)
  policy = Policy(
    values.get("m", MAX_MAGNITUDE), values.get("mstd", 0.0), int(min(count, MAX_COUNT))
  )
  if (
    name != "rand"
    or "unknown" in values
    or values.get("inc") != 1
    or policy.count != count
    or policy.count < 1
    or policy.magnitude > MAX_MAGNITUDE
    or policy.magnitude_std > MAX_MAGNITUDE
  ):
    raise DataError(
      f"randaug={text!r} is not understood; expected '' or 'rand-inc1' with, once each, m0 to m10"
      " (magnitude, 10 if left out), mstd0 to mstd10 (its deviation, 0), n1 to"
      f" n{MAX_COUNT} (operations, 2), e.g. 'rand-m9-mstd0.5-inc1'"
    )
  return policy


def randaugment(
  image: np.ndarray, rng: np.random.Generator, policy: Policy, fill: tuple[int, int, int]
) -> np.ndarray:
  """Applies randomly drawn operations.

  Args:
    image: uint8 [H, W, 3].
    rng: source of all random numbers.
    policy: number and strength of the operations.
    fill: RGB, 0 to 255, of pixels from outside the image; the reference takes the mean that
      normalizes its input.

  Returns:
    uint8 [H, W, 3].
  """
  names = list(OPS)
  picture = Image.fromarray(np.ascontiguousarray(image))
  for i in rng.integers(len(names), size=policy.count):
    if rng.random() >= APPLIED:
      continue
    magnitude = rng.normal(policy.magnitude, policy.magnitude_std)
    strength = min(max(magnitude, 0.0), MAX_MAGNITUDE) / MAX_MAGNITUDE
    op = OPS[names[i]]
    if op.is_signed and rng.random() < 0.5:
      strength = -strength
    picture = op.apply(picture, op.argument(strength), fill)
  return np.asarray(picture)


def mean_color(mean: tuple[float, ...]) -> tuple[int, ...]:
  """Converts the normalization mean of pixels in [0, 1] to a color, 0 to 255."""
  return tuple(min(255, round(255 * m)) for m in mean)
