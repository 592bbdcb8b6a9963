"""The C++ CPU kernels ``normops._C`` as a backend: addresses and dtype codes for a plain C call.

The kernels have one dtype for x, y, dy and dx; another dtype of y or dy is met by a cast, as torch does.
"""

import importlib
from functools import cache

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}


def group_norm_fwd(y, stats, x, weight, bias, residual, N, C, num_groups, channels_last, frozen, eps, activation, negative_slope) -> None:
    if y is not None and y.dtype != x.dtype:
        x, residual = _to(y.dtype, x, residual)
    _cpu_kernels().group_norm_fwd(
        _address(y), eps, x.data_ptr(), _address(residual), _address(stats), DTYPES[x.dtype], *_parameters(weight, bias, C),
        N, C, x.numel(), num_groups, activation, negative_slope, channels_last, stats.shape[1] if frozen else 0,
    )  # fmt: skip


def group_norm_bwd(
    dx, dweight, dbias, dresidual, dy, x, stats, weight, bias, residual, means, N, C, num_groups, channels_last, frozen, activation, negative_slope
) -> None:
    if dy.dtype != x.dtype:
        wide = _empty(dy.dtype, dx, dresidual)
        x, residual = _to(dy.dtype, x, residual)
        group_norm_bwd(
            wide[0], dweight, dbias, wide[1], dy, x, stats, weight, bias, residual, means,
            N, C, num_groups, channels_last, frozen, activation, negative_slope,
        )  # fmt: skip
        return _copy((dx, dresidual), wide)
    _cpu_kernels().group_norm_bwd(
        _address(dx), _address(dresidual), dy.data_ptr(), *_parameters(dweight, dbias, C), _address(means),
        x.data_ptr(), _address(residual), stats.data_ptr(), DTYPES[x.dtype], *_parameters(weight, bias, C),
        N, C, x.numel(), num_groups, activation, negative_slope, channels_last, stats.shape[1] if frozen else 0,
    )  # fmt: skip


def batch_norm_fwd(
    y, stats, running_mean, running_var, x, weight, bias, residual, N, C, channels_last, momentum, eps, activation, negative_slope
) -> None:
    if y is not None and y.dtype != x.dtype:
        x, residual = _to(y.dtype, x, residual)
    _cpu_kernels().batch_norm_fwd(
        _address(y), eps, momentum, *_parameter(running_mean, C)[:2], _address(running_var), False,
        x.data_ptr(), _address(residual), stats.data_ptr(), DTYPES[x.dtype], *_parameters(weight, bias, C),
        N, C, x.numel(), C, activation, negative_slope, channels_last,
    )  # fmt: skip


def batch_norm_bwd(dx, dweight, dbias, dresidual, dy, x, stats, weight, bias, residual, N, C, channels_last, activation, negative_slope) -> None:
    if dy.dtype != x.dtype:
        wide = _empty(dy.dtype, dx, dresidual)
        x, residual = _to(dy.dtype, x, residual)
        batch_norm_bwd(wide[0], dweight, dbias, wide[1], dy, x, stats, weight, bias, residual, N, C, channels_last, activation, negative_slope)
        return _copy((dx, dresidual), wide)
    _cpu_kernels().batch_norm_bwd(
        _address(dx), _address(dresidual), dy.data_ptr(), *_parameters(dweight, dbias, C),
        x.data_ptr(), _address(residual), stats.data_ptr(), DTYPES[x.dtype], *_parameters(weight, bias, C),
        N, C, x.numel(), C, activation, negative_slope, channels_last, False,
    )  # fmt: skip


def row_norm_fwd(
    y, total, stats, x, addend, weight, bias, residual, N, C, num_groups, centered, weight_offset, eps, activation, negative_slope
) -> None:
    if y.dtype != x.dtype:
        if addend is not None:
            x, addend = torch.add(x, addend, out=total), None
        x, residual = _to(y.dtype, x, residual)
    _cpu_kernels().row_norm_fwd(
        y.data_ptr(), _address(total), _address(addend), eps,
        x.data_ptr(), _address(residual), _address(stats), DTYPES[x.dtype], *_parameters(weight, bias, C),
        N, C, x.numel(), num_groups, activation, negative_slope, centered, weight_offset,
    )  # fmt: skip


