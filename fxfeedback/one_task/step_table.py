"""Which op does what with channels: a table from rules to the steps of steps.py and moving.py.

An op that is not in the table, or is called in a way that is not covered, mixes all channels of its operands into all
of its own: nothing is removed through it, and the values that it reads are made whole.
"""

import math
from collections.abc import Callable, Iterable, Sequence

from torch import fx

from fxfeedback.graph.nodes import spec_of, specs_of
from fxfeedback.graph.specs import Spec
from fxfeedback.one_task.moving import MOVES, Joining, moving
from fxfeedback.one_task.network import Network, Step, unknown
from fxfeedback.one_task.steps import Mixing, PerChannel, Whole
from fxfeedback.rules import (
    RULES,
    Rule,
    embedding_bags,
    factorizations,
    indexing,
    linear_algebra,
    linear_systems,
    matmul,
    pooling,
    reduction,
    reflections,
    repeating,
    resizing,
    sampling,
    scattering,
    sequence_losses,
    special,
    spectra,
    unpooling,
    writing,
)
from fxfeedback.rules import activation as act
from fxfeedback.rules import arithmetic as sums
from fxfeedback.rules import complex_values as parts
from fxfeedback.rules import elementwise as each
from fxfeedback.rules import normalization as norms
from fxfeedback.rules import reshaping as moves
from fxfeedback.rules import two_values as pairs
from fxfeedback.rules.attention import attention
from fxfeedback.rules.convolution import convolution, transposed_convolution
from fxfeedback.rules.core import as_tuple
from fxfeedback.rules.dropout import dropout, identity
from fxfeedback.rules.gating import galu
from fxfeedback.rules.linear import linear

Choice = Callable[[Network, fx.Node], Step | None]
"""The step of a call, or None where the op mixes channels when it is called like this."""


def elementwise(network: Network, node: fx.Node, zero_wins: bool = False) -> Step | None:
    """Each value by itself, with broadcasting."""
    spec = spec_of(node)
    operands = [source for source in node.all_input_nodes if source not in network.numbers]
    places: dict[fx.Node, int] = {}  # of the channels, counted from the last dimension
    for source in operands:
        channels = network.channels(source) if source in network.steps else unknown(None)
        if channels.dim is not None and channels.size == spec.shape[channels.dim - len(network.shape(source))]:
            places[source] = channels.dim - len(network.shape(source))
    if not places:
        return None
    leader = max(places, key=lambda s: (bool(network.channels(s).known.any()), math.prod(network.shape(s))))
    place = places[leader]

    def along(source: fx.Node) -> int | None:
        shape = network.shape(source)
        here = len(shape) >= -place and shape[place] == spec.shape[place]
        return len(shape) + place if here else None

    return PerChannel(
        network, node, len(spec.shape) + place, {source: along(source) for source in operands}, zero_wins=zero_wins
    )


def product(network: Network, node: fx.Node) -> Step | None:
    """A product, of finite values."""
    return elementwise(network, node, zero_wins=True)


def of_one(network: Network, node: fx.Node) -> Step | None:
    """Each value by itself; a second tensor would only lend its dtype."""
    return elementwise(network, node) if len(node.all_input_nodes) == 1 else None


def with_vectors(*names: str) -> Choice:
    """Maps (N, C, ...), channel by channel, with vectors over channels as further operands."""

    def choose(network: Network, node: fx.Node) -> Step | None:
        operands = RULES[node.target].operands(node.args, dict(node.kwargs))
        source, shape = operands["input"], network.shape(operands["input"])
        vectors = {operands[name]: 0 for name in names if isinstance(operands.get(name), fx.Node)}
        others = [s for s in node.all_input_nodes if s is not source and s not in vectors and s not in network.numbers]
        constants = all(network.constant(vector) is not None for vector in vectors)
        whole = all(network.shape(vector) == (shape[1],) for vector in vectors) if len(shape) > 1 else False
        if others or not (constants and whole) or network.channels(source).dim != 1 or not _has_batch(node, shape):
            return None
        return PerChannel(network, node, 1, {source: 1, **vectors}, on_maps=True)

    return choose


def one_slope_or_many(network: Network, node: fx.Node) -> Step | None:
    """PReLU: one number for all channels, or one each."""
    weight = network.constant(RULES[node.target].operands(node.args, dict(node.kwargs))["weight"])
    if weight is None:
        return None
    return elementwise(network, node) if weight.numel() == 1 else with_vectors("weight")(network, node)


