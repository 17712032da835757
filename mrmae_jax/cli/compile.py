"""Compiles the training step for devices that need not be there, and prints what it needs."""

import json
import math
import os
import re
import time
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from mrmae_jax import hardware, preflight, program, sharding, train
from mrmae_jax.errors import UsageError
from mrmae_jax.runs.paths import atomic_write

KINDS = ("v4", "v5e", "v5p", "v6e", "tpu7x")


def find_devices(topology: str) -> list:
  """The devices of a topology, or those present for "".

  Raises:
    UsageError: an unknown topology, or no libtpu.
  """

  if not topology:
    return jax.devices()
  kind, _, shape = topology.partition(":")
  if kind not in KINDS or not re.fullmatch(r"\d+x\d+(x\d+)?", shape):
    raise UsageError(
      f"--topology={topology} is not KIND:AxB or KIND:AxBxC with KIND one of {', '.join(KINDS)}, "
      "e.g. v5e:4x4 or "
      "v5p:2x2x4"
    )

  jax.config.update("jax_platforms", "cpu")  # nothing is computed, and libtpu would look for chips
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # nor for a cloud machine around it
  os.environ.setdefault(
    "ALLOW_MULTIPLE_LIBTPU_LOAD", "1"
  )  # nor is any chip taken from another process
  try:
    return list(topologies.get_topology_desc(topology, "tpu").devices)
  except Exception as error:  # jaxlib's own types, and a missing library
    raise UsageError(
      f"--topology={topology}: {' '.join(str(error).split())[:300]}. It needs libtpu: pip install "
      "'mrmae_jax[tpu]'; "
      "sizes are those that Google Cloud rents"
    ) from None


def measure(config, task, devices, images: int) -> dict[str, Any]:
  """Compiles the training step of a configuration and reads off the program what it needs.

  Args:
    config: validated configuration.
    task: its task.
    devices: to compile for; they need not be there.
    images: in the training split.

  Returns:
    JSON values; bytes and FLOPs are those of one chip and step.

  Raises:
    jax.errors.JaxRuntimeError: among others, the program does not fit the memory.
  """
  mesh = sharding.make_mesh(**config.mesh, devices=devices)
  chip = hardware.find_chip(devices[0])
  plan = train.make_plan(config, task, mesh, images)
  began = time.monotonic()
  compiled = plan.step.lower(plan.state, plan.frozen, plan.batch).compile()
  seconds = time.monotonic() - began
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
  # XLA counts a loop's body once; micro-batches are such a loop, and nearly all of the step.
  flops, moved = (
    cost.get(name, 0.0) * config.optim.accum_steps for name in ("flops", "bytes accessed")
  )
  result = {
    "devices": len(devices),
    "kind": devices[0].device_kind,
    "mesh": dict(mesh.shape),
    "batch_size": config.batch_size,
    "batch_per_device": config.batch_size / len(devices),
    "accum_steps": config.optim.accum_steps,
    "dtype": config.dtype,
    "compile_s": seconds,
    "arguments": memory.argument_size_in_bytes,
    "temporaries": memory.temp_size_in_bytes,
    "peak": memory.argument_size_in_bytes
    + memory.temp_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.generated_code_size_in_bytes,
    "flops": flops,
    "bytes": moved,
    "collectives": program.collectives(compiled.as_text()),
    "shards": sharding.table({"state": plan.state, "frozen": plan.frozen}),
  }
  if chip:
    by_flops, by_bytes = flops / chip.peak_flops, moved / chip.bandwidth
    bound = max(by_flops, by_bytes)
    result |= {
      "chip": chip.name,
      "memory": chip.memory,
      "bound_s": bound,
      "bound_by": ("FLOPs" if by_flops >= by_bytes else "bytes"),
      "images_per_s": config.batch_size / bound,
      "epochs_per_day": config.batch_size / bound * 86400 / images,
    }
  return result