def row_norm_bwd(
    dx, dweight, dbias, dresidual, dy, dtotal, x, stats, weight, bias, residual, N, C, num_groups, centered, weight_offset, activation, negative_slope
) -> None:
    if dy.dtype != x.dtype:
        wide = _empty(dy.dtype, dx, dresidual)
        x, residual, dtotal = _to(dy.dtype, x, residual, dtotal)
        row_norm_bwd(
            wide[0], dweight, dbias, wide[1], dy, dtotal, x, stats, weight, bias, residual,
            N, C, num_groups, centered, weight_offset, activation, negative_slope,
        )  # fmt: skip
        return _copy((dx, dresidual), wide)
    _cpu_kernels().row_norm_bwd(
        _address(dx), _address(dresidual), dy.data_ptr(), _address(dtotal), *_parameters(dweight, dbias, C),
        x.data_ptr(), _address(residual), stats.data_ptr(), DTYPES[x.dtype], *_parameters(weight, bias, C),
        N, C, x.numel(), num_groups, activation, negative_slope, centered, weight_offset,
    )  # fmt: skip


def activation_moments_fwd(out, mean, var, function, first, second) -> None:
    _cpu_kernels().activation_moments_fwd(out.data_ptr(), mean.data_ptr(), var.data_ptr(), mean.numel(), function, first, second)


def analytic_norm_weight_fwd(new, new_bias, stats, weight, mean, var, scale, bias, outputs, taps, groups, channels_last, eps) -> None:
    _cpu_kernels().analytic_norm_weight_fwd(
        new.data_ptr(), new_bias.data_ptr(), weight.data_ptr(), DTYPES[weight.dtype], mean.data_ptr(), var.data_ptr(), stats.data_ptr(),
        *_parameters(scale, bias, outputs), weight.numel(), outputs, taps, groups, channels_last, eps,
    )  # fmt: skip


def analytic_norm_weight_bwd(
    of_weight, of_mean, of_var, of_scale, dnew, dnew_bias, dstats, weight, mean, var, scale, stats, outputs, taps, groups, channels_last, eps
) -> None:
    _cpu_kernels().analytic_norm_weight_bwd(
        of_weight.data_ptr(), dnew.data_ptr(), weight.data_ptr(), DTYPES[weight.dtype], of_mean.data_ptr(), of_var.data_ptr(), of_scale.data_ptr(),
        dnew_bias.data_ptr(), dstats.data_ptr(), mean.data_ptr(), var.data_ptr(), stats.data_ptr(), *_parameter(scale, outputs),
        weight.numel(), outputs, taps, groups, channels_last, eps,
    )  # fmt: skip


# The everyday calls in as few steps as Python allows: dense x on the CPU, vectors of C. They answer None when anything is out of the ordinary.
# On small tensors the checks, the choice of a backend and the calls between them cost more than the arithmetic.


def group_norm_fwd_at_once(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    eps: float,
    activation: int | None,
    negative_slope: float,
    save_stats: bool,
) -> tuple[Tensor, Tensor | None] | None:
    """``y`` and ``stats`` (3, N, G) of contiguous ``(N, C, *spatial)`` x."""
    shape = x.shape
    if len(shape) < 2 or num_groups <= 0 or shape[1] % num_groups:
        return None
    if (weight is not None and weight.dim() != 1) or (bias is not None and bias.dim() != 1):
        return None
    samples = shape[0]
    saved = (3, samples, num_groups) if save_stats else None
    return _forward_at_once(x, weight, bias, saved, samples, shape[1], num_groups, None, 0.0, eps, activation, negative_slope)


def row_norm_fwd_at_once(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    C: int,
    centered: bool,
    weight_offset: float,
    eps: float,
    activation: int | None,
    negative_slope: float,
    save_stats: bool,
) -> tuple[Tensor, Tensor | None] | None:
    """``y`` and ``stats`` (3 or 1, rows) of contiguous x, whose trailing dimensions multiply to C."""
    rows = x.numel() // C if C > 0 else 0
    saved = (3 if centered else 1, rows) if save_stats else None
    return _forward_at_once(x, weight, bias, saved, rows, C, 1, centered, weight_offset, eps, activation, negative_slope)


