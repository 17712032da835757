"""RandAugment, erasing and single-try crops against their definitions, alone and in batches."""

import math

import numpy as np
import pytest
from PIL import Image

from mrmae_jax.data import augment, randaugment
from mrmae_jax.data.randaugment import OPS, Op, Policy
from mrmae_jax.errors import DataError
from tests.helpers.images import Numbered, assert_same, photo, train_steps

FILL = (124, 116, 104)
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def apply(name, image, argument):
  return np.asarray(OPS[name].apply(Image.fromarray(image), argument, FILL)).astype(int)


# The operations.


@pytest.mark.parametrize(
  "name, arguments",
  {  # at the strengths 0, 0.9, 1, and where there is a sign -0.9 and -1
    "Rotate": (0, 27, 30, -27, -30),
    "ShearX": (0, 0.27, 0.3, -0.27, -0.3),
    "ShearY": (0, 0.27, 0.3, -0.27, -0.3),
    "TranslateXRel": (0, 0.405, 0.45, -0.405, -0.45),
    "TranslateYRel": (0, 0.405, 0.45, -0.405, -0.45),
    "ColorIncreasing": (1, 1.81, 1.9, 0.19, 0.1),
    "ContrastIncreasing": (1, 1.81, 1.9, 0.19, 0.1),
    "BrightnessIncreasing": (1, 1.81, 1.9, 0.19, 0.1),
    "SharpnessIncreasing": (1, 1.81, 1.9, 0.19, 0.1),
    "PosterizeIncreasing": (4, 1, 0),
    "SolarizeIncreasing": (256, 26, 0),
    "SolarizeAdd": (0, 99, 110),
  }.items(),
)
def test_strengths_become_arguments(name, arguments):
  strengths = (0, 0.9, 1, -0.9, -1)[: len(arguments)]
  assert OPS[name].is_signed == (len(arguments) == 5)
  np.testing.assert_allclose([OPS[name].argument(s) for s in strengths], arguments, atol=1e-12)
  if name not in ("PosterizeIncreasing", "SolarizeAdd", "SolarizeIncreasing"):
    return
  assert all(isinstance(OPS[name].argument(s), int) for s in np.linspace(0, 1, 11))


def test_the_list_is_complete():
  assert len(OPS) == 15 and {name for name, op in OPS.items() if not op.is_signed} == {
    "AutoContrast",
    "Equalize",
    "Invert",
    "PosterizeIncreasing",
    "SolarizeIncreasing",
    "SolarizeAdd",
  }


def test_operations_on_values():
  image = photo(20, 30)
  x = image.astype(int)
  np.testing.assert_array_equal(apply("Invert", image, 0), 255 - x)
  for bits in range(5):
    np.testing.assert_array_equal(
      apply("PosterizeIncreasing", image, bits), x // 2 ** (8 - bits) * 2 ** (8 - bits)
    )
  for first in (0, 26, 128, 256):
    np.testing.assert_array_equal(
      apply("SolarizeIncreasing", image, first), np.where(x >= first, 255 - x, x)
    )
  for amount in (0, 99, 110):
    np.testing.assert_array_equal(
      apply("SolarizeAdd", image, amount), np.where(x < 128, np.minimum(x + amount, 255), x)
    )


def test_operations_on_histograms():
  image = (photo(20, 30) // 3 + np.uint8([10, 60, 90])).astype(
    np.uint8
  )  # three channels of their own ranges
  low, high = image.min((0, 1)), image.max((0, 1))
  stretched = (image.astype(float) - low) * 255 / (high - low)
  assert np.abs(apply("AutoContrast", image, 0) - stretched).max() <= 1
  equal = apply("Equalize", image, 0)
  for c in range(3):
    values = image[..., c].ravel()
    below = (values[:, None] > values).sum(1) / (values < values.max()).sum()
    assert (
      np.abs(equal[..., c].ravel() / 255 - below).max() < 0.2
    )  # the shares are counted in whole steps of 600 // 255 pixels
    order = np.argsort(values, kind="stable")
    assert (np.diff(equal[..., c].ravel()[order]) >= 0).all()
  assert equal.max() == 255 and equal.min() == 0


