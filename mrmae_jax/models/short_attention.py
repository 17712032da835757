"""Self-attention of few tokens: a GPU kernel forwards and one backwards.

cuDNN's kernels are made for long sequences. Those of this file keep a head of an image on the chip.
They read queries, keys and values where the product of the packed weights has written them, and
write where the next product reads, so that nothing is cut apart, padded or put together.

Biases need no pass of their own. A key's adds the same number to all logits of a query, which the
softmax does not see: its gradient is zero. A value's is added to the output, as the weights of a
query sum to 1.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from mrmae_jax import target
from mrmae_jax.models import kernels

LOG2_E = math.log2(math.e)  # GPUs have an instruction for 2^x
NEVER = 1e30  # its negative is the logit of a key that does not exist
MAX_TOKENS = 208  # of a head, which a program keeps on the chip; measured up to 197
BLOCK = 64  # the tokens that are processed at once
KEY_BLOCK = 128  # forwards, the keys that are processed at once
WARPS = 4


def has_short_attention(dtype, tokens: int, head_dim: int) -> bool:
  """Returns whether the device that is traced for has these kernels for so many tokens.

  They were measured with 49 to 197 tokens and heads of 32 and 64 channels.
  """
  fits = tokens <= MAX_TOKENS and head_dim in (32, 64)
  return fits and kernels.have_device(dtype)


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
  """Writes a block: [size] or [size, C]; to the part number `part` of [P, 3, C], and the like."""
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
  code = "{ .reg .f32 x; fma.rn.ftz.f32 x, $1, $2, $3; " + limit + "ex2.approx.ftz.f32 $0, x; }"
  return kernels.instructions(code, x, jnp.full_like(x, scale), shift)


def _load_queries(q, q_bias, start, size, tokens):
  """Reads a block of queries with their bias [C]: [size, C]."""
  return _load(q, start, size, tokens) + q_bias[...].astype(q.dtype)


def _hold(x):
  """Returns x, for a product that transposes it.

  The compiler moves a transpose to before what computes its operand, element by element. The rest
  of the kernel needs the operand as it was, and so all of that would be done twice, exponentials
  included. It does not move one to before a change of the rank.
  """
  return x.reshape(-1).reshape(x.shape)


def _attention_kernel(q, k, v, q_bias, v_bias, y, log_sum, *, queries, keys):
  """Computes one head of one image, block by block of queries and of keys.

  With each block of keys the largest logit may grow; the sums of the blocks before are scaled then
  (Dao et al. 2022, arXiv 2205.14135, algorithm 1).

  Args:
    q, k, v: [P, C], P being at least the number of tokens.
    q_bias, v_bias: [C].
    y: [P, C], the output.
    log_sum: float32 [P], log2 of each query's sum over keys of 2^logit. Logits of this file are
      those of `attention_weights` times log2(e), without the bias of the keys.
    queries, keys: the numbers of tokens.
  """
  scale = q.shape[-1] ** -0.5 * LOG2_E
  blocks = _blocks(keys, KEY_BLOCK)
  all_keys, values = ([_load(x, *block, keys) for block in blocks] for x in (k, v))

  def attend(i, carry):
    rows = i * BLOCK, BLOCK
    query = _load_queries(q, q_bias, *rows, queries)
    largest = jnp.full((BLOCK,), -NEVER, jnp.float32)
    total, mixed = jnp.zeros_like(largest), jnp.zeros(query.shape, jnp.float32)
    for block, key, value in zip(blocks, all_keys, values):
      exists, product = _exists(*block, keys), triton.dot(query, key, trans_b=True)
      product = product if exists is None else jnp.where(exists, product, -NEVER)
      before, largest = largest, jnp.maximum(largest, product.max(axis=1) * scale)
      weights, decay = _exp2(product, scale, largest[:, None]), _exp2(before, 1.0, largest)
      total = total * decay + weights.sum(axis=1)
      mixed = mixed * decay[:, None] + triton.dot(weights.astype(value.dtype), value)
    mixed = mixed * (1 / total)[:, None] + v_bias[...]
    _store(y, mixed, *rows, queries)
    _store(log_sum, largest + jnp.log2(total), *rows, queries)
    return carry

  jax.lax.fori_loop(0, pl.cdiv(queries, BLOCK), attend, 0)


def _attention_gradient_kernel(q, k, v, q_bias, v_bias, y, log_sum, dy, *outputs, queries, keys):
  """Computes the gradients of one head of one image, block by block of keys.

  The weights are computed again (Dao et al. 2022, arXiv 2205.14135, appendix B.2).

  Args:
    q, k, v, q_bias, v_bias, y, log_sum, queries, keys: see `_attention_kernel`.
    dy: [P, C], the gradient of y.
    outputs: the gradients of q, k and v [P, 3, C]; or that of q [P, 1, C], and those of k and v
      [P, 2, C].
  """
  scale = q.shape[-1] ** -0.5
  places = [(output, (part,)) for output in outputs for part in range(output.shape[1])]
  blocks, loaded = _blocks(queries, BLOCK), []
  for block in blocks:
    d_out, out = _load(dy, *block, queries), _load(y, *block, queries)
    mean = ((out.astype(jnp.float32) - v_bias[...]) * d_out.astype(jnp.float32)).sum(axis=1)
    log = _load(log_sum, *block, queries, missing=NEVER)  # the weights of a missing query are 0
    loaded.append((_load_queries(q, q_bias, *block, queries), d_out, mean, log))

  def differentiate(i, d_queries):
    rows = i * BLOCK, BLOCK
    key, value = (_load(x, *rows, keys) for x in (k, v))
    d_key, d_value, sums = jnp.zeros(key.shape, jnp.float32), jnp.zeros(key.shape, jnp.float32), []
    for (query, d_out, mean, log), d_query in zip(loaded, d_queries):
      product = triton.dot(query, key, trans_b=True)
      # A missing key is zeros. Its weight must be finite, so that its product with them is zero.
      weights = _exp2(product, scale * LOG2_E, log[:, None], is_limited=True)
      d_value += triton.dot(_hold(weights.astype(value.dtype)), d_out, trans_a=True)
      d_logits = weights * (triton.dot(d_out, value, trans_b=True) - mean[:, None])
      d_logits = d_logits.astype(key.dtype)
      d_key += triton.dot(_hold(d_logits), query, trans_a=True)
      sums.append(d_query + triton.dot(d_logits, key))
    for (output, part), gradient in zip(places[1:], (d_key * scale, d_value)):
      _store(output, gradient, *rows, keys, part)
    return tuple(sums)

  zeros = tuple(jnp.zeros((size, q.shape[-1]), jnp.float32) for _, size in blocks)
  d_queries = jax.lax.fori_loop(0, pl.cdiv(keys, BLOCK), differentiate, zeros)
  for block, d_query in zip(blocks, d_queries):
    _store(places[0][0], d_query * scale, *block, queries, places[0][1])


def _call(kernel, products, bias, heads, others=(), **outputs):
  """Runs a kernel for each head of each image.

  Args:
    kernel: takes q, k, v, q_bias, v_bias, `others`, `outputs` and the numbers of tokens.
    products: see `short_attention`.
    bias: float32 [3 D].
    heads: number of heads.
    others: pairs of an array, and what it is: a key of `shapes` below.
    **outputs: the dtypes of what it writes, by what it is.

  Returns:
    The outputs.
  """
  images, queries, _ = products[0].shape
  keys, width, head_dim = products[-1].shape[1], len(bias) // 3, len(bias) // 3 // heads
  shapes = {"rows": (images, queries, width), "sums": (images, heads, queries)}
  for i, product in enumerate(products):
    shapes[f"gradient_{i}"] = (*product.shape[:2], product.shape[2] // width, width)
  padded = lambda tokens: pl.cdiv(tokens, KEY_BLOCK) * KEY_BLOCK

  def part(tokens, i):
    index = lambda head, image: (image, 0, i * heads + head)
    return pl.BlockSpec((None, padded(tokens), head_dim), index)

  def spec(what):
    if what == "rows":
      return part(queries, 0)
    if what == "sums":
      return pl.BlockSpec((None, None, padded(queries)), lambda head, image: (image, head, 0))
    _, tokens, parts, _ = shapes[what]
    block = (None, padded(tokens), parts, head_dim)
    return pl.BlockSpec(block, lambda head, image: (image, 0, 0, head))

  places = [(x, i) for x in products for i in range(x.shape[2] // width)]  # of q, k and v
  part_of_bias = lambda i: pl.BlockSpec((head_dim,), lambda head, image: (i * heads + head,))
  return pl.pallas_call(
    functools.partial(kernel, queries=queries, keys=keys),
    grid=(heads, images),  # neighbors in memory run at the same time
    in_specs=[part(x.shape[1], i) for x, i in places]
    + [part_of_bias(0), part_of_bias(2)]
    + [spec(what) for _, what in others],
    out_specs=[spec(what) for what in outputs],
    out_shape=[jax.ShapeDtypeStruct(shapes[what], dtype) for what, dtype in outputs.items()],
    compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=2),
    interpret=target.platform() != "gpu",
    name=kernel.__name__.strip("_"),
  )(*(x for x, _ in places), bias, bias, *(x for x, _ in others))


def _forward_of(heads, bias, *products):
  outputs = {"rows": products[0].dtype, "sums": jnp.float32}
  return _call(_attention_kernel, products, bias, heads, **outputs)


def _backward_of(heads, y, log_sum, dy, bias, *products):
  others = ((y, "rows"), (log_sum, "sums"), (dy, "rows"))
  outputs = {f"gradient_{i}": x.dtype for i, x in enumerate(products)}
  return _call(_attention_gradient_kernel, products, bias, heads, others, **outputs)


# For one product, and for two.
_FORWARD = (
  kernels.on_each_device("c, b t w -> b t d, b h t")(_forward_of),
  kernels.on_each_device("c, b s e, b t w -> b s d, b h s")(_forward_of),
)
_BACKWARD = (
  kernels.on_each_device("b t d, b h t, b t d, c, b t w -> b t p d")(_backward_of),
  kernels.on_each_device("b s d, b h s, b s d, c, b s e, b t w -> b s o d, b t p d")(_backward_of),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def short_attention(products: tuple[jax.Array, ...], bias: jax.Array, heads: int) -> jax.Array:
  """Computes softmax(q k^T / sqrt(C)) v of each head: [B, S, D].

  Logits and sums are float32. It has neither `jax.jvp` nor `jax.vmap`.

  Args:
    products: [q, k, v] without biases, in one array [B, T, 3 D], or in two, q [B, S, D] and [k, v]
      [B, T, 2 D]; in each, head after head of C channels.
    bias: float32 [3 D], of q, k and v.
    heads: number of heads.
  """
  return _short_attention_fwd(products, bias, heads)[0]


def _short_attention_fwd(products, bias, heads):
  y, log_sum = _FORWARD[len(products) - 1](heads, bias, *products)
  return y, (y, log_sum, bias, products)


def _short_attention_bwd(heads, residuals, dy):
  y, log_sum, bias, products = residuals
  gradients = _BACKWARD[len(products) - 1](heads, y, log_sum, dy, bias, *products)
  not_keys = [d[:, :, (d.shape[2] - 1) % 2 :: 2] for d in gradients]  # the last is of values
  sums = [d.astype(jnp.float32).sum((0, 1)) for d in not_keys]
  d_query, d_value = jnp.concatenate(sums)
  d_bias = jnp.concatenate([d_query, jnp.zeros_like(d_query), d_value])
  return tuple(d.reshape(x.shape) for d, x in zip(gradients, products)), d_bias


short_attention.defvjp(_short_attention_fwd, _short_attention_bwd)
