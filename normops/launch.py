"""The launchers: they check and pack the arguments, allocate the results and run a backend.

group  a statistic for D = C/num_groups channels and all positions of a sample: group norm, instance norm
batch  a statistic for each channel of all samples: batch norm
row    a statistic for those of one position: layer norm, RMS norm. ``ndim`` trailing dimensions, or with 0 dimension 1 of ``(N, C, *spatial)``
"""

import math
from typing import Any

import torch
from torch import Tensor

from normops import backends, cpu
from normops.checks import check_group
from normops.layout import dense, dense_rows, is_last, like, packed
from normops.reference import CODES, accumulator, update_running


def empty_stats(x: Tensor, *shape: int) -> Tensor:
    """In the dtype in which statistics of x are computed."""
    return x.new_empty(shape) if x.dtype.itemsize >= 4 else x.new_empty(shape, dtype=torch.float32)


def _new_stats(x: Tensor, *shape: int) -> Tensor:
    """For a kernel to fill, or zeros where there is nothing to compute them from."""
    return empty_stats(x, *shape) if x.numel() else empty_stats(x, *shape).zero_()


def row_length(x: Tensor, ndim: int) -> int:
    """How many elements share a statistic."""
    return math.prod(x.shape[-ndim:]) if ndim else x.shape[1]


def _row_sizes(x: Tensor, ndim: int) -> tuple[int, int]:
    """N and C as the row kernels see dense x; channels last over dimension 1 is one sample for each position."""
    channels = row_length(x, ndim)
    return x.numel() // channels if ndim or is_last(x) else x.shape[0], channels