@pytest.mark.parametrize("factor", [0.1, 0.19, 1, 1.81, 1.9])
def test_enhancements_blend_with_a_degenerate_picture(factor):
  image = photo(20, 30)
  x = image.astype(float)
  gray = (x @ [0.299, 0.587, 0.114])[..., None]
  smooth = x.copy()  # the 3 x 3 mean with the center counted five times, borders as they are
  smooth[1:-1, 1:-1] = (
    4 * x[1:-1, 1:-1] + sum(x[i : i + 18, j : j + 28] for i in range(3) for j in range(3))
  ) / 13
  for name, degenerate in {
    "Color": gray,
    "Contrast": gray.mean(),
    "Brightness": 0.0,
    "Sharpness": smooth,
  }.items():
    expected = (degenerate + factor * (x - degenerate)).clip(0, 255)
    assert np.abs(apply(f"{name}Increasing", image, factor) - expected).max() <= 2, name


def test_geometry():
  image = photo(40, 40)
  np.testing.assert_array_equal(apply("Rotate", image, 90), np.rot90(image))  # counter-clockwise
  turned = apply("Rotate", image, 30)
  assert all((turned[i, j] == FILL).all() for i in (0, -1) for j in (0, -1))
  # A shift by a number of pixels is exact: pixels from the right, or from below, come in.
  for name, axis in (("TranslateYRel", 0), ("TranslateXRel", 1)):
    for share in (0.25, -0.25):
      moved = apply(name, image, share)
      expected = np.roll(image, -round(40 * share), axis).astype(int)
      gap = np.arange(40) >= 30 if share > 0 else np.arange(40) < 10
      index = (gap, slice(None)) if axis == 0 else (slice(None), gap)
      expected[index] = FILL
      np.testing.assert_array_equal(moved, expected)
  # Bicubic interpolation reproduces a ramp of 5 a pixel, Pillow's nearly.
  place = np.arange(40)
  ramp = np.broadcast_to((5 * place)[None, :, None], (40, 40, 3)).astype(np.uint8)
  for shear in (0.27, -0.3):
    expected = 5 * (place[None] + shear * (place[:, None] + 0.5))
    inside = (expected > 15) & (expected < 180)
    assert np.abs(apply("ShearX", ramp, shear)[..., 0] - expected)[inside].max() < 2
    across = apply("ShearY", ramp.swapaxes(0, 1).copy(), shear)[..., 0].T
    assert np.abs(across - expected)[inside].max() < 2
  assert (apply("ShearX", ramp, -0.3)[-1, 0] == FILL).all()


def test_strength_zero_changes_nothing():
  image = photo(20, 30)
  for name, op in OPS.items():
    if op.is_signed or name in ("SolarizeIncreasing", "SolarizeAdd"):
      np.testing.assert_array_equal(apply(name, image, op.argument(0)), image, err_msg=name)


# The policy.


def test_notation():
  assert randaugment.parse("") is None
  assert randaugment.parse("rand-m9-mstd0.5-inc1") == Policy(9, 0.5, 2)
  assert randaugment.parse("rand-inc1-n3-m7.5") == Policy(7.5, 0, 3)
  assert randaugment.parse("rand-inc1") == Policy(10, 0, 2)
  assert randaugment.mean_color(tuple(MEAN)) == FILL


@pytest.mark.parametrize(
  "text",
  [
    "rand-m9-mstd0.5",
    "rand-m9-inc0",
    "m9-inc1",
    "rand-m11-inc1",
    "rand-m9-m8-inc1",
    "rand-n0-inc1",
    "rand-mstd101-inc1",
    "rand-w0-inc1",
    "rand-inc1-",
    "rand-n1.5-inc1",
    "augmix-m3",
    "rand-m-inc1",
  ],
)
def test_other_notation_is_refused(text):
  with pytest.raises(DataError, match=r"'rand-m9-mstd0.5-inc1'") as error:
    train_steps(Numbered(3), 1, randaug=text)
  assert repr(text) in str(error.value) and "m0 to m10" in str(error.value)


