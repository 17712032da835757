"""Segmentation as a task: the measure by its definition and on any devices, statistics of BatchNorm
that belong to the state, starts from every kind of file, mistakes with their words.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mrmae_jax import config as config_lib
from mrmae_jax import evals, segmentation, sharding, train
from mrmae_jax.errors import DataError
from mrmae_jax.evals import miou
from tests.helpers.goldens import read_tensors
from tests.helpers.scenes import Squares

GOLDENS = Path(__file__).parent / "goldens" / "segmentation"


def test_counts_and_means_equal_the_reference():
  case = json.loads((GOLDENS / "metrics.json").read_text())
  given, expected = (read_tensors(GOLDENS, "metrics", prefix) for prefix in ("in.", "out."))
  count = jax.jit(miou.class_counts, static_argnums=2)
  total = np.zeros((3, case["num_classes"]), np.int64)
  for i in range(case["images"]):
    counts = count(given[f"prediction{i}"], given[f"label{i}"], case["num_classes"])
    for row, name in zip(counts, ("intersect", "predicted", "labelled")):
      np.testing.assert_array_equal(row, expected[f"{name}{i}"])
    total += np.asarray(counts)
  names = tuple("abcdef")
  scores = miou.scores(total, names)
  for name in ("mIoU", "mAcc", "aAcc"):
    assert scores[name] == pytest.approx(case[name], rel=1e-6)
  assert scores["classes"] == case["classes_in_mIoU"]
  for name, x in zip(names, expected["IoU"]):
    assert scores.get(f"IoU_{name}", np.nan) == pytest.approx(x, rel=1e-6, nan_ok=True)
  for wrong in case["wrong"].values():
    assert abs(scores["mIoU"] - wrong) > 0.01 and abs(scores["aAcc"] - wrong) > 0.01


def network(images):
  """Logits at a quarter of the size, from colors and from how far a window reaches."""
  x = images.astype(jnp.float32) / 255 - 0.5
  kernel = jnp.asarray(np.random.default_rng(0).normal(0, 0.03, (8, 8, 3, 4)), jnp.float32)
  kernel += jnp.asarray([[-1, 2, 0, 0], [-1, 0, 2, 0], [-1, 0, 0, 2]]) / 64
  numbers = ("NHWC", "HWIO", "NHWC")
  options = dict(window_strides=(4, 4), padding=((2, 2), (2, 2)), dimension_numbers=numbers)
  return jax.lax.conv_general_dilated(x, kernel, **options)


def measured_task(source):
  return train.Task(
    init=None,
    loss=None,
    predict=lambda params, extra, frozen, batch, keys: {"logits": network(batch["image"])},
    views=None,
    source=lambda split: source,
    optimizer=None,
  )


def measure(tmp_path, source, devices, **options):
  config = config_lib.segment()
  config.image_size = (32, 48)
  config.encoder = config_lib.encoder("vit", "base")
  config.encoder.patch_size = 8
  config.evals.miou.update(options)
  mesh = sharding.make_mesh(devices=jax.devices()[:devices])
  task = measured_task(source)
  evaluator = miou.Evaluator(task, (), config, mesh, tmp_path, **config.evals.miou)
  return evaluator.run({}, {}, 3), evaluator


def expected_scores(source, rule):
  """The same by single images, one view after the other, and numpy."""
  windows = jax.jit(functools.partial(segmentation.slide, network), static_argnames="crop")
  look = lambda v: windows(v.pixels, v.starts, v.count, crop=rule.window(v.size))
  table = np.zeros((256, 256), np.int64)
  for i in range(len(source)):
    image, label = source[i]["image"], source[i]["label"]
    views = segmentation.make_views(image, (0.485, 0.456, 0.406), rule)
    predicted = segmentation.predict(look, views, label.shape)
    np.add.at(table, (label.reshape(-1), predicted.reshape(-1)), 1)
  table = table[:4, :4]
  return miou.scores(np.stack([table.diagonal(), table.sum(0), table.sum(1)]), source.class_names)


@pytest.mark.parametrize(
  "options, rule",
  [
    ({}, {}),
    pytest.param(
      dict(stride=(32, 40), scales=(0.75, 1.5), flip=True), {}, marks=pytest.mark.variant
    ),
    pytest.param(dict(mode="whole"), dict(token=8), marks=pytest.mark.variant),
  ],
)
def test_the_measure_is_the_same_on_any_devices(tmp_path, options, rule):
  source = Squares(19, sizes=(36, 60))
  ours = dict(stride=options.get("stride", (21, 32)), **rule)
  ours |= {name: options[name] for name in ("scales", "flip") if name in options}
  expected = expected_scores(source, segmentation.Rule((32, 48), **ours))
  results = {}
  for devices in (1, 8):
    results[devices], evaluator = measure(tmp_path, source, devices, **options)
    pictures = results[devices].pop("pictures")
  assert results[1] == results[8]
  assert results[1] == pytest.approx(expected | {"images": 19}, abs=1e-3)
  assert 0.3 < results[1]["mIoU"] < 1
  ((path, picture),) = pictures.items()
  assert path.name == "step_0000003.png" and path.is_file() and picture.dtype == np.uint8
  if "mode" not in options:
    assert evaluator._slide._cache_size() <= 12  # buckets, not the 19 sizes of each view


def test_no_label_at_all_is_an_error(tmp_path):
  source = Squares(2)
  for i in range(2):
    source[i]["label"][:] = 255
  with pytest.raises(DataError, match="no labelled pixel in 2 images; is .*zero_is_unlabelled"):
    measure(tmp_path, source, 1, images=0)


def test_each_host_has_images_of_its_own(monkeypatch):
  source, config, sizes = Squares(7), config_lib.segment(), {}
  monkeypatch.setattr(jax, "process_count", lambda: 3)
  for host in range(3):
    monkeypatch.setattr(jax, "process_index", lambda host=host: host)
    view = functools.partial(miou.whole_scene, channels=3, exif="ignore")
    rows = list(evals.host_batches(source, view, config, 3))
    sizes[host] = [row["image"].shape[1:3] for row in rows if row["valid"][0]]
  every = sorted(size for part in sizes.values() for size in part)
  assert every == sorted(source[i]["image"].shape[:2] for i in range(7))
