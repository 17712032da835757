"""Linear probes: batch norm as in torch, heads that do not know of each other, cached features,
what the result file says.
"""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import mrmae_jax
from mrmae_jax import data, optim, preflight, sharding, train
from mrmae_jax.errors import ConfigError, WeightsError
from mrmae_jax.evals import accuracy as evaluator
from mrmae_jax.runs.checkpoint import Checkpoints
from mrmae_jax.tasks import finetune, probe
from tests import tiny
from tests.helpers.cli import run_command
from tests.helpers.runs import finished_run
from tests.helpers.tasks import init_state, make_tx, predicting_task


def batch_of(count, seed=0):
  rng = np.random.default_rng(seed)
  return {
    "image": rng.integers(0, 256, (count, 32, 48, 3), np.uint8),
    "label": rng.integers(0, 10, count).astype(np.int32),
  }


def run(task, config, steps):
  tx, schedule = make_tx(task, 10, steps)
  step = jax.jit(train.make_train_step(task, tx, schedule, 0, config.optim.accum_steps))
  state = jax.jit(lambda: init_state(task, tx))()
  for i in range(steps):
    state, metrics = step(state, task.frozen, batch_of(16, i))
  return state, metrics


def test_heads_and_batch_norm_by_definition():
  """Six steps written out: BatchNorm1d(affine=False) with momentum 0.1 and unbiased running
  variance, LARS at two rates.
  """
  config = tiny.probe_config("vit", optim__warmup_epochs=0.2)
  task = probe.make(config)
  state, metrics = run(task, config, 6)
  assert state.params.keys() == {"head"}  # the encoder is no parameter

  rates = optim.make_schedule(config.optim, 16, optim.Steps(10, 6))
  start, extra = jax.device_get(jax.jit(task.init)(jax.random.key(0)))
  np.testing.assert_array_equal(start["head"]["kernel"][0], start["head"]["kernel"][1])
  look = jax.jit(lambda batch: task.predict(start, extra, task.frozen, batch, None)["features"])
  for i, factor in enumerate((0.5, 4.0)):
    w, b = (start["head"][name][i].astype(np.float64) for name in ("kernel", "bias"))
    mean, var, mw, mb = np.zeros(24), np.ones(24), 0, 0
    for step in range(6):
      batch = batch_of(16, step)
      x = np.asarray(look(batch), np.float64)
      mean, var = 0.9 * mean + 0.1 * x.mean(0), 0.9 * var + 0.1 * x.var(0, ddof=1)
      x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-6)
      z = np.exp(x @ w + b)
      d = (z / z.sum(1, keepdims=True) - np.eye(10)[batch["label"]]) / 16
      gw, gb = x.T @ d, d.sum(0)
      mw = 0.9 * mw + gw * 0.001 * np.linalg.norm(w) / np.linalg.norm(gw)
      mb = 0.9 * mb + gb
      w, b = w - float(rates(step)) * factor * mw, b - float(rates(step)) * factor * mb
    np.testing.assert_allclose(state.params["head"]["kernel"][i], w, atol=1e-5)
    np.testing.assert_allclose(state.params["head"]["bias"][i], b, atol=1e-5)
  np.testing.assert_allclose(state.extra["mean"], mean, atol=1e-5)
  np.testing.assert_allclose(state.extra["var"], var, rtol=1e-4)
  assert np.abs(state.params["head"]["bias"][0] - state.params["head"]["bias"][1]).max() > 1e-4

  batch = batch_of(5, 99)
  out = jax.jit(task.predict)(state.params, state.extra, task.frozen, batch, None)
  x = (np.asarray(out["features"]) - mean) / np.sqrt(var + 1e-6)
  np.testing.assert_allclose(out["logits"][:, 1], x @ w + b, atol=1e-4)
  assert out["logits"].shape == (5, 2, 10)


