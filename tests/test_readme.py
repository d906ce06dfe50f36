"""What README shows can be done: its Python runs, and its commands exist with the flags that it gives them."""

import functools
import io
import re
import runpy
import shlex
import subprocess
import sys
from contextlib import redirect_stdout, suppress
from pathlib import Path
from unittest import mock

import pytest
import torch

from fxfeedback.command_line import main, parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

SHORTER = {
    # To export the learner of a ResNet-18 takes half a minute.
    "Deployment with ONNX Runtime": """
small = torch.nn.Sequential(
    torch.nn.Conv2d(3, 8, 7, 4), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
    torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 10),
)
butd = fxfeedback.to_butd(small, n_tasks=40, gating="channel").eval()
""",
}
"""Heading -> what runs before its first block: it gives a name a smaller value. All blocks run as they are written."""


# -- Python -----------------------------------------------------------------------------------------------------------


def test_the_python_runs(tmp_path, monkeypatch):
    """All blocks in one namespace, from top to bottom, as a reader types them."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names, shorter = {}, dict(SHORTER)
    for block in BLOCK.finditer(README):
        if block[1] == "python":
            before = README[: block.start(2)]
            heading = re.findall(r"^#+ (.*)$", BLOCK.sub("", before), re.MULTILINE)[-1]
            exec(shorter.pop(heading, ""), names)
            lines = "\n" * before.count("\n")  # so that an error names README's line
            exec(compile(lines + block[2], ROOT / "README.md", "exec"), names)
    assert names and not shorter, f"README has no such heading with Python: {list(shorter)}"


# -- commands ---------------------------------------------------------------------------------------------------------


def commands():
    """Every command of README; flags in a code span of their own belong to the command before them."""
    text = BLOCK.sub(lambda block: "" if block[1] == "python" else re.sub("^", "    ", block[2], flags=re.M), README)
    found = []
    for in_line, alone in re.findall(r"`([^`\n]+)`|^    (\S.*)$", text, re.MULTILINE):
        line = re.split(r"\s+# ", in_line or alone)[0]
        if re.match(r"(fxfeedback|make|python) \S", line):
            found.append(line)
        elif line.startswith("--") and found:
            found.append(f"{' '.join(found[-1].split()[:2])} {line}")
    return list(dict.fromkeys(found))


@functools.cache
def help_of(program, name):
    """What a script, or a command of fxfeedback, says to --help."""
    said = io.StringIO()
    with redirect_stdout(said):
        if program == "fxfeedback":
            main([name, "--help"])
        else:
            with mock.patch.object(sys, "argv", [name, "--help"]), suppress(SystemExit):
                runpy.run_path(str(ROOT / name), run_name="__main__")
    return said.getvalue()


@pytest.mark.parametrize("command", commands())
def test_a_command_exists_and_knows_its_flags(command, monkeypatch):
    program, name, *rest = shlex.split(command)
    if program == "make":
        assert subprocess.run(["make", "-n", name], cwd=ROOT, capture_output=True).returncode == 0
    else:
        monkeypatch.syspath_prepend(ROOT / Path(name).parent)
        for flag in ["--help", *(word for word in rest if word.startswith("--"))]:
            assert re.search(rf"{flag}\b", help_of(program, name)), f"{name} --help does not know {flag}"


@pytest.mark.parametrize("command", [line for line in commands() if re.match("fxfeedback [a-z]+ [^-]", line)])
def test_a_command_line_is_understood(command):
    assert parser().parse_args(shlex.split(command)[1:])


def test_readme_has_commands_of_each_kind():
    assert {command.split()[0] for command in commands()} == {"fxfeedback", "make", "python"}
