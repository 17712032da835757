"""Mask R-CNN on one page: its loss, and the objects that it detects.

Every position of five levels has A anchors. The region proposal network tells which of them hold an
object, and moves them; the best are the *proposals*. A box head tells the class of each proposal
and moves it again; a mask head draws the object inside of it. In training a random sample of the
anchors, and one of the proposals, count. In a cascade three box heads work one after the other,
each on the boxes of the one before.

The functions take a network whose parameters are bound: `network.apply(variables, ...,
method=training_loss)` hands it over. Shapes: B images, M objects at most, K classes; class K is the
background. Losses are means over the images of each image's own mean, so that they do not depend on
how a batch is divided.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mrmae_jax import boxes
from mrmae_jax.boxes import Detections, Objects, Proposals, Rois
from mrmae_jax.models.mask_rcnn import MaskRCNN

ROI_LEVELS = 4  # heads read p2 to p5; p6 is for anchors


class Rules(NamedTuple):
  """The numbers of Mask R-CNN; the defaults are detectron2's for 1024 x 1024 pixels.

  Attributes:
    anchor_sizes: square root of an anchor's area, for each level.
    anchor_ratios: height / width of the anchors of a position.
    anchor_iou: below the first an anchor shows background, from the second on an object.
    anchor_sample, anchor_positive: anchors of an image that count, and the largest share of them
      that shows objects.
    train_proposals, test_proposals: the best of each level, and of all of them after suppression.
    proposal_nms: largest IoU of two proposals of one level.
    roi_iou: IoU from which on a proposal shows an object, for each stage.
    roi_sample, roi_positive: as for anchors, of the proposals.
    box_weights: factors of the deltas, for each stage.
    pool_samples, mask_samples: of a bin and axis, of features and of the true masks; 0: as many as
      positions, see `boxes.bin_matrix`.
    canonical_size: side of a box that is pooled from p4.
    min_score: detections have more.
    detection_nms: largest IoU of two detections of one class.
    detections: largest number of an image's detections.
  """

  anchor_sizes: tuple[float, ...] = (32, 64, 128, 256, 512)
  anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
  anchor_iou: tuple[float, float] = (0.3, 0.7)
  anchor_sample: int = 256
  anchor_positive: float = 0.5
  train_proposals: tuple[int, int] = (2000, 1000)
  test_proposals: tuple[int, int] = (1000, 1000)
  proposal_nms: float = 0.7
  roi_iou: tuple[float, ...] = (0.5, 0.6, 0.7)
  roi_sample: int = 512
  roi_positive: float = 0.25
  box_weights: tuple[tuple[float, ...], ...] = ((10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15))
  pool_samples: int = 2
  mask_samples: int = 2
  canonical_size: float = 224
  min_score: float = 0.05
  detection_nms: float = 0.5
  detections: int = 100


class Noise(NamedTuple):
  """Decides which anchors and proposals count: float32 in [0, 1), least noise first.

  Attributes:
    anchors: [B, number of anchors].
    proposals: [B, proposals + M], the objects' own boxes last.
  """

  anchors: jax.Array
  proposals: jax.Array


class Truth(NamedTuple):
  """The objects of B images.

  Attributes:
    sizes: int32 [B, 2], (height, width) of the images without padding.
    boxes: float32 [B, M, 4].
    classes: int32 [B, M]; -1 fills up.
    masks: uint8 [B, M, h, w], the content of `frames`; 255 inside of the object.
    frames: float32 [B, M, 4], the part of the image that a mask shows.
  """

  sizes: jax.Array
  boxes: jax.Array
  classes: jax.Array
  masks: jax.Array
  frames: jax.Array


def make_rules(section) -> Rules:
  """Returns the rules that the section `rcnn` of a configuration describes."""
  as_value = lambda x: tuple(x) if isinstance(x, (list, tuple)) else x
  return Rules(**{name: as_value(section[name]) for name in Rules._fields if name in section})


def make_anchors(network: MaskRCNN, image_size: tuple[int, int], rules: Rules) -> list[np.ndarray]:
  """Returns the anchors of each level, float32 [h * w * A, 4], for images of a size."""
  grids = [tuple(-(-side // stride) for side in image_size) for stride in network.strides]
  return boxes.make_anchors(grids, network.strides, rules.anchor_sizes, rules.anchor_ratios)


def draw_noise(keys: jax.Array, anchors: list[jax.Array], num_objects: int, rules: Rules) -> Noise:
  """Draws the noise of images from their keys [B]."""
  lengths = (sum(map(len, anchors)), rules.train_proposals[1] + num_objects)
  draw = lambda key, length: jax.random.uniform(key, (length,))
  return Noise(
    *(
      jax.vmap(lambda key: draw(jax.random.fold_in(key, _NOISE_KEY + i), length))(keys)
      for i, length in enumerate(lengths)
    )
  )


_NOISE_KEY = 2**20  # no block has such a number


def hide_padding(pixels: jax.Array, sizes: jax.Array) -> jax.Array:
  """Returns normalized images [B, H, W, C] with zeros outside of their `sizes`, int32 [B, 2]."""
  height, width = (
    jnp.arange(side) < sizes[:, axis, None] for axis, side in enumerate(pixels.shape[1:3])
  )
  return jnp.where((height[:, :, None] & width[:, None])[..., None], pixels, 0)


def training_loss(
  network: MaskRCNN,
  pixels: jax.Array,
  truth: Truth,
  noise: Noise,
  anchors: list[jax.Array],
  rules: Rules,
  keys: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Computes the training loss and its terms.

  Args:
    network: bound to its variables.
    pixels: normalized images [B, H, W, C], zeros in the padding.
    truth: about them.
    noise: decides which anchors and proposals count.
    anchors: of `make_anchors`.
    rules: of the losses.
    keys: [B], which decide the dropped paths; None drops nothing.

  Returns:
    The sum, and its terms "rpn_class", "rpn_box", "class", "box" (with a number for each stage of a
    cascade) and "mask"; float32 scalars.
  """
  objects = Objects(truth.boxes, truth.classes)
  levels = network.features(pixels, True, keys)
  logits, deltas = network.rpn_head(levels)
  terms = anchor_losses(logits, deltas, anchors, objects, noise.anchors, rules)
  proposals = propose(logits, deltas, anchors, truth.sizes, rules.train_proposals, rules)
  rois = sample_rois(proposals, objects, noise.proposals, network.num_classes, rules)
  terms |= box_losses(network, levels, rois, objects, truth.sizes, rules)
  if network.mask_convs:
    terms["mask"] = mask_loss(network, levels, rois, truth, rules)
  return sum(terms.values()), terms


