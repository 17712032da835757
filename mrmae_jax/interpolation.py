"""Interpolates along an axis by matrices: the rules of position tables."""

from typing import Callable, NamedTuple

import numpy as np


class Rule(NamedTuple):
  """An interpolation of position tables, rows and columns alike, at half-pixel centers.

  Attributes:
    description: for people.
    kernel: distances in old rows -> weights.
    antialias: when a table shrinks, widen the kernel and leave out weights beyond the edges.
      Otherwise those weights go to the edge.
    offset: added to the new number of rows when the step between new rows is computed.
  """

  description: str
  kernel: Callable[[np.ndarray], np.ndarray]
  antialias: bool = False
  offset: float = 0.0


def _cubic(a: float):
  """Cubic convolution (Keys 1981)."""

  def kernel(x):
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0))

  return kernel


# torch.nn.functional.interpolate takes a = -0.75, and -0.5 where it antialiases.
BICUBIC = Rule("bicubic", _cubic(-0.75))
# Of its relative positions, see `weights.positions.resize_relative`; a table beside them is
# bicubic.
BEIT = Rule("BEiT's spline", _cubic(-0.75))
# facebookresearch/dino, vision_transformer.py: a scale factor of (new + 0.1) / old, against
# rounding, also moves the rows.
DINO = Rule("bicubic with DINO's offset", _cubic(-0.75), offset=0.1)
BICUBIC_ANTIALIAS = Rule("antialiased bicubic", _cubic(-0.5), antialias=True)
BILINEAR_ANTIALIAS = Rule(
  "antialiased bilinear", lambda x: np.maximum(1 - np.abs(x), 0), antialias=True
)


def matrix(old: int, new: int, rule: Rule) -> np.ndarray:
  """Returns float64 [new, old]: each new row as a weighted mean of old rows."""
  step = old / (new + rule.offset)
  center = (np.arange(new) + 0.5) * step - 0.5
  edge = 2  # as far as a kernel that is not widened reaches beyond the table
  index = np.arange(-edge, old + edge)
  weights = rule.kernel((index - center[:, None]) / (max(step, 1) if rule.antialias else 1))
  inner = weights[:, edge:-edge].copy()
  if rule.antialias:
    return inner / inner.sum(axis=1, keepdims=True)
  inner[:, 0] += weights[:, :edge].sum(axis=1)
  inner[:, -1] += weights[:, -edge:].sum(axis=1)
  return inner
