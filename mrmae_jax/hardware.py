"""The chips that JAX runs on: peak, bandwidth and memory. This module imports nothing."""

from typing import NamedTuple


class Gpu(NamedTuple):
  """The properties of a GPU by which XLA compiles for it without one.

  Attributes:
    device_kind: the name that the driver gives.
    capability: compute capability, (major, minor).
    cores: streaming multiprocessors.
    fpus: float32 units of a core.
    clock_ghz: the highest clock.
    l2_cache: bytes.
    shared_memory: bytes of a core; a block gets 1 KiB less.
    long_flops, long_bytes: FLOP/s of long matrix products and bytes/s of long copies. They are
      estimates, 80 % and 87 to 90 % of the data sheet; on an H200 the products of MR-MAE-B took
      the time that the first one gives.
  """

  device_kind: str
  capability: tuple[int, int]
  cores: int
  fpus: int
  clock_ghz: float
  l2_cache: int
  shared_memory: int
  long_flops: float
  long_bytes: float


class Chip(NamedTuple):
  """One device as JAX counts them.

  Attributes:
    name: for people.
    peak_flops: FLOP/s of dense bfloat16 matrix products.
    bandwidth: bytes/s of its memory.
    memory: bytes.
    gpu: None for chips that `target_config` does not describe.
  """

  name: str
  peak_flops: float
  bandwidth: float
  memory: float
  gpu: Gpu | None = None


_A100 = Gpu(
  "NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 1.41, 40 * 2**20, 164 * 2**10, 250e12, 1.75e12
)
_H100 = Gpu(
  "NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 1.98, 50 * 2**20, 228 * 2**10, 790e12, 2.9e12
)
_H200 = _H100._replace(device_kind="NVIDIA H200", long_bytes=4.3e12)


# By a part of `device_kind`. TPU: docs.cloud.google.com/tpu/docs, one page per version; a v2, v3 or
# 7x device is one of a chip's two cores. GPU: NVIDIA's data sheets; without sparsity, SXM form. For
# Gpu: NVIDIA's white papers on the A100 and the H100, and the compute capabilities in the CUDA
# programming guide.
CHIPS = {
  "A10": Chip("A10", 125e12, 0.6e12, 24e9),
  "A100": Chip("A100", 312e12, 2.0e12, 80e9, _A100),
  "H100": Chip("H100", 989e12, 3.35e12, 80e9, _H100),
  "H200": Chip("H200", 989e12, 4.8e12, 141e9, _H200),
  "B200": Chip("B200", 2250e12, 8.0e12, 180e9),
  "L4": Chip("L4", 121e12, 0.3e12, 24e9),
  "L40S": Chip("L40S", 362e12, 0.864e12, 48e9),
  "TPU v2": Chip("TPU v2 core", 23e12, 0.3e12, 8 * 2**30),
  "TPU v3": Chip("TPU v3 core", 61e12, 0.45e12, 16 * 2**30),
  "TPU v4": Chip("TPU v4", 275e12, 1.228e12, 32 * 2**30),
  "TPU v5 lite": Chip("TPU v5e", 197e12, 0.819e12, 16 * 2**30),
  "TPU v5e": Chip("TPU v5e", 197e12, 0.819e12, 16 * 2**30),
  "TPU v5": Chip("TPU v5p", 459e12, 2.765e12, 95 * 2**30),
  "TPU v6 lite": Chip("TPU v6e", 918e12, 1.64e12, 32 * 2**30),
  "TPU v6e": Chip("TPU v6e", 918e12, 1.64e12, 32 * 2**30),
  "TPU7x": Chip("TPU7x core", 1153e12, 3.69e12, 96 * 2**30),
}


def find_chip(device) -> Chip | None:
  """Returns the chip of a `jax.Device`, by the longest name in its kind; None if it is unknown."""
  names = [name for name in CHIPS if name.lower() in device.device_kind.lower()]
  return CHIPS[max(names, key=len)] if names else None


def target_config(chip: Chip) -> str:
  """Returns the description of a GPU by which XLA compiles for it: a GpuTargetConfigProto as text.

  Limits that all of these GPUs share are those of CUDA.
  """
  gpu, (major, minor) = chip.gpu, chip.gpu.capability
  extension = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
  return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} {extension} }}
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {gpu.shared_memory - 1024}
  shared_memory_per_core: {gpu.shared_memory}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  core_count: {gpu.cores}
  fpus_per_core: {gpu.fpus}
  clock_rate_ghz: {gpu.clock_ghz}
  l2_cache_size: {gpu.l2_cache}
  device_address_bits: 64
  memory_bandwidth: {chip.bandwidth:.0f}
  device_memory_size: {chip.memory:.0f}
  runtime_version: "13.0.0"
  driver_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 }}
device_description_str: "{gpu.device_kind}"
"""
