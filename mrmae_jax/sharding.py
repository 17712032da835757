"""Devices: the mesh, which array lies where, and host batches as global arrays."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp")


def make_mesh(data: int = -1, fsdp: int = 1, devices=None) -> Mesh:
  """Returns a (data, fsdp) mesh over all devices; -1 takes what the other axis leaves.

  Devices are ordered by slice, host and number. The rows of a batch are then those of host 0, host
  1, ..., as the loader cuts it. The devices of an fsdp group, which exchange parameters in every
  step, are neighbors and never in two slices. The rest of the traffic, sums over all devices, does
  not depend on the order.

  Axis types are Auto: under the Explicit default every gather of tokens would need an output
  sharding by hand.

  Raises:
    ValueError: the product is not the number of devices, or an fsdp group does not fit into a
      slice.
  """
  slice_of = lambda device: getattr(device, "slice_index", 0) or 0
  devices = sorted(
    jax.devices() if devices is None else devices,
    key=lambda d: (slice_of(d), d.process_index, d.id),
  )
  shape = [data, fsdp]
  if -1 in shape:
    shape[shape.index(-1)] = len(devices) // -math.prod(shape)
  if math.prod(shape) != len(devices):
    raise ValueError(f"mesh data={data} x fsdp={fsdp} does not fit {len(devices)} devices")
  slices = len({slice_of(device) for device in devices})
  if len(devices) // slices % shape[1]:
    raise ValueError(
      f"mesh fsdp={shape[1]} does not divide the {len(devices) // slices} devices of each of "
      f"{slices} slices; parameters would be exchanged over the slow network between them"
    )
  return Mesh(np.array(devices, dtype=object).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 2)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of the leading axis over all devices."""
  return NamedSharding(mesh, P(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array that every device holds whole."""
  return NamedSharding(mesh, P())


def fsdp_shardings(tree, mesh: Mesh, min_size: int = 2**14):
  """Returns a sharding for each leaf of a tree of arrays or shapes.

  Its largest axis that the fsdp axis divides is sharded; small arrays are replicated.

  Args:
    tree: leaves with a `shape`.
    mesh: of `make_mesh`.
    min_size: arrays with fewer elements are replicated, the collectives would cost more than the
      memory saved.
  """

  def rule(leaf):
    axes = sorted(range(len(leaf.shape)), key=lambda axis: -leaf.shape[axis])
    axis = next((axis for axis in axes if leaf.shape[axis] % mesh.shape["fsdp"] == 0), None)
    if mesh.shape["fsdp"] == 1 or axis is None or math.prod(leaf.shape) < min_size:
      return replicated(mesh)
    return NamedSharding(mesh, P(*(None,) * axis, "fsdp"))

  return jax.tree.map(rule, tree)


def local_mesh(mesh: Mesh) -> Mesh:
  """Returns a mesh ("images",) over this host's devices in `mesh`, for work of each host alone."""
  devices = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
  return Mesh(np.array(devices, dtype=object), ("images",))


def to_local(tree, mesh: Mesh, local: Mesh):
  """Returns the arrays of a tree on `mesh` as whole arrays on each device of `local_mesh`.

  All hosts must call it.
  """
  whole = jax.jit(lambda tree: tree, out_shardings=replicated(mesh))(tree)
  assemble = lambda x: jax.make_array_from_single_device_arrays(
    x.shape, replicated(local), [shard.data for shard in x.addressable_shards]
  )
  return jax.tree.map(assemble, whole)


def table(trees: dict[str, Any], depth: int = 2) -> list[dict[str, Any]]:
  """Lists how arrays are sharded: one row per part of the trees and kind of sharding.

  Args:
    trees: {name: tree of arrays or ShapeDtypeStructs with shardings}.
    depth: names of a path that make a part, e.g. 2: "state/params".

  Returns:
    Rows {"part", "sharding": "sharded" or "replicated", "arrays", "bytes", "bytes_per_device"},
    JSON values.
  """
  rows = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(trees):
    part = "/".join(jax.tree_util.keystr((key,), simple=True) for key in path[:depth])
    kind = "replicated" if leaf.sharding.is_fully_replicated else "sharded"
    row = rows.setdefault(
      (part, kind), {"part": part, "sharding": kind, "arrays": 0, "bytes": 0, "bytes_per_device": 0}
    )
    size = leaf.dtype.itemsize
    row["arrays"] += 1
    row["bytes"] += size * math.prod(leaf.shape)
    row["bytes_per_device"] += size * math.prod(leaf.sharding.shard_shape(leaf.shape))
  return list(rows.values())


def global_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """Returns arrays of the global batch from this host's rows, hosts in order of their index."""
  sharding = batch_sharding(mesh)
  return {
    name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()
  }