@pytest.mark.parametrize(
  "encoder, pool",
  [
    pytest.param("convvit", "mean", marks=pytest.mark.variant),
    ("vit", "cls"),
    pytest.param("vit", "mean", marks=pytest.mark.variant),
  ],
)
def test_features_are_those_of_the_frozen_encoder(tmp_path, encoder, pool):
  """A LayerNorm that has learnt nothing on the mean token, or the CLS token after the last norm."""
  finished_run(tmp_path, encoder)
  config = tiny.probe_config(encoder, init_from=str(tmp_path), pool=pool)
  preflight.check(config, num_devices=8)
  task, batch = probe.make(config), batch_of(3)
  params, extra = jax.jit(task.init)(jax.random.key(1))
  found = jax.jit(task.predict)(params, extra, task.frozen, batch, None)["features"]
  model = mrmae_jax.load(tmp_path)
  if pool == "cls":
    expected = model.encode(batch["image"])["cls"]
  else:
    student, x = (
      model.network,
      (batch["image"] / np.float32(255) - model.config["mean"]) / model.config["std"],
    )
    encode = jax.jit(student.encoder.apply)
    _, out = encode({"params": student.params["encoder"]}, jnp.float32(x))
    expected = np.asarray(out["layers"][-1][:, int(encoder == "vit") :].mean(1))
    expected = (expected - expected.mean(1, keepdims=True)) / np.sqrt(
      expected.var(1, keepdims=True) + 1e-6
    )
  np.testing.assert_allclose(found, expected, atol=1e-4)
  assert "probing: " in task.notes[-1] and "blr 0.05, 0.4" in task.notes[-1]
  assert finetune.read_pretrained(config, finetune.make_model(config, 1))[
    0
  ]  # something was loaded at all


def test_accuracy_of_a_grid():
  """The best head is reported, with its rate; counts are exact on any devices."""
  config = tiny.probe_config(data__holdout_every=9)

  def predict(
    params, extra, frozen, batch, keys
  ):  # the second head is right for labels below 7, the first for label 0
    label = batch["label"]
    right = jnp.stack([label < 1, label < 7], 1)
    return {
      "logits": jax.nn.one_hot(jnp.where(right, label[:, None], (label[:, None] + 1) % 10), 10)
    }

  task = predicting_task(predict, config)
  held_out = data.open_split(config.data, "eval")
  labels = np.array([held_out[i]["label"] for i in range(199)])
  for devices in (1, 8):
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    found = evaluator.Evaluator(task, {}, config, mesh, None, batch_size=64).run({}, (), 0)
    top5 = found.pop("top5")
    assert (
      found
      == {
        "top1": (labels < 7).mean(),
        "images": 199,
        "blr": 0.4,
        "top1_0.05": (labels < 1).mean(),
        "top1_0.4": (labels < 7).mean(),
      }
      and top5 >= found["top1"]
    )


def test_a_run_with_a_break(tmp_path):
  """Through `fit`, from a pre-trained run.

  Resumed from its checkpoint it says it is finished; it is no model to load.
  """
  finished_run(tmp_path / "pretrained", "vit")
  config = tiny.probe_config("vit", init_from=str(tmp_path / "pretrained"))
  state = train.fit(config, probe.make(config), tmp_path / "run")
  again = train.fit(config, probe.make(config), tmp_path / "run")
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(again))
  rows = [
    json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  ]
  final = [row for row in rows if "accuracy/top1" in row][-1]
  assert final["accuracy/images"] == 359 and final["accuracy/blr"] in (0.05, 0.4)
  assert final["accuracy/top1"] == max(final["accuracy/top1_0.05"], final["accuracy/top1_0.4"])
  with pytest.raises(
    WeightsError, match="probes .*pretrained and holds no encoder; load that instead"
  ):
    mrmae_jax.load(tmp_path / "run")


@pytest.mark.parametrize(
  "values, message",
  [
    (dict(optim__grid=()), r"config.optim.grid=\(\) must hold"),
    (dict(optim__grid=(0.0,)), r"config.optim.grid=\(0.0,\) must be a finite number > 0"),
    (
      dict(optim__ema_decay=0.5),
      "config.optim.ema_decay=0.5 has no meaning for a probe; leave it at 0",
    ),
    (dict(pool="max"), "config.pool='max'"),
    (dict(init_from=None), "config.init_from is not set"),
  ],
)
def test_mistakes_are_named(values, message):
  with pytest.raises(ConfigError, match=message):
    preflight.check(tiny.probe_config(**values), num_devices=8)


