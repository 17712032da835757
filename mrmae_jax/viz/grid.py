"""Drawing with arrays: tables of pictures, maps of tokens over images, features as colours. Knows no model."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MIN_WIDTH = 128  # of one picture in pixels, so that digits can be looked at
MAX_WIDTH = 1200  # of a table; pictures that are larger than the least are shrunk to fit


def draw_grid(columns: list[np.ndarray], titles: list[str], note: str = "") -> np.ndarray:
  """A table of pictures with a title per column.

  Args:
    columns: float [R, H, W, 3] in [0, 1] each.
    titles: one per column.
    note: a line below; "" for none.

  Returns:
    uint8 [height, width, 3].
  """
  rows, height, width, _ = columns[0].shape
  gap, line = 4, 16
  most = max(MIN_WIDTH, MAX_WIDTH // len(columns) - gap)
  if width > most:
    size, resample = (most, round(height * most / width)), Image.Resampling.BICUBIC
  else:
    zoom = -(-MIN_WIDTH // width)
    size, resample = (width * zoom, height * zoom), Image.Resampling.NEAREST
  cell_w, cell_h = size[0] + gap, size[1] + gap
  canvas = Image.new(
    "RGB",
    (len(columns) * cell_w + gap, rows * cell_h + gap + line + (line if note else 0)),
    "white",
  )
  draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
  for c, (column, title) in enumerate(zip(columns, titles)):
    draw.text((gap + c * cell_w, 2), title, "black", font)
    for r, image in enumerate(column):
      tile = Image.fromarray(np.round(np.clip(image, 0, 1) * 255).astype(np.uint8))
      canvas.paste(tile.resize(size, resample), (gap + c * cell_w, line + gap + r * cell_h))
  if note:
    draw.text((gap, canvas.height - line), note, "black", font)
  return np.asarray(canvas)


def interleave(pictures: list[np.ndarray]) -> np.ndarray:
  """One column of several: the first image of each, then the second of each, and so on; k times [B, ...] -> [B * k, ...]."""
  return np.stack(pictures, 1).reshape(-1, *pictures[0].shape[1:])


def enlarge(x: np.ndarray, grid: tuple[int, int], size: int) -> np.ndarray:
  """A value or colour per token as a map: [B, N, c] or [B, N] -> [B, H, W, c or 1], `size` pixels a token."""
  return np.asarray(x).reshape(len(x), *grid, -1).repeat(size, 1).repeat(size, 2)


def overlay(pixels: np.ndarray, heat: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
  """Images in [0, 1], [B, H, W, 3], darkened but for where heat [B, N], relative to each image's largest, lights them up."""
  relative = heat / np.maximum(heat.max(1, keepdims=True), 1e-12)
  return 0.25 * pixels + 0.75 * enlarge(relative, grid, pixels.shape[1] // grid[0]) * np.float32(
    [1, 0.85, 0.3]
  )


def shades(x: np.ndarray) -> np.ndarray:
  """Numbers in [0, 1] as colours, [...] -> [..., 3]: dark violet, over green, to light yellow, ever lighter."""
  anchors = np.array(
    [
      [0.13, 0.04, 0.24],
      [0.15, 0.27, 0.50],
      [0.13, 0.55, 0.50],
      [0.55, 0.78, 0.30],
      [0.99, 0.94, 0.45],
    ]
  )
  return np.stack(
    [np.interp(x, np.linspace(0, 1, len(anchors)), channel) for channel in anchors.T], -1
  )


def principal_colours(features: np.ndarray, basis: np.ndarray | None = None) -> np.ndarray:
  """The first three principal components of tokens, over all of them, as colours in [0, 1]: [B, N, D] -> [B, N, 3].

  `basis`: other tokens [.., D] whose axes and range are taken; the same colour then means the same feature in both.
  """
  flat = lambda x: np.asarray(x).reshape(-1, x.shape[-1]).astype(np.float64)
  own = flat(features if basis is None else basis)
  mean = own.mean(0)
  axes = np.linalg.eigh((own - mean).T @ (own - mean))[1][:, :-4:-1]
  low, high = np.percentile((own - mean) @ axes, [2, 98], axis=0)
  return np.clip(
    ((flat(features) - mean) @ axes - low) / np.maximum(high - low, 1e-12), 0, 1
  ).reshape(*features.shape[:-1], 3)
