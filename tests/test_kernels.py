"""The GPU kernels for LayerNorm, GELU and the convolution of visible blocks, interpreted."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mrmae_jax import mrmae, sharding, target
from mrmae_jax.models import blockwise_kernels, convvit, depthwise, layers, row_kernels
from mrmae_jax.models.block import Block, rematerialize
from mrmae_jax.models.convvit import ConvBlock, ConvViT
from tests.helpers.devices import gpu

HOPPER = gpu()
EPS = 1e-6


def draw(*shapes, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(len(shapes)), len(shapes))
  return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes)]


def both_ways(form, arrays, gradients):
  """Returns the outputs of a function, and the gradients of its arguments."""
  y, pull = jax.vjp(form, *arrays)
  return y, pull(gradients)


def run(form, arrays, gradients):
  return jax.jit(functools.partial(both_ways, form))(arrays, gradients)


def assert_near(found, expected, tolerance):
  """Leaf by leaf; the tolerance is of the largest number."""
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
    assert x.shape == y.shape and x.dtype == y.dtype
    np.testing.assert_allclose(x, y, atol=tolerance * float(jnp.abs(y).max()) + 1e-6)


def norm_of_sum(x, scale, shift, branch=None, bias=None):
  x = x if branch is None else x + branch + bias
  y = layers.layer_norm(x.reshape(-1, x.shape[-1]), scale, shift, EPS)
  return x, y.reshape(x.shape)


def draw_rows(images, tokens, width, has_branch):
  """Returns the arguments of `norm_of_sum`."""
  rows, vector = (images, tokens, width), (width,)
  x, branch, scale, shift, bias = draw(rows, rows, vector, vector, vector)
  return (3 * x + 1, scale, shift, *((branch, bias) if has_branch else ()))


@pytest.mark.parametrize("has_branch", [False, True])
@pytest.mark.parametrize(
  "images, tokens, width, processors",
  [(2, 13, 192, 1), (3, 4, 64, 132)]
  + [
    pytest.param(*sizes, marks=pytest.mark.variant)
    for sizes in ((1, 1, 448, 132), (2, 50, 768, 132), (2, 50, 512, 1), (4, 7, 1280, 132))
  ],
)
def test_the_norm_of_a_sum(monkeypatch, has_branch, images, tokens, width, processors):
  """Where both results are used, and where one is; with rows beyond the last, one program or more
  for an image, and one to three pieces of columns.
  """
  monkeypatch.setattr(row_kernels, "PROCESSORS", processors)
  ours = functools.partial(row_kernels.add_and_norm, EPS)
  arrays = draw_rows(images, tokens, width, has_branch)
  gradients = tuple(draw(*[arrays[0].shape] * 2))
  assert_near(run(ours, arrays, gradients), run(norm_of_sum, arrays, gradients), 2e-5)
  for i in range(2):
    one = lambda form, i=i: lambda *arrays: form(*arrays)[i]
    found, expected = (run(one(form), arrays, gradients[i]) for form in (ours, norm_of_sum))
    assert_near(found, expected, 2e-5)


@pytest.mark.parametrize("name", ["gelu", "quick_gelu"])
@pytest.mark.parametrize(
  "tokens, width",
  [(5, 192)] + [pytest.param(*x, marks=pytest.mark.variant) for x in ((70, 1024), (1, 512))],
)
def test_activations(name, tokens, width):
  x, bias, dy = draw((2, tokens, width), (width,), (2, tokens, width))
  found = run(functools.partial(row_kernels.activate, name), (3 * x, bias), dy)
  form = lambda x, bias: layers.ACTIVATIONS[name](x + bias)
  assert_near(found, run(form, (3 * x, bias), dy), 5e-5)


def test_the_tail_of_gelu_is_as_exact_as_its_body():
  """bfloat16 rounds by up to 4e-3 of a number, whatever its size; beyond 14 there is nothing."""
  with jax.enable_x64(True):
    x = jnp.linspace(-14, 14, 20001)
    tail = jax.scipy.special.erfc(jnp.abs(x) / np.sqrt(2)) / 2
    y, found, _ = row_kernels._gelu(x)
    np.testing.assert_allclose(found, tail, rtol=3.3e-5)
    np.testing.assert_allclose(y, x * jnp.where(x > 0, 1 - tail, tail), rtol=3.3e-5)
    np.testing.assert_allclose(
      row_kernels._gelu_gradient(x), jax.vmap(jax.grad(layers.gelu))(x), atol=3e-5
    )
    ends = jnp.asarray([0.0, -0.0, 40.0, -40.0, 1e30, -1e30])
    np.testing.assert_array_equal(row_kernels._gelu(ends)[0], [0, 0, 40, 0, 1e30, 0])
    np.testing.assert_allclose(row_kernels._gelu_gradient(ends), [0.5, 0.5, 1, 0, 1, 0], atol=1e-15)


def test_bfloat16_is_rounded_once():
  """Nearer to float64 than XLA's forms, which round bias and product before."""
  x, bias, dy = draw((2, 49, 192), (192,), (2, 49, 192), dtype=jnp.bfloat16)
  bias = bias.astype(jnp.float32)
  form = lambda x, bias: layers.gelu(layers.add_bias(x, bias))
  found, plain = (
    run(f, (x, bias), dy) for f in (functools.partial(row_kernels.activate, "gelu"), form)
  )
  with jax.enable_x64(True):
    x, bias, dy = (y.astype(jnp.float64) for y in (x, bias, dy))
    exact = jax.tree.map(np.asarray, run(lambda x, bias: layers.gelu(x + bias), (x, bias), dy))
  for a, b, c in zip(*map(jax.tree.leaves, (found, plain, exact))):
    assert a.dtype == b.dtype
    error = lambda y, c=c: np.square(np.asarray(y, np.float64) - c).mean() ** 0.5
    assert 0 < error(a) < error(b)


