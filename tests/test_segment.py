"""Segmentation as a task: the measure by its definition and on any devices, statistics of BatchNorm
that belong to the state, starts from every kind of file, mistakes with their words.
"""

import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image

import mrmae_jax
from mrmae_jax import config as config_lib
from mrmae_jax import data, evals, optim, preflight, segmentation, sharding, train
from mrmae_jax.errors import ConfigError, DataError, WeightsError
from mrmae_jax.evals import miou
from mrmae_jax.models import ViT
from mrmae_jax.runs.checkpoint import Checkpoints, read_params
from mrmae_jax.runs.log import Log, summary
from mrmae_jax.runs.metrics import read_metrics
from mrmae_jax.tasks import segment
from mrmae_jax.weights import writers
from tests import tiny
from tests.helpers.cli import run_command
from tests.helpers.goldens import read_tensors
from tests.helpers.models import make_segmenter, make_student
from tests.helpers.runs import finished_run
from tests.helpers.scenes import Squares
from tests.helpers.tasks import init_state

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
  assert path.name == "step_0000003.png" and picture.dtype == np.uint8
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


# The task.


@pytest.mark.variant
def test_eight_devices_and_micro_batches_equal_one_after_the_other():
  """Loss, every gradient and the statistics, with dropped paths and channels."""
  config = tiny.segment_config(optim__accum_steps=2)
  task = segment.make(config)
  tx = optim.skippable(optax.sgd(1.0))
  state = jax.jit(lambda: init_state(task, tx))()
  rows = [task.views.train(task.source("train")[i], np.random.default_rng(i)) for i in range(16)]
  batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
  assert batch["image"].shape == (16, 32, 48, 3) and batch["label"].dtype == np.uint8
  keys = train.sample_keys(0, jnp.int32(0), 16)
  gradients = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
  extra, losses, sums = state.extra, [], []
  for i in range(2):
    part = {name: x[i::2] for name, x in batch.items()}
    (loss, (terms, extra)), grads = gradients(state.params, extra, (), part, keys[i::2])
    assert float(loss) == pytest.approx(float(terms["decode"] + 0.4 * terms["aux"]), rel=1e-6)
    losses.append(loss)
    sums.append(grads)
  expected = jax.tree.map(lambda a, b: (a + b) / 2, *sums)

  mesh = sharding.make_mesh()
  step = train.make_train_step(task, tx, lambda step: 1.0, 0, accum_steps=2, max_spike=2.0)
  step = jax.jit(step)
  placed = jax.device_put(state, sharding.replicated(mesh))
  moved, metrics = step(placed, (), sharding.global_batch(batch, mesh))
  close = functools.partial(np.testing.assert_allclose, atol=1e-5)
  close(metrics["loss"], np.mean(losses))
  jax.tree.map(lambda old, new, g: close(old - new, g), state.params, moved.params, expected)
  jax.tree.map(lambda a, b: close(a, b, rtol=1e-5), moved.extra, extra)
  assert all(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (state.extra, moved.extra))))

  spiked = placed._replace(mean_grad_norm=jnp.float32(1e-9))  # now the same gradient is a spike
  same, metrics = step(spiked, (), sharding.global_batch(batch, mesh))
  assert metrics["skipped"] == 1
  jax.tree.map(np.testing.assert_array_equal, same.extra, state.extra)


@pytest.mark.variant
def test_a_run_that_lost_its_last_steps_does_them_again_bit_for_bit(tmp_path):
  config = tiny.segment_config(keep_checkpoints=3)
  del config.evals["miou"]
  whole = jax.device_get(train.fit(config, segment.make(config), tmp_path))
  assert whole.step == 4
  for folder in (tmp_path / "checkpoints").iterdir():
    if folder.name != "1":
      shutil.rmtree(folder)
  again = jax.device_get(train.fit(config, segment.make(config), tmp_path))
  jax.tree.map(np.testing.assert_array_equal, again, whole)
  assert any(np.any(x != 1) for x in jax.tree.leaves(whole.extra))


def random_state(task, step=5):
  """A state with no number at its start."""
  rng = np.random.default_rng(0)
  draw = lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32)
  params, extra = jax.tree.map(draw, jax.eval_shape(task.init, jax.random.key(0)))
  extra = jax.tree.map(lambda x: 1 + jnp.abs(x), extra)
  return train.TrainState(jnp.int32(step), params, extra, (jnp.zeros(3),), jnp.float32(0))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """The workdir of a run of segmentation, and its state."""
  workdir, config = tmp_path_factory.mktemp("segment") / "run", tiny.segment_config()
  task = segment.make(config)
  state = random_state(task)
  saving = Checkpoints(workdir, config_lib.identity(config) | task.identity)
  saving.save(5, state)
  saving.close()
  (workdir / "config.json").write_text(config.to_json())
  return workdir, state


