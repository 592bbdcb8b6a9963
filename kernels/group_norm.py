"""Group norm on CUDA: choose a configuration, allocate the workspaces, launch."""

import functools
import math

import torch

from .config import choose, device_of, divide, power_above
from .exchange import APPLY, MEET, PARTS, WHOLE
from .fold import fold, shorten
from .held import _group_norm_bwd_held_kernel, _group_norm_fwd_held_kernel
from .launch import INTERPRET, counters, launch
from .split import _fold_moments_kernel, _fold_sums_kernel, _split_bwd_kernel, _split_fwd_kernel


def group_norm_fwd(y, stats, x, weight, bias, residual, N, C, num_groups, channels_last, frozen, eps, activation, negative_slope):
    """Write y = act(t) and stats = (hi, lo, rstd), each unless None. frozen: stats are given, (3, 1, G) or (3, N, G)."""
    N, channels_last = _join(stats, x, weight, bias, N, C, channels_last, frozen)
    config = _configuration(x, N, C, num_groups, channels_last, False, frozen)
    forward(config, y, stats, x, weight, bias, residual, N, C, num_groups, channels_last, frozen, eps, activation, negative_slope)


def group_norm_bwd(
    dx, dweight, dbias, dresidual, dy, x, stats, weight, bias, residual, means, N, C, num_groups, channels_last, frozen, activation,
    negative_slope,
):  # fmt: skip
    """Write those of dx, dweight, dbias, dresidual that are not None. means (only with frozen): those of g x_hat and g, (2, 1 or N, G), or None."""
    N, channels_last = _join(stats, x, weight, bias, N, C, channels_last, frozen)
    config = _configuration(x, N, C, num_groups, channels_last, True, frozen)
    backward(
        config, dx, dweight, dbias, dresidual, dy, x, stats, weight, bias, residual, means, N, C, num_groups, channels_last, frozen,
        activation, negative_slope,
    )  # fmt: skip


def forward(config, y, stats, x, weight, bias, residual, N, C, num_groups, channels_last, frozen, eps, activation, negative_slope):
    S, D, c_arg, d_arg, s_arg = _arguments(config, x, N, C, num_groups, channels_last)
    w_rows, b_rows = _rows(weight, C), _rows(bias, C)
    if config.regime == "held":
        launch(
            _group_norm_fwd_held_kernel, divide(N * num_groups, config.ROWS), config.num_warps,
            x, weight, bias, residual, y, stats,
            w_rows, b_rows, N, num_groups, d_arg, s_arg, eps, negative_slope,
            activation, channels_last, config.V, config.SIDE, config.ROWS, config.OUTER, config.BLOCK_C, config.BLOCK_S,
        )  # fmt: skip
        return
    partials = merge = None
    if not frozen:
        partials, merge = empty_moments(config, x, N, C), config.FOLD and y is not None
        if stats is None and not merge:
            stats = partials.new_empty((3, N, num_groups))
    arguments = (y, stats, partials, x, weight, bias, residual, N, C, num_groups, channels_last, eps, activation, negative_slope)
    if config.regime == "meet" and y is not None and not frozen:
        return read(config, MEET, None, merge, *arguments)
    for part in parts(config, N, C, merge):
        if not frozen:
            read(config, PARTS, part, False, None, None, partials, x, None, None, None, *arguments[7:])
            if not merge:
                fold_moments(partials, stats, D, S, config.chunk, eps)
        if y is not None:
            read(config, APPLY, part, merge, *arguments)


def read(config, step, part, merge, y, stats, partials, x, weight, bias, residual, N, C, G, channels_last, eps, activation, negative_slope):
    """One reading of x, or of a part of it: moments of its chunks, y, or, where programs meet, both."""
    programs, meeting, sizes, tiling = _tiles(config, step, part, merge, x, N, C, G, channels_last)
    launch(
        _split_fwd_kernel, programs, config.num_warps, x, weight, bias, residual, y, stats, partials, meeting,
        _rows(weight, C), _rows(bias, C), N if stats is None else stats.shape[1], *sizes, eps, negative_slope, activation, *tiling,
        cooperative=step is MEET,
    )  # fmt: skip