def over_images(function, *args, **fixed):
  """Applies a function of `boxes`, which takes one image, to B images."""
  return jax.vmap(functools.partial(function, **fixed))(*args)


def anchor_losses(logits, deltas, anchors, objects: Objects, noise: jax.Array, rules: Rules):
  """Returns the terms of the region proposal network, given its outputs for each level."""
  logits, deltas = (jnp.concatenate(x, axis=1) for x in (logits, deltas))
  anchors = jnp.concatenate(anchors)
  count = rules.anchor_sample

  def of_image(logits, deltas, objects, noise):
    nearest, labels = boxes.match(anchors, objects, *rules.anchor_iou, every_object=True)
    drawn, labels = boxes.sample(labels, noise, count, int(count * rules.anchor_positive))
    targets = objects.boxes[nearest[drawn]]
    return {
      "rpn_class": boxes.anchor_loss(logits[drawn], labels, count),
      "rpn_box": boxes.box_loss(deltas[drawn], anchors[drawn], targets, labels == 1, count),
    }

  return _means(over_images(of_image, logits, deltas, objects, noise))


def _means(terms):
  return jax.tree.map(jnp.mean, terms)


def propose(logits, deltas, anchors, sizes, limits: tuple[int, int], rules: Rules) -> Proposals:
  """Returns the proposals of each image, given the outputs for each level."""
  per_level, count = limits
  return over_images(
    lambda logits, deltas, size: boxes.propose(
      logits,
      deltas,
      anchors,
      size,
      per_level=per_level,
      count=count,
      threshold=rules.proposal_nms,
    ),
    logits,
    deltas,
    sizes,
  )


