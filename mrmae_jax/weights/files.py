"""Reads named tensors from weight files, lazily, and writes safetensors.

Names, types and shapes are known at once, values are read when they are asked for. The content of a
file decides its format, not its name: safetensors, PyTorch (see `torch_files`) or Flax's msgpack.
Nothing in a file is ever executed. Files come from strangers: their claims are believed only as far
as their bytes reach.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Callable

import numpy as np
import safetensors.numpy
from flax import serialization

from mrmae_jax.errors import WeightsError
from mrmae_jax.runs.paths import atomic_write, read_regular
from mrmae_jax.weights import torch_files
from mrmae_jax.weights.tensor import Tensor, first_line

FOLDER_FILES = (  # in a folder, best first: Hugging Face's names
  "model.safetensors",
  "model.safetensors.index.json",
  "pytorch_model.bin",
  "pytorch_model.bin.index.json",
  "flax_model.msgpack",
  "mp_rank_00_model_states.pt",  # DeepSpeed's
)
# The types of weights, and of counters and position numbers beside them: numpy's and torch's words,
# and those of safetensors.
_TYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "bool")
_SAFETENSORS_TYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "BOOL")


def weight_files(path: Path) -> list[Path]:
  """Returns the files that hold the weights: the file itself, or those of a Hugging Face folder.

  Raises:
    WeightsError: there is no such file or folder, or shards are absent or outside of the folder.
  """
  if os.path.isfile(path):  # Path.is_file raises for names that no file can have
    return [path]
  if not os.path.isdir(path):
    raise WeightsError(
      f"{path}: no such file or folder; fetch weights with e.g. "
      "`hf download openai/clip-vit-base-patch16 --local-dir DIR`"
    )
  name = next((name for name in FOLDER_FILES if (path / name).is_file()), None)
  if name is None:
    names = ", ".join(sorted(p.name for p in path.iterdir())[:8])
    raise WeightsError(
      f"no model.safetensors, index, pytorch_model.bin or flax_model.msgpack in {path}; "
      f"found: {names or 'nothing'}"
    )
  return _shards(path, name) if name.endswith(".index.json") else [path / name]


def _shards(folder: Path, index: str) -> list[Path]:
  """Returns the files that an index lists, all of which must exist in its own folder."""
  try:
    shards = sorted(set(read_json(folder / index)["weight_map"].values()))
  except (KeyError, TypeError, AttributeError):
    raise WeightsError(
      f"{folder / index} is not an index: expected JSON with a weight_map; fetch it again"
    ) from None
  for shard in shards:
    if (
      not isinstance(shard, str)
      or shard != os.path.basename(shard)
      or shard in ("", ".", "..")
      or not shard.isprintable()
    ):
      raise WeightsError(
        f"{folder / index}: the index lists {str(shard)[:80]!r}, expected names of files in its "
        "own folder"
      )
  absent = [shard for shard in shards if not os.path.isfile(folder / shard)]
  if absent:
    raise WeightsError(
      f"{folder / index}: the index lists {absent[0]}, which is absent "
      f"({len(shards) - len(absent)} of {len(shards)} shards exist); fetch the rest"
    )
  return [folder / shard for shard in shards]


def open_weights(path: Path) -> dict[str, Tensor]:
  """Returns all tensors of a file or folder by name.

  Values of safetensors and PyTorch zip files stay on disk until they are read. Dictionaries inside
  dictionaries give names joined by ".".

  Raises:
    WeightsError: there is no such file, it is not a weight file, it is damaged, or it would have to
      execute code.
  """
  tensors = {}
  for file in weight_files(path):
    try:
      tensors |= _reader(file)(file)
    except OSError as error:
      raise WeightsError(f"{file} cannot be read: {error.strerror or error}") from None
  for name in tensors:
    if not name.isprintable():  # a terminal would obey control characters
      raise WeightsError(f"{path} is damaged: a tensor is called {name[:80]!r}; fetch it again")
  return tensors


def check_tensors(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
  """Returns the tensors of a network.

  Raises:
    WeightsError: one of them holds nothing, or is quantized.
  """
  for name, tensor in tensors.items():
    if min(tensor.shape, default=1) < 1:
      raise WeightsError(f"{path} is damaged: {name} {tensor.shape} holds nothing; fetch it again")
    if tensor.dtype not in _TYPES + _SAFETENSORS_TYPES:
      raise WeightsError(
        f"{path}: quantized weights are not supported ({name} is {tensor.dtype}); "
        "use a float32, float16 or bfloat16 file"
      )
  return tensors


def read_json(path: Path) -> dict[str, Any]:
  """Reads a JSON file that holds an object, such as config.json.

  Raises:
    WeightsError: it cannot be read, or holds something else.
  """
  try:
    content = json.loads(read_regular(path))
  except (ValueError, OSError, RecursionError) as error:
    raise WeightsError(f"{path} is not JSON: {error}") from None
  if not isinstance(content, dict):
    raise WeightsError(f"{path} is not a configuration: {str(content)[:60]!r}")
  return content


def image_statistics(
  path: Path | None,
  mean: tuple[float, ...] | None = None,
  std: tuple[float, ...] | None = None,
  channels: int | None = 3,
):
  """Returns image_mean and image_std of a preprocessor_config.json.

  `mean` and `std` take their place where the file does not exist or does not hold them.

  Raises:
    WeightsError: the file is not JSON, or see `check_statistics`.
  """
  stored = read_json(path) if path and path.is_file() else {}
  mean, std = stored.get("image_mean", mean), stored.get("image_std", std)
  if mean is None and std is None:
    return None, None
  return check_statistics(mean, std, str(path), channels)


def check_statistics(
  mean, std, source: str, channels: int | None = 3
) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Returns the mean and deviation that normalize a network's input, as tuples.

  Args:
    mean, std: any values, as they were read.
    source: file or folder, for the message.
    channels: the expected number of values; None: as many means as deviations.

  Raises:
    WeightsError: they are not `channels` numbers each for pixels in [0, 1], with std > 0.
  """
  is_valid = lambda x: (
    isinstance(x, (list, tuple))
    and len(x)
    and all(type(n) in (int, float) and 0 <= n <= 1 for n in x)
  )
  if not (
    is_valid(mean)
    and is_valid(std)
    and min(std) > 0
    and len(mean) == len(std)
    and channels in (None, len(mean))
  ):
    raise WeightsError(
      f"{source}: image_mean {str(mean)[:80]} and image_std {str(std)[:80]} must hold "
      f"{channels or 'equally many'} numbers each, for pixels in [0, 1], std > 0; or give mean "
      "and std"
    )
  return tuple(mean), tuple(std)


