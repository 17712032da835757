"""Points of a sweep: what a configuration's `sweep()` yields, {key of the configuration: value}.

The key "argument" stands for the argument of `get_config`. Reading and expanding a sweep does not import jax.
"""

import hashlib
import itertools
import math
import random
import re
from typing import Any, Callable, Iterator, Sequence

Point = dict[str, Any]


def grid(axes: dict[str, Sequence]) -> Iterator[Point]:
  """Every combination; the last axis runs fastest."""
  for values in itertools.product(*axes.values()):
    yield dict(zip(axes, values))


def paired(axes: dict[str, Sequence]) -> Iterator[Point]:
  """The first values of all axes, then the second ones, and so on; ValueError if they are not equally many."""
  for values in zip(*axes.values(), strict=True):
    yield dict(zip(axes, values))


def sampled(
  count: int, seed: int, axes: dict[str, Sequence | Callable[[random.Random], Any]]
) -> Iterator[Point]:
  """`count` random points, the same each time: an axis is a list to choose from, or a function such as log_uniform(a, b).

  A larger `count` keeps the points of a smaller one and adds others.
  """
  draw = random.Random(seed)
  for _ in range(count):
    yield {key: axis(draw) if callable(axis) else draw.choice(axis) for key, axis in axes.items()}


def uniform(low: float, high: float) -> Callable[[random.Random], float]:
  """An axis of `sampled`, rounded to three digits: names of runs stay readable."""
  return lambda draw: float(f"{draw.uniform(low, high):.3g}")


def log_uniform(low: float, high: float) -> Callable[[random.Random], float]:
  """An axis of `sampled` whose logarithm is uniform, rounded to three digits."""
  return lambda draw: float(f"{math.exp(draw.uniform(math.log(low), math.log(high))):.3g}")


def name(point: Point) -> str:
  """A folder's name that says what the point changes, and depends on nothing else: "teacher.weight=0.5-seed=1"."""
  parts = [str(value) if key == "argument" else f"{key}={value}" for key, value in point.items()]
  text = re.sub(r"[^\w.=+-]+", "-", "-".join(parts), flags=re.ASCII).strip("-.") or "default"
  return (
    text if len(text) <= 120 else f"{text[:107]}-{hashlib.sha1(text.encode()).hexdigest()[:12]}"
  )
