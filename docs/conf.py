"""Settings of `make docs`: everything is read from the tree, nothing from the network."""

import sys
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import_module("tests.support.torchtitan")  # it has a stand-in for what torchtitan has for GPUs only

project = "moe-dispatch"
html_title = "moe-dispatch"
html_theme = "furo"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

myst_heading_anchors = 3  # links to headings, as GitHub makes them

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # the fields of a dataclass are listed once

napoleon_use_rtype = False  # shapes stand where others have types

nitpicky = True  # a role or a type that names nothing is an error; dotted types may be other projects'
nitpick_ignore_regex = [("py:class", r".*\..*")]
