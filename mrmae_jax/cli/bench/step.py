"""The training step of a configuration: images per second, work by component, share of the chip's limits.

  mrmae bench step --config=configs/mrmae.py:base --config.teacher.path=random --batch_sizes=128,256,512

teacher.path=random is a tower of the teacher's shape with random weights: nothing needs to be fetched. By component: GFLOP of the
matrix products of one image and step, backward pass included, and MB that the compiled program's kernels read and write. MFU is
necessary work over the chip's peak: that of the sparse form without recomputation, whatever was run. The roofline is the larger of
FLOPs over peak and bytes over bandwidth; for a chip whose data sheet is not known (a CPU) both are left out. --profile=DIR writes a
trace of three steps for XProf or TensorBoard, and prints the operations that took longest.
"""

import collections
import json
import re
import statistics
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from mrmae_jax.cli import bench
from mrmae_jax.errors import UsageError


def define_flags() -> flags.FlagValues:
  """The options, apart from absl's global ones."""
  own = flags.FlagValues()
  config_flags.DEFINE_config_file(
    "config", "configs/mrmae.py", "Configuration file.", flag_values=own
  )
  flags.DEFINE_list(
    "batch_sizes",
    [],
    "Images per step, one or several; default: the configuration's.",
    flag_values=own,
  )
  flags.DEFINE_integer(
    "steps", 10, "Steps that are timed, of each.", lower_bound=1, flag_values=own
  )
  flags.DEFINE_string(
    "profile", "", "A folder for a trace of the last batch size.", flag_values=own
  )
  flags.DEFINE_string("json", "", "A .json file for the figures.", flag_values=own)
  return own


def necessary(config) -> dict[str, float]:
  """FLOPs of one image and step by component that the method needs: sparse stages, nothing computed twice."""
  from mrmae_jax import program, sharding, train  # --help is answered without jax

  config = config.copy_and_resolve_references()
  config.encoder.update(
    {key: value for key, value in (("sparse", True), ("remat", "none")) if key in config.encoder}
  )
  plan = train.make_plan(
    config, bench.make_task(config), sharding.make_mesh(**config.mesh), 1_281_167
  )
  found = program.flops(plan.step, plan.state, plan.frozen, plan.batch)
  return {part: number / config.batch_size for part, number in found.items()}


def measure(config, steps: int, profile: str = "") -> dict:
  """Compiles and times the step of a configuration; JSON values, of one image and step where not said otherwise."""
  import jax

  from mrmae_jax import program
  from mrmae_jax.cli import compile as pods
  from mrmae_jax.runs import log

  step, needed = bench.make_step(config), necessary(config)
  seconds = bench.alternate({"step": step.run}, steps)["step"]
  devices, memory = jax.devices(), step.program.memory_analysis()
  loop = (
    config.optim.accum_steps
  )  # XLA counts a loop's body once; micro-batches are nearly all of the step
  moved = {
    part: number * loop * len(devices) / config.batch_size
    for part, number in program.traffic(step.program.as_text()).items()
  }
  stats = devices[0].memory_stats() or {}
  result = {
    "batch_size": config.batch_size,
    "seconds": seconds,
    "compile_s": step.compile_s,
    "flops": needed,
    "bytes": moved,
    "images_per_s": config.batch_size / statistics.median(seconds),
    "peak_bytes": stats.get(
      "peak_bytes_in_use", memory.argument_size_in_bytes + memory.temp_size_in_bytes
    ),
  }
  chip = pods.find_chip(devices)
  result["flops_per_s"] = result["images_per_s"] * sum(needed.values())
  if chip:
    peak, bandwidth = log.peak_flops(devices[0]) * len(devices), chip.bandwidth * len(devices)
    result |= {
      "mfu": result["flops_per_s"] / peak,
      "roofline": result["images_per_s"]
      * max(sum(needed.values()) / peak, sum(moved.values()) / bandwidth),
    }
  if profile:
    result["profile"] = _profile(step, Path(profile).expanduser())
  return result


def _profile(step, folder: Path) -> list[dict]:
  """Traces three steps; the operations that took longest, those of all blocks of a kind together, and their part of the model."""
  import jax

  from mrmae_jax import program

  with jax.profiler.trace(str(folder)):
    for _ in range(3):
      step.run()
  where = {
    name: path
    for name, path in re.findall(r'%?([\w.\-]+) = .*op_name="([^"]*)"', step.program.as_text())
  }
  newest = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
  alike = lambda path: re.sub(r"(blocks\d?_)\d+", r"\1*", re.sub(r"^jit\(\w+\)/", "", path))
  spent = collections.Counter()
  for plane in jax.profiler.ProfileData.from_file(str(newest)).planes:
    for line in plane.lines:
      for event in line.events:
        name = event.name.lstrip("%").split(" ")[0]
        if name in where:
          spent[alike(where[name])] += event.duration_ns / 3e6
  return [
    {"ms": ms, "component": program.component(path), "operation": path}
    for path, ms in spent.most_common(20)
  ]


def describe(results: list[dict]) -> str:
  """`measure`'s figures as tables for people."""
  parts = sorted(
    {part for r in results for part in (*r["flops"], *r["bytes"])},
    key=lambda part: -results[-1]["bytes"].get(part, 0),
  )
  last = results[-1]
  work = [["one image and step", "GFLOP", "MB", "FLOP/byte"]] + [
    [part, f"{flops / 1e9:.2f}", f"{moved / 1e6:.0f}", f"{flops / moved:.0f}" if moved else ""]
    for part, flops, moved in [
      (part, last["flops"].get(part, 0), last["bytes"].get(part, 0)) for part in parts
    ]
    + [("all", sum(last["flops"].values()), sum(last["bytes"].values()))]
  ]
  speed = [
    ["batch", "images/s", "ms a step", "TFLOP/s", "MFU", "of roofline", "peak GiB", "compile s"]
  ]
  for r in results:
    share = lambda key: f"{r[key]:.1%}" if key in r else "-"
    speed.append(
      [
        str(r["batch_size"]),
        f"{r['images_per_s']:,.1f}",
        bench.spread([1e3 * s for s in r["seconds"]], 1),
        f"{r['flops_per_s'] / 1e12:.3f}",
        share("mfu"),
        share("roofline"),
        f"{r['peak_bytes'] / 2**30:.2f}",
        f"{r['compile_s']:.1f}",
      ]
    )
  lines = [bench.table(work), "", bench.table(speed)]
  if "profile" in last:
    lines += [
      "",
      bench.table(
        [["longest operations", "", "ms a step"]]
        + [
          [one["operation"][-90:], one["component"], f"{one['ms']:.2f}"] for one in last["profile"]
        ]
      ),
    ]
  return "\n".join(lines)


def run(options) -> str:
  """The command with an attribute per flag; returns the tables.

  Raises:
    UsageError, ConfigError, WeightsError: options or a configuration that do not fit.
  """
  try:
    sizes = [int(size) for size in options.batch_sizes] or [options.config.batch_size]
  except ValueError:
    raise UsageError(
      f"--batch_sizes={','.join(options.batch_sizes)} must be whole numbers, e.g. 128,256"
    ) from None
  results, about = [], bench.machine()
  print(json.dumps(about), flush=True)
  for size in sizes:
    options.config.batch_size = size
    results.append(
      measure(options.config, options.steps, options.profile if size == sizes[-1] else "")
    )
    print(f"batch {size}: {results[-1]['images_per_s']:,.1f} images/s", flush=True)
  bench.write_json(options.json, {"machine": about, "results": results})
  return describe(results)
