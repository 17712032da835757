"""Reads PyTorch's weight files: state dictionaries, checkpoints and TorchScript archives.

This is the only module that uses torch, and only for state dictionaries. Pickled classes and the
code of TorchScript archives are never executed.
"""

import argparse
import io
import math
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from mrmae_jax.errors import WeightsError
from mrmae_jax.weights.tensor import Tensor, first_line

_STORAGES = {  # of TorchScript
  "DoubleStorage": "float64",
  "FloatStorage": "float32",
  "HalfStorage": "float16",
  "BFloat16Storage": "bfloat16",
  "LongStorage": "int64",
  "IntStorage": "int32",
  "ShortStorage": "int16",
  "BoolStorage": "bool",
}

# What numpy's scalars and arrays are pickled by. torch leaves it to the caller to allow them; here
# they become nothing, so that numpy never reads a stranger's bytes.
_NUMPY = (
  "numpy.dtype",
  "numpy.ndarray",
  "numpy.core.multiarray.scalar",
  "numpy.core.multiarray._reconstruct",
  "numpy._core.multiarray.scalar",
  "numpy._core.multiarray._reconstruct",
)
MAX_NESTING = 8  # dictionaries inside dictionaries


class _Ignored:
  """Stands for a value of numpy's types, such as an accuracy, which is not a weight."""

  def __init__(self, *args):
    del args

  def __setstate__(self, state):
    del state


def read_torch(file: Path) -> dict[str, Tensor]:
  """Returns the tensors of a PyTorch file by name.

  Raises:
    WeightsError: torch is needed and not installed, the file is damaged, it holds no tensors, or it
      needs a pickled class.
  """
  is_zip = zipfile.is_zipfile(file)
  if is_zip and _is_torchscript(file):
    return _read_torchscript(file)
  try:
    import torch  # an extra, which these files alone need
  except ImportError:
    raise WeightsError(
      f"{file} is a PyTorch archive; install the torch extra (pip install mrmae_jax[torch]) or "
      "convert it to safetensors first"
    ) from None
  content = _load_content(file, is_zip, torch)
  tensors = {name: x for name, x in _flatten(content).items() if isinstance(x, torch.Tensor)}
  if not tensors:
    raise WeightsError(f"{file} holds no tensors by name; expected a state_dict()")
  for name, x in tensors.items():  # strides of 0 make terabytes out of one number
    if (
      x.layout != torch.strided
      or x.device.type != "cpu"
      or x.numel() * x.element_size() > x.untyped_storage().nbytes()
    ):
      raise WeightsError(
        f"{file} is damaged: {name} {tuple(x.shape)} is not stored value by value; save its "
        "state_dict() again"
      )

  def tensor(x):  # numpy lacks some of torch's types; float32 holds the values of all that are used
    dtype = str(x.dtype).removeprefix("torch.")
    return Tensor(tuple(x.shape), dtype, lambda: x.detach().float().numpy())

  return {name: tensor(x) for name, x in tensors.items()}


def read_classes(file: Path) -> tuple[str, ...]:
  """Returns the names of the classes that mmsegmentation notes beside weights; () for none.

  They are "CLASSES" of "meta", or since its version 1 "classes" of "dataset_meta" in there.
  """
  import torch  # `read_torch` has found it

  meta = _load_content(file, zipfile.is_zipfile(file), torch).get("meta")
  meta = meta if isinstance(meta, dict) else {}
  newer = meta.get("dataset_meta")
  names = meta.get("CLASSES") or (newer.get("classes") if isinstance(newer, dict) else ())
  is_list = isinstance(names, (tuple, list)) and all(isinstance(x, str) for x in names)
  return tuple(names) if is_list else ()


def _load_content(file: Path, is_zip: bool, torch) -> dict:
  """Unpickles a file without executing it; returns its state dictionary, and all around that."""
  # torch would believe a file's name, which it does not know for a stream.
  mmap = is_zip and file.suffix != ".safetensors"
  try:
    with (
      open(file, "rb") as stream,
      torch.serialization.safe_globals(
        [argparse.Namespace, *((_Ignored, name) for name in _NUMPY)]  # options and results
      ),
    ):
      source = file if mmap else stream
      content = torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
  except pickle.UnpicklingError as error:
    match = re.search(r"GLOBAL ([\w.]+)|[Cc]lass ([\w.]+)", str(error))
    name = next(filter(None, match.groups())) if match else "of an unknown name"
    raise _refusal(file, name) from None
  except Exception as error:  # out of damaged bytes torch raises nearly everything
    raise _damage(file, error) from None
  if not isinstance(content, dict):
    raise WeightsError(f"{file} holds a {type(content).__name__}; expected a state_dict()")
  return content


def _refusal(file: Path, name: str) -> WeightsError:
  return WeightsError(
    f"{file} needs pickled class {name}; refusing, as it could run any code; save its state_dict() "
    "alone"
  )


def _damage(file: Path, error: Exception, name: str = "") -> WeightsError:
  if name:
    return WeightsError(f"{file} is damaged: {name}: {first_line(error)}")
  return WeightsError(f"{file} is damaged or not a PyTorch archive: {first_line(error)}")


