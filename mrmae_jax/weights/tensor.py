"""A tensor in a weight file, of any format."""

from typing import Callable, NamedTuple

import numpy as np

from mrmae_jax.errors import printable


class Tensor(NamedTuple):
  """A tensor in a file: shape and type are known, `read()` returns its values."""

  shape: tuple[int, ...]
  dtype: str  # the file's own word for it
  read: Callable[[], np.ndarray]

  def __array__(self, dtype=None, copy=None):
    del copy  # values always come fresh from the file
    return np.asarray(self.read(), dtype)


def first_line(error: Exception) -> str:
  """Returns the first line of an error's text, printable and at most 300 characters."""
  line = (str(error).splitlines() or [type(error).__name__])[0][:300]
  return printable(line)
