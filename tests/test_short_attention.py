"""The attention kernels for GPUs, interpreted: their numbers, where they are used, on several
devices.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import forms
from mrmae_jax import mrmae, sharding, target
from mrmae_jax.models import attention, short_attention
from tests.helpers.devices import gpu

HOPPER = gpu()


def draw(batch, tokens, heads, width, dtype=jnp.float32):
  """Returns packed queries, keys and values, their bias, and the gradient of the output."""
  keys = jax.random.split(jax.random.key(tokens), 3)
  shape = (batch, tokens, heads * width)
  qkv = 2 * jax.random.normal(keys[0], (*shape[:2], 3 * shape[2]), dtype)
  bias = jax.random.normal(keys[1], (3 * shape[2],))
  return qkv, bias, jax.random.normal(keys[2], shape, dtype)


def by_products(qkv, bias, heads):
  """The explicit form, with what cuts apart and puts together around it."""
  return forms.cut_apart(attention.explicit_attention, heads)(qkv, bias)


def by_kernels(qkv, bias, heads):
  return short_attention.short_attention((qkv,), bias, heads)


def both_ways(form, heads, qkv, bias, dy):
  y, pull = jax.vjp(lambda qkv, bias: form(qkv, bias, heads), qkv, bias)
  return y, *pull(dy)


def run(form, heads, *arrays):
  return jax.jit(functools.partial(both_ways, form, heads))(*arrays)


@pytest.mark.parametrize(
  "tokens, heads, width",
  [(17, 3, 16), (49, 2, 64), (196, 2, 32), (197, 1, 64)]
  + [pytest.param(*sizes, marks=pytest.mark.variant) for sizes in ((1, 1, 32), (64, 2, 32))]
  + [pytest.param(*sizes, marks=pytest.mark.variant) for sizes in ((147, 2, 32), (208, 1, 32))],
)
def test_the_numbers_of_the_explicit_form(tokens, heads, width):
  """Blocks with and without tokens beyond the end; logits of 30 and more."""
  arrays = draw(2, tokens, heads, width)
  found = run(by_kernels, heads, *arrays)
  expected = run(by_products, heads, *arrays)
  for x, y in zip(found, expected):
    assert x.shape == y.shape and x.dtype == y.dtype
    np.testing.assert_allclose(x, y, atol=2e-5 * float(jnp.abs(y).max()))
  of_query, of_key, of_value = found[2].reshape(3, -1)
  assert of_query.all() and not of_key.any() and of_value.all()


@pytest.mark.parametrize("queries, tokens", [(1, 20), (50, 197), (147, 196)])
def test_queries_of_some_tokens(queries, tokens):
  """They come in an array of their own; the tokens that ask are the last ones here."""
  qkv, bias, dy = draw(2, tokens, 2, 32)

  def some(qkv, bias, heads):
    q, kv = jnp.split(qkv, [64], axis=-1)
    return short_attention.short_attention((q[:, -queries:], kv), bias, heads)

  found = run(some, 2, qkv, bias, dy[:, -queries:])
  expected = run(lambda *x: by_products(*x)[:, -queries:], 2, qkv, bias, dy[:, -queries:])
  for x, y in zip(found, expected):
    np.testing.assert_allclose(x, y, atol=2e-5 * float(jnp.abs(y).max()))


@pytest.mark.parametrize(
  "tokens, sign",
  [(197, -1), (197, 1)]
  + [pytest.param(*case, marks=pytest.mark.variant) for case in ((49, -1), (49, 1))],
)
def test_large_logits_of_one_sign(tokens, sign):
  """The logits are 100 to 480, up to their sign: their exponentials are not finite.

  Without its limit, the weight of a missing key would be infinite beside negative ones. The largest
  are in the first block of keys or in the last.
  """
  keys = jax.random.split(jax.random.key(0), 4)
  small = [0.3 * jax.random.normal(key, (2, tokens, 32)) for key in keys[:3]]
  q, k, v = small[0], sign * (4.2 + small[1] + jnp.linspace(0, 16, tokens)[:, None]), small[2]
  bias = jax.random.normal(keys[3], (96,)).at[:32].set(4.2)
  arrays = jnp.concatenate([q, k, v], axis=-1), bias, small[1]
  found = run(by_kernels, 1, *arrays)
  for x, y in zip(found, run(by_products, 1, *arrays)):
    np.testing.assert_allclose(x, y, atol=1e-4 * float(jnp.abs(y).max()))


def test_bfloat16_is_as_near_to_float64_as_the_explicit_form():
  arrays = draw(2, 49, 2, 32, jnp.bfloat16)
  ways = by_kernels, by_products
  found, explicit = (run(form, 2, *arrays) for form in ways)
  with jax.enable_x64(True):
    exact = map(np.asarray, run(by_products, 2, *(x.astype(jnp.float64) for x in arrays)))
  for x, y, z in zip(found, explicit, exact):
    assert x.dtype == y.dtype
    error = lambda a, z=z: np.square(np.asarray(a, np.float64) - z).mean() ** 0.5
    assert 0 < error(x) < 1.1 * error(y), (error(x), error(y))


def test_tokens_are_cut_into_few_blocks():
  blocks = lambda tokens, largest=64: [size for _, size in short_attention._blocks(tokens, largest)]
  assert blocks(1) == [16] and blocks(49) == [64] and blocks(40) == [32, 16]
  assert blocks(196) == [64, 64, 64, 16] and blocks(197, 128) == [128, 64, 16]
  for tokens in range(1, short_attention.MAX_TOKENS + 1):
    for largest in (64, 128):
      found = short_attention._blocks(tokens, largest)
      assert [start for start, _ in found] == list(np.cumsum([0, *(n for _, n in found[:-1])]))
      assert tokens <= sum(n for _, n in found) < tokens + max(16, tokens / 3)
      assert all(n in (16, 32, 64, 128) and n <= largest for _, n in found)


@pytest.mark.parametrize(
  "capability, dtype, tokens, width, usable",
  [
    ("9.0", jnp.bfloat16, 49, 64, True),
    ("9.0", jnp.bfloat16, 208, 32, True),
    ("9.0", jnp.bfloat16, 209, 32, False),
    ("9.0", jnp.bfloat16, 49, 80, False),
    ("9.0", jnp.bfloat16, 49, 128, False),
    ("9.0", jnp.float32, 49, 64, False),
    ("8.0", jnp.bfloat16, 49, 64, False),
    ("10.0", jnp.bfloat16, 49, 64, False),
    ("gfx942", jnp.bfloat16, 49, 64, False),
  ],
)
def test_where_the_kernels_are_used(capability, dtype, tokens, width, usable):
  device = gpu(capability)
  with target.tracing_for(device):
    assert short_attention.has_short_attention(dtype, tokens, width) == usable


def trace(module, *arguments, **options):
  """Returns the shapes of the module's parameters, and its trace for a Hopper GPU as text."""
  params = jax.eval_shape(module.init, jax.random.key(0), *arguments)
  apply = lambda params, *arguments: module.apply(params, *arguments, **options)[0]
  with target.tracing_for(HOPPER):
    return params, str(jax.jit(apply).trace(params, *arguments).jaxpr)


