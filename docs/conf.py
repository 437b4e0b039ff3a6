"""Sphinx: ``sphinx-build -W -b html docs build/docs``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import mmflex

project = "mmflex"
author = "the mmflex authors"
project_copyright = "2026, the mmflex authors. Licence: Apache 2.0"
version = release = mmflex.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "docs.tools.mathml",
    "docs.tools.site",
]
exclude_patterns = ["tools"]
default_role = "py:obj"
smartquotes = False  # "auto" and --json are meant as they are

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme = "furo"
html_title = f"mmflex {release}"
html_theme_options = {"navigation_with_keys": True}
html_copy_source = False
html_show_sourcelink = False
