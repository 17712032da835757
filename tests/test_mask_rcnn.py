"""Mask R-CNN on ViT and ConvViT equals detectron2, on weights in its names.

Each case is NAME.json (dimensions) and NAME.safetensors (inputs, weights, outputs, gradients) in
the folder MRMAE_DETECTION_GOLDENS, by default tests/goldens/detection.
"""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mrmae_jax.models import ConvViT, ViT
from mrmae_jax.models.feature_pyramid import FPN, SimpleFeaturePyramid, halve
from mrmae_jax.weights import detectron2, positions
from mrmae_jax.weights.table import convert, export
from tests.helpers.goldens import close, read_tensors

GOLDENS = Path(
  os.environ.get("MRMAE_DETECTION_GOLDENS", Path(__file__).parent / "goldens" / "detection")
)
FORWARD, GRADIENT = 2e-5, 1e-4  # relative to the largest entry
CASES = {path.stem: json.loads(path.read_text()) for path in sorted(GOLDENS.glob("*.json"))}


def named(name, prefix):
  return read_tensors(GOLDENS, name, prefix)


def channels_last(x):
  return jnp.asarray(np.asarray(x).transpose(0, 2, 3, 1))


def channels_first(x):
  return np.asarray(x).transpose(0, 3, 1, 2)


