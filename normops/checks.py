"""What arguments must fit together, said in one sentence where they do not; and the vectors of modulation.

``ValueError`` for shapes, ranks, devices and values, ``TypeError`` for dtypes; `op` names the function that was called.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from normops import cpu
from normops.maps import MAPS, PARAMETERS
from normops.reference import CODES, accumulator

FLOATS = tuple(cpu.DTYPES)  # what every backend takes


def check(
    op: str,
    x: Tensor,
    shape: tuple[int, ...] | torch.Size,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str,
    out_dtype: torch.dtype | None,
    per_sample: bool = False,
) -> None:
    """Raise ``ValueError`` or ``TypeError`` with one sentence unless these fit together; `shape` is that of weight and bias, or of one
    sample's where they may be `per_sample`."""
    if x.dtype not in FLOATS:
        raise TypeError(f"{op}: expected x of dtype float16, bfloat16, float32 or float64, got {x.dtype}")
    if weight is not None:
        check_vector(op, "weight", weight, x, shape, per_sample)
    if bias is not None:
        check_vector(op, "bias", bias, x, shape, per_sample)
    if residual is not None:
        check_like(op, "residual", residual, x)
    if not eps >= 0:
        raise ValueError(f"{op}: expected eps >= 0, got {eps}")
    if activation not in CODES:
        raise ValueError(f"{op}: expected activation out of {', '.join(CODES)}, got {activation!r}")
    if out_dtype is not None and out_dtype != x.dtype and (out_dtype != torch.float32 or x.dtype == torch.float64):
        raise TypeError(f"{op}: expected out_dtype of x's dtype {x.dtype} or float32 for 16-bit x, got {out_dtype}")


def check_vector(op: str, name: str, value: Tensor, x: Tensor, shape: tuple[int, ...] | torch.Size, per_sample: bool = False) -> None:
    """`value` has this shape, or may have one more dimension for samples."""
    rank = value.dim()
    if rank == len(shape) and value.shape == shape or per_sample and rank == 1 + len(shape) and value.shape == (x.shape[0], *shape):
        return _check_kind(op, name, value, x)
    also = f" or {(x.shape[0], *shape)}" if per_sample else ""
    raise ValueError(f"{op}: expected {name} of shape {tuple(shape)}{also}, got {tuple(value.shape)}")


def check_like(op: str, name: str, value: Tensor, x: Tensor) -> None:
    """`value` is a tensor of x's shape, dtype and device."""
    if value.shape != x.shape:
        raise ValueError(f"{op}: expected {name} of x's shape {tuple(x.shape)}, got {tuple(value.shape)}")
    if value.dtype != x.dtype:
        raise TypeError(f"{op}: expected {name} of x's dtype {x.dtype}, got {value.dtype}")
    _check_kind(op, name, value, x)


def _check_kind(op: str, name: str, value: Tensor, x: Tensor) -> None:
    if value.dtype not in FLOATS:
        raise TypeError(f"{op}: expected {name} of dtype float16, bfloat16, float32 or float64, got {value.dtype}")
    if value.device != x.device:
        raise ValueError(f"{op}: expected {name} on x's device {x.device}, got {value.device}")


def check_running(op: str, x: Tensor, training: bool, flag: str, **statistics: Tensor | None) -> None:
    """Running statistics are two vectors of channels or, where they are not what normalizes, none; what is updated has no gradient."""
    for name, value in statistics.items():
        if value is not None:
            check_vector(op, name, value, x, x.shape[1:2])
            if training and value.requires_grad:
                raise ValueError(f"{op}: expected {name} without gradient, since it is updated in place, got one that requires grad")
        elif not training:
            raise ValueError(f"{op}: expected {name} when {flag} is False, got None")
    given = [name for name, value in statistics.items() if value is not None]
    if len(given) == 1:
        raise ValueError(f"{op}: expected {' and '.join(statistics)} or neither, got {given[0]} alone")


def check_group(
    op: str,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str,
    out_dtype: torch.dtype | None,
) -> None:
    """`check` for ``(N, C, *spatial)`` with vectors ``(C,)`` or ``(N, C)``."""
    check_channels(op, x)
    channels = x.shape[1]
    if num_groups <= 0 or channels % num_groups or not channels:
        raise ValueError(f"{op}: expected num_groups to divide the number of channels {channels}, got {num_groups}")
    check(op, x, (channels,), weight, bias, residual, eps, activation, out_dtype, per_sample=True)


