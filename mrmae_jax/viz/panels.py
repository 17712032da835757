"""Draws the panels of `mrmae visualize` from arrays. Knows no model.

Images are float [B, H, W, 3] in [0, 1], one row of a panel each. N tokens lie on a grid of
(rows, columns).
"""

from typing import NamedTuple

import numpy as np

from mrmae_jax.viz.grid import (
  color_scale,
  draw_grid,
  enlarge,
  frame_patch,
  interleave,
  overlay,
  perplexity,
)

HEADS_PER_ROW = 6


class Panel(NamedTuple):
  """One panel of a page.

  Attributes:
    picture: uint8 [H, W, 3].
    alt: what the picture shows, for readers who do not see it.
    caption: how to read it.
    table: (header, rows) of numbers, or None.
  """

  picture: np.ndarray
  alt: str
  caption: str
  table: tuple[list, list] | None = None


def draw_columns(columns: dict[str, np.ndarray], note: str = "") -> np.ndarray:
  """Draws {title: images} as a table; returns uint8 [height, width, 3]."""
  return draw_grid(list(columns.values()), list(columns), note)


def reconstruction(
  drawn: dict[str, np.ndarray], num_visible: int, num_tokens: int, norm_pix: bool
) -> Panel:
  """Shows original, what the encoder sees, decoder output, and output around visible patches.

  Args:
    drawn: images of `PretrainedModel.reconstruct`.
    num_visible: patches that the encoder sees.
    num_tokens: N.
    norm_pix: whether the decoder predicts normalized patches.
  """
  columns = {
    "original": drawn["original"],
    "encoder sees": drawn["masked"],
    "decoder output": drawn["reconstruction_blind"],
    "visible + output": drawn["pasted_blind"],
  }
  caption = (
    f"{num_visible} of {num_tokens} patches are visible, drawn at random; grey ones are hidden. "
    "The decoder is trained on hidden patches alone, so its output in visible places means "
    "nothing. The fourth column shows the visible patches themselves, and its output elsewhere."
  )
  if norm_pix:
    columns["true statistics"] = drawn["pasted"]
    caption += (
      " The weights predict patches without brightness and contrast (norm-pix). These come from "
      "the visible patches around each hidden one, weighted by 1 / distance^3, so nothing that is "
      "hidden gets into columns three and four. In the last column they are those of the true "
      "hidden patches: it looks better than what the model knows."
    )
  alt = f"{len(drawn['original'])} images, one a row: {', '.join(columns)}."
  return Panel(draw_columns(columns), alt, caption)


def ratios(
  drawn_at: dict[float, dict[str, np.ndarray]],
  num_visible: dict[float, int],
  num_tokens: int,
  trained_ratio: float,
  norm_pix: bool,
) -> Panel:
  """Shows reconstructions with more and more patches hidden.

  Args:
    drawn_at: {mask ratio: images of `PretrainedModel.reconstruct`}.
    num_visible: {mask ratio: patches that the encoder sees}.
    num_tokens: N.
    trained_ratio: mask ratio of the training.
    norm_pix: whether the decoder predicts normalized patches.
  """
  original = next(iter(drawn_at.values()))["original"]
  columns = {"original": original.repeat(2, 0)}
  rows = []
  for ratio, drawn in drawn_at.items():
    visible = f"{num_visible[ratio]} of {num_tokens}"
    columns[f"{ratio:.0%}: {visible}"] = interleave([drawn["masked"], drawn["pasted_blind"]])
    hidden_share = (num_tokens - num_visible[ratio]) / num_tokens
    error = np.square(drawn["pasted_blind"] - original).mean() / hidden_share
    rows.append([f"{ratio:.0%}", visible, f"{255 * error**0.5:.1f}"])
  caption = (
    "Above what the encoder sees, below the visible patches with the decoder's output in hidden "
    "places. The titles give the share that is hidden, and how many patches are visible. What is "
    "visible at one ratio is a part of what is visible at the one before. The model was trained "
    f"at {trained_ratio:.0%}. Error: root mean square over the hidden patches, in levels of 255."
  )
  if norm_pix:
    caption += (
      " Brightness and contrast of hidden patches come from visible ones, weighted by "
      "1 / distance^3."
    )
  alt = (
    f"{len(original)} images with {', '.join(list(columns)[1:])} patches visible: above what the "
    "encoder sees, below the reconstruction."
  )
  return Panel(draw_columns(columns), alt, caption, (["hidden", "visible patches", "error"], rows))


def attention(
  pixels: np.ndarray,
  weights: np.ndarray,
  grid: tuple[int, int],
  query: str,
  framed_patch: tuple[int, int] | None = None,
) -> Panel:
  """Shows what each head of a block attends to, and their mean.

  Args:
    pixels: the images.
    weights: [B, heads, N], attention to the patches.
    grid: of the tokens.
    query: what attends, for the caption.
    framed_patch: (row, column) of a patch to frame.
  """
  size = pixels.shape[1] // grid[0]
  first_column = pixels
  if framed_patch:
    row, column = framed_patch
    first_column = frame_patch(pixels, row * size, column * size, size)
  num_heads = weights.shape[1]
  titles = [f"head {i + 1}" for i in range(num_heads)] + ["mean"]
  heats = (*weights.swapaxes(0, 1), weights.mean(1))
  maps = [overlay(pixels, heat, grid) for heat in heats]
  rows = -(-len(maps) // (HEADS_PER_ROW + 1))
  width = -(-len(maps) // rows)
  rows = -(-len(maps) // width)
  maps += [np.ones_like(pixels)] * (rows * width - len(maps))
  columns = [first_column.repeat(rows, 0), *(interleave(maps[i::width]) for i in range(width))]
  titles = ["image", *(", ".join(titles[i::width]) for i in range(width))]
  spread = perplexity(weights).mean(0)
  return Panel(
    draw_grid(columns, titles),
    f"{len(pixels)} images, each with a map for each of {num_heads} heads, and their mean.",
    f"Query: {query}. Last block, nothing masked; each map relative to its own largest value. "
    f"Spread: over how many of the {weights.shape[-1]} patches a head's attention is distributed "
    "(perplexity), mean over the images.",
    (["head", "spread"], [[i + 1, f"{x:.1f}"] for i, x in enumerate(spread)]),
  )


def cosine(pixels: np.ndarray, cosines: np.ndarray, grid: tuple[int, int], caption: str) -> Panel:
  """Shows cosines [B, N] of the tokens as maps, and their statistics per image."""
  low, high = (float(x) for x in np.percentile(cosines, [2, 98]))
  colors = color_scale((cosines - low) / max(high - low, 1e-6))
  columns = {"image": pixels, "cosine": enlarge(colors, grid, pixels.shape[1] // grid[0])}
  rows = [
    [i + 1, *(f"{x:.3f}" for x in (row.mean(), row.min(), row.max()))]
    for i, row in enumerate(cosines)
  ]
  return Panel(
    draw_columns(columns, f"dark: {low:.3f} or less; light: {high:.3f} or more"),
    f"{len(pixels)} images, and maps of how similar model and teacher are, patch by patch.",
    caption,
    (["row", "mean cosine", "lowest", "highest"], rows),
  )
