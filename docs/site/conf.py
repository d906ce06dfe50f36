"""How Sphinx builds the documentation; `make docs` runs it."""

import re
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.writers.html5 import HTML5Translator

import fxfeedback

ROOT = Path(__file__).resolve().parents[2]

project = "fxfeedback"
author = "The fxfeedback developers"
project_copyright = author
release = fxfeedback.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "fxfeedback"
html_static_path = ["style"]
html_css_files = ["site.css"]
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
    "CONTRIBUTING.md": "rules.md",
    "docs/benchmarks.md": "benchmarks.md",
    "docs/gpu.md": "gpu.md",
    "docs/operators.md": "operators.md",
    "docs/reliability.md": "reliability.md",
    "docs/results.md": "results.md",
    "docs/scale.md": "scale.md",
}
"""A file of the repository -> the page that includes it."""

LOADS_FROM_ELSEWHERE = re.compile(r"""<(script|img|iframe|link)\b[^>]*\s(src|href)=["']?(https?:)?//""")


def inline_formula(writer: HTML5Translator, node: nodes.math) -> None:
    """Write a formula in a line."""
    writer.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def displayed_formula(writer: HTML5Translator, node: nodes.math_block) -> None:
    """Write a formula on a line of its own."""
    writer.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def point_to_pages(app: Sphinx, included: Path, page: str, content: list[str]) -> None:
    """Let the links of an included file lead to pages of the site."""
    folder = Path(app.srcdir, included).resolve().parent

    def pointed(link: re.Match[str]) -> str:
        target = (folder / link[1]).resolve()
        in_repository = str(target.relative_to(ROOT)) if target.is_relative_to(ROOT) else ""
        return f"]({PAGES[in_repository]})" if in_repository in PAGES else link[0]

    content[0] = re.sub(r"\]\(([^)#:\s]+)(?:#[^)\s]*)?\)", pointed, content[0])


def part_plurals(app: Sphinx, what: str, name: str, member: object, options: object, lines: list[str]) -> None:
    """Let code in a docstring be followed by a letter, as in `Connection`s."""
    lines[:] = [re.sub(r"(`[^`]+`)(?=\w)", r"\1\\ ", line) for line in lines]


def check_hosts(app: Sphinx, error: Exception | None) -> None:
    """Fail where a page would load something from another host."""
    if error is not None or app.builder.format != "html":
        return
    for page in Path(app.outdir).rglob("*.html"):
        if found := LOADS_FROM_ELSEWHERE.search(page.read_text()):
            raise ExtensionError(f"{page.name} would load something from another host: {found[0]}")


def setup(app: Sphinx) -> None:
    """Tell Sphinx of all these."""
    app.add_html_math_renderer("mathml", (inline_formula, None), (displayed_formula, None))
    app.connect("include-read", point_to_pages)
    app.connect("autodoc-process-docstring", part_plurals, priority=900)  # after napoleon
    app.connect("build-finished", check_hosts)
