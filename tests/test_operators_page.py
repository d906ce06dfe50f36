"""docs/operators.md says what the rules are."""

import subprocess
import sys
from pathlib import Path

GENERATOR = Path(__file__).parents[1] / "docs/generate_operators.py"


def test_the_page_is_up_to_date():
    """A new rule, operand, example or opening changes the page; the output says what, and how to write it anew."""
    check = subprocess.run([sys.executable, str(GENERATOR), "--check"], capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stdout + check.stderr
