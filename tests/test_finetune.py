"""Fine-tuning: starts from pretrained weights or says why not, drops paths image by image, counts
every image once.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import mrmae_jax
from mrmae_jax import data, preflight, sharding
from mrmae_jax.errors import ConfigError, DataError, WeightsError
from mrmae_jax.evals import accuracy as evaluator
from mrmae_jax.models.layers import DropPath, drop_paths
from mrmae_jax.runs.checkpoint import read_params
from mrmae_jax.tasks import finetune
from tests import tiny
from tests.helpers.programs import run_program
from tests.helpers.runs import finished_run
from tests.helpers.tasks import predicting_task

ROOT = Path(__file__).parent.parent


def test_drop_path_drops_whole_images_and_keeps_the_mean():
  x, keys = jnp.ones((4000, 2, 3)), jax.random.split(jax.random.key(0), 4000)
  a, b = (np.asarray(DropPath(0.3, keys)(branch, x)[0]) for branch in range(2))
  for y in (a, b):
    assert set(np.unique(y.round(5))) == {0, np.float32(1 / 0.7).round(5)}
    assert (y == y[:, :1, :1]).all() and abs((y[:, 0, 0] == 0).mean() - 0.3) < 0.03
  assert (
    abs(((a == 0) & (b == 0))[:, 0, 0].mean() - 0.09) < 0.02
  )  # the two branches are independent
  assert DropPath(0.3)(0, x, keys)[0] is x and DropPath(0.3)(0, x, keys)[1] is keys
  rates = [drop.rate for drop in drop_paths(0.1, 15, keys)]
  np.testing.assert_allclose(rates, np.linspace(0, 0.1, 15))
  first, last = (np.asarray(drop_paths(0.5, 3, keys)[i](0, x)[0])[:, 0, 0] == 0 for i in (1, 2))
  assert abs((first & last).mean() - 0.125) < 0.03  # blocks too


@pytest.mark.parametrize("encoder", [pytest.param("convvit", marks=pytest.mark.variant), "vit"])
def test_dropping_needs_keys(encoder):
  config = tiny.finetune_config(encoder)
  model = finetune.make_model(config, 10)
  images = jax.random.normal(jax.random.key(0), (6, 32, 48, 3))
  params = jax.jit(model.init)(jax.random.key(1), images)["params"]
  params["head"]["kernel"] = jax.random.normal(jax.random.key(2), params["head"]["kernel"].shape)
  run = jax.jit(model.apply)
  plain, dropped, again, other = (
    np.asarray(run({"params": params}, images, keys)[0])
    for keys in (None, *(jax.random.split(jax.random.key(seed), 6) for seed in (0, 0, 1)))
  )
  np.testing.assert_array_equal(dropped, again)
  changed_rows = (np.abs(dropped - plain).max(1) > 1e-6), (np.abs(dropped - other).max(1) > 1e-6)
  assert changed_rows[0].any() and changed_rows[1].any()


@pytest.mark.parametrize(
  "encoder, values",
  [
    pytest.param("convvit", {}, marks=pytest.mark.variant),
    pytest.param("convvit", dict(encoder__cls_token=True, pool="cls"), marks=pytest.mark.variant),
    ("vit", {}),
  ],
)
def test_it_starts_from_a_run(tmp_path, encoder, values):
  own = {key: value for key, value in values.items() if key != "pool"}
  _, params = finished_run(tmp_path, encoder, **own)
  config = tiny.finetune_config(encoder, init_from=str(tmp_path), **values)
  preflight.check(config, num_devices=8)
  task = finetune.make(config)
  fresh = jax.jit(task.init)(jax.random.key(0))[0]
  known = {
    "/".join(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(fresh)
  }
  assert task.pretrained.keys() <= known.keys()
  left = {name for name in known if name not in task.pretrained}
  assert left == {
    name for name in known if not name.startswith("encoder/")
  }  # fc_norm and head alone are new
  kernel = "patch_embed1/proj" if encoder == "convvit" else "patch_embed"
  tree = params["encoder"]
  for part in kernel.split("/"):
    tree = tree[part]
  np.testing.assert_array_equal(task.pretrained[f"encoder/{kernel}/kernel"], tree["kernel"])
  assert (
    "starting from" in task.notes[0]
    and task.identity["start"]
    != finetune.make(tiny.finetune_config(encoder, **values)).identity["start"]
  )


def test_positions_are_interpolated_to_another_image_size(tmp_path):
  finished_run(tmp_path)
  task = finetune.make(tiny.finetune_config(init_from=str(tmp_path), image_size=(48, 48)))
  assert task.pretrained["encoder/pos_embed"].shape == (1, 36, 24)
  assert "position table 4x6 interpolated to 6x6" in task.notes[0]


def test_another_architecture_is_refused(tmp_path):
  finished_run(tmp_path)
  with pytest.raises(
    WeightsError, match=r"another architecture: depths .*\(1, 1, 1\).* there, .*\(1, 1, 3\).* here"
  ):
    finetune.make(tiny.finetune_config(init_from=str(tmp_path), encoder__depths=(1, 1, 3)))
  with pytest.raises(WeightsError, match="no such file or folder"):
    finetune.make(tiny.finetune_config(init_from=str(tmp_path / "absent")))


@pytest.mark.parametrize(
  "values, message",
  [
    (dict(init_from=None), "config.init_from is not set"),
    (dict(pool="max"), "config.pool='max' is not one of mean, cls"),
    (dict(pool="cls"), "needs an encoder with a CLS token"),
    (dict(mix__smoothing=1.0), r"config.mix.smoothing=1.0 must lie in \[0, 1\)"),
    (dict(mix__mixup_alpha=-1.0), "config.mix.mixup_alpha=-1.0 must be"),
    (dict(mix__groups=3), "config.mix.groups=3 does not divide"),
    (dict(optim__layer_decay=0.0), "config.optim.layer_decay=0.0"),
    (dict(encoder__drop_path=1.0), "config.encoder.drop_path=1.0"),
  ],
)
def test_mistakes_are_named(values, message):
  with pytest.raises(ConfigError, match=message) as error:
    preflight.check(tiny.finetune_config(**values), num_devices=8)
  assert len(str(error.value).splitlines()) == 1


def test_images_without_classes_are_refused(tmp_path):
  for i in range(20):
    Image.new("RGB", (32, 48), (i, i, i)).save(tmp_path / f"{i}.png")
  with pytest.raises(DataError, match="no labels to train on"):
    finetune.make(tiny.finetune_config(data__source=f"folder:{tmp_path}"))


def test_other_classes_to_evaluate_are_found_before_anything_starts(tmp_path):
  for split, names in (("train", "abc"), ("val", "abd")):
    for name in names:
      (tmp_path / split / name).mkdir(parents=True)
      Image.new("RGB", (48, 32)).save(tmp_path / split / name / "x.png")
  config = tiny.finetune_config(data__source=f"folder:{tmp_path}")
  with pytest.raises(ConfigError, match="d is not among the classes of .*: a, b, c.*no classes to"):
    preflight.check(config, num_devices=8)


def test_accuracy_counts_every_image_once_on_any_devices():
  config = tiny.finetune_config(
    data__holdout_every=9
  )  # 199 held-out images: no multiple of any batch

  def predict(
    params, extra, frozen, batch, keys
  ):  # right for labels below 6, second for the next two, never for 8 and 9
    label = batch["label"]
    shift = jnp.where(label < 6, 0, jnp.where(label < 8, 1, -1))
    logits = (
      jax.nn.one_hot((label + shift) % 10, 10) * 2
      + jax.nn.one_hot(label, 10) * jnp.where(label < 8, 1, -1)[:, None]
    )
    return {"logits": logits}

  task = predicting_task(predict, config)
  held_out = data.open_split(config.data, "eval")
  labels = np.array([held_out[i]["label"] for i in range(199)])
  results = []
  for devices, batch_size in ((1, 64), (8, 40)):
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    results.append(
      evaluator.Evaluator(task, {}, config, mesh, None, batch_size=batch_size).run({}, (), 0)
    )
  assert (
    results[0]
    == results[1]
    == {"top1": (labels < 6).mean(), "top5": (labels < 8).mean(), "images": 199}
  )


def test_a_run_from_start_to_end(tmp_path):
  """Pre-trained weights in, held-out accuracy out.

  The same command continues; another start is refused.
  """
  finished_run(tmp_path / "pretrained", "vit")
  (tmp_path / "finetune.py").write_text(
    "from tests import tiny\ndef get_config():\n"
    f"  return tiny.finetune_config('vit', init_from={str(tmp_path / 'pretrained')!r}, "
    "optim__ema_decay=0.9)\n"
  )

  def main(*arguments):
    options = [f"--config={tmp_path}/finetune.py", f"--workdir={tmp_path}/run", *arguments]
    return run_program(["-m", "mrmae_jax", "finetune", *options])

  done = main()
  assert done.returncode == 0, done.stderr
  assert "starting from" in done.stdout and "accuracy/top1" in done.stdout
  rows = [
    json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  ]
  final = [row for row in rows if "accuracy/top1" in row][-1]
  assert (
    final["accuracy/images"] == 359 and 0 <= final["accuracy/top1"] <= final["accuracy/top5"] <= 1
  )
  assert "already holds all" in main().stdout

  model = mrmae_jax.load(tmp_path / "run")  # logits as the task gives them
  assert model.class_names == tuple("0123456789")
  images = np.random.default_rng(0).integers(0, 256, (3, 32, 48, 3), np.uint8)
  config = tiny.finetune_config("vit")
  own = read_params(tmp_path / "run", "encoder", "fc_norm", "head").params
  expected = finetune.make(config).predict(own, (), {}, {"image": jnp.asarray(images)}, None)[
    "logits"
  ]
  np.testing.assert_allclose(model.classify(images), expected, atol=1e-5)
  refused = main("--config.init_from=")
  assert refused.returncode == 2 and "start" in refused.stderr
