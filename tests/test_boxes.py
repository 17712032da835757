"""The operations of Mask R-CNN equal those of detectron2, torchvision and pycocotools.

Each case is NAME.json (dimensions) and NAME.safetensors (inputs, outputs, gradients) in the folder
MRMAE_DETECTION_GOLDENS, by default tests/goldens/detection.
"""

import functools
import json
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from mrmae_jax import boxes as bx
from tests.helpers.goldens import close

GOLDENS = Path(
  os.environ.get("MRMAE_DETECTION_GOLDENS", Path(__file__).parent / "goldens" / "detection")
)
FORMULA, FORWARD = 1e-6, 1e-5  # relative to the largest entry


@functools.cache
def case(name):
  """Returns the dimensions and the tensors of a case."""
  if not (GOLDENS / f"{name}.safetensors").exists():
    pytest.skip(f"no {name} in {GOLDENS}")
  return json.loads((GOLDENS / f"{name}.json").read_text()), load_file(
    GOLDENS / f"{name}.safetensors"
  )


def matching(tensors, pattern):
  """Yields (match, tensor) of the tensors whose whole name fits a pattern."""
  found = [(m, x) for key, x in tensors.items() if (m := re.fullmatch(pattern, key))]
  assert found, f"no tensor {pattern}"
  return found


def channels_last(x):
  return jnp.asarray(np.moveaxis(x, -3, -1))


# --- boxes ---


def test_anchors():
  dims, tensors = case("anchors")
  make = functools.partial(bx.make_anchors, strides=dims["strides"], sizes=dims["sizes"])
  anchors = make(dims["grids"], ratios=dims["ratios"])
  for level, x in enumerate(anchors):
    close(x, tensors[f"out.p{level + 2}"], FORMULA, f"p{level + 2}")


def test_box_coding():
  dims, tensors = case("box_coding")
  source, classes = tensors["in.src"], dims["classes"]
  deltas = tensors["in.deltas"].reshape(-1, classes, 4)
  assert bx.MAX_LOG_SCALE == dims["scale_clamp"]
  for name, weights in dims["weights"].items():
    encoded = jax.jit(bx.encode)(source, tensors["in.target"], weights)
    close(encoded, tensors[f"out.encoded_{name}"], FORWARD, f"encoded {name}")
    decoded = jax.jit(bx.decode)(deltas, source[:, None], weights)
    expected = tensors[f"out.decoded_{name}"].reshape(deltas.shape)
    close(decoded, expected, FORMULA, f"decoded {name}")
    if name == "w30":
      clipped = bx.clip(decoded[:, 0], jnp.asarray(dims["clip"]))
      close(clipped, tensors["out.clipped"], FORMULA, "clipped")
      np.testing.assert_array_equal(bx.is_nonempty(clipped), tensors["out.nonempty"])
  total = lambda x: jnp.vdot(
    bx.decode(x, source[:, None], dims["weights"]["w10"]), tensors["in.cotangent"].reshape(x.shape)
  )
  close(
    jax.jit(jax.grad(total))(deltas).reshape(len(source), -1),
    tensors["grad.deltas_w10"],
    FORWARD,
    "gradient",
  )


def test_iou():
  _, tensors = case("iou")
  iou = jax.jit(bx.pairwise_iou)(tensors["in.boxes1"], tensors["in.boxes2"])
  close(iou, tensors["out.iou"], FORMULA, "IoU")


def test_levels():
  dims, tensors = case("levels")
  count = dims["max_level"] - dims["min_level"] + 1
  middle = dims["canonical_level"] - dims["min_level"]
  levels = jax.jit(bx.levels, static_argnums=1)
  for found, x in matching(tensors, r"in\.(\w+)"):
    expected = tensors[f"out.{found[1]}"]
    np.testing.assert_array_equal(
      levels(jnp.asarray(x), count, dims["canonical_size"], middle), expected
    )


# --- suppression, matching, sampling ---


def test_nms():
  _, tensors = case("nms")
  boxes, scores, valid, classes = (
    jnp.asarray(tensors[f"in.{x}"]) for x in ("boxes", "scores", "valid", "classes")
  )
  nms = jax.jit(bx.nms)
  for found, expected in matching(tensors, r"out\.keep(_by_class)?_([\d.]+)"):
    groups = classes if found[1] else None
    keep = np.asarray(nms(boxes, scores, valid, float(found[2]), groups))
    order = np.argsort(-np.asarray(scores), kind="stable")
    np.testing.assert_array_equal(order[keep[order]], expected[expected >= 0], found[0])