def _has_batch(node: fx.Node, shape: Sequence[int]) -> bool:
    """Whether an op on maps sees (N, C, ...), and not a single map (C, ...)."""
    digits = [c for c in getattr(node.target, "__name__", "") if c.isdigit()]
    return not digits or len(shape) == int(digits[-1]) + 2


def over_positions(network: Network, node: fx.Node) -> Step | None:
    """A reduction over dimensions without channels."""
    operands = RULES[node.target].operands(node.args, dict(node.kwargs))
    source = operands["input"]
    dim, ndim = network.channels(source).dim, len(network.shape(source))
    given = operands.get("dim")
    if dim is None or given is None or isinstance(given, bool) or given in ((), []):
        return None
    reduced = {d % ndim for d in (given if isinstance(given, (tuple, list)) else (given,))}
    if dim in reduced or any(spec_of(source).per_sample[d] for d in reduced):
        return None
    gone = 0 if operands.get("keepdim") else sum(d < dim for d in reduced)
    return PerChannel(network, node, dim - gone, {source: dim}, on_maps=True)


def padding(network: Network, node: fx.Node) -> Step | None:
    """Around positions; or zeros around the channels."""
    operands = RULES[node.target].operands(node.args, dict(node.kwargs))
    source, widths = operands["input"], list(operands["pad"])
    dim, ndim = network.channels(source).dim, len(network.shape(source))
    if dim is None or any(isinstance(width, fx.Node) for width in widths):
        return None
    at = 2 * (ndim - 1 - dim)
    if not any(widths[at : at + 2]):
        return PerChannel(network, node, dim, {source: dim}, on_maps=True)
    return moving(network, node) if not operands.get("value") else None


def layer(network: Network, node: fx.Node) -> Step | None:
    """Convolutions and linear layers, of weights that do not depend on the input."""
    operands = RULES[node.target].operands(node.args, dict(node.kwargs))
    bias = operands.get("bias")
    if network.constant(operands["weight"]) is None or (bias is not None and network.constant(bias) is None):
        return None
    if RULES[node.target] is linear:
        return Mixing(network, node, len(network.shape(operands["input"])) - 1, 1, False)
    pads = operands.get("padding", 0)
    padded = isinstance(pads, str) or any(as_tuple(pads, 1)) or RULES[node.target] is transposed_convolution
    if not _has_batch(node, network.shape(operands["input"])):
        return None
    return Mixing(network, node, 1, operands.get("groups", 1), padded)


def joining(network: Network, node: fx.Node) -> Step | None:
    """Values one after the other, along the channels or along positions."""
    operands = RULES[node.target].operands(node.args, dict(node.kwargs))
    parts, ndim = list(operands["tensors"]), len(spec_of(node).shape)
    dim = operands.get("dim", 0) % ndim
    tracked = [part for part in parts if part in network.steps and network.channels(part).dim is not None]
    if len(parts) > len([part for part in parts if part in network.steps]) or not tracked:
        return None
    if any(network.channels(part).dim == dim for part in tracked) and not spec_of(node).per_sample[dim]:
        return Joining(network, node, dim)
    along = network.channels(tracked[0]).dim
    return PerChannel(network, node, along, dict.fromkeys(parts, along)) if along not in (None, dim) else None


def _table(*rows: tuple[Choice, Iterable[Rule]]) -> dict[Rule, Choice]:
    return {rule: choice for choice, rules in rows for rule in rules}


OF_MATRICES = {part.__name__ for part in (linear_algebra, linear_systems, factorizations, spectra, reflections)}
"""The files whose rules all mix channels."""

