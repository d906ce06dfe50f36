"""Pointwise nonlinearities. The instruction passes them as it is; a gating site, where one rectifies, is the walk's."""

import math

import torch
import torch.nn.functional as F

from fxfeedback.rules.core import as_is, channelwise, constant, fused, roles, rule, spatial, update, without_derivative
from fxfeedback.rules.draws import drawn_slopes
from fxfeedback.rules.examples import Example, T, call
from fxfeedback.rules.ops import leaky_by

aten = torch.ops.aten


def pointwise(error):
    """y = f(x): the instruction passes as it is, the error is multiplied by f'(x)."""
    return {"input": roles(instruct=as_is, error=error)}


@rule(F.relu, torch.relu, rectifies=True, step=True, examples=[call(F.relu, T(4, 5)), call(torch.relu, T(4, 5, 2))])
def relu(y, input, inplace=False):
    """max(x, 0); its derivative is the gate [y > 0]"""
    return pointwise(lambda e: e * (y > 0))


@fused(relu)
def relu_backward(e, y, saved, wanted, input, inplace=False):
    return {"input": aten.threshold_backward(e, y, 0)}


@rule(F.leaky_relu, rectifies=True, examples=[call(F.leaky_relu, T(4, 5)), call(F.leaky_relu, T(4, 5), 0.3)])
def leaky_relu(y, input, negative_slope=0.01, inplace=False):
    """x where x > 0, slope x elsewhere"""
    return pointwise(lambda e: torch.where(input > 0, e, e * negative_slope))


@fused(leaky_relu)
def leaky_relu_backward(e, y, saved, wanted, input, negative_slope=0.01, inplace=False):
    return {"input": aten.leaky_relu_backward(e, input, negative_slope, False)}


@rule(leaky_by, rectifies=True, examples=[call(F.rrelu, T(4, 5), training=True), call(F.rrelu, T(4, 5), 0.2, 0.4)])
def rrelu(y, input, slopes):
    """x where x > 0, x times the slope that was drawn elsewhere"""
    return pointwise(lambda e: e * slopes)


constant(drawn_slopes)


@rule(F.relu6, rectifies=True, step=True, examples=[call(F.relu6, T(200, 5))])
def relu6(y, input, inplace=False):
    """min(max(x, 0), 6); its derivative is the gate [0 < y < 6]"""
    return pointwise(lambda e: e * ((y > 0) & (y < 6)))


@fused(relu6)
def relu6_backward(e, y, saved, wanted, input, inplace=False):
    return {"input": aten.hardtanh_backward(e, y, 0, 6)}


@rule(F.hardtanh, examples=[call(F.hardtanh, T(40, 5)), call(F.hardtanh, T(40, 5), -0.5, 1.5)])
def hardtanh(y, input, min_val=-1.0, max_val=1.0, inplace=False):
    """min(max(x, low), high)"""
    return pointwise(lambda e: e * ((input > min_val) & (input < max_val)))


@rule(F.sigmoid, torch.sigmoid, torch.special.expit, examples=[call(torch.sigmoid, T(4, 5))])
def sigmoid(y, input):
    """1 / (1 + exp(-x))"""
    return pointwise(lambda e: e * y * (1 - y))


@fused(sigmoid)
def sigmoid_backward(e, y, saved, wanted, input):
    return {"input": aten.sigmoid_backward(e, y)}


@rule(F.tanh, torch.tanh, examples=[call(torch.tanh, T(4, 5))])
def tanh(y, input):
    """tanh x"""
    return pointwise(lambda e: e * (1 - y * y))


@fused(tanh)
def tanh_backward(e, y, saved, wanted, input):
    return {"input": aten.tanh_backward(e, y)}


@rule(F.gelu, rectifies=True, examples=[call(F.gelu, T(4, 5)), call(F.gelu, T(4, 5), approximate="tanh")])
def gelu(y, input, approximate="none"):
    """x Φ(x), or Φ by tanh(√(2/π) (x + 0.044715 x³))"""

    def exact(e):
        density = torch.exp(-0.5 * input * input) / math.sqrt(2 * math.pi)
        return e * (0.5 * (1 + torch.erf(input / math.sqrt(2))) + input * density)

    def by_tanh(e):
        k = math.sqrt(2 / math.pi)
        u = torch.tanh(k * (input + 0.044715 * input**3))
        return e * 0.5 * (1 + u + input * (1 - u * u) * k * (1 + 3 * 0.044715 * input * input))

    return pointwise(exact if approximate == "none" else by_tanh)


