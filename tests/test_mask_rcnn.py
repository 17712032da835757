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
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from mrmae_jax import boxes, detection, mrmae
from mrmae_jax.errors import WeightsError
from mrmae_jax.models import ConvViT, ViT, head_attention
from mrmae_jax.models.feature_pyramid import FPN, SimpleFeaturePyramid, halve
from mrmae_jax.models.mask_rcnn import MaskRCNN
from mrmae_jax.weights import (
  detectron2,
  loaded_model,
  model_sources,
  positions,
  readers,
  tower_params,
  writers,
)
from mrmae_jax.weights.table import convert, export
from tests.helpers.goldens import close, read_tensors
from tests.helpers.models import make_detector

GOLDENS = Path(
  os.environ.get("MRMAE_DETECTION_GOLDENS", Path(__file__).parent / "goldens" / "detection")
)
FORWARD, GRADIENT, LOSS = 2e-5, 1e-4, 1e-5  # relative to the largest entry
PIXELS = 1e-3
CASES = {path.stem: json.loads(path.read_text()) for path in sorted(GOLDENS.glob("*.json"))}


def cases(is_one, fast=""):
  """Parameters of a test, the names of cases; all but the one called `fast` are variants."""
  return [
    pytest.param(name, marks=[pytest.mark.variant] * (name != fast))
    for name, case in CASES.items()
    if is_one(name, case)
  ]


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


@pytest.mark.parametrize("name", cases(lambda name, _: name.endswith("vitdet_backbone")))
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


@pytest.mark.parametrize("name", cases(lambda name, _: name.endswith("fpn_backbone")))
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


@pytest.mark.parametrize("name", cases(lambda name, _: name.endswith("simple_fpn"), "simple_fpn"))
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


def is_whole(_, case):
  return "rpn_batch" in case


TERMS = {"rpn_class": "rpn_cls", "rpn_box": "rpn_loc", "class": "cls", "box": "box_reg"}


def make_network(case):
  head = case["box_head"]
  return MaskRCNN(
    make_encoder({x: y for x, y in case.items() if x != "out_channels"}),
    case["classes"],
    channels=case["out_channels"],
    num_anchors=len(case["ratios"]),
    rpn_convs=case["rpn_convs"],
    box_convs=len(head["convs"]),
    box_hidden=head["fc"][0],
    box_size=head["pooled"],
    stages=len(case["cascade"]["iou"]) if "cascade" in case else 1,
    mask_convs=len(case["mask_head"]["convs"]),
    mask_size=case["mask_head"]["pooled"],
  )


def make_rules(case):
  train, test = case["pre_nms_topk"], case["post_nms_topk"]
  cascade = case.get("cascade", {"iou": [case["roi_iou"]], "weights": [[10, 10, 5, 5]]})
  return detection.Rules(
    anchor_sizes=tuple(case["anchor_sizes"]),
    anchor_ratios=tuple(case["ratios"]),
    anchor_sample=case["rpn_batch"],
    anchor_positive=case["rpn_positive"],
    train_proposals=(train["train"], test["train"]),
    test_proposals=(train["test"], test["test"]),
    proposal_nms=case["rpn_nms"],
    roi_iou=tuple(cascade["iou"]),
    roi_sample=case["roi_batch"],
    roi_positive=case["roi_positive"],
    box_weights=tuple(map(tuple, cascade["weights"])),
    pool_samples=case["sampling_ratio"],
    mask_samples=0,
    canonical_size=case["canonical_box_size"],
    min_score=case["score_threshold"],
    detection_nms=case["nms_threshold"],
    detections=case["detections"],
  )


def whole(name):
  """Network, parameters, rules, anchors, pixels and truth of a case, and its name table."""
  case, inputs = CASES[name], named("mask_rcnn", "in.") | named(name, "in.")
  network, rules, side = make_network(case), make_rules(case), case["img_size"]
  sizes = jnp.asarray(case["image_sizes"], jnp.int32)
  images = np.zeros((len(sizes), side, side, 3), np.uint8)
  for i, (height, width) in enumerate(case["image_sizes"]):
    images[i, :height, :width] = inputs[f"image{i}"].transpose(1, 2, 0)
  mean, std = (np.asarray(case[f"pixel_{x}"], np.float32) / 255 for x in ("mean", "std"))
  pixels = detection.hide_padding(mrmae.normalize(jnp.asarray(images), mean, std), sizes)
  whole_image = np.broadcast_to(np.float32([0, 0, side, side]), inputs["gt_boxes"].shape)
  truth = detection.Truth(
    sizes,
    jnp.asarray(inputs["gt_boxes"]),
    jnp.asarray(inputs["gt_classes"]),
    jnp.asarray(inputs["gt_masks"] * np.uint8(255)),
    jnp.asarray(whole_image),
  )
  table = detectron2.detector_table(network)
  tensors = named(name, "param.") or named("mask_rcnn", "param.")
  tree = convert(tensors, table, detectron2.detector_shapes(network, (side, side)), source=name)
  tree["encoder"]["norm"] = tower_params.fresh_norm(network.encoder.dim)
  anchors = list(map(jnp.asarray, detection.make_anchors(network, (side, side), rules)))
  return network, detectron2.join_variables(tree), rules, anchors, pixels, truth, table


