"""RandAugment (Cubuk et al. 2020, arXiv 1909.13719) in timm's "increasing" variant, with which MAE and ConvMAE fine-tune.

Operations, their ranges and the law of the draws are those of timm 0.3.2, data/auto_augment.py, called by `create_transform`
with bicubic interpolation and the mean colour as filling. On the same argument each operation gives timm's pixels.
"""

import re
from typing import Callable, NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from mrmae_jax.errors import DataError

BICUBIC = Image.Resampling.BICUBIC
MAX_MAGNITUDE = 10.0
MAX_COUNT = 100
APPLIED = 0.5  # probability of each drawn operation


class Policy(NamedTuple):
  """What a string such as "rand-m9-mstd0.5-inc1" says.

  Attributes:
    magnitude: mean strength of the operations, 0 to 10.
    magnitude_std: of the normal law it is drawn from for each operation, clipped to [0, 10].
    count: operations drawn for each image, with replacement; each is applied with probability one half.
  """

  magnitude: float = MAX_MAGNITUDE
  magnitude_std: float = 0.0
  count: int = 2


class Op(NamedTuple):
  """One operation.

  Attributes:
    argument: strength -> argument of `apply`; the strength is magnitude / 10, in [0, 1], and negative in half of the draws if
      `signed`.
    signed: whether the operation has two directions.
    apply: (picture, argument, fill) -> picture; `fill` is the colour of what comes into view from outside.
  """

  argument: Callable[[float], float]
  signed: bool
  apply: Callable[[Image.Image, float, tuple[int, int, int]], Image.Image]


def _affine(matrix):
  """Output pixel (x, y) is input pixel (a x + b y + c, d x + e y + f); `matrix` makes the six out of argument and size."""
  return lambda picture, argument, fill: picture.transform(
    picture.size, Image.Transform.AFFINE, matrix(argument, *picture.size), BICUBIC, fillcolor=fill
  )


def _enhance(kind) -> Op:
  """Blends with a degenerate picture; 1 changes nothing, so the increasing variant moves away from it on either side."""
  return Op(
    lambda s: max(0.1, 1 + 0.9 * s),
    True,
    lambda picture, factor, fill: kind(picture).enhance(factor),
  )


def _table(values):
  """Looks every value up in a table of 256, which `values` makes out of the argument."""
  return lambda picture, argument, fill: picture.point(values(argument) * len(picture.getbands()))


def _posterized(bits):
  """The highest `bits` bits. At full strength none, a black picture: what Pillow gave until it refused to keep none."""
  return [i & (0xFF00 >> bits) for i in range(256)]


def _brightened(amount):
  """The dark half, brighter."""
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
  """Reads timm's notation: "rand-m9-mstd0.5-inc1", in any order after "rand"; "n3" draws three operations. "" is None, off.

  Raises:
    DataError: a part that is unknown, repeated or out of range, or no "inc1": the other variant is not here.
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
      f"randaug={text!r} is not understood; expected '' or 'rand-inc1' with, once each, m0 to m10 (magnitude, 10 if left"
      f" out), mstd0 to mstd10 (its deviation, 0), n1 to n{MAX_COUNT} (operations, 2), e.g. 'rand-m9-mstd0.5-inc1'"
    )
  return policy


def randaugment(
  image: np.ndarray, rng: np.random.Generator, policy: Policy, fill: tuple[int, int, int]
) -> np.ndarray:
  """Applies randomly drawn operations.

  Args:
    image: uint8 [H, W, 3].
    rng: decides everything.
    policy: how many and how strong.
    fill: RGB, 0 to 255, of what comes into view from outside; the reference takes the mean that normalises its input.

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
    if op.signed and rng.random() < 0.5:
      strength = -strength
    picture = op.apply(picture, op.argument(strength), fill)
  return np.asarray(picture)


def mean_colour(mean: tuple[float, ...]) -> tuple[int, ...]:
  """The normalisation mean of pixels in [0, 1] as a colour, 0 to 255."""
  return tuple(min(255, round(255 * m)) for m in mean)
