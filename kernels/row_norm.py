"""Layer norm and RMS norm on CUDA, and group norm of single positions: choose a configuration, allocate the workspaces, launch."""

import math

import torch

from .config import choose_rows, device_of, divide, power_above
from .exchange import APPLY, PARTS, WHOLE
from .fold import fold
from .group_norm import fold_moments
from .launch import INTERPRET, launch
from .rows import _row_norm_bwd_kernel, _row_norm_fwd_kernel, _row_norm_fwd_long_kernel


def row_norm_fwd(
    y, total, stats, x, addend, weight, bias, residual, N, C, num_groups, centered, weight_offset, eps, activation, negative_slope,
):  # fmt: skip
    """Write y = act(t), total = x + addend if there is an addend, and, unless None, stats = (hi, lo, rstd) or (rstd,)."""
    config = _configuration(x, weight, bias, N, C, num_groups, False, False)
    forward(config, y, total, stats, x, addend, weight, bias, residual, N, C, num_groups, centered, weight_offset, eps, activation, negative_slope)


def row_norm_bwd(
    dx, dweight, dbias, dresidual, dy, dtotal, x, stats, weight, bias, residual, N, C, num_groups, centered, weight_offset, activation,
    negative_slope,
):  # fmt: skip
    """Write those of dx, dweight, dbias, dresidual that are not None."""
    config = _configuration(x, weight, bias, N, C, num_groups, True, dweight is not None or dbias is not None)
    backward(
        config, dx, dweight, dbias, dresidual, dy, dtotal, x, stats, weight, bias, residual, N, C, num_groups, centered, weight_offset,
        activation, negative_slope,
    )  # fmt: skip


def forward(config, y, total, stats, x, addend, weight, bias, residual, N, C, G, centered, weight_offset, eps, activation, negative_slope):
    sizes, chunks, across = _sizes(config, x, weight, bias, N, C, G)
    tile = (activation, centered, across, config.V, config.ROWS)
    scalars = (*sizes, weight_offset or None, eps, negative_slope)
    if config.regime == "held":
        launch(
            _row_norm_fwd_kernel, chunks * divide(G, config.GROUPS), config.num_warps, x, addend, weight, bias, residual, y, total, stats,
            *scalars, *tile, config.GROUPS, config.BLOCK, config.BLOCK == C // G,
        )  # fmt: skip
        return
    steps, programs, partials = [WHOLE.value], chunks * G, None
    if config.regime == "split":
        blocks = divide(C // G, config.BLOCK)
        steps, programs = [PARTS.value, APPLY.value], programs * blocks
        partials = torch.empty((3, N, blocks, G), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device=x.device)
        if stats is None:
            stats = partials.new_empty((3 if centered else 1, N, G))
    for step in steps:
        if step == APPLY.value:
            fold_moments(partials, stats, 1, C // G, config.BLOCK, eps)
            if addend is not None:
                x, addend, total = total, None, None
        launch(
            _row_norm_fwd_long_kernel, programs, config.num_warps, x, addend, weight, bias, residual, y, total, stats, partials,
            *scalars, *tile, config.BLOCK, step,
        )  # fmt: skip


def backward(
    config, dx, dweight, dbias, dresidual, dy, dtotal, x, stats, weight, bias, residual, N, C, G, centered, weight_offset, activation,
    negative_slope,
):  # fmt: skip
    sizes, _, across = _sizes(config, x, weight, bias, N, C, G)
    segments = _segments(weight, bias, C)
    parameters = dweight is not None or dbias is not None
    blocks = divide(C // G, config.BLOCK)
    columns = divide(G, config.GROUPS) * blocks
    sums = stats.new_empty((2, segments * config.P, C)) if parameters else None
    steps, partials = [WHOLE.value], None
    if config.regime != "held":
        steps = [PARTS.value] if dx is None and dresidual is None else [PARTS.value, APPLY.value]
        partials = stats.new_empty((2, x.numel() // (C // G), blocks))
    for step in steps:
        launch(
            _row_norm_bwd_kernel, segments * config.P * columns, config.num_warps,
            dy, x, stats, weight, bias, residual, dtotal, dx, dresidual, None if step == APPLY.value else sums, partials,
            *sizes, config.P, weight_offset or None, negative_slope, activation, centered, across, config.V,
            config.ROWS, config.GROUPS, config.BLOCK, config.BLOCK == C // G, step, min(1024, power_above(blocks)), config.STAGES,
        )  # fmt: skip
    if parameters:
        fold(sums, dweight, dbias)


def _segments(weight, bias, C):
    """How many sets of samples there are that share a row of weight and one of bias."""
    return math.lcm(*(1 if parameter is None else parameter.numel() // C for parameter in (weight, bias)))


def _sizes(config, x, weight, bias, N, C, G):
    """weight_share, bias_share, planes, L, G, D, rows as the kernels take them; chunks of rows; whether rows lie across channels."""
    S, D, segments = x.numel() // (N * C), C // G, _segments(weight, bias, C)
    across = S > 1
    planes, L = (N // segments, S) if across else (1, N // segments)
    shares = (segments if parameter is None else segments * C // parameter.numel() for parameter in (weight, bias))
    d_arg, l_arg = (D, L // config.V) if across else (D // config.V, L)
    return (*shares, planes, l_arg, G, d_arg, N * G * S), segments * planes * divide(L, config.ROWS), across


def _configuration(x, weight, bias, N, C, G, backward, parameters):
    if not (x.is_cuda or INTERPRET):
        raise NotImplementedError(f"row_norm: Triton kernels run on CUDA tensors, not on {x.device.type}")
    S = x.numel() // (N * C)
    return choose_rows(N, C, S, G, x.element_size(), _segments(weight, bias, C), backward, parameters, device_of(x.get_device()))