def _flatten(content: dict) -> dict[str, Any]:
  """Returns what dictionaries in a dictionary hold, by names joined by "."."""
  flat, visited = {}, set()  # a pickle can hold a dictionary many times, and in itself

  def walk(node, prefix, depth):
    visited.add(id(node))
    for name, value in node.items():
      if not isinstance(name, str):  # numbers of an optimizer
        continue
      if not isinstance(value, dict):
        flat[prefix + name] = value
      elif id(value) not in visited and depth < MAX_NESTING:
        walk(value, f"{prefix}{name}.", depth + 1)

  walk(content, "", 0)
  return flat


def _is_torchscript(file: Path) -> bool:
  """Returns whether a zip archive is TorchScript.

  Raises:
    WeightsError: it is damaged, or packs much into few bytes: neither torch nor this project
      compresses values.
  """
  try:
    with zipfile.ZipFile(file) as archive:
      parts = archive.infolist()
  except Exception as error:  # zipfile raises struct.error, NotImplementedError, ... too
    raise _damage(file, error) from None
  unpacked, size = sum(part.file_size for part in parts), file.stat().st_size
  if unpacked > 2 * size + 2**24:
    raise WeightsError(
      f"{file} ({size} bytes) is not a PyTorch archive: its parts would take {unpacked} bytes "
      "unpacked"
    )
  return any(part.filename.endswith("constants.pkl") for part in parts)


class _Module:
  """Any class of a TorchScript archive, without its code."""


class _Unpickler(pickle._Unpickler):  # the one in C reserves memory for any number it reads
  """Unpickles modules as plain objects and tensors as (storage, offset, shape, strides)."""

  def __init__(self, stream, file: Path):
    super().__init__(stream)
    self._file = file

  def find_class(self, module, name):
    if module.startswith("__torch__"):
      return type("Module", (_Module,), {})
    known = {
      "collections.OrderedDict": dict,
      "torch._utils._rebuild_tensor_v2": lambda *args: args[:4],
      "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    }
    if module == "torch" and name.endswith("Storage"):
      return type("Storage", (), {"kind": name})
    if f"{module}.{name}" not in known:
      raise _refusal(self._file, f"{module}.{name}")
    return known[f"{module}.{name}"]

  def persistent_load(self, pid):
    _, storage, key, _, count = pid
    if not isinstance(key, str):
      raise ValueError("its storages have no names")
    return storage.kind, key, count


def _read_torchscript(file: Path) -> dict[str, Tensor]:
  """Reads the parameters and buffers of a TorchScript archive, without torch.

  `torch.jit.load` runs the code of the archive's __setstate__ methods, which can write files. Here
  modules become plain objects, whatever class they name, and tensors are read from the place that
  the archive states.
  """
  visited = set()

  def walk(module, path):
    for name, value in vars(module).items():
      if isinstance(value, _Module) and value not in visited:  # they may refer to each other
        visited.add(value)
        yield from walk(value, f"{path}{name}.")
      elif isinstance(name, str) and isinstance(value, tuple) and len(value) == 4:
        yield f"{path}{name}", _stored_tensor(file, archive, root, f"{path}{name}", value)

  try:
    with zipfile.ZipFile(file) as archive:
      names = archive.namelist()
      root = next(name for name in names if name.endswith("/data.pkl")).removesuffix("/data.pkl")
      if f"{root}/byteorder" in names and archive.read(f"{root}/byteorder") != b"little":
        raise ValueError("its numbers begin with the highest byte")
      stream = io.BytesIO(archive.read(f"{root}/data.pkl"))
      return dict(walk(_Unpickler(stream, file).load(), ""))
  except WeightsError:
    raise
  except Exception as error:  # a pickle out of damaged bytes raises nearly everything
    raise _damage(file, error) from None


def _stored_tensor(file: Path, archive: zipfile.ZipFile, root: str, name: str, pickled) -> Tensor:
  """Returns a tensor of a TorchScript archive; ValueError if it reaches beyond its storage.

  Args:
    file, archive, root: the archive, opened, and the folder in it.
    name: of the tensor, for messages.
    pickled: ((kind, key, count) of its storage, offset, shape, strides).
  """
  (kind, key, count), offset, shape, strides = pickled
  dtype, place = _STORAGES.get(kind, kind), f"{root}/data/{key}"
  numbers = (offset, count, *shape, *strides)
  last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
  if not (
    all(type(n) is int and n >= 0 for n in numbers)
    and math.prod(shape) <= count
    and last < max(count, 1)
  ):
    raise ValueError(f"{name} reaches beyond its storage")
  if kind in _STORAGES and archive.getinfo(place).file_size != count * np.dtype(dtype).itemsize:
    raise ValueError(f"{name} is stored in {archive.getinfo(place).file_size} bytes")

  def read():
    try:
      with zipfile.ZipFile(file) as archive:
        values = np.frombuffer(archive.read(place), dtype)
    except Exception as error:  # see `_is_torchscript`
      raise _damage(file, error, name) from None
    return np.lib.stride_tricks.as_strided(
      values[offset:], shape, [stride * values.itemsize for stride in strides]
    )

  return Tensor(tuple(shape), dtype, read)
