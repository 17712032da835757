"""A class for every pixel: the loss of training, and predictions for images of any size.

The laws are mmsegmentation's (datasets/pipelines/transforms.py, segmentors/encoder_decoder.py).
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mrmae_jax.bilinear import bilinear_matrix, fit_size, resize_image
from mrmae_jax.constants import IGNORED
from mrmae_jax.models.layers import combine
from mrmae_jax.models.maps import resize

BAND = 64  # rows of an image whose logits exist at once
# Few programs are compiled: images are padded to sides of these multiples of the window, and the
# width of predictions to multiples of a number of pixels.
BUCKETS = (1, 1.25, 1.5, 2, 3, 4)
WIDTH_BUCKET = 256
LEAST_TOKENS = 3  # of an axis; the deepest level of a ConvViT needs them


def cross_entropy(logits: jax.Array, labels: jax.Array, of_all: bool = True) -> jax.Array:
  """Returns the mean cross-entropy of logits that are resized to the labels.

  Logits of full size exist for BAND rows at a time, in the backward pass too: 150 classes at 512 x
  512 pixels are 157 MB an image.

  Args:
    logits: float32 [B, h, w, K].
    labels: [B, H, W] in [0, K), or IGNORED.
    of_all: divide by the number of all pixels, as mmsegmentation does, which is the same for any
      division of the batch; False: by that of the labelled ones, or by 1 without any.
  """
  height, width = labels.shape[1:]
  bands = -(-height // BAND)
  rows = np.zeros((bands * BAND, logits.shape[1]), np.float32)
  rows[:height] = bilinear_matrix(logits.shape[1], height)
  columns = bilinear_matrix(logits.shape[2], width)
  padded = jnp.pad(
    labels, ((0, 0), (0, bands * BAND - height), (0, 0)), constant_values=IGNORED
  ).reshape(len(labels), bands, BAND, width)

  @jax.checkpoint
  def band_sum(band):
    matrix, label = band
    log_p = jax.nn.log_softmax(combine(logits, matrix, columns))
    is_valid = label != IGNORED
    index = jnp.where(is_valid, label, 0).astype(jnp.int32)
    picked = jnp.take_along_axis(log_p, index[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(is_valid, picked, 0))

  matrices = jnp.asarray(rows).reshape(bands, BAND, -1)
  total = jax.lax.map(band_sum, (matrices, padded.swapaxes(0, 1))).sum()
  count = labels.size if of_all else jnp.maximum(jnp.sum(labels != IGNORED), 1)
  return total / count


class Rule(NamedTuple):
  """How an image of any size is looked at.

  Attributes:
    crop: (height, width) of a window in pixels.
    stride: (rows, columns) between windows, at most `crop`.
    scales: sizes at which the image is looked at, relative to the usual one.
    flip: look at mirrored images too.
    token: side of a token in pixels: one window, as large as the image and a multiple of this; 0:
      windows of `crop`.
  """

  crop: tuple[int, int]
  stride: tuple[int, int]
  scales: tuple[float, ...] = (1.0,)
  flip: bool = False
  token: int = 0

  def window(self, size: tuple[int, int]) -> tuple[int, int]:
    """Returns the (height, width) of the windows over an image of `size`."""
    if not self.token:
      return self.crop
    return tuple(max(-(-side // self.token), LEAST_TOKENS) * self.token for side in size)


def make_rule(
  window: tuple[int, int], token: int, *, mode: str, stride, scales, flip: bool
) -> Rule:
  """Returns the rule of a mode.

  Args:
    window: (height, width) of an image in training.
    token: side of a token in pixels.
    mode: "slide", windows of `window`; "whole", the whole image.
    stride: (rows, columns) between windows; empty: two thirds of one.
    scales, flip: see `Rule`.
  """
  stride = tuple(stride or (side * 2 // 3 for side in window))
  return Rule(window, stride, tuple(map(float, scales)), flip, token if mode == "whole" else 0)


class View(NamedTuple):
  """An image as the network sees it.

  Attributes:
    pixels: uint8 [H, W, C], padded to a bucket.
    size: (height, width) of the image in it, at its top left.
    starts: int32 [N, 2], upper left corners of the windows; N is that of the bucket.
    count: number of windows, the first of `starts`.
    is_mirrored: left and right are exchanged.
  """

  pixels: np.ndarray
  size: tuple[int, int]
  starts: np.ndarray
  count: int
  is_mirrored: bool


def window_starts(
  size: tuple[int, int], crop: tuple[int, int], stride: tuple[int, int]
) -> np.ndarray:
  """Returns the upper left corners of the windows over an image, row by row, int32 [N, 2].

  The last window of an axis is moved back to end at the border.
  """
  axes = []
  for side, window, step in zip(size, crop, stride):
    count = max(side - window + step - 1, 0) // step + 1
    axes.append([max(min(i * step, side - window), 0) for i in range(count)])
  return np.array([(top, left) for top in axes[0] for left in axes[1]], np.int32)


def make_views(image: np.ndarray, mean: tuple[float, ...], rule: Rule) -> list[View]:
  """Returns the views of an image uint8 [H, W, C].

  The image is resized by `fit_size` to the shorter side of a window. With several scales, views
  that are smaller than that are enlarged to it. What a window needs beyond the image is the mean
  pixel.

  Args:
    image: uint8 [H, W, C].
    mean: of the network's input, in [0, 1].
    rule: of the evaluation.
  """
  views, short = [], min(rule.crop)
  for scale in rule.scales:
    size = fit_size(image.shape[:2], short, scale)
    if rule.scales != (1.0,) and min(size) < short:
      factor = short / min(image.shape[:2])
      size = tuple(int(side * factor + 0.5) for side in image.shape[:2])
    resized = resize_image(image, size)
    for is_mirrored in (False, True) if rule.flip else (False,):
      pixels = resized[:, ::-1] if is_mirrored else resized
      views.append(make_view(pixels, mean, rule, is_mirrored))
  return views


def make_view(
  pixels: np.ndarray, mean: tuple[float, ...], rule: Rule, is_mirrored: bool = False
) -> View:
  """Returns a view of an image that has its size already; see `make_views`."""
  size = pixels.shape[:2]
  crop = rule.window(size)
  starts = window_starts(size, crop, rule.stride)
  padded = tuple(_bucket(side, window) for side, window in zip(size, crop))
  most = len(window_starts(padded, crop, rule.stride))
  canvas = np.empty((*padded, pixels.shape[2]), pixels.dtype)
  canvas[:] = np.rint(255 * np.asarray(mean))
  canvas[: size[0], : size[1]] = pixels
  return View(canvas, size, np.resize(starts, (most, 2)), len(starts), is_mirrored)


def _bucket(side: int, window: int) -> int:
  """Returns the side to which an image is padded, at least that of a window."""
  sides = [int(share * window) for share in BUCKETS]
  return next((x for x in sides if x >= side), -(-side // window) * window)


def slide(
  network: Callable[[jax.Array], jax.Array],
  pixels: jax.Array,
  starts: jax.Array,
  count: jax.Array,
  crop: tuple[int, int],
) -> jax.Array:
  """Returns the mean logits of all windows that see a pixel, float32 [H, W, K].

  Args:
    network: windows [1, *crop, C] -> logits float32 [1, h, w, K], which are resized to the window.
    pixels: [H, W, C].
    starts, count: as in `View`.
    crop: (height, width) of a window.
  """
  height, width, channels = pixels.shape
  window = jax.ShapeDtypeStruct((1, *crop, channels), pixels.dtype)
  num_classes = jax.eval_shape(network, window).shape[-1]

  def add(i, sums):
    total, windows = sums
    corner = (starts[i, 0], starts[i, 1], 0)
    window = jax.lax.dynamic_slice(pixels, corner, (*crop, channels))
    logits = resize(network(window[None]), crop)[0]
    old = jax.lax.dynamic_slice(total, corner, logits.shape)
    total = jax.lax.dynamic_update_slice(total, old + logits, corner)
    old = jax.lax.dynamic_slice(windows, corner, (*crop, 1))
    return total, jax.lax.dynamic_update_slice(windows, old + 1, corner)

  zeros = lambda depth: jnp.zeros((height, width, depth), jnp.float32)
  total, windows = jax.lax.fori_loop(0, count, add, (zeros(num_classes), zeros(1)))
  return total / jnp.maximum(windows, 1)


def mean_probabilities(
  maps: list[jax.Array], views: list[View], size: tuple[int, int]
) -> Iterator[jax.Array]:
  """Yields bands of probabilities at the original size, float32 [rows, width, K], top to bottom.

  Logits are resized, then comes the softmax, then the mean over the views.

  Args:
    maps: logits of the views, see `slide`.
    views: as `make_views` gives them.
    size: (height, width) of the original image.
  """
  height, width = size
  padded = -(-height // BAND) * BAND, -(-width // WIDTH_BUCKET) * WIDTH_BUCKET
  matrices = [resize_matrices(view, size, padded) for view in views]
  for top in range(0, height, BAND):
    total = jnp.zeros((BAND, padded[1], maps[0].shape[-1]), jnp.float32)
    for logits, (rows, columns) in zip(maps, matrices):
      total = _add_probabilities(total, logits, rows[top : top + BAND], columns)
    yield total[: height - top, :width] / len(maps)


def resize_matrices(
  view: View, size: tuple[int, int], padded: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the matrices that resize a view's logits to the original size; see `combine`.

  Args:
    view: of which they undo the padding and the mirroring.
    size: (height, width) of the original image.
    padded: (rows, columns) of the results; rows beyond `size` are zero.

  Returns:
    float32 [padded height, H] and [padded width, W] for logits [H, W, K].
  """
  matrices = [bilinear_matrix(*sides) for sides in zip(view.size, size)]
  if view.is_mirrored:
    matrices[1] = matrices[1][::-1]
  shapes = zip(padded, view.pixels.shape)
  fill = lambda matrix, shape: np.pad(
    matrix, [(0, new - old) for new, old in zip(shape, matrix.shape)]
  )
  return tuple(map(fill, matrices, shapes))


@jax.jit
def _add_probabilities(total, logits, rows, columns):
  return total + jax.nn.softmax(combine(logits[None], rows, columns)[0], axis=-1)


def predict(
  network: Callable[[View], jax.Array],
  views: list[View],
  size: tuple[int, int],
) -> np.ndarray:
  """Returns the class of every pixel at the original size: uint8 [height, width].

  For more than 256 classes it is uint16.

  Args:
    network: view -> logits, see `slide`.
    views: of the image.
    size: (height, width) of the original image.
  """
  maps = [network(view) for view in views]
  dtype = np.uint8 if maps[0].shape[-1] <= 256 else np.uint16
  bands = mean_probabilities(maps, views, size)
  return np.concatenate([np.asarray(band.argmax(-1)).astype(dtype) for band in bands])