def test_nms_of_a_long_chain():
  # Each box suppresses the next, so that every other one survives: the slowest fixed point.
  left = jnp.arange(101.0)
  chain = jnp.stack([left, 0 * left, left + 2, 0 * left + 1], axis=-1)
  keep = jax.jit(bx.nms)(chain, -left, left < 100, 0.3)
  np.testing.assert_array_equal(keep, [i % 2 == 0 and i < 100 for i in range(101)])


def test_matching():
  dims, tensors = case("matching")
  anchors, boxes = tensors["in.anchors"], tensors["in.gt"]
  # Rows of padding around the objects, one of which overlaps anchors.
  padded = np.concatenate([boxes, boxes[:1], np.zeros((2, 4), np.float32)])
  objects = bx.Objects(padded, np.array([0] * len(boxes) + [-1] * 3))
  nothing = objects._replace(classes=np.full(len(padded), -1))
  for name in ("rpn", "roi"):
    low, high = dims["thresholds"][name][0], dims["thresholds"][name][-1]
    match = jax.jit(
      functools.partial(bx.match, anchors, low=low, high=high, every_object=name == "rpn")
    )
    index, labels = match(objects)
    np.testing.assert_array_equal(index, tensors[f"out.{name}_index"])
    np.testing.assert_array_equal(labels, tensors[f"out.{name}_label"])
    np.testing.assert_array_equal(match(nothing)[1], tensors[f"out.{name}_label_no_gt"])


def test_an_object_that_no_anchor_touches_labels_none():
  far = bx.Objects(jnp.array([[900.0, 900, 910, 910], [0, 0, 0, 0]]), jnp.array([0, 0]))
  anchors = jnp.array([[0.0, 0, 10, 10], [5, 5, 20, 20]])
  match = jax.jit(functools.partial(bx.match, every_object=True))
  assert not np.asarray(match(anchors, far, 0.3, 0.7)[1]).any()


def test_a_sample_takes_the_least_noise_and_fills_up_with_negatives():
  labels = jnp.array([0, 1, -1, 1, 0, 1, 0, 0])
  noise = np.arange(8, dtype=np.float32) / 8
  sample = jax.jit(bx.sample, static_argnums=(2, 3))
  indices, drawn = sample(labels, noise, 5, 2)
  assert indices.tolist() == [1, 3, 0, 4, 6] and drawn.tolist() == [1, 1, 0, 0, 0]
  indices, drawn = sample(labels, noise[::-1], 5, 2)
  assert indices.tolist() == [5, 3, 7, 6, 4]
  indices, drawn = sample(labels, noise, 12, 6)
  assert indices[:7].tolist() == [1, 3, 5, 0, 4, 6, 7]
  assert drawn.tolist() == [1] * 3 + [0] * 4 + [-1] * 5


def test_an_object_is_a_candidate_of_its_own():
  objects = bx.Objects(jnp.array([[2.0, 2, 8, 8], [0, 0, 0, 0]]), jnp.array([1, -1]))
  proposals = bx.Proposals(
    jnp.array([[20.0, 20, 30, 30], [2, 2, 8, 7], [2, 2, 8, 8]]),
    jnp.zeros(3),
    jnp.array([True, True, False]),
  )
  draw = functools.partial(bx.sample_rois, threshold=0.5, num_classes=3, count=4, max_foreground=2)
  rois = jax.jit(draw)(proposals, objects, jnp.arange(5) / 5)
  assert rois.classes.tolist() == [1, 1, 3, -1]
  assert rois.boxes.tolist() == [[2, 2, 8, 7], [2, 2, 8, 8], [20, 20, 30, 30], [0, 0, 0, 0]]


