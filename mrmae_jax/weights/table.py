"""Foreign weights -> our parameter trees and back, checked both ways: every parameter and every tensor is used once.

A name table is a list of `Entry`: one of our parameters, the tensors it is made of, and how. One module per family
(convmae, mae, towers) writes such a table for a given network; nothing else knows foreign names. `convert` reads a table
forwards, `export` backwards, and the second undoes the first bit for bit.
"""

import dataclasses
import re
import typing
from typing import Any, Callable, NamedTuple

import jax
import numpy as np

from mrmae_jax.errors import WeightsError
from mrmae_jax.models.layers import ACTIVATIONS, REMAT_POLICIES
from mrmae_jax.models.vit import POSITIONS

MAX_SIZE, MAX_DEPTH = (
  2**17,
  200,
)  # of a network that a file describes: several times the largest ever published
_CHOICES = {
  "activation": tuple(ACTIVATIONS),
  "positions": POSITIONS,
  "remat": ("none", *REMAT_POLICIES),
}
_MAY_BE_ZERO = ("num_registers", "proj_dim", "fuse_layers", "drop_path")


class Layout(NamedTuple):
  """How tensors become a parameter, and how they come out of it again.

  Attributes:
    read: (*tensors) -> array in our layout.
    write: (array, number of tensors) -> the tensors.
  """

  read: Callable[..., np.ndarray]
  write: Callable[[np.ndarray, int], list[np.ndarray]]


