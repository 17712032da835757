"""Draws arrays: tables of images, maps of tokens, features as colors. Knows no model."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mrmae_jax.runs.paths import atomic_write

MIN_WIDTH = 128  # of one image in pixels, so that digits are legible
MAX_WIDTH = 1200  # of a table; images wider than MIN_WIDTH are shrunk to fit
MIN_DRAWN = 320  # of the longer side of an image with objects, for their names
OPACITY = 0.5  # of the colors of classes over an image
COLOR_SCALE = (  # dark violet, blue, teal, green, light yellow; ever lighter
  (0.13, 0.04, 0.24),
  (0.15, 0.27, 0.50),
  (0.13, 0.55, 0.50),
  (0.55, 0.78, 0.30),
  (0.99, 0.94, 0.45),
)


def draw_grid(columns: list[np.ndarray], titles: list[str], note: str = "") -> np.ndarray:
  """Draws a table of images with a title per column.

  Args:
    columns: float [R, H, W, 3] in [0, 1] each.
    titles: one per column.
    note: a line below the table; "" for none.

  Returns:
    uint8 [height, width, 3].
  """
  rows, height, width, _ = columns[0].shape
  gap, line = 4, 16
  max_width = max(MIN_WIDTH, MAX_WIDTH // len(columns) - gap)
  if width > max_width:
    size, resample = (max_width, round(height * max_width / width)), Image.Resampling.BICUBIC
  else:
    zoom = -(-MIN_WIDTH // width)
    size, resample = (width * zoom, height * zoom), Image.Resampling.NEAREST
  cell_width, cell_height = size[0] + gap, size[1] + gap
  canvas_width = len(columns) * cell_width + gap
  canvas_height = line + rows * cell_height + gap + (line if note else 0)
  canvas = Image.new("RGB", (canvas_width, canvas_height), "white")
  draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
  for c, (column, title) in enumerate(zip(columns, titles)):
    left = gap + c * cell_width
    draw.text((left, 2), title, "black", font)
    for r, image in enumerate(column):
      tile = Image.fromarray(np.round(np.clip(image, 0, 1) * 255).astype(np.uint8))
      canvas.paste(tile.resize(size, resample), (left, line + gap + r * cell_height))
  if note:
    draw.text((gap, canvas.height - line), note, "black", font)
  return np.asarray(canvas)


def class_colors(count: int) -> np.ndarray:
  """Returns a color for each class, uint8 [count, 3], those of PASCAL VOC without its black."""
  classes = np.arange(1, count + 1)
  bits = [
    sum(((classes >> (3 * i + channel)) & 1) << (7 - i) for i in range(3)) for channel in range(3)
  ]
  return np.stack(bits, axis=-1).astype(np.uint8)


def paint_classes(image: np.ndarray, label: np.ndarray, ignored: int = -1) -> np.ndarray:
  """Lays the colors of classes over an image.

  Args:
    image: uint8 [H, W, 3] or [H, W, 1].
    label: classes, int [H, W].
    ignored: the value of pixels without a class, which become black.

  Returns:
    uint8 [H, W, 3].
  """
  colors = class_colors(int(label.max()) + 1)[label]
  painted = ((1 - OPACITY) * image + OPACITY * colors).astype(np.uint8)
  painted[label == ignored] = 0
  return painted


def draw_objects(
  image: np.ndarray, boxes: np.ndarray, masks: list[np.ndarray], classes, texts: list[str]
) -> np.ndarray:
  """Draws objects over an image, in the colors of their classes, the first on top.

  Args:
    image: uint8 [H, W, 3] or [H, W, 1].
    boxes: [N, 4] in pixels.
    masks: bool [H, W] each, or [].
    classes: int [N].
    texts: one for each box.

  Returns:
    uint8 [height, width, 3], enlarged until texts are legible.
  """
  zoom = -(-MIN_DRAWN // max(image.shape[:2]))
  painted = np.repeat(image, 3 // image.shape[2], axis=2)
  colors = class_colors(int(max(classes, default=0)) + 1)
  for mask, class_ in reversed(list(zip(masks, classes))):
    painted = painted.copy()
    painted[mask] = ((1 - OPACITY) * painted[mask] + OPACITY * colors[class_]).astype(np.uint8)
  canvas = Image.fromarray(painted.repeat(zoom, 0).repeat(zoom, 1))
  draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(11)
  for box, class_, text in reversed(list(zip(np.asarray(boxes) * zoom, classes, texts))):
    color = tuple(map(int, colors[class_]))
    draw.rectangle([box[0], box[1], max(box[2] - 1, box[0]), max(box[3] - 1, box[1])], None, color)
    left, top, right, bottom = draw.textbbox((box[0] + 2, box[1] + 1), text, font)
    draw.rectangle([left - 1, top - 1, right + 1, bottom + 1], color)
    draw.text((box[0] + 2, box[1] + 1), text, "white" if sum(color) < 384 else "black", font)
  return np.asarray(canvas)


def interleave(columns: list[np.ndarray]) -> np.ndarray:
  """Merges k columns into one: the first image of each, then the second of each, and so on.

  k times [B, ...] -> [B * k, ...].
  """
  return np.stack(columns, 1).reshape(-1, *columns[0].shape[1:])


def enlarge(x: np.ndarray, grid: tuple[int, int], size: int) -> np.ndarray:
  """Draws a value or color per token as a map, `size` pixels a token.

  [B, N, c] or [B, N] -> [B, H, W, c or 1].
  """
  return np.asarray(x).reshape(len(x), *grid, -1).repeat(size, 1).repeat(size, 2)


def overlay(pixels: np.ndarray, heat: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
  """Darkens images [B, H, W, 3] in [0, 1], except where `heat` [B, N] lights them up.

  The light is relative to the largest heat of each image.
  """
  relative = heat / np.maximum(heat.max(1, keepdims=True), 1e-12)
  light = enlarge(relative, grid, pixels.shape[1] // grid[0]) * np.float32([1, 0.85, 0.3])
  return 0.25 * pixels + 0.75 * light


def frame_patch(pixels: np.ndarray, top: int, left: int, size: int) -> np.ndarray:
  """Draws a red frame around one patch of each image; it is an eighth of the patch thick."""
  framed = pixels.copy()
  thickness = max(1, size // 8)
  is_edge = np.ones((size, size), bool)
  is_edge[thickness:-thickness, thickness:-thickness] = False
  framed[:, top : top + size, left : left + size][:, is_edge] = (1, 0, 0)
  return framed


def write_picture(path: str, picture: np.ndarray) -> None:
  """Writes a picture, uint8 [height, width, 3], as PNG; it appears complete or not at all."""
  with atomic_write(Path(path).expanduser()) as temporary:
    Image.fromarray(picture).save(temporary, format="png")


def color_scale(x: np.ndarray) -> np.ndarray:
  """Maps numbers in [0, 1] to colors, from dark to light: [...] -> [..., 3]."""
  positions = np.linspace(0, 1, len(COLOR_SCALE))
  return np.stack([np.interp(x, positions, channel) for channel in zip(*COLOR_SCALE)], -1)


def principal_colors(features: np.ndarray, basis: np.ndarray | None = None) -> np.ndarray:
  """Maps tokens to colors in [0, 1] by their first three principal components.

  Args:
    features: [B, N, D].
    basis: tokens [..., D] that give the axes and their range; the features themselves by default.
      With the same basis the same color means the same feature.

  Returns:
    [B, N, 3].
  """
  flat = lambda x: np.asarray(x).reshape(-1, x.shape[-1]).astype(np.float64)
  tokens = flat(features if basis is None else basis)
  mean = tokens.mean(0)
  axes = np.linalg.eigh((tokens - mean).T @ (tokens - mean))[1][:, :-4:-1]
  low, high = np.percentile((tokens - mean) @ axes, [2, 98], axis=0)
  colors = ((flat(features) - mean) @ axes - low) / np.maximum(high - low, 1e-12)
  return np.clip(colors, 0, 1).reshape(*features.shape[:-1], 3)


def perplexity(weights: np.ndarray) -> np.ndarray:
  """Returns over how many entries weights are spread along the last axis: [..., N] -> [...]."""
  share = weights / weights.sum(-1, keepdims=True)
  return np.exp(-(share * np.log(share + 1e-12)).sum(-1))


def bands_shown(config) -> tuple[list[int], str]:
  """Returns the channels that pictures of a run show as red, green and blue, and a caption.

  RGB and grey are shown as they are, without a caption. Other images show the channels that the
  teacher sees, else the first ones.
  """
  channels, teacher = len(config.data.mean), config.get("teacher")
  teacher_bands = list(teacher.bands) if teacher and channels != 3 else []
  first_bands = [min(i, channels - 1) for i in range(3)]
  bands = teacher_bands if len(teacher_bands) == 3 else first_bands
  return bands, "" if channels in (1, 3) else f"channels {', '.join(map(str, bands))} as RGB"
