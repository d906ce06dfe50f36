"""The long description; everything else is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup


def described() -> str:
    """README as it can be read anywhere: without pictures, and without links to files that lie beside it."""
    text = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"^!\[[^\]]*\]\([^)]*\)\n+", "", text, flags=re.MULTILINE)
    return re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]*\)", r"\1", text)


setup(long_description=described(), long_description_content_type="text/markdown")
