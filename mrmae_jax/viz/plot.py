"""Draws curves and confusion matrices with matplotlib, as a file or as the text of an SVG."""

import io
import itertools
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mrmae_jax.runs.paths import atomic_write

COLORS = (  # readable on white and on black
  "#2f6fb3",
  "#c8553d",
  "#3c8d4f",
  "#8a5fb0",
  "#b8860b",
  "#1f9aa0",
  "#c2497f",
  "#7a7a7a",
)
LINE_STYLES = ("-", "--", ":", "-.")
MAX_NAMES, MAX_COUNTS = 60, 20  # classes of a confusion matrix with names, with numbers
MAX_MARKERS = 24  # a curve with more points is a line alone
INK = "#333333"
# Browsers read this inside an <img>, too: text and axes are light where the page is dark.
_STYLE = b"<style>svg{color:#333}@media(prefers-color-scheme:dark){svg{color:#ddd}}</style>"


def line_plot(
  series: dict[str, tuple[Sequence[float], Sequence[float]]],
  path: str | Path | None = None,
  *,
  title: str,
  xlabel: str,
  ylabel: str,
  log_y: bool = False,
) -> bytes:
  """Draws one line per series over common axes, with a legend if there are several.

  Colors follow the order of `series`. A series without points takes its color and is not drawn, so
  that plots of the same runs agree on their colors.

  Args:
    series: {name: (x, y)}. Points that are not finite are skipped; with `log_y` also those at or
      below 0.
    path: file to write, .png or .svg; None writes nothing.
    title: text above the axes.
    xlabel: text below the axes.
    ylabel: text beside the axes.
    log_y: whether y is logarithmic.

  Returns:
    The content of the file. Without `path` it is an SVG on a transparent ground, whose text and
    axes follow a page into dark mode.

  Raises:
    ValueError: there is not a single point to draw, or a path with another suffix.
  """
  kind = Path(path).suffix[1:] if path else "svg"
  if kind not in ("png", "svg"):
    raise ValueError(f"{path} must end in .png or .svg")
  columns = _legend_columns(series)
  legend_rows = -(-len(series) // columns) if len(series) > 1 else 0
  size = (4.8, 3.1 + 0.19 * legend_rows)  # inches; the legend does not squeeze the axes
  figure = Figure(figsize=size, layout="constrained", facecolor="white")
  axes = figure.add_subplot()
  lines = _draw_lines(axes, series, log_y)
  if not lines:
    raise ValueError(f"{title}: there is not a point to draw")
  axes.set_title(title, fontsize=11, color=INK, loc="left", parse_math=False)
  axes.set_xlabel(xlabel, color=INK, parse_math=False)
  axes.set_ylabel(ylabel, color=INK, parse_math=False)
  axes.tick_params(colors=INK)
  axes.grid(color=INK, alpha=0.15)
  axes.spines[["top", "right"]].set_visible(False)
  axes.spines[["bottom", "left"]].set_color(INK)
  axes.set_facecolor("none")
  if len(series) > 1:
    _add_legend(figure, lines, columns)
  content = _render(figure, kind, transparent=path is None)
  if path:
    with atomic_write(path) as tmp:
      tmp.write_bytes(content)
  return content


def confusion_plot(counts: np.ndarray, names: Sequence[str], path: str | Path) -> None:
  """Draws a confusion matrix as a .png; colors are shares of the true class.

  Up to MAX_COUNTS classes have their counts in the cells, up to MAX_NAMES their names beside.

  Args:
    counts: int [C, C], images by true class (rows) and predicted class.
    names: of the classes.
    path: file to write.
  """
  size = len(counts)
  side = min(max(3.6, 0.34 * size), 12.0)  # inches
  figure = Figure(figsize=(side + 1.6, side + 1.0), layout="constrained", facecolor="white")
  axes = figure.add_subplot()
  shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
  picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
  figure.colorbar(picture, shrink=0.7, label="share of the true class")
  axes.set_xlabel("predicted class", color=INK)
  axes.set_ylabel("true class", color=INK)
  axes.tick_params(colors=INK)
  if size <= MAX_NAMES:
    labels = [name if len(name) <= 20 else f"{name[:19]}\u2026" for name in names]
    axes.set_xticks(range(size), labels, rotation=90, parse_math=False)
    axes.set_yticks(range(size), labels, parse_math=False)
  if size <= MAX_COUNTS:
    for i, j in zip(*np.nonzero(counts)):
      color = "white" if shares[i, j] > 0.5 else INK
      axes.text(j, i, counts[i, j], ha="center", va="center", fontsize=7, color=color)
  with atomic_write(path) as tmp:
    tmp.write_bytes(_render(figure, "png", transparent=False))


def _draw_lines(axes, series, log_y: bool) -> dict:
  """Draws the series; returns {name: matplotlib's line} of those that have a point."""
  styles = itertools.cycle(itertools.product(LINE_STYLES, COLORS))
  lines = {}
  for (name, (x, y)), (style, color) in zip(series.items(), styles):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    is_drawable = np.isfinite(x) & np.isfinite(y) & ((y > 0) | (not log_y))
    if not is_drawable.any():
      continue
    marker = "o" if is_drawable.sum() <= MAX_MARKERS else None
    (lines[name],) = axes.plot(
      x[is_drawable], y[is_drawable], style, color=color, marker=marker, markersize=3.5
    )
  if log_y and lines:
    axes.set_yscale("log")
  return lines


def _legend_columns(names) -> int:
  """Returns how many names of this length fit beside each other, at most 4."""
  return max(1, min(4, 56 // (max(map(len, names), default=0) + 6)))


def _add_legend(figure: Figure, lines: dict, columns: int) -> None:
  """Names the lines below the axes."""
  legend = figure.legend(
    list(lines.values()),
    list(lines),
    loc="outside lower center",
    ncols=columns,
    frameon=False,
    fontsize=9,
    labelcolor=INK,
  )
  for text in legend.get_texts():
    text.set_parse_math(False)  # a name may hold dollar signs


def _render(figure: Figure, kind: str, transparent: bool) -> bytes:
  """Returns the figure as a file's content; the same figure gives the same bytes."""
  FigureCanvasAgg(figure)
  content = io.BytesIO()
  # Text stays text; fixed names and an empty date make the same plot the same file.
  with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mrmae"}):
    metadata = {"Date": None} if kind == "svg" else {}
    figure.savefig(content, format=kind, dpi=200, transparent=transparent, metadata=metadata)
  if not transparent:
    return content.getvalue()
  start = content.getvalue().index(b"<svg")
  head, tail = content.getvalue()[start:].replace(INK.encode(), b"currentColor").split(b">", 1)
  return head + b">" + _STYLE + tail