def empty_row_stats(x: Tensor, ndim: int, centered: bool) -> Tensor:
    """`empty_stats` of rows."""
    channels = row_length(x, ndim)
    return empty_stats(x, 3 if centered else 1, x.numel() // channels if channels else 0)


def empty_gradients(x: Tensor, weight: Tensor | None, bias: Tensor | None, mask: list[bool] | tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """For x, weight, bias (all as the kernels want them) and residual; of empty x, zeros."""
    dx, dweight, dbias, dresidual = (
        torch.empty_like(x) if mask[0] else None,
        torch.empty_like(weight) if mask[1] and weight is not None else None,
        torch.empty_like(bias) if mask[2] and bias is not None else None,
        torch.empty_like(x) if mask[3] else None,
    )
    if not x.numel():
        for gradient in (dweight, dbias):
            if gradient is not None:
                gradient.zero_()
    return dx, dweight, dbias, dresidual


def group_norm_fwd(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    given: Tensor | tuple[Tensor, Tensor] | None,
    num_groups: int,
    eps: float,
    activation: str,
    negative_slope: float,
    out_dtype: torch.dtype | None,
    save_stats: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Launch the forward kernel: ``y`` and ``stats`` of shape (3, N, G): mean, what its rounding lost, 1/std. Statistics that are `given`
    ((3, 1, G) for all samples alike, or (3, N, G)) are not returned, unless they are given as mean and variance (C,)."""
    if isinstance(given, tuple):
        return _frozen_fwd(x, weight, bias, residual, *given, num_groups, eps, activation, negative_slope, out_dtype)
    if x.is_cpu and residual is None and out_dtype is None and given is None and backends.everyday:
        result = cpu.group_norm_fwd_at_once(x, weight, bias, num_groups, eps, CODES.get(activation), negative_slope, save_stats)
        if result is not None:
            return result
    check_group("group_norm", x, num_groups, weight, bias, residual, eps, activation, out_dtype)
    x, weight, bias = dense(x), packed(weight), packed(bias)
    residual = like(residual, x)
    y = torch.empty_like(x) if out_dtype is None else torch.empty_like(x, dtype=out_dtype)
    stats = given
    if given is None and save_stats:
        stats = _new_stats(x, 3, x.shape[0], num_groups)
    if x.numel():
        _run_group_norm_fwd(y, stats, x, weight, bias, residual, num_groups, given is not None, eps, CODES[activation], negative_slope)
    return y, stats if given is None else None


def _frozen_fwd(x, weight, bias, residual, mean, var, num_groups, eps, activation, negative_slope, out_dtype):
    if x.is_cpu and out_dtype is None and backends.everyday:
        result = cpu.batch_norm_fwd_at_once(x, mean, var, weight, bias, 0.0, eps, CODES.get(activation), negative_slope, True, residual)
        if result is not None:
            return result
    given = frozen_statistics(x, mean, var, eps)
    return group_norm_fwd(x, weight, bias, residual, given, num_groups, eps, activation, negative_slope, out_dtype)[0], given


def frozen_statistics(x: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """What the kernels take for mean and variance (C,) that are the same for all samples: (3, 1, C)."""
    mean, rstd = (value.to(accumulator(x.dtype)) for value in (mean, torch.rsqrt(var.double() + eps)))
    return torch.stack((mean, torch.zeros_like(mean), rstd)).unsqueeze(1)


def _run_group_norm_fwd(y, stats, x, weight, bias, residual, num_groups, frozen, eps, activation, negative_slope) -> None:
    options: tuple
    N, C = x.shape[:2]
    last, single = is_last(x), x.numel() == N * C
    if single and not frozen and y is not None:
        options = N, C, num_groups, True, 0.0, eps, activation, negative_slope
        return backends.run("row_norm_fwd", x, y, None, stats, x, None, weight, bias, residual, *options)
    options = N, C, num_groups, last or single, frozen, eps, activation, negative_slope
    backends.run("group_norm_fwd", x, y, stats, x, weight, bias, residual, *options)


def group_norm_bwd(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    num_groups: int,
    frozen: bool,
    activation: str,
    negative_slope: float,
    output_mask: list[bool] | tuple[bool, ...],
    means: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Launch the backward kernel: dx, dweight, dbias, dresidual, each None unless wanted. `frozen`: `stats` do not depend on x, or on what lies
    outside x too: then their part of dx is in `means`, (2, 1 or N, G): mean(g * x_hat), mean(g) with g = weight * dt."""
    if x.is_cpu and means is None and backends.everyday:
        code, result = CODES[activation], None
        if frozen and stats.shape[1] == 1 and num_groups == x.shape[1]:
            result = cpu.batch_norm_bwd_at_once(dy, x, stats, weight, bias, code, negative_slope, output_mask, True, residual)
        elif residual is None and not frozen:
            result = cpu.group_norm_bwd_at_once(dy, x, stats, weight, bias, num_groups, code, negative_slope, output_mask)
        if result is not None:
            return result
    x, weight, bias = dense(x), packed(weight), packed(bias)
    residual, dy = like(residual, x), like(dy, x)
    gradients = empty_gradients(x, weight, bias, output_mask)
    if x.numel():
        N, C = x.shape[:2]
        last, single, code = is_last(x), x.numel() == N * C, CODES[activation]
        if single and not frozen:
            backends.run("row_norm_bwd", x, *gradients, dy, None, x, stats, weight, bias, residual, N, C, num_groups, True, 0.0, code, negative_slope)
        else:
            options = N, C, num_groups, last or single, frozen, code, negative_slope
            backends.run("group_norm_bwd", x, *gradients, dy, x, stats, weight, bias, residual, means, *options)
    return gradients


def group_norm_stats(x: Tensor, num_groups: int, eps: float) -> Tensor:
    """The statistics (3, N, G) of groups alone."""
    check_group("group_norm_stats", x, num_groups, None, None, None, eps, "none", None)
    x = dense(x)
    stats = _new_stats(x, 3, x.shape[0], num_groups)
    if x.numel():
        _run_group_norm_fwd(None, stats, x, None, None, None, num_groups, False, eps, CODES["none"], 0.0)
    return stats


Running = tuple[Tensor, Tensor, float]  # running mean, running variance, momentum


def batch_norm_fwd(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    given: Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
    out_dtype: torch.dtype | None,
    running: Running | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Launch the forward kernel: ``y`` and the statistics of `batch_norm_stats`; those that are `given` are not returned."""
    if x.is_cpu and given is None and out_dtype is None and backends.everyday:
        mean, var, momentum = running or (None, None, 0.0)
        code = CODES.get(activation)
        result = cpu.batch_norm_fwd_at_once(x, mean, var, weight, bias, momentum, eps, code, negative_slope, False, residual)
        if result is not None:
            return result
    channels = x.shape[1] if x.dim() > 1 else 0
    check_group("batch_norm", x, channels, weight, bias, residual, eps, activation, out_dtype)
    x, weight, bias = dense(x), packed(weight), packed(bias)
    residual = like(residual, x)
    y = torch.empty_like(x) if out_dtype is None else torch.empty_like(x, dtype=out_dtype)
    stats = None
    if given is None:
        stats = _new_stats(x, 4, 1, channels)
        _run_batch_norm_fwd(y, stats, running, x, weight, bias, residual, eps, CODES[activation], negative_slope)
    elif x.numel():
        _run_group_norm_fwd(y, given[:3], x, weight, bias, residual, channels, True, eps, CODES[activation], negative_slope)
    return y, stats


def batch_norm_stats(x: Tensor, eps: float) -> Tensor:
    """The statistics of channels alone, (4, 1, C): mean, what its rounding lost, 1/sqrt(var + eps), unbiased variance."""
    channels = x.shape[1] if x.dim() > 1 else 0
    check_group("batch_norm_stats", x, channels, None, None, None, eps, "none", None)
    x = dense(x)
    stats = _new_stats(x, 4, 1, channels)
    _run_batch_norm_fwd(None, stats, None, x, None, None, None, eps, CODES["none"], 0.0)
    return stats


def update_batch_statistics(running_mean: Tensor, running_var: Tensor, momentum: float, stats: Tensor) -> None:
    """Running statistics of all channels from `batch_norm_stats`, or from those of all workers; from no values at all they stay what they are."""
    mean, var = stats[0, 0] + stats[1, 0], stats[3, 0]
    if stats.shape[0] == 5:
        some = stats[4, 0] > 0
        mean, var = torch.where(some, mean, running_mean), torch.where(some, var, running_var)
    update_running(running_mean, running_var, mean, var, momentum)


def _run_batch_norm_fwd(y, stats, running, x, weight, bias, residual, eps, activation, negative_slope):
    if not x.numel():
        return
    N, C = x.shape[:2]
    nothing: Any = (None, None, 0.0)
    mean, var, momentum = running or nothing
    outside = running is not None and not (mean.is_contiguous() and var.is_contiguous() and mean.dtype is var.dtype)
    statistics = (None, None) if outside else (mean, var)
    options = N, C, is_last(x) or x.numel() == N * C, momentum, eps, activation, negative_slope
    backends.run("batch_norm_fwd", x, y, stats, *statistics, x, weight, bias, residual, *options)
    if outside:
        update_batch_statistics(mean, var, momentum, stats)


def batch_norm_bwd(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    negative_slope: float,
    output_mask: list[bool] | tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Launch the backward kernel: dx, dweight, dbias, dresidual, each None unless wanted."""
    if x.is_cpu and backends.everyday:
        result = cpu.batch_norm_bwd_at_once(dy, x, stats, weight, bias, CODES[activation], negative_slope, output_mask, False, residual)
        if result is not None:
            return result
    x, weight, bias = dense(x), packed(weight), packed(bias)
    residual, dy = like(residual, x), like(dy, x)
    gradients = empty_gradients(x, weight, bias, output_mask)
    if x.numel():
        N, C = x.shape[:2]
        options = N, C, is_last(x) or x.numel() == N * C, CODES[activation], negative_slope
        backends.run("batch_norm_bwd", x, *gradients, dy, x, stats, weight, bias, residual, *options)
    return gradients


def norm_sums(bwd, dy, x, stats, weight, bias, residual, num_groups, activation, negative_slope):
    """``sum dt * x_hat`` and ``sum dt`` over positions, and over samples where weight and bias are the same for all: (1 or N, C)."""
    shape = x.shape[1:2] if all(value is None or value.dim() == 1 for value in (weight, bias)) else x.shape[:2]
    weight, bias = (
        stats.new_full(shape, default) if value is None else value.to(stats.dtype).expand(shape).contiguous()
        for value, default in ((weight, 1.0), (bias, 0.0))
    )
    mask = (False, True, True, False)
    _, dweight, dbias, _ = bwd(dy, x, stats, weight, bias, residual, num_groups, True, activation, negative_slope, mask)
    return dweight.view(-1, x.shape[1]), dbias.view(-1, x.shape[1])


def row_norm_fwd(
    x: Tensor,
    addend: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    ndim: int,
    centered: bool,
    weight_offset: float,
    eps: float,
    activation: str,
    negative_slope: float,
    out_dtype: torch.dtype | None,
    save_stats: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Launch the forward kernel: ``y``, ``total`` = x + addend, and ``stats`` of shape (3, rows): mean, what its rounding lost, 1/std; not
    `centered`: (1, rows). weight and bias: vectors of a row's length, one for all rows or R of them, each for rows/R."""
    if ndim and x.is_cpu and residual is None and addend is None and out_dtype is None and backends.everyday:
        channels = row_length(x, ndim)
        result = cpu.row_norm_fwd_at_once(x, weight, bias, channels, centered, weight_offset, eps, CODES.get(activation), negative_slope, save_stats)
        if result is not None:
            return result[0], None, result[1]
    x, weight, bias = dense_rows(x, ndim), packed(weight), packed(bias)
    residual, addend = like(residual, x), like(addend, x)
    y = torch.empty_like(x) if out_dtype is None else torch.empty_like(x, dtype=out_dtype)
    total = None if addend is None else torch.empty_like(x)
    stats = empty_row_stats(x, ndim, centered) if save_stats else None
    if x.numel():
        N, C = _row_sizes(x, ndim)
        args = (y, total, stats, x, addend, weight, bias, residual, N, C, 1, centered, weight_offset, eps, CODES[activation], negative_slope)
        backends.run("row_norm_fwd", x, *args)
    return y, total, stats


def row_norm_bwd(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    ndim: int,
    centered: bool,
    weight_offset: float,
    activation: str,
    negative_slope: float,
    output_mask: list[bool] | tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Launch the backward kernel: dx (to which `dtotal` is added), dweight, dbias, dresidual, each None unless wanted."""
    if ndim and x.is_cpu and residual is None and dtotal is None and backends.everyday:
        channels, code = row_length(x, ndim), CODES[activation]
        result = cpu.row_norm_bwd_at_once(dy, x, stats, weight, bias, channels, centered, weight_offset, code, negative_slope, output_mask)
        if result is not None:
            return result
    x, weight, bias = dense_rows(x, ndim), packed(weight), packed(bias)
    residual, dy, dtotal = like(residual, x), like(dy, x), like(dtotal, x)
    gradients = empty_gradients(x, weight, bias, output_mask)
    if x.numel():
        N, C = _row_sizes(x, ndim)
        args = (dy, dtotal, x, stats, weight, bias, residual, N, C, 1, centered, weight_offset, CODES[activation], negative_slope)
        backends.run("row_norm_bwd", x, *gradients, *args)
    return gradients
