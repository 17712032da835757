"""Weight files -> named tensors, lazily: names, types and shapes at once, values when they are asked for. And back.

What a file is, its content decides, not its name: safetensors, PyTorch (zip, TorchScript, old pickle), Flax's msgpack. torch
is imported for PyTorch files alone; nothing that a file brings along is ever executed, neither pickles nor TorchScript. Files
come from strangers: what they say of themselves is believed only as far as their bytes reach.
"""

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, Callable, NamedTuple

import numpy as np
import safetensors.numpy

from mrmae_jax.errors import WeightsError

FOLDER_FILES = (
  "model.safetensors",
  "model.safetensors.index.json",
  "pytorch_model.bin",
  "pytorch_model.bin.index.json",
  "flax_model.msgpack",
)  # Hugging Face's names, best first
MAX_HEADER = 100_000_000  # bytes of JSON; the limit of safetensors' own reader
# What weights are made of, and counters and position numbers beside them: safetensors' word, and numpy's and torch's.
_TYPES = {
  "F64": "float64",
  "F32": "float32",
  "F16": "float16",
  "BF16": "bfloat16",
  "I64": "int64",
  "I32": "int32",
  "I16": "int16",
  "BOOL": "bool",
}
_STORAGES = {
  "DoubleStorage": "float64",
  "FloatStorage": "float32",
  "HalfStorage": "float16",
  "BFloat16Storage": "bfloat16",
  "LongStorage": "int64",
  "IntStorage": "int32",
  "ShortStorage": "int16",
  "BoolStorage": "bool",
}  # of TorchScript


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
    WeightsError: nothing there, or shards absent or outside of the folder.
  """
  if os.path.isfile(path):  # not Path's, which raises for names that no file can have
    return [path]
  if not os.path.isdir(path):
    raise WeightsError(
      f"{path}: no such file or folder; fetch weights with e.g. `hf download openai/clip-vit-base-patch16 "
      "--local-dir DIR`"
    )
  name = next((name for name in FOLDER_FILES if (path / name).is_file()), None)
  if name is None:
    found = ", ".join(sorted(p.name for p in path.iterdir())[:8])
    raise WeightsError(
      f"no model.safetensors, index, pytorch_model.bin or flax_model.msgpack in {path}; "
      f"found: {found or 'nothing'}"
    )
  if not name.endswith(".index.json"):
    return [path / name]
  try:
    shards = sorted(set(read_json(path / name)["weight_map"].values()))
  except (KeyError, TypeError, AttributeError):
    raise WeightsError(
      f"{path / name} is no index: expected JSON with a weight_map; fetch it again"
    ) from None
  for shard in shards:
    if (
      not isinstance(shard, str)
      or shard != os.path.basename(shard)
      or shard in ("", ".", "..")
      or not shard.isprintable()
    ):
      raise WeightsError(
        f"{path / name}: the index lists {str(shard)[:80]!r}, expected names of files in its own folder"
      )
  absent = [shard for shard in shards if not os.path.isfile(path / shard)]
  if absent:
    raise WeightsError(
      f"{path / name}: the index lists {absent[0]}, which is absent "
      f"({len(shards) - len(absent)} of {len(shards)} shards are there); fetch the rest"
    )
  return [path / shard for shard in shards]


def open_weights(path: Path) -> dict[str, Tensor]:
  """All tensors of a file or folder, by name. Values of safetensors and PyTorch zip files stay on disk until they are read.

  Raises:
    WeightsError: no such file, not a weight file, damaged, quantised, or one that would have to execute code.
  """
  tensors = {}
  for file in weight_files(path):
    try:
      tensors |= _container(file)(file)
    except OSError as error:
      raise WeightsError(f"{file} cannot be read: {error.strerror or error}") from None
  for name, tensor in tensors.items():
    if not name.isprintable():  # a terminal would obey control characters
      raise WeightsError(f"{path} is damaged: a tensor is called {name[:80]!r}; fetch it again")
    if min(tensor.shape, default=1) < 1:
      raise WeightsError(f"{path} is damaged: {name} {tensor.shape} holds nothing; fetch it again")
    if tensor.dtype not in _TYPES and tensor.dtype not in _TYPES.values():
      raise WeightsError(
        f"{path}: quantised weights are not supported ({name} is {tensor.dtype}); "
        "use a float32, float16 or bfloat16 file"
      )
  return tensors


def read_json(path: Path) -> dict[str, Any]:
  """A JSON file that is an object: config.json and the like.

  Raises:
    WeightsError: it cannot be read, or is something else.
  """
  try:
    content = json.loads(path.read_text())
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
  """image_mean and image_std of a preprocessor_config.json; the given ones where there is none, or it does not say.

  Raises:
    WeightsError: see `check_statistics`; or the file is no JSON.
  """
  stored = read_json(path) if path and path.is_file() else {}
  mean, std = stored.get("image_mean", mean), stored.get("image_std", std)
  return (
    (None, None)
    if mean is None and std is None
    else check_statistics(mean, std, str(path), channels)
  )


def check_statistics(
  mean, std, source: str, channels: int | None = 3
) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """The mean and deviation by which a network's input is normalised, as tuples.

  Raises:
    WeightsError: they are not `channels` numbers each (None: as many of one as of the other) for pixels in [0, 1], std > 0.
  """
  fits = lambda x: (
    isinstance(x, (list, tuple))
    and len(x)
    and all(type(n) in (int, float) and 0 <= n <= 1 for n in x)
  )
  if not (
    fits(mean)
    and fits(std)
    and min(std) > 0
    and len(mean) == len(std)
    and channels in (None, len(mean))
  ):
    raise WeightsError(
      f"{source}: image_mean {str(mean)[:80]} and image_std {str(std)[:80]} must hold "
      f"{channels or 'equally many'} numbers each, for pixels in [0, 1], std > 0; or give mean and std"
    )
  return tuple(mean), tuple(std)


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


def write_safetensors(
  path: Path, tensors: dict[str, np.ndarray], notes: dict[str, str] | None = None
) -> None:
  """Writes tensors, whole or not at all; `notes` are what `metadata` gives back."""
  with whole(
    path
  ) as unfinished:  # not safetensors' save_file: that makes the file unreadable to other users
    unfinished.write_bytes(
      safetensors.numpy.save(tensors, metadata={"format": "pt"} | (notes or {}))
    )


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
    raise WeightsError(
      f"{file} is a Git LFS pointer ({file.stat().st_size} bytes), fetch the real file (`git lfs pull`)"
    )
  if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
    raise WeightsError(
      f"{file} is an HTML page, not weights; fetch the file itself (on the hub: /resolve/ instead of /blob/)"
    )
  if start[8:9] == b"{":
    return _safetensors
  if start.startswith((b"PK\x03\x04", b"\x80\x02")):
    return _torch
  if start[:1] and (
    0x81 <= start[0] <= 0x8F or start[0] in (0xDE, 0xDF)
  ):  # a map of 1 or more entries
    return _msgpack
  raise WeightsError(
    f"{file} ({file.stat().st_size} bytes) is no weight file; expected safetensors, PyTorch or Flax msgpack"
  )


def _safetensors(file: Path) -> dict[str, Tensor]:
  """The format: u64 length of a JSON header {name: {dtype, shape, data_offsets}}, the header, the raw values."""
  size, (length, header) = file.stat().st_size, _header(file)
  whole = lambda numbers: (
    isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)
  )
  entries, end = {}, 0
  for name, entry in header.items():
    if name == "__metadata__":
      continue
    try:
      dtype, shape, (begin, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (ValueError, KeyError, TypeError) as error:
      raise WeightsError(
        f"{file} is damaged: its header is not that of a safetensors file ({error!r}); fetch it again"
      ) from None
    if not (isinstance(dtype, str) and whole(shape) and whole([begin, stop]) and begin <= stop):
      raise WeightsError(
        f"{file} is damaged: {name} has type {str(dtype)[:20]!r}, shape {str(shape)[:60]}, place "
        f"{str([begin, stop])[:60]}; fetch it again"
      )
    entries[name] = dtype, tuple(shape), begin, stop
  for name, (dtype, shape, begin, stop) in sorted(entries.items(), key=lambda item: item[1][2:]):
    if begin != end:
      raise WeightsError(
        f"{file} is damaged: {name} begins at {begin}, expected {end}: tensors lie side by side; fetch it again"
      )
    if dtype in _TYPES and math.prod(shape) * np.dtype(_TYPES[dtype]).itemsize != stop - begin:
      raise WeightsError(
        f"{file} is damaged: {name} {dtype} {shape} takes {stop - begin} bytes; fetch it again"
      )
    end = stop
  if 8 + length + end != size:
    raise WeightsError(
      f"{file} is damaged: header asks for {8 + length + end} bytes, file has {size}; fetch it again"
    )

  def tensor(dtype, shape, begin, stop):
    del stop
    return Tensor(
      shape,
      dtype,
      lambda: np.fromfile(file, _TYPES[dtype], math.prod(shape), offset=8 + length + begin).reshape(
        shape
      ),
    )

  return {name: tensor(*entry) for name, entry in entries.items()}


def _header(file: Path) -> tuple[int, dict]:
  """Length and content of the header of a safetensors file."""
  size = file.stat().st_size
  with open(file, "rb") as stream:
    length = int.from_bytes(stream.read(8), "little")
    if 8 + length > size:
      raise WeightsError(
        f"{file} is damaged: header asks for {8 + length} bytes, file has {size}; fetch it again"
      )
    if length > MAX_HEADER:
      raise WeightsError(
        f"{file} is damaged: a header of {length} bytes, at most {MAX_HEADER} are read; fetch it again"
      )
    try:
      header = json.loads(stream.read(length), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
      raise WeightsError(
        f"{file} is damaged: its header is not that of a safetensors file ({error}); fetch it again"
      ) from None
  notes = header.get("__metadata__", {}) if isinstance(header, dict) else None
  if not (isinstance(notes, dict) and all(isinstance(note, str) for note in notes.values())):
    raise WeightsError(
      f"{file} is damaged: its header is not that of a safetensors file; fetch it again"
    )
  return length, header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """A JSON object; ValueError for a name that comes twice, of which Python would take the last and others the first."""
  found = dict(pairs)
  if odd := [name for name in found if not name.isprintable()]:
    raise ValueError(f"something is called {odd[0][:80]!r}")
  if len(found) != len(pairs):
    twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
    raise ValueError(f"{twice[:80]!r} comes twice")
  return found


def _torch(file: Path) -> dict[str, Tensor]:
  """`torch.save`d state dictionaries and checkpoints, and TorchScript archives, such as OpenAI's."""
  zipped = zipfile.is_zipfile(file)
  if zipped and _is_script(file):
    return _torchscript(file)
  try:
    import torch  # of all weight files only these need it
  except ImportError:
    raise WeightsError(
      f"{file} is a PyTorch archive; install the torch extra (pip install mrmae_jax[torch]) or convert it to "
      "safetensors first"
    ) from None
  try:
    mapped = (
      zipped and file.suffix != ".safetensors"
    )  # torch would believe the name; it does not see that of a stream
    with (
      open(file, "rb") as stream,
      torch.serialization.safe_globals([argparse.Namespace]),
    ):  # of DINO's options
      content = _state_dict(
        torch.load(file if mapped else stream, map_location="cpu", weights_only=True, mmap=mapped),
        file,
      )
  except WeightsError:
    raise
  except pickle.UnpicklingError as error:
    found = re.search(r"GLOBAL ([\w.]+)|[Cc]lass ([\w.]+)", str(error))
    name = next(filter(None, found.groups())) if found else "of an unknown name"
    raise WeightsError(
      f"{file} needs pickled class {name}; refusing, as it could run any code; save its state_dict() "
      "alone"
    ) from None
  except Exception as error:  # out of damaged bytes torch raises nearly everything
    raise WeightsError(f"{file} is damaged or no PyTorch archive: {_first_line(error)}") from None
  tensors = {name: x for name, x in content.items() if isinstance(x, torch.Tensor)}
  if not tensors:
    raise WeightsError(f"{file} holds no tensors by name; expected a state_dict()")
  for name, x in tensors.items():  # strides of 0 make terabytes out of one number
    if (
      x.layout != torch.strided
      or x.device.type != "cpu"
      or x.numel() * x.element_size() > x.untyped_storage().nbytes()
    ):
      raise WeightsError(
        f"{file} is damaged: {name} {tuple(x.shape)} is not stored value by value; save its state_dict() again"
      )
  # Not all of torch's types exist in numpy; float32 holds the values of all that are used.
  return {
    name: Tensor(
      tuple(x.shape), str(x.dtype).removeprefix("torch."), lambda x=x: x.detach().float().numpy()
    )
    for name, x in tensors.items()
  }