def recorded(policy, images=4000):
  """(image, operation, strength) of every operation that is applied."""
  calls = []

  def spy(name, signed):
    return Op(
      lambda s: s, signed, lambda picture, s, fill: calls.append((seed, name, s, fill)) or picture
    )

  original = dict(OPS)
  try:
    OPS.update({name: spy(name, op.is_signed) for name, op in original.items()})
    for seed in range(images):
      randaugment.randaugment(
        np.zeros((2, 2, 3), np.uint8), np.random.default_rng(seed), policy, FILL
      )
  finally:
    OPS.update(original)
  assert {fill for *_, fill in calls} == {FILL}
  return calls


def test_draws():
  calls = recorded(Policy(9, 0.5, 2))
  applied = (
    np.bincount(np.bincount([seed for seed, *_ in calls], minlength=4000), minlength=3) / 4000
  )
  np.testing.assert_allclose(
    applied, [0.25, 0.5, 0.25], atol=0.03
  )  # two operations, each with probability one half
  names = [name for _, name, *_ in calls]
  counts = np.array([names.count(name) for name in OPS])
  assert np.abs(counts - 4000 / 15).max() < 4 * (4000 / 15) ** 0.5
  pairs = [
    names[i] == names[i + 1] for i in range(len(calls) - 1) if calls[i][0] == calls[i + 1][0]
  ]
  assert abs(np.mean(pairs) - 1 / 15) < 0.03  # with replacement
  strengths = np.array([s for *_, s, _ in calls])
  signed = np.array([OPS[name].is_signed for name in names])
  assert (strengths[~signed] > 0).all() and abs((strengths[signed] < 0).mean() - 0.5) < 0.04
  magnitudes = 10 * np.abs(strengths)
  assert (
    magnitudes.max() == 10 and abs((magnitudes == 10).mean() - 0.0228) < 0.01
  )  # N(9, 0.5), cut at two deviations
  assert abs(np.median(magnitudes) - 9) < 0.03 and abs(np.quantile(magnitudes, 0.1587) - 8.5) < 0.04


def test_fixed_magnitude_and_other_counts():
  calls = recorded(Policy(4, 0, 5), 400)
  np.testing.assert_allclose(np.abs([s for *_, s, _ in calls]), 0.4)
  assert abs(len(calls) / 400 - 2.5) < 0.25
  assert min(abs(s) for *_, s, _ in recorded(Policy(0, 5, 1), 400)) == 0  # cut below as well


# Erasing.


def test_erasing_by_its_definition():
  side, count = 100, 3000
  image = np.full((side, side, 3), 77, np.uint8)
  boxes, values = [], []
  for seed in range(count):
    erased = augment.random_erase(image, np.random.default_rng(seed), 1.0, tuple(MEAN), tuple(STD))
    assert erased.dtype == np.uint8 and (image == 77).all()
    rows, columns = ((erased != image).any(-1).any(axis) for axis in (1, 0))
    top, left, h, w = rows.argmax(), columns.argmax(), rows.sum(), columns.sum()
    inside = erased[top : top + h, left : left + w]
    # Noise everywhere in one rectangle (76 values in 10,000 happen to be 77) and nothing outside.
    assert (inside != 77).mean() > 0.97 and (erased != image).sum() == (inside != 77).sum()
    boxes.append((top, left, h, w))
    if seed < 300:
      values.append(inside.reshape(-1, 3))
  top, left, h, w = np.array(boxes, float).T
  area, aspect = h * w / side**2, np.log(h / w) / np.log(1 / 0.3)
  assert 0.018 < area.min() and area.max() < 0.34 and np.abs(aspect).max() < 1.1
  # Up to 0.3 of the area every aspect fits a square image and nothing is drawn again.
  fits = area <= 0.3
  uniform = {
    "area": (area[fits] - 0.02) / 0.28,
    "aspect": (aspect[fits] + 1) / 2,
    "top": (top / (side - h))[fits],
    "left": (left / (side - w))[fits],
  }
  for name, u in uniform.items():
    shares = np.histogram(u, 5, (0, 1))[0] / fits.sum()
    np.testing.assert_allclose(shares, 0.2, atol=0.035, err_msg=name)
  # The noise is N(0, 1) where the network sees it, but for the values that no pixel has.
  noise = (np.concatenate(values) / 255 - MEAN) / STD
  assert np.abs(noise.mean(0)).max() < 0.02
  np.testing.assert_allclose(noise.std(0), 0.97, atol=0.01)
  for q, z in ((0.1587, -1), (0.5, 0), (0.8413, 1)):
    np.testing.assert_allclose(np.quantile(noise, q, axis=0), z, atol=0.03)


