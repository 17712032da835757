"""Compiles the training step for devices that need not be there, and prints what it needs."""

import collections
import importlib.metadata
import json
import math
import os
import re
import time
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from mrmae_jax import hardware, preflight, program, sharding, target, train
from mrmae_jax.cli import bench
from mrmae_jax.errors import UsageError
from mrmae_jax.runs.paths import atomic_write

TPUS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
GPUS = {name.lower(): chip for name, chip in hardware.CHIPS.items() if chip.gpu}
HOST_GPUS = 8  # of one machine
# Without a GPU nothing can be tuned on it. XLA finds no tiles for a product in Triton without
# tuning, and stops; cuBLAS needs none.
GPU_FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
GPU_PACKAGES = ("jax-cuda13-plugin", "nvidia-cudnn-cu13", "nvidia-cuda-runtime")
LAUNCH_S = 2e-6  # the shortest kernel


def find_devices(topology: str) -> list:
  """The devices of a topology, or those present for "".

  Raises:
    UsageError: an unknown topology, or a compiler that is not installed.
  """
  if not topology:
    return jax.devices()
  tpu = re.fullmatch(rf"({'|'.join(TPUS)}):\d+x\d+(x\d+)?", topology)
  gpu = re.fullmatch(rf"({'|'.join(GPUS)})(?::([1-9]\d*))?", topology)
  count = int(gpu[2] or 1) if gpu else 0
  if not tpu and (not gpu or (count > HOST_GPUS and count % HOST_GPUS)):
    raise UsageError(
      f"--topology={topology} is not KIND:AxB or KIND:AxBxC with KIND one of {', '.join(TPUS)}, "
      f"e.g. v5e:4x4 or v5p:2x2x4; nor KIND or KIND:N with KIND one of {', '.join(GPUS)} and N "
      f"from 1 to {HOST_GPUS} or a multiple of it, e.g. h100 or h100:8"
    )
  jax.config.update("jax_platforms", "cpu")  # nothing is computed: no chip is looked for
  # JAX would keep the programs, and cannot read back those for absent GPUs.
  jax.config.update("jax_enable_compilation_cache", False)
  return _gpu_devices(topology, GPUS[gpu[1]], count) if gpu else _tpu_devices(topology)


def _tpu_devices(topology: str) -> list:
  """The devices of a TPU slice."""
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not look for a cloud machine around it
  # Take no chip away from another process.
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  try:
    return list(topologies.get_topology_desc(topology, "tpu").devices)
  except Exception as error:  # jaxlib's own types, and a missing library
    raise UsageError(
      f"--topology={topology}: {' '.join(str(error).split())[:300]}. It needs libtpu: pip install "
      "'mrmae_jax[tpu]'; sizes are those that Google Cloud rents"
    ) from None


def _is_installed(package: str) -> bool:
  """Whether a package is installed, by its name at PyPI."""
  try:
    importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return False
  return True


def _gpu_devices(topology: str, chip: hardware.Chip, count: int) -> list:
  """The devices of `count` GPUs, in machines of HOST_GPUS."""
  missing = [package for package in GPU_PACKAGES if not _is_installed(package)]
  if missing:
    raise UsageError(
      f"--topology={topology} needs {', '.join(missing)}, though no GPU: "
      "pip install 'mrmae_jax[gpu-compile]'"
    )
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {GPU_FLAGS}".strip()
  machines, of_each = (count // HOST_GPUS, HOST_GPUS) if count > HOST_GPUS else (1, count)
  return list(
    topologies.get_topology_desc(
      topology,
      "cuda",
      topology=f"1x{machines}x{of_each}",
      target_config=hardware.target_config(chip),
    ).devices
  )


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
  with target.tracing_for(devices[0], mesh):
    compiled = plan.step.lower(plan.state, plan.frozen, plan.batch).compile()
  seconds = time.monotonic() - began
  memory, text = compiled.memory_analysis(), compiled.as_text()
  # A loop's body counts once; micro-batches are such a loop, and nearly all of the step.
  flops, moved = (number * config.optim.accum_steps for number in program.cost(compiled))
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
    "collectives": program.collectives(text),
    "shards": sharding.table({"state": plan.state, "frozen": plan.frozen}),
  }
  if chip:
    result |= _bound(result, chip, images)
  if chip and chip.gpu:
    result |= measure_kernels(program.kernels(text), chip.gpu, plan.state, result)
  return result


def _bound(result: dict[str, Any], chip: hardware.Chip, images: int) -> dict[str, Any]:
  """The figures of the roofline: no run is faster on these chips."""
  by_flops, by_bytes = result["flops"] / chip.peak_flops, result["bytes"] / chip.bandwidth
  bound = max(by_flops, by_bytes)
  return {
    "chip": chip.name,
    "memory": chip.memory,
    "bound_s": bound,
    "bound_by": "FLOPs" if by_flops >= by_bytes else "bytes",
    "images_per_s": result["batch_size"] / bound,
    "epochs_per_day": result["batch_size"] / bound * 86400 / images,
  }


