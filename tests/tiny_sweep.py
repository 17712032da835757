"""A sweep of two points over tests/tiny.py."""

from mrmae_jax.sweep import grid
from tests import tiny


def get_config(encoder: str = "convvit"):
  c = tiny.get_config(encoder)
  c.epochs = 0.04  # 4 steps
  c.teacher.path = ""
  return c


def sweep():
  return grid({"optim.blr": (1e-3, 4e-2)})
