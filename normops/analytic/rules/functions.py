"""Functions of units: activations, sums and products, maxima, noise, and those that only move units."""

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normops import checks, maps, statistics
from normops.analytic.moments import RULES, Moments, closure, meets_nonlinearity
from normops.analytic.rules.shapes import along, expect_channels, rule, shape_after
from normops.autograd import plain
from normops.functional.analytic import max_moments

# ---- non-linear functions, unit by unit ----

MONOTONE = {
    "relu", "relu6", "leaky_relu", "hardtanh", "sigmoid", "tanh", "softplus", "elu", "selu", "hardsigmoid", "erf", "exp", "sign", "step",
}  # fmt: skip


def activation_moments(x: Moments, name: str, *parameters: float) -> tuple[Tensor, Tensor]:
    """Mean and variance of an activation, with the defaults of its parameters."""
    parameters = (*parameters, *maps.PARAMETERS.get(name, ())[len(parameters) :])
    return statistics.activation_moments(plain(x.mu, x.var), x.mu, x.var, name, parameters)


def activation(x: Moments, name: str, *parameters: float) -> Moments:
    """One of `normops.activation_moments`."""
    meets_nonlinearity(x)
    mean, var = activation_moments(x, name, *parameters)
    rises = name in MONOTONE and (name == "hardtanh" or min(parameters, default=0.0) >= 0)
    return Moments(mean, var, x.sample, before=(lambda inner: activation(inner, name, *parameters), copy(x)) if rises else None)


def _without_parameters(name: str) -> Callable:
    return lambda input, *args, **kwargs: activation(input, name)


for _name in ("relu", "sigmoid", "tanh", "silu", "mish", "hardswish", "hardsigmoid", "sin", "exp", "sign", "erf", "square", "selu", "relu6", "abs"):
    RULES[_name] = RULES[_name + "_"] = _without_parameters(_name)


@rule("leaky_relu", "leaky_relu_")
def _(input, negative_slope=0.01, inplace=False):
    return activation(input, "leaky_relu", negative_slope)


@rule("hardtanh", "hardtanh_")
def _(input, min_val=-1.0, max_val=1.0, inplace=False):
    return activation(input, "hardtanh", min_val, max_val)


@rule("clamp", "clamp_", "clip")
def _(input, min=None, max=None):
    if min is not None and max is not None:
        return activation(input, "hardtanh", min, max)
    return _at_most(input, max) if min is None else _at_least(input, min)


@rule("clamp_min", "clamp_min_")
def _at_least(input, min):
    return activation(input - min, "relu") + min


@rule("clamp_max", "clamp_max_")
def _at_most(input, max):
    return max - activation(max - input, "relu")


@rule("elu", "elu_")
def _(input, alpha=1.0, inplace=False):
    return activation(input, "elu", alpha)


@rule("gelu")
def _(input, approximate="none"):
    return activation(input, "gelu" if approximate == "none" else "gelu_tanh")


@rule("softplus")
def _softplus(input, beta=1.0, threshold=20.0):
    y = activation(input * beta, "softplus") * (1 / beta)
    return Moments(y.mu, y.var, y.sample, before=(partial(_softplus, beta=beta), copy(input)))


@rule("prelu")
def _(input, weight):
    """slope*X + (1 - slope)*max(0, X), one slope or one for each channel: Cov(X, max(0, X)) = var*Phi(mean/std)."""
    meets_nonlinearity(input)
    if weight.numel() > 1:
        expect_channels("prelu", input, weight.numel())
    slope = weight.double()
    slope = along(slope, len(input.sample)) if slope.numel() > 1 else slope.view(())
    mean, var = activation_moments(input, "relu")
    share, _ = activation_moments(input, "step")
    rest = 1 - slope
    var = slope**2 * input.var + 2 * slope * rest * input.var * share + rest**2 * var
    return Moments(slope * input.mu + rest * mean, var, input.sample)


@rule("pow", "__pow__")
def _(input, exponent):
    if exponent != 2:
        raise NotImplementedError(f"propagate: expected the exponent 2, got {exponent}")
    return activation(input, "square")


# ---- sums and products ----


def _constant(value: Any, x: Moments) -> Tensor:
    """A number or tensor as it meets a sample of x."""
    if not isinstance(value, Tensor):
        return torch.tensor(value, dtype=torch.float64, device=x.mu.device)
    if value.dim() > len(x.sample):
        if value.shape[0] != 1:
            raise ValueError(f"propagate: expected a tensor that is the same for every sample, got one of shape {tuple(value.shape)}")
        value = value[0]
    return value.double()


