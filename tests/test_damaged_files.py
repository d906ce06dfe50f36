"""Files that are damaged or somebody else's end in one error that says what is wrong; fuzz_files.py tries thousands."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from torch import nn

import fuzz_files
import fxfeedback
from fxfeedback.commands import info
from fxfeedback.commands.main import main
from fxfeedback.errors import CheckpointError
from fxfeedback.runtime import Learner, Session
from marks import long, long_but


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    fuzz_files.write_files(folder)
    return folder


@pytest.mark.parametrize("first", long_but([0], range(0, 300, 50)))
def test_a_file_that_nobody_wrote_is_an_error_and_does_nothing(first, good):
    assert not fuzz_files.fuzz(good, range(first, first + 50))


def test_good_files_open(good, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, opener in fuzz_files.openers(good).items():
        assert not fuzz_files.check(good / name, opener)
        opener(good / name)


OPENERS = {"Session": Session, "Learner": Learner, "info": lambda path: info.about(str(path))}
OPENED = [("lrm", "Session"), ("instructed", "Session"), ("learner", "Learner")]
OPENED += [(kind, "info") for kind in ("lrm", "instructed", "learner")]


def changed(good, kind, path, change):
    model = onnx.load(good / f"{kind}.onnx")
    change(model)
    path.write_bytes(model.SerializeToString())
    return path


def says(model, key, text):
    """Let the file say something else; None: nothing."""
    kept = [(entry.key, entry.value) for entry in model.metadata_props if entry.key != key]
    del model.metadata_props[:]
    for name, value in [*kept, *([] if text is None else [(key, text)])]:
        entry = model.metadata_props.add()
        entry.key, entry.value = name, value


@pytest.mark.parametrize(("kind", "opener"), OPENED)
def test_every_field_of_an_exported_file_is_checked(kind, opener, good, tmp_path):
    fields = {entry.key: entry.value for entry in onnx.load(good / f"{kind}.onnx").metadata_props}
    texts = {"fxfeedback", "product", "weights_sha256", "gating", "loss", "optimizer"}
    anything = {"betas", "eps", "momentum", "weight_decay"}
    for name in fields.keys() - anything:
        wrong = [None, "[" * 100_000] if name not in texts else [None]
        wrong += [] if name in texts else ["what", '{"a": 1}', "[1]", "-1"]
        for text in wrong:
            if (name, text) in {("keeps", None), ("task", "-1")}:
                continue
            path = changed(good, kind, tmp_path / "file.onnx", lambda model, n=name, t=text: says(model, n, t))
            if name in ("gating", "sites", "tasks", "takes_ids", "instruction_size") and kind == "learner" and not text:
                continue  # of a network with tasks only
            with pytest.raises(CheckpointError, match=name if name not in ("fxfeedback", "product") else "."):
                OPENERS[opener](path)


@pytest.mark.parametrize("place", ["input", "output", "node"])
def test_a_name_that_is_there_twice_is_an_error(place, good, tmp_path):
    model = onnx.load(good / "learner.onnx")
    values = getattr(model.graph, place)
    values.append(values[-1])
    onnx.save(model, tmp_path / "learner.onnx")
    with pytest.raises(CheckpointError, match=r"is damaged: '.*' is there twice"):
        fxfeedback.runtime.Learner(tmp_path / "learner.onnx", "cpu")


def test_versions_and_checksums_are_texts_whatever_they_look_like(good, tmp_path):
    def change(model):
        says(model, "fxfeedback", "1.0")
        says(model, "weights_sha256", "12e4")

    path = changed(good, "lrm", tmp_path / "file.onnx", change)
    assert [info.about(str(path))[key] for key in ("fxfeedback", "weights_sha256")] == ["1.0", "12e4"]
    assert Session(path, "cpu").metadata["fxfeedback"] == "1.0"


@pytest.mark.parametrize("place", ["../beside", "/etc/hostname", "link", "nowhere", "folder", ""])
@pytest.mark.parametrize(("kind", "opener"), OPENED)
def test_weights_outside_of_the_files_folder_are_not_read(place, kind, opener, good, tmp_path):
    folder = tmp_path / "here"
    (folder / "folder").mkdir(parents=True)
    (tmp_path / "beside").write_bytes(bytes(1000))
    (folder / "link").symlink_to(tmp_path / "beside")

    def change(model):
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", place

    with pytest.raises(CheckpointError):
        OPENERS[opener](changed(good, kind, folder / "file.onnx", change))


@pytest.mark.parametrize("opener", OPENERS)
def test_a_folder_is_called_a_folder_and_a_pipe_is_not_read(opener, tmp_path):
    with pytest.raises(CheckpointError, match=r"is a folder: give the \.onnx file"):
        OPENERS[opener](tmp_path)
    os.mkfifo(tmp_path / "pipe.onnx")
    with pytest.raises(CheckpointError, match="there is no file"):
        OPENERS[opener](tmp_path / "pipe.onnx")


def test_info_carries_out_nothing_that_a_file_says(good, tmp_path, capsys):
    def change(model):
        evil = "\x1b]0;title\x07\x1b[2J\u202e\n"
        connection = [{"source": evil, "destination": evil}]
        for key, text in (("fxfeedback", evil), ("connections", json.dumps(connection)), ("weights_sha256", evil)):
            says(model, key, text)
        model.graph.input[0].name = model.graph.node[0].input[0] = evil

    path = str(changed(good, "lrm", tmp_path / "file.onnx", change))
    for arguments in (["info", path], ["info", path, "--json"]):
        assert main(arguments) == 0
        text = capsys.readouterr().out
        assert "title" in text and all(line.isprintable() for line in text.splitlines())
    assert main(["info", str(tmp_path / "\x1b[2J")]) == 1
    assert "\\x1b" in capsys.readouterr().err


@pytest.mark.parametrize("unbuffered", ["", long("1")])
def test_a_full_disk_where_the_output_goes_is_an_error(unbuffered, good):
    command = [sys.executable, "-m", "fxfeedback", "info", str(good / "lrm.onnx")]
    with Path("/dev/full").open("w") as full:
        environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        run = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert run.returncode == 1
    assert re.fullmatch(r"fxfeedback: error: .*No space left.*\n", run.stderr)


def takes_what_is_not_there(model):
    """Let an output be an element that its value does not have: ONNX Runtime finds out as it runs."""
    output = model.graph.output[-1] if len(model.graph.output) < 3 else model.graph.output[1]
    last = next(node for node in model.graph.node if output.name in node.output)
    last.output[list(last.output).index(output.name)] = "before"
    for node in model.graph.node:
        node.input[:] = ["before" if name == output.name else name for name in node.input]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([999]), "no such row"))
    model.graph.node.append(onnx.helper.make_node("Gather", ["before", "no such row"], [output.name], axis=1))
    output.type.tensor_type.shape.dim[1].dim_value = 1


def test_what_fails_as_it_runs_is_an_error_of_ours(tmp_path):
    butd = fxfeedback.to_butd(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval(), 2, input_size=(4,))
    fxfeedback.export(butd, tmp_path / "session.onnx", check=False)
    fxfeedback.export_learner(butd, tmp_path / "learner.onnx", check=False)
    for kind in ("session", "learner"):
        changed(tmp_path, kind, tmp_path / f"{kind}.onnx", takes_what_is_not_there)
    x, wrong = np.ones((2, 4), np.float32), "ONNX Runtime fails while it runs .*damaged"
    with pytest.raises(CheckpointError, match=wrong):
        Session(tmp_path / "session.onnx", "cpu")(x, task=0)
    learner = Learner(tmp_path / "learner.onnx", "cpu")
    before = learner.state_dict()
    with pytest.raises(CheckpointError, match=wrong):
        learner.predict(x, task=0)
    with pytest.raises(CheckpointError, match=wrong):
        learner.step(x, [0, 0], task=0, lr=0.1)
    assert all(np.array_equal(value, before[name]) for name, value in learner.state_dict().items())
