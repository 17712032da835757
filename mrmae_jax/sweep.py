"""Makes the points of a sweep: what the `sweep()` of a configuration yields.

A point is {key of the configuration: value}. The key "argument" stands for the argument of
`get_config`. This module imports no jax.
"""

import hashlib
import itertools
import math
import random
import re
from typing import Any, Callable, Iterator, Sequence

Point = dict[str, Any]


def grid(axes: dict[str, Sequence]) -> Iterator[Point]:
  """Yields every combination of the values; the last axis runs fastest."""
  for values in itertools.product(*axes.values()):
    yield dict(zip(axes, values))


def sampled(
  count: int, seed: int, axes: dict[str, Sequence | Callable[[random.Random], Any]]
) -> Iterator[Point]:
  """Yields `count` random points, the same each time.

  A larger `count` keeps the points of a smaller one and adds others.

  Args:
    count: number of points.
    seed: of the draws.
    axes: {key: a list to choose from, or a function such as `log_uniform(low, high)`}.
  """
  rng = random.Random(seed)
  for _ in range(count):
    yield {key: axis(rng) if callable(axis) else rng.choice(axis) for key, axis in axes.items()}


def uniform(low: float, high: float) -> Callable[[random.Random], float]:
  """Returns an axis of `sampled`, rounded to three digits so that names of runs stay readable."""
  return lambda rng: float(f"{rng.uniform(low, high):.3g}")


def log_uniform(low: float, high: float) -> Callable[[random.Random], float]:
  """Returns an axis of `sampled` whose logarithm is uniform, rounded to three digits."""
  return lambda rng: float(f"{math.exp(rng.uniform(math.log(low), math.log(high))):.3g}")


def point_name(point: Point) -> str:
  """Returns the name of a point's folder, e.g. "teacher.weight=0.5-seed=1".

  The name depends on the point alone, needs no quotes in a shell, and has at most 120 characters.
  """
  parts = [str(value) if key == "argument" else f"{key}={value}" for key, value in point.items()]
  name = re.sub(r"[^\w.=+-]+", "-", "-".join(parts), flags=re.ASCII).strip("-.") or "default"
  if len(name) <= 120:
    return name
  return f"{name[:107]}-{hashlib.sha1(name.encode()).hexdigest()[:12]}"
