"""Interpolates learned position tables, by the rule of each family's reference."""

import math

import jax
import numpy as np

from mrmae_jax.bilinear import bilinear_matrix
from mrmae_jax.interpolation import Rule, matrix


def resize(table: np.ndarray, old: tuple[int, int], new: tuple[int, int], rule: Rule) -> np.ndarray:
  """Interpolates a position table.

  Args:
    table: float32 [1, T, D]; the last old rows * old columns tokens are the grid, row by row; a CLS
      row before it is kept.
    old, new: (rows, columns).
    rule: of the family.

  Returns:
    float32 [1, T', D].
  """
  if old == new:
    return table
  rows, columns = (matrix(n_old, n_new, rule) for n_old, n_new in zip(old, new))
  cls, maps = np.split(table, [-old[0] * old[1]], axis=1)
  maps = np.einsum(
    "pr,qc,brcd->bpqd", rows, columns, maps.reshape(1, *old, -1), optimize=True
  ).astype(np.float32)
  return np.concatenate([cls, maps.reshape(1, new[0] * new[1], -1)], axis=1)


def resize_tables(params, old: tuple[int, int], new: tuple[int, int], rule: Rule):
  """Returns a tree of parameters with all of its position tables for another grid of patches."""
  if old == new:
    return params

  def change(path, x):
    if path[-1].key == "pos_embed":
      return resize(x, old, new, rule)
    return resize_relative(x, old, new) if path[-1].key == "relative_positions" else x

  return jax.tree_util.tree_map_with_path(change, params)


def fit_distances(params, shapes):
  """Returns parameters whose tables `rel_pos_h` and `rel_pos_w` have the lengths in `shapes`.

  Other lengths are interpolated linearly, as detectron2 does it.

  Args:
    params: tree with arrays.
    shapes: tree with the same paths.
  """

  def change(path, x, expected):
    if path[-1].key not in ("rel_pos_h", "rel_pos_w") or x.shape == expected.shape:
      return x
    return bilinear_matrix(len(x), len(expected)) @ x

  return jax.tree_util.tree_map_with_path(change, params, shapes)


def resize_relative(table: np.ndarray, old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
  """Interpolates a table of relative positions by BEiT's rule, both axes apart.

  Source: microsoft/unilm beit2/run_class_finetuning.py. Short distances keep their numbers nearly
  as they were, long ones are stretched: plain interpolation harms segmentation (unilm#376).

  Args:
    table: float32 [rows, heads], see `attention.RelativePositions`. The three rows for CLS, if
      there are any, are kept.
    old, new: (rows, columns) of patches.

  Returns:
    float32 [rows', heads].
  """
  if old == new:
    return table
  distances, cls = np.split(table, [math.prod(2 * side - 1 for side in old)])
  rows, columns = (_relative_matrix(n_old, n_new) for n_old, n_new in zip(old, new))
  maps = distances.reshape(2 * old[0] - 1, 2 * old[1] - 1, -1)
  maps = np.einsum("pr,qc,rch->pqh", rows, columns, maps, optimize=True).astype(np.float32)
  return np.concatenate([maps.reshape(-1, table.shape[1]), cls])


def source_distances(old: int, new: int) -> np.ndarray:
  """Returns where the old distances lie among the new: 0, 1, 1 + q, 1 + q + q^2, ... and negative.

  q is chosen by bisection so that the longest is `new` - 1, the longest new distance. It stays in
  [1.01, 1.5], so the longest may be another one.

  Returns:
    float64 [2 old - 1].
  """
  low, high, q = 1.01, 1.5, 1.01
  while high - low > 1e-6:
    q = (low + high) / 2
    if sum(q**i for i in range(old - 1)) > new - 1:
      high = q
    else:
      low = q
  positive = np.cumsum([q**i for i in range(old - 1)])
  return np.concatenate([-positive[::-1], [0], positive])


def _relative_matrix(old: int, new: int) -> np.ndarray:
  """Returns float64 [2 new - 1, 2 old - 1]: numbers for new distances as weighted sums of old ones.

  It is the cubic spline through the old numbers with not-a-knot ends, and constant beyond them.
  """
  if old == new:
    return np.eye(2 * old - 1)
  if old == 1:
    return np.ones((2 * new - 1, 1))
  x = source_distances(old, new)
  n, h, unit = len(x), np.diff(x), np.eye(len(x))
  # Second derivatives at the old distances solve a linear system; the slopes agree inside, and the
  # third derivatives at the second and the last but one.
  system, slopes = np.zeros((n, n)), np.diff(unit, axis=0) / h[:, None]
  for i in range(1, n - 1):
    system[i, i - 1 : i + 2] = h[i - 1], 2 * (h[i - 1] + h[i]), h[i]
  if n == 3:  # a parabola
    system[0, :2] = system[-1, -2:] = 1, -1
  else:
    system[0, :3] = h[1], -h[0] - h[1], h[0]
    system[-1, -3:] = h[-1], -h[-2] - h[-1], h[-2]
  sides = np.zeros((n, n))
  sides[1:-1] = 6 * np.diff(slopes, axis=0)
  second = np.linalg.solve(system, sides)
  at = np.clip(np.arange(1 - new, new, dtype=np.float64), x[0], x[-1])
  i = np.clip(np.searchsorted(x, at, side="right") - 1, 0, n - 2)
  step, t = h[i, None], (at - x[i])[:, None]
  linear = slopes[i] - step * (2 * second[i] + second[i + 1]) / 6
  return unit[i] + t * (linear + t * (second[i] / 2 + t * (second[i + 1] - second[i]) / (6 * step)))
