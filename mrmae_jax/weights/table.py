"""Name tables: foreign weights to parameter trees and back, checked in both directions.

A name table is a list of `Entry`: a parameter, the tensors that it is made of, and how. One module
per family (convmae, mae, families) writes such a table for a given network; nothing else knows
foreign names. `convert` reads a table forwards, `export` backwards, and the second undoes the first
bit for bit.
"""

import dataclasses
import re
import typing
from typing import Any, Callable, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mrmae_jax.errors import WeightsError
from mrmae_jax.models.attention import DISTANCES
from mrmae_jax.models.block import REMAT_POLICIES
from mrmae_jax.models.layers import ACTIVATIONS
from mrmae_jax.models.vit import POSITIONS

# The largest size and depth of a network that a file may describe: several times the largest ever
# published.
MAX_SIZE = 2**17
MAX_DEPTH = 200
_MAY_BE_ZERO = ("num_registers", "proj_dim", "fuse_layers", "drop_path", "window", "global_blocks")
_CHOICES = {
  "activation": tuple(ACTIVATIONS),
  "distances": DISTANCES,
  "positions": POSITIONS,
  "remat": ("none", *REMAT_POLICIES),
}


class Layout(NamedTuple):
  """A conversion between tensors and a parameter.

  Attributes:
    read: (*tensors) -> array in our layout.
    write: (array, number of tensors) -> the tensors.
  """

  read: Callable[..., np.ndarray]
  write: Callable[[np.ndarray, int], list[np.ndarray]]


class Entry(NamedTuple):
  """A row of a name table: one parameter.

  Attributes:
    ours: its path in the parameter tree, joined by "/".
    theirs: names of the tensors that it is made of.
    layout: the conversion between them.
  """

  ours: str
  theirs: tuple[str, ...]
  layout: Layout


same = Layout(lambda x: x, lambda x, parts: [x])
# (out, in) -> (in, out); several (query, key, value) are packed side by side in the order given.
linear = Layout(
  lambda *weights: np.concatenate([w.T for w in weights], axis=1),
  lambda x, parts: [w.T for w in np.split(x, parts, axis=1)],
)
pack = Layout(lambda *biases: np.concatenate(biases), np.split)
# Depthwise kernels: (C, 1, k, k) -> (k, k, C).
depthwise = Layout(
  lambda w: w[:, 0].transpose(1, 2, 0), lambda x, parts: [x.transpose(2, 0, 1)[:, None]]
)
# Kernels with stride 1: (O, I, k, k) -> (k, k, I, O).
conv2d = Layout(lambda w: w.transpose(2, 3, 1, 0), lambda x, parts: [x.transpose(3, 2, 0, 1)])
# Transposed convolutions with stride = kernel = 2: (I, O, 2, 2) -> (I, 2 * 2 * O).
upsample = Layout(
  lambda w: w.transpose(0, 2, 3, 1).reshape(len(w), -1),
  lambda x, parts: [x.reshape(len(x), 2, 2, -1).transpose(0, 3, 1, 2)],
)
# Learned tokens or positions: (D,), (T, D) or (1, T, D) -> (1, T, D); written in the last form.
tokens = Layout(lambda x: x.reshape(1, -1, x.shape[-1]), lambda x, parts: [x])


def conv(p: int) -> Layout:
  """Returns the layout of a convolution with stride = kernel = p.

  Kernels (O, I, p, p) become (p*p*I, O), with rows in (row, column, channel) order.
  """
  return Layout(
    lambda w: w.transpose(2, 3, 1, 0).reshape(-1, w.shape[0]),
    lambda x, parts: [x.reshape(p, p, -1, x.shape[1]).transpose(3, 2, 0, 1)],
  )


def dense(ours: str, theirs: str, kernel: Layout = linear) -> list[Entry]:
  """Returns the entries of a linear layer or convolution: weight and bias."""
  return [
    Entry(f"{ours}/kernel", (f"{theirs}.weight",), kernel),
    Entry(f"{ours}/bias", (f"{theirs}.bias",), same),
  ]


def norm(ours: str, theirs: str) -> list[Entry]:
  """Returns the entries of a LayerNorm: gain and bias."""
  return [
    Entry(f"{ours}/scale", (f"{theirs}.weight",), same),
    Entry(f"{ours}/bias", (f"{theirs}.bias",), same),
  ]


def running_norm(part: str, ours: str, theirs: str) -> list[Entry]:
  """Returns the entries of a BatchNorm: gain and bias in `part`, statistics in "batch_stats"."""
  running = [(x, f"{theirs}.running_{x}") for x in ("mean", "var")]
  return [
    *norm(f"{part}/{ours}", theirs),
    *(Entry(f"batch_stats/{ours}/{x}", (name,), same) for x, name in running),
  ]


