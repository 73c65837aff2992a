"""Sphinx configuration."""

import fastforget

project = "fastforget"
author = "The fastforget authors"
copyright = "the fastforget authors, Apache-2.0"
version = release = fastforget.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
default_role = "code"  # a docstring writes `name` as Markdown does

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_use_rtype = False

html_theme = "furo"
html_title = "fastforget"
