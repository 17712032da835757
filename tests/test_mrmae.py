"""The method's claims, on tiny random models: what may influence what, and that the two forms of
the encoder agree.
"""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mrmae_jax import mrmae, target
from mrmae_jax.models import attention, layers
from mrmae_jax.models.convvit import ConvViT
from mrmae_jax.models.decoder import Decoder
from mrmae_jax.models.layers import (
  from_blocks,
  gelu,
  patchify,
  put_visible,
  sincos_2d,
  take_visible,
  to_blocks,
)
from tests.helpers.devices import gpu
from tests.helpers.models import HEIGHT, OPTIONS, WIDTH, loss_of, mimic_alone, seen, setup


def repeat(removed, patch):  # bool [B, gh, gw] -> [B, H, W]
  return np.repeat(np.repeat(removed, patch, 1), patch, 2)


def removed_pixels(noise, size=(HEIGHT, WIDTH), patch=8):
  removed = np.asarray(mrmae.sample_mask(noise, 0.75).removed)
  return repeat(removed.reshape(-1, size[0] // patch, size[1] // patch), patch)[..., None]


@pytest.mark.parametrize("encoder", ["dense", "sparse", "vit"])
def test_masked_pixels_never_reach_a_visible_feature(encoder):
  model, params, images, noise, _ = setup(encoder)
  mask = mrmae.sample_mask(noise, 0.75)
  encode = jax.jit(lambda x: model.encoder.apply({"params": params["encoder"]}, x, mask)[0])
  pixels = mrmae.normalize(images, model.mean, model.std)
  other = np.where(
    removed_pixels(noise), np.random.default_rng(9).normal(0, 7, pixels.shape), pixels
  ).astype(np.float32)
  np.testing.assert_array_equal(encode(pixels), encode(other))
  visible = np.where(removed_pixels(noise), pixels, pixels + 0.1).astype(np.float32)
  assert (
    np.abs(np.asarray(encode(pixels)) - encode(visible)).min(-1).max() > 0
  )  # every visible pixel was changed: so were features


@pytest.mark.parametrize("norm_pix", [True, False])
def test_pixel_targets_of_visible_patches_do_not_count(norm_pix):
  model, params, images, noise, _ = setup("sparse")
  mask = mrmae.sample_mask(noise, 0.75)
  pixels = mrmae.normalize(images, model.mean, model.std)
  prediction = jnp.asarray(np.random.default_rng(1).standard_normal((3, 36, 192), np.float32))
  loss = functools.partial(mrmae.pixel_loss, prediction, mask=mask, patch_size=8, norm_pix=norm_pix)
  other = jnp.where(removed_pixels(noise), pixels, -pixels + 3 * pixels**2)
  assert loss(pixels) == loss(other)
  assert loss(pixels) != loss(jnp.where(removed_pixels(noise), other + pixels**2, pixels))


def test_teacher_features_of_masked_tokens_do_not_count():
  model, params, images, noise, features = setup("sparse")
  removed = mrmae.sample_mask(noise, 0.75).removed[..., None]
  loss, terms = loss_of(model, params, images, noise, features)
  other, _ = loss_of(model, params, images, noise, jnp.where(removed, features * 5 - 2, features))
  changed, _ = loss_of(
    model, params, images, noise, jnp.where(removed, features, features[..., ::-1])
  )
  assert loss == other and loss != changed
  np.testing.assert_allclose(loss, 0.7 * terms["pixel"] + 1.3 * terms["mimic"], rtol=1e-6)


def test_no_gradient_reaches_the_teacher():
  model, params, images, noise, features = setup("sparse")

  @jax.jit
  def loss(gain):
    return mrmae.pretrain_loss(
      params, images, noise, model, {"mimic": lambda *_: seen(jnp.sin(gain * features))}, **OPTIONS
    )[0]

  assert abs(loss(1.0) - loss(2.0)) > 1e-3  # the teacher matters,
  assert jax.grad(loss)(1.0) == 0  # and is not trained


def test_losses_by_hand():
  rng = np.random.default_rng(0)
  noise = jnp.asarray(rng.random((2, 12), np.float32))
  mask = mrmae.sample_mask(noise, 0.5)
  pixels = rng.standard_normal((2, 6, 8, 3)).astype(np.float32)
  prediction = rng.standard_normal((2, 12, 12)).astype(np.float32)
  features, mimicked = (
    rng.standard_normal((2, 12, 7)).astype(np.float32),
    rng.standard_normal((2, 6, 7)).astype(np.float32),
  )
  pixel, mimic = [], []
  for b in range(2):
    order = np.argsort(noise[b], kind="stable")
    for token in order[6:]:
      row, column = divmod(int(token), 4)
      patch = pixels[b, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].reshape(-1)
      patch = (patch - patch.mean()) / np.sqrt(patch.var(ddof=1) + 1e-6)
      pixel.append(np.mean((prediction[b, token] - patch) ** 2))
    for place, token in enumerate(order[:6]):
      target = features[b, token]
      target = (target - target.mean()) / np.sqrt(target.var() + 1e-5)
      mimic.append(np.mean((mimicked[b, place] - target) ** 2))
  np.testing.assert_allclose(
    mrmae.pixel_loss(take_visible(prediction, mask.masked), pixels, mask, 2, True),
    np.mean(pixel),
    rtol=1e-5,
  )
  np.testing.assert_allclose(
    mimic_alone(mimicked, mrmae.TeacherOutput(features, None, None), mask),
    np.mean(mimic),
    rtol=1e-5,
  )


@pytest.mark.parametrize(
  "tokens, ratio, visible", [(196, 0.75, 49), (196, 0.7, 58), (196, 0.6, 78), (48, 0.5, 24)]
)
def test_mask(tokens, ratio, visible):
  noise = jax.random.uniform(jax.random.key(0), (200, tokens))
  mask = mrmae.sample_mask(noise, ratio)
  assert mask.ids_keep.shape == (200, visible) and (mask.removed.sum(1) == tokens - visible).all()
  np.testing.assert_array_equal(np.sort(mask.ids_restore, 1), np.tile(np.arange(tokens), (200, 1)))
  for b in range(3):
    np.testing.assert_array_equal(mask.ids_restore[b][mask.ids_keep[b]], np.arange(visible))
  share = np.asarray(mask.removed).mean(0)  # every token is hidden equally often: 6 standard errors
  assert np.abs(share - (1 - visible / tokens)).max() < 6 * (0.25 / 200) ** 0.5


def test_gathers_are_each_others_transpose():
  mask = mrmae.sample_mask(jax.random.uniform(jax.random.key(1), (2, 12)), 0.6)
  x, y = (
    jax.random.normal(jax.random.key(2), (2, 12, 3, 5)),
    jax.random.normal(jax.random.key(3), (2, 4, 3, 5)),
  )
  np.testing.assert_array_equal(
    take_visible(x, mask),
    np.take_along_axis(np.asarray(x), np.asarray(mask.ids_keep)[..., None, None], 1),
  )
  np.testing.assert_array_equal(take_visible(put_visible(y, mask), mask), y)
  np.testing.assert_array_equal(np.asarray(put_visible(y, mask))[np.asarray(mask.removed)], 0)
  np.testing.assert_array_equal(
    jax.vjp(lambda v: take_visible(v, mask), x)[1](y)[0], put_visible(y, mask)
  )
  np.testing.assert_array_equal(
    jax.vjp(lambda v: put_visible(v, mask), y)[1](x)[0], take_visible(x, mask)
  )


@pytest.mark.parametrize("capability", ["9.0", ""])
def test_backward_pass_has_no_scatter_and_no_convolution(capability):
  model, params, images, noise, features = setup("sparse")
  with target.tracing_for(gpu(capability)):
    text = (
      jax.jit(jax.grad(lambda p: loss_of(model, p, images, noise, features)[0]))
      .lower(params)
      .as_text()
    )
  assert (text.count("optimization_barrier") > 2) == bool(capability)
  assert "stablehlo.gather" in text
  assert "stablehlo.scatter" not in text and "stablehlo.convolution" not in text


@pytest.mark.parametrize(
  "cls, masks",
  [
    pytest.param(False, 1, marks=pytest.mark.variant),
    pytest.param(True, 1, marks=pytest.mark.variant),
    (False, 3),
  ],
)
def test_masked_tokens_alone_are_predicted_the_same(cls, masks):
  """The last block and the prediction leave visible tokens out, which are still attended to.

  So do their gradients.
  """
  mask = mrmae.sample_mask(jax.random.uniform(jax.random.key(0), (2, 24)), 0.75, masks)
  decoder, tokens = (
    Decoder(12, dim=16, depth=2, num_heads=4),
    jax.random.normal(jax.random.key(1), (2 * masks, 6 + cls, 8)),
  )
  params = jax.jit(decoder.init, static_argnums=3)(jax.random.key(2), tokens, mask, (4, 6))
  weights = jax.random.normal(jax.random.key(3), (2 * masks, 18, 12))

  @functools.partial(jax.jit, static_argnums=2)
  @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
  def masked(params, tokens, everywhere):
    prediction, out = decoder.apply(params, tokens, mask, (4, 6), everywhere)
    prediction, read = (
      (take_visible(x, mask.masked) if everywhere else x) for x in (prediction, out["tokens"])
    )
    return jnp.sum(prediction * weights), (prediction, read)

  (_, ours), grads = masked(params, tokens, False)
  (_, oracle), wanted = masked(params, tokens, True)
  for a, b in zip(jax.tree.leaves((ours, grads)), jax.tree.leaves((oracle, wanted))):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(
    np.sort(np.concatenate([mask.ids_keep, mask.masked.ids_keep], 1)),
    np.tile(np.arange(24), (2 * masks, 1)),
  )


@pytest.mark.parametrize(
  "encoder, remat",
  [
    ("vit", "full"),
    *(
      pytest.param(encoder, remat, marks=pytest.mark.variant)
      for encoder in ("dense", "sparse", "vit")
      for remat in ("full", "dots")
      if (encoder, remat) != ("vit", "full")
    ),
  ],
)
def test_what_is_computed_again_is_the_same(encoder, remat):
  results = []
  for kept in ("none", remat):
    model, params, images, noise, _ = setup(encoder, remat=kept, drop_path=0.5)
    decoder, keys = model.decoder.clone(remat=kept), jax.random.split(jax.random.key(1), 3)

    def loss(params):
      mask = mrmae.sample_mask(noise, 0.75)
      tokens, _ = model.encoder.apply(
        {"params": params["encoder"]}, mrmae.normalize(images, model.mean, model.std), mask, keys
      )
      prediction, _ = decoder.apply({"params": params["decoder"]}, tokens, mask, (6, 8))
      return jnp.square(prediction).mean()

    gradient = jax.jit(jax.value_and_grad(loss)).lower(params)
    results.append(
      (gradient.as_text().count("stablehlo.rsqrt"), jax.tree.leaves(gradient.compile()(params)))
    )
  (once, plain), (twice, again) = results
  assert twice > once  # norms, at least
  for a, b in zip(plain, again):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_the_target(monkeypatch):
  cpu, hopper = jax.devices()[0], gpu()
  monkeypatch.setattr(jax, "local_devices", lambda backend=None: [cpu if backend else hopper])
  assert (target.platform(), target.compute_capability()) == ("gpu", 9.0)
  for default in (cpu, "cpu"):  # as exporting checks what it wrote
    with jax.default_device(default):
      assert (target.platform(), target.compute_capability()) == ("cpu", 0)
      with target.tracing_for(hopper):
        assert target.platform() == "gpu"
  with target.tracing_for(target.PORTABLE):
    assert (target.platform(), target.compute_capability()) == ("", 0)


def test_attention_of_cudnn_is_asked_for_by_name(monkeypatch):
  """Where it can be used: lowered for CUDA from here, it is a call of cuDNN's kernel forwards and
  backwards.
  """
  assert not attention.has_fused_attention(jnp.bfloat16, 64)  # there is no GPU here
  for capability, dtype, head_dim, usable in (
    ("8.0", jnp.bfloat16, 64, True),
    ("9.0", jnp.bfloat16, 32, True),
    ("9.0", jnp.bfloat16, 80, True),
    ("7.0", jnp.bfloat16, 64, False),
    ("8.0", jnp.float32, 64, False),
    ("8.0", jnp.bfloat16, 4, False),
    ("8.0", jnp.bfloat16, 256, False),
    ("gfx90a", jnp.bfloat16, 64, False),
  ):
    with target.tracing_for(gpu(capability)):
      found = attention.has_fused_attention(dtype, head_dim)
    assert found == usable, (capability, dtype, head_dim)

  from jax._src.cudnn import (
    fused_attention_stablehlo as cudnn,  # asks the GPU that is not here for its version
  )

  monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
  monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
  for queries, keys in ((196, 196), (49, 49), (147, 196)):
    q, k, v = (jax.ShapeDtypeStruct((2, 4, t, 32), jnp.bfloat16) for t in (queries, keys, keys))
    with target.tracing_for(gpu()):
      traced = jax.jit(
        jax.grad(lambda q, k, v: attention.attend(q, k, v).astype(jnp.float32).sum())
      ).trace(q, k, v)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__cudnn$fmhaSoftmax(") == text.count("@__cudnn$fmhaSoftmaxBackward(") == 1


@pytest.mark.parametrize("tokens", [6, 5])
def test_query_key_and_value_of_a_gpu_are_three_products(tokens, monkeypatch):
  """The numbers of one product that is cut apart, which it stays where the tokens are padded."""
  kernel = functools.partial(attention.fused_attention, implementation="xla")
  monkeypatch.setattr(attention, "fused_attention", kernel)
  module = attention.Attention(num_heads=2, dtype=jnp.bfloat16)
  x = jax.random.normal(jax.random.key(0), (2, tokens, 16), jnp.bfloat16)
  params = jax.jit(module.init)(jax.random.key(1), x)
  half = mrmae.sample_mask(jax.random.uniform(jax.random.key(2), (2, tokens)), 0.5)
  for only in (None, half):

    def loss(params, x, only=only):
      return jnp.square(module.apply(params, x, only)[0].astype(jnp.float32)).sum()

    results = []
    for capability, is_cut in (("", True), ("9.0", tokens % 2 == 1)):
      with target.tracing_for(gpu(capability)):
        traced = jax.jit(jax.value_and_grad(lambda *x: loss(*x), (0, 1))).trace(params, x)
      assert ("split[" in str(traced.jaxpr)) == is_cut
      results.append(jax.tree.leaves(traced.lower().compile()(params, x)))
    for a, b in zip(*results):
      a, b = (np.asarray(y, np.float32) for y in (a, b))
      np.testing.assert_allclose(a, b, atol=0.02 * np.abs(a).max())


@pytest.mark.parametrize("queries, keys", [(10, 10), (7, 7), (6, 9), (5, 8)])
def test_padding_to_even_numbers_of_tokens_changes_nothing(queries, keys):
  q, k, v = (
    jax.random.normal(jax.random.key(t + i), (2, 3, t, 8))
    for i, t in enumerate((queries, keys, keys))
  )
  weights = jax.random.normal(jax.random.key(9), q.shape)
  fused = functools.partial(attention.fused_attention, implementation="xla")
  results = [
    jax.jit(jax.value_and_grad(lambda *x, form=form: (form(*x) * weights).sum(), (0, 1, 2)))(
      q, k, v
    )
    for form in (attention.attend, fused)
  ]
  for a, b in zip(*map(jax.tree.leaves, results)):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_tokens_are_padded_for_a_gradient_alone():
  q = jnp.zeros((2, 3, 7, 8))
  fused = functools.partial(attention.fused_attention, implementation="xla")
  with_gradient = jax.make_jaxpr(jax.grad(lambda q: fused(q, q, q).sum()))(q)
  assert "pad[" in str(with_gradient) and "pad[" not in str(jax.make_jaxpr(fused)(q, q, q))


def test_patches_are_row_column_channel():
  x = np.arange(2 * 6 * 8 * 3).reshape(2, 6, 8, 3)
  patches = patchify(x, 2)
  np.testing.assert_array_equal(patches[1, 2, 3], x[1, 4:6, 6:8].reshape(-1))
  np.testing.assert_array_equal(to_blocks(x, 2)[1, 2 * 4 + 3], x[1, 4:6, 6:8])
  np.testing.assert_array_equal(from_blocks(to_blocks(x, 2), (3, 4)), x)


def test_position_table():
  table = sincos_2d(8, (2, 3))
  np.testing.assert_allclose(
    table[1 * 3 + 2],
    [
      np.sin(2),
      np.sin(0.02),
      np.cos(2),
      np.cos(0.02),
      np.sin(1),
      np.sin(0.01),
      np.cos(1),
      np.cos(0.01),
    ],
    atol=1e-6,
  )
  np.testing.assert_array_equal(sincos_2d(8, (2, 3), cls_token=True)[0], 0)
  with pytest.raises(ValueError, match="divisible by 4, got 6"):
    sincos_2d(6, (2, 2))


FORMS = [
  pytest.param(
    fields, size, ratio, masking, dtype, marks=[pytest.mark.variant] if i + j + k else []
  )
  for i, (fields, size, ratio) in enumerate(
    [
      ({}, (48, 64), 0.75),
      (dict(patch_sizes=(4, 2, 2)), (64, 96), 0.6),
      (dict(patch_sizes=(1, 2, 2)), (20, 12), 0.5),
    ]
  )
  for j, masking in enumerate(["random", "focused"])
  for k, dtype in enumerate([jnp.float32, jnp.bfloat16])
]


@pytest.mark.parametrize("fields, size, ratio, masking, dtype", FORMS)
def test_sparse_equals_dense(fields, size, ratio, masking, dtype):
  tolerance = 1e-6 if dtype == jnp.float32 else 1e-2
  results = []
  for form in ("dense", "sparse"):
    model, params, images, noise, features = setup(
      form, size=size, mask_ratio=ratio, dtype=dtype, **fields
    )
    step = jax.jit(
      jax.value_and_grad(
        lambda p, m=model: loss_of(
          m, p, images, noise, features, mask_ratio=ratio, masking=masking
        )[0]
      )
    )
    results.append(step(params))
  (loss, grads), (sparse_loss, sparse_grads) = results
  np.testing.assert_allclose(loss, sparse_loss, rtol=tolerance)
  norm = lambda tree: np.sqrt(
    sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(tree))
  )
  error = norm(
    jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), grads, sparse_grads)
  ) / norm(grads)
  assert error < tolerance, f"relative L2 error of the gradients {error:.1e}"


def test_stage_maps_agree_on_visible_blocks():
  (dense, params, images, noise, _), (sparse, *_) = setup("dense"), setup("sparse")
  mask = mrmae.sample_mask(noise, 0.75)
  outs = [
    jax.jit(m.encoder.apply)(
      {"params": params["encoder"]}, mrmae.normalize(images, m.mean, m.std), mask
    )[1]
    for m in (dense, sparse)
  ]
  for stage, side in (("stage1", 4), ("stage2", 2)):
    assert outs[0][stage].ndim == 4 and outs[1][stage].shape[1:4] == (12, side, side)
    np.testing.assert_allclose(
      take_visible(to_blocks(outs[0][stage], side), mask), outs[1][stage], atol=1e-5
    )
  np.testing.assert_allclose(outs[0]["layers"][-1], outs[1]["layers"][-1], atol=1e-5)


def test_without_a_mask_the_whole_image_is_encoded():
  model, params, images, _, _ = setup("sparse")
  encode = jax.jit(model.encoder.apply)
  x, out = encode({"params": params["encoder"]}, mrmae.normalize(images, model.mean, model.std))
  assert (
    x.shape == (3, 48, 24)
    and out["stage1"].shape == (3, 24, 32, 8)
    and out["stage2"].shape == (3, 12, 16, 12)
  )
  everything = mrmae.sample_mask(
    jnp.tile(jnp.arange(48.0) / 48, (3, 1)), 0.0
  )  # 48 of 48 visible, in order
  same, _ = encode(
    {"params": params["encoder"]}, mrmae.normalize(images, model.mean, model.std), everything
  )
  np.testing.assert_allclose(x, same, atol=1e-5)


def test_uint8_and_float_images_are_the_same_input():
  images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
  a, b = (
    mrmae.normalize(x, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    for x in (jnp.asarray(images), jnp.asarray(images / np.float32(255)))
  )
  np.testing.assert_allclose(a, b, atol=1e-6)
  np.testing.assert_allclose(
    b[0, 0, 5], (5 / 255 - np.array([0.1, 0.2, 0.3])) / [0.4, 0.5, 0.6], atol=1e-6
  )


def test_gelu_is_the_exact_one():
  x = jnp.linspace(-6, 6, 1001)
  np.testing.assert_allclose(gelu(x), jax.nn.gelu(x, approximate=False), atol=1e-6)
  assert np.abs(gelu(x) - jax.nn.gelu(x, approximate=True)).max() > 1e-4
  short = x.astype(jnp.bfloat16)
  np.testing.assert_array_equal(gelu(short), gelu(short.astype(jnp.float32)).astype(jnp.bfloat16))


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("bias", [None, (3, 5, 8), (2, 3, 5, 8)])
def test_attention_and_its_gradient(bias, platform):
  """Against the formula as JAX differentiates it, in float64."""
  rng = np.random.default_rng(0)
  shapes = [(2, 3, 5, 4), (2, 3, 8, 4), (2, 3, 8, 4), *([bias] if bias else [])]
  arrays, dy = [rng.normal(size=shape) for shape in shapes], rng.normal(size=shapes[0])

  def formula(q, k, v, bias=0.0):
    logits = jnp.einsum("bhqd,bhkd->bhqk", q, k) / 2 + bias
    return jnp.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(logits, axis=-1), v)

  with jax.enable_x64(True), target.tracing_for(SimpleNamespace(platform=platform)):
    (y, pull), (expected, pull_expected) = (
      jax.vjp(f, *arrays) for f in (attention.attend, formula)
    )
    for a, b in zip([y, *pull(dy)], [expected, *pull_expected(dy)]):
      assert a.dtype == jnp.float64 and a.shape == b.shape
      np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 8), (2, 3, 2, 2, 6)])
