"""Mixing on the device against its definition: label mass, true areas, the laws of the draws,
determinism.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mrmae_jax.mixup import mix, smooth_one_hot, soft_cross_entropy

B, H, W, CLASSES = 6, 16, 24, 10
RECIPE = dict(mixup_alpha=0.8, cutmix_alpha=1.0, smoothing=0.1)
LABELS = jnp.array([3, 1, 4, 1, 5, 9])


def own_share(targets, smoothing):
  """Lambda, read off the first row of targets, whose two labels differ."""
  return (np.asarray(targets)[..., 0, LABELS[0]] - smoothing / CLASSES) / (1 - smoothing)


@functools.cache
def draws(count=3000, **options):
  """Results for `count` keys on images whose pixels are their own place in the batch: [count, B, H,
  W, 1], [count, B, K].
  """
  images = jnp.broadcast_to(jnp.arange(B, dtype=jnp.float32)[:, None, None, None], (B, H, W, 1))
  fn = lambda key: mix(key, images, LABELS, CLASSES, **options)
  images, targets = jax.jit(jax.vmap(fn))(jax.random.split(jax.random.key(0), count))
  return np.asarray(images), np.asarray(targets)


def test_plain_targets():
  np.testing.assert_allclose(smooth_one_hot(jnp.array([2]), 4, 0.1), [[0.025, 0.025, 0.925, 0.025]])
  np.testing.assert_array_equal(smooth_one_hot(jnp.array([1]), 3), [[0, 1, 0]])
  images = np.arange(B * H * W * 3, dtype=np.uint8).reshape(B, H, W, 3)
  same, targets = mix(
    jax.random.key(0), images, LABELS, CLASSES, mixup_alpha=0.0, cutmix_alpha=0.0, smoothing=0.1
  )
  assert same.dtype == jnp.float32 and targets.dtype == jnp.float32
  np.testing.assert_array_equal(same, images)
  np.testing.assert_array_equal(targets, smooth_one_hot(LABELS, CLASSES, 0.1))


def test_soft_cross_entropy():
  logits, targets = np.random.default_rng(0).normal(size=(2, 5, 7)).astype(np.float32)
  targets = np.exp(targets) / np.exp(targets).sum(-1, keepdims=True)
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  np.testing.assert_allclose(
    soft_cross_entropy(logits, targets), -(targets * np.log(p)).sum(-1).mean(), rtol=1e-5
  )
  assert soft_cross_entropy(jnp.bfloat16(logits), targets).dtype == jnp.float32


def test_labels_keep_their_mass_and_images_their_share():
  images, targets = draws(**RECIPE)
  np.testing.assert_allclose(targets.sum(-1), 1, atol=1e-6)
  lam = own_share(targets, 0.1)
  assert lam.min() > -1e-6 and lam.max() < 1 + 1e-6
  # An image of one value each: its mean says how much is its own, and the targets say the same of
  # the labels.
  first, last = images[:, 0].mean((1, 2, 3)), images[:, -1].mean((1, 2, 3))
  np.testing.assert_allclose(first, (1 - lam) * (B - 1), atol=1e-4)
  np.testing.assert_allclose(last, lam * (B - 1), atol=1e-4)
  mixed = smooth_one_hot(LABELS, CLASSES, 0.1)
  expected = mixed * lam[:, None, None] + mixed[::-1] * (1 - lam[:, None, None])
  np.testing.assert_allclose(targets, expected, atol=1e-6)


def test_switch_and_laws():
  images, targets = draws(**RECIPE)
  first = images[:, 0, :, :, 0].reshape(len(images), -1)
  pasted = np.isin(first, [0, B - 1]).all(1)  # cutmix; a mixup with lambda 0 or 1 has measure zero
  assert abs(pasted.mean() - 0.5) < 4 * 0.5 / len(images) ** 0.5
  lam = own_share(targets, 0.1)
  blended = lam[~pasted]
  np.testing.assert_allclose(
    first[~pasted],
    np.broadcast_to((1 - blended[:, None]) * (B - 1), first[~pasted].shape),
    atol=1e-4,
  )
  # Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1)).
  assert abs(blended.mean() - 0.5) < 0.03
  np.testing.assert_allclose(blended.var(), 1 / (4 * 2.6), rtol=0.06)
  assert ((lam < 1 - 1e-6) | pasted).all()  # every batch is mixed
  assert np.isin(draws(count=200, mixup_alpha=0.0, cutmix_alpha=1.0)[0][:, 0], [0, B - 1]).all()
  assert (
    not np.isin(draws(count=200, mixup_alpha=0.8, cutmix_alpha=0.0)[0][:, 0], [0, B - 1])
    .all((1, 2, 3))
    .any()
  )


def test_boxes():
  """Each box is a rectangle around a uniform place, with the image's aspect, of area 1 - lambda
  unless the border cuts it.
  """
  images, targets = draws(mixup_alpha=0.0, cutmix_alpha=1.0)
  box = images[:, 0, :, :, 0] == B - 1
  lam = own_share(targets, 0.0)
  np.testing.assert_allclose(box.mean((1, 2)), 1 - lam, atol=1e-6)
  rows, columns = box.any(2), box.any(1)
  np.testing.assert_array_equal(box, rows[:, :, None] & columns[:, None])
  for line in (rows, columns):
    assert (
      np.abs(np.diff(line.astype(int), axis=1, prepend=0, append=0)).sum(1) <= 2
    ).all()  # one piece
  inside = box.any((1, 2)) & ~(rows[:, 0] | rows[:, -1] | columns[:, 0] | columns[:, -1])
  height, width = rows.sum(1)[inside], columns.sum(1)[inside]
  assert set(height) == {2, 4, 6, 8, 10, 12, 14} and (width % 2 == 0).all()
  assert (
    np.abs(height / H - width / W) < 2 / H
  ).all()  # both sides are rounded down to an even number
  # Centres are uniform: the middle row lies in the box more often than the border, and both halves
  # equally often.
  assert (
    abs(rows[:, : H // 2].sum() / rows.sum() - 0.5) < 0.03
    and abs(columns[:, : W // 2].sum() / columns.sum() - 0.5) < 0.03
  )
  # E[true area] for lambda ~ U(0, 1), by the definition itself.
  rng = np.random.default_rng(0)
  areas = []
  for _ in range(20000):
    ratio = np.sqrt(1 - rng.beta(1, 1))
    sides = []
    for length in (H, W):
      half, centre = int(length * ratio) // 2, rng.integers(length)
      sides.append(min(centre + half, length) - max(centre - half, 0))
    areas.append(sides[0] * sides[1] / (H * W))
  assert abs(np.mean(areas) - (1 - lam).mean()) < 0.01
  assert abs(np.std(areas) - lam.std()) < 0.01


def test_groups_are_mixed_within_themselves_with_draws_of_their_own():
  images, targets = draws(count=50, groups=3, mixup_alpha=0.8, cutmix_alpha=0.0)
  means = images.mean((2, 3, 4))
  assert ((means >= [0, 0, 2, 2, 4, 4]) & (means <= [1, 1, 3, 3, 5, 5])).all()
  assert np.abs(np.diff(means[:, ::2] - [0, 2, 4], axis=1)).min(1).mean() > 0.05  # three lambdas
  np.testing.assert_allclose(targets.sum(-1), 1, atol=1e-6)
  with pytest.raises(ValueError, match="6 images cannot be mixed in 4 equal groups"):
    draws(count=1, groups=4, **RECIPE)


def test_deterministic_in_the_key_and_compiled_once():
  images = np.random.default_rng(0).integers(0, 256, (B, H, W, 3), np.uint8)
  step = jax.jit(lambda key: mix(key, images, LABELS, CLASSES, **RECIPE))
  results = [step(jax.random.key(seed)) for seed in (0, 0, 1)]
  assert step._cache_size() == 1
  np.testing.assert_array_equal(results[0][0], results[1][0])
  assert np.abs(results[0][0] - results[2][0]).max() > 1
  # Mixing and normalising commute.
  mean, std = jnp.array([120.0, 110, 100]), jnp.array([60.0, 55, 50])
  late = jax.jit(lambda x: mix(jax.random.key(1), x, LABELS, CLASSES, **RECIPE)[0])(
    (images - mean) / std
  )
  np.testing.assert_allclose(late, (results[2][0] - mean) / std, atol=1e-5)
  half = jax.ShapeDtypeStruct((2, 4, 4, 3), jnp.bfloat16)
  mixed = jax.eval_shape(
    lambda x: mix(jax.random.key(0), x, LABELS[:2], CLASSES, **RECIPE)[0], half
  )
  assert mixed.dtype == jnp.bfloat16


def test_same_on_eight_devices():
  images = np.random.default_rng(0).random((16, 8, 8, 3), np.float32)
  labels = np.arange(16) % CLASSES
  mesh = jax.make_mesh((8,), ("data",))
  sharded = jax.device_put((images, labels), jax.NamedSharding(mesh, jax.P("data")))
  fn = jax.jit(lambda x, y: mix(jax.random.key(3), x, y, CLASSES, **RECIPE))
  for here, there in zip(fn(images, labels), fn(*sharded)):
    np.testing.assert_allclose(here, there, atol=1e-6)
