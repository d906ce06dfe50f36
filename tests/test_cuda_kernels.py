"""Exported files run on the GPU whole: ONNX Runtime's CUDA provider has a kernel for every node (docs/zoo)."""

import csv
from pathlib import Path

import pytest

import fxfeedback
from marks import long, sweep
from networks import LARGE, build

onnx = pytest.importorskip("onnx")

TABLE = Path(__file__).parents[1] / "docs" / "zoo" / "cuda_kernels.csv"
with TABLE.open() as file:
    KERNELS = {row["op"]: row for row in csv.DictReader(file)}
FUNCTIONS = {"CastLike": "Cast"}
"""Ops without a kernel that ONNX Runtime writes as others."""
DATA = {"Where": 1}
"""The number of the input whose type decides, where it is not the first."""


def has_kernel(op, opset, kind):
    """Whether there is a kernel for an op as it is in an opset, of tensors of this type (None: not known).

    A kernel of "13+" is for ops that changed in 13 for the last time.
    """
    if op not in KERNELS:
        return False
    since = onnx.defs.get_schema(op, opset).since_version
    versions = (part.rstrip("+").partition("-") for part in KERNELS[op]["opsets"].split())
    known = any(int(first) <= since <= int(last or first) for first, _, last in versions)
    return known and (kind is None or kind in KERNELS[op]["types"].split())


def without_kernel(model):
    """The nodes that run on the CPU, but for the arithmetic of sizes, which ONNX Runtime keeps there on purpose."""
    model = onnx.shape_inference.infer_shapes(model)
    graph, opset = model.graph, model.opset_import[0].version
    values = {value.name: value.type.tensor_type for value in (*graph.value_info, *graph.input, *graph.output)}
    kinds = {name: value.elem_type for name, value in values.items()} | {t.name: t.data_type for t in graph.initializer}
    ranks = {name: len(value.shape.dim) for name, value in values.items()} | {
        t.name: len(t.dims) for t in graph.initializer
    }
    found = []
    for node in graph.node:
        op, names = FUNCTIONS.get(node.op_type, node.op_type), [name for name in node.input if name]
        of_sizes = all(kinds.get(n) == onnx.TensorProto.INT64 and ranks.get(n, 2) < 2 for n in (*names, *node.output))
        code = kinds.get(names[DATA.get(op, 0)]) if names else None
        kind = onnx.helper.tensor_dtype_to_string(code).rpartition(".")[2].lower() if code else None
        if not of_sizes and not has_kernel(op, opset, kind):
            found.append((node.name, node.op_type, opset, kind))
    return found


NAMES = ("residual", "convnet", "recurrent", "vit", "resnet18")


def test_the_table_says_what_has_a_kernel():
    assert has_kernel("MaxPool", 20, "float") and not has_kernel("MaxPool", 22, "float")
    assert has_kernel("Pad", 20, "float") and has_kernel("Pad", 18, "bool") and not has_kernel("Pad", 20, "int64")
    assert not has_kernel("Atan", 20, "float")


PRODUCTS = ("passes", "instructed", "one task", "learner")
FILES = [(name, product) for name in NAMES for product in PRODUCTS]
SHORT = [("residual", "passes")]
FILES.remove(("recurrent", "passes"))  # torch's exporter writes no LSTM with a projection


@pytest.mark.parametrize(
    "name, product", [file if file in SHORT else (sweep if file[0] in LARGE else long)(*file) for file in FILES]
)
def test_every_node_has_a_kernel(name, product, tmp_path):
    model, x = build(name, False)
    size, path = tuple(x.shape[1:]), tmp_path / "model.onnx"
    if product == "passes":
        names = [n for n, info in fxfeedback.node_names(model, input_size=size).items() if len(info.shape or ()) > 1]
        connection = fxfeedback.Connection(names[-1], names[1])
        network = fxfeedback.add_feedback(model.float(), [connection], input_size=size)
        fxfeedback.export(network, path, steerable=True, check=False)
    else:
        butd = fxfeedback.to_butd(model.float(), n_tasks=2, input_size=size, gating="channel", verify=False)
        if product == "learner":
            fxfeedback.export_learner(butd, path, momentum=0.9, weight_decay=1e-4, check=False)
        else:
            fxfeedback.export(butd, path, task=1 if product == "one task" else None, check=False)
    assert without_kernel(onnx.load(path)) == []
