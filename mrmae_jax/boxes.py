"""The steps of Mask R-CNN between its networks, on a few pages (arXiv 1703.06870).

The region proposal network gives every anchor a logit and four deltas. Anchors are matched with the
objects of the image, a sample of them is trained, and the best decoded boxes that survive
non-maximum suppression are the proposals. Proposals are matched and sampled too; features are
pooled from each, for its class, its box and, inside of it, its mask. In testing the survivors of a
second suppression, class by class, are the detections. The laws are detectron2's.

Most functions take one image, for `jax.vmap`; their shapes are static. What varies, such as
the number of objects, is filled up and marked as invalid, and an invalid row changes no number and
no gradient. `make_anchors`, `paste_mask`, `interpolate` and `restore` are
numpy on the host.

Boxes are float32 [..., 4] (x1, y1, x2, y2) in pixels. They are continuous: an image is [0, W] x
[0, H], the width of a box is x2 - x1. Shapes: N boxes, M objects, K classes; class K is the
background, class -1 fills up. All losses are float32.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

MAX_LOG_SCALE = math.log(1000 / 16)  # of a decoded side relative to that of its source
CHUNK = 64  # RoIs pooled at once: [64, 7, 256, 256 channels] of bfloat16 are 59 MB
PRECISE = jax.lax.Precision.HIGHEST  # TPUs would round float32 to bfloat16


# --- boxes ---


def make_anchors(
  grids: list[tuple[int, int]],
  strides: tuple[int, ...],
  sizes: tuple[float, ...],
  ratios: tuple[float, ...] = (0.5, 1.0, 2.0),
) -> list[np.ndarray]:
  """Returns the anchors of each level, float32 [h * w * len(ratios), 4], by row, column and ratio.

  Their centers are the upper left corners of the cells.

  Args:
    grids: (h, w) of each level.
    strides: pixels of a cell's side.
    sizes: square root of an anchor's area.
    ratios: height / width.
  """
  anchors = []
  for (height, width), stride, size in zip(grids, strides, sizes):
    widths = np.sqrt(size**2 / np.asarray(ratios))
    heights = widths * ratios
    cell = np.stack([-widths, -heights, widths, heights], axis=-1) / 2
    x, y = np.meshgrid(np.arange(width) * stride, np.arange(height) * stride)
    corners = np.stack([x, y, x, y], axis=-1)[:, :, None]
    anchors.append((corners + cell.astype(np.float32)).reshape(-1, 4).astype(np.float32))
  return anchors


def sides(boxes: jax.Array) -> jax.Array:
  """Returns widths and heights, [..., 2]."""
  return boxes[..., 2:] - boxes[..., :2]


def is_nonempty(boxes: jax.Array) -> jax.Array:
  """Tells which boxes have a width and a height, bool [...]."""
  return (sides(boxes) > 0).all(-1)


def clip(boxes: jax.Array, size: jax.Array) -> jax.Array:
  """Cuts off what lies outside of an image of (height, width) `size`."""
  height, width = size
  return jnp.clip(boxes, 0, jnp.stack([width, height, width, height]).astype(boxes.dtype))


def intersections(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns the areas that boxes share, broadcast over the leading axes."""
  corners = jnp.minimum(a[..., 2:], b[..., 2:]) - jnp.maximum(a[..., :2], b[..., :2])
  return jnp.maximum(corners, 0).prod(-1)