def lowest_first(pixels, truth, anchors, rules):
  """Noise that draws the lowest indices first, as the cases do."""
  count = lambda n: jnp.broadcast_to(jnp.arange(n) / n, (len(pixels), n))
  objects = truth.boxes.shape[1]
  return detection.Noise(count(sum(map(len, anchors))), count(rules.train_proposals[1] + objects))


@pytest.mark.parametrize("name", cases(is_whole, "mask_rcnn"))
def test_losses_and_every_gradient(name):
  network, variables, rules, anchors, pixels, truth, table = whole(name)
  noise, expected = lowest_first(pixels, truth, anchors, rules), named(name, "out.")

  def loss(params):
    args = (pixels, truth, noise, anchors, rules)
    return network.apply({"params": params}, *args, method=detection.training_loss)

  (total, terms), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
  close(total[None], expected["loss"], LOSS, "loss")
  for ours, x in terms.items():
    term, stage = (ours[:-1], f"_stage{ours[-1]}") if ours[-1].isdigit() else (ours, "")
    close(x[None], expected[f"loss_{TERMS.get(term, term)}{stage}"], LOSS, ours)
  ours = export(detectron2.split_variables({"params": gradients}), table)
  theirs = named(name, "grad.")
  assert theirs.keys() == ours.keys()
  for key, x in theirs.items():
    close(ours[key], x, GRADIENT, f"gradient of {key}")


@pytest.mark.parametrize("name", cases(is_whole))
def test_proposals_samples_and_detections(name):
  network, variables, rules, anchors, pixels, truth, _ = whole(name)
  noise, expected = lowest_first(pixels, truth, anchors, rules), named(name, "out.")

  def parts(network):
    levels = network.features(pixels)
    logits, deltas = network.rpn_head(levels)
    args = (logits, deltas, anchors, truth.sizes)
    proposals = detection.propose(*args, rules.train_proposals, rules)
    tested = detection.propose(*args, rules.test_proposals, rules)
    objects = boxes.Objects(truth.boxes, truth.classes)
    rois = detection.sample_rois(proposals, objects, noise.proposals, network.num_classes, rules)
    found = detection.detect_objects(network, pixels, truth.sizes, anchors, rules)
    return levels, logits, deltas, proposals, tested, rois, found

  apply = jax.jit(lambda variables: network.apply(variables, method=parts))
  levels, logits, deltas, proposals, tested, rois, (found, masks) = apply(variables)
  if "p2" in expected:
    close(channels_first(pixels[:, -24:, -24:]), expected["padded_corner"], FORWARD, "padding")
    for i, x in enumerate(levels, 2):
      theirs = [expected[f"{name}.p{i}"] for name in ("rpn_logits", "rpn_deltas")]
      theirs = [y.transpose(0, 2, 3, 1).reshape(len(y), -1) for y in theirs]
      close(channels_first(x), expected[f"p{i}"], FORWARD, f"p{i}")
      close(logits[i - 2], theirs[0], FORWARD, f"logits of p{i}")
      close(deltas[i - 2].reshape(len(x), -1), theirs[1], FORWARD, f"deltas of p{i}")
  if "proposals" in expected:
    near = lambda x, key: np.testing.assert_allclose(x, expected[key], atol=PIXELS)
    near(proposals.boxes, "proposals")
    near(tested.boxes, "test_proposals")
    close(proposals.logits, expected["proposal_logits"], FORWARD, "logits of proposals")
    near(rois.boxes, "sample_boxes")
    np.testing.assert_array_equal(rois.classes, expected["sample_classes"])
  np.testing.assert_array_equal(found.classes, expected["det_classes"])
  np.testing.assert_allclose(found.boxes, expected["det_boxes"], atol=PIXELS)
  close(found.scores, expected["det_scores"], FORWARD, "scores")
  if "det_masks" in expected:
    close(masks, expected["det_masks"], FORWARD, "masks")
  assert not found.is_truncated.any()


