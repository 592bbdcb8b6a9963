"""Layers over units and positions: linear, convolution, transposed convolution, pooling."""

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normops import weights
from normops.analytic.moments import Moments, closure, meets_nonlinearity
from normops.analytic.rules.shapes import along, expect_channels, rule, shape_after
from normops.functional.analytic import max_pool_moments

# ---- linear maps of independent inputs: variances add ----


def _plus(mean: Tensor, bias: Tensor | None, dim: int) -> Tensor:
    return mean if bias is None else mean + along(bias.double(), mean.dim(), dim)


def mapped(x: Moments, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of a linear layer, at every position."""
    mean, var = (value.expand(*value.shape[:-1], weight.shape[1]) for value in (x.mu, x.var))
    return F.linear(mean, weight), F.linear(var, weight.square())


@rule("matmul", "__matmul__")
def _(input, other):
    if not isinstance(input, Moments) or not isinstance(other, Tensor) or other.dim() != 2:
        raise NotImplementedError("propagate: expected a product with a matrix on the right, that is not random")
    return _linear(input, other.T)


@rule("linear")
def _linear(input, weight, bias=None):
    expect_channels("linear", input, weight.shape[1], -1)
    mean, var = mapped(input, weight.double())
    return Moments(_plus(mean, bias, -1), var, torch.Size((*input.sample[:-1], len(weight))))


def convolved(function: Callable, x: Moments, weight: Tensor, stride, padding, dilation, groups) -> tuple[Tensor, Tensor]:
    """Mean and variance of a convolution: (O, 1, ...) where positions are alike and no border counts, else a map."""
    if x.patch is not None and groups == 1:
        return _of_patches(x.patch, weight)
    if x.uniform and closure().padding == "ignore":
        own = x.channels()
        return _alike(weights.moments(weight, own.mu.flatten(), own.var.flatten(), groups), weight)
    return _everywhere(function, x, weight, stride, padding, dilation, groups)


def transposed(function: Callable, x: Moments, weight: Tensor, stride, padding, output_padding, groups, dilation) -> tuple[Tensor, Tensor]:
    """As `convolved`, of a transposed convolution: over the phases of a stride."""
    if x.uniform and closure().padding == "ignore":
        own = x.channels()
        steps, gaps = ((value,) * (weight.dim() - 2) if isinstance(value, int) else value for value in (stride, dilation))
        return _alike(weights.transposed_moments(weight, own.mu.flatten(), own.var.flatten(), groups, steps, gaps), weight)
    return _everywhere(function, x, weight, stride, padding, output_padding, groups, dilation)


def _everywhere(function: Callable, x: Moments, weight: Tensor, *options) -> tuple[Tensor, Tensor]:
    """Position by position, zeros beyond the border."""
    whole = x.dense()
    mean, var = (function(value.unsqueeze(0), k, None, *options)[0] for value, k in ((whole.mu, weight), (whole.var, weight.square())))
    return mean, var


def _alike(values: tuple[Tensor, Tensor], weight: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors of channels whose positions are alike."""
    mean, var = (along(value, weight.dim() - 1) for value in values)
    return mean, var


def _of_patches(patch: tuple[Tensor, Tensor], weight: Tensor) -> tuple[Tensor, Tensor]:
    mean, covariance = patch
    rows = weight.flatten(1)
    if rows.shape[1] != len(mean):
        raise ValueError(f"propagate: expected a first convolution of {len(mean)} weights a unit, as the patches, got {rows.shape[1]}")
    return _alike((rows @ mean, torch.einsum("oi,ij,oj->o", rows, covariance, rows)), weight)


def _convolution(function: Callable) -> Callable:
    def apply(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        expect_channels(function.__name__, input, weight.shape[1] * groups)
        shape = shape_after(function, input, weight, None, stride, padding, dilation, groups)
        mean, var = convolved(function, input, weight.double(), stride, padding, dilation, groups)
        return Moments(_plus(mean, bias, 0), var, shape)

    return apply


def _transposed_convolution(function: Callable) -> Callable:
    def apply(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
        expect_channels(function.__name__, input, weight.shape[0])
        shape = shape_after(function, input, weight, None, stride, padding, output_padding, groups, dilation)
        mean, var = transposed(function, input, weight.double(), stride, padding, output_padding, groups, dilation)
        return Moments(_plus(mean, bias, 0), var, shape)

    return apply


for _dims in (1, 2, 3):
    rule(f"conv{_dims}d")(_convolution(getattr(F, f"conv{_dims}d")))
    rule(f"conv_transpose{_dims}d")(_transposed_convolution(getattr(F, f"conv_transpose{_dims}d")))


# ---- pooling ----


def _windows(x: Moments, shape: torch.Size, kernel_size: Any) -> list[list[float]]:
    """For each dimension of positions 1/length of its windows; those of adaptive pooling (None) differ."""
    if kernel_size is None:
        pairs = zip(x.sample[1:], shape[1:], strict=True)
        return [[1 / (-(-(i + 1) * size // count) - i * size // count) for i in range(count)] for size, count in pairs]
    return [[1 / length] for length in ((kernel_size,) * len(shape[1:]) if isinstance(kernel_size, int) else kernel_size)]


def _product(windows: list[list[float]]) -> float:
    """1/size of a window, on average."""
    return math.prod(sum(along) / len(along) for along in windows)


def _averaged(x: Moments, mean: Tensor, var: Tensor, shape: torch.Size, share: Any) -> Moments:
    """From averages over windows, whose positions have the correlation `pooling`. share: 1/size of a window."""
    correlation = closure().pooling
    return Moments(mean, var * (correlation + (1 - correlation) * share), shape, x.layers)


def _pool(function: Callable) -> Callable:
    name = function.__name__

    def apply(input, *args, return_indices=False, **kwargs):
        if return_indices:
            raise NotImplementedError(f"propagate: expected no indices of {name}")
        if kwargs.get("divisor_override") or args[5:6] not in ((), (None,)):
            raise NotImplementedError(f"propagate: expected no divisor_override in {name}")
        shape = shape_after(function, input, *args, **kwargs)
        windows = _windows(input, shape, None if "adaptive" in name else args[0] if args else kwargs["kernel_size"])
        if "max" in name:
            return _largest(input, shape, round(1 / _product(windows)))
        if input.uniform:
            return _averaged(input, input.mu, input.var, shape, _product(windows))
        whole = input.dense()
        mean, var = (function(value.unsqueeze(0), *args, **kwargs)[0] for value in (whole.mu, whole.var))
        share = reduce(lambda left, right: left.unsqueeze(-1) * right, [var.new_tensor(along) for along in windows])
        return _averaged(input, mean, var, shape, share)

    return apply


def _largest(x: Moments, shape: torch.Size, count: int) -> Moments:
    """The maximum of `count` alike and equally correlated positions; behind a monotone function, of its argument: nearer to normal."""
    if x.before is not None:
        function, inner = x.before
        return function(_largest(inner, shape, count))
    meets_nonlinearity(x)
    own = x if x.uniform else x.channels()
    return Moments(*max_pool_moments(own.mu, own.var, count, closure().pooling), shape)


for _dims in (1, 2, 3):
    for _kind in ("avg_pool", "max_pool", "adaptive_avg_pool", "adaptive_max_pool"):
        rule(f"{_kind}{_dims}d", f"{_kind}{_dims}d_with_indices")(_pool(getattr(F, f"{_kind}{_dims}d")))


@rule("sum")
def _(input, dim=None, keepdim=False):
    """Of units, with the correlation of pooling."""
    mean = _mean(input, dim, keepdim)
    return mean * (input.numel() / mean.numel())


@rule("mean")
def _mean(input, dim=None, keepdim=False):
    """Of positions: an average pooling."""
    dims = tuple(range(1, input.dim())) if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)
    dims = tuple(d % input.dim() for d in dims)
    if 0 in dims:
        raise ValueError("propagate: expected a mean over units of a sample, got one over the batch")
    shape = shape_after(torch.mean, input, dims, keepdim)
    whole = input.dense()
    mean, var = (value.unsqueeze(0).mean(dims, keepdim)[0] for value in (whole.mu, whole.var))
    return _averaged(input, mean, var, shape, 1 / math.prod(input.size(d) for d in dims))