def make_encoder(case):
  """The encoder of a case."""
  grid = (case.get("pretrain_img_size", case["img_size"]) // 16,) * 2
  fields = dict(
    num_heads=case["num_heads"],
    window=case["window_size"],
    global_blocks=tuple(case["global_blocks"]),
    learned_positions=True,
    position_grid=grid,
  )
  if "embed_dims" not in case:
    width = case["dim"]
    fields |= dict(patch_size=case["patch_size"], dim=width, depth=case["depth"], cls_token=False)
    return ViT(mlp_dim=width * case.get("mlp_ratio", 4), distances="decomposed", **fields)
  return ConvViT(
    tuple(case["patch_sizes"]),
    tuple(case["embed_dims"]),
    tuple(case["depths"]),
    fuse_stages=False,
    conv_eps=case.get("eps_conv_blocks", 1e-6),
    distances="shared" if "out_channels" in case else "decomposed",
    **fields,
  )


def read_params(tensors, table, expected, name):
  """Parameters of a case from tensors in detectron2's names."""
  return convert(tensors, table, expected, source=name)


def encoder_shapes(encoder, image):
  shapes = jax.eval_shape(encoder.init, jax.random.key(0), image)["params"]
  return {path: x for path, x in shapes.items() if path != "norm"}


def last_map(encoder, params, image):
  norm = {"scale": jnp.ones(encoder.dim), "bias": jnp.zeros(encoder.dim)}
  _, out = encoder.apply({"params": params | {"norm": norm}}, image)
  grid = tuple(side // encoder.patch_size for side in image.shape[1:3])
  return out["layers"][-1].reshape(len(image), *grid, -1), out


def check_gradients(name, kind, ours, image_gradient, noise=()):
  theirs = named(name, f"grad.{kind}.")
  close(channels_first(image_gradient), theirs.pop("image"), GRADIENT, "gradient of the image")
  for key, x in theirs.items():
    if key in noise:
      largest = np.abs(theirs[key.replace("fc2", "fc1")]).max()
      assert np.abs(ours[key]).max() < GRADIENT * largest, key
    else:
      close(ours[key], x, GRADIENT, f"gradient of {key}")
  return theirs


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("vitdet_backbone")])
def test_backbones_in_vitdet_style(name):
  case, inputs, expected = CASES[name], named(name, "in."), named(name, "out.")
  encoder = make_encoder(case)
  image, wide = channels_last(inputs["image"]), channels_last(inputs["image_rect"])
  table = detectron2.encoder_table(encoder)
  params = read_params(named(name, "param."), table, encoder_shapes(encoder, image), name)
  cotangent = channels_last(inputs["cotangent_square.last_feat"])

  def loss(params, image):
    x, _ = last_map(encoder, params, image)
    return (x * cotangent).sum(), x

  (_, x), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, image)
  close(channels_first(x), expected["square.last_feat"], FORWARD, "square")
  theirs = check_gradients(name, "square", export(gradients[0], table), gradients[1])
  assert theirs.keys() == {tensor for entry in table for tensor in entry.theirs}

  params = positions.fit_distances(params, encoder_shapes(encoder, wide))
  x = jax.jit(lambda image: last_map(encoder, params, image)[0])(wide)
  close(channels_first(x), expected["rect.last_feat"], FORWARD, "rect")


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("fpn_backbone")])
def test_backbones_in_fpn_style(name):
  case, inputs, expected = CASES[name], named(name, "in."), named(name, "out.")
  encoder, pyramid = make_encoder(case), FPN(case["out_channels"])
  image = channels_last(inputs["image"])
  table = [
    entry._replace(ours=f"encoder/{entry.ours}", theirs=(f"bottom_up.{entry.theirs[0]}",))
    for entry in detectron2.encoder_table(encoder)
  ] + detectron2.fpn_table("bn")

  def levels(variables, image, **options):
    x, out = last_map(encoder, variables["encoder"], image)
    maps = [out["stage1"], out["stage2"], x, halve(x)]
    stats = variables["batch_stats"].get("pyramid", {})
    variables = {"params": variables["detector"]["pyramid"], "batch_stats": stats}
    return pyramid.apply(variables, maps, **options), maps

  shapes = jax.eval_shape(
    pyramid.init, jax.random.key(0), [channels_last(expected[f"bottom_up.s{i}"]) for i in range(4)]
  )
  shapes = {
    "encoder": encoder_shapes(encoder, image),
    "detector": {"pyramid": shapes["params"]},
    "batch_stats": {"pyramid": shapes["batch_stats"]},
  }
  params = read_params(named(name, "param."), table, shapes, name)
  stats = params.pop("batch_stats")

  def loss(params, image):
    (x, _), maps = levels(
      params | {"batch_stats": stats}, image, train=True, mutable=["batch_stats"]
    )
    cotangents = [channels_last(inputs[f"cotangent_train.p{i}"]) for i in range(2, 7)]
    return sum((a * b).sum() for a, b in zip(x, cotangents)), (x, maps)

  (_, (x, maps)), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, image)
  evaluated, _ = jax.jit(levels)(params | {"batch_stats": stats}, image)
  for i, y in enumerate(maps):
    close(channels_first(y), expected[f"bottom_up.s{i}"], FORWARD, f"s{i}")
  for i, (y, z) in enumerate(zip(x, evaluated), 2):
    close(channels_first(y), expected[f"train.p{i}"], FORWARD, f"train.p{i}")
    close(channels_first(z), expected[f"eval.p{i}"], FORWARD, f"eval.p{i}")
  ours = export({**gradients[0], "batch_stats": stats}, table)
  # Zero in exact arithmetic: the batch norms behind it take out any constant.
  noise = f"bottom_up.blocks3.{encoder.depth - 1}.mlp.fc2.bias"
  check_gradients(name, "train", ours, gradients[1], [noise])


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("simple_fpn")])
def test_simple_feature_pyramid(name):
  case, inputs, expected = CASES[name], named(name, "in."), named(name, "out.")
  pyramid, x = SimpleFeaturePyramid(case["out_channels"]), channels_last(inputs["map"])
  table = detectron2.simple_pyramid_table("ln")
  shapes = jax.eval_shape(pyramid.init, jax.random.key(0), x)["params"]
  params = read_params(named(name, "param."), table, {"detector": {"pyramid": shapes}}, name)

  def loss(params, x):
    levels = pyramid.apply({"params": params["detector"]["pyramid"]}, x)
    cotangents = [channels_last(inputs[f"cotangent_any.p{i}"]) for i in range(2, 7)]
    return sum((a * b).sum() for a, b in zip(levels, cotangents)), levels

  (_, levels), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)
  for i, level in enumerate(levels, 2):
    close(channels_first(level), expected[f"any.p{i}"], FORWARD, f"p{i}")
  theirs = check_gradients(name, "any", export(gradients[0], table), gradients[1])
  assert theirs.keys() == {tensor for entry in table for tensor in entry.theirs}