def describe(result: dict[str, Any]) -> str:
  """`measure`'s figures as lines for people."""
  gib = lambda n: f"{n / 2**30:.2f} GiB"
  share = (
    f" of {gib(result['memory'])} ({result['peak'] / result['memory']:.0%})"
    if "memory" in result
    else ""
  )
  lines = [
    f"{result['devices']} x {result.get('chip', result['kind'])}, mesh "
    f"data={result['mesh']['data']} x "
    f"fsdp={result['mesh']['fsdp']}, batch {result['batch_size']} ({result['batch_per_device']:g} "
    "a device, "
    f"{result['accum_steps']} micro-batches), {result['dtype']}; compiled in "
    f"{result['compile_s']:.0f} s",
    f"memory a device: arguments {gib(result['arguments'])}, temporaries "
    f"{gib(result['temporaries'])}, peak "
    f"{gib(result['peak'])}{share}",
    f"work a device and step: {result['flops'] / 1e12:.2f} TFLOP, {result['bytes'] / 1e9:.1f} GB",
  ]
  lines += [
    f"exchanged a device and step: {kind} {one['count']} x, {one['bytes'] / 1e6:.1f} MB"
    for kind, one in sorted(result["collectives"].items())
  ] or ["nothing is exchanged"]
  if "bound_s" in result:
    lines.append(
      f"roofline: {result['bound_s'] * 1e3:.1f} ms a step by {result['bound_by']}, at most "
      f"{result['images_per_s']:,.0f} images/s, {result['epochs_per_day']:.0f} epochs a day"
    )
  lines += [
    f"  {row['part']:<24} {row['sharding']:<10} {row['arrays']:>5} arrays  "
    f"{row['bytes'] / 2**20:>10.2f} MiB  "
    f"{row['bytes_per_device'] / 2**20:>10.2f} MiB a device"
    for row in result["shards"]
  ]
  return "\n".join(lines)


def largest_batch(fits, start: int, unit: int) -> int:
  """The largest multiple of `unit` for which `fits(batch)`, to within an eighth.

  0 if `unit` itself does not fit.
  """
  low, high = 0, max(start // unit, 1)
  while fits(high * unit):
    low, high = high, 2 * high
  while high - low > max(1, low // 8):
    middle = (low + high) // 2
    low, high = (middle, high) if fits(middle * unit) else (low, middle)
  return low * unit


def run(options) -> str:
  """Carries out `mrmae compile`; returns the figures for people.

  Raises:
    UsageError, ConfigError, WeightsError: options or a configuration that do not fit, or a program
      too large for the chips.
  """
  devices = find_devices(options.topology)

  config = options.config
  if (
    config.task == "pretrain"
    and config.data.source
    and not config.data.source.startswith("folder:")
  ):
    config.data.source = "digits"  # the images are not looked at, and need not be here
  preflight.check(config, len(devices))
  task = preflight.open_task(config)

  def attempt(batch):
    config.batch_size = batch
    try:
      found = measure(config, task, devices, options.images)
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      return None
    print(f"batch {batch}: peak {found['peak'] / 2**30:.2f} GiB", flush=True)
    return found if found["peak"] <= found.get("memory", math.inf) else None

  if options.sweep_batch:
    unit = len(devices) * config.optim.accum_steps
    if not hardware.find_chip(devices[0]):
      raise UsageError(
        f"--sweep_batch: the memory of {devices[0].device_kind} is not known; give a --topology"
      )
    config.batch_size = largest_batch(attempt, config.batch_size, unit)
    if not config.batch_size:
      raise UsageError(f"not even {unit} images fit: raise config.mesh.fsdp or take more chips")
  result = attempt(config.batch_size)
  if result is None:
    raise UsageError(
      f"batch {config.batch_size} does not fit the memory of {len(devices)} x "
      f"{devices[0].device_kind}; raise "
      "config.optim.accum_steps or config.mesh.fsdp, or lower config.batch_size (--sweep_batch "
      "finds the largest)"
    )
  if options.json:
    with atomic_write(Path(options.json).expanduser()) as unfinished:
      unfinished.write_text(json.dumps(result, indent=2) + "\n")
  return describe(result)