def test_layer_norm_and_its_gradient(shape):
  """Against the formula as JAX differentiates it, in float64."""
  rng = np.random.default_rng(0)
  x, dy = rng.normal(3, 2, shape), rng.normal(size=shape)
  scale, bias = rng.normal(size=(2, shape[-1]))

  def formula(x, scale, bias):
    shifted = x - x.mean(-1, keepdims=True)
    variance = jnp.square(shifted).mean(-1, keepdims=True)
    return shifted / jnp.sqrt(variance + 0.1) * scale + bias

  def layer(x, scale, bias):
    norm = layers.LayerNorm(0.1, jnp.float64)
    return norm.apply({"params": {"scale": scale, "bias": bias}}, x)

  with jax.enable_x64(True):
    (y, pull), (expected, pull_expected) = (jax.vjp(f, x, scale, bias) for f in (layer, formula))
    for a, b in zip([y, *pull(dy)], [expected, *pull_expected(dy)]):
      assert a.dtype == jnp.float64 and a.shape == b.shape
      np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_layer_norm_of_bfloat16_is_rounded_once():
  """The large channel is one as CLIP's residual stream has them."""
  x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 32)), jnp.bfloat16).at[:, 3].set(300)
  norm = lambda dtype: layers.LayerNorm(1e-5, dtype)
  params = norm(jnp.float32).init(jax.random.key(0), x)
  y = norm(jnp.bfloat16).apply(params, x)
  np.testing.assert_array_equal(y, norm(jnp.float32).apply(params, x).astype(jnp.bfloat16))
  rows = np.asarray(x, np.float64)
  expected = (rows - rows.mean(-1, keepdims=True)) / np.sqrt(rows.var(-1, keepdims=True) + 1e-5)
  np.testing.assert_allclose(norm(jnp.float32).apply(params, x), expected, rtol=1e-5, atol=1e-6)
  dx = jax.grad(lambda x: (norm(jnp.bfloat16).apply(params, x) ** 2).sum())(x)
  assert dx.dtype == jnp.bfloat16


