"""Self-attention of few tokens: a GPU kernel forwards and one backwards.

cuDNN's kernels are made for long sequences. Those of this file keep a head of an image on the chip.
They read queries, keys and values where the product of the packed weights has written them, and
write where the next product reads, so that nothing is cut apart, padded or put together.

They are written in Pallas and compiled by Triton. JAX 0.11 warns that a later version will drop
this backend, hence its upper bound in setup.cfg; without these kernels there is cuDNN. On other
devices than GPUs Pallas interprets them, slowly, for the tests.

Biases need no pass of their own. A key's adds the same number to all logits of a query, which the
softmax does not see. A value's is added to the output, as the weights of a query sum to 1.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.pallas import triton
from jax.sharding import NamedSharding, PartitionSpec

from mrmae_jax import target

LOG2_E = math.log2(math.e)  # GPUs have an instruction for 2^x
NEVER = 1e30  # its negative is the logit of a key that does not exist
MAX_TOKENS = 208  # forwards, the logits of 64 queries fit into registers
BLOCK = 64  # the tokens that are processed at once
KEY_BLOCK = 128  # forwards, the keys that are processed at once
WARPS = 4


def has_short_attention(dtype, tokens: int, head_dim: int) -> bool:
  """Returns whether the device that is traced for has these kernels for so many tokens.

  They were measured on a Hopper GPU alone, in bfloat16, with 49 to 197 tokens and heads of 32 and
  64 channels.
  """
  fits = tokens <= MAX_TOKENS and head_dim in (32, 64)
  return dtype == jnp.bfloat16 and fits and 9 <= target.compute_capability() < 10


# A block is (start, size): `size` tokens, a power of 2 and at least 16, of which those at the end
# may not exist.


def _blocks(tokens: int, largest: int) -> list[tuple[int, int]]:
  """Cuts tokens into blocks of at most `largest`; few, but not with much beyond the end."""
  blocks, start = [], 0
  while start < tokens:
    left = tokens - start
    size = min(largest, max(16, pl.next_power_of_2(left)))
    if size > 16 and 4 * left <= 3 * size:
      size //= 2
    blocks.append((start, size))
    start += size
  return blocks


def _exists(start, size, tokens):
  """Returns bool [size], True for tokens that exist; None if all are known to."""
  if isinstance(start, int) and start + size <= tokens:
    return None
  return start + jnp.arange(size) < tokens


def _mask(start, size, tokens, array):
  """Returns `_exists` for an array [size] or [size, C]."""
  exists = _exists(start, size, tokens)
  return exists[:, None] if exists is not None and array.ndim == 2 else exists


def _load(ref, start, size, tokens, missing=0.0):
  """Reads a block: [size] or [size, C], `missing` where there is no token."""
  mask = _mask(start, size, tokens, ref)
  rows = ref.at[pl.ds(start, size)]
  return triton.load(rows, mask=mask, other=None if mask is None else missing)


def _store(ref, x, start, size, tokens, part=()):
  """Writes a block: [size] or [size, C]; to the part number `part` of [P, 3, C]."""
  rows = ref.at[(pl.ds(start, size), *map(np.int32, part))]
  triton.store(rows, x.astype(ref.dtype), mask=_mask(start, size, tokens, x))


def _exp2(x, scale, shift, is_limited=False):
  """Computes 2^(x * scale - shift), or if `is_limited` at most 1.

  On GPUs these are two or three instructions, written by hand: the compiler would not join the
  product and the difference, and its 2^x takes three more, for results below 2^-126.
  """
  shift = jnp.broadcast_to(-shift, x.shape)
  if target.platform() != "gpu":
    exponent = x * scale + shift
    return jnp.exp2(jnp.minimum(exponent, 0.0) if is_limited else exponent)
  limit = "min.ftz.f32 x, x, 0f00000000; " if is_limited else ""
  [y] = triton.elementwise_inline_asm(
    "{ .reg .f32 x; fma.rn.ftz.f32 x, $1, $2, $3; " + limit + "ex2.approx.ftz.f32 $0, x; }",
    args=[x, jnp.full_like(x, scale), shift],
    constraints="=f,f,f,f",
    pack=1,
    result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
  )
  return y


def _load_queries(q, q_bias, start, size, tokens):
  """Reads a block of queries with their bias [C]: [size, C]."""
  return _load(q, start, size, tokens) + q_bias[...].astype(q.dtype)


def _forward_kernel(q, k, v, q_bias, v_bias, y, log_sum, *, tokens):
  """Computes one head of one image, block by block of queries.

  Args:
    q, k, v: [P, C], P >= tokens.
    q_bias, v_bias: [C].
    y: [P, C], the output.
    log_sum: float32 [P], log2 of each query's sum over keys of 2^logit. Logits of this file are
      those of `attention_weights` times log2(e), without the bias of the keys.
    tokens: number of tokens.
  """
  scale = q.shape[-1] ** -0.5 * LOG2_E
  blocks = _blocks(tokens, KEY_BLOCK)
  keys, values = ([_load(x, *block, tokens) for block in blocks] for x in (k, v))

  def attend(i, carry):
    rows = i * BLOCK, BLOCK
    query, products = _load_queries(q, q_bias, *rows, tokens), []
    for block, key in zip(blocks, keys):
      exists, product = _exists(*block, tokens), triton.dot(query, key, trans_b=True)
      products.append(product if exists is None else jnp.where(exists, product, -NEVER))
    largest = functools.reduce(jnp.maximum, [x.max(axis=1) for x in products]) * scale
    total, mixed = jnp.zeros_like(largest), jnp.zeros(query.shape, jnp.float32)
    for product, value in zip(products, values):
      weights = _exp2(product, scale, largest[:, None])
      total += weights.sum(axis=1)
      mixed += triton.dot(weights.astype(value.dtype), value)
    mixed = mixed * (1 / total)[:, None] + v_bias[...]
    _store(y, mixed, *rows, tokens)
    _store(log_sum, largest + jnp.log2(total), *rows, tokens)
    return carry

  jax.lax.fori_loop(0, pl.cdiv(tokens, BLOCK), attend, 0)


def _backward_kernel(q, k, v, q_bias, v_bias, y, log_sum, dy, d_qkv, *, tokens):
  """Computes the gradients of one head of one image, block by block of keys.

  The weights are computed again (Dao et al. 2022, arXiv 2205.14135, appendix B.2).

  Args:
    q, k, v, q_bias, v_bias, y, log_sum, tokens: see `_forward_kernel`.
    dy: [P, C], the gradient of y.
    d_qkv: [P, 3, C], the output.
  """
  scale = q.shape[-1] ** -0.5
  blocks, queries = _blocks(tokens, BLOCK), []
  for block in blocks:
    d_out, out = _load(dy, *block, tokens), _load(y, *block, tokens)
    mean = ((out.astype(jnp.float32) - v_bias[...]) * d_out.astype(jnp.float32)).sum(axis=1)
    log = _load(log_sum, *block, tokens, missing=NEVER)  # the weights of a missing query are 0
    queries.append((_load_queries(q, q_bias, *block, tokens), d_out, mean, log))

  def differentiate(i, d_queries):
    rows = i * BLOCK, BLOCK
    key, value = (_load(x, *rows, tokens) for x in (k, v))
    d_key, d_value, sums = jnp.zeros(key.shape, jnp.float32), jnp.zeros(key.shape, jnp.float32), []
    for (query, d_out, mean, log), d_query in zip(queries, d_queries):
      product = triton.dot(query, key, trans_b=True)
      # A missing key is zeros. Its weight must be finite, so that its product with them is zero.
      weights = _exp2(product, scale * LOG2_E, log[:, None], is_limited=True)
      d_value += triton.dot(weights.astype(value.dtype), d_out, trans_a=True)
      d_logits = weights * (triton.dot(d_out, value, trans_b=True) - mean[:, None])
      d_logits = d_logits.astype(key.dtype)
      d_key += triton.dot(d_logits, query, trans_a=True)
      sums.append(d_query + triton.dot(d_logits, key))
    for part, gradient in ((1, d_key * scale), (2, d_value)):
      _store(d_qkv, gradient, *rows, tokens, part=(part,))
    return tuple(sums)

  zeros = tuple(jnp.zeros((size, q.shape[-1]), jnp.float32) for _, size in blocks)
  d_queries = jax.lax.fori_loop(0, pl.cdiv(tokens, BLOCK), differentiate, zeros)
  for block, d_query in zip(blocks, d_queries):
    _store(d_qkv, d_query * scale, *block, tokens, part=(0,))


def _call(kernel, qkv, bias, heads, others=(), **outputs):
  """Runs a kernel for each head of each image.

  Args:
    kernel: takes q, k, v, q_bias, v_bias, `others`, `outputs` and `tokens`.
    qkv: [B, T, 3 D].
    bias: float32 [3 D].
    heads: number of heads.
    others: pairs of an array, and what it is: a key of `specs` below.
    **outputs: the dtypes of what it writes, by what it is.

  Returns:
    The outputs.
  """
  images, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
  head_dim, padded = width // heads, pl.cdiv(tokens, KEY_BLOCK) * KEY_BLOCK
  part = lambda i: pl.BlockSpec(
    (None, padded, head_dim), lambda head, image: (image, 0, i * heads + head)
  )
  part_of_bias = lambda i: pl.BlockSpec((head_dim,), lambda head, image: (i * heads + head,))
  specs = {
    "tokens": part(0),
    "sums": pl.BlockSpec((None, None, padded), lambda head, image: (image, head, 0)),
    "parts": pl.BlockSpec((None, padded, 3, head_dim), lambda head, image: (image, 0, 0, head)),
  }
  shapes = {
    "tokens": (images, tokens, width),
    "sums": (images, heads, tokens),
    "parts": (images, tokens, 3, width),
  }
  return pl.pallas_call(
    functools.partial(kernel, tokens=tokens),
    grid=(heads, images),  # neighbors in memory run at the same time
    in_specs=[*map(part, range(3)), part_of_bias(0), part_of_bias(2)]
    + [specs[what] for _, what in others],
    out_specs=[specs[what] for what in outputs],
    out_shape=[jax.ShapeDtypeStruct(shapes[what], dtype) for what, dtype in outputs.items()],
    compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=2),
    interpret=target.platform() != "gpu",
    name=kernel.__name__.strip("_"),
  )(qkv, qkv, qkv, bias, bias, *(array for array, _ in others))


def _on_each_device(rule: str):
  """Lets each device compute the images that it has; the devices must divide their number.

  Args:
    rule: the axes of the arrays that a function takes and returns, for XLA's partitioner; only "b"
      may be divided. The function takes the number of heads before them.
  """

  def decorate(function):
    def partition(heads, mesh, arguments, results):
      images = PartitionSpec(*arguments[0].sharding.spec[:1])
      place = lambda x: NamedSharding(mesh, images if len(x.shape) > 1 else PartitionSpec())
      shardings = jax.tree.map(place, (results, arguments))
      return mesh, functools.partial(function, heads), *shardings

    divided = custom_partitioning(function, static_argnums=(0,))
    whole = tuple(axis for axis in dict.fromkeys(rule) if axis not in "b ,->")
    divided.def_partition(partition, sharding_rule=rule, need_replication_factors=whole)
    return divided

  return decorate


@_on_each_device("b t c, c -> b t d, b h t")
def _forward(heads, qkv, bias):
  return _call(_forward_kernel, qkv, bias, heads, tokens=qkv.dtype, sums=jnp.float32)


@_on_each_device("b t c, c, b t d, b h t, b t d -> b t p d")
def _backward(heads, qkv, bias, y, log_sum, dy):
  others = ((y, "tokens"), (log_sum, "sums"), (dy, "tokens"))
  return _call(_backward_kernel, qkv, bias, heads, others, parts=qkv.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def short_attention(qkv: jax.Array, bias: jax.Array, heads: int) -> jax.Array:
  """Computes softmax(q k^T / sqrt(C)) v of each head, with [q, k, v] = qkv + bias: [B, T, D].

  Logits and sums are float32. It has neither `jax.jvp` nor `jax.vmap`.

  Args:
    qkv: [B, T, 3 D]: queries, keys, values; in each, head after head of C channels.
    bias: float32 [3 D].
    heads: number of heads.
  """
  return _forward(heads, qkv, bias)[0]


def _short_attention_fwd(qkv, bias, heads):
  y, log_sum = _forward(heads, qkv, bias)
  return y, (qkv, bias, y, log_sum)


def _short_attention_bwd(heads, residuals, dy):
  (d_qkv,) = _backward(heads, *residuals, dy)
  d_qkv = d_qkv.reshape(residuals[0].shape)
  return d_qkv, d_qkv.astype(jnp.float32).sum((0, 1))


short_attention.defvjp(_short_attention_fwd, _short_attention_bwd)