def draw_blocks(side, masks=1, channels=64):
  """Returns a mask of grid (3, 5), and the arguments of the convolution of its visible blocks."""
  mask = mrmae.sample_mask(jax.random.uniform(jax.random.key(1), (2, 15)), 0.65, masks)
  rows, visible = mask.ids_keep.shape
  blocks = (rows, visible, side, side, channels)
  x, kernel, biases, dy = draw(blocks, (5, 5, channels), (2, channels), blocks)
  before, after = biases.astype(jnp.bfloat16).astype(jnp.float32)
  return mask, (x, kernel, before, after), dy


def convolve_by_map(mask, x, kernel, before, after):
  return depthwise.blockwise_conv(x, kernel, mask, (3, 5), before, after)


def convolve_by_kernels(mask, *arrays):
  return blockwise_kernels.blockwise_conv(*arrays, blockwise_kernels.neighbors(mask, (3, 5)))


@pytest.mark.parametrize(
  "side, masks, blocks", [(2, 1, 3), pytest.param(4, 2, 13, marks=pytest.mark.variant)]
)
def test_visible_blocks_are_convolved_where_they_are(monkeypatch, side, masks, blocks):
  """Blocks at all borders, with neighbors that are visible or not; 5 blocks in programs of 3."""
  for name in ("FORWARD_BLOCKS", "BACKWARD_BLOCKS"):
    monkeypatch.setattr(blockwise_kernels, name, blocks)
  mask, arrays, dy = draw_blocks(side, masks)
  found = run(functools.partial(convolve_by_kernels, mask), arrays, dy)
  assert_near(found, run(functools.partial(convolve_by_map, mask), arrays, dy), 2e-6)


def test_the_blocks_around_a_block():
  ids = jnp.asarray([[4, 0, 5]])  # of a grid of 2 x 3
  restore = jnp.asarray([[1, 3, 4, 5, 0, 2]])
  near = blockwise_kernels.neighbors(layers.Mask(ids, restore), (2, 3))
  np.testing.assert_array_equal(
    near[0],
    [
      [1, -1, -1, -1, 0, 2, -1, -1, -1],
      [-1, -1, -1, -1, 1, -1, -1, -1, 0],
      [-1, -1, -1, 0, 2, -1, -1, -1, -1],
    ],
  )


@pytest.mark.parametrize(
  "capability, dtype, is_usable",
  [
    ("9.0", jnp.bfloat16, True),
    ("9.0", jnp.float32, False),
    ("8.0", jnp.bfloat16, False),
    ("10.0", jnp.bfloat16, False),
    ("gfx942", jnp.bfloat16, False),
  ],
)
def test_where_the_kernels_are_used(capability, dtype, is_usable):
  with target.tracing_for(gpu(capability)):
    for width, fits in ((512, True), (768, True), (448, True), (960, False), (96, False)):
      assert row_kernels.has_row_kernels(dtype, width) == (is_usable and fits), width
    for sizes, fits in (((4, 256, 5), True), ((2, 384, 5), True), ((1, 384, 5), False)):
      assert blockwise_kernels.has_blockwise_kernels(dtype, *sizes) == (is_usable and fits)
    assert not blockwise_kernels.has_blockwise_kernels(dtype, 4, 96, 5)
    assert not blockwise_kernels.has_blockwise_kernels(dtype, 4, 256, 7)


