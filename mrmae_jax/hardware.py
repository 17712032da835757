"""The chips that JAX runs on: peak, bandwidth and memory. This module imports nothing."""

from typing import NamedTuple


class Chip(NamedTuple):
  """One device as JAX counts them.

  Attributes:
    name: for people.
    peak_flops: FLOP/s of dense bfloat16 matrix products.
    bandwidth: bytes/s of its memory.
    memory: bytes.
  """

  name: str
  peak_flops: float
  bandwidth: float
  memory: float


# By a part of `device_kind`. TPU: docs.cloud.google.com/tpu/docs, one page per version; a v2, v3 or
# 7x device is one of a chip's two cores. GPU: NVIDIA's data sheets; without sparsity, SXM form.
CHIPS = {
  "A10": Chip("A10", 125e12, 0.6e12, 24e9),
  "A100": Chip("A100", 312e12, 2.0e12, 80e9),
  "H100": Chip("H100", 989e12, 3.35e12, 80e9),
  "H200": Chip("H200", 989e12, 4.8e12, 141e9),
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