def _meeting(x: Moments, *others: Any) -> torch.Size:
    """The shape of a sample where they meet."""
    shapes = [value.sample if isinstance(value, Moments) else value.shape for value in (x, *others)]
    if all(shape == x.sample for shape in shapes):
        return x.sample
    return checks.broadcast("propagate", "samples", *shapes)


@rule("add", "add_", "__add__", "__radd__", "__iadd__")
def add(input, other, *, alpha=1):
    """Two random terms have the correlation `residual` of the propagation."""
    if not isinstance(input, Moments):
        return add(other * alpha, input)
    if not isinstance(other, Moments):
        constant = _constant(other, input)
        shape = _meeting(input, constant)
        return Moments(input.mu + alpha * constant, input.var, shape, input.layers)
    shape = _meeting(input, other)
    var = input.var + alpha**2 * other.var
    if closure().residual:
        var = var + 2 * alpha * closure().residual * (input.var * other.var).sqrt()
    return Moments(input.mu + alpha * other.mu, var, shape, input.layers | other.layers)


@rule("sub", "sub_", "__sub__", "__isub__")
def _(input, other, *, alpha=1):
    return add(input, other, alpha=-alpha)


@rule("rsub", "__rsub__")
def _(input, other):
    return add(-input, other)


@rule("neg", "__neg__")
def _(input):
    return Moments(-input.mu, input.var, input.sample, input.layers)


@rule("mul", "mul_", "__mul__", "__rmul__", "__imul__")
def multiply(input, other):
    """Two random factors are taken as independent."""
    if not isinstance(input, Moments):
        input, other = other, input
    if not isinstance(other, Moments):
        factor = _constant(other, input)
        shape = _meeting(input, factor)
        return Moments(input.mu * factor, input.var * factor.square(), shape, input.layers)
    shape = _meeting(input, other)
    meets_nonlinearity(input)
    meets_nonlinearity(other)
    var = input.var * other.var + input.var * other.mu.square() + other.var * input.mu.square()
    return Moments(input.mu * other.mu, var, shape)


@rule("div", "div_", "__truediv__", "__itruediv__", "true_divide")
def _(input, other):
    if isinstance(other, Moments):
        raise NotImplementedError("propagate: expected a divisor that is not random, got Moments")
    return multiply(input, 1 / _constant(other, input))


@rule("maximum", "max")
def _(input, other=None, *args, **kwargs):
    """Clark's maximum of two, independent."""
    if not isinstance(input, Moments):
        input, other = other, input
    if not isinstance(other, Moments | Tensor):
        raise NotImplementedError("propagate: expected the maximum of two, got max over a dimension")
    if isinstance(other, Tensor):
        constant = _constant(other, input)
        other = Moments(constant, torch.zeros_like(constant))
    shape = _meeting(input, other)
    meets_nonlinearity(input)
    meets_nonlinearity(other)
    return Moments(*max_moments(input.mu, input.var, other.mu, other.var), shape)


# ---- noise ----


