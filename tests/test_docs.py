"""The documentation says what is true: its code runs, its names exist, its links lead somewhere."""

import ast
import inspect
import re
import runpy
from functools import reduce
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch

import fxfeedback
from fxfeedback.commands.main import main
from marks import one_in

ROOT = Path(__file__).parents[1]
SITE = ROOT / "docs/site"
PAGES = {path.stem: path.read_text() for path in SITE.glob("*.md")}
PROSE = [path for folder in (ROOT, ROOT / "docs", SITE) for path in sorted(folder.glob("*.md"))]
PUBLISHED = ["from_lrm_steering", "from_top_down_networks"]


def blocks(page: str, kind: str) -> list[str]:
    """The contents of a page's fenced blocks that open with `kind`."""
    return re.findall(rf"^```{re.escape(kind)}\n(.*?)^```$", PAGES[page], re.MULTILINE | re.DOTALL)


def run(page: str, kind: str, count: int) -> dict[str, Any]:
    """Run a page's blocks, of which there are at least `count`, one after the other; returns their names."""
    matplotlib.use("agg")
    names: dict[str, Any] = {}
    assert len(blocks(page, kind)) >= count
    for number, block in enumerate(blocks(page, kind), 1):
        exec(compile(block, f"{page}.md, block {number}", "exec"), names)
    return names


def resolve(start: Any, path: str) -> Any:
    """The attribute of an attribute of ...; those that a wrapper has for some options only count as there."""
    return reduce(lambda value, name: None if name in getattr(value, "OWN", ()) else getattr(value, name), path, start)


@pytest.mark.long  # the same steps on less data: tests/test_steer_composites.py
def test_the_feedback_tutorial():
    names = run("tutorial_feedback", "{code-cell}", 10)
    first, second, labels = (names[name] for name in ("first", "second", "labels"))
    unsteered = names["unsteered"]
    for wanted in (labels[first], labels[second]):
        gain = (names["looking_for"](wanted).argmax(1) == wanted).float() - (unsteered == wanted).float()
        assert gain.mean() > 0.05
    assert names["figure"].axes


@pytest.mark.long  # what each kind computes: tests/test_feedback_weights.py, tests/test_direct_feedback.py
def test_the_tutorial_of_feedback_weights():
    names = run("tutorial_feedback_weights", "{code-cell}", 4)
    assert {type(options) for options in names["KINDS"].values()} == {dict} and names["accuracy"] > 0.6


@pytest.mark.long  # and tests/test_train_multi_mnist.py
def test_the_instruction_tutorial():
    names = run("tutorial_instruction", "{code-cell}", 8)
    assert names["updates"].keys() == names["gradients"].keys()
    for name, gradient in names["gradients"].items():
        torch.testing.assert_close(names["updates"][name], gradient, rtol=1e-9, atol=1e-9 * float(gradient.norm()))
    assert min(names["curve"][-1][1:]) > 0.6
    assert names["figure"].axes


@pytest.mark.long  # and tests/test_prediction.py
def test_the_prediction_tutorial():
    names = run("tutorial_prediction", "{code-cell}", 8)
    before, after, errors = (names[name] for name in ("before", "after", "errors"))
    assert all(after[node] < before[node] for node in before)
    assert sum(errors[-1].values()) < sum(errors[0].values())
    assert names["figure"].axes


@pytest.mark.long  # README's blocks do much the same: tests/test_readme.py
@pytest.mark.parametrize("page", sorted(page for page in PAGES if blocks(page, "python") and page not in PUBLISHED))
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    run(page, "python", 1)


def test_python_is_on_pages_that_run():
    """Of the files beside the site's, README and CONTRIBUTING are run by tests of their own."""
    assert not [
        path.name for path in [*ROOT.glob("docs/*.md"), ROOT / "CHANGELOG.md"] if "```python" in path.read_text()
    ]


@one_in(2)
@pytest.mark.parametrize("page", PUBLISHED)
def test_pages_for_users_of_published_systems_use_what_exists(page, tmp_path, monkeypatch):
    """Their blocks run; and in the tables every name, and every keyword of a call, is one of ours."""
    monkeypatch.chdir(tmp_path)
    names = run(page, "python", 2)
    ours = {name: names[name] for name in ("fxfeedback", "model", "butd", "prototypes") if name in names}
    checked = 0
    for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", PAGES[page]):
        if not re.match(rf"({'|'.join(ours)})[.(]", code) or "steering_signals=" in code:
            continue
        for node in ast.walk(ast.parse(code)):
            name = ast.unparse(node.func if isinstance(node, ast.Call) else node)
            if not re.fullmatch(rf"({'|'.join(ours)})(\.\w+)*", name):
                continue
            start, *path = name.split(".")
            called = resolve(ours[start], path)
            if isinstance(node, ast.Call):
                called = called.forward if isinstance(called, torch.nn.Module) else called
                known = inspect.signature(called).parameters
                assert {keyword.arg for keyword in node.keywords} <= {*known}, code
                checked += 1
    assert checked >= 3


