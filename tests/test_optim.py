"""Optimisers of fine-tuning and probe: every name's rate and decay as in the reference, LARS,
averaged weights.
"""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from mrmae_jax import optim, sharding
from mrmae_jax.models.convvit import ConvViT
from mrmae_jax.models.mask_rcnn import MaskRCNN
from mrmae_jax.models.upernet import Segmenter
from mrmae_jax.models.vit import ViT
from mrmae_jax.weights import convmae, detectron2, mmseg
from mrmae_jax.weights.table import dense, norm

GOLDENS = Path(__file__).parent / "goldens"

DETECTION_GOLDENS = Path(os.environ.get("MRMAE_DETECTION_GOLDENS", GOLDENS / "detection"))
SPARED = ("pos_embed", "cls_token")


def flat(tree):
  return {
    "/".join(key.key for key in path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def finetune_params(encoder, classes=7):
  """Shapes of a fine-tuned model: encoder with trainable positions, fresh norm, head."""
  shapes = dict(
    jax.eval_shape(encoder.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
  )
  leaf = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  shapes["pos_embed"] = leaf(1, 4, encoder.dim)
  return {
    "encoder": shapes,
    "fc_norm": {"scale": leaf(encoder.dim), "bias": leaf(encoder.dim)},
    "head": {"kernel": leaf(encoder.dim, classes), "bias": leaf(classes)},
  }


def options(**changes):
  """A constant rate of 0.1 with a batch of 256."""
  values = dict(
    blr=0.1,
    schedule="cosine",
    min_lr=0.1,
    warmup_epochs=0.0,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    weight_decay=0.05,
    layer_decay=0.65,
    no_decay=SPARED,
    warmup_steps=0,
    decay_of="matrices",
    full_rate=(),
    clip_norm=0.0,
    ema_decay=0.0,
  )
  return ml_collections.ConfigDict(values | changes)


SEGMENTATION = {  # encoders of the cases in segmentation/layer_decay.json
  "convmae": ConvViT(
    embed_dims=(8, 8, 16),
    depths=(2, 2, 4),
    num_heads=2,
    fuse_stages=False,
    learned_positions=True,
    relative_positions=True,
    layer_scale=True,
  ),
  "mae": ViT(
    dim=16,
    depth=4,
    num_heads=2,
    mlp_dim=64,
    learned_positions=True,
    relative_positions=True,
    layer_scale=True,
  ),
}


def optimiser(**changes):
  return optim.make_optimizer(options(**changes), 256, optim.Steps(1, 10))[0]


def test_rates_and_decay_of_every_name_equal_the_reference():
  golden = json.loads((GOLDENS / "finetune_lr_decay_0.65.json").read_text())
  encoder = ConvViT(
    embed_dims=(16, 24, 48),
    depths=(2, 1, 3),
    num_heads=3,
    fuse_stages=False,
    learned_positions=True,
  )
  params = finetune_params(encoder)
  del params["encoder"]["norm"]  # mean pooling has a norm of its own
  names = {
    f"encoder/{entry.ours}": entry.theirs[0]
    for entry in convmae.encoder_table(encoder)
    if not entry.ours.startswith("norm/")
  }
  names |= {
    entry.ours: entry.theirs[0] for entry in dense("head", "head") + norm("fc_norm", "fc_norm")
  }

  scales, decayed = flat(optim.layer_scales(params, 0.65)), flat(optim.decay_mask(params, SPARED))
  ours = {names[name]: (scale, 0.05 * decayed[name]) for name, scale in scales.items()}
  assert ours.keys() == golden.keys() and len(ours) == 97
  for name, (scale, decay) in golden.items():
    assert ours[name] == (pytest.approx(scale, rel=1e-12), decay), name


@pytest.mark.parametrize("name", SEGMENTATION)
def test_rates_and_decay_of_segmentation_equal_the_reference(name):
  golden = json.loads((GOLDENS / "segmentation" / "layer_decay.json").read_text())[name]
  segmenter = Segmenter(SEGMENTATION[name], 3, 8, 8, levels=(0, 1, 2, 3))
  images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  params = dict(jax.eval_shape(segmenter.init, jax.random.key(0), images)["params"])
  del params["encoder"]["norm"]  # of pre-training
  scales = flat(optim.layer_scales(params, golden["layer_decay"]))
  decayed = flat(optim.decay_mask(params))  # positions are decayed, as in the published runs
  ours = {}
  for entry in mmseg.segmenter_table(segmenter):
    part = entry.ours.removeprefix("segmenter/")
    if not part.startswith("batch_stats/"):
      ours[entry.theirs[0]] = (scales.pop(part), 0.05 * decayed[part])
  assert not scales and ours.keys() == golden["parameters"].keys()
  for tensor, (scale, decay) in golden["parameters"].items():
    assert ours[tensor] == (pytest.approx(scale, rel=1e-12), decay), tensor


DETECTION = {  # networks of the cases in detection/optim.json
  "vitdet_base (decay 0.7)": ViT(dim=8, depth=4, num_heads=2, mlp_dim=16, cls_token=False),
  "convmae_det (decay 0.8)": ConvViT(
    embed_dims=(4, 4, 8), depths=(2, 1, 4), num_heads=2, fuse_stages=False
  ),
}


@pytest.mark.parametrize("name", DETECTION)
def test_rates_and_decay_of_detection_equal_the_reference(name):
  golden = json.loads((DETECTION_GOLDENS / "optim.json").read_text())[name]
  encoder = DETECTION[name].clone(
    window=2, global_blocks=(1, 3), distances="decomposed", learned_positions=True
  )
  network = MaskRCNN(encoder, 3, channels=8, box_hidden=8)
  tree = detectron2.detector_shapes(network, (64, 64))
  full_rate = ("pos_embed",) if "convmae" in name else ()
  scales = optim.layer_scales(tree, float(name[-4:-1]), full_rate)
  decayed = optim.decay_mask(tree, ("pos_embed",), "not_encoder_norms")
  scales, decayed = flat(scales), flat(decayed)
  ours = {
    entry.theirs[0]: (scales[entry.ours], 0.1 * decayed[entry.ours])
    for entry in detectron2.detector_table(network)
  }
  assert ours.keys() == golden.keys()
  for tensor, (scale, decay) in golden.items():
    assert ours[tensor] == (pytest.approx(scale, rel=1e-6), decay), tensor
  assert all(flat(optim.decay_mask(tree, (), "all")).values())
  assert not any(
    x for key, x in flat(optim.decay_mask(tree, (), "not_norms")).items() if "norm" in key
  )


@pytest.mark.parametrize(
  "name, schedule, warmup",
  [
    ("schedule vitdet base: 184375 updates", "steps", 250),
    ("schedule convmae DET 25 epochs: 92187 updates", "whole_cosine", 0.005 * 92187),
  ],
)
def test_schedules_of_detection_equal_the_reference(name, schedule, warmup):
  golden = json.loads((DETECTION_GOLDENS / "optim.json").read_text())[name]
  config = options(schedule=schedule, blr=1.0, min_lr=0.0, warmup_steps=warmup)
  total = int(name.split()[-2])
  rate = jax.jit(optim.make_schedule(config, 256, optim.Steps(1000, total)))
  for step, expected in golden.items():
    assert float(rate(jnp.int32(step))) == pytest.approx(expected, rel=1e-6, abs=1e-9), step


def test_the_poly_schedule_equals_the_reference():
  golden = json.loads((GOLDENS / "segmentation" / "poly_schedule.json").read_text())
  config = options(
    schedule="poly", blr=golden["lr"], min_lr=golden["min_lr"], warmup_epochs=1500 / 80000
  )
  schedule = jax.jit(optim.make_schedule(config, 256, optim.Steps(80000, golden["steps"])))
  for step, rate in golden["lr_at"]:
    assert float(schedule(jnp.int32(step))) == pytest.approx(rate, rel=1e-5), step


def test_layers_of_a_vit():
  scales = flat(
    optim.layer_scales(finetune_params(ViT(dim=24, depth=3, num_heads=2, mlp_dim=48)), 0.5)
  )
  for part, scale in {
    "patch_embed/": 1 / 16,
    "cls_token": 1 / 16,
    "pos_embed": 1 / 16,
    "blocks_0/": 1 / 8,
    "blocks_2/": 1 / 2,
    "norm/": 1,
  }.items():
    found = {value for name, value in scales.items() if name.startswith(f"encoder/{part}")}
    assert found == {scale}, part
  assert scales["head/kernel"] == scales["fc_norm/bias"] == 1
  decayed = flat(
    optim.decay_mask(finetune_params(ViT(dim=24, depth=1, num_heads=2, mlp_dim=48)), SPARED)
  )
  assert {name for name, on in decayed.items() if on} == {
    name for name in decayed if name.endswith("kernel")
  }
  with_cls = ConvViT(embed_dims=(8, 8, 8), depths=(1, 1, 2), num_heads=2, cls_token=True)
  with_cls = flat(optim.layer_scales(finetune_params(with_cls), 0.5))
  assert with_cls["encoder/cls_token"] == with_cls["encoder/blocks2_0/fc1/kernel"] == 1 / 8


def three_layers(seed):
  draw = np.random.default_rng(seed).normal
  block = {"fc": {"kernel": draw(size=(3, 4)), "bias": draw(size=4)}}
  return {
    "encoder": {"pos_embed": draw(size=(1, 2, 3)), "blocks_0": block},
    "head": {"kernel": draw(size=(3, 5)), "bias": draw(size=5)},
  }


def test_three_steps_by_the_definition():
  """AdamW (Loshchilov and Hutter 2019) with lr * scale in place of lr, for the step and for the
  decay.
  """
  as_jax = lambda tree: jax.tree.map(jnp.float32, tree)
  tx, expected = optimiser(), flat(three_layers(0))
  params = as_jax(three_layers(0))
  state = tx.init(params)
  rate = {
    "encoder/pos_embed": 0.65**2,
    "encoder/blocks_0/fc/kernel": 0.65,
    "encoder/blocks_0/fc/bias": 0.65,
    "head/kernel": 1,
    "head/bias": 1,
  }
  m, v = ({name: np.zeros_like(p) for name, p in expected.items()} for _ in range(2))
  for t in range(1, 4):
    updates, state = tx.update(as_jax(three_layers(t)), state, params)
    params = optax.apply_updates(params, updates)
    for name, g in flat(three_layers(t)).items():
      lr, decay = 0.1 * rate[name], 0.05 * name.endswith("kernel")
      m[name] = 0.9 * m[name] + 0.1 * g
      v[name] = 0.999 * v[name] + 0.001 * g**2
      step = m[name] / (1 - 0.9**t) / (np.sqrt(v[name] / (1 - 0.999**t)) + 1e-8)
      expected[name] = (1 - lr * decay) * expected[name] - lr * step
  for name, p in flat(params).items():
    np.testing.assert_allclose(p, expected[name], atol=2e-6, err_msg=name)


def test_the_whole_schedule_is_scaled():
  """min_lr too: at the end the first layers learn with min_lr * scale, not with min_lr."""
  config = options(min_lr=0.02)
  tx, schedule = optim.make_optimizer(config, 256, optim.Steps(1, 2))
  params = {"encoder": {"blocks_0": {"bias": jnp.ones(1)}}, "head": {"bias": jnp.ones(1)}}
  state = tx.init(params)
  for step in range(4):
    updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    np.testing.assert_allclose(-updates["head"]["bias"], schedule(step), rtol=1e-4)
    np.testing.assert_allclose(
      -updates["encoder"]["blocks_0"]["bias"], 0.65 * schedule(step), rtol=1e-4
    )
  assert float(schedule(0)) == pytest.approx(0.1) and float(schedule(3)) == pytest.approx(0.02)


def test_clipping():
  """Adam does not see the scale of its first gradient, but the ratio of the second to the first."""

  def second_step(**changes):
    tx, params = optimiser(layer_decay=1.0, **changes), {"head": {"bias": jnp.zeros(2)}}
    state = tx.init(params)
    for g in ([0.3, 0.4], [30.0, 40.0]):
      updates, state = tx.update({"head": {"bias": jnp.array(g)}}, state, params)
    return np.asarray(updates["head"]["bias"])

  np.testing.assert_allclose(
    second_step(clip_norm=0.5), -0.1, rtol=1e-4
  )  # both gradients are (0.3, 0.4)
  assert np.abs(second_step() + 0.1).min() > 0.01
  np.testing.assert_array_equal(second_step(clip_norm=1e9), second_step())


def test_lars_equals_the_reference():
  golden = load_file(GOLDENS / "lars_lr0.4_wd0.01_m0.9_tc0.001.safetensors")
  tx = optim.lars(0.4, weight_decay=0.01)
  params = {name: jnp.asarray(golden[f"{name}0"]) for name in "wb"}
  state = tx.init(params)
  for step in range(5):
    updates, state = tx.update(
      {name: jnp.asarray(golden[f"g{name}{step}"]) for name in "wb"}, state, params
    )
    params = optax.apply_updates(params, updates)
    for name in "wb":
      np.testing.assert_allclose(
        params[name], golden[f"{name}{step + 1}"], atol=1e-6, err_msg=f"{name} after step {step}"
      )


def test_lars_with_a_changing_rate():
  """The rate of the step multiplies all of the momentum."""
  rates = [0.0, 0.5, 1.0]
  draw = np.random.default_rng(0).normal
  w, gradients = draw(size=(3, 4)), draw(size=(3, 3, 4))
  tx = optim.lars(lambda step: jnp.array(rates)[step], weight_decay=0.1)
  params = jnp.float32(w)
  state, momentum = tx.init(params), 0
  for rate, g in zip(rates, gradients):
    updates, state = tx.update(jnp.float32(g), state, params)
    params = optax.apply_updates(params, updates)
    g = g + 0.1 * w
    momentum = 0.9 * momentum + g * 0.001 * np.linalg.norm(w) / np.linalg.norm(g)
    w = w - rate * momentum
  np.testing.assert_allclose(params, w, atol=1e-6)
  # Weights of zero, such as a fresh head's, do move.
  zero = jnp.zeros((2, 2))
  updates, _ = optim.lars(0.5).update(zero + 1, optim.lars(0.5).init(zero), zero)
  np.testing.assert_allclose(updates, -0.5)


def test_a_grid_of_heads_is_as_many_optimizers():
  """Trust ratios, momenta and rates of each head are its own."""
  rng = np.random.default_rng(0)
  grid = (0.5, 1.0, 3.0)
  start = {
    "kernel": rng.standard_normal((3, 4, 2)) * np.array([1, 5, 0.2])[:, None, None],
    "bias": rng.standard_normal((3, 2)),
  }
  params = jax.tree.map(jnp.float32, {"head": start})
  config = options(blr=0.4, min_lr=0.0, warmup_epochs=2.0)
  schedule = optim.make_schedule(config, 256, optim.Steps(1, 6))
  tx = optim.over_grid(optim.lars(schedule, 0.01), grid)
  alone = [optim.lars(lambda step, f=f: f * schedule(step), 0.01) for f in grid]
  take = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
  singles = [take(params["head"], i) for i in range(3)]
  state, states = tx.init(params), [t.init(p) for t, p in zip(alone, singles)]
  for step in range(6):
    gradient = jax.tree.map(lambda p: jnp.cos(3 * p + step), params)
    updates, state = tx.update(gradient, state, params)
    params = optax.apply_updates(params, updates)
    for i, t in enumerate(alone):
      update, states[i] = t.update(take(gradient["head"], i), states[i], singles[i])
      singles[i] = optax.apply_updates(singles[i], update)
      close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6)
      jax.tree.map(close, take(params["head"], i), singles[i])
  assert np.abs(singles[0]["kernel"] - start["kernel"][0]).max() > 1e-4


def test_average_of_the_parameters():
  tx = optimiser(ema_decay=0.6)
  plain = optimiser()
  params = {"head": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}}
  mesh = sharding.make_mesh(fsdp=8)
  state = jax.jit(tx.init)(params)
  assert optim.averaged_params(plain.init(params)) is None
  shardings = sharding.fsdp_shardings(
    state, mesh, min_size=1
  )  # the average is placed like any other array
  assert jax.tree.structure(shardings) == jax.tree.structure(state)

  def run(tx, params, state):
    path = [params]
    step = jax.jit(
      lambda p, s, g: (lambda u, s: (optax.apply_updates(p, u), s))(*tx.update(g, s, p)),
      donate_argnums=1,
    )
    for t in range(20):  # the warm-up reaches 0.6 after 13
      params, state = step(params, state, jax.tree.map(lambda p: jnp.cos(p + t), params))
      path.append(params)
    return path, state

  path, state = run(tx, params, state)
  expected = jax.tree.map(np.asarray, path[0])
  for t, new in enumerate(path[1:]):
    d = min(0.6, (1 + t) / (10 + t))
    expected = jax.tree.map(lambda a, p, d=d: d * a + (1 - d) * np.asarray(p), expected, new)
  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(a, e, atol=1e-6), optim.averaged_params(state), expected
  )
  without, _ = run(plain, params, plain.init(params))  # training does not notice
  jax.tree.map(np.testing.assert_array_equal, path[-1], without[-1])
