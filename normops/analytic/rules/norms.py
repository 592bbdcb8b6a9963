"""Norms, torch's and ours: by statistics that are not random."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from normops.analytic.moments import RULES, Moments
from normops.analytic.rules import functions
from normops.analytic.rules.shapes import along, expect_channels, rule


def _normalized(x: Moments, mean: Tensor, var: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None = None) -> Moments:
    """(x - mean)/sqrt(var + eps)*weight + bias by statistics that are not random."""
    return _affine(x, (var + eps).rsqrt(), -mean * (var + eps).rsqrt(), weight, bias)


def _affine(x: Moments, scale: Tensor, shift: Tensor, weight: Tensor | None, bias: Tensor | None) -> Moments:
    """(x*scale + shift)*weight + bias."""
    if weight is not None:
        scale, shift = scale * weight.double(), shift * weight.double()
    return Moments(x.mu * scale + (shift if bias is None else shift + bias.double()), x.var * scale.square(), x.sample)


def _of_channels(name: str, x: Moments, *vectors: Tensor | None) -> list[Any]:
    """Vectors (C,) as they meet a sample."""
    for value in vectors:
        if value is not None:
            expect_channels(name, x, value.numel())
    return [value if value is None else along(value.double(), len(x.sample)) for value in vectors]


@rule("batch_norm")
def batch_norm(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    """In training by the moments themselves, which the batch's are drawn from; running statistics stay what they are."""
    mean, var, weight, bias = _of_channels("batch_norm", input, running_mean, running_var, weight, bias)
    if training or running_mean is None:
        own = input.channels()
        mean, var = own.mu, own.var
    return _normalized(input, mean, var, eps, weight, bias)


@rule("instance_norm")
def instance_norm(input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5):
    """As batch norm: a sample's mean and variance are taken as their expectations over positions."""
    return batch_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


@rule("group_norm")
def group_norm(input, num_groups, weight=None, bias=None, eps=1e-5):
    """A sample's mean and variance are taken as their expectations over the units of a group."""
    channels = input.sample[0]
    if channels % num_groups:
        raise ValueError(f"propagate: expected channels that {num_groups} groups divide in group_norm, got a sample of shape {tuple(input.sample)}")
    own = input.channels()
    groups = Moments(own.mu.view(num_groups, -1), own.var.view(num_groups, -1)).channels()
    mean, var = (value.repeat_interleave(channels // num_groups) for value in (groups.mu.flatten(), groups.var.flatten()))
    mean, var, weight, bias = _of_channels("group_norm", input, mean, var, weight, bias)
    return _normalized(input, mean, var, eps, weight, bias)


@rule("layer_norm")
def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    """As group norm, over the last dimensions."""
    dims = _last(input, normalized_shape)
    whole = input.dense()
    mean = whole.mu.mean(dims, keepdim=True)
    var = whole.var.mean(dims, keepdim=True) + (whole.mu - mean).square().mean(dims, keepdim=True)
    return _normalized(input, mean, var, eps, weight, bias)


@rule("rms_norm")
def rms_norm(input, normalized_shape, weight=None, eps=None):
    """As layer norm, by the expected square."""
    dims = _last(input, normalized_shape)
    whole = input.dense()
    square = (whole.var + whole.mu.square()).mean(dims, keepdim=True)
    return _normalized(input, torch.zeros_like(square), square, torch.finfo(torch.float32).eps if eps is None else eps, weight)


def _last(x: Moments, normalized_shape: Any) -> tuple[int, ...]:
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if tuple(x.sample[-len(shape) :]) != shape:
        raise ValueError(f"propagate: expected a sample that ends in {shape}, got one of shape {tuple(x.sample)}")
    return tuple(range(-len(shape), 0))


# ---- ours: torch's, then residual and activation ----


def _batch_renorm(input, running_mean, running_std, weight=None, bias=None, training=False, momentum=0.01, eps=1e-3, *, r_max=1.0, d_max=0.0):
    """In training as batch norm."""
    return batch_norm(input, running_mean, running_std.square(), weight, bias, training, momentum, eps if training else 0.0)


def _batch_instance_norm(input, running_mean, running_var, rho, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    mean, var, rho, weight, bias = _of_channels("batch_instance_norm", input, running_mean, running_var, rho, weight, bias)
    own = input.channels()
    scale = (own.var + eps).rsqrt() * (1 - rho)
    shift = -own.mu * scale
    mean, scale_of_batch = (own.mu, (own.var + eps).rsqrt()) if training or mean is None else (mean, (var + eps).rsqrt())
    return _affine(input, scale + rho * scale_of_batch, shift - rho * mean * scale_of_batch, weight, bias)


def _analytic_norm(input, mean, var, weight=None, bias=None, eps=1e-5):
    return batch_norm(input, mean, var, weight, bias, False, 0.0, eps)


def _fused(norm: Callable) -> Callable:
    def apply(
        input, *args, activation="none", negative_slope=0.01, residual=None, scale=None, shift=None, out_dtype=None, on_single_value="raise",
        process_group="", **kwargs,
    ):  # fmt: skip
        if scale is not None or shift is not None:
            raise NotImplementedError("propagate: expected neither scale nor shift, which differ by sample")
        y = norm(input, *args, **kwargs)
        y = y if residual is None else functions.add(y, residual)
        return y if activation == "none" else functions.activation(y, activation, *((negative_slope,) if activation == "leaky_relu" else ()))

    return apply


def _rows(norm: Callable) -> Callable:
    """Over the last dimensions or, of channels, the first: then channels come last for a while."""

    def apply(input, normalized_shape, weight=None, *args, dim=None, weight_offset=0.0, **kwargs):
        if weight is not None:
            weight = weight + weight_offset
        if dim in (None, -1):
            return norm(input, normalized_shape, weight, *args, **kwargs)
        return norm(input.movedim(1, -1), normalized_shape, weight, *args, **kwargs).movedim(-1, 1)

    return apply


_OURS: dict[str, Callable] = {
    "group_norm": group_norm, "instance_norm": instance_norm, "batch_norm": batch_norm, "sync_batch_norm": batch_norm, "batch_renorm": _batch_renorm,
    "batch_instance_norm": _batch_instance_norm, "analytic_norm": _analytic_norm, "layer_norm": _rows(layer_norm), "rms_norm": _rows(rms_norm),
}  # fmt: skip
RULES |= {getattr(torch.ops.normops, name).default: _fused(norm) for name, norm in _OURS.items()}


def _sync_batch_norm_module(module, input):
    """torch's asks where its input lies."""
    training = module.training or module.running_mean is None
    return batch_norm(input, module.running_mean, module.running_var, module.weight, module.bias, training, 0.0, module.eps)


RULES[torch.nn.SyncBatchNorm] = _sync_batch_norm_module