@fused(gelu)
def gelu_backward(e, y, saved, wanted, input, approximate="none"):
    return {"input": aten.gelu_backward(e, input, approximate=approximate)}


@rule(F.silu, rectifies=True, examples=[call(F.silu, T(4, 5))])
def silu(y, input, inplace=False):
    """x σ(x)"""

    def error(e):
        s = torch.sigmoid(input)
        return e * s * (1 + input * (1 - s))

    return pointwise(error)


@fused(silu)
def silu_backward(e, y, saved, wanted, input, inplace=False):
    return {"input": _silu_error(e, input)}


_silu_error = without_derivative(aten.silu_backward, lambda e, x: silu.table(None, x)["input"].error(e))


@rule(F.mish, rectifies=True, examples=[call(F.mish, T(4, 5))])
def mish(y, input, inplace=False):
    """x tanh(log(1 + exp x))"""

    def error(e):
        u = torch.tanh(F.softplus(input))
        return e * (u + input * (1 - u * u) * torch.sigmoid(input))

    return pointwise(error)


@rule(F.elu, rectifies=True, examples=[call(F.elu, T(4, 5)), call(F.elu, T(4, 5), alpha=0.5)])
def elu(y, input, alpha=1.0, inplace=False):
    """x where x > 0, α (exp x - 1) elsewhere"""
    return pointwise(lambda e: torch.where(input > 0, e, e * (y + alpha)))


@rule(F.hardswish, rectifies=True, examples=[call(F.hardswish, T(200, 5))])
def hardswish(y, input, inplace=False):
    """x min(max(x + 3, 0), 6) / 6"""
    return pointwise(lambda e: torch.where(input < -3, 0.0, torch.where(input <= 3, e * (input / 3 + 0.5), e)))


@fused(hardswish)
def hardswish_backward(e, y, saved, wanted, input, inplace=False):
    return {"input": aten.hardswish_backward(e, input)}


@rule(
    F.hardsigmoid,
    examples=[
        Example(F.hardsigmoid, (T(200, 5),), {}, tolerance=1e-7)  # PyTorch's own kernel multiplies by 1/6 in float32
    ],
)
def hardsigmoid(y, input, inplace=False):
    """min(max(x + 3, 0), 6) / 6"""
    return pointwise(lambda e: e * ((input > -3) & (input < 3)) / 6)


@fused(hardsigmoid)
def hardsigmoid_backward(e, y, saved, wanted, input, inplace=False):
    return {"input": _hardsigmoid_error(e, input)}


_hardsigmoid_error = without_derivative(
    aten.hardsigmoid_backward, lambda e, x: hardsigmoid.table(None, x)["input"].error(e)
)


@rule(
    F.softplus, rectifies=True, examples=[call(F.softplus, T(4, 5)), call(F.softplus, T(4, 5), beta=2.0, threshold=1.0)]
)
def softplus(y, input, beta=1.0, threshold=20.0):
    """log(1 + exp(β x)) / β; x itself where β x exceeds the threshold"""
    return pointwise(lambda e: torch.where(input * beta > threshold, e, e * torch.sigmoid(input * beta)))


@rule(F.prelu, torch.prelu, rectifies=True, examples=[call(F.prelu, T(4, 5, 3), T(5)), call(F.prelu, T(4, 5), T(1))])
def prelu(y, input, weight):
    """x where x > 0, w x elsewhere; one w for all channels or one each"""
    slope = channelwise(weight, input.ndim) if input.ndim > 1 else weight if input.ndim else weight.reshape(())
    dims = [0, *spatial(input)] if math.prod(weight.shape) > 1 else list(range(input.ndim))
    return pointwise(lambda e: torch.where(input > 0, e, e * slope)) | {
        "weight": update(lambda e: torch.where(input > 0, 0.0, e * input).sum(dims).reshape(weight.shape))
    }


