"""Evaluators: k-NN by its definition and the same on any devices, reconstructions in the right
place and brightness.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mrmae_jax import mrmae, sharding
from mrmae_jax.evals import knn
from mrmae_jax.reconstruction import reconstruct
from mrmae_jax.tasks import pretrain
from mrmae_jax.viz import grid
from tests import tiny


def test_knn_classify_by_its_definition():
  rng = np.random.default_rng(0)
  bank, queries = (
    rng.standard_normal((50, 6)).astype(np.float32),
    rng.standard_normal((23, 6)).astype(np.float32) * 5,
  )
  labels = rng.integers(0, 4, 50)
  expected = []
  for q in queries:
    similarity = bank @ q / np.linalg.norm(bank, axis=1) / np.linalg.norm(q)
    votes = np.zeros(4)
    for i in np.argsort(-similarity)[:7]:
      votes[labels[i]] += np.exp(similarity[i] / 0.3)
    expected.append(votes.argmax())
  predicted = knn.knn_classify(queries, bank, labels, 4, (1, 7, 99), temperature=0.3)
  np.testing.assert_array_equal(predicted[7], expected)
  np.testing.assert_array_equal(
    predicted[1],
    labels[(queries @ (bank / np.linalg.norm(bank, axis=1, keepdims=True)).T).argmax(1)],
  )
  np.testing.assert_array_equal(
    knn.knn_classify(bank, bank, labels, 4, (1,), temperature=0.07)[1], labels
  )
  assert (
    len(set(knn.knn_classify(queries, bank, labels, 4, (99,), temperature=1e3)[99])) == 1
  )  # cut to the bank: one majority


@pytest.mark.parametrize("count", [37, 5])
@pytest.mark.parametrize("devices, fsdp", [(1, 1), (8, 2)])
def test_neighbors_are_exact_in_any_blocks_on_any_devices(monkeypatch, count, devices, fsdp):
  rng = np.random.default_rng(0)
  bank, queries = (
    rng.standard_normal((count, 6)).astype(np.float32),
    rng.standard_normal((23, 6)).astype(np.float32),
  )
  bank[count // 2 : count // 2 + 2] = bank[1]  # equal ones: the first counts, wherever it lies
  similarity = (
    queries @ bank.T / np.linalg.norm(queries, axis=1)[:, None] / np.linalg.norm(bank, axis=1)
  )
  similarity[:, count // 2 : count // 2 + 2] = similarity[:, 1:2]
  order = np.argsort(-similarity, axis=1, kind="stable")[:, :5]
  mesh = sharding.make_mesh(fsdp=fsdp, devices=jax.devices()[:devices])
  for queries_at_a_time, block in ((1024, 16384), (10, 3)):
    monkeypatch.setattr(knn, "QUERIES", queries_at_a_time)
    monkeypatch.setattr(knn, "BLOCK", block)
    found, index = knn.nearest(queries, bank, 5, mesh)
    np.testing.assert_array_equal(index, order)
    np.testing.assert_allclose(found, np.take_along_axis(similarity, order, 1), atol=1e-6)


def test_a_bank_is_divided_among_the_devices():
  """No device ever holds the whole bank, or similarities with more than a block of it."""
  mesh = sharding.make_mesh()
  bank = jax.ShapeDtypeStruct(
    (8, 4, 512, 16),
    jnp.float32,
    sharding=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(sharding.AXES)),
  )
  queries = jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=sharding.replicated(mesh))
  program = (
    jax.jit(knn._search, static_argnums=(2, 3), out_shardings=sharding.replicated(mesh))
    .lower(queries, bank, 10, 16000)
    .compile()
  )
  memory = program.memory_analysis()
  assert memory.argument_size_in_bytes < 4 * (4 * 512 * 16 + 64 * 16) + 1024
  assert memory.temp_size_in_bytes < 4 * 64 * (512 + 10) * 12


def test_few_shot_by_its_definition():
  rng = np.random.default_rng(0)
  labels, expected = rng.permutation(np.arange(60) % 3), rng.integers(0, 3, 50)
  centres = rng.standard_normal((3, 8))
  bank, queries = (centres[c] + rng.standard_normal((len(c), 8)) for c in (labels, expected))
  one, all_of_them = (
    knn.few_shot(queries, expected, bank, labels, 1, draws=4),
    knn.few_shot(queries, expected, bank, labels, 99, draws=2),
  )
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  means = np.stack([unit(bank[labels == c]).mean(0) for c in range(3)])
  np.testing.assert_allclose(
    all_of_them, ((unit(queries) @ unit(means).T).argmax(1) == expected).mean()
  )
  assert one.shape == (4,) and one.std() > 0 and one.mean() < all_of_them[0]
  np.testing.assert_array_equal(knn.few_shot(queries, expected, bank, labels, 1, draws=2), one[:2])


def test_knn_accuracy_is_the_same_on_any_devices():
  config = tiny.get_config("vit")
  config.data.holdout_every = 9  # 199 held-out images: no multiple of any batch
  config.teacher.path = ""
  task = pretrain.make(config)
  params = jax.jit(task.init)(jax.random.key(0))[0]
  results = []
  for devices, batch_size in ((1, 64), (8, 40)):
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    placed = jax.device_put(params, sharding.replicated(mesh))
    evaluator = knn.Evaluator(
      task, {}, config, mesh, None, k=20, temperature=0.07, batch_size=batch_size, bank=300
    )
    results.append(evaluator.run(placed, (), 0)["accuracy"])
  assert results[0] == results[1] and 0.2 < results[0] < 1
  assert (
    abs(results[0] * 199 - round(results[0] * 199)) < 1e-6
  )  # every held-out image counted, none twice


def test_knn_without_labels_says_why_not(tmp_path):
  from PIL import Image

  for i in range(20):
    Image.new("RGB", (32, 32), (i, i, i)).save(tmp_path / f"{i}.png")
  config = tiny.get_config()
  config.data.source = f"folder:{tmp_path}"
  config.teacher.path = ""
  task, mesh = pretrain.make(config), sharding.make_mesh()
  evaluator = knn.Evaluator(
    task, {}, config, mesh, None, k=1, temperature=0.07, batch_size=8, bank=8
  )
  assert "the images have no labels" in evaluator.note and evaluator.run({}, (), 0) == {}


@pytest.mark.parametrize("norm_pix", [True, False])
def test_a_perfect_prediction_is_drawn_as_the_original(monkeypatch, norm_pix):
  """Un-normalising, un-patchifying and the colours are right: the decoder's targets come back as
  the image.
  """
  config = tiny.get_config()
  config.teacher.path = ""
  model = pretrain.make_model(config, {})
  images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3), np.uint8))
  mask = mrmae.sample_mask(jax.random.uniform(jax.random.key(0), (2, 24)), 0.75)
  targets = lambda params, pixels, mask, model: (None, mrmae.pixel_targets(pixels, 8, norm_pix)[0])
  monkeypatch.setattr(mrmae, "encode_decode", targets)
  drawn = reconstruct(model, {}, images, mask, norm_pix)
  original = np.asarray(images) / 255
  for name in ("original", "reconstruction", "pasted"):
    np.testing.assert_allclose(drawn[name], original, atol=1e-5, err_msg=name)
  hidden = np.repeat(np.repeat(np.asarray(mask.removed).reshape(2, 4, 6), 8, 1), 8, 2)[..., None]
  np.testing.assert_allclose(drawn["masked"], np.where(hidden, 0.5, original), atol=1e-5)

  monkeypatch.setattr(
    mrmae,
    "encode_decode",
    lambda params, pixels, mask, model: (None, 0 * targets(0, pixels, mask, model)[1]),
  )
  drawn = reconstruct(model, {}, images, mask, norm_pix)
  np.testing.assert_allclose(
    np.where(hidden, 0, drawn["pasted"]), np.where(hidden, 0, original), atol=1e-5
  )
  assert np.abs(np.where(hidden, drawn["pasted"] - original, 0)).mean() > 0.05


def test_grid_of_pictures():
  red, blue = (np.broadcast_to(np.float32(c), (2, 16, 24, 3)) for c in ([1, 0, 0], [0, 0, 1]))
  picture = grid.draw_grid([red, blue], ["left", "right"], "a note")
  assert picture.dtype == np.uint8
  columns = (
    np.flatnonzero((picture == [255, 0, 0]).all(-1).any(0)),
    np.flatnonzero((picture == [0, 0, 255]).all(-1).any(0)),
  )
  assert columns[0].max() < columns[1].min() and len(columns[0]) == len(columns[1]) >= 128
  assert (picture == [255, 0, 0]).all(-1).sum() == 2 * (16 * 6) * (24 * 6)