def sample_rois(
  proposals: Proposals, objects: Objects, noise: jax.Array, num_classes: int, rules: Rules
) -> Rois:
  """Draws the proposals that count, in each image those that show objects first."""
  return over_images(
    boxes.sample_rois,
    proposals,
    objects,
    noise,
    threshold=rules.roi_iou[0],
    num_classes=num_classes,
    count=rules.roi_sample,
    max_foreground=_max_foreground(rules),
  )


def _max_foreground(rules: Rules) -> int:
  return int(rules.roi_sample * rules.roi_positive)


def pool(network: MaskRCNN, levels, regions: jax.Array, size: int, rules: Rules) -> jax.Array:
  """Returns the features of regions, boxes [B, N, 4]: [B, N, size, size, C]."""
  levels, strides = levels[:ROI_LEVELS], network.strides[:ROI_LEVELS]

  def of_image(levels, regions):
    level = boxes.levels(regions, ROI_LEVELS, rules.canonical_size)
    return boxes.roi_align(levels, strides, regions, level, (size, size), rules.pool_samples)

  return over_images(of_image, levels, regions)


def _by_region(head, x: jax.Array, train: bool, is_valid: jax.Array | None = None):
  """Applies a head, which takes regions [N, ...], to features [B, N, ...]."""
  is_valid = None if is_valid is None else is_valid.reshape(-1)
  out = head(x.reshape(-1, *x.shape[2:]), train, is_valid)
  return jax.tree.map(lambda y: y.reshape(*x.shape[:2], *y.shape[1:]), out)


def box_losses(
  network: MaskRCNN, levels, rois: Rois, objects: Objects, sizes: jax.Array, rules: Rules
):
  """Returns the terms of all box heads."""
  terms, num_classes = {}, network.num_classes

  def of_image(logits, deltas, rois, objects, weights):
    is_foreground = (rois.classes >= 0) & (rois.classes < num_classes)
    own = jnp.clip(rois.classes, 0, deltas.shape[1] - 1)[:, None, None]
    own = jnp.take_along_axis(deltas, own, axis=1)[:, 0]
    count = jnp.maximum((rois.classes >= 0).sum(), 1)
    targets = objects.boxes[rois.objects]
    return {
      "class": boxes.class_loss(logits, rois.classes),
      "box": boxes.box_loss(own, rois.boxes, targets, is_foreground, count, weights),
    }

  for stage, head in enumerate(network.box_heads):
    weights = rules.box_weights[stage]
    pooled = pool(network, levels, rois.boxes, network.box_size, rules)
    pooled = _scale_gradient(pooled, 1 / network.stages)
    logits, deltas = _by_region(head, pooled, True, rois.classes >= 0)
    number = str(stage) if network.stages > 1 else ""
    losses = _means(over_images(of_image, logits, deltas, rois, objects, weights=weights))
    terms |= {name + number: x for name, x in losses.items()}
    if stage + 1 < network.stages:
      moved = next_boxes(deltas, rois.boxes, sizes, weights)
      rois = over_images(
        boxes.label_rois,
        moved,
        (rois.classes >= 0) & boxes.is_nonempty(moved),
        objects,
        threshold=rules.roi_iou[stage + 1],
        num_classes=num_classes,
      )
  return terms


def _scale_gradient(x: jax.Array, scale: float) -> jax.Array:
  if scale == 1:
    return x
  fixed = jax.lax.stop_gradient(x)
  return fixed + scale * (x - fixed)


def next_boxes(deltas: jax.Array, regions: jax.Array, sizes: jax.Array, weights) -> jax.Array:
  """Returns the boxes [B, N, 4] that the next stage of a cascade works on; no gradient."""
  moved = boxes.decode(deltas[:, :, 0], regions, weights)
  return over_images(boxes.clip, jax.lax.stop_gradient(moved), sizes)


