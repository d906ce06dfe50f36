"""What predicts: the default predictors, a predictor as a graph, and how many cells one cell reaches."""

import copy
import math

import torch
from torch import fx, nn

from fxfeedback.errors import InputError, OptionError, TraceError
from fxfeedback.graph.layout import LINEAR, Layout, layout_of
from fxfeedback.graph.nodes import identifier, name_of, spec_of, specs_of, tell
from fxfeedback.graph.shapes import annotate_shapes
from fxfeedback.graph.specs import EXAMPLE_BATCH, Spec, of_size
from fxfeedback.graph.structures import unpack_tuples
from fxfeedback.predictive.predictions import Place, shown
from fxfeedback.tracing.arguments import form_of
from fxfeedback.tracing.open_modules import open_modules
from fxfeedback.tracing.open_operators import open_operators
from fxfeedback.tracing.trace_at_size import trace_for
from fxfeedback.tracing.verify import verify_graph

TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


# -- the default ------------------------------------------------------------------------------------------------------


def default_predictor(place: Place) -> nn.Module:
    """From map to map: an upsampling where sizes differ, and a transposed convolution; from vector to vector: linear.

    Raises:
        OptionError: between other layouts there is no default.
    """
    source, target = layout_of(place.node), layout_of(place.target)
    if (source.kind, target.kind) == ("vector", "vector"):
        return nn.Linear(source.channels, target.channels)
    positions = len(source.size)
    if (source.kind, target.kind) != ("map", "map") or positions != len(target.size) or positions not in TRANSPOSED:
        raise OptionError(
            f"there is no default predictor from {place.prediction.node!r}, {_described(source, place.node)}, to "
            f"{name_of(place.target)!r}, {_described(target, place.target)}: give predictor="
        )
    convolution = TRANSPOSED[positions](source.channels, target.channels, 3, padding=1)
    if source.size == target.size:
        return nn.Sequential(convolution)
    factors = tuple(_factor(*sizes) for sizes in zip(source.size, target.size, strict=True))
    return nn.Sequential(nn.Upsample(scale_factor=factors, mode=LINEAR[positions], align_corners=False), convolution)


def _factor(size: int, wanted: int) -> float:
    """The factor by which torch makes `wanted` of `size`, rounding down."""
    factor = wanted / size
    return factor if math.floor(size * factor) == wanted else math.nextafter(factor, math.inf)


def _described(layout: Layout, node: fx.Node) -> str:
    kinds = {"vector": "a vector", "map": "a map", "last": "a map with its channels last", "tokens": "tokens"}
    return f"{kinds[layout.kind]} {shown(spec_of(node))}"


# -- as a graph -------------------------------------------------------------------------------------------------------


def graph_of(predictor: nn.Module, place: Place, prefix: str, verify: bool = False) -> fx.GraphModule:
    """A predictor's graph in ops that have rules, with shapes; its tensors and nodes are called after `prefix`.

    Args:
        predictor: in the mode in which it is to run.
        place: where it reads and what it predicts.
        prefix: its path in the module on which the graph will run.
        verify: compare the graph with the module.

    Raises:
        TraceError: the predictor cannot be traced or does not run on what it is to predict from.
        OptionError: it makes something else than a tensor of the target's shape.
    """
    spec = spec_of(place.node)
    examples, form = [of_size(spec.shape[1:], spec.dtype)], form_of(predictor, 1)
    try:
        traced, _ = trace_for(predictor, examples, form)
        module = open_modules(traced, example_inputs=examples, owner=predictor)
        annotate_shapes(module, examples)
        unpack_tuples(module)
        open_operators(module, examples, predictor)
        if verify:
            verify_graph(module, predictor, form, examples)
    except (TraceError, InputError) as error:
        raise TraceError(f"the predictor at {place.prediction.node!r}: {error}") from error
    _check_shape(module.graph.output_node().args[0], place)
    for node in module.graph.nodes:
        if node.op == "output":
            continue
        tell(node, name=f"{prefix}.{name_of(node)}")
        if node.op == "get_attr":
            node.target = f"{prefix}.{node.target}"
        node._rename(identifier(name_of(node)))
    return module


def _check_shape(output: object, place: Place) -> None:
    found = specs_of(output) if isinstance(output, fx.Node) else None
    wanted = spec_of(place.target)
    if not isinstance(found, Spec):
        raise OptionError(f"the predictor at {place.prediction.node!r} returns something else than one tensor")
    rows = spec_of(place.node).per_sample[0]  # the predictor's batch, per sample of the model's
    at_example = [
        n + slope * EXAMPLE_BATCH * (rows - 1) for n, slope in zip(found.shape, found.per_sample, strict=True)
    ]
    slopes = tuple(slope * rows for slope in found.per_sample)
    if (tuple(at_example), slopes) != (wanted.shape, wanted.per_sample):
        own = "the model's input" if place.target.op == "placeholder" else repr(name_of(place.target))
        raise OptionError(
            f"the prediction at {place.prediction.node!r} has shape {shown(found)}, and what it predicts, {own}, "
            f"has {shown(wanted)}: give a predictor whose prediction has the same"
        )


# -- scaling by the window --------------------------------------------------------------------------------------------


def factor_of(predictor: nn.Module, place: Place) -> float:
    """The number that p - τ is multiplied by; with scaling "mean" it is divided by the batch afterwards."""
    scaling, shape = place.prediction.scaling, spec_of(place.target).shape
    if scaling == "window":
        return 2 / math.sqrt(cells_reached(predictor, place))
    if isinstance(scaling, str):
        return 2 / math.prod(shape[1:]) / (1 if scaling == "mean" else spec_of(place.target).per_sample[0])
    return 2 / math.sqrt(scaling)


@torch.no_grad()
def cells_reached(predictor: nn.Module, place: Place) -> int:
    """How many cells of the prediction depend on the central cell of the representation.

    The predictor runs with weights 1 and biases 0 on that cell alone and on nothing at all; what differs is counted. A
    closing activation changes nothing of that: it acts on each cell by itself.

    Raises:
        OptionError: none does.
    """
    net = copy.deepcopy(predictor)
    net = net.to_empty(device="cpu") if any(p.is_meta for p in net.parameters()) else net.cpu()
    net = net.double().eval()
    for name, parameter in net.named_parameters():
        parameter.fill_(0.0 if name.rpartition(".")[2] == "bias" else 1.0)
    sizes = spec_of(place.node).shape[1:]
    nothing = torch.zeros(1, *sizes, dtype=torch.float64)
    one = nothing.clone()
    one[(0, *(n // 2 for n in sizes))] = 1.0
    with torch.autocast("cpu", enabled=False):
        count = int((net(one) != net(nothing)).sum())
    if not count:
        raise OptionError(
            f"the prediction at {place.prediction.node!r}: with weights 1 no cell of it depends on the central cell of "
            'the representation, so that scaling="window" has nothing to count: give the number C'
        )
    return count
