"""Write docs/operators.md: every rule, what it does, and where it is needed.

    python docs/generate_operators.py                     # write the page
    python docs/generate_operators.py --check             # say whether the page is up to date
    python docs/generate_operators.py --measure [RULE...] # first try the exports and trace the models (half an hour)

All but two columns come from the rules themselves. Whether a rule's plain form exports to ONNX and which torchvision
models need it takes long to find out: `--measure` keeps the answers in docs/operators.json, where the page takes them
from. With names of rules it only tries their exports. Exporting takes `pip install onnx onnxscript onnxruntime`.
"""

import argparse
import difflib
import importlib
import inspect
import json
import logging
import operator
import re
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import torchvision
from torch import fx, nn

import fxfeedback.instructed.task_heads  # noqa: F401 it has an op of its own
from fxfeedback.counter_hebb_pass import Learning, key_of, learner
from fxfeedback.errors import RuleError
from fxfeedback.graph.bottom_up import BottomUp
from fxfeedback.graph.shapes import annotate_shapes
from fxfeedback.graph.specs import EXAMPLE_BATCH, Spec
from fxfeedback.graph.structures import is_structure, unpack_tuples
from fxfeedback.instructed.check_rule import Call
from fxfeedback.rules import RULES, Rule
from fxfeedback.rules.core import CONSTANT
from fxfeedback.rules.draws import DROPOUTS, dropped, survival, surviving_channels
from fxfeedback.rules.ops import filled_from
from fxfeedback.tracing.open_modules import open_modules
from fxfeedback.tracing.openings import OPENINGS, OPS_OF_MAPS, WITH_POSITIONS
from fxfeedback.tracing.share import share
from fxfeedback.tracing.trace import trace

HERE = Path(__file__).parent
PAGE, MEASURED = HERE / "operators.md", HERE / "operators.json"
COMMAND = "python docs/generate_operators.py"

ALL_RULES: list[Rule] = list(dict.fromkeys(RULES.values()))


# -- names -------------------------------------------------------------------------------------------------------------

SHORT = {
    r"torch\._C\._nn\.|torch\.nn\.functional\._?": "F.",
    r"torch\._C\._linalg\.linalg_": "torch.linalg.",
    r"torch\._C\._special\.special_": "torch.special.",
    r"torch\.functional\.": "torch.",
    r"torch\.Tensor\.": "Tensor.",
    r"_operator\.": "operator.",
    r"torch\.nn\.modules\.\w+\.": "nn.",
    r"torch\.nn\.": "nn.",
    r"fxfeedback\.[\w.]*\.(?=\w+$)": "fxfeedback's ",
    r"torchvision\.ops\.\w+\.": "torchvision.ops.",
}
"""Where torch keeps an op -> how users write it."""

PLAIN_NAMES = {"log_sigmoid": "logsigmoid", "linalg_vector_norm": "vector_norm"}


def spelled(function: Any) -> str:
    """How users write the name of an op or module: F.relu, Tensor.add, operator.add."""
    if isinstance(function, type):
        name = f"{function.__module__}.{function.__qualname__}"
    else:
        name = fx.node._get_qualified_name(function)
    for pattern, short in SHORT.items():
        name = re.sub(f"^(?:{pattern})", short, name)
    place, dot, leaf = name.rpartition(".")
    return f"{place}{dot}{PLAIN_NAMES.get(leaf, leaf)}"


def spellings(rule: Rule) -> list[str]:
    """All names of the ops that go by the rule."""
    return list(dict.fromkeys(spelled(target) for target, its in RULES.items() if its is rule))


def listed(names: Iterable[str]) -> str:
    """Names as code, each once, in their order."""
    return ", ".join(f"`{name}`" for name in dict.fromkeys(names))


def family(rule: Rule) -> str:
    """The file of fxfeedback/rules that has the rule."""
    return rule.table.__module__.rpartition(".")[2]


# -- what each operand gets --------------------------------------------------------------------------------------------

WORDS = ["transpose", "as it is", "averaged", "evenly", "scaled", "in its own way", "nothing"]
"""What an instruction does, in words, and the order in which several stand."""