def _first_line(error: Exception) -> str:
  return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _is_script(file: Path) -> bool:
  """Whether a zip archive is TorchScript.

  Raises:
    WeightsError: it is damaged, or packs much into few bytes: neither torch nor this project compresses values.
  """
  try:
    with zipfile.ZipFile(file) as archive:
      parts = archive.infolist()
  except Exception as error:  # zipfile raises struct.error, NotImplementedError, ... too
    raise WeightsError(f"{file} is damaged or no PyTorch archive: {_first_line(error)}") from None
  unpacked, size = sum(part.file_size for part in parts), file.stat().st_size
  if unpacked > 2 * size + 2**24:
    raise WeightsError(
      f"{file} ({size} bytes) is no PyTorch archive: its parts would take {unpacked} bytes unpacked"
    )
  return any(part.filename.endswith("constants.pkl") for part in parts)


def _torchscript(file: Path) -> dict[str, Tensor]:
  """The parameters and buffers of a TorchScript archive, without torch.

  `torch.jit.load` runs the code of the archive's __setstate__ methods, which can write files. Here modules become plain
  objects, whatever class they name, and tensors are read where the archive says that they lie.
  """

  class Module:
    """Any class of the archive, without its code."""

  class Plain(pickle._Unpickler):  # that in C sets aside memory for any number it is told
    """Knows classes and functions of its own alone."""

    def find_class(self, module, name):
      if module.startswith("__torch__"):
        return type("Module", (Module,), {})
      known = {
        "collections.OrderedDict": dict,
        "torch._utils._rebuild_tensor_v2": lambda *args: args[:4],
        "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
      }
      if module == "torch" and name.endswith("Storage"):
        return type("Storage", (), {"kind": name})
      if f"{module}.{name}" not in known:
        raise WeightsError(
          f"{file} needs pickled class {module}.{name}; refusing, as it could run any code; save its "
          "state_dict() alone"
        )
      return known[f"{module}.{name}"]

    def persistent_load(self, pid):
      _, storage, key, _, count = pid
      if not isinstance(key, str):
        raise ValueError("its storages have no names")
      return storage.kind, key, count

  def tensor(name, storage, offset, shape, strides):
    kind, key, count = storage
    dtype, place = _STORAGES.get(kind, kind), f"{root}/data/{key}"
    numbers = (offset, count, *shape, *strides)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if not (
      all(type(n) is int and n >= 0 for n in numbers)
      and math.prod(shape) <= count
      and last < max(count, 1)
    ):
      raise ValueError(f"{name} reaches beyond what is stored")
    if kind in _STORAGES and archive.getinfo(place).file_size != count * np.dtype(dtype).itemsize:
      raise ValueError(f"{name} is stored in {archive.getinfo(place).file_size} bytes")

    def read():
      try:
        with zipfile.ZipFile(file) as archive:
          values = np.frombuffer(archive.read(place), dtype)
      except Exception as error:  # see `_is_script`
        raise WeightsError(f"{file} is damaged: {name}: {_first_line(error)}") from None
      return np.lib.stride_tricks.as_strided(
        values[offset:], shape, [stride * values.itemsize for stride in strides]
      )

    return Tensor(tuple(shape), dtype, read)

  seen = set()

  def walk(module, path):
    for name, value in vars(module).items():
      if isinstance(value, Module) and value not in seen:  # once: they may refer to each other
        seen.add(value)
        yield from walk(value, f"{path}{name}.")
      elif isinstance(name, str) and isinstance(value, tuple) and len(value) == 4:
        yield f"{path}{name}", tensor(f"{path}{name}", *value)

  try:
    with zipfile.ZipFile(file) as archive:
      names = archive.namelist()
      root = next(name for name in names if name.endswith("/data.pkl")).removesuffix("/data.pkl")
      if f"{root}/byteorder" in names and archive.read(f"{root}/byteorder") != b"little":
        raise ValueError("its numbers begin with the highest byte")
      return dict(walk(Plain(io.BytesIO(archive.read(f"{root}/data.pkl"))).load(), ""))
  except WeightsError:
    raise
  except Exception as error:  # a pickle out of damaged bytes raises nearly everything
    raise WeightsError(f"{file} is damaged or no PyTorch archive: {_first_line(error)}") from None