def empty_moments(config, x, N, C):
    """For partials (3, N, T, C) of the T chunks of each sample."""
    T = divide(x.numel() // (N * C), config.chunk)
    return torch.empty((3, N, T, C), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device=x.device)


@functools.lru_cache(maxsize=4096)
def parts(config, N, C, waves):
    """What is worked on at a time, (first sample, first block of channels, samples, blocks): all, or a wave after the other."""
    blocks = divide(C, config.BLOCK_C)
    SET_N, SET_C = (waves and config.SET_N) or N, (waves and config.SET_C) or blocks
    return [(n, block, min(SET_N, N - n), min(SET_C, blocks - block)) for n in range(0, N, SET_N) for block in range(0, blocks, SET_C)]


def fold_moments(partials, stats, D, S, chunk, eps, running_mean=None, running_var=None, momentum=0.0):
    """From partials (3, N, T, C) of `chunk` of S positions each, stats (3, N, G), (1, N, G) of RMS, or (4, 1, C) of batch norm."""
    _, N, T, C = partials.shape
    over_samples = stats.shape[0] == 4
    # One program alone would take long over more than 512: first bring together some, or each sample's, channel by channel.
    length = power_above(math.isqrt(T)) if T > 512 else T if over_samples and N * T > 512 else 1
    if length > 1:
        fewer = partials.new_empty((3, N, divide(T, length), C))
        channels = min(32, power_above(C))
        block = min(4096 // channels, power_above(length))
        launch(
            _fold_moments_kernel, N * fewer.shape[2] * divide(C, channels), max(1, block * channels // 256), partials, fewer, None, None,
            N, C, 1, S, T, length, None, chunk, eps, momentum, block, channels, False, 3,
        )  # fmt: skip
        return fold_moments(fewer, stats, D, S, chunk * length, eps, running_mean, running_var, momentum)
    if N > 512 and over_samples:
        return fold_moments(partials.view(3, 1, N, C), stats, D, N * S, S, eps, running_mean, running_var, momentum)
    rows, period = stats.shape[1], None
    if rows < N:
        T, period = N * T, T
    groups = min(max(1, 8 // power_above(D)), power_above(C // D))  # 32 bytes of neighbouring channels are one sector
    block = min(4096 // groups, power_above(T * D))
    launch(
        _fold_moments_kernel, rows * divide(C // D, groups), max(1, block * groups // 256), partials, stats, running_mean, running_var,
        rows, C, D, S, T, T, period, chunk, eps, momentum, block, groups, True, stats.shape[0],
    )  # fmt: skip


def backward(
    config, dx, dweight, dbias, dresidual, dy, x, stats, weight, bias, residual, means, N, C, num_groups, channels_last, frozen,
    activation, negative_slope,
):  # fmt: skip
    parameters = dweight is not None or dbias is not None
    tensors = (dy, x, stats, weight, bias, residual)
    sizes = (N, C, num_groups, channels_last, activation, negative_slope)
    if config.regime == "held":
        S, D, c_arg, d_arg, s_arg = _arguments(config, x, N, C, num_groups, channels_last)
        w_rows, b_rows = _rows(weight, C), _rows(bias, C)
        slots = N if w_rows or b_rows else config.SLOTS
        sums = stats.new_empty((2, slots, C)) if parameters else None
        launch(
            _group_norm_bwd_held_kernel, divide(slots * num_groups, config.ROWS), config.num_warps,
            *tensors, dx, dresidual, sums,
            w_rows, b_rows, N, slots, num_groups, d_arg, s_arg, negative_slope,
            activation, channels_last, config.V, config.SIDE, config.ROWS, config.OUTER, config.BLOCK_C, config.BLOCK_S,
        )  # fmt: skip
    elif frozen:
        sums = empty_sums(config, stats, x, N, C) if parameters else None
        sweep(config, WHOLE, parts(config, N, C, False)[0], False, sums, dx, dresidual, means, *tensors, *sizes)
    else:
        sums = backward_split(config, dx, dresidual, *tensors, *sizes)
    if parameters:
        fold(sums, dweight, dbias)


def backward_split(config, dx, dresidual, dy, x, stats, weight, bias, residual, N, C, G, channels_last, activation, negative_slope):
    """dx and dresidual, each unless None, and sums for `fold`."""
    arguments = (dy, x, stats, weight, bias, residual, N, C, G, channels_last, activation, negative_slope)
    inputs, means = dx is not None or dresidual is not None, None
    sums = partials = empty_sums(config, stats, x, N, C)
    if inputs and not config.FOLD:
        means = stats.new_empty((2, N, G))
    if inputs and config.regime == "meet":
        sweep(config, MEET, None, config.FOLD, partials, dx, dresidual, means, *arguments)
        return partials
    if means is not None:
        sums = stats.new_empty((2, N, C))
    for part in parts(config, N, C, config.FOLD and inputs):
        sweep(config, PARTS, part, False, partials, None, None, None, *arguments)
        if means is not None:
            fold_sums(shorten(partials, N), weight, *sums, means, C, x.numel() // (N * G))
        if inputs:
            sweep(config, APPLY, part, config.FOLD, partials, dx, dresidual, means, *arguments)
    return sums


def sweep(
    config, step, part, merge, partials, dx, dresidual, means, dy, x, stats, weight, bias, residual, N, C, G, channels_last, activation,
    negative_slope,
):  # fmt: skip
    """One reading of x and dy, or of a part of them: sums of the chunks, dx, dresidual, each unless None, with given statistics."""
    programs, meeting, sizes, tiling = _tiles(config, step, part, merge, x, N, C, G, channels_last)
    launch(
        _split_bwd_kernel, programs, config.num_warps, dy, x, stats, means, weight, bias, residual, partials, dx, dresidual, meeting,
        _rows(weight, C), _rows(bias, C), stats.shape[1], *sizes, negative_slope, activation, *tiling,
        cooperative=step is MEET,
    )  # fmt: skip


def empty_sums(config, stats, x, N, C):
    """For (2, N T, C) sums of the T chunks of each sample."""
    return stats.new_empty((2, N * divide(x.numel() // (N * C), config.chunk), C))


def fold_sums(partials, weight, sum_dt_xhat, sum_dt, means, C, count):
    """Sums (N, C) of N rows, each unless None, and means (2, N, G) of `count` elements each, from partials (2, N T, C)."""
    _, N, G = means.shape
    D, T = C // G, partials.shape[1] // N
    block_d = min(64, power_above(D))
    groups = min(max(1, 8 // block_d), power_above(G))
    block_t = min(2048 // (block_d * groups), power_above(T))
    launch(
        _fold_sums_kernel, N * divide(G, groups), max(1, block_t * groups * block_d // 512), partials, weight, sum_dt_xhat, sum_dt, means,
        _rows(weight, C), N, C, D, count // D, T, block_t, groups, block_d,
    )  # fmt: skip


def _rows(parameter, C):
    """1 where each sample has its own row of the parameter, 0 where all share one: a factor of the sample's number."""
    return int(parameter is not None and parameter.numel() > C)


def _join(stats, x, weight, bias, N, C, channels_last, frozen):
    """N and channels_last. Samples that share given statistics and parameters are, channels last, more positions of one sample."""
    if not frozen:
        return N, channels_last
    channels_last = channels_last or x.numel() == N * C
    shared = stats.shape[1] == 1 and not _rows(weight, C) and not _rows(bias, C)
    return 1 if channels_last and shared else N, channels_last


def _configuration(x, N, C, num_groups, channels_last, backward, frozen):
    if not (x.is_cuda or INTERPRET):
        raise NotImplementedError(f"group_norm: Triton kernels run on CUDA tensors, not on {x.device.type}")
    return choose(N, C, x.numel() // (N * C), num_groups, x.element_size(), channels_last, backward, device_of(x.get_device()), frozen)


def _arguments(config, x, N, C, G, channels_last):
    """S, D; then C, D, S as the kernels take them: the contiguous one in vectors."""
    S, D = x.numel() // (N * C), C // G
    if channels_last:
        return S, D, C // config.V, D // config.V, S
    return S, D, C, D, S if config.SIDE else S // config.V


def _tiles(config, step, part, merge, x, N, C, G, channels_last):
    """Programs, counters if these meet, the sizes and the constants of the tiled kernels."""
    S, D, c_arg, _, s_arg = _arguments(config, x, N, C, G, channels_last)
    T, STEPS, OUTER = divide(S, config.chunk), config.STEPS, config.OUTER
    if step is APPLY and STEPS > 1:
        STEPS, OUTER = 1, 2 * OUTER  # it has no sums to keep, so twice the elements
    U = divide(S, STEPS * OUTER * config.BLOCK_S)
    meeting, BLOCK_P = None, min(1024, power_above(T * D))
    if step is MEET:
        team, sets = config.SET_C * U, N * divide(C, config.SET_C * config.BLOCK_C)
        teams = min(device_of(x.get_device()).resident // team, sets)
        meeting = counters(x, teams)
        programs, position = teams * team, (0, 0, sets * team, config.SET_C)
    else:
        n, block, samples, blocks = part
        programs = samples * blocks * U
        position = (n, block, programs, blocks)
    tiling = (channels_last, config.V, config.SIDE, config.LARGE, STEPS, OUTER, config.BLOCK_C, config.BLOCK_S)
    tiling += (bool(merge), BLOCK_P if merge or step is MEET else 1, step.value)
    return programs, meeting, (*position, U, N, c_arg, D, s_arg, T, config.chunk), tiling