class Absent:
    """A BU value in the instruction pass: a shape and no value."""

    has_value = False

    def __init__(self, x: torch.Tensor) -> None:
        self.shape, self.ndim, self.dtype = tuple(x.shape), x.ndim, x.dtype


class Calls(fx.Interpreter):
    """Runs an opened example and notes every call of one rule: y, operands by name, those of them that are not weights.

    Of a list of operands the weights among them keep their values.
    """

    def __init__(self, bu: fx.GraphModule, rule: Rule) -> None:
        super().__init__(bu)
        self.rule, self.calls = rule, []

    def run_node(self, n: fx.Node) -> Any:
        y = super().run_node(n)
        if (
            n.op == "call_function"
            and RULES.get(n.target) is self.rule
            and not is_element(n)
            and any(x.numel() for x in floats(y))
        ):
            nodes, given = (
                self.rule.operands(*both) for both in ((n.args, n.kwargs), self.fetch_args_kwargs_from_env(n))
            )
            values = {name for name, node in nodes.items() if not is_weight(node)}
            absent = {
                name: [x if is_weight(a) else deep(Absent, x) for a, x in zip(node, given[name], strict=True)]
                if isinstance(node, (list, tuple))
                else deep(Absent, given[name])
                for name, node in nodes.items()
            }
            self.calls.append((y, given, absent, values))
        return y


def is_weight(node: Any) -> bool:
    """Whether an operand is a parameter or buffer."""
    return isinstance(node, fx.Node) and node.op == "get_attr"


def opened(example: Any) -> tuple[Call, fx.GraphModule]:
    """An example as a model, and its BU graph with shapes."""
    module = Call(example)
    bu = open_modules(trace(module), example_inputs=(module.x,))
    annotate_shapes(bu, (module.x,))
    unpack_tuples(bu)
    return module, bu


def operands(rule: Rule) -> dict[str, str]:
    """Operand -> what it gets, found by trying the rule on its examples with and without values of its operands."""
    calls = []
    for example in rule.examples:
        module, bu = opened(example)
        torch.manual_seed(0)
        interpreter = Calls(bu, rule)
        with torch.no_grad():
            interpreter.run(module.x)
        calls += interpreter.calls
    alone: dict[str, set[str]] = {}
    among: dict[str, set[str]] = {}
    values: set[str] = set()
    for y, given, absent, own in calls:
        table = at(rule, y, given)
        names = [name for name, x in given.items() if floats(x) and name in table and learns(table[name].error, y)]
        values.update(own.intersection(names))
        for name in names:
            words = instructed(rule, y, given, name, {name: absent[name]}) or instructed(rule, y, given, name, {})
            alone.setdefault(name, set()).update(words)
    for y, given, absent, _ in calls:
        names = [name for name in alone if floats(given.get(name)) and (name in values or alone[name] != {"nothing"})]
        for name in names if len(names) > 1 else ():
            words = instructed(rule, y, given, name, {other: absent[other] for other in names})
            among.setdefault(name, set()).update(words)
    return {name: in_words(name in values, alone[name], among.get(name, set())) for name in alone}


def in_words(is_value: bool, alone: set[str], among: set[str]) -> str:
    """What an operand gets, given what an instruction does to it where the others are weights, and among BU values."""
    if alone <= {"nothing"}:
        return "error only" if is_value else "update"
    first = one_of(alone)
    second = one_of(among - alone) if among - alone else first
    if second != first:
        return f"{first}, or of two BU values {second}"
    return first if first == "transpose" else f"roles: {first}"


def one_of(words: set[str]) -> str:
    """Several words as one; where an instruction passes as it is, it only happened to be the transpose."""
    words = words - {"nothing"} if len(words) > 1 else words
    words = words - {"transpose"} if "as it is" in words else words
    return " or ".join(sorted(words, key=WORDS.index))


