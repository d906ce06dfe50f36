"""Files that keep state between calls, that hand out nodes' values, and in which version of ONNX's operators."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import fxfeedback
from fxfeedback import Connection
from fxfeedback.errors import CheckpointError, InputError, NodeNameError, OptionError
from fxfeedback.runtime import Session
from marks import long, one_in

pytest.importorskip("onnxruntime")


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


CONNECTIONS = {
    "a vector and a map": [("6", "1"), ("3", "1")],
    "a map, not rectified": [Connection("3", "0", activation="relu")],
    "forwards and back, into one": [("1", "3"), ("6", "3")],
    "sums": [Connection("6", "1", mode="add"), Connection("3", "0", mode="add", activation="relu")],
}


def model(name="a vector and a map"):
    return fxfeedback.add_feedback(network(), CONNECTIONS[name], input_size=(3, 16, 16)).eval()


def near(found, wanted):
    return np.allclose(np.asarray(found), wanted.detach().numpy(), rtol=1e-4, atol=1e-5)


@one_in(3)
@pytest.mark.parametrize(
    "name, passes", [*((name, 1) for name in CONNECTIONS), long("a vector and a map", 2), ("sums", 2)]
)
@torch.no_grad()
def test_a_stream_goes_on_as_unroll_does(name, passes, tmp_path):
    net = model(name)
    fxfeedback.export(net, tmp_path / "net.onnx", passes=passes, stateful=True)
    session = Session(tmp_path / "net.onnx", "cpu")
    stream, state, by_hand = session.stream(), None, None
    for frame in range(20):
        if frame == 12:
            state = by_hand = None
            stream.reset()
        x = torch.randn(2, 3, 16, 16)
        wanted, state = net.unroll(x, passes=passes, state=state)
        outputs = stream(x if frame % 2 else x.numpy())
        again, by_hand = session.unroll(x, state=by_hand)
        assert len(outputs) == passes and isinstance(outputs[0], torch.Tensor if frame % 2 else np.ndarray)
        assert all(map(near, outputs, wanted)) and all(map(near, again, wanted))
        assert state.keys() == by_hand.keys() and all(near(by_hand[key], state[key]) for key in state)


@pytest.mark.long
@torch.no_grad()
def test_a_steered_file_with_state_is_torchs(tmp_path):
    net, x = model(), torch.randn(2, 3, 16, 16)
    fxfeedback.export(net, tmp_path / "net.onnx", stateful=True, steerable=True, outputs=["1"])
    session = Session(tmp_path / "net.onnx", "cpu")
    steering = {"source": "6", "activation": torch.randn(1, 5), "strength": 2.0, "alpha": 0.5}
    (_, state), (_, ours) = net.unroll(x, steering=steering), session.unroll(x, steering=steering)
    wanted, got = net.unroll(x, steering=steering, state=state)[0], session.unroll(x, steering=steering, state=ours)[0]
    assert len(got) == 2 and all(map(near, got, wanted))


@torch.no_grad()
def test_values_of_nodes_are_those_of_readout(tmp_path):
    net, x, names = model(), torch.randn(2, 3, 16, 16), ["1", "3", "6"]
    fxfeedback.export(net, tmp_path / "net.onnx", outputs=names)
    session = Session(tmp_path / "net.onnx", "cpu")
    read, wanted = session.readout(x), net.readout(x, names)
    assert len(read) == len(wanted) == 2 and len(session(x)) == 2
    for ours, theirs in zip(read, wanted, strict=True):
        assert list(ours) == names and all(near(ours[name], theirs[name].value) for name in names)


@one_in(9)
@pytest.mark.parametrize("opset", [18, long(20), long(21), 23])
@torch.no_grad()
def test_a_file_of_any_opset_is_torchs(opset, tmp_path):
    net, x = model(), torch.randn(2, 3, 16, 16)
    fxfeedback.export(net, tmp_path / "net.onnx", opset=opset)  # which compares
    (used,) = onnx.load(tmp_path / "net.onnx").opset_import
    assert used.version == opset
    assert all(map(near, Session(tmp_path / "net.onnx", "cpu")(x), net(x)))


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"outputs": "1"}, OptionError, "give a list of names"),
        ({"outputs": ["9"]}, NodeNameError, "no node is called '9'"),
        ({"opset": 17}, OptionError, "opset=17: choose one from 18"),
        ({"opset": "20"}, OptionError, "opset='20'"),
        ({"stateful": True, "dynamic_size": True}, OptionError, "'3' would be given as a map of the example's size"),
    ],
)
def test_what_cannot_be_exported(options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        fxfeedback.export(model(), tmp_path / "net.onnx", **options)
    assert not list(tmp_path.iterdir())


def test_other_networks_have_no_state(tmp_path):
    butd = fxfeedback.to_butd(network(), n_tasks=2, input_size=(3, 16, 16))
    for options in ({"stateful": True}, {"outputs": ["1"]}):
        with pytest.raises(OptionError, match="belong to a model that add_feedback returned"):
            fxfeedback.export(butd, tmp_path / "net.onnx", **options)


@pytest.mark.long
def test_calls_that_do_not_fit(tmp_path):
    fxfeedback.export(model(), tmp_path / "state.onnx", passes=1, stateful=True, check=False)
    fxfeedback.export(model(), tmp_path / "plain.onnx", passes=1, check=False)
    plain, session = (Session(tmp_path / name, "cpu") for name in ("plain.onnx", "state.onnx"))
    x = torch.randn(2, 3, 16, 16)
    _, state = session.unroll(x)
    for call in (plain.stream, lambda: plain.unroll(x)):
        with pytest.raises(InputError, match="export it with stateful=True"):
            call()
    with pytest.raises(InputError, match=r"export it with outputs=\[names\]"):
        session.readout(x)
    stream = session.stream()
    stream(x)
    for call in (lambda: stream(x[:1].repeat(3, 1, 1, 1)), lambda: session.unroll(x.repeat(2, 1, 1, 1), state=state)):
        with pytest.raises(InputError, match="the state is of batch 2, and the call of batch"):
            call()
    for wrong in ({"6": state["6"]}, state["6"]):
        with pytest.raises(InputError, match=r"state= has a signal of each source \(3, 6\)"):
            session.unroll(x, state=wrong)
    with pytest.raises(InputError, match=r"'6.state' takes a shape of"):
        session.unroll(x, state=state | {"6": state["6"][:, :4]})
    with pytest.raises(InputError, match=r"6\.state"):
        session.unroll(x, state=state | {"6": state["6"] * float("nan")})


@one_in(2)
@pytest.mark.parametrize("key, value", [("state", '["5"]'), ("readout", '["7"]')])
def test_a_file_that_speaks_of_what_it_has_not_is_refused(key, value, tmp_path):
    fxfeedback.export(model(), tmp_path / "net.onnx", check=False)
    file = onnx.load(tmp_path / "net.onnx")
    file.metadata_props.add(key=key, value=value)
    onnx.save(file, tmp_path / "net.onnx")
    with pytest.raises(CheckpointError, match="is damaged: its graph lacks"):
        Session(tmp_path / "net.onnx", "cpu")