def _forward_at_once(x, weight, bias, saved, N, C, num_groups, centered, weight_offset, eps, activation, negative_slope):
    """`saved`: shape of the statistics, None if they are not wanted. `centered`: None for a group norm."""
    dtype, numel = DTYPES.get(x.dtype), x.numel()
    weight_at, bias_at = _everyday(weight, C), _everyday(bias, C)
    if dtype is None or activation is None or weight_at is None or bias_at is None or not numel or not x.is_contiguous() or not eps >= 0:
        return None
    y = torch.empty_like(x)
    stats = None
    stats_at = 0
    if saved is not None:
        stats = x.new_empty(*saved) if dtype in (0, 3) else x.new_empty(*saved, dtype=torch.float32)  # arguments are parsed faster than a tuple
        stats_at = stats.data_ptr()
    inputs = (x.data_ptr(), 0, stats_at, dtype, *weight_at, *bias_at, N, C, numel, num_groups, activation, negative_slope)
    if centered is None and numel != N * C:
        _cpu_kernels().group_norm_fwd(y.data_ptr(), eps, *inputs, False, 0)
    else:  # with one position a group is a row
        _cpu_kernels().row_norm_fwd(y.data_ptr(), 0, 0, eps, *inputs, centered is not False, weight_offset)
    return y, stats


def group_norm_bwd_at_once(
    dy: Tensor, x: Tensor, stats: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int, activation: int, negative_slope: float, mask
) -> tuple[Tensor | None, ...] | None:
    """The backward of :func:`group_norm_fwd_at_once`: dx, dweight, dbias, dresidual; None when anything is out of the ordinary."""
    N, C = x.shape[:2]
    return _backward_at_once(dy, x, stats, weight, bias, N, C, num_groups, None, 0.0, activation, negative_slope, mask)


def row_norm_bwd_at_once(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    C: int,
    centered: bool,
    weight_offset: float,
    activation: int,
    negative_slope: float,
    mask,
) -> tuple[Tensor | None, ...] | None:
    """The backward of :func:`row_norm_fwd_at_once`: dx, dweight, dbias, dresidual; None when anything is out of the ordinary."""
    return _backward_at_once(
        dy, x, stats, weight, bias, x.numel() // C if C > 0 else 0, C, 1, centered, weight_offset, activation, negative_slope, mask
    )


def _backward_at_once(dy, x, stats, weight, bias, N, C, num_groups, centered, weight_offset, activation, negative_slope, mask):
    dtype, numel = DTYPES[x.dtype], x.numel()
    weight_at, bias_at = _everyday(weight, C), _everyday(bias, C)
    if mask[3] or weight_at is None or bias_at is None or not numel or dy.dtype is not x.dtype or not (x.is_contiguous() and dy.is_contiguous()):
        return None
    dx = torch.empty_like(x) if mask[0] else None
    dweight = torch.empty_like(weight) if mask[1] and weight is not None else None
    dbias = torch.empty_like(bias) if mask[2] and bias is not None else None
    parameters = *weight_at, *bias_at
    gradients = _address(dweight), *weight_at[1:], _address(dbias), *bias_at[1:]
    inputs = (x.data_ptr(), 0, stats.data_ptr(), dtype, *parameters, N, C, numel, num_groups, activation, negative_slope)
    if centered is None and numel != N * C:
        _cpu_kernels().group_norm_bwd(_address(dx), 0, dy.data_ptr(), *gradients, 0, *inputs, False, 0)
    else:
        _cpu_kernels().row_norm_bwd(_address(dx), 0, dy.data_ptr(), 0, *gradients, *inputs, centered is not False, weight_offset)
    return dx, dweight, dbias, None