def test_a_hopper_gpu_takes_them_where_attention_is_plain(monkeypatch):
  """The parameters are those of other devices; what these kernels cannot do is cuDNN's or XLA's."""
  # cuDNN is not installed.
  monkeypatch.setattr(attention, "has_fused_attention", lambda *arguments: False)
  x = jnp.zeros((2, 49, 128), jnp.bfloat16)
  make = functools.partial(attention.Attention, num_heads=2, dtype=jnp.bfloat16)
  params, text = trace(make(), x)
  assert text.count("pallas_call") == 1 and "pad[" not in text
  here = jax.eval_shape(make().init, jax.random.key(0), x)
  assert jax.tree.structure(here) == jax.tree.structure(params)
  assert jax.tree.map(jnp.shape, here) == jax.tree.map(jnp.shape, params)
  half = mrmae.sample_mask(jax.random.uniform(jax.random.key(2), (2, 49)), 0.5)
  assert trace(make(), x, only=half)[1].count("pallas_call") == 1
  for module, options in (
    (make(), {"bias": jnp.zeros((2, 49, 49))}),
    (make(rotate=lambda x: x), {}),
    (make(key_bias=False), {}),
    (make(relative=attention.RelativePositions((7, 7), cls_token=False)), {}),
    (make(dtype=jnp.float32), {}),
    (make(num_heads=8), {}),
  ):
    assert "pallas_call" not in trace(module, x, **options)[1], (module, options)


