"""Files in half precision: half the size, close to float32 with the same rounded weights, sums in float32."""

import numpy as np
import pytest
import torch
from torch import nn

import fxfeedback
from fxfeedback.errors import ExportError, OptionError
from fxfeedback.runtime import Session
from marks import one_in
from networks import build

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
HALF, FLOAT = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
TOLERANCE = 2e-3


class Attending(nn.Module):
    """Tokens of an image, whose mask holds numbers that no half has, and a group norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 64, 3, padding=1), nn.GroupNorm(4, 64)
        self.attention, self.head = nn.MultiheadAttention(64, 4, batch_first=True), nn.Linear(64, 5)
        self.register_buffer("mask", torch.zeros(36, 36).masked_fill(torch.ones(36, 36).triu(1) > 0, -1e9))

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x))).flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x, attn_mask=self.mask, need_weights=False)[0]
        return self.head((x / (x.pow(2).mean(-1, keepdim=True) + 1e-12).sqrt()).mean(1))


def network(kind):
    """A network of this kind in float32, its input, the call's and the file's options."""
    torch.manual_seed(0)
    if kind == "attending":
        model, x = Attending(), torch.randn(3, 2, 6, 6)
    else:
        model, x = build({"passes": "convnet", "predictions": "convnet"}.get(kind, "residual"), train=False)
        model, x = model.float(), x[:3].float()
    model.eval()
    if kind == "passes":
        return fxfeedback.add_feedback(model, [("4", "1")], example_inputs=(x,)).eval(), x, {}, {"steerable": True}
    if kind == "predictions":
        return fxfeedback.add_prediction(model, ["4"], steps=3, example_inputs=(x,)).eval(), x, {}, {}
    butd = fxfeedback.to_butd(model, n_tasks=3, example_inputs=(x,)).eval()
    task = torch.tensor([0, 1, 2])
    return (butd, x, {"task": 1}, {"task": 1}) if kind == "one task" else (butd, x, {"task": task}, {})


@one_in(7)
@pytest.mark.parametrize("io", ["float32", "float16"])
@pytest.mark.parametrize("kind", ["passes", "predictions", "instructed", "one task", "attending"])
def test_a_file_of_halves_computes_what_torch_does(kind, io, tmp_path):
    model, x, called, options = network(kind)
    fxfeedback.export(model, tmp_path / "whole.onnx", **options)
    fxfeedback.export(model, tmp_path / "half.onnx", dtype="float16", io_dtype=io, **options)
    with torch.no_grad():
        for parameter in model.parameters():  # which may open and close other gates
            parameter.copy_(parameter.half())
        wanted = model(x, **called)
    named = {} if kind in ("passes", "predictions", "one task") else called
    found = Session(tmp_path / "half.onnx", "cpu")(x.numpy().astype(io), **named)
    pairs = list(zip(found, wanted, strict=True)) if isinstance(wanted, list) else [(found, wanted)]
    for ours, theirs in pairs:
        assert ours.dtype == io
        assert np.abs(ours.astype("float64") - theirs.numpy()).max() <= TOLERANCE * theirs.abs().max().item()

    whole, half = (onnx.load(tmp_path / f"{name}.onnx") for name in ("whole", "half"))
    sizes = [sum(np.prod(t.dims) for t in file.graph.initializer if t.data_type == FLOAT) for file in (whole, half)]
    assert sizes[1] < 0.1 * sizes[0] + 100, "what stays in float32 is single numbers, and scales of norms"
    types = {v.name: v.type.tensor_type.elem_type for v in onnx.shape_inference.infer_shapes(half).graph.value_info}
    types |= {t.name: t.data_type for t in half.graph.initializer}
    for node in half.graph.node:
        if node.op_type.startswith(("Reduce", "Softmax", "LayerNorm", "GroupNorm", "InstanceNorm")):
            assert types.get(node.input[0], FLOAT) == FLOAT, node.name
        if node.op_type in ("Conv", "Gemm", "MatMul") and not node.name.startswith("td/"):
            assert {types.get(name, HALF) for name in node.input} == {HALF}, node.name
    assert {entry.key: entry.value for entry in half.metadata_props}["dtype"] == "float16"


def test_bfloat16_is_written_as_such(tmp_path):
    """ONNX Runtime's CPU computes nothing of it: what is in the file is looked at, by onnx's own interpreter."""
    from onnx.reference import ReferenceEvaluator

    torch.manual_seed(0)
    x = torch.randn(2, 3)
    net = nn.Sequential(nn.Linear(3, 40), nn.ReLU(), nn.Linear(40, 4)).eval()
    butd = fxfeedback.to_butd(net, n_tasks=2, input_size=(3,)).eval()
    with pytest.raises(ExportError, match="check=False writes it unchecked"):
        fxfeedback.export(butd, tmp_path / "b.onnx", task=0, dtype="bfloat16")
    fxfeedback.export(butd, tmp_path / "b.onnx", task=0, dtype="bfloat16", check=False)
    file = onnx.load(tmp_path / "b.onnx")
    assert onnx.TensorProto.BFLOAT16 in {tensor.data_type for tensor in file.graph.initializer}
    (found,) = ReferenceEvaluator(file).run(None, {file.graph.input[0].name: x.numpy()})
    assert np.abs(found - butd(x, 0).detach().numpy()).max() < 5e-2 * butd(x, 0).abs().max().item()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"dtype": "int8"}, r"dtype='int8': choose \"float16\" or \"bfloat16\""),
        ({"io_dtype": "float16"}, "dtype=None: choose"),
        ({"dtype": "float16", "io_dtype": "float64"}, r"io_dtype='float64': choose \"float32\" or 'float16'"),
    ],
)
def test_wrong_options(options, expected, tmp_path):
    butd = fxfeedback.to_butd(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), input_size=(3,))
    with pytest.raises(OptionError, match=expected):
        fxfeedback.export(butd, tmp_path / "b.onnx", **options)
    with pytest.raises(OptionError, match=r"the model is of torch.float64: convert it with .float\(\) first"):
        fxfeedback.export(butd.double(), tmp_path / "b.onnx", dtype="float16")
    assert not list(tmp_path.iterdir())
