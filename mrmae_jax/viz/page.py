"""One HTML file that needs nothing else: pictures inside, no script, no request; light or dark, narrow or wide."""

import base64
import html
import io
from pathlib import Path

import numpy as np
from PIL import Image

_STYLE = """:root { color-scheme: light dark; --back: #fbfbfa; --text: #1d1f21; --faint: #5a5f66; --line: #d8dadd; --link: #0b57a4; }
@media (prefers-color-scheme: dark) {
  :root { --back: #16181b; --text: #e4e6e8; --faint: #a4aab2; --line: #3a3f45; --link: #8cbcf2; }
}
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem 1rem 4rem; background: var(--back); color: var(--text);
       font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--line); }
p, nav, figcaption { max-width: 48rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: 1rem 0 0; padding: 0; list-style: none; }
a { color: var(--link); }
.subtitle, figcaption { color: var(--faint); }
figure { margin: 1rem 0; }
figcaption { margin-top: .5rem; }
.scroll { overflow-x: auto; }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
img { display: block; height: auto; max-width: max(100%, 40rem); border-radius: 4px; }
table { border-collapse: collapse; margin: 1rem 0; overflow-wrap: normal; }
th, td { padding: .3rem 1rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td { font-variant-numeric: tabular-nums; }"""


class Page:
  """A page that grows from top to bottom. All text is escaped here; nothing that is given is taken for HTML."""

  def __init__(self, title: str, subtitle: str = ""):
    """`title`: of the window and of the page; `subtitle`: a line below it."""
    self._title, self._subtitle = title, subtitle
    self._headings, self._parts = [], []

  def section(self, heading: str, text: str = "") -> None:
    """Begins a section: a heading, an entry in the list of contents, and paragraphs, which blank lines divide."""
    self._headings.append(heading)
    self._parts.append(f'<h2 id="s{len(self._headings)}">{html.escape(heading)}</h2>')
    self._parts += [
      f"<p>{html.escape(paragraph)}</p>" for paragraph in text.split("\n\n") if paragraph.strip()
    ]

  def figure(self, picture: np.ndarray | str, alt: str, caption: str = "") -> None:
    """A picture: uint8 [H, W, 3], or the text of an SVG.

    Args:
      picture: see above. It is shown at its own size, or that of the page if this is less; on narrow screens it scrolls. An SVG
        should name its own size, and may look at prefers-color-scheme.
      alt: what there is to see, for those who do not see it.
      caption: below.
    """
    if isinstance(picture, str):
      kind, content, size = "svg+xml", picture.encode(), ""
    else:
      encoded = io.BytesIO()
      Image.fromarray(picture).save(encoded, "PNG", optimize=True)
      kind, content, size = (
        "png",
        encoded.getvalue(),
        f' width="{picture.shape[1]}" height="{picture.shape[0]}"',
      )
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    self._parts.append(
      '<figure><div class="scroll" tabindex="0" role="group" aria-label="Picture, may scroll sideways">'
      f'<img src="{source}" alt="{html.escape(alt)}"{size}></div>'
      + (f"<figcaption>{html.escape(caption)}</figcaption>" if caption else "")
      + "</figure>"
    )

  def table(self, header: list, rows: list[list]) -> None:
    """A table of anything that str() turns into text; `header` names the columns."""
    cells = lambda tag, row: "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row)
    self._parts.append(
      '<div class="scroll" tabindex="0" role="group" aria-label="Table, may scroll sideways"><table>'
      f"<thead><tr>{cells('th', header)}</tr></thead><tbody>"
      + "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
      + "</tbody></table></div>"
    )

  def write(self, path: str | Path) -> None:
    """Writes the file, whole or not at all; OSError if that cannot be done."""
    from mrmae_jax.runs.paths import atomic_write  # commands import this module before jax

    title, subtitle = html.escape(self._title), html.escape(self._subtitle)
    contents = "".join(
      f'<li><a href="#s{i}">{html.escape(heading)}</a></li>'
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
      *self._parts,
      "</main>",
      "</body>",
      "</html>",
      "",
    ]
    with atomic_write(Path(path)) as unfinished:  # names of files may hold bytes that are no text
      unfinished.write_bytes("\n".join(lines).encode("utf-8", "replace"))
