"""Devices: the mesh, which array lies where, and host batches as global arrays."""

import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

AXES = ("data", "fsdp")


def make_mesh(data: int = -1, fsdp: int = 1, devices=None) -> Mesh:
  """A (data, fsdp) mesh over all devices; -1 takes what the other axis leaves.

  Axis types are Auto: under the Explicit default every gather of tokens would need an output sharding by hand.

  Raises:
    ValueError: the product is not the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  shape = [data, fsdp]
  if -1 in shape:
    shape[shape.index(-1)] = len(devices) // -math.prod(shape)
  if math.prod(shape) != len(devices):
    raise ValueError(f"mesh data={data} x fsdp={fsdp} does not fit {len(devices)} devices")
  return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The leading axis over all devices."""
  return NamedSharding(mesh, P(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def fsdp_shardings(tree, mesh: Mesh, min_size: int = 2 ** 14):
  """Shardings for a tree of arrays or shapes: the largest axis that the fsdp axis divides; small arrays replicated.

  Args:
    tree: leaves with a `shape`.
    mesh: of `make_mesh`.
    min_size: arrays with fewer elements are replicated, the collectives would cost more than the memory saved.
  """
  def rule(leaf):
    axes = sorted(range(len(leaf.shape)), key=lambda axis: -leaf.shape[axis])
    axis = next((axis for axis in axes if leaf.shape[axis] % mesh.shape["fsdp"] == 0), None)
    if mesh.shape["fsdp"] == 1 or axis is None or math.prod(leaf.shape) < min_size:
      return replicated(mesh)
    return NamedSharding(mesh, P(*(None,) * axis, "fsdp"))
  return jax.tree.map(rule, tree)


def global_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """This host's rows -> arrays of the global batch, hosts in order of their index."""
  sharding = batch_sharding(mesh)
  return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
