"""Measures what it costs that nothing is lost: the step beside one without safeguards, the loop's
watch, the checksums of a save.

  python -m benchmarks.guards --config=convmae:base --config.batch_size=8 --config.dtype=float32

Measured in alternation: the training step of the package, which skips an update that is not finite;
the same step without that; and the checksums of the whole state, which each save takes on the
devices. On the host, what the loop does besides in each step: it looks for signals, tells the
watching thread that it is alive, accounts for time, and reads whether the update was made.
"""

import json
import statistics
import sys
import time

import jax
import optax

from benchmarks.command import make_parser, run_command
from mrmae_jax import optim, train
from mrmae_jax.cli import bench
from mrmae_jax.cli.configs import load_config
from mrmae_jax.errors import UsageError
from mrmae_jax.runs import checkpoint, nonfinite, supervision

CALLS = 1000  # of what takes microseconds


def unguarded_step(config, task: train.Task, plan: train.Plan):
  """Returns (state, frozen, batch) -> (state, metrics), jitted, which makes every update.

  Raises:
    UsageError: the configuration has micro-batches.
  """
  if config.optim.accum_steps != 1:
    raise UsageError(f"config.optim.accum_steps={config.optim.accum_steps} given; expected 1")
  tx, schedule = task.optimizer(plan.steps)

  def step(state: train.TrainState, frozen, batch):
    keys = train.sample_keys(config.seed, state.step, config.batch_size)
    loss = lambda params: task.loss(params, state.extra, frozen, batch, keys)
    (value, (terms, extra)), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {
      "loss": value,
      **terms,
      "lr": schedule(state.step),
      "grad_norm": optim.global_norm(grads),
      **train.update_norms(params, updates),
    }
    state = state._replace(step=state.step + 1, params=params, extra=extra, opt_state=opt_state)
    return state, metrics

  shardings = jax.tree.map(lambda x: x.sharding, plan.state)
  return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def compile_steps(config) -> dict[str, bench.Step]:
  """Returns the step "bare", without safeguards, and the step "guarded" of the package."""
  task = bench.make_task(config)
  plan = bench.make_plan(config, task)
  bare = plan._replace(step=unguarded_step(config, task, plan))
  return {"bare": bench.compile_step(bare, task), "guarded": bench.compile_step(plan, task)}


def run(options) -> str:
  """Measures, and returns the table.

  Raises:
    UsageError: the configuration has micro-batches.
    ConfigError, WeightsError: mistakes in the configuration, or weights that do not load.
  """
  config = load_config(options.config, options.overrides)
  machine = bench.describe_machine()
  print(json.dumps(machine), flush=True)
  steps = compile_steps(config)
  guarded = steps["guarded"]
  variants = {
    "bare": steps["bare"].run,
    "step": guarded.run,
    "checksums": lambda n: [checkpoint.checksums(guarded.state()) for _ in range(n)],
  }
  seconds = bench.alternate(variants, options.rounds)
  seconds["watch"] = [_watch_seconds(config, jax.device_get(guarded.run(1)))]
  result = {"machine": machine, "seconds": seconds}
  bench.write_json(options.json, result | {"batch_size": config.batch_size, "dtype": config.dtype})
  return f"batch {config.batch_size}, {config.dtype}\n{_describe(seconds)}"


def _watch_seconds(config, metrics) -> float:
  """Returns the seconds that the loop's watch takes in a step."""
  skips = nonfinite.Skips(config.optim.max_skips)
  with supervision.supervised(config.hang_s), supervision.phase("step"):
    start = time.perf_counter()
    for step in range(CALLS):
      with supervision.phase("data"):
        pass
      skips.count(step, {name: float(value) for name, value in metrics.items()})
      supervision.beat()
    return (time.perf_counter() - start) / CALLS


def _describe(seconds: dict[str, list[float]]) -> str:
  """Returns the table, and how rare saves must be for checksums to cost 1 %."""
  bare = statistics.median(seconds["bare"])
  share = lambda values: bench.format_spread([100 * value / bare for value in values])
  checksums, watch = seconds["checksums"], seconds["watch"][0]
  extra = [step - bare for step, bare in zip(seconds["step"], seconds["bare"])]
  rows = [
    ["", "s", "% of that step"],
    ["a step without safeguards", bench.format_spread(seconds["bare"], 3), ""],
    ["skipping what is not finite", bench.format_spread(extra, 3), share(extra)],
    ["the loop's watch", f"{watch:.6f}", f"{100 * watch / bare:.3f}"],
    ["checksums, of a save", bench.format_spread(checksums, 3), share(checksums)],
  ]
  saves = statistics.median(checksums) / bare / 0.01
  return f"{bench.format_table(rows)}\nchecksums are 1 % with a save in {saves:,.0f} steps"


def main(argv: list[str] | None = None) -> int:
  """Runs a command line (default: sys.argv); returns the exit code."""
  return run_command(make_parser("guards", __doc__, "mrmae"), run, argv)


if __name__ == "__main__":
  sys.exit(main())
