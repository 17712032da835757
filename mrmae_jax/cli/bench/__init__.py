"""Benchmarks: `mrmae bench step`, `both` and `loader`, and what they share.

Everything is measured on random data of the real shapes, with the optimizer, after a warm-up. Ways
that are compared run in alternation in one process, A B C, then C B A: a machine that slows down
slows down for all. Ratios are those of one round.
"""

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any, Callable, NamedTuple

import jax
import numpy as np

from mrmae_jax import preflight, sharding, train
from mrmae_jax.runs.paths import atomic_write

IMAGENET_IMAGES = 1_281_167  # sets the length of the schedule, and nothing that is measured
REPEATS = 30


class Step(NamedTuple):
  """A compiled training step on random images, ready to run.

  Attributes:
    run: does so many updates, waits for the last one and returns its metrics.
    state: () -> the newest state.
    program: the compiled step.
    compile_s: seconds of tracing and compiling.
  """

  run: Callable[[int], Any]
  state: Callable[[], Any]
  program: Any
  compile_s: float


def run(options: argparse.Namespace) -> str:
  """Runs the benchmark `options.benchmark`, a module of this folder; returns its text."""
  return importlib.import_module(f"mrmae_jax.cli.bench.{options.benchmark}").run(options)


def make_task(config) -> train.Task:
  """Returns the task of a configuration; pre-training on a tfds data set takes the digits instead.

  Raises:
    ConfigError, WeightsError: mistakes in the configuration, or weights that do not load.
  """
  if config.task == "pretrain" and (config.data.source or "tfds:").startswith("tfds:"):
    config.data.source = "digits"
  preflight.check(config, jax.device_count())
  return preflight.open_task(config)


def make_plan(config, task: train.Task) -> train.Plan:
  """Returns the plan of a task for the devices that are present."""
  return train.make_plan(config, task, sharding.make_mesh(**config.mesh), IMAGENET_IMAGES)


def make_step(config, task: train.Task | None = None, batch: dict | None = None) -> Step:
  """Compiles the training step of a configuration; see `make_task` for what it raises.

  Args:
    config: what to train.
    task: if it is not that of the configuration.
    batch: see `compile_step`.
  """
  task = make_task(config) if task is None else task
  return compile_step(make_plan(config, task), task, batch)


def compile_step(plan: train.Plan, task: train.Task, batch: dict | None = None) -> Step:
  """Compiles the step of a plan.

  Args:
    plan: of `make_plan`.
    task: its task.
    batch: arrays to train on, by name; those that are not given are random.
  """
  shardings = lambda shapes: jax.tree.map(lambda x: x.sharding, shapes)
  init = jax.jit(plan.init, out_shardings=shardings(plan.state))
  state = init(jax.random.key(0), task.pretrained)
  frozen = jax.device_put(task.frozen, shardings(plan.frozen))
  batch = jax.device_put(_random_batch(plan.batch) | (batch or {}), shardings(plan.batch))
  start = time.perf_counter()
  program = plan.step.lower(plan.state, plan.frozen, plan.batch).compile()
  compile_s = time.perf_counter() - start
  newest = [state]

  def run(updates):
    for _ in range(updates):
      newest[0], metrics = program(newest[0], frozen, batch)
    return jax.block_until_ready(metrics)

  return Step(run, lambda: newest[0], program, compile_s)


def _random_batch(shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, np.ndarray]:
  """Returns random pixels for "image", and random 0s and 1s for others, such as labels."""
  rng = np.random.default_rng(0)
  limit = lambda name: 256 if name == "image" else 2
  return {name: rng.integers(0, limit(name), x.shape).astype(x.dtype) for name, x in shapes.items()}


def alternate(
  variants: dict[str, Callable[[int], Any]], rounds: int, warm_up: int = 2
) -> dict[str, list[float]]:
  """Returns seconds by variant, one figure a round, every second round backwards.

  A training run does not wait for an update before it starts the next: on an H200 the wait makes a
  step of 89 ms one of 106 ms. So an accelerator gets REPEATS of them in a round, and waits once. A
  CPU does the work once before it is timed, as a step follows a step in training: after another
  variant has given back its memory, Linux takes up to a second longer to hand it out again.

  Args:
    variants: by name, what does its work as often as it is told, and waits for the last time.
    rounds: how often each is timed.
    warm_up: how often each is done before.
  """
  for call in variants.values():
    call(warm_up)
  is_cpu = jax.default_backend() == "cpu"
  repeats = 1 if is_cpu else REPEATS
  seconds = {name: [] for name in variants}
  for i in range(rounds):
    for name in list(variants)[:: -1 if i % 2 else 1]:
      if is_cpu and len(variants) > 1:
        variants[name](1)
      start = time.perf_counter()
      variants[name](repeats)
      seconds[name].append((time.perf_counter() - start) / repeats)
  return seconds


def format_spread(values: list[float], digits: int = 2) -> str:
  """Returns "median [lowest .. highest]"."""
  return "{:,.{d}f} [{:,.{d}f} .. {:,.{d}f}]".format(
    statistics.median(values), min(values), max(values), d=digits
  )


def format_table(rows: list[list[str]]) -> str:
  """Returns rows as lines; the first column is aligned to the left, the others to the right."""
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  align = lambda i, cell: cell.rjust(widths[i]) if i else cell.ljust(widths[i])
  return "\n".join("  ".join(align(i, cell) for i, cell in enumerate(row)) for row in rows)


def describe_machine() -> dict[str, str]:
  """Returns what the figures belong to: device, versions, and the commit of a checkout."""
  git = subprocess.run(
    ["git", "describe", "--always", "--dirty"],
    cwd=Path(__file__).parent,
    capture_output=True,
    text=True,
    check=False,
  )
  return {
    "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    "cores": str(os.cpu_count()),
    "python": platform.python_version(),
    "jax": jax.__version__,
    "commit": git.stdout.strip() or "unknown",
  }


def write_json(path: str, result) -> None:
  """Writes a result to the file `path`; "" writes nothing."""
  if path:
    with atomic_write(Path(path).expanduser()) as tmp:
      tmp.write_text(json.dumps(result, indent=2) + "\n")
