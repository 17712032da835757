"""Measures the real loop, loader and training step together: images per second, and the share of
the time that the step waits for data.

  mrmae bench both --config=mrmae:base --config.teacher.path=random \\
      --config.data.source=folder:/path/to/photos --config.batch_size=8

It is the loop of training itself, without evaluations, in a temporary folder.
"""

import argparse
import contextlib
import io
import json
import statistics
import tempfile

import jax
from ml_collections import ConfigDict

from mrmae_jax import data, preflight, train
from mrmae_jax.cli import bench
from mrmae_jax.errors import UsageError
from mrmae_jax.runs.metrics import read_metrics

WARM_UP = 3  # steps, while queues fill


def run(options: argparse.Namespace) -> str:
  """Measures, and returns the figures as text.

  Raises:
    UsageError: the configuration has no source of images.
    ConfigError, WeightsError, DataError: a configuration or images that do not fit.
  """
  config = options.config
  if not config.data.source:
    raise UsageError("--config.data.source is missing, e.g. folder:/path/to/photos")
  machine = bench.describe_machine()
  print(json.dumps(machine), flush=True)
  source = data.open_split(config.data, "train")
  with config.unlocked():
    config.evals = ConfigDict()
  config.log_every = 1
  config.epochs = (options.steps + WARM_UP) * config.batch_size / len(source)
  config.optim.warmup_epochs = min(config.optim.warmup_epochs, config.epochs)
  preflight.check(config, jax.device_count())
  with tempfile.TemporaryDirectory() as folder:
    with contextlib.redirect_stdout(io.StringIO()):  # a line a step
      train.fit(config, preflight.open_task(config), folder)
    steps = [record for record in read_metrics(folder) if record["step"] > WARM_UP]
  seconds = [config.batch_size / record["images_per_s"] for record in steps]
  waits = [record["data_wait"] * s for record, s in zip(steps, seconds)]
  result = {
    "machine": machine,
    "seconds": seconds,
    "images_per_s": config.batch_size / statistics.median(seconds),
    "data_wait": sum(waits) / sum(seconds),
  }
  bench.write_json(options.json, result)
  return (
    f"{source.description}\n"
    f"batch {config.batch_size}: {result['images_per_s']:,.1f} images/s, a step "
    f"{bench.format_spread(seconds)} s, {result['data_wait']:.2%} of it waiting for data"
  )
