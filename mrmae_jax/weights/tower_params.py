"""Reads the parameters of a vision tower."""

import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from mrmae_jax.errors import StorageError, WeightsError, WorkdirError
from mrmae_jax.runs import checkpoint
from mrmae_jax.weights import files, networks, positions
from mrmae_jax.weights.families import name_table
from mrmae_jax.weights.table import convert
from mrmae_jax.weights.towers import Tower


def read_params(tower: Tower, grid: tuple[int, int]) -> tuple[Any, str]:
  """Returns a tower's parameters as float32 numpy arrays, and a digest that identifies them.

  Args:
    tower: as `weights.towers` determines it; without a path its parameters are random.
    grid: (rows, columns) of patches that a learned position table is resized to.

  Raises:
    WeightsError: files are missing or damaged, or tensors are missing, unknown, misshapen or not
      finite.
  """
  if tower.path is None:
    return _random_params(tower, grid), tower.source
  if tower.family is None:
    return _read_encoder(tower.path)
  return _read_tower(tower, grid)


def _param_shapes(tower: Tower, grid: tuple[int, int]):
  """Shapes of a tower's parameters for a grid of patches."""
  module = tower.module
  height, width = (side * module.patch_size for side in grid)
  images = jax.ShapeDtypeStruct((1, height, width, len(tower.mean)), jnp.float32)
  return jax.eval_shape(module.init, jax.random.key(0), images)["params"]


def _random_params(tower: Tower, grid: tuple[int, int]):
  """Random parameters: norms at their start, the rest N(0, 0.02), as ViTs are initialized."""
  rng = np.random.default_rng(0)
  norms = {"scale": np.ones, "bias": np.zeros}

  def draw(path, leaf):
    if path[-1].key in norms:
      return norms[path[-1].key](leaf.shape, np.float32)
    return 0.02 * rng.standard_normal(leaf.shape, np.float32)

  return jax.tree_util.tree_map_with_path(draw, _param_shapes(tower, grid))


def _read_tower(tower: Tower, grid: tuple[int, int]) -> tuple[Any, str]:
  """Reads the parameters of a published tower, and the digest of its files."""
  tensors = networks.open_network(tower.path, tower.weights).tensors
  # A tower without a table has the same parameters at any grid.
  expected = _param_shapes(tower, tower.table_grid or (1, 1))
  if not tower.has_norm:
    del expected["norm"]
  entries = name_table(tower.family, tower.prefix, tower.module, tower.has_norm)
  params = convert(tensors, entries, expected, ignore=tower.family.ignore, source=tower.source)
  if not tower.has_norm:
    params["norm"] = fresh_norm(tower.module.dim)
  if tower.family.names.proj == "head.weight" and "head.bias" in tensors:
    if np.abs(tensors["head.bias"].read()).max() > 1e-6:
      raise WeightsError(
        f"{tower.source}: head.bias is not zero: a classifier, not CLIP's projection; remove "
        "head.* from the file"
      )
  if tower.table_grid:
    params = positions.resize_tables(params, tower.table_grid, grid, tower.family.rule)
  used = {name for entry in entries for name in entry.theirs}
  logging.info(
    "%s: %d tensors (%s) used, %d of other parts left out",
    tower.source,
    len(used),
    ", ".join(sorted({tensors[name].dtype for name in used})),
    len(tensors) - len(used),
  )
  return params, files.digest(tower.path)


def fresh_norm(dim: int) -> dict[str, np.ndarray]:
  """Returns the parameters of a LayerNorm at its start."""
  return {"scale": np.ones(dim, np.float32), "bias": np.zeros(dim, np.float32)}


def _read_encoder(workdir: Path) -> tuple[Any, str]:
  """Reads the parameters of a run's encoder, and their digest."""
  try:
    stored = checkpoint.read_params(workdir, "encoder")
  except (StorageError, WorkdirError) as error:
    raise WeightsError(f"teacher.path=checkpoint:{error}") from None
  logging.info("encoder of %s after %d steps", workdir, stored.step)
  params, sha256 = stored.params["encoder"], hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    # Runs compare digests with those of earlier versions: keep the form of the names.
    name = f"{jax.tree_util.keystr(path)} {leaf.shape}"
    sha256.update(name.encode() + np.ascontiguousarray(leaf).tobytes())
  return params, sha256.hexdigest()