def test_averaged_weights_go_with_the_newest_statistics(tmp_path):
  config = tiny.segment_config(optim__ema_decay=0.9)
  state = random_state(segment.make(config))
  average = optim.AverageState(jnp.int32(5), jax.tree.map(lambda x: x + 1, state.params))
  saving = Checkpoints(tmp_path, {})
  saving.save(5, state._replace(opt_state=(jnp.zeros(3), average)))
  saving.close()
  (tmp_path / "config.json").write_text(config.to_json())
  stored = read_params(tmp_path, "decode_head", with_extra=True)
  for ours, theirs in (
    (stored.params["decode_head"], average.average["decode_head"]),
    (stored.extra, state.extra),
  ):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_run_is_a_model_that_segments(run, tmp_path):
  workdir, state = run
  model = mrmae_jax.load(workdir)
  assert "run after 5 steps: ViT/8, width 24, depth 2" in str(model.report)
  assert model.class_names == ("ground", *"0123456789") and model.config["classes"] == 11
  scene = data.open_source("scenes:digits", "eval", holdout_every=5)[0]["image"]
  (label,) = model.segment([scene])
  assert label.shape == scene.shape[:2] and label.max() < 11
  task = segment.make(tiny.segment_config())
  look = jax.jit(lambda image: task.predict(state.params, state.extra, (), {"image": image}, None))
  window = np.asarray(jax.image.resize(scene, (32, 48, 3), "nearest"))
  expected = segmentation.resize(look(window[None])["logits"], (32, 48))[0].argmax(-1)
  assert np.mean(model.segment([window])[0] == expected) > 0.999
  # It can be handed on, and trained further.
  writers.write_model(model.network, tmp_path / "out.safetensors", "mmseg")
  known = flatten_dict(jax.device_get(state.params), sep="/")
  for start in (workdir, tmp_path / "out.safetensors"):
    further = segment.make(tiny.segment_config(init_from=str(start)))
    assert further.pretrained.keys() == known.keys()
    for name, x in further.pretrained.items():
      if not name.startswith("encoder/norm/"):  # of pre-training; nothing reads it
        np.testing.assert_array_equal(x, known[name])
    extra = jax.eval_shape(further.init, jax.random.key(0))[1]
    assert jax.tree.map(jnp.shape, extra) == jax.tree.map(jnp.shape, state.extra)


def test_it_starts_from_a_pretrained_encoder(tmp_path):
  finished_run(tmp_path / "run", "vit")
  student = make_student(ViT(8, 24, 2, 2, 48), None, classes=3)  # 4 x 6 tokens
  writers.write_model(student, tmp_path / "mae.safetensors", "timm")
  for name in ("run", "mae.safetensors"):
    config = tiny.segment_config(init_from=str(tmp_path / name), image_size=(48, 48))
    task = segment.make(config)
    params = flatten_dict(jax.eval_shape(task.init, jax.random.key(0))[0], sep="/")
    assert {name: x.shape for name, x in task.pretrained.items()}.items() <= {
      name: x.shape for name, x in params.items()
    }.items()
    new = {name for name in params if name not in task.pretrained}
    encoder = {name.split("/")[-1] for name in new if name.startswith("encoder/")}
    assert encoder == {"relative_positions", "scale1", "scale2"}
    assert task.pretrained["encoder/pos_embed"].shape == (1, 37, 24)
    for words in ("new: tables of relative positions", "new: gains", "new: neck and heads"):
      assert words in task.notes[0]
  assert "left out of segmentation: classifier" in task.notes[0]


