"""What is in the wheel, and that it works where nothing of the checkout is."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

from fxfeedback.checks import renamed_argument
from fxfeedback.errors import OptionError

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fxfeedback"

USED = """
import sys, pathlib, numpy, fxfeedback.runtime
assert "torch" not in sys.modules
assert pathlib.Path(fxfeedback.runtime.__file__).is_relative_to(sys.prefix), fxfeedback.runtime.__file__
outputs = fxfeedback.runtime.Session("net.onnx", "cpu")(numpy.zeros((3, 1, 28, 28), numpy.float32))
assert [output.shape for output in outputs] == [(3, 10)] * 2
"""

NETWORK = """
import torch
from torch import nn

def net():
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
"""


def sources() -> list[Path]:
    """The package's files in this checkout, relative to it."""
    files = (path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return sorted(path.relative_to(ROOT) for path in files)


def test_every_folder_is_a_package_and_every_other_file_is_named_as_data():
    """Otherwise a wheel would come without them."""
    assert not [path.parent for path in sources() if not (ROOT / path.parent / "__init__.py").is_file()]
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    named = {Path(*package.split("."), name) for package, names in data.items() for name in names}
    assert {path for path in sources() if path.suffix != ".py"} == named


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """An environment with the dependencies of this one and the package from a wheel; the folder of its commands."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(PACKAGE, folder / "clone/fxfeedback", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "clone")
    pip, offline = [sys.executable, "-m", "pip", "--disable-pip-version-check"], ["--quiet", "--no-deps", "--no-index"]
    build = [*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", folder, folder / "clone"]
    subprocess.run(build, check=True, capture_output=True)
    [wheel] = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True)
    [packages] = (folder / "env").glob("lib/python*/site-packages")
    python = folder / "env/bin/python"
    subprocess.run([*pip, "--python", python, "install", *offline, wheel], check=True, capture_output=True)
    # Only now, so that pip does not see this environment's package; the lines of its .pth files are not read.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    source = "from setuptools import build_meta; build_meta.build_sdist('..')"
    subprocess.run([sys.executable, "-c", source], cwd=folder / "clone", check=True, capture_output=True)
    with zipfile.ZipFile(wheel) as archive:
        yield folder / "env/bin", {Path(name) for name in archive.namelist() if name.startswith("fxfeedback/")}


@pytest.mark.long
def test_the_wheel_has_every_file_of_the_package(installed):
    assert installed[1] == set(sources())


@pytest.mark.long
def test_an_installed_wheel_works(installed, tmp_path):
    commands, _ = installed
    (tmp_path / "network.py").write_text(NETWORK)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*words: str | Path) -> str:
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def fxfeedback(*words: str) -> str:
        return run(commands / "fxfeedback", *words)

    assert "usage: fxfeedback" in fxfeedback("--help")
    fxfeedback("feedback", "network:net", "--input-size", "1x28x28", "--connect", "3:1", "--save", "saved")
    fxfeedback("export", "saved", "net.onnx")
    fxfeedback("draw", "saved", "net.html")
    assert "<svg" in (tmp_path / "net.html").read_text()
    run(commands / "python", "-c", USED)


@pytest.mark.long
def test_an_index_takes_both_distributions_and_the_wheel_of_the_source_is_the_same(installed, tmp_path):
    folder = installed[0].parents[1]
    [wheel], [source] = (sorted(folder.glob(kind)) for kind in ("*.whl", "*.tar.gz"))
    done = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", wheel, source], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", tmp_path, source], check=True, capture_output=True)
    [again] = tmp_path.glob("*.whl")
    first, second = (set(zipfile.ZipFile(file).namelist()) for file in (wheel, again))
    assert first == second


def test_the_long_description_leads_nowhere_that_is_not_there():
    described = long_description()
    assert "https://" in described and not re.search(r"\]\((?!https?:)", described) and "![" not in described
    assert described.count("```") == (ROOT / "README.md").read_text().count("```")


def long_description() -> str:
    """What setup.py says, without running setup()."""
    names: dict[str, object] = {"__file__": str(ROOT / "setup.py")}
    exec((ROOT / "setup.py").read_text().rpartition("setup(")[0], names)
    return names["described"]()  # type: ignore[operator]


def test_old_names_work_and_say_the_new_one():
    @renamed_argument("size", "input_size", "0.4")
    def front(input_size=3):
        """What it does."""
        return input_size

    with pytest.warns(
        DeprecationWarning, match="size= is deprecated and will be gone in fxfeedback 0.4: use input_size="
    ) as said:
        assert front(size=5) == 5
    assert said[0].filename == __file__
    with pytest.raises(OptionError, match="are one argument"):
        front(size=5, input_size=5)
    assert front(7) == front(input_size=7) == 7 and front() == 3 and front.__doc__ == "What it does."
