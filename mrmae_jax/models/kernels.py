"""Shared by our GPU kernels: which devices run them, GPU instructions, and several devices.

The kernels are in short_attention.py, row_kernels.py and blockwise_kernels.py. They are written in
Pallas and compiled by Triton. JAX 0.11 warns that a later version will drop this backend, hence its
upper bound in setup.cfg; without the kernels there are the forms of other devices. There Pallas
interprets them, slowly, for the tests.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.pallas import triton
from jax.sharding import NamedSharding, PartitionSpec

from mrmae_jax import target


def have_device(dtype) -> bool:
  """Returns whether the device that is traced for runs them on arrays of a dtype.

  They were measured on a Hopper GPU alone, in bfloat16.
  """
  return dtype == jnp.bfloat16 and 9 <= target.compute_capability() < 10


def instructions(code: str, *arrays: jax.Array) -> jax.Array:
  """Computes a float32 array from others of its shape, element by element.

  Args:
    code: PTX; $0 is the result, $1 ... are the elements of the arrays.
    *arrays: float32.
  """
  [y] = triton.elementwise_inline_asm(
    code,
    args=list(arrays),
    constraints=",".join(["=f"] + ["f"] * len(arrays)),
    pack=1,
    result_shape_dtypes=[jax.ShapeDtypeStruct(arrays[0].shape, arrays[0].dtype)],
  )
  return y


def exp2(x: jax.Array) -> jax.Array:
  """Computes 2^x; on GPUs 0 for results below 2^-126."""
  if target.platform() != "gpu":
    return jnp.exp2(x)
  return instructions("ex2.approx.ftz.f32 $0, $1;", x)


def reciprocal(x: jax.Array) -> jax.Array:
  """Computes 1 / x; on GPUs to the last bit or so."""
  if target.platform() != "gpu":
    return 1 / x
  return instructions("rcp.approx.ftz.f32 $0, $1;", x)


def fma(a: jax.Array, b, c) -> jax.Array:
  """Computes a * b + c; on GPUs as one instruction, which Triton would not make of them."""
  if target.platform() != "gpu":
    return a * b + c
  b, c = (jnp.broadcast_to(jnp.asarray(x, a.dtype), a.shape) for x in (b, c))
  return instructions("fma.rn.f32 $0, $1, $2, $3;", a, b, c)


def on_each_device(rule: str):
  """Lets each device compute the images that it has; the devices must divide their number.

  It decorates a function of a hashable argument and arrays, which returns arrays.

  Args:
    rule: the axes of the arrays that it takes and returns, for XLA's partitioner; only "b" may be
      divided.
  """

  takes, gives = (
    tuple(array.split()[0] == "b" for array in x.split(",")) for x in rule.split("->")
  )

  def decorate(function):
    def partition(static, mesh, arguments, results):
      first = arguments[takes.index(True)]  # an array of images
      images = PartitionSpec(*first.sharding.spec[:1])
      place = lambda has_images: NamedSharding(mesh, images if has_images else PartitionSpec())
      given, taken = jax.tree.map(place, (gives, takes))
      given = jax.tree.unflatten(jax.tree.structure(results), given)
      return mesh, functools.partial(function, static), given, taken

    divided = custom_partitioning(function, static_argnums=(0,))
    whole = tuple(axis for axis in dict.fromkeys(rule) if axis not in "b ,->")
    divided.def_partition(partition, sharding_rule=rule, need_replication_factors=whole)
    return divided

  return decorate
