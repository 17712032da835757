"""Mean intersection over union of the task's logits over every held-out scene, at its own size.

The counts are those of mmsegmentation (core/evaluation/metrics.py): intersections, predictions and
labels of each class over all images, without pixels that nobody has labelled. They are whole
numbers, the same for any number of devices and hosts: each device looks at images of its own, each
host at its share of them.
"""

import functools
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from PIL import Image, ImageOps

from mrmae_jax import data, evals, interpolation, segmentation, sharding
from mrmae_jax.config import token_size
from mrmae_jax.constants import IGNORED
from mrmae_jax.errors import DataError
from mrmae_jax.models.layers import combine
from mrmae_jax.runs import distributed
from mrmae_jax.segmentation import BAND, WIDTH_BUCKET
from mrmae_jax.viz.grid import bands_shown, draw_grid, paint_classes
from mrmae_jax.weights import positions

TITLES = ("image", "truth", "prediction")
NOTE = "black: not labelled"
NEVER_S = 1e6  # a limit where config.hang_s sets none


def class_counts(predicted: jax.Array, label: jax.Array, num_classes: int) -> jax.Array:
  """Counts pixels whose label is not IGNORED, int32 [3, K]: right ones, predicted ones, true ones.

  Args:
    predicted: classes, [H, W].
    label: classes or IGNORED, [H, W].
    num_classes: K.
  """
  is_valid = (label != IGNORED)[..., None]
  one_hot = lambda x: (x[..., None] == jnp.arange(num_classes)) & is_valid
  both = one_hot(predicted), one_hot(label)
  return jnp.stack([x.sum((0, 1), dtype=jnp.int32) for x in (both[0] & both[1], *both)])


def scores(counts: np.ndarray, class_names: tuple[str, ...]) -> dict[str, float]:
  """Returns the results of counts int64 [3, K], see `class_counts`, as fractions.

  A class in neither predictions nor labels takes no part in "mIoU"; one that is not in the labels
  none in "mAcc".

  Returns:
    "mIoU", "mAcc", "aAcc"; "classes", how many took part in mIoU; and "IoU_NAME" of each of these.
  """
  right, predicted, true = counts.astype(np.float64)
  union = predicted + true - right
  iou = {name: float(right[i] / union[i]) for i, name in enumerate(class_names) if union[i]}
  means = {
    "mIoU": float(np.mean(list(iou.values()))),
    "mAcc": float(np.mean(right[true > 0] / true[true > 0])),
    "aAcc": float(right.sum() / true.sum()),
    "classes": len(iou),
  }
  return means | {f"IoU_{name}": x for name, x in iou.items()}