def _state_dict(content, file: Path) -> dict:
  """Out of its wrappers: {"model": ...}, {"state_dict": ...}, and the teacher of a DINO checkpoint (main_dino.py)."""
  if not isinstance(content, dict):
    raise WeightsError(f"{file} holds a {type(content).__name__}; expected a state_dict()")
  content = {name: value for name, value in content.items() if isinstance(name, str)}
  if isinstance(content.get("teacher"), dict):
    names = {
      re.sub(r"^(module\.)?(backbone\.)?", "", name): name
      for name in content["teacher"]
      if isinstance(name, str)
    }
    return {
      ours: content["teacher"][name] for ours, name in names.items() if not ours.startswith("head.")
    }
  if isinstance(content.get("student"), dict):
    raise WeightsError(
      f"{file} holds only the student of a checkpoint (keys: {', '.join(content)}); the teacher is "
      "wanted: give the full checkpoint"
    )
  for key in ("state_dict", "model"):
    if isinstance(content.get(key), dict):
      return _state_dict(content[key], file)
  return content


def _msgpack(file: Path) -> dict[str, Tensor]:
  """Hugging Face's old Flax weights, under the names and in the layouts of the same model's torch weights."""
  from flax import serialization  # rarely needed

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
    raise WeightsError(f"{file} is damaged or no weight file: {_first_line(error)}") from None
  return tensors