def pairwise_iou(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns intersection over union of all pairs, [N, M]; 0 for boxes without an area."""
  shared = intersections(a[:, None], b[None])
  union = sides(a).prod(-1)[:, None] + sides(b).prod(-1)[None] - shared
  return jnp.where(shared > 0, shared / jnp.where(shared > 0, union, 1), 0)


def encode(boxes: jax.Array, targets: jax.Array, weights=(1.0, 1.0, 1.0, 1.0)) -> jax.Array:
  """Returns the deltas (dx, dy, dw, dh) that turn boxes into targets, [..., 4].

  Targets without an area give dw = dh = 0, boxes without one finite numbers.
  """
  has_area = is_nonempty(targets) & is_nonempty(boxes)
  # Inside the logarithm: nan * 0 would still be nan in the gradient.
  old = jnp.where(has_area[..., None], sides(boxes), 1)
  new = jnp.where(has_area[..., None], sides(targets), 1)
  shift = (targets[..., :2] + 0.5 * sides(targets) - boxes[..., :2] - 0.5 * sides(boxes)) / old
  return jnp.concatenate([shift, jnp.log(new / old)], axis=-1) * jnp.asarray(weights)


def decode(deltas: jax.Array, boxes: jax.Array, weights=(1.0, 1.0, 1.0, 1.0)) -> jax.Array:
  """Returns the boxes that `encode` turned into deltas, float32 [..., 4].

  A side grows at most by the factor 1000 / 16.
  """
  deltas = deltas.astype(jnp.float32) / jnp.asarray(weights)
  old = sides(boxes)
  center = deltas[..., :2] * old + boxes[..., :2] + 0.5 * old
  half = 0.5 * jnp.exp(jnp.minimum(deltas[..., 2:], MAX_LOG_SCALE)) * old
  return jnp.concatenate([center - half, center + half], axis=-1)


# --- proposals ---


def nms(
  boxes: jax.Array,
  scores: jax.Array,
  is_valid: jax.Array,
  threshold: float,
  groups: jax.Array | None = None,
) -> jax.Array:
  """Tells which boxes survive greedy non-maximum suppression, bool [N].

  A box falls if its IoU with a survivor of higher score is above the threshold; among equal scores
  the first goes before. This repeats one round until nothing changes: a box falls if it overlaps
  one that still stands and goes before. After n rounds the n best are decided, so that the fixed
  point is the greedy result; it is reached in 3 to 8 rounds for thousands of boxes.

  Args:
    boxes: [N, 4].
    scores: [N].
    is_valid: bool [N].
    threshold: of the IoU.
    groups: int [N]; boxes of different groups leave each other alone.
  """
  place = jnp.arange(len(scores))
  before = (scores > scores[:, None]) | (scores == scores[:, None]) & (place < place[:, None])
  suppresses = (pairwise_iou(boxes, boxes) > threshold) & before
  if groups is not None:
    suppresses &= groups == groups[:, None]

  def is_changing(state):
    return (state[0] != state[1]).any()

  def play_round(state):
    _, keep = state
    return keep, is_valid & ~(suppresses & keep).any(1)

  nobody = jnp.zeros_like(is_valid)
  return jax.lax.while_loop(is_changing, play_round, play_round((nobody, is_valid)))[1]


class Proposals(NamedTuple):
  """The proposals of the region proposal network, by descending logit.

  Attributes:
    boxes: [N, 4], zeros where invalid.
    logits: [N], -inf where invalid.
    is_valid: bool [N].
  """

  boxes: jax.Array
  logits: jax.Array
  is_valid: jax.Array


def propose(
  logits: list[jax.Array],
  deltas: list[jax.Array],
  anchors: list[jax.Array],
  size: jax.Array,
  *,
  per_level: int,
  count: int,
  threshold: float,
) -> Proposals:
  """Returns the best boxes of all levels after suppression within each; no gradient.

  Boxes that are not finite are left out.

  Args:
    logits: of each level, [h * w * A].
    deltas: of each level, [h * w * A, 4].
    anchors: of each level, [h * w * A, 4].
    size: (height, width) of the image without padding, to which boxes are clipped.
    per_level: how many of each level take part.
    count: N.
    threshold: of the IoU of suppression.
  """
  parts = []
  for scores, delta, anchor in zip(*jax.lax.stop_gradient((logits, deltas, anchors))):
    scores = jnp.where(jnp.isfinite(scores), scores, -jnp.inf).astype(jnp.float32)
    best, index = jax.lax.top_k(scores, min(per_level, len(scores)))
    boxes = decode(delta[index], anchor[index])
    is_finite = jnp.isfinite(boxes).all(-1) & jnp.isfinite(best)
    boxes = clip(jnp.where(is_finite[:, None], boxes, 0), size)
    keep = nms(boxes, best, is_finite & is_nonempty(boxes), threshold)
    parts.append((boxes, jnp.where(keep, best, -jnp.inf)))
  boxes, scores = (jnp.concatenate(x) for x in zip(*parts))
  best, index = _top(scores, count)
  is_valid = jnp.isfinite(best)
  return Proposals(jnp.where(is_valid[:, None], boxes[index], 0), best, is_valid)


def _top(scores: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
  """Returns the highest scores and their indices, [count]; -inf fills up."""
  best, index = jax.lax.top_k(scores, min(count, len(scores)))
  missing = (0, count - len(best))
  return jnp.pad(best, missing, constant_values=-jnp.inf), jnp.pad(index, missing)


# --- matching and sampling ---


class Objects(NamedTuple):
  """The truth about an image.

  Attributes:
    boxes: [M, 4].
    classes: int32 [M], -1 fills up.
  """

  boxes: jax.Array
  classes: jax.Array


def match(
  boxes: jax.Array, objects: Objects, low: float, high: float, every_object: bool = False
) -> tuple[jax.Array, jax.Array]:
  """Finds the best object of each box.

  Args:
    boxes: [N, 4].
    objects: M of them.
    low, high: bounds of the IoU.
    every_object: label 1 also the boxes that overlap some object more than all others do. An
      object that no box overlaps labels none; in detectron2 it labels all of them.

  Returns:
    The index of the object, int32 [N], and the label int32 [N]: 1 from `high` on, 0 below `low`, -1
    between them.
  """
  iou = jnp.where(objects.classes >= 0, pairwise_iou(boxes, objects.boxes), 0)
  # Computed once: `== best` compares bits, which may differ from one fusion to the next.
  iou = jax.lax.optimization_barrier(iou)
  nearest = iou.max(1)
  labels = jnp.where(nearest >= high, 1, jnp.where(nearest >= low, -1, 0))
  if every_object:
    best = iou.max(0)
    labels = jnp.where(((iou == best) & (best > 0)).any(1), 1, labels)
  return iou.argmax(1).astype(jnp.int32), labels.astype(jnp.int32)


def sample(
  labels: jax.Array, noise: jax.Array, count: int, max_positive: int
) -> tuple[jax.Array, jax.Array]:
  """Draws at most `max_positive` rows of label 1, and rows of label 0 until there are `count`.

  Args:
    labels: int [N]; rows of other labels are not drawn.
    noise: float32 [N], uniform in [0, 1); rows of less noise are drawn first.
    count, max_positive: of the sample.

  Returns:
    Indices int32 [count], positive ones first, and their labels int32 [count], -1 where there were
    too few.
  """
  first = lambda label, most: jax.lax.top_k(
    jnp.where(labels == label, -noise, -jnp.inf), min(most, len(labels))
  )[1]
  positives = jnp.minimum((labels == 1).sum(), max_positive)
  negatives = (labels == 0).sum()
  slot = jnp.arange(count)
  take = lambda indices, place: indices[jnp.clip(place, 0, len(indices) - 1)]
  indices = jnp.where(
    slot < positives, take(first(1, max_positive), slot), take(first(0, count), slot - positives)
  )
  drawn = jnp.where(slot < positives, 1, jnp.where(slot < positives + negatives, 0, -1))
  return indices.astype(jnp.int32), drawn.astype(jnp.int32)


class Rois(NamedTuple):
  """Proposals that are trained, foreground first.

  Attributes:
    boxes: [N, 4].
    classes: int32 [N]; K is background, -1 fills up.
    objects: int32 [N], index of the object that is nearest.
  """

  boxes: jax.Array
  classes: jax.Array
  objects: jax.Array


def label_rois(
  boxes: jax.Array, is_valid: jax.Array, objects: Objects, threshold: float, num_classes: int
) -> Rois:
  """Gives each box the class of its best object, or K if their IoU is below `threshold`.

  Args:
    boxes: [N, 4].
    is_valid: bool [N].
    objects: of the image.
    threshold: of the IoU.
    num_classes: K.
  """
  index, label = match(boxes, objects, threshold, threshold)
  classes = jnp.where(label == 1, objects.classes[index], num_classes)
  return Rois(boxes, jnp.where(is_valid, classes, -1), index)


def sample_rois(
  proposals: Proposals,
  objects: Objects,
  noise: jax.Array,
  *,
  threshold: float,
  num_classes: int,
  count: int,
  max_foreground: int,
) -> Rois:
  """Draws the proposals that are trained; the objects' own boxes are candidates too.

  Args:
    proposals: N of them.
    objects: M of them.
    noise: float32 [N + M], see `sample`.
    threshold, num_classes: see `label_rois`.
    count: of the sample.
    max_foreground: how many of them are no background at most.
  """
  candidates = label_rois(
    jnp.concatenate([proposals.boxes, objects.boxes]),
    jnp.concatenate([proposals.is_valid, objects.classes >= 0]),
    objects,
    threshold,
    num_classes,
  )
  is_background = candidates.classes == num_classes
  labels = jnp.where(candidates.classes < 0, -1, jnp.where(is_background, 0, 1))
  indices, drawn = sample(labels, noise, count, max_foreground)
  boxes, classes, nearest = (x[indices] for x in candidates)
  is_drawn = drawn >= 0
  return Rois(jnp.where(is_drawn[:, None], boxes, 0), jnp.where(is_drawn, classes, -1), nearest)


# --- features of boxes, and masks ---


def levels(
  boxes: jax.Array, num_levels: int = 4, canonical_size: float = 224, canonical_level: int = 2
) -> jax.Array:
  """Returns the level of the pyramid that a box is pooled from, int32 [N], 0 for the finest.

  A box of area `canonical_size`^2 belongs to `canonical_level`; one without an area to 0.
  """
  side = jnp.sqrt(jnp.maximum(sides(boxes).prod(-1), 0))
  level = jnp.floor(canonical_level + jnp.log2(side / canonical_size + 1e-8))
  return jnp.clip(level, 0, num_levels - 1).astype(jnp.int32)


def bin_matrix(low: jax.Array, high: jax.Array, length: int, bins: int, samples: int) -> jax.Array:
  """Returns float32 [bins, length]: an axis of a map, pooled between two of its coordinates.

  A bin is the mean of equidistant samples, linear between the centers of cells. Samples beyond -1
  and `length` are 0, those between there and the border have its value: ROIAlign, aligned.

  Args:
    low, high: scalars; cell i is [i, i + 1].
    length: of the axis.
    bins: of the result.
    samples: of a bin; 0: as many as it has cells, rounded up, for boxes up to twice the axis.
  """
  low, high = low - 0.5, high - 0.5
  extent = high - low
  sample = jnp.arange(samples or -(-2 * length // bins))
  # A quotient that is rounded up could exceed a whole number by its last bit.
  is_sample = sample * bins < extent if not samples else sample >= 0
  number = jnp.maximum(is_sample.sum(), 1)
  width = extent / bins
  points = low + jnp.arange(bins)[:, None] * width + (sample + 0.5) * width / number
  counts = is_sample & (points >= -1) & (points <= length)
  points = jnp.clip(points, 0, length - 1)[..., None]
  share = jnp.maximum(1 - jnp.abs(points - jnp.arange(length)), 0)
  return jnp.where(counts[..., None], share, 0).sum(1) / number


def roi_align(
  maps: list[jax.Array],
  strides: tuple[int, ...],
  boxes: jax.Array,
  level: jax.Array,
  size: tuple[int, int],
  samples: int = 0,
) -> jax.Array:
  """Pools each box from its level of a pyramid: [N, *size, C].

  Each axis is a matrix, and that of another level's rows is zero. Products of matrices give the
  same gradient each time, where gathers add in any order, and are what accelerators are good at:
  512 boxes of 7 x 7 on a pyramid of 256 x 256 x 256 are 80 GMAC, a quarter of a ViT-B. Boxes take
  no gradient.

  Args:
    maps: of each level, [h, w, C].
    strides: pixels of a cell's side.
    boxes: [N, 4].
    level: int [N], indices of `maps`.
    size: (rows, columns) of the result.
    samples: see `bin_matrix`.
  """
  boxes = jax.lax.stop_gradient(boxes)

  @jax.checkpoint
  def pool(roi):
    box, own_level = roi
    total = 0
    for i, (x, stride) in enumerate(zip(maps, strides)):
      x1, y1, x2, y2 = box / stride
      rows = bin_matrix(y1, y2, x.shape[0], size[0], samples) * (own_level == i)
      columns = bin_matrix(x1, x2, x.shape[1], size[1], samples)
      pooled = jnp.einsum("ph,hwc->pwc", rows.astype(x.dtype), x, precision=PRECISE)
      total += jnp.einsum("qw,pwc->pqc", columns.astype(x.dtype), pooled, precision=PRECISE)
    return total

  return jax.lax.map(pool, (boxes, level), batch_size=CHUNK)


def mask_targets(
  masks: jax.Array, frames: jax.Array, boxes: jax.Array, size: int = 28, samples: int = 2
) -> jax.Array:
  """Returns what part of its object each box shows, bool [N, size, size].

  Args:
    masks: uint8 [N, h, w] of each box's object, 255 inside.
    frames: [N, 4], the box that `masks` fill.
    boxes: [N, 4].
    size: of the targets.
    samples: see `bin_matrix`.
  """

  def pool(mask, frame, box):
    cells = jnp.asarray(mask.shape[::-1], jnp.float32)
    scale = cells / jnp.where(sides(frame) > 0, sides(frame), 1)
    x1, y1, x2, y2 = (box - jnp.tile(frame[:2], 2)) * jnp.tile(scale, 2)
    rows = bin_matrix(y1, y2, mask.shape[0], size, samples)
    columns = bin_matrix(x1, x2, mask.shape[1], size, samples)
    return jnp.einsum("ph,hw,qw->pq", rows, mask.astype(jnp.float32), columns, precision=PRECISE)

  return jax.vmap(pool)(masks, frames, boxes) >= 127.5


def paste_mask(mask: np.ndarray, box: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Returns a soft mask [h, w] at the place of its box in an image, float32 [H, W].

  It is linear between the centers of the mask's cells, and 0 outside. An object is where it is at
  least 0.5.

  Args:
    mask: float32 in [0, 1].
    box: [4], in pixels of the image.
    size: (H, W).
  """
  # One axis after the other, without a product of matrices: threads of the loader and of the
  # evaluators would wait for those of the library.
  pasted, shown, x = np.zeros(size, np.float32), [], np.pad(mask, 1)
  for axis, cells in enumerate(mask.shape):
    low, high = box[1 - axis], box[3 - axis]
    center = (np.arange(size[axis]) + 0.5 - low) / max(high - low, 1e-6) * cells + 0.5
    inside = np.flatnonzero((center > 0) & (center < cells + 1))
    shown.append(slice(inside[0], inside[-1] + 1) if len(inside) else slice(0))
    x = interpolate(x, center[inside], axis)
  pasted[tuple(shown)] = x
  return pasted


def interpolate(x: np.ndarray, places: np.ndarray, axis: int) -> np.ndarray:
  """Returns values between those of an axis, [N] in place of it.

  Args:
    x: values at 0, 1, 2, ...
    places: float [N], beyond the ends they have the value of the end.
    axis: 0 or 1, of two.
  """
  places = np.clip(places, 0, x.shape[axis] - 1)
  first = places.astype(int)
  way = (places - first).astype(np.float32).reshape((-1, 1) if axis == 0 else (1, -1))
  second = np.minimum(first + 1, x.shape[axis] - 1)
  return x.take(first, axis) * (1 - way) + x.take(second, axis) * way


def restore(boxes: np.ndarray, shown: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
  """Returns boxes in pixels of the original image, float64 [N, 4], clipped to it.

  Args:
    boxes: [N, 4], in pixels of the network's input.
    shown: (height, width) of the image in it, without padding.
    size: (height, width) of the original image. Its sides are rounded one by one, so that they
      have factors of their own.
  """
  factors = np.tile(np.divide(size, shown)[::-1], 2)
  return np.clip(np.asarray(boxes, np.float64) * factors, 0, np.tile(size[::-1], 2))


# --- detections ---


class Detections(NamedTuple):
  """The objects that are detected in an image, by descending score.

  Attributes:
    boxes: [N, 4] in pixels of the network's input, zeros where invalid.
    scores: [N], 0 where invalid.
    classes: int32 [N], -1 where invalid.
    is_valid: bool [N].
    is_truncated: bool [], whether more candidates could have changed the result.
  """

  boxes: jax.Array
  scores: jax.Array
  classes: jax.Array
  is_valid: jax.Array
  is_truncated: jax.Array


def detect(
  boxes: jax.Array,
  probabilities: jax.Array,
  is_valid: jax.Array,
  size: jax.Array,
  *,
  min_score: float,
  threshold: float,
  count: int,
  candidates: int = 2000,
) -> Detections:
  """Returns the best boxes of all classes after suppression within each class.

  Every class of every proposal is a candidate, not the best one alone.

  Args:
    boxes: [N, K, 4], or [N, 1, 4] for all classes.
    probabilities: [N, K + 1], the last one is the background's.
    is_valid: bool [N]; rows that are not finite are left out too.
    size: (height, width) of the image without padding, to which boxes are clipped.
    min_score: candidates have more.
    threshold: of the IoU of suppression.
    count: of the detections.
    candidates: how many take part; see `Detections.is_truncated`.
  """
  num_classes = probabilities.shape[1] - 1
  is_valid &= jnp.isfinite(boxes).all((1, 2)) & jnp.isfinite(probabilities).all(1)
  scores = jnp.where(is_valid[:, None], probabilities[:, :-1], 0).reshape(-1)
  best, index = jax.lax.top_k(scores, min(candidates, len(scores)))
  row, classes = index // num_classes, index % num_classes
  own = boxes[row, jnp.minimum(classes, boxes.shape[1] - 1)]
  own = clip(jnp.where(is_valid[row, None], own, 0), size)
  keep = nms(own, best, best > min_score, threshold, classes)
  kept, index = _top(jnp.where(keep, best, -jnp.inf), count)
  found = jnp.isfinite(kept)
  return Detections(
    jnp.where(found[:, None], own[index], 0),
    jnp.where(found, kept, 0),
    jnp.where(found, classes[index], -1).astype(jnp.int32),
    found,
    ((scores > min_score).sum() > candidates) & (keep.sum() < count),
  )


# --- losses ---


def binary_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Returns -log p of each target, which is true with the probability sigmoid(logit)."""
  logits = logits.astype(jnp.float32)
  return jax.nn.softplus(logits) - jnp.where(targets, logits, 0)


def anchor_loss(logits: jax.Array, labels: jax.Array, count: int) -> jax.Array:
  """Returns the binary cross-entropy of sampled anchors, their sum / `count`.

  Args:
    logits: [N].
    labels: int [N]: 1 object, 0 none, -1 not sampled.
    count: size of a full sample, whatever was sampled.
  """
  losses = binary_cross_entropy(logits, labels == 1)
  return jnp.where(labels >= 0, losses, 0).sum() / count


def l1(deltas, boxes, targets, weights, beta: float = 0.0) -> jax.Array:
  """Returns the distance of deltas [N, 4] to those of the targets; quadratic below `beta`."""
  error = deltas - encode(boxes, targets, weights)
  far = jnp.abs(error) - 0.5 * beta
  near = 0.5 * jnp.square(error) / (beta or 1)
  return jnp.where(jnp.abs(error) < beta, near, far).sum(-1)


def giou(deltas, boxes, targets, weights) -> jax.Array:
  """Returns one minus the generalized IoU (arXiv 1902.09630) of decoded boxes and targets."""
  decoded, tiny = decode(deltas, boxes, weights), 1e-7
  shared = intersections(decoded, targets)
  union = sides(decoded).prod(-1) + sides(targets).prod(-1) - shared
  corners = jnp.minimum(decoded, targets)[..., :2], jnp.maximum(decoded, targets)[..., 2:]
  hull = sides(jnp.concatenate(corners, axis=-1)).prod(-1)
  return 1 - shared / (union + tiny) + (hull - union) / (hull + tiny)


def box_loss(
  deltas: jax.Array,
  boxes: jax.Array,
  targets: jax.Array,
  is_foreground: jax.Array,
  count: jax.Array | int,
  weights=(1.0, 1.0, 1.0, 1.0),
  distance: Callable[..., jax.Array] = l1,
) -> jax.Array:
  """Returns the distance of foreground boxes to their objects, the sum / `count`.

  Args:
    deltas: [N, 4], predicted.
    boxes: [N, 4], which the deltas move.
    targets: [N, 4], boxes of the objects.
    is_foreground: bool [N].
    count: of all sampled boxes, the background too.
    weights: see `encode`.
    distance: `l1` or `giou`.
  """
  keep = is_foreground[:, None]
  safe = lambda x, fill: jnp.where(keep, x, jnp.asarray(fill, jnp.float32))
  unit = (0, 0, 1, 1)
  losses = distance(
    safe(deltas.astype(jnp.float32), 0), safe(boxes, unit), safe(targets, unit), weights
  )
  return jnp.where(is_foreground, losses, 0).sum() / count


def class_loss(logits: jax.Array, classes: jax.Array) -> jax.Array:
  """Returns the mean cross-entropy of RoIs; 0 without any.

  Args:
    logits: [N, K + 1].
    classes: int [N] in [0, K], -1 fills up.
  """
  log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
  picked = jnp.take_along_axis(log_p, jnp.maximum(classes, 0)[:, None], axis=1)[:, 0]
  is_valid = classes >= 0
  return -jnp.where(is_valid, picked, 0).sum() / jnp.maximum(is_valid.sum(), 1)


def mask_loss(logits: jax.Array, targets: jax.Array, classes: jax.Array) -> jax.Array:
  """Returns the mean binary cross-entropy of foreground RoIs' pixels; 0 without foreground.

  Args:
    logits: [N, h, w, K]; only the map of the true class counts.
    targets: bool [N, h, w].
    classes: int [N]; -1 and K are no foreground.
  """
  num_classes = logits.shape[-1]
  is_foreground = (classes >= 0) & (classes < num_classes)
  index = jnp.where(is_foreground, classes, 0)[:, None, None, None]
  own = jnp.take_along_axis(logits, index, axis=-1)[..., 0]
  losses = binary_cross_entropy(own, targets).mean((1, 2))
  return jnp.where(is_foreground, losses, 0).sum() / jnp.maximum(is_foreground.sum(), 1)
