"""The real loop, loader and training step together: images per second, and the share of the time that the step waits for data.

  mrmae bench both --config=configs/mrmae.py:base --config.teacher.path=random \\
      --config.data.source=folder:/path/to/photos --config.batch_size=8

It is the loop of training itself, without evaluations, in a folder that is thrown away.
"""

import contextlib
import io
import json
import statistics
import tempfile

from absl import flags
from ml_collections import ConfigDict, config_flags

from mrmae_jax.cli import bench
from mrmae_jax.errors import UsageError

WARM_UP = 3  # steps, while queues fill


def define_flags() -> flags.FlagValues:
  """The options, apart from absl's global ones."""
  own = flags.FlagValues()
  config_flags.DEFINE_config_file(
    "config", "configs/mrmae.py", "Configuration file, with its data.", flag_values=own
  )
  flags.DEFINE_integer("steps", 20, "Steps that are timed.", lower_bound=1, flag_values=own)
  flags.DEFINE_string("json", "", "A .json file for the figures.", flag_values=own)
  return own


def run(options) -> str:
  """The command with an attribute per flag; returns the figures for people.

  Raises:
    UsageError, ConfigError, WeightsError, DataError: options, a configuration or images that do not fit.
  """
  import jax  # --help is answered without jax

  from mrmae_jax import data, preflight, train
  from mrmae_jax.runs import log

  config = options.config
  if not config.data.source:
    raise UsageError("--config.data.source is missing, e.g. folder:/path/to/photos")
  about = bench.machine()
  print(json.dumps(about), flush=True)
  config.evals, config.log_every = ConfigDict(), 1
  source = data.open_split(config.data, "train")
  config.epochs = (options.steps + WARM_UP) * config.batch_size / len(source)
  config.optim.warmup_epochs = min(config.optim.warmup_epochs, config.epochs)
  preflight.check(config, jax.device_count())
  with tempfile.TemporaryDirectory() as folder:
    with contextlib.redirect_stdout(io.StringIO()):  # a line a step
      train.fit(config, bench.make_task(config), folder)
    steps = [record for record in log.read_metrics(folder) if record["step"] > WARM_UP]
  seconds = [config.batch_size / record["images_per_s"] for record in steps]
  waited = sum(record["data_wait"] * second for record, second in zip(steps, seconds)) / sum(
    seconds
  )
  result = {
    "machine": about,
    "seconds": seconds,
    "images_per_s": config.batch_size / statistics.median(seconds),
    "data_wait": waited,
  }
  bench.write_json(options.json, result)
  return (
    f"{source.description}\nbatch {config.batch_size}: {result['images_per_s']:,.1f} images/s, a step "
    f"{bench.spread(seconds, 2)} s, {waited:.2%} of it waiting for data"
  )