@rule(F.celu, torch.celu, examples=[call(F.celu, T(4, 5)), call(F.celu, T(4, 5), 0.5)])
def celu(y, input, alpha=1.0, inplace=False):
    """x where x > 0, α (exp(x / α) - 1) elsewhere"""
    return pointwise(lambda e: torch.where(input > 0, e, e * (y / alpha + 1)))


@rule(F.selu, torch.selu, examples=[call(F.selu, T(4, 5))])
def selu(y, input, inplace=False):
    """s x where x > 0, s α (exp x - 1) elsewhere"""
    # Klambauer et al. (2017), in as many digits as torch has
    alpha, scale = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946
    return pointwise(lambda e: torch.where(input > 0, e * scale, e * (y + scale * alpha)))


@rule(F.logsigmoid, examples=[call(F.logsigmoid, T(4, 5))])
def logsigmoid(y, input):
    """-log(1 + exp(-x))"""
    return pointwise(lambda e: e * torch.sigmoid(-input))


@rule(F.softsign, examples=[call(F.softsign, T(4, 5))])
def softsign(y, input):
    """x / (1 + |x|)"""
    return pointwise(lambda e: e / (1 + input.abs()) ** 2)


@rule(F.tanhshrink, examples=[call(F.tanhshrink, T(4, 5))])
def tanhshrink(y, input):
    """x - tanh x"""
    return pointwise(lambda e: e * (input - y) ** 2)


@rule(F.hardshrink, torch.hardshrink, examples=[call(F.hardshrink, T(40, 5)), call(F.hardshrink, T(40, 5), 0.9)])
def hardshrink(y, input, lambd=0.5):
    """x where |x| > λ, 0 elsewhere"""
    return pointwise(lambda e: e * (input.abs() > lambd))


@rule(F.softshrink, examples=[call(F.softshrink, T(40, 5), lambd=0.3)])
def softshrink(y, input, lambd=0.5):
    """x - λ sign x where |x| > λ, 0 elsewhere"""
    return pointwise(lambda e: e * (input.abs() > lambd))


@rule(F.threshold, torch.threshold, examples=[call(F.threshold, T(40, 5), 0.3, -1.0)])
def threshold(y, input, threshold, value, inplace=False):
    """x above the threshold, a number elsewhere"""
    return pointwise(lambda e: e * (input > threshold))


@rule(F.glu, examples=[call(F.glu, T(4, 6)), call(F.glu, T(4, 6, 3), 1)])
def glu(y, input, dim=-1):
    """a σ(b), the halves of x along dim; instructed, to both as it is"""

    def error(e):
        a, b = input.chunk(2, dim)
        gate = torch.sigmoid(b)
        return torch.cat([e * gate, e * a * gate * (1 - gate)], dim)

    return {"input": roles(instruct=lambda t: torch.cat([t, t], dim), error=error)}


@rule(
    F.softmax,
    torch.softmax,
    torch.ops.aten._safe_softmax.default,
    examples=[
        call(F.softmax, T(4, 5), 1),
        call(lambda x: x.softmax(-1), T(4, 5, 3)),
        call(lambda x: torch.ops.aten._safe_softmax.default(x.masked_fill(x > 0, -math.inf), 1), T(9, 2)),
    ],
)
def softmax(y, input, dim, dtype=None, **options):
    """exp x / Σ exp x over dim"""
    return pointwise(lambda e: y * (e - (e * y).sum(dim, keepdim=True)))


@rule(F.softmin, examples=[call(F.softmin, T(4, 5), 1)])
def softmin(y, input, dim, **options):
    """exp(-x) / Σ exp(-x) over dim"""
    return pointwise(lambda e: -y * (e - (e * y).sum(dim, keepdim=True)))


@rule(F.log_softmax, torch.log_softmax, examples=[call(F.log_softmax, T(4, 5, 3), dim=1)])
def log_softmax(y, input, dim, **options):
    """x - log Σ exp x over dim"""
    return pointwise(lambda e: e - torch.exp(y) * e.sum(dim, keepdim=True))