def test_heads_of_other_classes_are_refused_or_started_anew(tmp_path):
  path, config = tmp_path / "model.safetensors", tiny.segment_config()
  config.encoder.update(depth=4, mlp_dim=48)
  config.upernet.levels = (0, 1, 2, 3)
  config.image_size = (32, 32)
  model = make_segmenter()
  writers.write_model(model, path, "mmseg")
  config.init_from = str(path)
  with pytest.raises(WeightsError) as error:
    segment.make(config)
  assert str(error.value) == (
    f"config.init_from={path} tells 4 classes apart, scenes:digits has 11; only there: sky, sea, "
    "land, other; only here: ground, 0, 1, 2, 3. config.head=new starts fresh heads"
  )
  config.head = "new"
  task = segment.make(config)
  assert {name.split("/")[0] for name in task.pretrained} == {"encoder", "neck"}
  assert "new: heads" in task.notes[0]
  # The same classes in another order, and heads of another width.
  config.head, names = "same", ("land", "sky", "other", "sea")
  theirs = model.params["segmenter"]["decode_head"]["conv_seg"]["kernel"]
  ours = make_segmenter().segmenter
  params, stats, _ = segment.read_pretrained(config, ours, names)
  np.testing.assert_array_equal(params["decode_head/conv_seg/kernel"], theirs[:, [2, 0, 3, 1]])
  assert {name.split("/")[0] for name in stats} == {"neck", "decode_head", "auxiliary_head"}
  with pytest.raises(WeightsError, match="other heads: channels 8 there, 9 here"):
    segment.read_pretrained(config, ours.clone(channels=9), names)


@pytest.mark.parametrize(
  "values, message",
  [
    (dict(init_from=None), "config.init_from is not set"),
    (dict(upernet__pool_scales=()), r"pool_scales=\(\) must hold one or more sides"),
    (dict(upernet__levels=(0, 1, 2)), "must be four of the blocks 0 to 1"),
    (dict(upernet__levels=(0, 0, 1, 2)), "must be four of the blocks 0 to 1"),
    (dict(optim__accum_steps=16), "BatchNorm needs 2 images or more in each"),
    (dict(image_size=(8, 48)), "smaller than 2 x 2 tokens of 8 pixels"),
    (dict(image_size=(32, 50)), "is not a multiple of the token size 8"),
    (dict(evals__miou__stride=(33, 48)), "at most the window's"),
    (dict(evals__miou__stride=(0, 48)), "must be from 1"),
    (dict(evals__miou__scales=(9.0,)), "at most 8"),
    (dict(evals__miou__mode="all"), "is not one of slide, whole"),
    (dict(data__scale=(2.0, 1.0)), "must satisfy 0 < low <= high"),
    (dict(data__zero_is_unlabelled=None), "zero_is_unlabelled is not set"),
    (dict(data__source="digits"), "scenes:/path"),
    (dict(data__mean=(0.5,), data__std=(0.5,)), "photometric=True is for RGB"),
    (dict(head="old"), "is not one of same, new"),
  ],
)
def test_mistakes_are_named(values, message):
  with pytest.raises(ConfigError, match=message) as error:
    preflight.check(tiny.segment_config(**values), num_devices=1)
  assert len(str(error.value).splitlines()) == 1


def test_knn_is_refused():
  config = tiny.segment_config()
  config.evals.knn = config_lib.pretrain().evals.knn
  with pytest.raises(ConfigError, match="config.evals.knn is not an evaluator of .*; it has miou"):
    preflight.check(config, num_devices=1)


@pytest.mark.variant
def test_doctor_shows_scenes_and_their_classes(tmp_path, examine):
  (tmp_path / "c.py").write_text(
    "from tests import tiny\n\n\ndef get_config():\n  return tiny.segment_config()\n"
  )
  code, text = examine("--no-compile", f"--out={tmp_path}/x.png", config=tmp_path / "c.py")
  assert code == 0 and "pixels of the first 100 labels: ground: 67" in text
  assert "x.png shows 16 of the first images as training sees them" in text
  with Image.open(tmp_path / "x.png") as picture:
    assert picture.size[0] > 4 * 128


def test_results_of_classes_are_logged_and_pictures_shown(tmp_path, capsys):
  """But no line and no curve shows them: there may be hundreds."""
  values = {"miou/mIoU": 0.5, "miou/IoU_tree": 0.25}
  log = Log(tmp_path, 10, 0, {}, "")
  log.scalars(3, values)
  log.close()
  printed = capsys.readouterr().out
  assert "miou/mIoU 0.5" in printed and "tree" not in printed + "".join(summary(tmp_path))
  (record,) = read_metrics(tmp_path)
  assert record.items() >= values.items()
  (tmp_path / "segmentations").mkdir()
  Image.new("RGB", (9, 9)).save(tmp_path / "segmentations" / "step_0000003.png")
  assert run_command(["report", f"--runs={tmp_path}", f"--out={tmp_path}/page.html"]) == 0
  page = (tmp_path / "page.html").read_text()
  assert "Image, true classes, predicted classes." in page and "miou/IoU_tree" in page
