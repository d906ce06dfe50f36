"""What README shows can be done: its Python runs, and its commands, and those of docs/results.md, exist."""

import functools
import io
import re
import runpy
import shlex
import subprocess
import sys
from contextlib import redirect_stdout, suppress
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch

from fxfeedback.commands.main import main, parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

SHORTER = {
    # A ResNet-18 learns from smaller images also.
    "Instruction and learning: `to_butd`": "x = x[..., ::4, ::4]",
    "Draw": "x = torch.randn(8, 3, 224, 224)",
    # Exporting AlexNet takes ten seconds, the learner of a ResNet-18 half a minute.
    "ONNX": """
small = torch.nn.Sequential(
    torch.nn.Conv2d(3, 8, 7, 4), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
    torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 10),
).eval()
model = fxfeedback.add_feedback(small, [("5", "2")])
butd = fxfeedback.to_butd(small, n_tasks=40, gating="channel").eval()
""",
}
"""Heading -> what runs before its first block: it gives a name a smaller value. All blocks run as they are written."""


# -- Python -----------------------------------------------------------------------------------------------------------


def test_the_python_runs(tmp_path, monkeypatch):
    """All blocks in one namespace, from top to bottom, as a reader types them; they print what README says."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names, shorter, printed = {}, dict(SHORTER), io.StringIO()
    for block in BLOCK.finditer(README):
        if block[1] == "text":
            assert block[2] == printed.getvalue()
        if block[1] == "python":
            before = README[: block.start(2)]
            heading = re.findall(r"^#+ (.*)$", BLOCK.sub("", before), re.MULTILINE)[-1]
            exec(shorter.pop(heading, ""), names)
            lines = "\n" * before.count("\n")  # so that an error names README's line
            with redirect_stdout(printed := io.StringIO()):
                exec(compile(lines + block[2], ROOT / "README.md", "exec"), names)
    assert names and not shorter, f"README has no such heading with Python: {list(shorter)}"


# -- commands ---------------------------------------------------------------------------------------------------------


class Section(NamedTuple):
    """commands: lines that can be typed; scripts: what it names of ours; flags: given without a command."""

    commands: list[str]
    scripts: list[str]
    flags: list[str]


def read(section):
    """What a section of README tells its readers to type, in code spans or in lines of their own."""
    text = BLOCK.sub(lambda block: "" if block[1] == "python" else re.sub("^", "    ", block[2], flags=re.M), section)
    lines = re.findall(r"^    (\S.*)$", text, re.MULTILINE)
    spans = [span for paragraph in re.split(r"\n\s*\n", text) for span in re.findall(r"`([^`]+)`", paragraph)]
    said = [" ".join(re.split(r"\s+# ", line)[0].split()) for line in (*lines, *spans)]
    commands = [line for line in said if re.match(r"(fxfeedback|make|python|torchrun) \S", line)]
    words = [word for line in said for word in line.split()]
    scripts = [found for word in words if word.endswith(".py") and (found := script(word))]
    scripts += [f"fxfeedback {line.split()[1]}" for line in commands if line.startswith("fxfeedback ")]
    flags = [word for line in said if line.startswith("--") for word in line.split() if word.startswith("--")]
    return Section(commands, sorted(set(scripts)), flags)


def script(word):
    """The path of a script, which README may name without its folder."""
    return next((str(path) for path in (Path(word), Path("examples", word)) if (ROOT / path).is_file()), None)


TEXT = README + (ROOT / "docs" / "results.md").read_text()
SECTIONS = [read(section) for section in re.split(r"^#+ ", TEXT, flags=re.MULTILINE)]
COMMANDS = list(dict.fromkeys(command for section in SECTIONS for command in section.commands))


@functools.cache
def help_of(name):
    """What a script, or a command of fxfeedback, says to --help."""
    said = io.StringIO()
    with redirect_stdout(said):
        if name.startswith("fxfeedback "):
            main([*name.split()[1:], "--help"])
        else:
            folder = str(ROOT / Path(name).parent)
            argv = mock.patch.object(sys, "argv", [name, "--help"])
            with argv, mock.patch.object(sys, "path", [folder, *sys.path]), suppress(SystemExit):
                runpy.run_path(str(ROOT / name), run_name="__main__")
    return said.getvalue()


def knows(name, flag):
    return re.search(rf"{flag}\b", help_of(name))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_can_be_typed(command):
    words = shlex.split(command)
    if words[0] == "make":
        assert subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True).returncode == 0
    elif words[0] == "fxfeedback":
        assert parser().parse_args(words[1:])
    else:
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        assert script(words[at])
        own = takewhile(lambda word: word != "--", words[at + 1 :])  # what follows it are another script's
        assert all(knows(words[at], flag) for flag in ["--help", *own] if flag.startswith("--"))


@pytest.mark.parametrize(
    "section", [section for section in SECTIONS if section.flags], ids=lambda section: section.flags[0]
)
def test_flags_belong_to_a_script_that_their_section_names(section):
    for flag in section.flags:
        assert any(knows(name, flag) for name in section.scripts), flag


def test_readme_has_commands_of_each_kind():
    assert {command.split()[0] for command in COMMANDS} >= {"fxfeedback", "make", "python"}
