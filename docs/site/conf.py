"""How Sphinx builds the documentation; `make docs` runs it."""

import re
import sys
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

import fxfeedback

ROOT = Path(__file__).parents[2]

project = "fxfeedback"
author = "The fxfeedback developers"
project_copyright = author
release = fxfeedback.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["README.md"]
html_theme = "furo"
html_title = "fxfeedback"
html_copy_source = False
html_show_sphinx = False

# Markdown: formulas between dollars, headings that links can point to
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3

# The tutorials run when the site is built; a cell that fails, or runs too long, fails the build
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # there are no widgets, and their scripts would come from other hosts

# Docstrings: single backticks hold code
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_use_param = False
napoleon_use_rtype = False

# Formulas become MathML while the site is built, so that a reader's browser needs no script for them
html_math_renderer = "mathml"

PAGES = {
    "../CONTRIBUTING.md#adding-a-rule": "rules.md",
    "../CONTRIBUTING.md": "rules.md",
}
"""Links in files that pages include -> the page that has their target here."""


def inline_formula(writer, node: nodes.math) -> None:
    writer.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def displayed_formula(writer, node: nodes.math_block) -> None:
    writer.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def point_to_pages(app: Sphinx, included: Path, page: str, content: list[str]) -> None:
    """Let the links of an included file lead to pages of the site."""
    for link, target in PAGES.items():
        content[0] = content[0].replace(f"]({link})", f"]({target})")


def check_hosts(app: Sphinx, error: Exception | None) -> None:
    """A page of the site loads nothing from other hosts."""
    if error is not None or app.builder.format != "html":
        return
    loads = re.compile(r"""<(?:script|img|iframe)[^>]*\ssrc="(?:https?:)?//[^"]*"|<link[^>]*\shref="(?:https?:)?//[^"]*\"""")
    for page in Path(app.outdir).rglob("*.html"):
        if found := loads.search(page.read_text()):
            raise ExtensionError(f"{page.name} would load something from another host: {found[0]}")


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (inline_formula, None), (displayed_formula, None))
    app.connect("include-read", point_to_pages)
    app.connect("build-finished", check_hosts)
