"""Batch norm on CUDA, a statistic for each channel of all samples and positions: choose a configuration, allocate the workspaces, launch."""

from . import group_norm
from .batch import _batch_norm_bwd_kernel, _batch_norm_fwd_kernel
from .config import choose_batch, device_of, divide, power_above
from .exchange import APPLY, MEET, PARTS, WHOLE
from .fold import fold, shorten
from .launch import INTERPRET, counters, launch


def batch_norm_fwd(
    y, stats, running_mean, running_var, x, weight, bias, residual, N, C, channels_last, momentum, eps, activation, negative_slope,
):  # fmt: skip
    """Write stats = (hi, lo, rstd, unbiased variance), y = act(t) unless None, and update the running statistics unless None."""
    # With another weight or bias for each sample (conditional batch norm), y is a group norm by given statistics.
    conditional = y is not None and _conditional(weight, bias, C)
    forward(
        _configuration(x, N, C, channels_last, False), None if conditional else y, stats, running_mean, running_var, x, weight, bias, residual,
        N, C, channels_last, momentum, eps, activation, negative_slope,
    )  # fmt: skip
    if conditional:
        group_norm.group_norm_fwd(y, stats, x, weight, bias, residual, N, C, C, channels_last, True, eps, activation, negative_slope)


def batch_norm_bwd(
    dx, dweight, dbias, dresidual, dy, x, stats, weight, bias, residual, N, C, channels_last, activation, negative_slope,
):  # fmt: skip
    """Write those of dx, dweight, dbias, dresidual that are not None."""
    tensors = (dy, x, stats, weight, bias, residual)
    if not _conditional(weight, bias, C):
        config = _configuration(x, N, C, channels_last, True)
        return backward(config, dx, dweight, dbias, dresidual, *tensors, N, C, channels_last, activation, negative_slope)
    options = (N, C, C, channels_last, True, activation, negative_slope)
    sums = stats.new_empty((2, N, C))
    group_norm.group_norm_bwd(None, *sums, None, *tensors, None, *options)
    if dx is not None or dresidual is not None:
        g = sums if weight is None else sums * weight.to(sums.dtype).view(-1, C)
        means = g.sum(1, keepdim=True) / (x.numel() // C)
        group_norm.group_norm_bwd(dx, None, None, dresidual, *tensors, means, *options)
    if dweight is not None or dbias is not None:
        fold(sums, dweight, dbias)


def forward(
    config, y, stats, running_mean, running_var, x, weight, bias, residual, N, C, channels_last, momentum, eps, activation, negative_slope,
):  # fmt: skip
    N, S = _samples(config, x, N, C, channels_last)
    running = (running_mean, running_var)
    partials = None
    if config.regime == "split":
        partials, chunk, count = group_norm.empty_moments(config, x, N, C), config.chunk, S
    elif config.regime != "held":
        partials, chunk, count = stats.new_empty((3, 1, divide(N, config.ROWS), C)), config.ROWS * S, N * S

    def read(step, y, stats, partials, running=(None, None)):
        if config.regime == "split":
            vectors = (None, None, None) if y is None else (weight, bias, residual)
            options = (N, C, C, channels_last, eps, activation, negative_slope)
            return group_norm.read(config, step, group_norm.parts(config, N, C, False)[0], False, y, stats, partials, x, *vectors, *options)
        scalars = (eps, momentum, negative_slope, activation)
        tensors = (x, weight, bias, residual, y, stats, *running, partials)
        _launch(_batch_norm_fwd_kernel, config, step, N, C, S, channels_last, tensors, scalars)

    if config.regime == "held" or config.regime == "meet" and y is not None:
        return read(WHOLE if config.regime == "held" else MEET, y, stats, partials, running)
    read(PARTS, None, None, partials)
    group_norm.fold_moments(partials, stats, 1, count, chunk, eps, *running, momentum)
    if y is not None:
        read(APPLY, y, stats, partials)


def backward(
    config, dx, dweight, dbias, dresidual, dy, x, stats, weight, bias, residual, N, C, channels_last, activation, negative_slope,
):  # fmt: skip
    N, S = _samples(config, x, N, C, channels_last)
    tensors = (dy, x, stats, weight, bias, residual)
    inputs = dx is not None or dresidual is not None
    partials = means = None
    if config.regime == "split":
        partials = group_norm.empty_sums(config, stats, x, N, C)
    elif config.regime != "held":
        partials = stats.new_empty((2, divide(N, config.ROWS), C))
    if partials is not None:
        means = stats.new_empty((2, 1, C))

    def sweep(step, means, dx, dweight, dbias, dresidual):
        if config.regime == "split":
            options = (N, C, C, channels_last, activation, negative_slope)
            part = group_norm.parts(config, N, C, False)[0]
            return group_norm.sweep(config, step, part, False, partials, dx, dresidual, means, *tensors, *options)
        outputs = (means, dx, dweight, dbias, dresidual, partials)
        _launch(_batch_norm_bwd_kernel, config, step, N, C, S, channels_last, (*tensors, *outputs), (negative_slope, activation))

    if config.regime == "held" or config.regime == "meet" and inputs:
        return sweep(WHOLE if config.regime == "held" else MEET, means, dx, dweight, dbias, dresidual)
    sweep(PARTS, None, None, None, None, None)
    group_norm.fold_sums(shorten(partials, 1), weight, dweight, dbias, means, C, N * S)
    if inputs:
        sweep(APPLY, means, dx, None, None, dresidual)


def _launch(kernel, config, step, N, C, S, channels_last, tensors, scalars):
    sizes = (N, C // config.V, S) if channels_last else (N, C, S // config.V)
    T, blocks, meeting = divide(N, config.ROWS), divide(C, config.BLOCK_C), None
    programs = tiles = blocks * T
    if step is MEET:
        teams = min(device_of(tensors[0].get_device()).resident // T, blocks)
        programs, meeting = teams * T, counters(tensors[0], teams)
    FOLD = step is MEET and T * config.BLOCK_C <= 1024
    BLOCK_P = min(1024, power_above(T)) if step is MEET else 1
    launch(
        kernel, programs, config.num_warps, *tensors, meeting, tiles, *sizes, *scalars,
        channels_last, config.V, config.LARGE, config.ROWS, N % config.ROWS == 0, config.BLOCK_C, config.BLOCK_S, FOLD, BLOCK_P, step.value,
        cooperative=step is MEET,
    )  # fmt: skip


def _conditional(weight, bias, C):
    return any(parameter is not None and parameter.numel() > C for parameter in (weight, bias))


def _samples(config, x, N, C, channels_last):
    """N and S: channels last, the kernels of split.py see positions of one sample, those of batch.py samples of one position."""
    S = x.numel() // (N * C)
    if not channels_last:
        return N, S
    return (1, N * S) if config.regime == "split" else (N * S, 1)


def _configuration(x, N, C, channels_last, backward):
    if not (x.is_cuda or INTERPRET):
        raise NotImplementedError(f"batch_norm: Triton kernels run on CUDA tensors, not on {x.device.type}")
    return choose_batch(N, C, x.numel() // (N * C), x.element_size(), channels_last, backward, device_of(x.get_device()))