def qkv(ours: str, theirs: tuple[str, str, str]) -> list[Entry]:
  """Returns the entries of separate query, key and value layers, packed into one."""
  return [
    Entry(f"{ours}/kernel", tuple(f"{t}.weight" for t in theirs), linear),
    Entry(f"{ours}/bias", tuple(f"{t}.bias" for t in theirs), pack),
  ]


def timm_block(ours: str, theirs: str) -> list[Entry]:
  """Returns the entries of a transformer block in timm's names: ConvMAE's, MAE's and DINO's."""
  return [
    *norm(f"{ours}/norm1", f"{theirs}.norm1"),
    *dense(f"{ours}/attn/qkv", f"{theirs}.attn.qkv"),
    *dense(f"{ours}/attn/proj", f"{theirs}.attn.proj"),
    *norm(f"{ours}/norm2", f"{theirs}.norm2"),
    *dense(f"{ours}/fc1", f"{theirs}.mlp.fc1"),
    *dense(f"{ours}/fc2", f"{theirs}.mlp.fc2"),
  ]


def decomposed(module, ours: str, theirs: str) -> list[Entry]:
  """Returns the entries of the tables of distances of a block, if it has any."""
  names = ("rel_pos_h", "rel_pos_w") if module.distances == "decomposed" else ()
  return [Entry(f"{ours}/attn/{name}", (f"{theirs}.attn.{name}",), same) for name in names]


def fusion(module) -> list[Entry]:
  """Returns the entries of layer fusion in either encoder.

  Its prefix "fusion." is this project's: no published model has such layers.
  """
  depths = [f"fusion/depth_{i}" for i in range(len(module.fuse_layers))]
  table = [entry for name in depths for entry in dense(name, name.replace("/", "."))]
  return table + [Entry("fusion/weights", ("fusion.weights",), same)] if depths else []


def decoder_table(module) -> list[Entry]:
  """Returns the entries of a Decoder in the names of MAE's decoder, which ConvMAE uses too."""
  table = [Entry("mask_token", ("mask_token",), same)]
  table += dense("embed", "decoder_embed")
  table += norm("norm", "decoder_norm")
  table += dense("pred", "decoder_pred")
  table += [Entry("pos_embed", ("decoder_pos_embed",), same)] if module.learned_positions else []
  for i in range(module.depth):
    table += timm_block(f"blocks_{i}", f"decoder_blocks.{i}")
  return table


def decoder_fields(shapes: dict[str, tuple[int, ...]], source: str) -> dict[str, Any]:
  """Derives fields of Decoder from the shapes of MAE's decoder; {} without a decoder.

  Heads and the kind of positions do not show in shapes.

  Raises:
    WeightsError: a tensor that the sizes depend on is missing or has another rank.
  """
  if "decoder_embed.weight" not in shapes:
    return {}
  dim = shape_of(shapes, "decoder_embed.weight", 2, source)[0]
  hidden = shape_of(shapes, "decoder_blocks.0.mlp.fc1.weight", 2, source)[0]
  return dict(
    out_dim=shape_of(shapes, "decoder_pred.weight", 2, source)[0],
    dim=dim,
    depth=depth(shapes, "decoder_blocks", source),
    mlp_ratio=mlp_ratio(hidden, dim),
  )


def shape_of(shapes, name: str, rank: int, source: str) -> tuple[int, ...]:
  """Returns the shape of the tensor `name`; WeightsError if it is missing or has another rank."""
  if len(shapes.get(name, ())) != rank:
    problem = f"has shape {tuple(shapes[name])}" if name in shapes else "is missing"
    raise WeightsError(
      f"{source} does not fit the model: {name} {problem}, expected {rank} axes (a part of a file, "
      "or another model?)"
    )
  return shapes[name]


def depth(shapes, blocks: str, source: str) -> int:
  """Counts the blocks whose tensors are called `blocks`.N.*; gaps show later as missing tensors."""
  matches = (re.match(rf"{blocks}\.([0-9]+)\.", name) for name in shapes)
  return count_blocks((match[1] for match in matches if match), blocks, source)


def mlp_ratio(hidden: int, width: int) -> float:
  """Returns the ratio for which int(width * ratio) is `hidden`, whatever the division rounds."""
  ratio = hidden / width
  return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def check_fields(module, fields: dict[str, Any], source: str) -> None:
  """Checks that a network can have the fields that a file states.

  Even the shapes of 10^9 blocks would take for ever.

  Args:
    module: the class of the network.
    fields: its fields as they were read.
    source: file or folder, for the message.

  Raises:
    WeightsError: a field is missing or unknown, has another type, or is not a possible size.
  """
  known = dataclasses.fields(module)
  types = {field.name: field.type for field in known}
  required = [field.name for field in known if field.default is dataclasses.MISSING]
  if missing := [name for name in required if name not in fields]:
    raise WeightsError(f"{source} holds no {', '.join(missing)}")
  for name, value in fields.items():
    default = getattr(module, name, None)
    element_types = typing.get_args(types.get(name))
    if element_types:
      is_valid = (
        isinstance(value, (tuple, list))
        and (len(value) == len(default) or not default)
        and all(_is_possible(name, x, element_types[0]) for x in value)
      )
    else:
      is_valid = _is_possible(name, value, types.get(name))
    if not is_valid:
      raise WeightsError(f"{source} holds a size that is none: {name}={str(value)[:60]}")