def test_the_version_is_the_same_everywhere():
    version = fxfeedback.__version__
    assert re.search(r"^## \[(.*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] in (version, "Unreleased")
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_commands_name_scripts_and_settings_that_exist():
    text = "\n".join(PAGES.values())
    commands = re.findall(r"python (examples/\w+\.py)(?:[^`\n]*--config (\w+))?", text)
    assert len(commands) > 5
    for script, settings in commands:
        assert (ROOT / script).is_file(), script
        assert not settings or (ROOT / f"examples/configs/{settings}.toml").is_file(), settings


def test_every_page_is_in_the_contents_once():
    entries = [line for tree in blocks("index", "{toctree}") for line in tree.splitlines() if re.match(r"\w", line)]
    assert sorted(["index", *entries]) == sorted(PAGES)


def test_what_pages_include_is_there():
    """A heading that is renamed in README or CONTRIBUTING must be renamed where a page includes what follows it."""
    included = 0
    for page in PAGES:
        opening = r"^```\{(?:include|csv-table)\}(.*?)^```$"
        for block in re.findall(opening, PAGES[page], re.MULTILINE | re.DOTALL):
            file = re.search(r"(?:^ |:file: )(\S+)$", block, re.MULTILINE)[1]
            text = (SITE / file).read_text()
            after, before = (re.search(rf':{option}: "(.*)"', block) for option in ("start-after", "end-before"))
            start = text.index(after[1]) if after else 0
            assert not before or text.index(before[1], start), block
            included += 1
    assert included >= 8


def test_the_api_page_names_everything_public():
    page = PAGES["api"]
    missing = [name for name in fxfeedback.__all__ if not re.search(rf"\bfxfeedback\.{name}\b", page)]
    assert not missing, f"docs/site/api.md lacks {missing}"
    directive = r"\.\. auto(?:function|class|module):: fxfeedback\.(\S+)\n((?:   :.*\n)*)"
    for name, options in re.findall(directive, page):
        documented = resolve(fxfeedback, name.split("."))
        members = re.search(r":members: (.+)", options)
        for member in members[1].split(", ") if members else []:
            assert inspect.getdoc(getattr(documented, member)), f"{name}.{member} has no docstring"


NO_PROSE = re.compile(
    r"\A---$.*?^---$|^```.*?^```$|^\$\$$.*?^\$\$$|^<!--.*?-->$|^(?:#|\||    |\(\w+\)=).*?$|^ *!\[[^\]]*\]\([^)]*\)$",
    re.MULTILINE | re.DOTALL,
)
"""Front matter, fenced blocks, formulas, comments, headings, tables, code and pictures."""


def paragraphs(text: str) -> list[str]:
    """The paragraphs and list items of a page."""
    parts = re.split(r"\n\s*\n|\n(?= *(?:[-*]|\d+\.) )", NO_PROSE.sub("", text))
    return [" ".join(part.split()) for part in parts if part.strip()]


def test_paragraphs_are_told_from_what_is_no_prose():
    text = (
        "# A\n\nA paragraph that stops in\n\n```python\nx\n```\n\n- An item\n  of two lines.\n- Another\n\n    code\n"
    )
    assert paragraphs(text) == ["A paragraph that stops in", "- An item of two lines.", "- Another"]


WRITTEN = [path for path in PROSE if path != ROOT / "docs/operators.md"]  # which quotes messages as they are


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_paragraph_ends(path):
    cut = [part for part in paragraphs(path.read_text()) if not re.search(r"[.:;!?][\"*`)]*$", part)]
    assert not cut, f"these stop in mid-sentence: {cut}"


def slug(heading: str) -> str:
    """A heading's anchor."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("path", PROSE, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_somewhere(path):
    text = path.read_text()
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"\w+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        if anchor:
            assert anchor in map(slug, re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)), link
    for page in re.findall(r"\{doc\}`(\w+)`", text):
        assert page in PAGES, page


@pytest.mark.parametrize("page", ["tutorial_feedback", "tutorial_instruction"])
def test_a_tutorials_notebook_has_its_cells_after_one_that_installs(page):
    """The cells that the tests above run, in their order, and no roles that only the site knows."""
    names = runpy.run_path(str(ROOT / "docs/make_notebooks.py"))
    cells = names["notebook"](PAGES[page])["cells"]
    code = [cell["source"] for cell in cells if cell["cell_type"] == "code"]
    assert code[0].startswith("%pip install") and len(code) > 8
    for cell, block in zip(code[1:], blocks(page, "{code-cell}"), strict=True):
        assert ast.dump(ast.parse(cell)) == ast.dump(ast.parse(re.sub(r"^:.*$", "", block, flags=re.MULTILINE)))
    prose = "".join(cell["source"] for cell in cells if cell["cell_type"] == "markdown")
    assert prose.startswith("# Tutorial") and not re.search(r"\{\w+\}`|^```\{", prose, re.MULTILINE)


def test_what_a_page_shows_of_the_command_line_is_what_it_says(capsys):
    (shown,) = blocks("command_line", "text")
    command, _, said = shown.partition("\n")
    assert command.startswith("$ fxfeedback ") and main(command.split()[2:]) == 0
    assert capsys.readouterr().out == said