def measure_kernels(
  kernels: list[program.Kernel], gpu: hardware.Gpu, state, result: dict[str, Any]
) -> dict[str, Any]:
  """Reads off the kernels of a step what makes it slow on a GPU.

  Args:
    kernels: of `program.kernels`.
    gpu: what they run on.
    state: of `train.Plan`.
    result: of `measure`, the batch.

  Returns:
    JSON values. "parts" are FLOPs, bytes and seconds of one device and step, and the number of
    kernels, by component. A float32 activation is an array of a multiple of the images, of another
    size than the arrays of the state.
  """
  micro_batch = int(result["batch_per_device"] / result["accum_steps"])
  shards = {(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(state)}
  sizes = {x.size for x in jax.tree.leaves(state)} | {math.prod(shape) for shape in shards}
  is_activation = lambda array: array.size % micro_batch == 0 and array.size not in sizes
  float32 = [array for kernel in kernels for array in kernel.results if array.kind == "f32"]
  copies = [kernel for kernel in kernels if kernel.kind == "copy"]
  of_state = [kernel for kernel in copies if kernel.results[0].dims in shards - {()}]
  parts = {}
  for kernel in kernels:
    part = parts.setdefault(kernel.component, dict(kernels=0, flops=0.0, bytes=0.0, seconds=0.0))
    seconds = max(kernel.flops / gpu.long_flops, kernel.bytes / gpu.long_bytes, LAUNCH_S)
    part["kernels"] += 1
    for key, number in (("flops", kernel.flops), ("bytes", kernel.bytes), ("seconds", seconds)):
      part[key] += number * result["accum_steps"]
  return {
    "kernels": len(kernels),
    "copies": {"count": len(copies), "bytes": sum(kernel.bytes for kernel in copies)},
    "copies_of_state": {"count": len(of_state), "bytes": sum(kernel.bytes for kernel in of_state)},
    "products": collections.Counter(_product(kernel) for kernel in kernels if kernel.flops),
    "float32_activations": result["accum_steps"]
    * sum(array.bytes for array in float32 if is_activation(array)),
    "parts": parts,
    "long_flops": gpu.long_flops,
    "long_bytes": gpu.long_bytes,
    "kernels_s": sum(part["seconds"] for part in parts.values()),
  }


def _product(kernel: program.Kernel) -> str:
  """Names the kind of a matrix product: its library, its operands, what it does besides."""
  libraries = {"__cublas": "cuBLAS", "__cudnn": "cuDNN", program.OWN_KERNEL: "Triton"}
  names = [name for start, name in libraries.items() if kernel.kind.startswith(start)]
  extra = f" with {kernel.epilogue}" if kernel.epilogue else ""
  return f"{''.join(names) or 'XLA'} {kernel.operands[0].kind}{extra}"


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
  if "kernels" in result:
    lines += _describe_kernels(result)
  lines += [
    f"  {row['part']:<24} {row['sharding']:<10} {row['arrays']:>5} arrays  "
    f"{row['bytes'] / 2**20:>10.2f} MiB  "
    f"{row['bytes_per_device'] / 2**20:>10.2f} MiB a device"
    for row in result["shards"]
  ]
  return "\n".join(lines)


def _describe_kernels(result: dict[str, Any]) -> list[str]:
  """`measure_kernels`' figures as lines for people."""
  images = result["batch_per_device"]
  copies, of_state = result["copies"], result["copies_of_state"]
  products = sorted(result["products"].items(), key=lambda item: -item[1])
  rows = [["one device", "kernels", "GFLOP an image", "MB an image", "ms a step"]]
  parts = sorted(result["parts"].items(), key=lambda item: -item[1]["seconds"])
  total = {key: sum(part[key] for _, part in parts) for key in parts[0][1]}
  for name, part in (*parts, ("all", total)):
    work = (part["flops"] / images / 1e9, part["bytes"] / images / 1e6, part["seconds"] * 1e3)
    rows.append([name, f"{part['kernels']:,}", *(f"{number:,.1f}" for number in work)])
  return [
    f"kernels: {result['kernels']:,}; copies: {copies['count']:,}, {copies['bytes'] / 1e9:.2f} GB, "
    f"of arrays of the state {of_state['count']:,}, {of_state['bytes'] / 1e9:.2f} GB",
    "products: " + ", ".join(f"{count:,} x {name}" for name, count in products),
    f"float32 activations written: {result['float32_activations'] / images / 1e6:.1f} MB an image",
    *bench.format_table(rows).splitlines(),
    f"kernel by kernel: {result['kernels_s'] * 1e3:.1f} ms a step, "
    f"{result['batch_size'] / result['kernels_s']:,.0f} images/s; of each the larger of FLOPs over "
    f"{result['long_flops'] / 1e12:.0f} TFLOP/s and bytes over {result['long_bytes'] / 1e12:.2f} "
    "TB/s, and at "
    f"least {LAUNCH_S * 1e6:.0f} us",
  ]


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
