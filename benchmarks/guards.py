"""What it costs that nothing is lost: the step beside one without safeguards, the loop's watch, the checksums of a save.

  mrmae bench guards --config=configs/convmae.py:base --config.batch_size=8 --config.dtype=float32

Measured in alternation: the training step without safeguards and with them, which leaves out an update that is not finite; the
checksums of the whole state, which each save takes on the devices. And, on the host, what the loop does besides in each step: it looks for signals,
tells the watching thread that it is alive, keeps the account of time, and reads whether the update was made.
"""

import json
import statistics
import time

from absl import flags
from ml_collections import config_flags

from mrmae_jax.cli import bench

CALLS = 1000  # of what takes microseconds


def define_flags() -> flags.FlagValues:
  """The options, apart from absl's global ones."""
  own = flags.FlagValues()
  config_flags.DEFINE_config_file(
    "config", "configs/mrmae.py", "Configuration file.", flag_values=own
  )
  flags.DEFINE_integer("rounds", 7, "How often each is timed.", lower_bound=1, flag_values=own)
  flags.DEFINE_string("json", "", "A .json file for the figures.", flag_values=own)
  return own


def run(options) -> str:
  """The command with an attribute per flag; returns the table.

  Raises:
    ConfigError, WeightsError: mistakes in the configuration, or weights that do not load.
  """
  import jax  # --help is answered without jax

  from mrmae_jax.runs import checkpoint, nonfinite, supervision

  config, about = options.config, bench.machine()
  print(json.dumps(about), flush=True)
  guarded, bare = bench.make_step(config), bench.make_step(config, safeguards=False)
  seconds = bench.alternate(
    {
      "bare": bare.run,
      "step": guarded.run,
      "checksums": lambda: checkpoint.checksums(guarded.state()),
    },
    options.rounds,
  )
  metrics, skips = jax.device_get(guarded.run()), nonfinite.Skips(config.optim.max_skips)
  with supervision.supervised(config.hang_s), supervision.phase("step"):
    began = time.perf_counter()
    for step in range(CALLS):
      with supervision.phase("data"):
        pass
      skips.count(step, {name: float(value) for name, value in metrics.items()})
      supervision.beat()
    seconds["watch"] = [(time.perf_counter() - began) / CALLS]

  whole = statistics.median(seconds["bare"])
  share = lambda values: bench.spread([100 * value / whole for value in values])
  extra = [step - bare for step, bare in zip(seconds["step"], seconds["bare"])]
  rows = [
    ["", "s", "% of that step"],
    ["a step without safeguards", bench.spread(seconds["bare"], 3), ""],
    ["left out if it is not finite", bench.spread(extra, 3), share(extra)],
    ["the loop's watch", f"{seconds['watch'][0]:.6f}", f"{100 * seconds['watch'][0] / whole:.3f}"],
    ["checksums, of a save", bench.spread(seconds["checksums"], 3), share(seconds["checksums"])],
  ]
  bench.write_json(
    options.json,
    {"machine": about, "seconds": seconds, "batch_size": config.batch_size, "dtype": config.dtype},
  )
  saves = statistics.median(seconds["checksums"]) / whole / 0.01
  return f"batch {config.batch_size}, {config.dtype}\n{bench.table(rows)}\nchecksums are 1 % with a save in {saves:,.0f} steps"