@pytest.mark.parametrize(
  "name", cases(lambda _, case: "rpn_batch" in case and case["sampling_ratio"], "cascade_mask_rcnn")
)
def test_a_file_in_detectron2s_names_tells_the_network_and_is_written_back(tmp_path, name):
  case, path = CASES[name], tmp_path / "model.safetensors"
  tensors = named(name, "param.")
  extra = {"model.pixel_mean": np.zeros(3), "optimizer": np.zeros(1)}
  save_file({f"model.{key}": x for key, x in tensors.items()} | extra, path)
  model = readers.read_model(path)
  expected = make_network(case)
  assert model.grid == (6, 6) and model.detector.encoder.position_grid == (4, 4)
  assert model.detector == expected.clone(encoder=model.encoder)
  assert model.encoder == expected.encoder
  assert "1 constants and counters" in str(model.report) and "optimizer" in str(model.report)

  copy = tmp_path / "copy.safetensors"
  rules = detection.Rules(anchor_sizes=(8, 16, 32, 64, 128), roi_sample=64)
  classes = ("a", "b", "c")
  writers.write_model(model._replace(rules=rules, classes=classes), copy, "detectron2")
  again = readers.read_model(copy)
  assert again.rules == rules and again.classes == classes and again.detector == model.detector
  assert jax.tree.all(jax.tree.map(np.array_equal, again.params, model.params))
  written = load_file(copy)
  assert written.keys() == tensors.keys()
  for key, x in tensors.items():
    if not key.endswith("pos_embed"):  # its row for CLS, which nothing uses, is zero now
      np.testing.assert_array_equal(written[key], x)


def test_a_file_in_fpn_style_is_written_and_tells_the_network(tmp_path):
  fields = dict(window=2, global_blocks=(0,), distances="shared", learned_positions=True)
  encoder = ConvViT((4, 2, 2), (4, 8, 64), (1, 1, 2), 1, fuse_stages=False, **fields)
  network = MaskRCNN(encoder, 3, "fpn", 8, "bn", box_convs=1, box_hidden=8, mask_convs=1)
  rng = np.random.default_rng(0)
  fill = lambda x: np.asarray(rng.standard_normal(x.shape), np.float32)
  params = jax.tree.map(fill, detectron2.detector_shapes(network, (64, 64)))
  params["encoder"]["norm"] = tower_params.fresh_norm(64)
  model = loaded_model.LoadedModel(
    encoder,
    None,
    params,
    (4, 4),
    (0.5,) * 3,
    (0.5,) * 3,
    model_sources.METHOD,
    has_norm=False,
    report=None,
    detector=network,
  )
  writers.write_model(model, tmp_path / "noted.safetensors", "detectron2")
  save_file(load_file(tmp_path / "noted.safetensors"), tmp_path / "plain.safetensors")
  for name in ("noted", "plain"):
    again = readers.read_model(tmp_path / f"{name}.safetensors")
    assert again.detector == network and again.grid == (4, 4)
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, params))
  with pytest.raises(WeightsError, match="takes images of 4 x 4 tokens alone, not 2 x 4"):
    loaded_model.params_at(again, (2, 4))
  with pytest.raises(WeightsError, match="the format detectron2 is for detectors"):
    writers.write_model(loaded_model.encoder_only(model), tmp_path / "x.safetensors", "detectron2")
  with pytest.raises(WeightsError, match="has a place in the format detectron2 alone"):
    writers.write_model(loaded_model.encoder_only(model), tmp_path / "x.safetensors", "convmae")
  with pytest.raises(WeightsError, match="a detector cannot be written as 'convmae'"):
    writers.write_model(model, tmp_path / "x.safetensors", "convmae")


def test_the_encoder_of_a_detector_without_windows_keeps_its_grid_of_positions(tmp_path):
  model = make_detector()
  params = flatten_dict(model.params["encoder"])
  params = {path: x for path, x in params.items() if not path[-1].startswith("rel_pos")}
  encoder = model.encoder.clone(window=0, global_blocks=(), distances="none")
  model = model._replace(encoder=encoder, params=model.params | {"encoder": unflatten_dict(params)})
  moved = loaded_model.params_at(model, (12, 8))["encoder"]  # interpolated in each forward pass
  assert jax.tree.all(jax.tree.map(np.array_equal, moved, model.params["encoder"]))
  with pytest.raises(WeightsError, match="a grid of positions. has a place in the format"):
    writers.write_model(loaded_model.encoder_only(model), tmp_path / "x.safetensors", "timm")