def test_initialisation_is_the_reference_one():
  """As Alpha-VL/ConvMAE does it: xavier for Linear layers and the third embedding, torch's default
  for every other convolution.
  """
  encoder = ConvViT(embed_dims=(64, 96, 128), depths=(1, 1, 1), num_heads=4)
  p = jax.jit(encoder.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]

  def uniform(x, bound):  # of all its range, and mean zero
    x = np.asarray(x)
    assert np.abs(x).max() <= bound and np.abs(x).max() > bound * (1 - 8 / x.size)
    assert np.abs(x.mean()) < 4 * bound / (3 * x.size) ** 0.5

  xavier = lambda k: uniform(k, (6 / sum(k.shape)) ** 0.5)
  for k in (
    p["patch_embed4"],
    p["blocks3_0"]["attn"]["qkv"],
    p["blocks3_0"]["attn"]["proj"],
    p["blocks3_0"]["fc1"],
    p["blocks3_0"]["fc2"],
    p["patch_embed3"]["proj"],
  ):
    xavier(k["kernel"])
  for layer in (
    p["patch_embed1"]["proj"],
    p["patch_embed2"]["proj"],
    p["stage1_output_decode"],
    p["stage2_output_decode"],
    *(p["blocks1_0"][n] for n in ("conv1", "conv2", "fc1", "fc2")),
  ):
    bound = layer["kernel"].shape[0] ** -0.5
    uniform(layer["kernel"], bound)
    uniform(layer["bias"], bound)
  uniform(p["patch_embed3"]["proj"]["bias"], (4 * 96) ** -0.5)
  uniform(p["blocks2_0"]["depthwise_kernel"], 0.2)
  uniform(p["blocks2_0"]["depthwise_bias"], 0.2)
  assert not p["blocks3_0"]["fc1"]["bias"].any() and (p["norm"]["scale"] == 1).all()

  mask = mrmae.sample_mask(jnp.arange(16.0)[None] / 16, 0.75)
  init = jax.jit(Decoder(12, 256, 1, 4).init, static_argnums=3)
  d = init(jax.random.key(0), jnp.zeros((1, 4, 24)), mask, (4, 4))["params"]
  assert 0.015 < d["mask_token"].std() < 0.025
  xavier(d["embed"]["kernel"])
  xavier(d["pred"]["kernel"])
