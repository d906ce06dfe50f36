"""What is in the wheel, and that it works where nothing of the checkout is."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

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