def classify_and_count(label, maps, rows, columns, tiles) -> tuple[jax.Array, jax.Array]:
  """Classifies an image at its own size, tile after tile, and counts.

  A tile has BAND x WIDTH_BUCKET pixels. Its numbers do not depend on how far the image is padded.

  Args:
    label: uint8 [H, W], padded with IGNORED to a multiple of a tile.
    maps: logits of each view, float32 [h, w, K].
    rows, columns: for each view the matrices [H, h] and [W, w] that resize its logits.
    tiles: int32 [2], how many tiles below and beside each other hold the image.

  Returns:
    Counts int32 [3, K], see `class_counts`, and the classes uint8 [H, W].
  """
  num_classes = maps[0].shape[-1]

  def add(i, carry):
    counts, predicted = carry
    corner = (i // tiles[1] * BAND, i % tiles[1] * WIDTH_BUCKET)
    part = lambda matrix, start, size: jax.lax.dynamic_slice_in_dim(matrix, start, size)
    resized = (
      combine(x[None], part(r, corner[0], BAND), part(c, corner[1], WIDTH_BUCKET))[0]
      for x, r, c in zip(maps, rows, columns)
    )
    best = sum(jax.nn.softmax(x, axis=-1) for x in resized).argmax(-1).astype(jnp.uint8)
    truth = jax.lax.dynamic_slice(label, corner, best.shape)
    counts += class_counts(best, truth, num_classes)
    return counts, jax.lax.dynamic_update_slice(predicted, best, corner)

  zeros = jnp.zeros((3, num_classes), jnp.int32), jnp.zeros_like(label)
  return jax.lax.fori_loop(0, tiles[0] * tiles[1], add, zeros)


class Scene(NamedTuple):
  """An image that waits for others of its shapes.

  Attributes:
    index: its place among this host's images.
    image, label: uint8 [H, W, C] and [H, W].
    views: of `segmentation.make_views`.
  """

  index: int
  image: np.ndarray
  label: np.ndarray
  views: list[segmentation.View]


class Evaluator:
  """mIoU of the task's "logits" [B, h, w, K], by windows that slide over resized images."""

  def __init__(self, task, frozen, config, mesh, workdir, *, images: int, **look):
    """Opens the held-out split.

    Args:
      task, frozen, config, mesh, workdir: of the run.
      images: rows of the pictures; 0: no pictures.
      **look: mode, stride, scales and flip of `config.evals.miou`, see `segmentation.Rule`.
    """
    self._frozen, self._config, self._mesh = frozen, config, mesh
    self._local = sharding.local_mesh(mesh)
    self._place = NamedSharding(self._local, P("images"))
    self._source = task.source("eval")
    channels, exif = len(config.data.mean), config.data.exif
    self._view = functools.partial(whole_scene, channels=channels, exif=exif)
    self._class_names = task.source("train").class_names
    window = tuple(config.image_size)
    self._rule = segmentation.make_rule(window, token_size(config), **look)
    self._folder, self._images = workdir / "segmentations", images
    self._bands, _ = bands_shown(config)
    self._states = {}  # grid of a window -> arrays of the newest state, on each device
    self.results = ("mIoU", "mAcc", "aAcc")
    keys = jax.random.split(jax.random.key(0), 1)  # predictions do not depend on them

    # The work of one device, whose arrays have a leading axis of 1.
    def slide(state, pixels, starts, count, crop):
      params, extra, frozen = state
      predict = lambda batch: task.predict(params, extra, frozen, batch, keys)["logits"]
      network = lambda windows: predict({"image": windows})
      return segmentation.slide(network, pixels[0], starts[0], count[0], crop)[None]

    def count(*arrays):
      return jax.tree.map(
        lambda x: x[None], classify_and_count(*jax.tree.map(lambda x: x[0], arrays))
      )

    on_devices = functools.partial(
      jax.shard_map, mesh=self._local, out_specs=P("images"), check_vma=False
    )
    slide_specs = P(), *(P("images"),) * 3
    self._slide = jax.jit(
      lambda *arrays, crop: on_devices(functools.partial(slide, crop=crop), in_specs=slide_specs)(
        *arrays
      ),
      static_argnames="crop",
    )
    self._count = jax.jit(on_devices(count, in_specs=P("images")))

  def run(self, params, extra, step: int) -> dict[str, Any]:
    """Returns `scores`, "images": how many were counted, and the "pictures" of the first ones.

    Raises:
      DataError: no pixel is labelled.
    """
    state = sharding.to_local((params, extra, self._frozen), self._mesh, self._local)
    self._states = {self._grid(self._rule.crop): state}
    total, images, rows = np.zeros((3, len(self._class_names)), np.int64), 0, {}
    for counts, predicted, scenes in self._results():
      total += np.asarray(counts, np.int64).sum(0)
      images += len(scenes)
      if min(scene.index for scene in scenes) < self._images:
        for scene, classes in zip(scenes, np.asarray(predicted)):
          height, width = scene.label.shape
          rows[scene.index] = scene, classes[:height, :width]
    total, images = self._add_hosts(total, images)
    if not total[2].any():
      raise DataError(
        f"{self._source.description}: no labelled pixel in {images} images; is "
        "config.data.zero_is_unlabelled right?"
      )
    result = scores(total, self._class_names) | {"images": images}
    return result | {"pictures": self._draw(rows, step)} if rows else result

  def _grid(self, window: tuple[int, int]) -> tuple[int, int]:
    return tuple(side // token_size(self._config) for side in window)

  def _results(self):
    """Yields (counts, classes, scenes) of each group, while the devices work at the next one."""
    pending = None
    for scenes in self._groups():
      pending, done = self._start(scenes), pending
      if done:
        yield done
    if pending:
      yield pending

  def _groups(self):
    """Yields this host's scenes, as many of the same shapes as it has devices, or fewer."""
    batches = evals.host_batches(self._source, self._view, self._config, jax.process_count())
    waiting = {}
    for index, batch in enumerate(batches):
      if not batch["valid"][0]:
        continue
      image, label = batch["image"][0], batch["label"][0]
      views = segmentation.make_views(image, self._config.data.mean, self._rule)
      shapes = tuple((view.pixels.shape, view.starts.shape) for view in views)
      group = waiting.setdefault(shapes, [])
      group.append(Scene(index, image, label, views))
      if len(group) == self._local.size:
        yield waiting.pop(shapes)
    yield from waiting.values()

  def _start(self, scenes: list[Scene]):
    """Starts the work at a scene for each device; returns (counts, classes, scenes)."""
    filled = [*scenes, *scenes[:1] * (self._local.size - len(scenes))]
    by_view = list(zip(*(scene.views for scene in filled)))
    size = [max(sides) for sides in zip(*(scene.label.shape for scene in scenes))]
    padded = [-(-side // WIDTH_BUCKET) * WIDTH_BUCKET for side in size]
    labels = np.full((len(filled), *padded), IGNORED, np.uint8)
    tiles = np.zeros((len(filled), 2), np.int32)  # none of a scene that only fills the group
    for i, scene in enumerate(scenes):
      height, width = scene.label.shape
      labels[i, :height, :width] = scene.label
      tiles[i] = -(-height // BAND), -(-width // WIDTH_BUCKET)
    matrices = [
      [
        segmentation.resize_matrices(*x, padded)
        for x in zip(views, (scene.label.shape for scene in filled))
      ]
      for views in by_view
    ]
    rows, columns = zip(*([np.stack(x) for x in zip(*pairs)] for pairs in matrices))
    arrays = labels, [self._look(views) for views in by_view], rows, columns, tiles
    return *self._count(*jax.device_put(arrays, self._place)), scenes

  def _look(self, views: list[segmentation.View]) -> jax.Array:
    """Returns the logits of a view for each device, float32 [devices, H, W, K]."""
    window = self._rule.window(views[0].size)
    arrays = (np.stack([getattr(x, name) for x in views]) for name in ("pixels", "starts", "count"))
    placed = jax.device_put(tuple(arrays), self._place)
    return self._slide(self._state_at(self._grid(window)), *placed, crop=window)

  def _state_at(self, grid: tuple[int, int]):
    """Returns the arrays of the state with position tables for windows of a grid."""
    if grid not in self._states:
      (usual, state), *_ = self._states.items()
      params = positions.resize_tables(jax.device_get(state[0]), usual, grid, interpolation.BICUBIC)
      placed = jax.device_put(params, sharding.replicated(self._local))
      self._states[grid] = placed, *state[1:]
    return self._states[grid]

  def _add_hosts(self, total: np.ndarray, images: int) -> tuple[np.ndarray, int]:
    """Returns the sums over all hosts."""
    text = json.dumps([total.tolist(), images])
    parts = distributed.exchange("counts of pixels", text, self._config.hang_s or NEVER_S)
    totals, counts = zip(*map(json.loads, parts))
    return np.sum(np.array(totals, np.int64), axis=0), sum(counts)

  def _draw(self, rows: dict[int, tuple[Scene, np.ndarray]], step: int) -> dict:
    """Returns {path: picture} of images, truths and predictions."""
    columns = [[], [], []]
    for _, (scene, predicted) in sorted(rows.items())[: self._images]:
      image = scene.image[..., self._bands]
      painted = paint_classes(image, scene.label, IGNORED), paint_classes(image, predicted)
      for column, x in zip(columns, (image, *painted)):
        column.append(ImageOps.pad(Image.fromarray(x), self._rule.crop[::-1], color="white"))
    picture = draw_grid([np.stack(column) / 255 for column in columns], list(TITLES), NOTE)
    return {self._folder / f"step_{step:07d}.png": picture}


def whole_scene(example: dict[str, Any], rng, channels: int, exif: str) -> dict[str, np.ndarray]:
  """Returns a scene at its own size, as a view; see `data.decode_scene`."""
  del rng
  return dict(zip(("image", "label"), data.decode_scene(example, channels, exif)))