def read_metadata(path: Path) -> dict[str, str]:
  """Returns the metadata of a safetensors file; {} for folders and other formats."""
  if not path.is_file() or _reader(path) is not _read_safetensors:
    return {}
  with _open_safetensors(path) as stored:
    return stored.metadata() or {}


def read_classes(path: Path) -> tuple[str, ...]:
  """Returns the classes that a PyTorch file of mmsegmentation names; () for other files."""
  is_torch = path.is_file() and _reader(path) is torch_files.read_torch
  return torch_files.read_classes(path) if is_torch else ()


def write_safetensors(
  path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None
) -> None:
  """Writes tensors and metadata; the file appears complete or not at all."""
  with atomic_write(path) as tmp:  # safetensors' save_file makes it unreadable to other users
    tmp.write_bytes(safetensors.numpy.save(tensors, metadata={"format": "pt"} | (metadata or {})))


def digest(path: Path) -> str:
  """Returns the sha256 of the weight files' content, which identifies weights wherever they lie."""
  sha256 = hashlib.sha256()
  for file in weight_files(path):
    with open(file, "rb") as stream:
      sha256.update(hashlib.file_digest(stream, "sha256").digest())
  return sha256.hexdigest()


def _reader(file: Path) -> Callable[[Path], dict[str, Tensor]]:
  """Returns the reader that a file's first bytes ask for."""
  with open(file, "rb") as stream:
    start = stream.read(64)
  size = file.stat().st_size
  if start.startswith(b"version https://git-lfs"):
    raise WeightsError(
      f"{file} is a Git LFS pointer ({size} bytes), fetch the real file (`git lfs pull`)"
    )
  if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
    raise WeightsError(
      f"{file} is an HTML page, not weights; fetch the file itself (on the hub: /resolve/ instead "
      "of /blob/)"
    )
  if start[8:9] == b"{":
    return _read_safetensors
  if start.startswith((b"PK\x03\x04", b"\x80\x02")):
    return torch_files.read_torch
  is_map = start[:1] and (0x81 <= start[0] <= 0x8F or start[0] in (0xDE, 0xDF))  # not empty
  if is_map:
    return _read_msgpack
  raise WeightsError(
    f"{file} ({size} bytes) is not a weight file; expected safetensors, PyTorch or Flax msgpack"
  )


def _open_safetensors(file: Path) -> safetensors.safe_open:
  """Opens a safetensors file: u64 length of a JSON header, the header, the raw values.

  The library checks types, shapes and offsets. Here a name that comes twice is refused: the library
  takes the last one, other readers the first.
  """
  try:
    stored = safetensors.safe_open(file, "np")
    with open(file, "rb") as stream:
      length = int.from_bytes(stream.read(8), "little")
      json.loads(stream.read(length), object_pairs_hook=_unique_names)
  except (safetensors.SafetensorError, ValueError, RecursionError) as error:
    raise WeightsError(
      f"{file} ({file.stat().st_size} bytes) is damaged: {first_line(error)}; fetch it again"
    ) from None
  return stored


def _read_safetensors(file: Path) -> dict[str, Tensor]:
  def tensor(part, name):
    def read():
      with _open_safetensors(file) as stored:
        return stored.get_tensor(name)

    return Tensor(tuple(part.get_shape()), part.get_dtype(), read)

  with _open_safetensors(file) as stored:
    return {name: tensor(stored.get_slice(name), name) for name in stored.keys()}


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """Returns a JSON object; ValueError for a name that comes twice."""
  names = [name for name, _ in pairs]
  if len(set(names)) != len(names):
    twice = next(name for i, name in enumerate(names) if name in names[:i])
    raise ValueError(f"{twice[:80]!r} comes twice")
  return dict(pairs)


def _read_msgpack(file: Path) -> dict[str, Tensor]:
  """Reads Hugging Face's old Flax weights.

  Names and layouts become those of the same model's torch weights.
  """
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

  try:
    walk(serialization.msgpack_restore(file.read_bytes()), ())
  except Exception as error:  # msgpack raises a dozen types
    raise WeightsError(f"{file} is damaged or not a weight file: {first_line(error)}") from None
  return tensors