def test_erasing_has_a_probability_and_gives_up():
  image = photo(20, 20)
  erased = [
    augment.random_erase(image, np.random.default_rng(seed), 0.25, tuple(MEAN), tuple(STD))
    for seed in range(2000)
  ]
  assert abs(np.mean([(e != image).any() for e in erased]) - 0.25) < 0.04
  low = photo(1, 4000)  # a rectangle of 2 % is higher than the image
  np.testing.assert_array_equal(
    augment.random_erase(low, np.random.default_rng(0), 1.0, tuple(MEAN), tuple(STD)), low
  )


# Crops of the probe.


def test_a_single_try_is_cut_to_the_image():
  height, width, scale = 60, 200, (0.08, 1.0)
  cut = 0
  for seed in range(500):
    rng = np.random.default_rng(seed)
    area, aspect = (
      height * width * rng.uniform(*scale),
      math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3))),
    )
    wanted = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
    top, left, h, w = augment.crop_box(
      height, width, np.random.default_rng(seed), scale, single_try=True
    )
    assert (h, w) == (min(wanted[0], height), min(wanted[1], width))
    assert 0 <= top <= height - h and 0 <= left <= width - w
    cut += h < wanted[0]
    if wanted[0] <= height:  # the other rule takes a first draw that fits, too
      assert (top, left, h, w) == augment.crop_box(
        height, width, np.random.default_rng(seed), scale
      )
  assert 0.5 < cut / 500 < 0.9  # 3600 of 12000 pixels is the largest square
  assert augment.crop_box(1, 1, np.random.default_rng(0), (0.01, 0.02), single_try=True) == (
    0,
    0,
    1,
    1,
  )


# Batches.

VIEWS = dict(randaug="rand-m9-mstd0.5-inc1", erase_prob=0.25)


@pytest.mark.parametrize("shards, workers", [(2, 0), (1, 2)])
def test_batches_do_not_depend_on_shards_and_workers(shards, workers):
  source = Numbered(11)
  reference = train_steps(source, 4, **VIEWS)
  assert_same(train_steps(source, 4, shards=shards, workers=workers, **VIEWS), reference)
  assert_same(train_steps(source, 2, first_step=2, **VIEWS), reference[2:])
  assert reference[0]["image"].dtype == np.uint8


def test_crop_and_flip_are_drawn_first():
  """Crop and flip are drawn first, so other options do not change them."""
  source, steps = Numbered(16), 16
  plain = np.concatenate([b["image"] for b in train_steps(source, steps)])

  def same(**options):
    images = np.concatenate([b["image"] for b in train_steps(source, steps, **options)])
    return (images == plain).all((1, 2, 3)).mean()

  assert same() == same(randaug="", erase_prob=0.0) == 1
  assert abs(same(erase_prob=0.25) - 0.75) < 0.1
  assert (
    0.2 < same(randaug=VIEWS["randaug"]) < 0.4
  )  # a quarter, and operations that leave an image as it is
  assert same(task="probe") > 0.5  # most first draws fit
  assert same(task="probe") < 1
  with pytest.raises(DataError, match="erase_prob=1.5 given; expected 0 to 1"):
    train_steps(source, 1, erase_prob=1.5)


def test_mean_and_deviation_reach_the_views():
  gray = [np.full((24, 24, 3), 128, np.uint8)]

  class Grey(Numbered):
    def __init__(self):
      self._images = gray

  options = dict(erase_prob=1.0, mean=(0.5, 0.5, 0.5), std=(1e-6, 1e-6, 0.2))
  image = train_steps(Grey(), 1, **options)[0]["image"]
  assert set(np.unique(image[..., :2])) <= {127, 128} and len(np.unique(image[..., 2])) > 20
  moved = np.concatenate(
    [
      b["image"].reshape(-1, 3)
      for b in train_steps(Grey(), 20, randaug="rand-inc1-n4", mean=(0, 0.2, 1))
    ]
  )
  assert (moved == (0, 51, 255)).all(1).any()
