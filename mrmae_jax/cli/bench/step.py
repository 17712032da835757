"""Measures the training step of a configuration: images per second, work by component, share of
the chip's limits.

  mrmae bench step --config=mrmae:base --config.teacher.path=random --batch_sizes=128,256,512

teacher.path=random is a tower of the teacher's shape with random weights: nothing is fetched. By
component: GFLOP of the products and convolutions of one image and step, backward pass included, and
MB that the compiled program's kernels read and write. MFU is necessary work over the chip's peak:
that of the sparse form without recomputation, whatever was run. The roofline is the larger of FLOPs
over peak and bytes over bandwidth. For a chip that hardware.py does not know (a CPU) both are left
out.
--profile=DIR writes a trace of three steps for XProf or TensorBoard, and prints the operations that
took longest.
"""

import argparse
import collections
import json
import re
import statistics
from pathlib import Path

import jax

from mrmae_jax import hardware, program
from mrmae_jax.cli import bench

PROFILED_STEPS = 3


def run(options: argparse.Namespace) -> str:
  """Measures each batch size, and returns the tables.

  Raises:
    ConfigError, WeightsError: mistakes in the configuration, or weights that do not load.
  """
  config = options.config
  sizes = options.batch_sizes or (config.batch_size,)
  machine, results = bench.describe_machine(), []
  print(json.dumps(machine), flush=True)
  for size in sizes:
    config.batch_size = size
    results.append(measure(config, options.rounds, options.profile if size == sizes[-1] else ""))
    print(f"batch {size}: {results[-1]['images_per_s']:,.1f} images/s", flush=True)
  bench.write_json(options.json, {"machine": machine, "results": results})
  return describe(results)


def necessary_flops(config) -> dict[str, float]:
  """Returns the FLOPs by component that the method needs for one image and step.

  That is the work with sparse stages, in which nothing is computed twice.
  """
  config = config.copy_and_resolve_references()
  for key, value in (("sparse", True), ("remat", "none")):
    if key in config.encoder:
      config.encoder[key] = value
  plan = bench.make_plan(config, bench.make_task(config))
  flops = program.flops(plan.step, plan.state, plan.frozen, plan.batch)
  return {part: number / config.batch_size for part, number in flops.items()}


def measure(config, rounds: int, profile: str = "") -> dict:
  """Compiles and times the step of a configuration.

  Args:
    config: validated configuration.
    rounds: how often the step is timed.
    profile: folder for a trace; "": none.

  Returns:
    JSON values. "flops" and "bytes" by component are those of one image and step.
  """
  step, flops = bench.make_step(config), necessary_flops(config)
  seconds = bench.alternate({"step": step.run}, rounds)["step"]
  devices, memory = jax.devices(), step.program.memory_analysis()
  # XLA counts a loop's body once; micro-batches are nearly all of the step.
  scale = config.optim.accum_steps * len(devices) / config.batch_size
  traffic = program.traffic(step.program.as_text())
  size = memory.argument_size_in_bytes + memory.temp_size_in_bytes
  result = {
    "batch_size": config.batch_size,
    "seconds": seconds,
    "compile_s": step.compile_s,
    "flops": flops,
    "bytes": {part: number * scale for part, number in traffic.items()},
    "images_per_s": config.batch_size / statistics.median(seconds),
    "peak_bytes": (devices[0].memory_stats() or {}).get("peak_bytes_in_use", size),
  }
  result["flops_per_s"] = result["images_per_s"] * sum(flops.values())
  if chip := hardware.find_chip(devices[0]):
    by_flops = sum(flops.values()) / (chip.peak_flops * len(devices))
    by_bytes = sum(result["bytes"].values()) / (chip.bandwidth * len(devices))
    result["mfu"] = result["images_per_s"] * by_flops
    result["roofline"] = result["images_per_s"] * max(by_flops, by_bytes)
  if profile:
    result["profile"] = _profile(step, Path(profile).expanduser())
  return result