def test_attention_by_the_kernels_is_the_same_module(monkeypatch):
  """Outputs and all gradients of the layer, and the attention of its first token."""
  module = attention.Attention(num_heads=2)
  x = jax.random.normal(jax.random.key(0), (2, 49, 32))
  params = module.init(jax.random.key(1), x)
  params = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), p.shape) / 4, params)
  weights = jax.random.normal(jax.random.key(2), x.shape)

  def loss(params, x):
    y, bias, first = module.apply(params, x)
    return ((y + bias) * weights).sum() + jnp.square(first).sum()

  expected = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)
  monkeypatch.setattr(attention, "has_short_attention", lambda *arguments: True)
  jax.clear_caches()
  step = jax.jit(jax.value_and_grad(loss, (0, 1)))
  assert "custom_partitioning" in str(step.trace(params, x).jaxpr)
  for a, b in zip(jax.tree.leaves(step(params, x)), jax.tree.leaves(expected)):
    np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()) + 1e-6)


def test_each_device_computes_its_own_images():
  """Nothing but the gradient of the bias is exchanged, and the numbers are those of one device."""
  arrays = draw(8, 20, 2, 16)
  expected = run(by_kernels, 2, *arrays)
  for fsdp in (1, 4):
    mesh = sharding.make_mesh(fsdp=fsdp)
    rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    step = jax.jit(
      functools.partial(both_ways, by_kernels, 2),
      in_shardings=(rows, whole, rows),
    )
    program = step.lower(*arrays).compile()
    text = program.as_text()
    assert text.count(" all-reduce(") == 1 and "all-gather" not in text
    found = program(*jax.device_put(arrays, (rows, whole, rows)))
    assert found[0].sharding.is_equivalent_to(rows, 3)
    for x, y in zip(found, expected):
      np.testing.assert_allclose(x, y, atol=1e-5 * float(jnp.abs(y).max()))


def test_what_a_gpu_reads_and_writes():
  """Nothing beyond the last token, which interpreted kernels would not notice; 2^x by hand."""
  qkv, bias, dy = draw(2, 49, 2, 32, jnp.bfloat16)
  with target.tracing_for(HOPPER):
    step = functools.partial(both_ways, by_kernels, 2)
    text = str(jax.jit(step).trace(qkv, bias, dy).jaxpr)
  accesses = [line for line in text.splitlines() if " <- " in line and "[...]" not in line]
  assert len(accesses) == (3 + 2) + (6 + 3)  # of blocks, reads and writes, forwards and backwards
  assert all("mask=" in line for line in accesses), accesses
  asm = re.findall(r"asm=(.*)", text)
  assert len(asm) == 2 + 1 and " exp2 " not in text  # forwards, backwards
  limits = ["min.ftz.f32 x, x, 0f00000000; " in one for one in asm]
  assert sorted(limits) == [False, False, True]
  assert all("fma.rn.ftz.f32 x, $1, $2, $3; " in one for one in asm)


def test_lowered_for_cuda_from_here():
  """It is Triton's kernel, forwards and backwards."""
  qkv, bias, dy = draw(2, 49, 2, 32, jnp.bfloat16)
  device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
  mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
  with target.tracing_for(HOPPER, mesh):
    step = jax.jit(functools.partial(both_ways, by_kernels, 2))
    text = step.trace(qkv, bias, dy).lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("xla.gpu.triton") == 2
