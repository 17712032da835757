"""Reads files of arrays (.npz) that somebody else may have made."""

import math
import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mrmae_jax.errors import one_line
from mrmae_jax.runs.paths import open_regular

HEADERS = {
  (1, 0): np.lib.format.read_array_header_1_0,
  (2, 0): np.lib.format.read_array_header_2_0,
}


def read_arrays(path: Path) -> dict[str, np.ndarray]:
  """Reads the arrays of an .npz by name. It takes no memory for more than the file holds.

  Raises:
    OSError: the file cannot be read.
    ValueError: it is no .npz of plain arrays, is damaged, or claims what it does not hold.
  """
  try:
    with open_regular(path, math.inf) as file, zipfile.ZipFile(file) as archive:
      size = file.seek(0, 2)
      for member in archive.infolist():
        if member.compress_type != zipfile.ZIP_STORED or member.file_size > size:
          raise ValueError(f"{member.filename} is compressed, or claims more than the file holds")
      return {
        member.filename.removesuffix(".npy"): _read_array(archive.open(member), member.file_size)
        for member in archive.infolist()
      }
  except (OSError, ValueError, MemoryError):
    raise
  # numpy parses headers as Python, and hostile text raises errors of any type there and in zipfile.
  except Exception as error:
    raise ValueError(one_line(error)) from None


def _read_array(file: BinaryIO, size: int) -> np.ndarray:
  """Reads an array from a member of `size` bytes of an archive."""
  shape, _, dtype = HEADERS[np.lib.format.read_magic(file)](file)
  num_bytes = math.prod(shape) * dtype.itemsize
  if dtype.hasobject or num_bytes != size - file.tell() or min(shape, default=0) < 0:
    raise ValueError(f"{file.name} has {size:,} bytes, its header claims {dtype} of shape {shape}")
  file.seek(0)
  return np.lib.format.read_array(file, allow_pickle=False)