def at(rule: Rule, y: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The rule's table for these operands."""
    signature = inspect.signature(rule.table)
    bound = inspect.BoundArguments(signature, {next(iter(signature.parameters)): y, **given})
    return rule.table(*bound.args, **bound.kwargs)


def instructed(rule: Rule, y: Any, given: dict[str, Any], name: str, absent: dict[str, Any]) -> set[str]:
    """What an instruction does to the operand `name` where y has no value and these are `absent`; one word.

    Per role its counter neuron is a linear map of y's: where both have the same matrix it is the transpose, elsewhere
    some columns of the matrix say what it is. The empty set where the rule does not take such a call.
    """
    try:
        error, instruct = at(rule, y, given)[name].error, at(rule, deep(Absent, y), given | absent)[name].instruct
        pairs = [(flat(instruct(t)), flat(error(t))) for t in units(y)]
    except (RuleError, AttributeError, TypeError, RuntimeError):
        return set()
    if all(a is None or not a.any() for a, _ in pairs):
        return {"nothing"}
    if all(a.shape == b.shape and torch.allclose(a, b, atol=1e-12) for a, b in pairs):
        return {"transpose"}
    columns = [a[a != 0] for a, _ in pairs if a.any()]
    share = sum(part.numel() for part in floats(given[name])) / sum(part.numel() for part in floats(y))
    if all(len(column) == 1 for column in columns):
        ways = torch.cat(columns)
        same = torch.allclose(ways, torch.ones_like(ways))
        return {"as it is" if same else "averaged" if torch.allclose(ways, ways * 0 + share) else "scaled"}
    even = all(torch.allclose(column, column[0]) for column in columns)
    return {"evenly" if even else "in its own way"}


def learns(error: Any, y: Any) -> bool:
    """Whether any error comes to an operand; none does to one that only lends its shape."""
    return flat(error(next(units(y)))) is not None


def units(y: Any, most: int = 8) -> Iterator[Any]:
    """Counter neurons of y that are 1 at one place, for some places."""
    parts = [y] if isinstance(y, torch.Tensor) else list(y)
    places = [(i, j) for i, part in enumerate(parts) if part.is_floating_point() for j in range(part.numel())]
    for i, j in places[:: max(1, len(places) // most)]:
        t = [torch.zeros(part.shape, dtype=torch.double) for part in parts]
        t[i].view(-1)[j] = 1.0
        yield t[0] if isinstance(y, torch.Tensor) else t


def deep(change: Any, x: Any) -> Any:
    """x with `change` applied to its tensors."""
    if isinstance(x, (tuple, list)):
        return [deep(change, part) for part in x]
    return change(x) if isinstance(x, torch.Tensor) else x


def floats(x: Any) -> list[torch.Tensor]:
    """The floating-point tensors of x."""
    if isinstance(x, (tuple, list)):
        return [leaf for part in x for leaf in floats(part)]
    return [x] if isinstance(x, torch.Tensor) and x.is_floating_point() else []


def flat(counters: Any) -> torch.Tensor | None:
    """One or several counter neurons as one vector."""
    if isinstance(counters, dict):
        counters = list(counters.values())
    parts = [part.reshape(-1).double() for part in floats(counters)]
    return torch.cat(parts) if parts else None


# -- measured: exports -------------------------------------------------------------------------------------------------


RANDOM = (*DROPOUTS, survival, surviving_channels)
"""Ops after which ONNX Runtime cannot have torch's results."""


class Step(nn.Module):
    """A learner whose updates come as a tuple."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.learner = graph

    def forward(self, *inputs: torch.Tensor) -> Any:
        outputs, updates = self.learner(*inputs)
        return tuple(leaves(outputs)), tuple(updates.values())


def leaves(x: Any) -> list[torch.Tensor]:
    """The tensors of what a model returns."""
    return [leaf for part in x for leaf in leaves(part)] if isinstance(x, (tuple, list)) else [x]


def export(example: Any) -> str:
    """Export the learner of one example in plain form; "" or what is wrong with it.

    float32, as ONNX Runtime has no float64 convolution; where nothing random is drawn, its results must be torch's.
    """
    import onnx
    import onnxruntime

    module = Call(example).float()
    module.x = module.x.float()
    bu = open_modules(trace(module), example_inputs=(module.x,))
    annotate_shapes(bu, (module.x,))
    unpack_tuples(bu)
    buffers = dict(module.named_buffers())
    wanted = [n for n in bu.graph.nodes if n.op in ("placeholder", "get_attr") and n.target not in buffers]
    joint = learner(bu, module, Learning(frozenset(map(key_of, wanted)), {}, {}, fused=False))
    view = BottomUp(bu.graph)
    specs = [*(node.meta["spec"] for node in view.inputs), *(leaf.meta["spec"] for leaf in view.output_leaves())]
    generator = torch.Generator().manual_seed(1)
    start = len(module.x)

    def batch(samples: int) -> tuple[torch.Tensor, ...]:
        sizes = [[a + s * (samples - EXAMPLE_BATCH) for a, s in zip(x.shape, x.per_sample, strict=True)] for x in specs]
        return tuple(torch.randn(size, generator=generator, dtype=torch.float) for size in sizes)

    dynamic = tuple({d: "batch" if s == 1 else f"batch_{s}" for d, s in enumerate(x.per_sample) if s} for x in specs)
    step = Step(joint).eval()
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "step.onnx")
        torch.onnx.export(step, batch(start), path, dynamo=True, dynamic_shapes=(dynamic,), verbose=False)
        onnx.checker.check_model(path, full_check=True)
        file = onnx.load(path)
        if others := {n.domain for n in [*file.graph.node, *file.functions]} - {"", "ai.onnx"}:
            return f"ops outside of ONNX's own domain: {', '.join(sorted(others))}"
        for samples in (start, start + 3):
            try:
                inputs = batch(samples)
                torch.manual_seed(0)
                expected = leaves(step(*inputs))
            except RuntimeError:
                continue  # the example itself takes this batch only
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            names = [given.name for given in session.get_inputs()]
            feeds = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
            results = session.run(None, feeds)
            if any(node.target in RANDOM for node in bu.graph.nodes):
                continue
            for result, value in zip(results, expected, strict=True):
                ours, scale = torch.from_numpy(result), value.detach().abs().amax().clamp_min(1e-6)
                if ours.shape != value.shape or not (ours - value).abs().amax() <= 1e-3 * scale:
                    return f"other results in ONNX Runtime than in torch, at batch {samples}"
    return ""


def measure_export(rule: Rule) -> dict[str, Any]:
    """How many of the rule's examples export, and what is wrong with the others."""
    problems = {}
    for example in rule.examples:
        try:
            problem = export(example)
        except Exception as error:
            problem = reason(error)
        if problem:
            problems[f"{spelled_example(example)}"] = problem
    return {"tried": len(rule.examples), "problems": problems}


def spelled_example(example: Any) -> str:
    """An example without addresses of objects."""
    text = re.sub(r"\b([TC])\(shape=\(([\d, ]*?),?\)\)", r"\1(\2)", str(example))
    return re.sub(r" at 0x[0-9a-f]+", "", text).replace("<lambda>", "expression")


def reason(error: BaseException) -> str:
    """The innermost cause of a failed export, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


# -- measured: the models ----------------------------------------------------------------------------------------------

FAMILIES = {
    "alexnet": "AlexNet",
    "convnext": "ConvNeXt",
    "densenet": "DenseNet",
    "detection": "detection (backbone)",
    "efficientnet": "EfficientNet",
    "googlenet": "GoogLeNet",
    "inception": "Inception v3",
    "maxvit": "MaxViT",
    "mnasnet": "MNASNet",
    "mobilenetv2": "MobileNet v2",
    "mobilenetv3": "MobileNet v3",
    "mvit": "MViT",
    "optical_flow": "RAFT (feature encoder)",
    "regnet": "RegNet",
    "resnet": "ResNet",
    "s3d": "S3D",
    "segmentation": "segmentation",
    "shufflenetv2": "ShuffleNet v2",
    "squeezenet": "SqueezeNet",
    "swin_transformer": "Swin",
    "vgg": "VGG",
    "vision_transformer": "ViT",
    "video": "video ResNet",
}
"""torchvision's file -> what the page calls its models."""


def family_of_model(builder: Any) -> str:
    """What the page calls a model's family: by its file, and by its folder for models with a task of their own."""
    _, _, folder, *file = builder.__module__.split(".")
    folder = file[0] if folder == "video" and file[0] != "resnet" else folder
    return "Swin" if folder == "swin_transformer" else FAMILIES.get(folder, folder)


def measure_models() -> dict[str, Any]:
    """Family -> how many models it has, and the rules that they need in either mode."""
    sys.path.insert(0, str(HERE.parent / "zoo"))
    zoo = importlib.import_module("models")
    found: dict[str, tuple[list[str], set[str]]] = {}
    for name, kind in zoo.models():
        models, rules = found.setdefault(family_of_model(torchvision.models.get_model_builder(name)), ([], set()))
        model, example = built(zoo, name, kind)
        part = model.get_submodule(zoo.PARTS.get(kind, ""))
        models.append(name)
        rules.update(needs(part.eval(), example), needs(part.train(), example))
        print(f"{name}: {len(rules)} rules in its family so far", flush=True)
    families = sorted(found, key=str.lower)
    return {family: {"models": len(found[family][0]), "rules": sorted(found[family][1])} for family in families}


def built(zoo: Any, name: str, kind: str) -> tuple[nn.Module, torch.Tensor]:
    """The model, on the meta device where it can be made there, and an example input."""
    example = torch.empty(1, *zoo.size_of(name, kind), device="meta")
    try:
        with torch.device("meta"), mock.patch.object(torch.Tensor, "any", lambda *_: True):  # zeros need no filling
            return zoo.build(name, kind), example
    except (RuntimeError, NotImplementedError):
        return zoo.build(name, kind), example


def needs(model: nn.Module, example: torch.Tensor) -> set[str]:
    """The names of the rules that the opened graph of a model needs."""
    net = share(model)
    bu = open_modules(trace(net), example_inputs=(example,), owner=net)
    annotate_shapes(bu, (example,))
    unpack_tuples(bu)
    graph = BottomUp(bu.graph)
    reached = graph.below([*graph.inputs, *graph.parameters])
    called = [node for node in graph.nodes if node.op == "call_function" and node in reached]
    called = [node for node in called if not is_structure(node) and not is_element(node)]
    for node in called:
        if node.target not in RULES:
            raise SystemExit(f"{type(model).__name__}: no rule for {spelled(node.target)}")
    return {RULES[node.target].name for node in called}


def is_element(node: fx.Node) -> bool:
    """Whether a node picks one of several outputs."""
    return node.target is operator.getitem and not isinstance(node.args[0].meta.get("spec"), Spec)


# -- the page ----------------------------------------------------------------------------------------------------------

INTRODUCTION = """\
# Operators

<!-- made by `{command}`; do not edit -->

{rules} rules for {ops} ops, one section per file of `fxfeedback/rules`. `tests/test_law.py` compares all of them with
autograd's gradients in float64, to 1e-9. [CONTRIBUTING.md](../CONTRIBUTING.md#adding-a-rule) says how to add one.

**Operands.** How the counter neuron of an op's output is passed to its operands:

- *transpose*: the op is linear in this operand; its transpose serves both instruction and error.
- *roles*: the error is passed by the exact derivative. The instruction, for which no BU value exists yet, is passed
  in another way: *as it is* (summed where the operand was broadcast), *averaged* over what the operand was broadcast
  over, *evenly* to all the values that the output was made from, *scaled* by a weight or number, or *in its own way*.
  *Of two BU values* says what holds where the other operand is not a weight.
- *update*: a parameter; the error is summed into its update, and an instruction does not pass.
- *error only*: an instruction does not pass.

**Site**: the output is a gating site. **Fused**: in eager mode PyTorch's own kernel replaces the rule.
**ONNX**: the learner of every example, in plain form (`fused=False`), exports with `torch.onnx.export(dynamo=True)` and
a dynamic batch, passes `onnx.checker` and gives torch's results in ONNX Runtime, except for random draws. A number
refers to the exceptions below the table.

**torchvision**: the model families that need the rule, in evaluation or in training mode, found by tracing the models
of `torchvision.models.list_models()` except the quantized ones. The [last section](#torchvision) lists the rules by
family, and how many models were traced.
"""


def page(measured: dict[str, Any]) -> str:
    """The whole page."""
    ops = {name for rule in ALL_RULES for name in spellings(rule)}
    parts = [INTRODUCTION.format(command=COMMAND, rules=len(ALL_RULES), ops=len(ops))]
    files = {name: [rule for rule in ALL_RULES if family(rule) == name] for name in sorted(map(family, ALL_RULES))}
    parts += [section(name, rules, measured) for name, rules in files.items()]
    parts += [openings(), constants(), models(measured)]
    return "\n".join(parts)


def section(name: str, rules: list[Rule], measured: dict[str, Any]) -> str:
    """One file of rules: its docstring and a table."""
    doc = inspect.getdoc(importlib.import_module(f"fxfeedback.rules.{name}")) or ""
    notes: list[str] = []
    rows = [
        [
            listed(spellings(rule)),
            cell(inspect.getdoc(rule.table) or ""),
            "<br>".join(f"`{key}` {word}" for key, word in operands(rule).items()) or "(no error passes)",
            "site" if rule.rectifies else "",
            "fused" if rule.fused else "",
            exported(rule, measured, notes),
            needed_by(rule, measured),
        ]
        for rule in rules
    ]
    numbered = "".join(f"{i}. {note}\n" for i, note in enumerate(notes, 1))
    head = ["op", "y", "operands", "site", "fused", "ONNX", "torchvision"]
    return f"## {name.capitalize()}\n{doc}\n\n{table(head, rows)}" + (f"\n{numbered}" if notes else "")


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table without the columns that have nothing in any row."""
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    lines = [[line[i] for i in kept] for line in (head, ["---"] * len(head), *rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def cell(text: str) -> str:
    """Text for a cell: one line per paragraph, with its vertical bars escaped."""
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
    return "<br>".join(paragraphs).replace("|", "\\|").replace("*", "\\*").replace("_", "\\_")


def exported(rule: Rule, measured: dict[str, Any], notes: list[str]) -> str:
    """The cell that says whether a rule's plain form exports; notes say what does not."""
    found = measured["export"].get(rule.name)
    if found is None or found["tried"] != len(rule.examples):
        return "?"
    if not found["problems"]:
        return "yes"
    causes: dict[str, list[str]] = {}
    for example, problem in found["problems"].items():
        causes.setdefault(problem, []).append(example)
    text = "; ".join(f"{', '.join(f'`{e}`' for e in examples)}: {cause}" for cause, examples in causes.items())
    notes.append(f"`{rule.name}`: {text}")
    return f"{'in part' if len(found['problems']) < found['tried'] else 'no'} ({len(notes)})"


def needed_by(rule: Rule, measured: dict[str, Any]) -> str:
    """The families of models that need a rule, or how many these are."""
    families = measured["models"]
    names = [name for name, entry in families.items() if rule.name in entry["rules"]]
    others = [name for name in families if name not in names]
    if not others:
        return "all"
    if len(others) <= 3:
        return f"all but {', '.join(others)}"
    return ", ".join(names) if len(names) <= 6 else f"{len(names)} of {len(families)} families"


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


class Attending(nn.Module):
    """Self-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x)[0]


class Decoding(nn.Module):
    """A decoder that reads its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 4, batch_first=True), 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(x, x)


OPENED: dict[Any, Any] = {
    nn.modules.batchnorm._BatchNorm: (nn.BatchNorm2d(2), (2, 2, 2)),
    nn.modules.instancenorm._InstanceNorm: (nn.InstanceNorm2d(2, affine=True), (2, 2, 2)),
    nn.MultiheadAttention: (Attending(), (3, 4)),
    nn.TransformerEncoder: (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 4, batch_first=True), 1, enable_nested_tensor=False),
        (3, 4),
    ),
    nn.TransformerDecoder: (Decoding(), (3, 4)),
    nn.RNNBase: (nn.LSTM(2, 2, batch_first=True), (2, 2)),
    nn.RNNCellBase: (nn.LSTMCell(2, 2), (2,)),
    F.scaled_dot_product_attention: (lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1), (2, 3, 4)),
    nn.ReLU6: (nn.ReLU6(), (2,)),
    F.dropout: (F.dropout, (2,)),
    torch.dropout: (lambda x: torch.dropout(x, 0.5, True), (2,)),
    dropped: (lambda x: torch.dropout_(x + x, 0.5, True), (2,)),
    F.dropout1d: (F.dropout1d, (2, 2)),
    F.dropout2d: (F.dropout2d, (2, 2, 2)),
    F.dropout3d: (F.dropout3d, (2, 2, 2, 2)),
    torch.feature_dropout: (lambda x: torch.feature_dropout(x, 0.5, True), (2, 2, 2)),
    F.alpha_dropout: (lambda x: F.alpha_dropout(x, 0.5, True), (2,)),
    torch.alpha_dropout: (lambda x: torch.alpha_dropout(x, 0.5, True), (2,)),
    F.feature_alpha_dropout: (lambda x: F.feature_alpha_dropout(x, 0.5, True), (2, 2)),
    torch.feature_alpha_dropout: (lambda x: torch.feature_alpha_dropout(x, 0.5, True), (2, 2)),
    F.gumbel_softmax: (lambda x: F.gumbel_softmax(x, hard=True), (2,)),
    F.rrelu: (lambda x: F.rrelu(x, training=True), (2,)),
    torch.rrelu: (lambda x: torch.rrelu(x, training=True), (2,)),
    F.fractional_max_pool2d: (lambda x: F.fractional_max_pool2d(x, 2, 2), (2, 4, 4)),
    F.fractional_max_pool3d: (lambda x: F.fractional_max_pool3d(x, 2, 2), (2, 4, 4, 4)),
    F.fractional_max_pool2d_with_indices: (lambda x: F.fractional_max_pool2d_with_indices(x, 2, 2)[0], (2, 4, 4)),
    F.fractional_max_pool3d_with_indices: (lambda x: F.fractional_max_pool3d_with_indices(x, 2, 2)[0], (2, 4, 4, 4)),
    filled_from: (lambda x: (x + x).copy_(x), (2,)),
    torch.linalg.norm: (lambda x: torch.linalg.norm(x, 1, (1, 2)), (2, 2)),
    torch.fliplr: (torch.fliplr, (2,)),
    torch.flipud: (torch.flipud, (2,)),
    torchvision.ops.stochastic_depth: (lambda x: torchvision.ops.stochastic_depth(x, 0.5, "row"), (2,)),
    torch.conv1d: (nn.Conv1d(2, 2, 2, padding="same"), (2, 4)),
    torch.conv2d: (nn.Conv2d(2, 2, 2, padding="same"), (2, 4, 4)),
    torch.conv3d: (nn.Conv3d(2, 2, 2, padding="same"), (2, 4, 4, 4)),
}
"""What is opened -> a module or function that has it, and the size of its input."""