def test_cached_probe_finds_what_is_linear():
  """Two informative directions among many: near the truth at good rates.

  Every rate as if trained alone.
  """
  rng = np.random.default_rng(0)
  x = rng.standard_normal((600, 12)) * 3 + 5
  y = (x[:, 0] > 5).astype(int) + 2 * (x[:, 1] > 5)
  options = dict(epochs=20, batch_size=50)
  found = probe.probe_features(
    x[:400], y[:400], x[400:], y[400:], 4, blrs=(1e-6, 0.1, 1.0), **options
  )
  assert found[0] < 0.7 < 0.88 < found[1:].min(), found
  alone = probe.probe_features(x[:400], y[:400], x[400:], y[400:], 4, blrs=(0.1,), **options)
  assert abs(alone[0] - found[1]) <= 0.005  # one image of 200: sums in another order
  counted = []
  probe.probe_features(
    x[:400],
    y[:400],
    x[400:],
    y[400:],
    4,
    blrs=(0.1,),
    **options,
    progress=lambda e: counted.extend(e) or counted,
  )
  assert counted == list(range(20))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  """Two classes of images that differ in colour; train and val folders."""
  root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
  for split, count in (("train", 40), ("val", 10)):
    for name, level in (("dark", 60), ("light", 190)):
      (root / split / name).mkdir(parents=True)
      for i in range(count):
        image = np.clip(rng.normal(level, 40, (32, 48, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(image).save(root / split / name / f"{i}.png")
  return root


def make_features(photos, out, *options):
  for split in ("train", "eval"):
    assert (
      run_command(
        [
          "features",
          f"--images=folder:{photos}",
          f"--split={split}",
          f"--out={out}/{split}.npz",
          *options,
        ]
      )
      == 0
    )


@pytest.mark.parametrize(
  "options",
  [
    pytest.param(("--model=pixels",), marks=pytest.mark.variant),
    pytest.param(("--model={run}",), marks=pytest.mark.variant),
    ("--model={run}", "--untrained"),
  ],
)
def test_the_tools_from_images_to_a_result(photos, tmp_path, options, capsys):
  finished_run(tmp_path / "run", "vit")
  make_features(photos, tmp_path, *(option.format(run=tmp_path / "run") for option in options))
  command = [
    "knn",
    f"--train={tmp_path}/train.npz",
    f"--eval={tmp_path}/eval.npz",
    f"--out={tmp_path}/result.json",
    "--k=1,20",
    "--shots=1,5",
    "--blr=0.05,0.4",
    "--epochs=9",
    "--batch_size=20",
  ]
  assert run_command(command) == 0
  printed = capsys.readouterr().out
  assert "80 training images, 20 to measure on, 2 classes" in printed and "wrote" in printed
  result = json.loads((tmp_path / "result.json").read_text())
  assert result["knn"]["accuracy"].keys() == {"1", "20"} and result["few_shot"][
    "accuracy"
  ].keys() == {"1", "5"}
  assert (
    result["linear"]["accuracy"].keys() == {"0.05", "0.4"}
    and result["linear"]["best"]["accuracy"] == max(result["linear"]["accuracy"].values()) > 0.8
  )
  about = result["train"]
  assert (
    about["count"] == 80
    and about["feature"] == "pooled"
    and about["untrained"] == ("--untrained" in options)
  )
  assert "BatchNorm" in result["linear"]["normalization"] and result["eval"]["crop"] == 0.875


def test_untrained_is_the_same_encoder_with_other_weights(photos, tmp_path):
  finished_run(tmp_path / "run", "vit")
  for out, options in (("a", ()), ("b", ("--untrained",)), ("c", ("--untrained",))):
    make_features(photos, tmp_path / out, f"--model={tmp_path / 'run'}", *options)
  a, b, c = (np.load(tmp_path / out / "eval.npz")["features"] for out in "abc")
  assert a.shape == b.shape and np.abs(a - b).max() > 0.01
  np.testing.assert_array_equal(b, c)


def test_mistakes_of_the_tool(photos, tmp_path, capsys):
  make_features(photos, tmp_path, "--model=pixels", "--image_size=8")
  (tmp_path / "other").mkdir()
  make_features(photos, tmp_path / "other", "--model=pixels", "--image_size=16")
  changed_file = dict(np.load(tmp_path / "eval.npz"))
  np.savez(
    tmp_path / "turned.npz", **changed_file | {"class_names": changed_file["class_names"][::-1]}
  )
  np.savez(tmp_path / "unlabelled.npz", **changed_file | {"labels": changed_file["labels"] * 0 - 1})
  np.savez(tmp_path / "nan.npz", **changed_file | {"features": changed_file["features"] * math.nan})
  (tmp_path / "text.npz").write_text("no archive")
  good = {
    "train": tmp_path / "train.npz",
    "eval": tmp_path / "eval.npz",
    "out": tmp_path / "result.json",
    "batch_size": 20,
  }
  for change, message in (
    ({"train": ""}, "--train is missing"),
    ({"eval": tmp_path / "none.npz"}, "cannot be read as features"),
    ({"eval": tmp_path / "text.npz"}, "cannot be read as features"),
    ({"eval": tmp_path / "unlabelled.npz"}, "has no labels"),
    ({"eval": tmp_path / "nan.npz"}, "not finite"),
    ({"k": "10,x"}, "argument --k: 'x' given; expected a whole number"),
    ({"shots": "0"}, "argument --shots: '0' given"),
    ({"eval": tmp_path / "turned.npz"}, "classes dark, light and light, dark"),
    ({"blr": "nan"}, "argument --blr: 'nan' given"),
    ({"eval": tmp_path / "other" / "eval.npz"}, "image_size [8, 8] and [16, 16]"),
    ({"epochs": 0}, "argument --epochs: '0' given"),
    ({"batch_size": 100}, "--batch_size=100 is more than the 80 training images"),
    ({"out": tmp_path / "text.npz" / "x.json"}, "text.npz is not a folder"),
  ):
    assert (
      run_command(["knn", *(f"--{key}={value}" for key, value in (good | change).items())]) == 2
    )
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1 and message in error[0], error
  assert not (tmp_path / "result.json").exists()
  words = [f"--{key}={value}" for key, value in (good | {"k": "10,1000", "blr": ""}).items()]
  assert run_command(["knn", *words]) == 0
  printed = capsys.readouterr().out
  assert "k=1000 left out: there are 80 training images" in printed
  assert "k=10 " in printed and "k=1000 " not in printed.replace("k=1000 left", "")


def test_averaged_weights_are_the_ones_that_are_loaded(tmp_path):
  """What fit evaluates is what others read of it."""
  config = tiny.changed(tiny.get_config(), teacher__path="", optim__ema_decay=0.9)
  _, params = finished_run(tmp_path / "plain")
  tx, _ = optim.make_optimizer(config.optim, 16, optim.Steps(10, 10))
  average = jax.tree.map(lambda x: x + 0.5, params)
  state = tx.init(params)
  state = (*state[:-1], state[-1]._replace(average=average))
  assert optim.averaged_params(state) is average
  saving = Checkpoints(tmp_path / "run", {})
  saving.save(7, train.TrainState(jnp.int32(7), params, (), state, jnp.float32(0)))
  saving.close()
  (tmp_path / "run" / "config.json").write_text(config.to_json())
  loaded = mrmae_jax.load(tmp_path / "run").network.params
  for part in ("encoder", "decoder"):
    jax.tree.map(np.testing.assert_array_equal, loaded[part], jax.device_get(average[part]))
  plain = mrmae_jax.load(tmp_path / "plain").network.params["encoder"]
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a - b, 0.5, atol=1e-6), loaded["encoder"], plain
  )
