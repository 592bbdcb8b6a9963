"""Group norm on CUDA: choose a configuration, allocate the workspaces, launch."""

import torch

from .config import choose, device_of, divide, power_above
from .held import _group_norm_bwd_held_kernel, _group_norm_fwd_held_kernel
from .launch import INTERPRET, launch
from .split import (
    _apply_backward_kernel,
    _apply_kernel,
    _fold_moments_kernel,
    _fold_sums_kernel,
    _moments_kernel,
    _parameter_gradient_kernel,
    _sums_kernel,
)


def group_norm_fwd(y, stats, x, weight, bias, residual, num_groups, channels_last, eps, activation, negative_slope):
    """Write y = act(t) and, unless None, stats = (hi, lo, rstd)."""
    config = _configuration(x, num_groups, channels_last, False)
    forward(config, y, stats, x, weight, bias, residual, num_groups, channels_last, eps, activation, negative_slope)


def group_norm_bwd(dx, dweight, dbias, dresidual, dy, x, stats, weight, bias, residual, num_groups, channels_last, activation, negative_slope):
    """Write those of dx, dweight, dbias, dresidual that are not None."""
    config = _configuration(x, num_groups, channels_last, True)
    backward(
        config, dx, dweight, dbias, dresidual, dy, x, stats, weight, bias, residual, num_groups, channels_last, activation,
        negative_slope,
    )  # fmt: skip