def _is_possible(name: str, value, kind) -> bool:
  if kind is int:
    largest = MAX_DEPTH if name.startswith("depth") else MAX_SIZE
    return type(value) is int and (name not in _MAY_BE_ZERO) <= value <= largest
  if kind is float:
    return type(value) in (int, float) and 0 <= value < 1e6 and (value > 0 or name in _MAY_BE_ZERO)
  return kind in (bool, str) and isinstance(value, kind) and value in _CHOICES.get(name, (value,))


def count_blocks(numbers: typing.Iterable[str], blocks: str, source: str) -> int:
  """Returns the number of blocks, given the numbers in the names of their tensors.

  Raises:
    WeightsError: most numbers are left out, or there are too many blocks.
  """
  unique = set(numbers)
  last = max(unique, key=lambda number: (len(number), number), default="0")
  # A few numbers that are left out show as missing tensors.
  if len(last) > 4 or int(last) >= min(MAX_DEPTH, 4 * len(unique) + 1):
    raise WeightsError(
      f"{source} does not fit the model: {blocks} are numbered up to {last[:20]}, but "
      f"{len(unique)} are there (of at most {MAX_DEPTH})"
    )
  return int(last) + 1 if unique else 0


def _list(names, limit=5):
  names = sorted(names)
  return ", ".join(names[:limit]) + (f", ... ({len(names)} in all)" if len(names) > limit else "")


def _check_table(table: list[Entry], names, source: str) -> None:
  """WeightsError if a table does not name every parameter exactly once."""
  ours = {entry.ours for entry in table}
  if ours != names or len(table) != len(names):
    raise WeightsError(f"{source}: name table and model disagree on {_list(ours ^ names)}")


def convert(
  tensors: dict[str, np.ndarray],
  table: list[Entry],
  expected,
  *,
  ignore: tuple[str, ...] = (),
  source: str,
):
  """Builds a parameter tree out of foreign tensors.

  Args:
    tensors: name -> array in the foreign layout, any float type; values become float32.
    table: the name table.
    expected: the tree with shapes at its leaves, e.g. from `jax.eval_shape(model.init, ...)`.
    ignore: regular expressions (full match) of tensors that may be left over.
    source: file or folder, for the message.

  Returns:
    A nested dict of float32 arrays shaped as `expected`.

  Raises:
    WeightsError: tensors are missing, left over, misshapen or not finite, or the table does not fit
      `expected`. The message names all problems.
  """
  shapes = {name: leaf.shape for name, leaf in flatten_dict(expected, sep="/").items()}
  _check_table(table, shapes.keys(), source)
  problems, params = [], {}
  names = [name for entry in table for name in entry.theirs]
  missing = set(names) - tensors.keys()
  extra = {
    name for name in tensors.keys() - set(names) if not any(re.fullmatch(p, name) for p in ignore)
  }
  if missing:
    problems.append(
      f"missing: {_list(missing)} (another depth, a part of a sharded file, or another model?)"
    )
  if extra:
    problems.append(f"unknown: {_list(extra)}")
  for entry in table:
    if missing.intersection(entry.theirs):
      continue
    parts = [np.asarray(tensors[name], np.float32) for name in entry.theirs]
    try:
      value = entry.layout.read(*parts)
    except (ValueError, IndexError):  # transposing or packing tensors of another rank
      value = None
    if value is None or value.shape != shapes[entry.ours]:
      given = " + ".join(f"{name} {part.shape}" for name, part in zip(entry.theirs, parts))
      problems.append(f"misshapen: {given} does not give {entry.ours} {shapes[entry.ours]}")
    elif not np.isfinite(value).all():
      problems.append(f"non-finite values in {_list(entry.theirs)}")
    else:
      params[entry.ours] = value
  if problems:
    more = [f"and {len(problems) - 8} more"] if len(problems) > 8 else []
    raise WeightsError(f"{source} does not fit the model: " + "; ".join(problems[:8] + more))
  return unflatten_dict(params, sep="/")


def export(params, table: list[Entry]) -> dict[str, np.ndarray]:
  """Returns the foreign tensors of a parameter tree by name: `convert` backwards.

  Raises:
    WeightsError: the table does not name every parameter once.
  """
  ours = flatten_dict(params, sep="/")
  _check_table(table, ours.keys(), "these parameters")
  return {
    name: np.ascontiguousarray(part)
    for entry in table
    for name, part in zip(
      entry.theirs, entry.layout.write(np.asarray(ours[entry.ours]), len(entry.theirs)), strict=True
    )
  }
