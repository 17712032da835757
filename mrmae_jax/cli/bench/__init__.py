"""How fast it is: the training step, the loader, both together, and pairs of ways to do the same thing.

Everything is measured on random data of the real shapes, with the optimiser, after a warm-up. What is compared runs in alternation
in one process, A B C, then C B A, so that a machine that becomes slower becomes so for all; ratios are those of one round.
"""

import json
import statistics
import time
from pathlib import Path
from typing import Any, Callable, NamedTuple

SUBCOMMANDS = {
  "step": "the training step of a configuration: images/s, work by component, share of the chip's limits",
  "loader": "images/s of the input pipeline, beside a torch DataLoader",
  "both": "the real loop, loader and step together: what the step waits for",
  "compare": "pairs in alternation: visible and dense, views, memory for time, transformers, the original ConvMAE",
  "guards": "what it costs that nothing is lost: updates left out, signals, the watch, checksums",
  "forms": "depthwise convolution, gathers and attention written in several ways, here or for a TPU that is not here",
}


class Step(NamedTuple):
  """A compiled training step on random images, ready to run.

  Attributes:
    run: does one update and waits for it.
    state: () -> the newest state.
    program: the compiled step.
    plan: of `train.plan`.
    compile_s: seconds of tracing and compiling.
    batch_size: images per update.
  """

  run: Callable[[], Any]
  state: Callable[[], Any]
  program: Any
  plan: Any
  compile_s: float
  batch_size: int


def make_task(config):
  """The task of a configuration; its images are not looked at, and need not be here.

  Raises:
    ConfigError, WeightsError: mistakes in the configuration, or weights that do not load.
  """
  import jax  # --help is answered without jax

  from mrmae_jax import preflight

  if config.task == "pretrain" and (config.data.source or "tfds:").startswith("tfds:"):
    config.data.source = "digits"
  preflight.check(config, jax.device_count())
  return preflight.open_task(config)


def make_step(config, task=None, batch=None, safeguards: bool = True) -> Step:
  """Compiles the training step of a configuration for the devices that are here; see `make_task` for what it raises.

  Args:
    config: what to train.
    task: if it is not that of the configuration.
    batch: arrays to train on, by name; those that are not given are random.
    safeguards: see train.plan.
  """
  import jax
  import numpy as np

  from mrmae_jax import sharding, train

  task = make_task(config) if task is None else task
  plan = train.make_plan(config, task, sharding.make_mesh(**config.mesh), 1_281_167)
  placed = lambda shapes: jax.tree.map(lambda x: x.sharding, shapes)
  state = jax.jit(plan.init, out_shardings=placed(plan.state))(jax.random.key(0), task.pretrained)
  frozen, rng = jax.device_put(task.frozen, placed(plan.frozen)), np.random.default_rng(0)
  drawn = {
    name: rng.integers(0, 256 if name == "image" else 2, x.shape).astype(x.dtype)
    for name, x in plan.batch.items()
  }
  batch = {
    name: jax.device_put(x, plan.batch[name].sharding)
    for name, x in (drawn | (batch or {})).items()
  }
  began = time.perf_counter()
  program = plan.step.lower(plan.state, plan.frozen, plan.batch).compile()
  compile_s, held = time.perf_counter() - began, [state]

  def run():
    held[0], metrics = program(held[0], frozen, batch)
    return jax.block_until_ready(metrics)

  return Step(run, lambda: held[0], program, plan, compile_s, config.batch_size)


def alternate(
  variants: dict[str, Callable[[], Any]], rounds: int, warm_up: int = 2
) -> dict[str, list[float]]:
  """Seconds of each call, round by round: every variant once, in one order and then in the other."""
  for _ in range(warm_up):
    for run in variants.values():
      run()
  seconds = {name: [] for name in variants}
  for i in range(rounds):
    for name in list(variants)[:: -1 if i % 2 else 1]:
      began = time.perf_counter()
      variants[name]()
      seconds[name].append(time.perf_counter() - began)
  return seconds


def spread(values: list[float], digits: int = 2) -> str:
  """Median [lowest .. highest]."""
  return "{:,.{d}f} [{:,.{d}f} .. {:,.{d}f}]".format(
    statistics.median(values), min(values), max(values), d=digits
  )


def table(rows: list[list[str]]) -> str:
  """Columns as wide as they need to be, the first to the left, the others to the right."""
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  return "\n".join(
    "  ".join(
      cell.rjust(width) if i else cell.ljust(width)
      for i, (cell, width) in enumerate(zip(row, widths))
    )
    for row in rows
  )


def machine() -> dict[str, str]:
  """What the figures belong to: device, versions, and the commit where the code is a checkout."""
  import os
  import platform
  import subprocess

  import jax

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
  """Writes a result to `path`, whole or not at all; nothing for ""."""
  if path:
    from mrmae_jax.runs.paths import atomic_write

    with atomic_write(Path(path).expanduser()) as unfinished:
      unfinished.write_text(json.dumps(result, indent=2) + "\n")
