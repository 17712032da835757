"""Devices that are not there, for tests that trace for them."""

from types import SimpleNamespace


def gpu(capability: str = "9.0") -> SimpleNamespace:
  """Returns what `mrmae_jax.target` asks of an NVIDIA GPU; the default is a Hopper."""
  return SimpleNamespace(platform="gpu", compute_capability=capability)
