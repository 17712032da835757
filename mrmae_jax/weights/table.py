"""Foreign weights -> our parameter trees, checked both ways: every parameter is filled once, every tensor is used once.

A name table is a list of `Entry`: one of our parameters, the tensors it is made of, and how. One module per family
(convmae, mae, towers) writes such a table for given depths; nothing else knows foreign names.
"""

import re
from typing import Callable, NamedTuple

import jax
import numpy as np


class WeightsError(ValueError):
  """Weights that do not fit the model; the message lists every problem."""


class Entry(NamedTuple):
  """One parameter of ours.

  Attributes:
    ours: path in our tree, joined by "/".
    theirs: names of the tensors it is made of.
    convert: (*tensors) -> array in our layout.
  """

  ours: str
  theirs: tuple[str, ...]
  convert: Callable[..., np.ndarray]


def same(x):
  return x


def linear(*weights):
  """(out, in) -> (in, out); several (query, key, value) are packed side by side in the order given."""
  return np.concatenate([w.T for w in weights], axis=1)


def pack(*biases):
  return np.concatenate(biases)


def conv(w):
  """Kernel of a convolution with stride = kernel: (O, I, H, W) -> (H*W*I, O), rows in (row, column, channel) order."""
  return w.transpose(2, 3, 1, 0).reshape(-1, w.shape[0])


def depthwise(w):
  """(C, 1, k, k) -> (k, k, C)."""
  return w[:, 0].transpose(1, 2, 0)


def dense(ours: str, theirs: str, kernel=linear) -> list[Entry]:
  """Weight and bias of a linear layer or convolution."""
  return [Entry(f"{ours}/kernel", (f"{theirs}.weight",), kernel), Entry(f"{ours}/bias", (f"{theirs}.bias",), same)]


def norm(ours: str, theirs: str) -> list[Entry]:
  """Gain and bias of a LayerNorm."""
  return [Entry(f"{ours}/scale", (f"{theirs}.weight",), same), Entry(f"{ours}/bias", (f"{theirs}.bias",), same)]


def qkv(ours: str, theirs: tuple[str, str, str]) -> list[Entry]:
  """Separate query, key, value layers packed into one."""
  return [Entry(f"{ours}/kernel", tuple(f"{t}.weight" for t in theirs), linear),
          Entry(f"{ours}/bias", tuple(f"{t}.bias" for t in theirs), pack)]


def timm_block(ours: str, theirs: str) -> list[Entry]:
  """A transformer block in the names of timm, which ConvMAE, MAE and DINO share."""
  return [*norm(f"{ours}/norm1", f"{theirs}.norm1"), *dense(f"{ours}/attn/qkv", f"{theirs}.attn.qkv"),
          *dense(f"{ours}/attn/proj", f"{theirs}.attn.proj"), *norm(f"{ours}/norm2", f"{theirs}.norm2"),
          *dense(f"{ours}/fc1", f"{theirs}.mlp.fc1"), *dense(f"{ours}/fc2", f"{theirs}.mlp.fc2")]


def _list(names, limit=5):
  names = sorted(names)
  return ", ".join(names[:limit]) + (f", ... ({len(names)} in all)" if len(names) > limit else "")


def convert(tensors: dict[str, np.ndarray], table: list[Entry], expected, *, ignore: tuple[str, ...] = (), source: str):
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
  shapes = {"/".join(k.key for k in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(expected)}
  if {e.ours for e in table} != shapes.keys() or len(table) != len(shapes):
    raise WeightsError(f"{source}: name table and model disagree on {_list({e.ours for e in table} ^ shapes.keys())}")

  problems, params = [], {}
  names = [name for entry in table for name in entry.theirs]
  missing = set(names) - tensors.keys()
  extra = {name for name in tensors.keys() - set(names) if not any(re.fullmatch(p, name) for p in ignore)}
  if missing:
    problems.append(f"missing: {_list(missing)} (another depth, a part of a sharded file, or another model?)")
  if extra:
    problems.append(f"unknown: {_list(extra)}")
  for entry in table:
    if missing.intersection(entry.theirs):
      continue
    parts = [np.asarray(tensors[name], np.float32) for name in entry.theirs]
    try:
      value = entry.convert(*parts)
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