def check_channels(op: str, x: Tensor) -> None:
    """x has a dimension of channels."""
    if x.dim() < 2:
        raise ValueError(f"{op}: expected x of shape (N, C, *spatial), got {tuple(x.shape)}")


def modulate(
    op: str,
    x: Tensor,
    shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight_offset: float = 0.0,
) -> tuple[Tensor | None, Tensor | None]:
    """weight and bias of ``(x_hat*(weight + weight_offset) + bias) * (1+scale) + shift``, another one for each sample; differentiable."""
    for name, value in (("scale", scale), ("shift", shift)):
        if value is None:
            continue
        if value.dim() != 1 + len(shape) or value.shape != (x.shape[0], *shape):
            raise ValueError(f"{op}: expected {name} of shape {(x.shape[0], *shape)}, got {tuple(value.shape)}")
        _check_kind(op, name, value, x)
    dtype = accumulator(x.dtype)
    if weight is not None and weight_offset:
        weight = weight.to(dtype) + weight_offset
    if scale is not None:
        scale = scale.to(dtype)
        weight = 1 + scale if weight is None else torch.addcmul(weight.to(dtype), weight.to(dtype), scale)
        bias = None if bias is None else torch.addcmul(bias.to(dtype), bias.to(dtype), scale)
    if shift is not None:
        bias = shift if bias is None else shift + bias
    return weight, bias


# ---- moments ----


def broadcast(op: str, what: str, *shapes: torch.Size) -> torch.Size:
    """The shape of what broadcasts."""
    try:
        return torch.broadcast_shapes(*shapes)
    except RuntimeError:
        raise ValueError(f"{op}: expected {what} to broadcast, got shapes {' and '.join(str(tuple(shape)) for shape in shapes)}") from None


def check_map(activation: str, parameters: Sequence[float]) -> tuple[float, ...]:
    """The parameters of an activation whose moments are wanted, with their defaults."""
    op = "activation_moments"
    if activation not in MAPS:
        raise ValueError(f"{op}: expected activation out of {', '.join(MAPS)}, got {activation!r}")
    defaults = PARAMETERS.get(activation, ())
    if len(parameters) > len(defaults):
        raise ValueError(f"{op}: expected at most {len(defaults)} parameters of {activation}, got {len(parameters)}")
    values = (*(float(value) for value in parameters), *defaults[len(parameters) :])
    if activation == "hardtanh" and not values[0] <= values[1]:
        raise ValueError(f"{op}: expected low <= high, got {values[0]} and {values[1]}")
    return values


def check_norm_weight(weight, mean, var, scale, bias, groups, eps, stride, dilation) -> None:
    """Arguments of `normops.analytic_norm_weight`."""
    op = "analytic_norm_weight"
    kind, split = ("(I, O/groups, *kernel)", "I") if stride else ("(O, I/groups, *kernel)", "O")
    if weight.dtype not in FLOATS:
        raise TypeError(f"{op}: expected weight of dtype float16, bfloat16, float32 or float64, got {weight.dtype}")
    if weight.dim() < 2 or groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"{op}: expected weight {kind} with groups that divide {split}, got shape {tuple(weight.shape)}, {groups} groups")
    if not weight.numel():
        raise ValueError(f"{op}: expected a weight with elements, got shape {tuple(weight.shape)}")
    for name, numbers in (("stride", stride), ("dilation", dilation)):
        if numbers and (len(numbers) != weight.dim() - 2 or min(numbers) < 1 or not stride):
            raise ValueError(f"{op}: expected {name} of a transposed convolution, a number >= 1 for each dimension of a kernel, got {numbers}")
    first, second = weight.shape[:2]
    outputs, inputs = (second * groups, first) if stride else (first, second * groups)
    for name, value, size in (("mean", mean, inputs), ("var", var, inputs), ("scale", scale, outputs), ("bias", bias, outputs)):
        if value is not None:
            check_vector(op, name, value, weight, (size,))
    if not eps >= 0:
        raise ValueError(f"{op}: expected eps >= 0, got {eps}")
