"""What a run leaves, and runs of one or several processes, each in the part of a host."""

import json

import jax.numpy as jnp

from mrmae_jax import data
from mrmae_jax.runs.checkpoint import Checkpoints
from mrmae_jax.tasks import pretrain
from mrmae_jax.train import TrainState
from tests import tiny
from tests.helpers.models import random_params
from tests.helpers.programs import Program, finish, free_port, host_flags


def start(
  index,
  count,
  devices,
  log,
  *arguments,
  task="pretrain",
  config="tests/tiny.py",
  port=None,
  **options,
):
  """Starts process `index` of a run of `count`; its output goes to `log`.

  `options` are those of `Program`.
  """
  words = ["-m", "mrmae_jax", task, f"--config={config}", *host_flags(index, count, port)]
  return Program([*words, *arguments], log, devices=devices, **options)


def run(tmp_path, name, count, devices, *arguments, **options):
  """Runs `count` processes to their end; returns the metrics."""
  port, logs = free_port(), [tmp_path / f"{name}_{i}.log" for i in range(count)]
  processes = [
    start(
      i, count, devices, logs[i], f"--workdir={tmp_path / name}", *arguments, port=port, **options
    )
    for i in range(count)
  ]
  codes = finish(processes)
  assert codes == [0] * count, "\n".join(log.read_text()[-2000:] for log in logs)
  return metrics(tmp_path / name)


def metrics(workdir):
  """Returns {step: record of the losses}, {step: record of the evaluation}."""
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return {row["step"]: row for row in rows if "loss" in row}, {
    row["step"]: row for row in rows if "loss" not in row
  }


def finished_run(workdir, encoder="convvit", **values):
  """Leaves what a run leaves: its configuration and a checkpoint. Returns its model and parameters.

  The parameters are random numbers; an initialization takes seconds to compile.
  """
  config = tiny.changed(tiny.get_config(encoder), teacher__path="", **values)
  model = pretrain.make_model(config, {})
  params = random_params(model, tuple(config.image_size), seed=3)
  images = data.open_split(config.data, "train").fingerprint
  saving = Checkpoints(workdir, {"train images": images})
  saving.save(7, TrainState(jnp.int32(7), params, (), (jnp.zeros(3),), jnp.float32(0)))
  saving.close()
  (workdir / "config.json").write_text(config.to_json())
  return model, params