def test_proposals_that_are_not_finite_are_left_out():
  anchors = jnp.array([[0.0, 0, 10, 10], [20, 20, 30, 30], [40, 0, 50, 10], [90, 90, 95, 95]])
  deltas = jnp.zeros((4, 4)).at[1, 0].set(jnp.nan)
  logits = jnp.array([1.0, 5, jnp.inf, 3])
  size = jnp.array([60, 80])
  found = jax.jit(functools.partial(bx.propose, per_level=4, count=6, threshold=0.7))(
    [logits], [deltas], [anchors], size
  )
  assert found.is_valid.tolist() == [True] + [False] * 5  # the last anchor lies outside
  assert found.boxes[0].tolist() == [0, 0, 10, 10] and not found.boxes[1:].any()


def test_the_best_proposals_are_those_of_the_highest_logits():
  # In float32 the probability of each of them is 1.
  anchors = jnp.array([[0.0, 0, 10, 10], [20, 20, 30, 30], [40, 0, 50, 10]])
  propose = functools.partial(bx.propose, per_level=1, count=1, threshold=0.7)
  found = jax.jit(propose)(
    [jnp.array([30.0, 40, 35])], [jnp.zeros((3, 4))], [anchors], jnp.array([60, 80])
  )
  assert found.boxes.tolist() == [[20, 20, 30, 30]]


def test_detections_take_every_class_and_tell_what_they_cut():
  boxes = jnp.array([[[0.0, 0, 10, 10]], [[1, 0, 10, 10]], [[40, 40, 70, 90]]])
  scores = jnp.array([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.04, 0.06, 0.9]])
  detect = jax.jit(
    functools.partial(
      bx.detect, is_valid=jnp.ones(3, bool), size=jnp.array([60, 80]), min_score=0.05, threshold=0.5
    ),
    static_argnames=("count", "candidates"),
  )
  found = detect(boxes, scores, count=4)
  np.testing.assert_allclose(found.scores, [0.6, 0.4, 0.06, 0])
  assert found.classes.tolist() == [0, 1, 1, -1]
  assert found.boxes.tolist() == [[0, 0, 10, 10], [1, 0, 10, 10], [40, 40, 70, 60], [0, 0, 0, 0]]
  assert not found.is_truncated
  assert detect(boxes, scores, count=4, candidates=2).is_truncated
  assert not detect(boxes, scores, count=1, candidates=2).is_truncated


# --- pooling and masks ---


def pull_back(function, maps, cotangent):
  """Returns pooled features and the gradient for maps, compiled once."""

  @jax.jit
  def both(maps, cotangent):
    pooled, pull = jax.vjp(function, maps)
    return pooled, pull(cotangent)[0]

  return both(maps, channels_last(cotangent))


def test_roi_align_of_one_map():
  dims, tensors = case("roi_align")
  image, rois = tensors["in.rois"][:, 0].astype(int), tensors["in.rois"][:, 1:]
  maps = channels_last(tensors["in.p3"])
  stride = dims["image"][0] // maps.shape[1]

  def pool(maps, size, samples):
    one = lambda x: bx.roi_align([x], (stride,), rois, jnp.zeros(len(rois), int), size, samples)
    pooled = jax.vmap(one)(maps)  # every box from every image, of which one counts
    return pooled[image, jnp.arange(len(rois))]

  for found, expected in matching(tensors, r"out\.single_(?:(\d+)x(\d+)_)?sr(\d)"):
    rows, columns, samples = (found[i] and int(found[i]) for i in (1, 2, 3))
    size = (rows, columns) if rows else expected.shape[-2:]
    of_maps = functools.partial(pool, size=size, samples=samples)
    if rows:
      pooled = jax.jit(of_maps)(maps)
    else:
      pooled, pulled = pull_back(of_maps, maps, tensors["in.cotangent_single"])
      gradient = channels_last(tensors[f"grad.single_sr{samples}"])
      close(pulled, gradient, FORWARD, f"gradient of {found[0]}")
    close(pooled, channels_last(expected), FORWARD, found[0])