def forward(config, y, stats, x, weight, bias, residual, num_groups, channels_last, eps, activation, negative_slope):
    N, C, S, D, c_arg, d_arg, s_arg, last = _arguments(config, x, num_groups, channels_last)
    w_rows, b_rows = _rows(weight), _rows(bias)
    if config.regime == "held":
        launch(
            _group_norm_fwd_held_kernel, divide(N * num_groups, config.ROWS), config.num_warps,
            x, weight, bias, residual, y, stats,
            w_rows, b_rows, N, num_groups, d_arg, s_arg, eps, negative_slope,
            activation, last, config.V, config.SIDE, config.ROWS, config.OUTER, config.BLOCK_C, config.BLOCK_S,
        )  # fmt: skip
        return
    tiling = (last, config.V, config.SIDE, config.LARGE, config.OUTER, config.BLOCK_C, config.BLOCK_S)
    T = divide(S, config.OUTER * config.BLOCK_S)
    programs = N * T * divide(C, config.BLOCK_C)
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    partials = torch.empty((3, N, T, C), dtype=accumulate, device=x.device)
    launch(_moments_kernel, programs, config.num_warps, x, partials, N, c_arg, s_arg, T, *tiling)
    if not config.FOLD:
        if stats is None:
            stats = torch.empty((3, N, num_groups), dtype=accumulate, device=x.device)
        block = min(4096, power_above(T * D))
        launch(_fold_moments_kernel, N * num_groups, max(1, block // 512), partials, stats, N, C, D, S, T, eps, config.OUTER * config.BLOCK_S, block)
    launch(
        _apply_kernel, programs, config.num_warps, x, partials, weight, bias, residual, y, stats,
        w_rows, b_rows, N, c_arg, D, s_arg, T, eps, negative_slope, activation, *tiling, config.FOLD, power_above(T * D) if config.FOLD else 1,
    )  # fmt: skip


def backward(
    config, dx, dweight, dbias, dresidual, dy, x, stats, weight, bias, residual, num_groups, channels_last, activation,
    negative_slope,
):  # fmt: skip
    N, C, S, D, c_arg, d_arg, s_arg, last = _arguments(config, x, num_groups, channels_last)
    w_rows, b_rows = _rows(weight), _rows(bias)
    parameters = dweight is not None or dbias is not None
    sums = None
    if config.regime == "held":
        slots = N if w_rows or b_rows else config.SLOTS
        if parameters:
            sums = torch.empty((2, slots, C), dtype=stats.dtype, device=x.device)
        launch(
            _group_norm_bwd_held_kernel, divide(slots * num_groups, config.ROWS), config.num_warps,
            dy, x, stats, weight, bias, residual, dx, dresidual, sums,
            w_rows, b_rows, N, slots, num_groups, d_arg, s_arg, negative_slope,
            activation, last, config.V, config.SIDE, config.ROWS, config.OUTER, config.BLOCK_C, config.BLOCK_S,
        )  # fmt: skip
    else:
        slots = N
        tiling = (last, config.V, config.SIDE, config.LARGE, config.OUTER, config.BLOCK_C, config.BLOCK_S)
        T = divide(S, config.OUTER * config.BLOCK_S)
        programs = N * T * divide(C, config.BLOCK_C)
        sums = torch.empty((2, N, C), dtype=stats.dtype, device=x.device)
        partials = torch.empty((2, N, T, C), dtype=stats.dtype, device=x.device)
        coefficients = torch.empty((2, N, num_groups), dtype=stats.dtype, device=x.device)
        launch(
            _sums_kernel, programs, config.num_warps, dy, x, stats, weight, bias, residual, partials,
            w_rows, b_rows, N, c_arg, D, s_arg, T, negative_slope, activation, *tiling,
        )  # fmt: skip
        block_c = min(64, power_above(D))
        block_t = min(2048 // block_c, power_above(T))
        launch(
            _fold_sums_kernel, N * num_groups, max(1, block_c * block_t // 512), partials, stats, weight, sums, coefficients,
            w_rows, N, C, D, S, T, block_t, block_c,
        )  # fmt: skip
        if dx is not None or dresidual is not None:
            launch(
                _apply_backward_kernel, programs, config.num_warps, dy, x, stats, coefficients, weight, bias, residual, dx, dresidual,
                w_rows, b_rows, N, c_arg, D, s_arg, T, negative_slope, activation, *tiling,
            )  # fmt: skip
    if parameters:
        _parameter_gradients(sums, slots, C, dweight, dbias, w_rows, b_rows)


def _parameter_gradients(sums, slots, C, dweight, dbias, w_rows, b_rows):
    """dweight, dbias from sums (2, slots, C). A gradient per sample is the same sums seen as one sample of slots * C channels."""
    if dweight is not None and dbias is not None and w_rows != b_rows:
        _parameter_gradients(sums, slots, C, dweight, None, w_rows, b_rows)
        dweight = None
    if w_rows if dweight is not None else b_rows:
        slots, C = 1, slots * C
    # 32 columns are one line of memory: many small programs, since there is little to do and much to wait for.
    block_n, block_c = min(64, power_above(slots)), 32
    launch(
        _parameter_gradient_kernel, divide(C, block_c), max(1, block_n * block_c // 512), sums, dweight, dbias, slots, C,
        block_n, block_c,
    )  # fmt: skip


def _rows(parameter):
    """1 where each sample has its own row of the parameter, 0 where all share one: a factor of the sample's number."""
    return int(parameter is not None and parameter.dim() == 2)


def _configuration(x, num_groups, channels_last, backward):
    if not (x.is_cuda or INTERPRET):
        raise NotImplementedError(f"group_norm: Triton kernels run on CUDA tensors, not on {x.device.type}")
    N, C, S = _sizes(x)
    return choose(N, C, S, num_groups, x.element_size(), channels_last, backward, device_of(x.get_device()))


def _sizes(x):
    N, C = x.shape[:2]
    return N, C, x.numel() // (N * C)


def _arguments(config, x, G, channels_last):
    """Sizes, then C, D, S as the kernels take them: the contiguous one in vectors; and whether channels are contiguous."""
    N, C, S = _sizes(x)
    D = C // G
    last = channels_last or S == 1
    if last:
        return N, C, S, D, C // config.V, D // config.V, S, last
    return N, C, S, D, C, D, S if config.SIDE else S // config.V, last