def _profile(step: bench.Step, folder: Path) -> list[dict]:
  """Traces steps; returns the operations that took longest, with their part of the model."""
  with jax.profiler.trace(str(folder)):
    step.run(PROFILED_STEPS)
  newest = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
  planes = jax.profiler.ProfileData.from_file(str(newest)).planes
  return longest_operations(planes, step.program.as_text())


def longest_operations(planes, text: str, count: int = 20) -> list[dict]:
  """Returns what took longest in PROFILED_STEPS steps: {"ms" of a step, "component", "operation"}.

  The operations of all blocks of a kind count as one. On a GPU a product of matrices is a kernel of
  cuBLAS or cuDNN, whose name does not tell its place in the model: its component is "library".

  Args:
    planes: of `jax.profiler.ProfileData`.
    text: the compiled program.
  """
  # A CUDA kernel has underscores where the operation has dots and dashes.
  spell = lambda name: re.sub(r"[.\-]", "_", name)
  found = re.findall(r'%?([\w.\-]+) = .*op_name="([^"]*)"', text)
  paths = {spell(name): path for name, path in found}
  spent = collections.Counter()
  for plane in planes:
    is_gpu = plane.name.startswith("/device:GPU")
    for event in (event for line in plane.lines for event in line.events):
      name = spell(event.name.lstrip("%").split(" ")[0])
      if name in paths:
        path = re.sub(r"^jit\(\w+\)/", "", paths[name])
        path = re.sub(r"(blocks\d?_)\d+", r"\1*", path)
        row = (path, program.component(path))
      elif is_gpu:
        row = (re.sub(r"\d+", "*", name), "library")
      else:
        continue
      spent[row] += event.duration_ns / 1e6 / PROFILED_STEPS
  return [
    {"ms": ms, "component": component, "operation": path}
    for (path, component), ms in spent.most_common(count)
  ]


def describe(results: list[dict]) -> str:
  """Returns the figures of `measure` as tables for people."""
  last = results[-1]
  tables = [bench.format_table(_work_rows(last)), bench.format_table(_speed_rows(results))]
  if "profile" in last:
    rows = [["longest operations", "", "ms a step"]]
    for row in last["profile"]:
      rows.append([row["operation"][-90:], row["component"], f"{row['ms']:.2f}"])
    tables.append(bench.format_table(rows))
  return "\n\n".join(tables)


def _work_rows(result: dict) -> list[list[str]]:
  """Returns the work by component, the largest traffic first, and the sum."""
  flops, moved = result["flops"], result["bytes"]
  parts = sorted({*flops, *moved}, key=lambda part: -moved.get(part, 0))
  work = [(part, flops.get(part, 0), moved.get(part, 0)) for part in parts]
  work.append(("all", sum(flops.values()), sum(moved.values())))
  rows = [["one image and step", "GFLOP", "MB", "FLOP/byte"]]
  for part, n, b in work:
    rows.append([part, f"{n / 1e9:.2f}", f"{b / 1e6:.0f}", f"{n / b:.0f}" if b else ""])
  return rows


def _speed_rows(results: list[dict]) -> list[list[str]]:
  """Returns one row per batch size."""
  columns = ["images/s", "ms a step", "TFLOP/s", "MFU", "of roofline", "peak GiB", "compile s"]
  rows = [["batch", *columns]]
  for result in results:
    shares = [f"{result[key]:.1%}" if key in result else "-" for key in ("mfu", "roofline")]
    rows.append(
      [
        str(result["batch_size"]),
        f"{result['images_per_s']:,.1f}",
        bench.format_spread([1e3 * s for s in result["seconds"]], 1),
        f"{result['flops_per_s'] / 1e12:.3f}",
        *shares,
        f"{result['peak_bytes'] / 2**30:.2f}",
        f"{result['compile_s']:.1f}",
      ]
    )
  return rows