def batch_norm_fwd_at_once(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    activation: int | None,
    negative_slope: float,
    frozen: bool = False,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:
    """``y`` and ``stats`` (4, 1, C) of ``(N, C, *spatial)`` x, contiguous or channels last, with the running statistics updated; `frozen`: ``y`` and
    (3, 1, C) from the running statistics."""
    last, dtype, numel = _channels_last(x), DTYPES.get(x.dtype), x.numel()
    if last is None or dtype is None or activation is None or not eps >= 0 or not numel:
        return None
    if (weight is not None and weight.dim() != 1) or (bias is not None and bias.dim() != 1):
        return None
    shape = x.shape
    N, C = shape[0], shape[1]
    mean_at, var_at, weight_at, bias_at = _everyday(running_mean, C), _everyday(running_var, C), _everyday(weight, C), _everyday(bias, C)
    if mean_at is None or var_at is None or weight_at is None or bias_at is None or mean_at[1] != var_at[1]:
        return None
    if (not mean_at[0] or not var_at[0]) if frozen else (numel == C or bool(mean_at[0]) != bool(var_at[0])):
        return None
    if residual is not None and not (residual.is_cpu and residual.dtype is x.dtype and residual.shape == shape and _channels_last(residual) is last):
        return None
    y = torch.empty_like(x)
    count = 3 if frozen else 4
    stats = x.new_empty(count, 1, C) if dtype in (0, 3) else x.new_empty(count, 1, C, dtype=torch.float32)
    _cpu_kernels().batch_norm_fwd(
        y.data_ptr(), eps, momentum, mean_at[0], mean_at[1], var_at[0], frozen, x.data_ptr(), _address(residual), stats.data_ptr(), dtype,
        *weight_at, *bias_at, N, C, numel, C, activation, negative_slope, last,
    )  # fmt: skip
    return y, stats


def batch_norm_bwd_at_once(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: int,
    negative_slope: float,
    mask,
    frozen: bool = False,
    residual: Tensor | None = None,
) -> tuple[Tensor | None, ...] | None:
    """The backward of :func:`batch_norm_fwd_at_once`: dx, dweight, dbias, dresidual; None when anything is out of the ordinary."""
    last, dtype, numel = _channels_last(x), DTYPES[x.dtype], x.numel()
    if last is None or not numel or dy.dtype is not x.dtype or _channels_last(dy) is not last:
        return None
    N, C = x.shape[:2]
    weight_at, bias_at = _everyday(weight, C), _everyday(bias, C)
    if weight_at is None or bias_at is None or (residual is not None and _channels_last(residual) is not last):
        return None
    dx = torch.empty_like(x) if mask[0] else None
    dweight = torch.empty_like(weight) if mask[1] and weight is not None else None
    dbias = torch.empty_like(bias) if mask[2] and bias is not None else None
    dresidual = torch.empty_like(x) if mask[3] else None
    _cpu_kernels().batch_norm_bwd(
        _address(dx), _address(dresidual), dy.data_ptr(), _address(dweight), *weight_at[1:], _address(dbias), *bias_at[1:],
        x.data_ptr(), _address(residual), stats.data_ptr(), dtype, *weight_at, *bias_at, N, C, numel, C, activation, negative_slope, last, frozen,
    )  # fmt: skip
    return dx, dweight, dbias, dresidual


def _channels_last(x: Tensor) -> bool | None:
    """Whether ``(N, C, *spatial)`` x is channels last and not contiguous; None when it is neither."""
    if x.is_contiguous():
        return False if x.dim() > 1 else None
    dims = x.dim()
    if dims == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return True
    return True if dims == 5 and x.is_contiguous(memory_format=torch.channels_last_3d) else None


def _everyday(vector: Tensor | None, C: int) -> tuple[int, int, int] | None:
    """Address, dtype and rows of C elements: one. None for anything else."""
    if vector is None:
        return 0, 0, 1
    dtype = DTYPES.get(vector.dtype)
    if dtype is None or vector.numel() != C or not vector.is_cpu or not vector.is_contiguous():
        return None
    return vector.data_ptr(), dtype, 1


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _parameters(weight: Tensor | None, bias: Tensor | None, C: int) -> tuple[int, ...]:
    """Address, dtype and rows of C elements of both."""
    return *_parameter(weight, C), *_parameter(bias, C)


def _parameter(vector: Tensor | None, C: int) -> tuple[int, int, int]:
    return (0, 0, 1) if vector is None else (vector.data_ptr(), DTYPES[vector.dtype], vector.numel() // C)


def _to(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


def _empty(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else torch.empty_like(tensor, dtype=dtype) for tensor in tensors)


def _copy(outs: tuple[Tensor | None, ...], values: tuple[Tensor | None, ...]) -> None:
    for out, value in zip(outs, values, strict=True):
        if out is not None and value is not None:
            out.copy_(value)


@cache
def _cpu_kernels():
    return importlib.import_module("normops._C")
