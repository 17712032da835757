"""The device that programs are traced for: operations that have several forms ask for it."""

import contextlib
import contextvars
from types import SimpleNamespace
from typing import Iterator

import jax

_device = contextvars.ContextVar("device", default=None)
# Stands for every device: what is traced for it runs on all platforms, by no vendor's library.
PORTABLE = SimpleNamespace(platform="", compute_capability="")


@contextlib.contextmanager
def tracing_for(device, mesh=None) -> Iterator[None]:
  """Makes a device the target, there or not, or PORTABLE; None: JAX's default device.

  `mesh`, concrete or abstract, is that of the arrays, where its devices need not be there: a kernel
  in Pallas that is compiled for an absent GPU asks the mesh in use for it.

  JAX keeps traces by function, whatever the target, so it is made to forget them before and after.
  """
  token = _device.set(device)
  jax.clear_caches()
  in_use = jax.sharding.use_abstract_mesh(mesh.abstract_mesh) if mesh else contextlib.nullcontext()
  try:
    with in_use:
      yield
  finally:
    _device.reset(token)
    jax.clear_caches()


def platform() -> str:
  """Returns "cpu", "gpu" or "tpu"; "" for PORTABLE."""
  return _current().platform


def compute_capability() -> float:
  """Returns that of an NVIDIA GPU, such as 9.0; 0 for other devices."""
  version = getattr(_current(), "compute_capability", "")  # "9.0"; AMD's read otherwise
  return float(version) if version.replace(".", "").isdigit() else 0.0


def _current():
  device = _device.get() or jax.config.jax_default_device or jax.local_devices()[0]
  return jax.local_devices(backend=device)[0] if isinstance(device, str) else device
