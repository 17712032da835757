"""Weight files -> named tensors, lazily: names, types and shapes at once, values when they are asked for. And back.

What a file is, its content decides, not its name: safetensors, PyTorch (zip, TorchScript, old pickle), Flax's msgpack. torch
is imported for PyTorch files alone; nothing pickled is ever executed.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Callable, NamedTuple

import ml_dtypes  # registers bfloat16 with numpy
import numpy as np
import safetensors.numpy

from mrmae_jax.weights.table import WeightsError

FOLDER_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
                "flax_model.msgpack")  # Hugging Face's names, best first
# What weights are made of, and counters and position numbers beside them: safetensors' word, and numpy's and torch's.
_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
          "I16": "int16", "BOOL": "bool"}


class Tensor(NamedTuple):
  """A tensor in a file: `read()` gives its values."""

  shape: tuple[int, ...]
  dtype: str  # the file's own word for it
  read: Callable[[], np.ndarray]

  def __array__(self, dtype=None, copy=None):
    del copy  # values always come fresh from the file
    return np.asarray(self.read(), dtype)


def weight_files(path: Path) -> list[Path]:
  """The files that hold the weights: the file itself, or those of a folder in Hugging Face's layout.

  Raises:
    WeightsError: nothing there, or shards absent.
  """
  if path.is_file():
    return [path]
  if not path.is_dir():
    raise WeightsError(f"{path}: no such file or folder; fetch weights with e.g. `hf download openai/clip-vit-base-patch16 "
                       "--local-dir DIR`")
  name = next((name for name in FOLDER_FILES if (path / name).is_file()), None)
  if name is None:
    found = ", ".join(sorted(p.name for p in path.iterdir())[:8])
    raise WeightsError(f"no model.safetensors, index, pytorch_model.bin or flax_model.msgpack in {path}; "
                       f"found: {found or 'nothing'}")
  if not name.endswith(".index.json"):
    return [path / name]
  try:
    shards = sorted(set(json.loads((path / name).read_text())["weight_map"].values()))
  except (ValueError, KeyError, TypeError, AttributeError):
    raise WeightsError(f"{path / name} is no index: expected JSON with a weight_map; fetch it again") from None
  absent = [shard for shard in shards if not (path / shard).is_file()]
  if absent:
    raise WeightsError(f"{path / name}: the index lists {absent[0]}, which is absent "
                       f"({len(shards) - len(absent)} of {len(shards)} shards are there); fetch the rest")
  return [path / shard for shard in shards]


def open_weights(path: Path) -> dict[str, Tensor]:
  """All tensors of a file or folder, by name. Values of safetensors and PyTorch zip files stay on disk until they are read.

  Raises:
    WeightsError: no such file, not a weight file, damaged, quantised, or one that would have to execute code.
  """
  tensors = {}
  for file in weight_files(path):
    tensors |= _container(file)(file)
  for name, tensor in tensors.items():
    if tensor.dtype not in _TYPES and tensor.dtype not in _TYPES.values():
      raise WeightsError(f"{path}: quantised weights are not supported ({name} is {tensor.dtype}); "
                         "use a float32, float16 or bfloat16 file")
  return tensors


def metadata(path: Path) -> dict[str, str]:
  """What the writer of a safetensors file noted beside the tensors; {} for folders and other files."""
  if not path.is_file() or _container(path) is not _safetensors:
    return {}
  return _header(path)[1].get("__metadata__") or {}


@contextlib.contextmanager
def whole(path: Path):
  """A name to write a file under, which becomes `path` when the block ends well, and is gone when it does not."""
  path.parent.mkdir(parents=True, exist_ok=True)
  unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    yield unfinished
    unfinished.replace(path)
  finally:
    unfinished.unlink(missing_ok=True)


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], notes: dict[str, str] | None = None) -> None:
  """Writes tensors, whole or not at all; `notes` are what `metadata` gives back."""
  with whole(path) as unfinished:  # not safetensors' save_file: that makes the file unreadable to other users
    unfinished.write_bytes(safetensors.numpy.save(tensors, metadata={"format": "pt"} | (notes or {})))


def digest(path: Path) -> str:
  """sha256 of the weight files' content, to tell weights apart wherever they lie."""
  whole = hashlib.sha256()
  for file in weight_files(path):
    with open(file, "rb") as stream:
      whole.update(hashlib.file_digest(stream, "sha256").digest())
  return whole.hexdigest()


def _container(file: Path) -> Callable[[Path], dict[str, Tensor]]:
  """The reader that a file's first bytes ask for."""
  with open(file, "rb") as stream:
    start = stream.read(64)
  if start.startswith(b"version https://git-lfs"):
    raise WeightsError(f"{file} is a Git LFS pointer ({file.stat().st_size} bytes), fetch the real file (`git lfs pull`)")
  if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
    raise WeightsError(f"{file} is an HTML page, not weights; fetch the file itself (on the hub: /resolve/ instead of /blob/)")
  if start[8:9] == b"{":
    return _safetensors
  if start.startswith((b"PK\x03\x04", b"\x80\x02")):
    return _torch
  if start[:1] and (0x81 <= start[0] <= 0x8f or start[0] in (0xde, 0xdf)):  # a map of 1 or more entries
    return _msgpack
  raise WeightsError(f"{file} ({file.stat().st_size} bytes) is no weight file; expected safetensors, PyTorch or Flax msgpack")


