"""Cases of reference implementations: their tensors, and how near ours must be."""

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file


def close(actual, expected, tolerance, name, largest=None):
  """Asserts that no entry differs by `tolerance` times `largest`, by default the largest entry."""
  largest = largest or np.abs(expected).max()
  error = np.abs(np.asarray(actual) - expected).max() / max(largest, 1e-12)
  assert error < tolerance, (
    f"{name}: largest error {error:.1e} of the largest entry, allowed {tolerance:.0e}"
  )


def read_tensors(folder: Path, name: str, prefix: str) -> dict[str, np.ndarray]:
  """Returns the tensors of a case under a prefix, without it."""
  tensors = load_file(folder / f"{name}.safetensors")
  return {key.removeprefix(prefix): x for key, x in tensors.items() if key.startswith(prefix)}
