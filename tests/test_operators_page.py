"""docs/operators.md says what the rules are."""

import importlib.util
from pathlib import Path

import pytest

GENERATOR = Path(__file__).parents[1] / "docs/generate_operators.py"
SPEC = importlib.util.spec_from_file_location("generate_operators", GENERATOR)
generator = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(generator)  # here, before other tests have rules of their own


@pytest.mark.long
def test_the_page_is_up_to_date(capsys):
    """A new rule, operand, example or opening changes the page; the output says what, and how to write it anew."""
    assert generator.main(["--check"]) == 0, capsys.readouterr().out
