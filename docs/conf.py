"""The site: `sphinx-build -W --keep-going -b html docs docs/_build`, with the extra `docs`.

The pages are plain Markdown, so that they read as well on a repository page. Links are relative:
to another page, or to any file of the repository, which the site then offers for download.
"""

import configparser
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the docstrings are those of this checkout

metadata = configparser.ConfigParser()
metadata.read(ROOT / "setup.cfg")
project = metadata["metadata"]["name"]
release = metadata["metadata"]["version"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
nitpicky = False  # types in signatures are those of jax, numpy, optax and flax, which have no pages

# Markdown. Headings down to the third level are targets of links, and a missing target is an error.
myst_heading_anchors = 3
myst_links_external_new_tab = False

# Docstrings. `x` is code there, as in the comments.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"{project} {release}"
html_copy_source = False
html_show_copyright = False
