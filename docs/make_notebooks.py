"""The tutorials as notebooks, which run top to bottom where notebooks are hosted; of the sources of the site.

python docs/make_notebooks.py docs/_build/notebooks
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

SITE = Path(__file__).parent / "site"
TUTORIALS = ("tutorial_feedback", "tutorial_instruction")
INSTALL = "%pip install -q 'fxfeedback[examples,onnx,runtime]'"
CELL = re.compile(r"^```\{code-cell\}[^\n]*\n(.*?)^```$\n?", re.MULTILINE | re.DOTALL)


def notebook(page: str) -> dict[str, Any]:
    """A page of the site in the form of a notebook's file; the first cell installs what the others need."""
    text = re.sub(r"\A---\n.*?^---\n", "", page, flags=re.MULTILINE | re.DOTALL)
    cells = [_code(INSTALL)]
    for number, part in enumerate(CELL.split(text)):
        if part.strip():
            cells.append(_code(part.strip("\n")) if number % 2 else _prose(part))
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {"nbformat": 4, "nbformat_minor": 4, "metadata": {"kernelspec": kernel}, "cells": cells}


def _code(source: str) -> dict[str, Any]:
    lines = [line for line in source.split("\n") if not line.startswith(":")]  # how the site shows a cell
    return {"cell_type": "code", "metadata": {}, "execution_count": None, "outputs": [], "source": "\n".join(lines)}


def _prose(text: str) -> dict[str, Any]:
    text = re.sub(r"\{(?:doc|class|func)\}`([^`<]+)`", lambda said: f"“{said[1].replace('_', ' ')}”", text)
    return {"cell_type": "markdown", "metadata": {}, "source": text.strip("\n")}


def main() -> None:
    """Write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in TUTORIALS:
        made = notebook((SITE / f"{name}.md").read_text(encoding="utf-8"))
        (folder / f"{name}.ipynb").write_text(json.dumps(made, indent=1, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main()