def _safetensors(file: Path) -> dict[str, Tensor]:
  """The format: u64 length of a JSON header {name: {dtype, shape, data_offsets}}, the header, the raw values."""
  size, (length, header) = file.stat().st_size, _header(file)
  try:
    entries = {name: (e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for name, e in header.items()
               if name != "__metadata__"}
    wanted = 8 + length + max((end for *_, end in entries.values()), default=0)
  except (ValueError, KeyError, TypeError) as error:
    raise WeightsError(f"{file} is damaged: its header is not that of a safetensors file ({error}); fetch it again") from None
  if wanted != size:
    raise WeightsError(f"{file} is damaged: header asks for {wanted} bytes, file has {size}; fetch it again")

  def tensor(name, dtype, shape, begin, end):
    kind = np.dtype(_TYPES[dtype]) if dtype in _TYPES else None
    if kind and math.prod(shape) * kind.itemsize != end - begin:
      raise WeightsError(f"{file} is damaged: {name} {dtype} {shape} takes {end - begin} bytes; fetch it again")
    return Tensor(shape, dtype, lambda: np.fromfile(
        file, kind, math.prod(shape), offset=8 + length + begin).reshape(shape))
  return {name: tensor(name, *entry) for name, entry in entries.items()}


def _header(file: Path) -> tuple[int, dict]:
  """Length and content of the header of a safetensors file."""
  size = file.stat().st_size
  with open(file, "rb") as stream:
    length = int.from_bytes(stream.read(8), "little")
    if 8 + length > size:
      raise WeightsError(f"{file} is damaged: header asks for {8 + length} bytes, file has {size}; fetch it again")
    try:
      header = json.loads(stream.read(length))
      header.keys()
    except (ValueError, AttributeError) as error:
      raise WeightsError(f"{file} is damaged: its header is not that of a safetensors file ({error}); fetch it again") from None
  return length, header


def _torch(file: Path) -> dict[str, Tensor]:
  """`torch.save`d state dictionaries and checkpoints, and TorchScript archives, such as OpenAI's."""
  try:
    import torch  # pylint: disable=g-import-not-at-top; of all weight files only these need it
  except ImportError:
    raise WeightsError(f"{file} is a PyTorch archive; install the torch extra (pip install mrmae_jax[torch]) or convert it to "
                       "safetensors first") from None
  try:
    zipped = zipfile.is_zipfile(file)
    script = zipped and any(name.endswith("constants.pkl") for name in zipfile.ZipFile(file).namelist())
    if script:  # no pickle: its own format of code and tensors; the code is loaded, not run
      content = torch.jit.load(file, map_location="cpu").state_dict()
    else:
      mapped = zipped and file.suffix != ".safetensors"  # torch would believe the name; it does not see that of a stream
      with open(file, "rb") as stream, torch.serialization.safe_globals([argparse.Namespace]):  # of DINO's options
        content = torch.load(file if mapped else stream, map_location="cpu", weights_only=True, mmap=mapped)
  except pickle.UnpicklingError as error:
    found = re.search(r"GLOBAL ([\w.]+)|[Cc]lass ([\w.]+)", str(error))
    name = next(filter(None, found.groups())) if found else "of an unknown name"
    raise WeightsError(f"{file} needs pickled class {name}; refusing, as it could run any code; save its state_dict() "
                       "alone") from None
  except (RuntimeError, EOFError, ValueError, OSError, zipfile.BadZipFile) as error:
    raise WeightsError(f"{file} is damaged or no PyTorch archive: {str(error).splitlines()[0]}") from None
  tensors = {name: x for name, x in _state_dict(content, file).items() if isinstance(x, torch.Tensor)}
  if not tensors:
    raise WeightsError(f"{file} holds no tensors by name; expected a state_dict()")
  # Not all of torch's types exist in numpy; float32 holds the values of all that are used.
  return {name: Tensor(tuple(x.shape), str(x.dtype).removeprefix("torch."), lambda x=x: x.detach().float().numpy())
          for name, x in tensors.items()}


def _state_dict(content, file: Path) -> dict:
  """Out of its wrappers: {"model": ...}, {"state_dict": ...}, and the teacher of a DINO checkpoint (main_dino.py)."""
  if not isinstance(content, dict):
    raise WeightsError(f"{file} holds a {type(content).__name__}; expected a state_dict()")
  if isinstance(content.get("teacher"), dict):
    names = {re.sub(r"^(module\.)?(backbone\.)?", "", name): name for name in content["teacher"]}
    return {ours: content["teacher"][name] for ours, name in names.items() if not ours.startswith("head.")}
  if isinstance(content.get("student"), dict):
    raise WeightsError(f"{file} holds only the student of a checkpoint (keys: {', '.join(map(str, content))}); the teacher is "
                       "wanted: give the full checkpoint")
  for key in ("state_dict", "model"):
    if isinstance(content.get(key), dict):
      return _state_dict(content[key], file)
  return content


def _msgpack(file: Path) -> dict[str, Tensor]:
  """Hugging Face's old Flax weights, under the names and in the layouts of the same model's torch weights."""
  from flax import serialization  # pylint: disable=g-import-not-at-top; rarely needed
  try:
    tree = serialization.msgpack_restore(file.read_bytes())
  except Exception as error:  # pylint: disable=broad-except; msgpack raises a dozen types
    raise WeightsError(f"{file} is damaged or no weight file: {error}") from None
  tensors = {}

  def walk(node, path):
    if isinstance(node, dict):
      for key, child in node.items():
        walk(child, (*path, str(key)))
    elif isinstance(node, np.ndarray):
      *parents, leaf = path
      if leaf == "kernel":  # (in, out) and (H, W, I, O)
        node = node.transpose(3, 2, 0, 1) if node.ndim == 4 else node.T
      leaf = "weight" if leaf in ("kernel", "scale", "embedding") else leaf
      tensors[".".join((*parents, leaf))] = Tensor(node.shape, node.dtype.name, lambda: node)
  walk(tree, ())
  return tensors