@pytest.mark.parametrize("distances", ["decomposed", "shared"])
def test_the_attention_map_of_the_last_block_knows_distances(distances):
  encoder = ViT(8, 24, 2, 2, 48, cls_token=False, window=2, global_blocks=(1,), distances=distances)
  image = jnp.asarray(np.random.default_rng(0).random((1, 24, 32, 3)), jnp.float32)
  params = jax.jit(encoder.init)(jax.random.key(0), image)["params"]
  if distances == "shared":
    params["global_distances"] = params["global_distances"].at[2 * 7 + 3].set(9.0)  # distance 0
  else:  # a query's own row attracts or repels it
    params["blocks_1"]["attn"]["rel_pos_h"] = (
      params["blocks_1"]["attn"]["rel_pos_h"].at[2].set(50.0)
    )
  weights = jax.jit(lambda params: head_attention(encoder, params, image))(params)
  weights = np.asarray(weights)
  np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
  if distances == "shared":
    assert weights.shape == (1, 2, 12, 12) and (weights[0, :, range(12), range(12)] > 0.9).all()
  else:
    own_row = weights.reshape(2, 3, 4, 3, 4).sum(-1)[:, range(3), :, range(3)]
    assert (np.abs(own_row - 0.5) > 0.3).mean() > 0.9
  with pytest.raises(ValueError, match="inside of windows"):
    head_attention(encoder.clone(global_blocks=()), params, image)


def empty_network():
  """A tiny network with random parameters, rules and anchors for images of 64 pixels."""
  encoder = ConvViT((4, 2, 2), (4, 8, 16), (1, 1, 2), 2, fuse_stages=False, window=2)
  network = MaskRCNN(encoder, 3, "fpn", 8, "bn", box_convs=1, box_hidden=8, mask_convs=1)
  rules = detection.Rules(
    (8, 16, 32, 64, 128), train_proposals=(8, 16), roi_iou=(0.5,), roi_sample=8, anchor_sample=16
  )
  anchors = list(map(jnp.asarray, detection.make_anchors(network, (64, 64), rules)))
  return network, rules, anchors


def test_boxes_are_float32_in_a_network_of_bfloat16():
  network = empty_network()[0].clone(
    dtype=jnp.bfloat16
  )  # what lies between is computed as it comes

  def heads(network):
    levels = [jnp.zeros((1, side, side, 8), jnp.bfloat16) for side in (16, 8)]
    regions = [jnp.zeros((2, side, side, 8), jnp.bfloat16) for side in (7, 14)]
    boxes = network.box_heads[0](regions[0], False)
    return network.rpn_head(levels), boxes, network.mask_head(regions[1], False)

  shapes = jax.eval_shape(lambda: network.init_with_output(jax.random.key(0), method=heads)[0])
  assert {x.dtype.name for x in jax.tree.leaves(shapes)} == {"float32"}


@pytest.mark.variant
def test_images_without_objects_move_no_statistics_of_the_mask_head():
  network, rules, anchors = empty_network()
  sizes = jnp.asarray([[64, 40], [1, 1]])  # nearly nothing but padding
  pixels = detection.hide_padding(jnp.ones((2, 64, 64, 3)), sizes)
  objects = (2, 5)
  truth = detection.Truth(
    sizes,
    jnp.zeros((*objects, 4)),
    jnp.full(objects, -1),
    jnp.zeros((*objects, 56, 56), jnp.uint8),
    jnp.zeros((*objects, 4)),
  )
  keys = jax.random.split(jax.random.key(1), 2)

  @jax.jit
  def step(keys):
    variables = network.init(jax.random.key(0), pixels)
    stats = {x: y for x, y in variables.items() if x == "batch_stats"}

    def loss(params):
      noise = detection.draw_noise(keys, anchors, objects[1], rules)
      args = (pixels, truth, noise, anchors, rules)
      (total, terms), updated = network.apply(
        {"params": params, **stats}, *args, method=detection.training_loss, mutable=["batch_stats"]
      )
      return total, (terms, updated)

    return stats, jax.value_and_grad(loss, has_aux=True)(variables["params"])

  stats, ((total, (terms, updated)), gradients) = step(keys)
  assert np.isfinite(total) and terms["rpn_class"] > 0 and terms["class"] > 0
  assert terms["rpn_box"] == terms["box"] == terms["mask"] == 0
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))
  assert not any(np.any(x) for x in jax.tree.leaves(gradients["mask_head"]))
  old, new = stats["batch_stats"], updated["batch_stats"]
  assert jax.tree.all(jax.tree.map(np.array_equal, old["mask_head"], new["mask_head"]))
  assert not jax.tree.all(jax.tree.map(np.array_equal, old["box_heads_0"], new["box_heads_0"]))
