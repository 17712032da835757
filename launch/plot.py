"""One picture of a metric over the steps of several runs, drawn with Pillow: nothing more needs to be installed."""

import colorsys
import math

from PIL import Image, ImageDraw, ImageFont

SCALE = 3  # drawn so many times larger, then reduced: Pillow's lines have no smooth edges
WIDTH, HEIGHT, MARGIN, LEGEND_ROW = 960, 480, 64, 20
GREY, BLACK = (225, 225, 225), (40, 40, 40)


def line_plot(series: dict[str, list[tuple[float, float]]], title: str) -> Image.Image:
  """Draws one line for each of `series`, {name: [(step, value), ...]}, over common axes; the names stand below.

  Points that are not finite are left out. ValueError if nothing is left.
  """
  series = {
    name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    for name, points in series.items()
  }
  everything = [point for points in series.values() for point in points]
  if not everything:
    raise ValueError(f"{title}: there is nothing to draw")
  xs, ys = (_ticks(min(values), max(values)) for values in zip(*everything))
  columns = 1 if max(map(len, series)) > 60 else 2
  height = HEIGHT + LEGEND_ROW * -(-len(series) // columns) + 12
  picture = Image.new("RGB", (WIDTH * SCALE, height * SCALE), "white")
  draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13 * SCALE)
  right, bottom = WIDTH - MARGIN // 2, HEIGHT - MARGIN

  def place(x, y):
    across, up = (x - xs[0]) / (xs[-1] - xs[0]), (y - ys[0]) / (ys[-1] - ys[0])
    return MARGIN + across * (right - MARGIN), bottom - up * (bottom - MARGIN)

  def line(points, colour, width):
    draw.line(
      [value * SCALE for point in points for value in point],
      fill=colour,
      width=round(width * SCALE),
      joint="curve",
    )

  def text(x, y, words, anchor):
    draw.text((x * SCALE, y * SCALE), words, fill=BLACK, font=font, anchor=anchor)

  for tick in xs:
    line([place(tick, ys[0]), place(tick, ys[-1])], GREY, 1)
    text(*place(tick, ys[0] - (ys[-1] - ys[0]) * 0.02), f"{tick:g}", "ma")
  for tick in ys:
    line([place(xs[0], tick), place(xs[-1], tick)], GREY, 1)
    text(MARGIN - 8, place(xs[0], tick)[1], f"{tick:g}", "rm")
  line([place(xs[0], ys[-1]), place(xs[0], ys[0]), place(xs[-1], ys[0])], BLACK, 1)
  text((MARGIN + right) / 2, MARGIN / 2, title, "mm")
  text((MARGIN + right) / 2, bottom + 36, "step", "ma")
  for i, (name, points) in enumerate(series.items()):
    colour = _colour(i, len(series))
    spots = [place(*point) for point in sorted(points)]
    if len(spots) > 1:
      line(spots, colour, 1.8)
    for x, y in spots if len(spots) < 20 else ():
      draw.ellipse([value * SCALE for value in (x - 2.5, y - 2.5, x + 2.5, y + 2.5)], fill=colour)
    left, top = (
      MARGIN + (i % columns) * (right - MARGIN) / columns,
      HEIGHT + LEGEND_ROW * (i // columns),
    )
    line([(left, top), (left + 24, top)], colour, 3)
    text(left + 32, top, name, "lm")
  return picture.resize((WIDTH, height), Image.Resampling.LANCZOS)


def _ticks(low: float, high: float) -> list[float]:
  """About six round numbers, the first not above `low`, the last not below `high`."""
  span = (high - low) or abs(high) or 1.0
  power = 10.0 ** math.floor(math.log10(span / 6))
  step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= span / 6)
  first, last = math.floor(low / step), math.ceil(high / step)
  return [i * step for i in range(first, max(last, first + 1) + 1)]


def _colour(index: int, count: int) -> tuple[int, int, int]:
  """Around the circle of hues, every second one darker."""
  return tuple(
    round(255 * part) for part in colorsys.hsv_to_rgb(index / count, 0.85, (0.85, 0.6)[index % 2])
  )