def openings() -> str:
    """The section on what is opened, and into what, in training mode."""
    rows = []
    of_maps = {op for ops in (*OPS_OF_MAPS.values(), *WITH_POSITIONS.values()) for op in ops}
    for target in OPENINGS:
        if target in of_maps:
            continue
        if target not in OPENED:
            raise SystemExit(f"{Path(__file__).name}: OPENED lacks an example with {spelled(target)}")
        example, size = OPENED[target]
        model = nn.Sequential(example) if isinstance(example, nn.Module) else Apply(example)
        inputs = (torch.empty(1, *size, device="meta"),)
        nodes = open_modules(trace(model.train()), example_inputs=inputs).graph.nodes
        names = [spelled(node.target) for node in nodes if node.op == "call_function"]
        rows.append([f"`{spelled(target)}`", listed(names)])
    return (
        "## Openings\nModules of `torch.nn` open into functions by their own forward, in-place ops become out-of-place "
        "ones, and the model's\nown functions open op by op. `fxfeedback/tracing/openings.py` opens the following. "
        "The table shows training mode;\ndropout that is off is the input itself. A convolution or pooling of a map "
        "without a batch adds a batch dimension\nand removes it again. Any other function of PyTorch that has no rule "
        "opens into PyTorch's own decomposition of it:\n`fxfeedback nodes MODEL --opened` shows into what.\n\n"
        f"{table(['what', 'into'], rows)}"
    )


