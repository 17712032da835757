"""The site: `sphinx-build -W --keep-going -b html docs docs/_build`, with the extra `docs`.

The pages are plain Markdown, so that they read as well on a repository page. Links are relative:
to another page, or to any file of the repository, which the site then offers for download.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the docstrings are those of this checkout

from mrmae_jax.constants import VERSION  # noqa: E402

project = "mrmae_jax"
release = VERSION

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
nitpicky = False  # types in signatures are those of jax, numpy, optax and flax, which have no pages

# Markdown. Headings down to the third level are targets of links, and a missing target is an error.
myst_heading_anchors = 3
myst_links_external_new_tab = False

# Docstrings. `x` is code there, and the fields of a class are listed under "Attributes".
default_role = "code"
smartquotes_action = "D"  # dashes, no quotes
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Attributes", "params_style")]
maximum_signature_line_length = 90

html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False


def clean_signature(app, what, name, obj, options, signature, return_annotation):
  """Shortens what jax and Linen add to signatures."""
  shorter = [
    (r", parent: .*?, name: str \| None = None", ""),  # every Linen module has these two
    (r"<class '([\w.]+)'>", r"\1"),
    (r"(~\w+\.)*Array \| [^\[\]]*? \| complex", "ArrayLike"),
  ]
  texts = [signature or "", return_annotation or ""]
  for pattern, short in shorter:
    texts = [re.sub(pattern, short, text) for text in texts]
  return texts[0] or None, texts[1] or None


def setup(app):
  app.connect("autodoc-process-signature", clean_signature)