@rule("dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "feature_dropout")
def _(input, p=0.5, training=True, inplace=False):
    """Kept with probability 1 - p and scaled by 1/(1 - p)."""
    if not p or (not training and closure().dropout != "always"):
        return input
    if p == 1:
        return input * 0.0
    return Moments(input.mu, (input.var + p * input.mu.square()) / (1 - p), input.sample, input.layers)


# ---- where units lie ----


def _moved(function: Callable) -> Callable:
    def apply(input, *args, **kwargs):
        whole = input.dense()
        mean, var = (function(value.unsqueeze(0), *args, **kwargs) for value in (whole.mu, whole.var))
        if isinstance(mean, tuple | list):
            return tuple(part(input, *values) for values in zip(mean, var, strict=True))
        return part(input, mean, var)

    def part(input, mean, var):
        if not mean.dim() or mean.shape[0] != 1:
            raise ValueError(f"propagate: expected {function.__name__} to leave the batch alone, got {tuple(input.shape)} to {tuple(mean.shape)}")
        return Moments(mean[0], var[0], mean.shape[1:], input.layers)

    return apply


for _name in ("flatten", "reshape", "permute", "transpose", "unflatten", "unsqueeze", "movedim", "expand", "__getitem__",
              "pixel_shuffle", "pixel_unshuffle", "chunk", "split", "unbind", "flip", "roll"):  # fmt: skip
    RULES[_name] = _moved(getattr(F, _name, None) or getattr(Tensor, _name))
RULES["view"] = RULES["reshape"]  # where positions are alike, they share memory


@rule("squeeze")
def _(input, *dims):
    units = [dim for dim, size in enumerate(input.sample, 1) if size == 1]  # the batch is one sample here only
    return _moved(Tensor.squeeze)(input, *(dims or (units,)))


@rule("clone")
def _(input, *args, **kwargs):
    return copy(input)


def _elsewhere(name: str) -> Callable:
    return lambda input, *args, **kwargs: input.to(getattr(torch.empty(0, device=input.device), name)(*args, **kwargs).device)


for _name in ("cpu", "cuda"):
    RULES[_name] = _elsewhere(_name)


@rule("contiguous", "float", "double", "half", "bfloat16", "identity", "type")
def _(input, *args, **kwargs):
    return input


@rule("detach")
def _(input):
    return Moments(input.mu.detach(), input.var.detach(), input.sample, input.layers)


@rule("cat", "concat", "concatenate")
def _(tensors, dim=0):
    dim = dim % tensors[0].dim() - 1
    if dim < 0:
        raise ValueError("propagate: expected a concatenation of units, got one of the batch")
    parts = [(part.mu, part.var) for part in tensors]
    differs = [d == dim or any(value.shape[d] > 1 for pair in parts for value in pair) for d in range(len(tensors[0].sample))]

    def joined(values: tuple[Tensor, ...]) -> Tensor:
        shapes = [[size if differ else 1 for size, differ in zip(part.sample, differs, strict=True)] for part in tensors]
        return torch.cat([value.expand(shape) for value, shape in zip(values, shapes, strict=True)], dim)

    mean, var = map(joined, zip(*parts, strict=True))
    shape = list(tensors[0].sample)
    shape[dim] = sum(part.sample[dim] for part in tensors)
    return Moments(mean, var, torch.Size(shape), frozenset().union(*(part.layers for part in tensors)))


@rule("stack")
def _(tensors, dim=0):
    dim = dim % (tensors[0].dim() + 1)
    return torch.cat([x.unsqueeze(dim) for x in tensors], dim)


@rule("pad")
def _(input, pad, mode="constant", value=None):
    shape = shape_after(F.pad, input, pad, mode, value)
    if input.uniform and shape[0] == input.sample[0] and (mode != "constant" or closure().padding == "ignore"):
        return Moments(input.mu, input.var, shape, input.layers)
    whole = input.dense()
    mean = F.pad(whole.mu.unsqueeze(0), pad, mode, value)[0]
    var = F.pad(whole.var.unsqueeze(0), pad, mode, 0.0 if mode == "constant" else None)[0]
    return Moments(mean, var, shape, input.layers)


@rule("interpolate", "upsample")
def _(input, size=None, scale_factor=None, mode="nearest", align_corners=None, **kwargs):
    """Positions are repeated, or averaged with the weights of linear interpolation and the correlation `pooling` of the propagation."""
    options = {"size": size, "scale_factor": scale_factor, "align_corners": align_corners, **kwargs}
    shape = shape_after(partial(F.interpolate, mode=mode), input, **options)
    if input.uniform and "nearest" in mode:
        return Moments(input.mu, input.var, shape, input.layers)
    if mode not in ("nearest", "nearest-exact", "linear", "bilinear", "trilinear"):
        raise NotImplementedError(f"propagate: expected interpolation by the nearest or linear, got {mode}")
    whole = input.dense()
    mean, deviation = (F.interpolate(value.unsqueeze(0), mode=mode, **options)[0] for value in (whole.mu, whole.std))
    var = whole.var
    if "linear" in mode:
        for dim, (before, after) in enumerate(zip(input.sample[1:], shape[1:], strict=True), 1):
            unit = torch.eye(before, dtype=torch.float64, device=var.device)
            factor = scale_factor[dim - 1] if isinstance(scale_factor, tuple | list) else scale_factor
            given = {"size": after} if factor is None else {"scale_factor": factor}
            weight = F.interpolate(unit.unsqueeze(0), mode="linear", align_corners=align_corners, **given, **kwargs)[0]
            var = torch.tensordot(var, weight.square(), ([dim], [0])).movedim(-1, dim)
        var = closure().pooling * deviation.square() + (1 - closure().pooling) * var
    else:
        var = F.interpolate(var.unsqueeze(0), mode=mode, **options)[0]
    y = Moments(mean, var, shape, input.layers)
    return y.channels() if input.uniform else y
