"""A task outside of the package trains, is evaluated, is killed and resumes, without a change to
the package.
"""

import shutil
import time
from pathlib import Path

import jax
import numpy as np

from mrmae_jax import optim, sharding, train
from mrmae_jax.runs import log
from mrmae_jax.runs.checkpoint import Checkpoints
from tests import regression
from tests.faults import small
from tests.helpers.programs import Program
from tests.helpers.tasks import init_state, make_tx

ROOT = Path(__file__).parent.parent
FIT = """
import sys
from mrmae_jax import train
from tests import regression
config = regression.get_config()
train.fit(config, regression.make(config), sys.argv[1])
"""


def start(workdir):
  return Program(["-c", FIT, workdir], f"{workdir}.log")


def records(workdir, key):
  return {r["step"]: r[key] for r in log.read_metrics(workdir) if key in r}


def final_state(workdir):
  config = regression.get_config()
  task = regression.make(config)
  tx, _ = make_tx(task, 1, 1)
  device = sharding.replicated(sharding.make_mesh(devices=jax.devices()[:1]))
  place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device)
  shapes = jax.tree.map(place, jax.eval_shape(lambda: init_state(task, tx)))
  checkpoints = Checkpoints(workdir, train.identity(config, task))
  restored = checkpoints.restore(shapes)
  checkpoints.close()
  return jax.device_get(restored.state)


def test_a_task_of_a_user_trains_is_killed_and_resumes_bit_for_bit(tmp_path):
  assert start(tmp_path / "whole").wait(300) == 0
  accuracy = records(tmp_path / "whole", "accuracy/top1")
  assert accuracy[0] < 0.3 and accuracy[max(accuracy)] > 0.6
  losses = records(tmp_path / "whole", "loss")

  process = start(tmp_path / "killed")
  deadline = time.monotonic() + 300
  while len(list((tmp_path / "killed" / "checkpoints").glob("[1-9]*"))) < 2:
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.01)
  process.kill()
  process.wait()
  shutil.copytree(tmp_path / "killed", tmp_path / "resumed")
  assert start(tmp_path / "resumed").wait(300) == 0
  assert records(tmp_path / "resumed", "loss") == losses
  whole, resumed = final_state(tmp_path / "whole"), final_state(tmp_path / "resumed")
  jax.tree.map(np.testing.assert_array_equal, whole, resumed)
  assert np.ptp(whole.extra["mean"]) > 0.1  # the statistics moved


def test_extra_stays_in_a_skipped_step():
  config = regression.get_config()
  task = regression.make(config)
  spoilt = task._replace(
    loss=lambda p, e, f, b, k: (lambda value, aux: (value * b["scale"][0], aux))(
      *task.loss(p, e, f, b, k)
    )
  )
  tx, schedule = make_tx(task, 1, 1)
  step = jax.jit(train.make_train_step(spoilt, tx, schedule, 0))
  rng = np.random.default_rng(0)
  batch = {
    "image": rng.integers(0, 256, (4, 16, 16, 3), np.uint8),
    "target": np.eye(10, dtype=np.float32)[:4],
  }
  state = init_state(task, tx)
  good, _ = step(state, (), batch | {"scale": np.ones(4, np.float32)})
  bad, metrics = step(good, (), batch | {"scale": np.full(4, np.nan, np.float32)})
  assert int(metrics["skipped"]) == 1 and np.any(good.extra["mean"] != state.extra["mean"])
  jax.tree.map(np.testing.assert_array_equal, good[1:], bad[1:])
  assert int(bad.step) == 2


def test_extra_passes_from_one_micro_batch_to_the_next():
  task = regression.make(regression.get_config())
  tx, schedule = make_tx(task, 1, 1)
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (4, 16, 16, 3), np.uint8)
  batch = {"image": image, "target": np.eye(10, dtype=np.float32)[:4]}
  state, _ = jax.jit(train.make_train_step(task, tx, schedule, 0, accum_steps=2))(
    init_state(task, tx), (), batch
  )
  mean = 0.0
  for rows in (image[::2], image[1::2]):  # micro-batch i takes every second example
    mean = 0.9 * mean + 0.1 * rows.reshape(2, -1).mean(0) / 255.0
  np.testing.assert_allclose(state.extra["mean"], mean, atol=1e-6)


def test_alarms_warn_once_and_are_not_logged(tmp_path, capsys):
  config, task = small.get_config(), small.toy_task()
  config.epochs, config.log_every = 4 * 16 / 1438, 1

  def loss(*arguments):
    value, (terms, extra) = task.loss(*arguments)
    return value, (terms | {"low": 0 * value, "high": 0 * value + 1}, extra)

  alarms = {"low": (0.5, "low is too low"), "high": (0.5, "high is too low")}
  train.fit(config, task._replace(loss=loss, alarms=alarms), tmp_path)
  out = capsys.readouterr().out
  assert out.count("warning: low is too low (low 0, expected at least 0.5)\n") == 1
  assert "high" not in out and "step 4/4  grad_norm" in out
  assert all({"loss", "pixel"} <= r.keys() and "low" not in r for r in log.read_metrics(tmp_path))


def test_an_optimizer_from_optax_is_skippable():
  import optax

  tx = optim.skippable(optax.adam(1e-3))
  params = {"w": np.ones(3, np.float32)}
  before = tx.init(params)
  _, after = tx.update({"w": np.ones(3, np.float32)}, before, params, bad=True)
  jax.tree.map(np.testing.assert_array_equal, before, after)
  assert optim.skippable(tx) is tx