def mask_loss(network: MaskRCNN, levels, rois: Rois, truth: Truth, rules: Rules) -> jax.Array:
  """Returns the term of the mask head, of the proposals that show objects."""
  rois = Rois(*(x[:, : _max_foreground(rules)] for x in rois))
  pooled = pool(network, levels, rois.boxes, network.mask_size, rules)
  is_foreground = (rois.classes >= 0) & (rois.classes < network.num_classes)
  logits = _by_region(network.mask_head, pooled, True, is_foreground)

  def of_image(logits, rois, masks, frames):
    own = rois.objects
    targets = boxes.mask_targets(
      masks[own], frames[own], rois.boxes, logits.shape[1], rules.mask_samples
    )
    return boxes.mask_loss(logits, targets, rois.classes)

  return over_images(of_image, logits, rois, truth.masks, truth.frames).mean()


def detect_objects(
  network: MaskRCNN, pixels: jax.Array, sizes: jax.Array, anchors: list[jax.Array], rules: Rules
) -> tuple[Detections, jax.Array | None]:
  """Detects objects.

  Args:
    network, pixels, anchors, rules: as in `training_loss`.
    sizes: int32 [B, 2], (height, width) of the images without padding.

  Returns:
    Detections of B images, and the masks inside of their boxes, float32 [B, N, 2 s, 2 s] in [0, 1];
    None without a mask head.
  """
  levels = network.features(pixels)
  logits, deltas = network.rpn_head(levels)
  proposals = propose(logits, deltas, anchors, sizes, rules.test_proposals, rules)
  regions, moves, probabilities = proposals.boxes, None, []
  for stage, head in enumerate(network.box_heads):
    if stage:
      regions = next_boxes(moves, regions, sizes, rules.box_weights[stage - 1])
    pooled = pool(network, levels, regions, network.box_size, rules)
    logits, moves = _by_region(head, pooled, False)
    probabilities.append(jax.nn.softmax(logits))
  detections = over_images(
    boxes.detect,
    boxes.decode(moves, regions[:, :, None], rules.box_weights[stage]),
    sum(probabilities) / network.stages,
    proposals.is_valid,
    sizes,
    min_score=rules.min_score,
    threshold=rules.detection_nms,
    count=rules.detections,
  )
  if not network.mask_convs:
    return detections, None
  pooled = pool(network, levels, detections.boxes, network.mask_size, rules)
  logits = _by_region(network.mask_head, pooled, False)
  own = jnp.maximum(detections.classes, 0)[..., None, None, None]
  return detections, jax.nn.sigmoid(jnp.take_along_axis(logits, own, axis=-1)[..., 0])


def in_original(
  row: dict[str, np.ndarray], shown: tuple[int, int], size: tuple[int, int]
) -> dict[str, np.ndarray]:
  """Returns the objects of one image that are valid, with boxes in its original pixels.

  Args:
    row: a row of the fields of `Detections`, and "masks" if there are any.
    shown: (height, width) of the image in the network's input, without padding.
    size: (height, width) of the original image.

  Returns:
    "boxes" float64 [N, 4], "scores" [N], "classes" [N], and "masks" [N, h, w] if there are any,
    each in its box.
  """
  found = boxes.restore(row["boxes"], shown, size)
  kept = row["is_valid"] & (found[:, 2:] > found[:, :2]).all(-1)
  names = ("scores", "classes", "masks")
  return {"boxes": found[kept]} | {
    name: row[name][kept] for name in names if row.get(name) is not None
  }


def paste_masks(found: dict[str, np.ndarray], size: tuple[int, int]) -> Iterator[np.ndarray]:
  """Yields the pixels of each object of `in_original`, bool [H, W]."""
  for mask, box in zip(found["masks"], found["boxes"]):
    yield boxes.paste_mask(mask, box, size) >= 0.5
