"""Writes one self-contained HTML file, with pictures inside and without scripts or requests.

It follows the reader into dark mode and onto narrow screens.
"""

import base64
import html
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from mrmae_jax.errors import printable
from mrmae_jax.runs.paths import atomic_write

_STYLE = """:root {
  color-scheme: light dark;
  --back: #fbfbfa; --text: #1d1f21; --faint: #5a5f66; --line: #d8dadd; --link: #0b57a4;
}
@media (prefers-color-scheme: dark) {
  :root { --back: #16181b; --text: #e4e6e8; --faint: #a4aab2; --line: #3a3f45; --link: #8cbcf2; }
}
body {
  margin: 0 auto; max-width: 76rem; padding: 1.5rem 1rem 4rem;
  background: var(--back); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere;
}
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; }
h2 {
  font-size: 1.2rem; margin: 2.5rem 0 .5rem; padding-top: 1rem;
  border-top: 1px solid var(--line);
}
p, nav, figcaption { max-width: 48rem; }
nav ul {
  display: flex; flex-wrap: wrap; gap: .25rem 1.25rem;
  margin: 1rem 0 0; padding: 0; list-style: none;
}
a { color: var(--link); }
.subtitle, figcaption { color: var(--faint); }
figure { margin: 1rem 0; }
figcaption { margin-top: .5rem; }
.scroll { overflow-x: auto; }
.row {
  display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr));
}
.row figure { margin: 0; }
.row img { width: 100%; max-width: 34rem; }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
img { display: block; height: auto; max-width: max(100%, 40rem); border-radius: 4px; }
table { border-collapse: collapse; margin: 1rem 0; overflow-wrap: normal; }
th, td {
  padding: .3rem 1rem .3rem 0; border-bottom: 1px solid var(--line);
  text-align: left; vertical-align: top;
}
td { font-variant-numeric: tabular-nums; }"""
_SCROLL = '<div class="scroll" tabindex="0" role="group" aria-label="{}, may scroll sideways">'


class Figure(NamedTuple):
  """A picture on a page.

  Attributes:
    picture: uint8 [H, W, 3], or an SVG as bytes, which names its own size.
    alt: what the picture shows, for readers who do not see it.
    caption: text below.
  """

  picture: np.ndarray | bytes
  alt: str
  caption: str = ""


class Page:
  """A page that grows from top to bottom. It escapes all text; no argument is taken for HTML."""

  def __init__(self, title: str, subtitle: str = ""):
    """Starts a page; `title` names the window, too."""
    self._title = title
    self._subtitle = subtitle
    self._headings = []
    self._blocks = []

  def section(self, heading: str, text: str = "") -> None:
    """Begins a section: a heading, an entry in the contents, and paragraphs.

    Blank lines divide the paragraphs of `text`.
    """
    self._headings.append(heading)
    self._blocks.append(f'<h2 id="s{len(self._headings)}">{_escape(heading)}</h2>')
    self._blocks += [
      f"<p>{_escape(paragraph)}</p>" for paragraph in text.split("\n\n") if paragraph.strip()
    ]

  def figure(self, figure: Figure) -> None:
    """Adds a picture at its own size, at most at the page's width; narrow screens scroll it."""
    self._blocks.append(
      f"<figure>{_SCROLL.format('Picture')}{_img(figure)}</div>{_figcaption(figure)}</figure>"
    )

  def row(self, figures: list[Figure]) -> None:
    """Adds pictures beside each other, up to three to a row, as the window has room."""
    self._blocks.append('<div class="row">')
    self._blocks += [f"<figure>{_img(figure)}{_figcaption(figure)}</figure>" for figure in figures]
    self._blocks.append("</div>")

  def table(self, header: list, rows: list[list]) -> None:
    """Adds a table; str() turns its cells into text, and `header` names its columns."""
    cells = lambda tag, row: "".join(f"<{tag}>{_escape(str(cell))}</{tag}>" for cell in row)
    self._blocks.append(
      f"{_SCROLL.format('Table')}<table><thead><tr>{cells('th', header)}</tr></thead><tbody>"
      + "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
      + "</tbody></table></div>"
    )

  def write(self, path: str | Path) -> None:
    """Writes the file atomically; raises OSError if that fails."""
    title, subtitle = _escape(self._title), _escape(self._subtitle)
    contents = "".join(
      f'<li><a href="#s{i}">{_escape(heading)}</a></li>'
      for i, heading in enumerate(self._headings, 1)
    )
    lines = [
      "<!DOCTYPE html>",
      '<html lang="en">',
      "<head>",
      '<meta charset="utf-8">',
      '<meta name="viewport" content="width=device-width, initial-scale=1">',
      '<meta http-equiv="Content-Security-Policy" '
      """content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">""",
      '<link rel="icon" href="data:,">',
      f"<title>{title}</title>",
      f"<style>\n{_STYLE}\n</style>",
      "</head>",
      "<body>",
      "<header>",
      f"<h1>{title}</h1>",
      f'<p class="subtitle">{subtitle}</p>',
      f'<nav aria-label="Contents"><ul>{contents}</ul></nav>',
      "</header>",
      "<main>",
      *self._blocks,
      "</main>",
      "</body>",
      "</html>",
      "",
    ]
    with atomic_write(path) as tmp:  # a file's name may hold bytes that are not text: "replace"
      tmp.write_bytes("\n".join(lines).encode("utf-8", "replace"))


def _escape(text: str) -> str:
  """Returns text as HTML."""
  return html.escape(printable(text, keep="\n"))


def _img(figure: Figure) -> str:
  """Returns the picture as an <img> that holds its own data."""
  if isinstance(figure.picture, bytes):
    kind, content, size = "svg+xml", figure.picture, ""
  else:
    kind, content = "png", encode_png(figure.picture)
    height, width, _ = figure.picture.shape
    size = f' width="{width}" height="{height}"'
  source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
  return f'<img src="{source}" alt="{_escape(figure.alt)}"{size}>'


def _figcaption(figure: Figure) -> str:
  return f"<figcaption>{_escape(figure.caption)}</figcaption>" if figure.caption else ""


def encode_png(picture: np.ndarray) -> bytes:
  """Returns uint8 [H, W, 3] as the content of a PNG file."""
  content = io.BytesIO()
  Image.fromarray(picture).save(content, "PNG", optimize=True)
  return content.getvalue()