class Entry(NamedTuple):
  """One parameter of ours.

  Attributes:
    ours: path in our tree, joined by "/".
    theirs: names of the tensors it is made of.
    layout: how.
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
# Learned tokens or positions: (D,), (T, D) or (1, T, D) -> (1, T, D); written in the last form.
tokens = Layout(lambda x: x.reshape(1, -1, x.shape[-1]), lambda x, parts: [x])


def conv(p: int) -> Layout:
  """Kernel of a convolution with stride = kernel = p: (O, I, p, p) -> (p*p*I, O), rows in (row, column, channel) order."""
  return Layout(
    lambda w: w.transpose(2, 3, 1, 0).reshape(-1, w.shape[0]),
    lambda x, parts: [x.reshape(p, p, -1, x.shape[1]).transpose(3, 2, 0, 1)],
  )


def dense(ours: str, theirs: str, kernel: Layout = linear) -> list[Entry]:
  """Weight and bias of a linear layer or convolution."""
  return [
    Entry(f"{ours}/kernel", (f"{theirs}.weight",), kernel),
    Entry(f"{ours}/bias", (f"{theirs}.bias",), same),
  ]


def norm(ours: str, theirs: str) -> list[Entry]:
  """Gain and bias of a LayerNorm."""
  return [
    Entry(f"{ours}/scale", (f"{theirs}.weight",), same),
    Entry(f"{ours}/bias", (f"{theirs}.bias",), same),
  ]


def qkv(ours: str, theirs: tuple[str, str, str]) -> list[Entry]:
  """Separate query, key, value layers packed into one."""
  return [
    Entry(f"{ours}/kernel", tuple(f"{t}.weight" for t in theirs), linear),
    Entry(f"{ours}/bias", tuple(f"{t}.bias" for t in theirs), pack),
  ]


def timm_block(ours: str, theirs: str) -> list[Entry]:
  """A transformer block in the names of timm, which ConvMAE, MAE and DINO share."""
  return [
    *norm(f"{ours}/norm1", f"{theirs}.norm1"),
    *dense(f"{ours}/attn/qkv", f"{theirs}.attn.qkv"),
    *dense(f"{ours}/attn/proj", f"{theirs}.attn.proj"),
    *norm(f"{ours}/norm2", f"{theirs}.norm2"),
    *dense(f"{ours}/fc1", f"{theirs}.mlp.fc1"),
    *dense(f"{ours}/fc2", f"{theirs}.mlp.fc2"),
  ]


def check_fields(module, fields: dict[str, Any], source: str) -> None:
  """Makes sure that a network can be what a file says of it: the shapes of 10^9 blocks alone would take for ever.

  Args:
    module: the class of the network.
    fields: of it, as they were read.
    source: for the message.

  Raises:
    WeightsError: a field of another type, or a size that no network has.
  """
  known = dataclasses.fields(module)
  types = {field.name: field.type for field in known}
  if lost := [
    field.name
    for field in known
    if field.default is dataclasses.MISSING and field.name not in fields
  ]:
    raise WeightsError(f"{source} holds no {', '.join(lost)}")
  for name, value in fields.items():
    usual = getattr(module, name, None)
    several = typing.get_args(types.get(name))
    if several:
      ok = (
        isinstance(value, (tuple, list))
        and (len(value) == len(usual) or not usual)
        and all(_possible(name, x, several[0]) for x in value)
      )
    else:
      ok = _possible(name, value, types.get(name))
    if not ok:
      raise WeightsError(f"{source} holds a size that is none: {name}={str(value)[:60]}")


def _possible(name: str, value, kind) -> bool:
  if kind is int:
    return type(value) is int and (name not in _MAY_BE_ZERO) <= value <= (
      MAX_DEPTH if name.startswith("depth") else MAX_SIZE
    )
  if kind is float:
    return type(value) in (int, float) and 0 <= value < 1e6 and (value > 0 or name in _MAY_BE_ZERO)
  return kind in (bool, str) and isinstance(value, kind) and value in _CHOICES.get(name, (value,))


def count_blocks(numbers: typing.Iterable[str], what: str, source: str) -> int:
  """How many blocks there are, by the numbers in the names of their tensors.

  Raises:
    WeightsError: most numbers are left out, or too many blocks.
  """
  found = set(numbers)
  last = max(found, key=lambda number: (len(number), number), default="0")
  if len(last) > 4 or int(last) >= min(
    MAX_DEPTH, 4 * len(found) + 1
  ):  # a few that are left out show as missing tensors
    raise WeightsError(
      f"{source} does not fit the model: {what} are numbered up to {last[:20]}, but {len(found)} are there (of at "
      f"most {MAX_DEPTH})"
    )
  return int(last) + 1 if found else 0


def leaves(params) -> dict[str, Any]:
  """The leaves of a parameter tree by their paths, joined by "/"."""
  return {
    "/".join(k.key for k in path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }


def _list(names, limit=5):
  names = sorted(names)
  return ", ".join(names[:limit]) + (f", ... ({len(names)} in all)" if len(names) > limit else "")


def convert(
  tensors: dict[str, np.ndarray],
  table: list[Entry],
  expected,
  *,
  ignore: tuple[str, ...] = (),
  source: str,
):
  """Builds the parameter tree `expected` out of foreign tensors.

  Args:
    tensors: name -> array in the foreign layout, any float type; values become float32.
    table: how.
    expected: our tree with shapes at its leaves, e.g. from `jax.eval_shape(model.init, ...)`.
    ignore: regular expressions (full match) of tensors that may be left over.
    source: file or folder, for the message.

  Returns:
    A nested dict of float32 arrays shaped as `expected`.

  Raises:
    WeightsError: tensors missing, left over, misshapen or not finite, or a table that does not fit `expected`.
  """
  shapes = {name: leaf.shape for name, leaf in leaves(expected).items()}
  if {e.ours for e in table} != shapes.keys() or len(table) != len(shapes):
    raise WeightsError(
      f"{source}: name table and model disagree on {_list({e.ours for e in table} ^ shapes.keys())}"
    )

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
      got = " + ".join(f"{name} {p.shape}" for name, p in zip(entry.theirs, parts))
      problems.append(f"misshapen: {got} does not give {entry.ours} {shapes[entry.ours]}")
    elif not np.isfinite(value).all():
      problems.append(f"non-finite values in {_list(entry.theirs)}")
    else:
      *parents, leaf = entry.ours.split("/")
      node = params
      for parent in parents:
        node = node.setdefault(parent, {})
      node[leaf] = value
  if problems:
    shown = problems[:8] + ([f"and {len(problems) - 8} more"] if len(problems) > 8 else [])
    raise WeightsError(f"{source} does not fit the model: " + "; ".join(shown))
  return params


def export(params, table: list[Entry]) -> dict[str, np.ndarray]:
  """`convert` backwards: foreign tensors, by name, out of a parameter tree.

  Raises:
    WeightsError: the table does not name every parameter once.
  """
  ours = leaves(params)
  if {e.ours for e in table} != ours.keys() or len(table) != len(ours):
    raise WeightsError(
      f"name table and parameters disagree on {_list({e.ours for e in table} ^ ours.keys())}"
    )
  return {
    name: np.ascontiguousarray(part)
    for entry in table
    for name, part in zip(
      entry.theirs, entry.layout.write(np.asarray(ours[entry.ours]), len(entry.theirs)), strict=True
    )
  }