def constants() -> str:
    """The section on ops that no counter neuron passes."""
    names = sorted({spelled(target) for target in CONSTANT}, key=lambda name: name.rpartition(".")[::-1])
    return (
        "## Constant\nNo counter neuron passes through these, nor through any op whose output is not a floating-point "
        f"tensor (comparisons, sizes,\npositions):\n{listed(names)}.\n"
    )


def models(measured: dict[str, Any]) -> str:
    """The section on the torchvision models."""
    families = measured["models"]
    everywhere = set.intersection(*(set(entry["rules"]) for entry in families.values())) if families else set()
    order = [rule.name for rule in ALL_RULES]
    rows = [
        [
            name,
            str(entry["models"]),
            ", ".join(rule for rule in order if rule in set(entry["rules"]) - everywhere),
        ]
        for name, entry in families.items()
    ]
    total = sum(entry["models"] for entry in families.values())
    common = ", ".join(rule for rule in order if rule in everywhere)
    head = ["family", "models", "rules"]
    return (
        f"## torchvision\nThe rules that {total} models need, besides those that all need ({common}). Of detection "
        f"models and RAFT, which torch.fx\ncannot trace whole, the part that computes features was traced.\n\n"
        f"{table(head, rows)}\nMeasured with torch {measured['torch']}, torchvision {measured['torchvision']}, "
        f"onnx {measured['onnx']}, ONNX Runtime {measured['onnxruntime']}.\n"
    )


