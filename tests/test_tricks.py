"""Focused mimicking, complementary masks, layer fusion, CLS, several teachers and every form of the
mimic loss, by definition.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mrmae_jax import mrmae
from mrmae_jax.models.decoder import MimicHead
from mrmae_jax.models.layers import LayerFusion, put_visible, take_visible
from tests.helpers.models import OPTIONS, TEACHER_DIM, loss_of, mimic_alone, seen, setup

TRICKS = [
  pytest.param("dense", dict(cls_token=True, fuse_layers=(0,)), marks=pytest.mark.variant),
  ("sparse", dict(cls_token=True, fuse_layers=(0,))),
  ("sparse", dict(fuse_stages=False)),
  ("vit", dict(fuse_layers=(0,))),
]


# Focused masking


def test_focused_masking_draws_in_proportion_to_attention():
  """Plackett-Luce: the first token by p, the second by p among the rest, ..."""
  attention = np.float32([0.5, 0.25, 0.15, 0.1])
  noise = jax.random.uniform(jax.random.key(0), (20_000, 4))
  mask = mrmae.sample_mask(noise, 0.5, attention=jnp.tile(attention, (len(noise), 1)))
  first, second = np.asarray(mask.ids_keep).T
  for i in range(4):
    assert abs((first == i).mean() - attention[i]) < 0.015  # four standard errors
    for j in set(range(4)) - {i}:
      chance = attention[i] * attention[j] / (1 - attention[i])
      assert abs(((first == i) & (second == j)).mean() - chance) < 0.015


def test_uniform_attention_is_random_masking():
  noise = jax.random.uniform(jax.random.key(1), (50, 48))
  attention = jnp.argsort(jax.random.uniform(jax.random.key(2), (50, 48)), axis=1) + 1.0
  random = mrmae.sample_mask(noise, 0.75)
  for focused in (
    mrmae.sample_mask(noise, 0.75, attention=jnp.full((50, 48), 0.02)),
    mrmae.sample_mask(noise, 0.75, attention=attention, mix=1.0),
  ):
    np.testing.assert_array_equal(random.ids_restore, focused.ids_restore)
  cold = mrmae.sample_mask(
    noise, 0.75, attention=attention, temperature=1e-3
  )  # the most attended tokens, whatever the noise
  np.testing.assert_array_equal(np.sort(cold.ids_keep), np.sort(jax.lax.top_k(attention, 12)[1]))


def test_tokens_without_attention_come_last_and_nothing_is_nan():
  attention = jnp.zeros((100, 16)).at[:, :4].set(0.25)
  mask = mrmae.sample_mask(
    jax.random.uniform(jax.random.key(0), (100, 16)).at[0, 0].set(0.0), 0.75, attention=attention
  )
  np.testing.assert_array_equal(np.sort(mask.ids_keep), np.tile(np.arange(4), (100, 1)))


@pytest.mark.parametrize("masking", [pytest.param("random", marks=pytest.mark.variant), "focused"])
def test_the_focus_reaches_the_loss(masking):
  model, params, images, noise, features = setup("sparse")
  loss, _ = loss_of(model, params, images, noise, features, masking=masking)
  mask = mrmae.sample_mask(
    noise, 0.75, attention=seen(features).attention if masking == "focused" else None
  )

  @jax.jit
  def expected(params, mask):
    pixels = mrmae.normalize(images, model.mean, model.std)
    streams, prediction = mrmae.encode_decode(params, pixels, mask, model, everywhere=False)
    head = params["mimic_heads"]["mimic"]
    mimic = mrmae.mimic_loss(head, streams, seen(features), mask, model.mimics[0])
    return mrmae.pixel_loss(prediction, pixels, mask, 8, True), mimic

  pixel, mimic = expected(params, mask)
  np.testing.assert_allclose(loss, 0.7 * pixel + 1.3 * mimic, rtol=1e-5)


# Complementary masks


@pytest.mark.parametrize(
  "tokens, ratio, k", [(48, 0.75, 4), (196, 0.75, 4), (48, 0.6, 2), (24, 0.5, 1)]
)
def test_complementary_masks_are_disjoint(tokens, ratio, k):
  noise = jax.random.uniform(jax.random.key(0), (5, tokens))
  mask = mrmae.sample_mask(noise, ratio, k)
  visible = int(tokens * (1 - ratio))
  assert mask.ids_keep.shape == (5 * k, visible) and mask.ids_restore.shape == (5 * k, tokens)
  times_seen = (~np.asarray(mask.removed)).reshape(5, k, tokens).sum(1)
  assert times_seen.max() == 1 and (times_seen.sum(1) == k * visible).all()
  for row in range(5 * k):
    np.testing.assert_array_equal(mask.ids_restore[row][mask.ids_keep[row]], np.arange(visible))
  first = mrmae.sample_mask(noise, ratio)
  np.testing.assert_array_equal(mask.ids_keep[::k], first.ids_keep)
  np.testing.assert_array_equal(mask.ids_restore[::k], first.ids_restore)


@pytest.mark.parametrize(
  "encoder, fields",
  [
    pytest.param("dense", {}, marks=pytest.mark.variant),
    pytest.param("sparse", dict(cls_token=True), marks=pytest.mark.variant),
    ("vit", {}),
  ],
)
def test_complementary_masks_are_the_mean_of_separate_runs(encoder, fields):
  model, params, images, noise, features = setup(encoder, **fields)
  together = jax.jit(
    jax.value_and_grad(
      lambda p: loss_of(model, p, images, noise, features, complementary_masks=4)[0]
    )
  )(params)

  @jax.jit
  @jax.value_and_grad
  def alone(p, i):  # the noise of a run in which set i comes first
    place = jnp.argsort(jnp.argsort(noise, axis=1), axis=1)
    return loss_of(model, p, images, ((place - 12 * i) % 48) / 48.0, features)[0]

  separate = jax.device_get([alone(params, i) for i in range(4)])
  mean = jax.tree.map(lambda *x: sum(x) / 4, *separate)
  np.testing.assert_allclose(together[0], mean[0], rtol=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max())),
    together[1],
    mean[1],
  )
  assert len({float(loss) for loss, _ in separate}) == 4


def test_gathers_of_several_masks_are_each_others_transpose():
  mask = mrmae.sample_mask(jax.random.uniform(jax.random.key(1), (2, 12)), 0.7, 4)
  x, y = (
    jax.random.normal(jax.random.key(2), (2, 12, 5)),
    jax.random.normal(jax.random.key(3), (8, 3, 5)),
  )
  np.testing.assert_array_equal(take_visible(x, mask), take_visible(x.repeat(4, 0), mask))
  (dx,) = jax.vjp(lambda v: take_visible(v, mask), x)[1](y)
  np.testing.assert_allclose(dx, put_visible(y, mask).reshape(2, 4, 12, 5).sum(1), atol=1e-6)


# The encoder's variants


@pytest.mark.parametrize("encoder, fields", TRICKS)
@pytest.mark.parametrize("masks", [pytest.param(1, marks=pytest.mark.variant), 3])
def test_masked_pixels_never_reach_a_visible_feature(encoder, fields, masks):
  model, params, images, noise, _ = setup(encoder, **fields)
  mask = mrmae.sample_mask(noise, 0.75, masks)
  encode = jax.jit(lambda x: model.encoder.apply({"params": params["encoder"]}, x, mask)[0])
  pixels = mrmae.normalize(images, model.mean, model.std)
  first = np.asarray(encode(pixels)).reshape(3, masks, -1)
  for i in range(masks):
    removed = np.asarray(mask.removed).reshape(3, masks, 6, 8)[:, i]
    removed = removed.repeat(8, 1).repeat(8, 2)[..., None]
    other = np.where(removed, np.random.default_rng(9).normal(0, 7, pixels.shape), pixels).astype(
      np.float32
    )
    np.testing.assert_array_equal(
      np.asarray(encode(other)).reshape(3, masks, -1)[:, i], first[:, i]
    )


@pytest.mark.parametrize("encoder, fields", TRICKS)
def test_the_backward_pass_has_no_scatter(encoder, fields):
  model, params, images, noise, features = setup(encoder, mimic=dict(salient_share=0.5), **fields)
  loss = lambda p: loss_of(
    model, p, images, noise, features, masking="focused", complementary_masks=4
  )[0]
  assert "stablehlo.scatter" not in jax.jit(jax.grad(loss)).lower(params).as_text()


def test_sparse_equals_dense_with_every_trick():
  fields = dict(cls_token=True, fuse_layers=(0,), mimic=dict(tokens="visible+cls"))
  (dense, params, images, noise, features), (sparse, *_) = (
    setup(form, **fields) for form in ("dense", "sparse")
  )
  options = dict(masking="focused", complementary_masks=3)
  a, b = (loss_of(m, params, images, noise, features, **options)[0] for m in (dense, sparse))
  np.testing.assert_allclose(a, b, rtol=2e-6)


def test_layer_fusion_by_definition():
  depths = [jax.random.normal(jax.random.key(i), (2, 3, 8)) for i in range(3)]
  fusion = LayerFusion()
  params = fusion.init(jax.random.key(0), depths)["params"]
  params = jax.tree.map(
    lambda x: jnp.asarray(np.random.default_rng(0).standard_normal(x.shape), jnp.float32), params
  )
  w = np.exp(params["weights"]) / np.exp(params["weights"]).sum()
  linear = [
    x @ params[f"depth_{i}"]["kernel"] + params[f"depth_{i}"]["bias"]
    for i, x in enumerate(depths[:2])
  ]
  np.testing.assert_allclose(
    fusion.apply({"params": params}, depths),
    w[0] * linear[0] + w[1] * linear[1] + w[2] * depths[2],
    atol=1e-5,
  )


@pytest.mark.parametrize("encoder", ["sparse", "vit"])
def test_fusion_takes_the_chosen_depths(encoder):
  """With all weight on one depth, and its Linear the identity, that block's output goes straight to
  the last norm.
  """
  depth = dict(depths=(1, 1, 4)) if encoder == "sparse" else dict(depth=4)
  model, params, images, noise, _ = setup(encoder, fuse_layers=(0, 2), **depth)
  stages = {} if encoder == "vit" else dict(fuse_stages=False)
  model = model._replace(encoder=model.encoder.clone(**stages))
  mask, pixels = mrmae.sample_mask(noise, 0.75), mrmae.normalize(images, model.mean, model.std)
  p = params["encoder"]
  p["fusion"] |= {
    "depth_1": {"kernel": jnp.eye(24), "bias": jnp.zeros(24)},
    "weights": jnp.float32([0, 99, 0]),
  }
  fused, _ = jax.jit(model.encoder.apply)({"params": p}, pixels, mask)
  cut = model.encoder.clone(
    fuse_layers=(), **({"depth": 3} if encoder == "vit" else {"depths": (1, 1, 3)})
  )
  expected, _ = jax.jit(cut.apply)({"params": p}, pixels, mask)
  np.testing.assert_allclose(fused, expected, atol=1e-5)


def test_stage_fusion_can_be_left_out():
  model, params, *_ = setup("sparse", fuse_stages=False)
  assert not any("output_decode" in name for name in params["encoder"])


@pytest.mark.parametrize("encoder", ["dense", "sparse"])
def test_cls_of_the_convolutional_encoder(encoder):
  """CLS has no position, gets nothing from the stages, comes first, and its attention is what it
  says.
  """
  model, params, images, noise, _ = setup(encoder, cls_token=True)
  mask, pixels = mrmae.sample_mask(noise, 0.75), mrmae.normalize(images, model.mean, model.std)
  encode = jax.jit(lambda params: model.encoder.apply({"params": params}, pixels, mask))
  x, out = encode(params["encoder"])
  assert (
    x.shape == (3, 13, 24)
    and out["layers"][-1].shape == (3, 13, 24)
    and out["attention"].shape == (3, 12)
  )
  assert (np.asarray(out["attention"]).sum(1) < 1).all() and (
    np.asarray(out["attention"]) > 0
  ).all()
  norm = lambda t: (t - t.mean(-1, keepdims=True)) / np.sqrt(t.var(-1, keepdims=True) + 1e-6)
  p = params["encoder"]["norm"]
  np.testing.assert_allclose(
    x[:, 0], norm(np.asarray(out["layers"][-1])[:, 0]) * p["scale"] + p["bias"], atol=1e-5
  )
  other = jax.tree.map(lambda v: v, params["encoder"])
  other["cls_token"] = other["cls_token"] + 1
  changed, _ = encode(other)
  assert np.abs(np.asarray(changed - x)).max(-1).min() > 0  # every token sees CLS


# What is mimicked

DISTANCES = {
  "mse": lambda a, b: np.mean((a - b) ** 2, -1),
  "l1": lambda a, b: np.mean(np.abs(a - b), -1),
  "smooth_l1": lambda a, b: np.mean(
    np.where(np.abs(a - b) < 1, (a - b) ** 2, 2 * np.abs(a - b) - 1), -1
  ),
  "cosine": lambda a, b: (
    1 - np.sum(a * b, -1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
  ),
}
NORMS = {
  "layer_norm": lambda x: (
    (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
  ),
  "batch": lambda x: (x - x.mean((0, 1))) / np.sqrt(x.var((0, 1)) + 1e-5),
  "l2": lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True),
  "none": lambda x: x,
}


@pytest.fixture(scope="module")
def arrays():
  rng = np.random.default_rng(0)
  mask = mrmae.sample_mask(jnp.asarray(rng.random((2, 12), np.float32)), 0.75, 2)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32) * 2 + 1
  attention = rng.random((2, 12)).astype(np.float32)
  return (
    mask,
    mrmae.TeacherOutput(draw(2, 12, 7), draw(2, 7), attention),
    draw(4, 4, 7),
    draw(4, 12, 7),
  )


@pytest.mark.parametrize("target_norm", NORMS)
@pytest.mark.parametrize("loss", DISTANCES)
def test_distances_and_target_norms(arrays, loss, target_norm):
  mask, output, tokens, _ = arrays
  targets = NORMS[target_norm](output.features)[[0, 0, 1, 1]]  # two masks of each image
  targets = np.take_along_axis(targets, np.asarray(mask.ids_keep)[..., None], 1)
  expected = DISTANCES[loss](tokens[:, 1:], targets).mean()
  options = dict(loss=loss, target_norm=target_norm)
  np.testing.assert_allclose(
    mimic_alone(tokens[:, 1:], output, mask, **options), expected, rtol=1e-5
  )
  np.testing.assert_allclose(
    mimic_alone(tokens, output, mask, **options), expected, rtol=1e-5
  )  # CLS does not count
  np.testing.assert_allclose(
    mimic_alone(-tokens, output, mask, source="last_block", **options), expected, rtol=1e-5
  )


def test_visible_and_cls(arrays):
  mask, output, tokens, _ = arrays
  targets = np.concatenate(
    [
      output.cls[[0, 0, 1, 1]][:, None],
      np.take_along_axis(output.features[[0, 0, 1, 1]], np.asarray(mask.ids_keep)[..., None], 1),
    ],
    1,
  )
  np.testing.assert_allclose(
    mimic_alone(tokens, output, mask, tokens="visible+cls", target_norm="none"),
    np.mean((tokens - targets) ** 2),
    rtol=1e-5,
  )


def test_salient_share(arrays):
  mask, output, tokens, _ = arrays
  keep = np.asarray(mask.ids_keep)
  error = np.mean(
    (tokens[:, 1:] - np.take_along_axis(output.features[[0, 0, 1, 1]], keep[..., None], 1)) ** 2, -1
  )
  attention = np.take_along_axis(output.attention[[0, 0, 1, 1]], keep, 1)
  expected = np.mean(
    [error[row, np.argsort(-attention[row])[:2]] for row in range(4)]
  )  # the two most attended of three
  np.testing.assert_allclose(
    mimic_alone(tokens, output, mask, target_norm="none", salient_share=0.6), expected, rtol=1e-5
  )


def test_the_decoder_mimics_masked_tokens(arrays):
  """The baseline: features of the masked tokens, from the decoder; visible ones do not count."""
  mask, output, _, decoded = arrays
  error = np.mean((decoded - output.features[[0, 0, 1, 1]]) ** 2, -1)
  loss = functools.partial(
    mimic_alone, take_visible(decoded, mask.masked), mask=mask, tokens="masked", target_norm="none"
  )
  np.testing.assert_allclose(loss(output), error[np.asarray(mask.removed)].mean(), rtol=1e-5)


def test_without_pixels_the_decoder_gets_no_gradient():
  model, params, images, noise, features = setup("vit")

  @functools.partial(jax.jit, static_argnums=0)
  @functools.partial(jax.value_and_grad, argnums=1, has_aux=True)
  def loss_without_pixels(model, params):
    return loss_of(model, params, images, noise, features, pixel_weight=0.0)

  (loss, terms), grads = loss_without_pixels(model, params)
  assert set(terms) == {"mimic"}
  np.testing.assert_allclose(loss, 1.3 * terms["mimic"], rtol=1e-6)
  assert not any(np.asarray(x).any() for x in jax.tree.leaves(grads["decoder"]))
  masked, params, *_ = setup("vit", mimic=dict(tokens="masked"))
  _, grads = loss_without_pixels(masked, params)
  assert (
    np.asarray(grads["decoder"]["mask_token"]).any()
    and not np.asarray(grads["decoder"]["pred"]["kernel"]).any()
  )


def test_several_teachers_have_heads_weights_and_losses_of_their_own():
  model, params, images, noise, features = setup("sparse")
  second = mrmae.Mimic("mimic_dino", MimicHead(5), 0.4, loss="cosine", target_norm="none")
  both = model._replace(mimics=(*model.mimics, second))
  rng = np.random.default_rng(5)
  head = {
    "linear": {
      "kernel": rng.standard_normal((24, 5)).astype(np.float32),
      "bias": np.zeros(5, np.float32),
    }
  }
  params |= {"mimic_heads": params["mimic_heads"] | {"mimic_dino": head}}
  other = seen(jnp.asarray(rng.standard_normal((3, 48, 5)), jnp.float32))
  outputs = {"mimic": lambda *_: seen(features), "mimic_dino": lambda *_: other}
  loss, terms = jax.jit(
    lambda params: mrmae.pretrain_loss(params, images, noise, both, outputs, **OPTIONS)
  )(params)
  _, alone = loss_of(model, params, images, noise, features)
  np.testing.assert_allclose(terms["mimic"], alone["mimic"], rtol=1e-6)
  np.testing.assert_allclose(
    loss, 0.7 * terms["pixel"] + 1.3 * terms["mimic"] + 0.4 * terms["mimic_dino"], rtol=1e-6
  )
  assert 0 < terms["mimic_dino"] < 2


@pytest.mark.parametrize(
  "kind, names",
  [("linear", {"linear"}), ("norm_linear", {"norm", "linear"}), ("mlp", {"hidden", "linear"})],
)
def test_heads(kind, names):
  head, x = MimicHead(TEACHER_DIM, kind), jax.random.normal(jax.random.key(0), (2, 3, 24)) * 3 + 1
  params = head.init(jax.random.key(1), x)["params"]
  assert set(params) == names
  y = np.asarray(x)
  if kind == "norm_linear":
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
  if kind == "mlp":
    y = np.asarray(jax.nn.gelu(y @ params["hidden"]["kernel"], approximate=False))
  np.testing.assert_allclose(
    head.apply({"params": params}, x), y @ params["linear"]["kernel"], atol=1e-5
  )