def test_roi_align_of_a_pyramid():
  dims, tensors = case("roi_align")
  order = tensors["out.order"]
  image, rois = tensors["in.rois"][order, 0].astype(int), tensors["in.rois"][order, 1:]
  maps = [channels_last(x) for _, x in matching(tensors, r"in\.p\d")]
  strides = [dims["image"][0] // x.shape[1] for x in maps]

  def pool(maps, size, samples, canonical):
    level = bx.levels(rois, len(strides), canonical)
    one = lambda x: bx.roi_align(x, strides, rois, level, size, samples)
    return jax.vmap(one)(maps)[image, jnp.arange(len(rois))]

  for found, expected in matching(tensors, r"out\.multi_\d+_sr(\d)(?:_canonical(\d+))?"):
    samples, canonical = int(found[1]), float(found[2] or 224)
    suffix = f"_canonical{found[2]}" if found[2] else ""
    levels = jax.jit(bx.levels, static_argnums=1)(rois, len(strides), canonical)
    np.testing.assert_array_equal(levels, tensors[f"out.levels{suffix}"])
    arguments = dict(size=expected.shape[-2:], samples=samples, canonical=canonical)
    of_maps = functools.partial(pool, **arguments)
    gradient = tensors.get(f"{found[0].replace('out', 'grad')}.p2")
    if gradient is None:
      pooled = jax.jit(of_maps)(maps)
    else:
      pooled, pulled = pull_back(of_maps, maps, tensors["in.cotangent_multi_7"])
      close(pulled[0], channels_last(gradient), FORWARD, f"gradient of {found[0]}")
    close(pooled, channels_last(expected), FORWARD, found[0])


def test_whole_numbers_of_cells_get_no_sample_more():
  # A quotient of float32 that is rounded up would give one sample more than detectron2.
  ramp = jnp.square(jnp.arange(64.0))[:, None] * jnp.ones(64)
  matrix = jax.jit(bx.bin_matrix, static_argnums=(2, 3, 4))
  for cells in (7, 21, 49):
    adaptive, fixed = (matrix(0.25, 0.25 + cells, 64, 7, samples) for samples in (0, cells // 7))
    np.testing.assert_allclose(adaptive @ ramp, fixed @ ramp, rtol=1e-6)


def test_mask_targets():
  _, tensors = case("mask_targets")
  bits, boxes = tensors["in.bits"][tensors["in.index"]], tensors["in.boxes"]
  frames = np.tile(np.float32([0, 0, *bits.shape[:0:-1]]), (len(bits), 1))
  for samples, soft in ((0, tensors["out.bit_soft_adaptive"]), (2, tensors["out.bit_soft_sr2"])):
    make = jax.jit(functools.partial(bx.mask_targets, size=soft.shape[-1], samples=samples))
    targets = make(bits * np.uint8(255), frames, boxes)
    is_clear = np.abs(soft - 0.5) > FORWARD
    np.testing.assert_array_equal(np.asarray(targets)[is_clear], (soft >= 0.5)[is_clear])
  assert (~is_clear).mean() < 0.05


def test_mask_paste():
  dims, tensors = case("mask_paste")
  size = dims["height"], dims["width"]
  for mask, box, soft, hard in zip(
    *(tensors[x] for x in ("in.masks", "in.boxes", "out.soft", "out.pasted"))
  ):
    pasted = bx.paste_mask(mask, box, size)
    close(pasted, soft, FORWARD, "soft mask", largest=1)
    is_clear = np.abs(soft - dims["threshold"]) > FORWARD
    np.testing.assert_array_equal((pasted >= dims["threshold"])[is_clear], hard[is_clear])


# --- losses ---


def compare(name, loss, gradient, x, expected):
  value, ours = jax.jit(jax.value_and_grad(loss))(jnp.asarray(x))
  close(value, expected, FORWARD, name)
  close(ours, gradient, FORWARD, f"gradient of {name}")


def test_losses_of_the_region_proposal_network():
  dims, tensors = case("losses")
  labels, count = tensors["in.rpn_labels"], dims["rpn_normaliser"] // dims["images"]
  total = lambda x: jax.vmap(lambda *row: bx.anchor_loss(*row, count))(x, labels).mean()
  compare(
    "loss_rpn_cls",
    total,
    tensors["grad.rpn_logits"],
    tensors["in.rpn_logits"],
    tensors["out.loss_rpn_cls"],
  )
  smooth = functools.partial(bx.l1, beta=1 / 9)  # the name has two of its digits
  distances = {"l1": bx.l1, "giou": bx.giou, "smooth_beta0.11": smooth}
  for found, expected in matching(tensors, r"out\.loss_rpn_loc_(.*)"):
    distance = distances[found[1]]
    loss = lambda deltas, targets, labels: bx.box_loss(
      deltas, tensors["in.anchors"], targets, labels == 1, count, distance=distance
    )
    total = lambda x: jax.vmap(loss)(x, tensors["in.rpn_matched"], labels).mean()
    gradient = tensors[f"grad.rpn_deltas_{found[1]}"]
    compare(found[0], total, gradient, tensors["in.rpn_deltas"], expected)


def test_losses_of_boxes():
  dims, tensors = case("losses")
  num_classes, classes = dims["classes"], tensors["in.roi_classes"]
  compare(
    "loss_cls",
    lambda x: bx.class_loss(x, classes),
    tensors["grad.roi_scores"],
    tensors["in.roi_scores"],
    tensors["out.loss_cls"],
  )
  boxes, targets = tensors["in.roi_proposals"], tensors["in.roi_gt_boxes"]
  is_foreground = classes < num_classes

  def loss(deltas, weights=(10, 10, 5, 5), **kwargs):
    return bx.box_loss(deltas, boxes, targets, is_foreground, len(boxes), weights, **kwargs)

  def of_true_class(deltas):
    by_class = deltas.reshape(len(deltas), num_classes, 4)
    return by_class[jnp.arange(len(deltas)), jnp.minimum(classes, num_classes - 1)]

  deltas = tensors["in.roi_deltas"]
  total = lambda x: loss(of_true_class(x))
  compare("loss_box_reg", total, tensors["grad.roi_deltas"], deltas, tensors["out.loss_box_reg"])
  agnostic, by_giou = jax.jit(
    lambda x: (loss(x[:, :4], (20, 20, 10, 10)), loss(of_true_class(x), distance=bx.giou))
  )(deltas)
  close(agnostic, tensors["out.loss_box_reg_agnostic_w20"], FORWARD, "class-agnostic")
  close(by_giou, tensors["out.loss_box_reg_giou"], FORWARD, "GIoU")


def test_loss_of_masks():
  _, tensors = case("losses")
  bits, boxes = tensors["in.mask_bits"] * np.uint8(255), tensors["in.mask_boxes"]
  frames = np.tile(np.float32([0, 0, *bits.shape[:0:-1]]), (len(bits), 1))
  targets = jax.jit(functools.partial(bx.mask_targets, samples=0))(bits, frames, boxes)
  np.testing.assert_array_equal(targets, tensors["out.mask_targets"])
  compare(
    "loss_mask",
    lambda x: bx.mask_loss(x, targets, tensors["in.mask_classes"]),
    channels_last(tensors["grad.mask_logits"]),
    channels_last(tensors["in.mask_logits"]),
    tensors["out.loss_mask"],
  )


def test_an_image_without_objects_has_finite_losses_and_gradients():
  nothing = bx.Objects(np.zeros((3, 4), np.float32), np.full(3, -1))
  anchors = bx.make_anchors([(2, 2)], (16,), (20,))[0]
  rois = np.zeros((4, 4), np.float32)
  none = np.full(4, -1)

  def loss(x):
    _, labels = bx.match(anchors, nothing, 0.3, 0.7, every_object=True)
    masks = bx.mask_targets(jnp.zeros((4, 8, 8), jnp.uint8), rois, rois, 6)
    return (
      bx.anchor_loss(x["anchors"][:, 0], labels, 8)
      + bx.box_loss(x["anchors"], anchors, anchors * 0, labels == 1, 8)
      + bx.class_loss(x["classes"], none)
      + bx.box_loss(x["deltas"], rois, rois, none >= 0, 1, (10, 10, 5, 5))
      + bx.box_loss(x["deltas"], rois, rois, none >= 0, 1, distance=bx.giou)
      + bx.mask_loss(x["masks"], masks, none)
    )

  rng = np.random.default_rng(0)
  shapes = {"anchors": (12, 4), "classes": (4, 3), "deltas": (4, 4), "masks": (4, 6, 6, 2)}
  x = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
  value, gradient = jax.jit(jax.value_and_grad(loss))(x)
  gradient = jax.tree.map(np.asarray, gradient)
  assert np.isfinite(value) and all(np.isfinite(x).all() for x in gradient.values())
  assert gradient["anchors"].any() and not gradient["classes"].any()
  assert not gradient["deltas"].any() and not gradient["masks"].any()
