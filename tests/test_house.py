"""The house rules that a program can check: what a module may use of another, and how long files and functions are."""

import ast
from pathlib import Path

import pytest
import torch

import fxfeedback

ROOT = Path(fxfeedback.__file__).parent
FILES = {str(path.relative_to(ROOT)): path for path in sorted(ROOT.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}

TORCHS = {
    "_C",
    "_BatchNorm",
    "_DropoutNd",
    "_InstanceNorm",
    "_Orthogonal",
    "_buffers",
    "_cdata",
    "_get_no_batch_dim",
    "_get_qualified_name",
    "_has_compatible_shallow_copy_type",
    "_init_flat_weights",
    "_modules",
    "_non_persistent_buffers_set",
    "_parameters",
    "_rename",
    "_schema",
    "_version",
}
"""Private names of torch's that are used: nothing public says the same."""
PYTHONS = {"_fields", "_getframe", "_is_owned", "_replace"}
"""Of Python's own, public ones of named tuples among them."""

LONGEST_FILE, LONGEST_FUNCTION = 300, 50
LONG_TABLES = {"rules/indexing.py", "rules/normalization.py", "rules/reduction.py", "rules/scattering.py"}
"""Tables of rules, which are as long as there are ops."""
LONG_FILES: dict[str, int] = {}
"""What remains to be split, and how long it is: a file that is not here, or longer than here, is refused."""
LONG_FUNCTIONS: dict[str, int] = {}
"""As `LONG_FILES`, of functions."""


def private(name):
    return name.startswith("_") and not name.startswith("__")


def defined(tree):
    """The names that a module gives to something: functions, classes, variables, attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def borrowed(tree):
    """The private names of other modules that a module imports or reads, and where."""
    own = set(defined(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, alias.name) for alias in node.names if private(alias.name))
        elif isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in own:
            of_torchs = {part.attr for part in ast.walk(node.value) if isinstance(part, ast.Attribute)}
            of_itself = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            operator = ast.unparse(node.value) == "torch" and hasattr(torch.ops.aten, node.attr)
            if not of_itself and not operator and not of_torchs & {"_C", "aten"} and ast.unparse(node.value) != "aten":
                yield node.lineno, node.attr


@pytest.mark.parametrize("name", FILES)
def test_no_module_uses_a_private_name_of_another(name):
    assert [use for use in borrowed(TREES[name]) if use[1] not in TORCHS | PYTHONS] == []


def test_a_private_name_of_another_is_seen():
    code = "from a import _b, c\ndef f(x, self):\n    x._y, self._own, x._z, torch._C._who\nclass A:\n    _z = 1"
    assert [name for _, name in borrowed(ast.parse(code))] == ["_b", "_y", "_C"]


def code_lines(function):
    """How many lines of a function are code: not its docstring."""
    first = function.body[0]
    documented = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )
    docstring = first.end_lineno - first.lineno + 1 if documented else 0
    return function.end_lineno - function.lineno + 1 - docstring


def test_files_are_short():
    lengths = {name: len(path.read_text().splitlines()) for name, path in FILES.items() if name not in LONG_TABLES}
    assert {name: length for name, length in lengths.items() if length > LONG_FILES.get(name, LONGEST_FILE)} == {}
    assert [name for name in LONG_FILES if lengths.get(name, 0) <= LONGEST_FILE] == [], "these are short now"


def test_functions_are_short():
    lengths = {
        f"{name}:{function.name}": code_lines(function)
        for name, tree in TREES.items()
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
    }
    long = {name: length for name, length in lengths.items() if length > LONG_FUNCTIONS.get(name, LONGEST_FUNCTION)}
    assert long == {}
    assert [name for name in LONG_FUNCTIONS if lengths.get(name, 0) <= LONGEST_FUNCTION] == [], "these are short now"