STEPS: dict[Rule, Choice] = _table(
    (
        elementwise,
        [
            *(act.relu, act.leaky_relu, act.relu6, act.hardtanh, act.sigmoid, act.tanh, act.gelu, act.silu, act.mish),
            *(act.elu, act.hardswish, act.hardsigmoid, act.softplus, act.celu, act.selu, act.logsigmoid, act.softsign),
            *(act.tanhshrink, act.rrelu, act.hardshrink, act.softshrink, act.threshold),
            *each.FUNCTIONS,
            *special.FUNCTIONS,
            *(special.polygamma, special.tensor_polygamma, special.multivariate_lgamma, special.logit, special.angle),
            *(pairs.atan2, pairs.hypot, pairs.fmax, pairs.fmin, pairs.remainder, pairs.fmod, pairs.copysign),
            *(
                pairs.reflected_remainder,
                pairs.ldexp,
                pairs.logaddexp,
                pairs.logaddexp2,
                pairs.xlogy,
                pairs.xlog1py,
                pairs.zeta,
            ),
            *(each.power, each.nan_to_num, each.clamp, each.clamp_min, each.clamp_max, each.maximum, each.minimum),
            *(sums.add, sums.sub, sums.div, sums.neg, sums.rsub, sums.addcmul, sums.addcdiv, sums.lerp),
            *(indexing.where, indexing.tensor_where, indexing.masked_fill, moves.copy, identity),
        ],
    ),
    (product, [sums.mul]),
    (of_one, [moves.cast]),
    (with_vectors("running_mean", "running_var", "weight", "bias"), [norms.batch_norm, norms.instance_norm]),
    (one_slope_or_many, [act.prelu]),
    (
        with_vectors(),
        [
            pooling.avg_pool,
            pooling.adaptive_avg_pool,
            pooling.max_pool,
            pooling.adaptive_max_pool,
            resizing.interpolate,
        ],
    ),
    (over_positions, [reduction.mean, reduction.total, reduction.amax, reduction.var, reduction.std]),
    (padding, [moves.pad]),
    (layer, [convolution, transposed_convolution, linear]),
    (joining, [moves.cat]),
    (moving, MOVES),
)
"""A rule -> how its op treats channels."""

MIXES: list[Rule] = [
    *(act.glu, act.softmax, act.softmin, act.log_softmax, sums.cosine_similarity),
    *(matmul.matmul, matmul.mm, matmul.mv, matmul.addmm, matmul.baddbmm, matmul.einsum, matmul.tensordot),
    *(matmul.bilinear, matmul.outer, attention, dropout, each.cut_off, galu),
    *(indexing.gather, indexing.take_along_dim, indexing.embedding, indexing.tril, indexing.triu, indexing.diagonal),
    *(indexing.windows, indexing.slice_scatter, indexing.select_scatter, indexing.sort, indexing.topk),
    *(reduction.greatest, reduction.smallest, reduction.median, reduction.var_mean, reduction.std_mean),
    *(reduction.vector_norm, reduction.linalg_norm, reduction.norm, reduction.cdist, reduction.logsumexp),
    *(reduction.cumsum, reduction.cumprod, reduction.prod, reduction.logcumsumexp, reduction.cummax),
    *(reduction.kthvalue, reduction.mode, special.frexp),
    *(rule for rule in dict.fromkeys(RULES.values()) if rule.table.__module__ in OF_MATRICES),
    *(norms.synced, norms.layer_norm, norms.group_norm, norms.rms_norm, norms.normalize, norms.local_response_norm),
    *(repeating.expand, repeating.expand_as, repeating.repeat, repeating.repeat_interleave),
    *(moves.pixel_shuffle, moves.pixel_unshuffle, moves.unfold, moves.fold, moves.stack),
    *(sampling.grid_sample, sampling.affine_grid),
    *(writing.put, writing.scatter, writing.scatter_add, writing.index_copy, writing.index_add, writing.index_fill),
    *(scattering.index, scattering.index_put, scattering.take, scattering.put_flat, scattering.masked_scatter),
    *(scattering.scatter_reduce, scattering.index_reduce, scattering.segment_reduce, scattering.diagonal_scatter),
    *(scattering.diag_embed, scattering.diag, scattering.diagflat, scattering.trace, scattering.as_strided),
    *(scattering.as_strided_scatter, unpooling.max_pool_with_positions, unpooling.adaptive_max_pool_with_positions),
    *(unpooling.fractional_max_pool, *unpooling.PUT_BACK, embedding_bags.embedding_bag, reduction.pdist),
    *(sampling.grid_sampler, resizing.upsample_smoothly, matmul.trilinear, parts.conj, parts.resolved, parts.real),
    *(parts.imag, parts.view_as_real, parts.view_as_complex, parts.of_parts, parts.polar, parts.sgn, parts.fft),
    *(parts.fft_of_real, parts.fft_to_real, sequence_losses.ctc_loss),
]
"""The other rules: their ops mix channels, or are too rare to have a step. Nothing is removed."""


def step_of(network: Network, node: fx.Node) -> Step:
    """How the node's op treats channels."""
    rule = RULES.get(node.target) if node.op == "call_function" else None
    spec = specs_of(node)
    if rule in STEPS and isinstance(spec, Spec) and spec.dtype.is_floating_point and 0 not in spec.shape:
        return STEPS[rule](network, node) or Whole(network, node)
    return Whole(network, node)