def force_block_kernels(monkeypatch):
  """Lets the networks take the kernels of blocks on this device."""
  jax.clear_caches()
  for module in (depthwise, convvit):
    monkeypatch.setattr(module, "has_blockwise_kernels", lambda *arguments: True)


def force_kernels(monkeypatch):
  """Lets them take all kernels."""
  force_block_kernels(monkeypatch)
  monkeypatch.setattr(layers, "has_row_kernels", lambda *arguments: True)


@pytest.mark.parametrize(
  "options, kernels",
  [
    ({}, 3),
    pytest.param({"layer_scale": True, "activation": "quick_gelu"}, 3, marks=pytest.mark.variant),
    pytest.param(
      {"gated": True, "activation": "silu", "key_bias": False}, 2, marks=pytest.mark.variant
    ),
  ],
)
def test_a_block_by_the_kernels_is_the_same_module(monkeypatch, options, kernels):
  """Outputs and all gradients, with a dropped path and without, and computed again."""
  sizes = {"num_heads": 2, "mlp_dim": 128}
  block = Block(**sizes, **options)
  again = rematerialize(Block, "full")(**sizes, **options)
  x, dy = draw((4, 9, 64), (4, 9, 64))
  params = block.init(jax.random.key(1), x)
  params = jax.tree.map(
    lambda p: p + jax.random.normal(jax.random.key(p.size), p.shape) / 4, params
  )
  drop = layers.DropPath(0.5, jax.random.split(jax.random.key(3), 4))
  cases = (block, layers.DropPath()), (block, drop), (again, layers.DropPath())
  forms = [lambda params, x, m=m, drop=drop: m.apply(params, x, drop)[0] for m, drop in cases]
  expected = [run(form, (params, x), dy) for form in forms]
  force_kernels(monkeypatch)
  assert str(jax.make_jaxpr(forms[0])(params, x)).count("pallas_call") == kernels
  for form, numbers in zip(forms, expected):
    assert_near(run(form, (params, x), dy), numbers, 5e-5)


def test_a_convolutional_block_by_the_kernels_is_the_same_module(monkeypatch):
  mask, (x, *_), dy = draw_blocks(2)
  block = ConvBlock(mlp_dim=128)
  params = block.init(jax.random.key(1), x, mask, (3, 5))
  form = lambda params, x: block.apply(params, x, mask, (3, 5))
  expected = run(form, (params, x), dy)
  force_kernels(monkeypatch)
  assert str(jax.make_jaxpr(form)(params, x)).count("pallas_call") == 4
  assert_near(run(form, (params, x), dy), expected, 5e-5)


def test_a_whole_image_by_the_kernels_is_the_same_encoding(monkeypatch):
  """It is cut into blocks; the maps of the stages are maps again, row by row."""
  sizes = {"patch_sizes": (4, 1, 2), "embed_dims": (64, 64, 64), "depths": (1, 0, 1)}
  encoder = ConvViT(**sizes, num_heads=2, fuse_layers=(0,), drop_path=0.5)
  [images], keys = draw((2, 24, 40, 3)), jax.random.split(jax.random.key(2), 2)
  params = encoder.init(jax.random.key(1), images)
  form = lambda params, images: encoder.apply(params, images, None, keys)
  x, out = jax.eval_shape(form, params, images)
  assert out["stage1"].shape == out["stage2"].shape == (2, 6, 10, 64)
  leaves, tree = jax.tree.flatten((x, out))
  dy = tree.unflatten(draw(*(leaf.shape for leaf in leaves)))
  expected = run(form, (params, images), dy)
  force_block_kernels(monkeypatch)
  assert str(jax.make_jaxpr(form)(params, images)).count("name=conv_kernel") == 1
  assert_near(run(form, (params, images), dy), expected, 5e-5)