# -- the command -------------------------------------------------------------------------------------------------------


def measure(names: list[str]) -> None:
    """Measure and write docs/operators.json; with names of rules only their exports, anew."""
    for logger in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore")
    unknown = set(names) - {rule.name for rule in ALL_RULES}
    if unknown:
        raise SystemExit(f"no rule is called {', '.join(sorted(unknown))}")
    measured = read()
    for name in ("torch", "torchvision", "onnx", "onnxruntime"):
        measured[name] = importlib.import_module(name).__version__.partition("+")[0]
    if not names:
        measured["models"] = measure_models()
        write(measured)
    for rule in ALL_RULES:
        if not names or rule.name in names:
            measured["export"][rule.name] = found = measure_export(rule)
            write(measured)
            print(f"{rule.name}: {len(found['problems'])} of {found['tried']} do not export", flush=True)


def write(measured: dict[str, Any]) -> None:
    """docs/operators.json, without rules that no longer exist."""
    found = measured["export"]
    measured["export"] = {rule.name: found[rule.name] for rule in ALL_RULES if rule.name in found}
    MEASURED.write_text(json.dumps(measured, indent=1, ensure_ascii=False) + "\n")


def read() -> dict[str, Any]:
    """docs/operators.json."""
    empty = {"torch": "?", "torchvision": "?", "onnx": "?", "onnxruntime": "?", "models": {}, "export": {}}
    return json.loads(MEASURED.read_text()) if MEASURED.exists() else empty


def main(arguments: list[str] | None = None) -> int:
    """Write or check the page; returns 1 where the check fails."""
    parser = argparse.ArgumentParser(description="Write docs/operators.md.")
    parser.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    parser.add_argument("--measure", nargs="*", metavar="RULE", help="first try the exports (of these rules) anew")
    given = parser.parse_args(arguments)
    if given.measure is not None:
        measure(given.measure)
    new = page(read())
    if not given.check:
        PAGE.write_text(new)
        return 0
    old = PAGE.read_text() if PAGE.exists() else ""
    changes = list(difflib.unified_diff(old.splitlines(), new.splitlines(), str(PAGE), "now", "", "", 0, ""))
    if changes:
        print("\n".join(changes[:40]))
        print(f"docs/operators.md is not up to date: run {COMMAND}")
        unmeasured = [rule.name for rule in ALL_RULES if exported(rule, read(), []) == "?"]
        if unmeasured:
            print(f"and, for the exports of new examples: {COMMAND} --measure {' '.join(unmeasured)}")
    return bool(changes)


if __name__ == "__main__":
    sys.exit(main())