@pytest.mark.parametrize(
  "options, is_masked, kernels",
  [
    ({}, False, 2),
    ({}, True, 2),
    ({"sparse": False}, True, 0),  # masked positions are zeros of a map
    ({"embed_dims": (64, 96, 64)}, False, 0),
    ({"patch_sizes": (4, 4, 1)}, False, 0),
  ],
)
def test_where_an_encoder_takes_the_kernels_of_blocks(options, is_masked, kernels):
  sizes = {"embed_dims": (64, 64, 64), "depths": (1, 1, 1), "num_heads": 2, "dtype": jnp.bfloat16}
  encoder = ConvViT(**sizes | options)
  mask = mrmae.sample_mask(jax.random.uniform(jax.random.key(1), (2, 15)), 0.6)
  call = lambda images: encoder.init_with_output(
    jax.random.key(1), images, mask if is_masked else None
  )
  with target.tracing_for(HOPPER):
    jaxpr = jax.make_jaxpr(call)(jnp.zeros((2, 48, 80, 3)))
  assert str(jaxpr).count("name=conv_kernel") == kernels


def all_kernels():
  """Yields (function, its arrays of images, its other arrays, gradients) of all kernels."""
  x, scale, shift, branch, bias = draw_rows(8, 5, 64, True)
  norm = lambda x, branch, *others: row_kernels.add_and_norm(EPS, x, *others[:2], branch, others[2])
  yield norm, (x, branch), (scale, shift, bias), (branch, x)
  yield functools.partial(row_kernels.activate, "gelu"), (x,), (bias,), branch
  mask = mrmae.sample_mask(jax.random.uniform(jax.random.key(1), (8, 15)), 0.79)
  blocks = (*mask.ids_keep.shape, 2, 2, 64)
  x, kernel, before, after, dy = draw(blocks, (5, 5, 64), (64,), (64,), blocks)
  near = blockwise_kernels.neighbors(mask, (3, 5))
  conv = lambda x, kernel, *biases: blockwise_kernels.blockwise_conv(x, kernel, *biases, near)
  yield conv, (x,), (kernel, before, after), dy


@pytest.mark.parametrize("fsdp", [pytest.param(1, marks=pytest.mark.variant), 4])
def test_each_device_computes_its_own_images(fsdp):
  """Nothing but the gradients of parameters is exchanged."""
  mesh = sharding.make_mesh(fsdp=fsdp)
  rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  for form, images, others, dy in all_kernels():
    expected = run(form, (*images, *others), dy)
    images, dy = jax.device_put((images, dy), rows)
    step = jax.jit(functools.partial(both_ways, form))
    program = step.lower((*images, *jax.device_put(others, whole)), dy).compile()
    found = program((*images, *jax.device_put(others, whole)), dy)
    text = program.as_text()
    moved = "all-gather", "all-to-all", "collective-permute"
    assert not any(name in text for name in moved) and 1 <= text.count(" all-reduce(") <= 4
    assert jax.tree.leaves(found)[0].sharding.is_equivalent_to(rows, images[0].ndim)
    assert_near(found, expected, 1e-5)


def test_what_a_gpu_reads_and_writes(monkeypatch):
  """Nothing of rows or blocks that do not exist, which interpreted kernels would not notice.

  Of neighbors there is a row for each block of all programs, and one more. So 3 blocks have 5 where
  a program has 2, and 4 where it has all.
  """
  monkeypatch.setattr(blockwise_kernels, "FORWARD_BLOCKS", 2)
  for form, images, others, dy in all_kernels():
    to_bfloat16 = lambda x: x.astype(jnp.bfloat16) if x.ndim > 2 else x
    images, dy = jax.tree.map(to_bfloat16, (images, dy))
    with target.tracing_for(HOPPER):
      text = str(jax.jit(functools.partial(both_ways, form)).trace((*images, *others), dy).jaxpr)
    some = r":(bf16|f32)\[[\d,]*\].* <- .*\[[a-z]+[:,]"  # rows, or a block
    accesses = [line for line in text.splitlines() if re.search(some, line)]
    assert accesses and all("mask=" in line for line in accesses), accesses
  assert set(re.findall(r"i32\[8,(\d+),9\] = pad", text)) == {"4", "5"}


def test_lowered_for_cuda_from_here():
  """They are Triton's kernels, forwards and backwards."""
  device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
  mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
  for form, images, others, dy in all_kernels():
    images, dy = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (images, dy))
    with target.tracing_for(HOPPER, mesh):
      step = jax.jit(functools.partial(both_ways, form)).trace((*images, *others), dy)
      text = step.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("xla.gpu.triton") == 2
