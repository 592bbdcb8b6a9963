"""Batch norm on CUDA, a statistic for each channel of all samples and positions: choose a configuration, allocate the workspaces, launch."""

from . import group_norm
from .batch import _batch_norm_bwd_kernel, _batch_norm_fwd_kernel
from .config import choose_batch, device_of, divide
from .fold import fold, shorten
from .launch import INTERPRET, launch
from .rows import APPLY, PARTS, WHOLE


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
    if config.regime == "split":
        partials = group_norm.find_moments(config, x, N, C, channels_last)
        group_norm.fold_moments(partials, stats, 1, S, config.OUTER * config.BLOCK_S, eps, *running, momentum)
        if y is not None:
            group_norm.forward(config, y, stats, x, weight, bias, residual, N, C, C, channels_last, True, eps, activation, negative_slope)
        return

    def read(step, *outputs):
        scalars = (eps, momentum, negative_slope, activation)
        _launch(_batch_norm_fwd_kernel, config, N, C, S, channels_last, (x, weight, bias, residual, *outputs), scalars, step)

    if config.regime == "held":
        return read(WHOLE, y, stats, *running, None)
    partials = stats.new_empty((3, 1, divide(N, config.ROWS), C))
    read(PARTS, None, None, None, None, partials)
    group_norm.fold_moments(partials, stats, 1, N * S, config.ROWS * S, eps, *running, momentum)
    if y is not None:
        read(APPLY, y, stats, None, None, None)


def backward(
    config, dx, dweight, dbias, dresidual, dy, x, stats, weight, bias, residual, N, C, channels_last, activation, negative_slope,
):  # fmt: skip
    N, S = _samples(config, x, N, C, channels_last)
    tensors = (dy, x, stats, weight, bias, residual)

    def read(step, *outputs):
        _launch(_batch_norm_bwd_kernel, config, N, C, S, channels_last, (*tensors, *outputs), (negative_slope, activation), step)

    def sweep(with_sums, dx, dresidual, means):
        if config.regime == "split":
            return group_norm.sweep(config, with_sums, dx, dresidual, means, *tensors, N, C, C, channels_last, activation, negative_slope)
        sums = stats.new_empty((2, divide(N, config.ROWS), C)) if with_sums else None
        read(PARTS if with_sums else APPLY, means, dx, None, None, dresidual, sums)
        return sums

    if config.regime == "held":
        return read(WHOLE, None, dx, dweight, dbias, dresidual, None)
    partials, means = sweep(True, None, None, None), stats.new_empty((2, 1, C))
    group_norm.fold_sums(shorten(partials, 1), weight, dweight, dbias, means, C, N * S)
    if dx is not None or dresidual is not None:
        sweep(False, dx, dresidual, means)


def _launch(kernel, config, N, C, S, channels_last, tensors, scalars, step):
    sizes = (N, C // config.V, S) if channels_last else (N, C, S // config.V)
    launch(
        kernel, divide(C, config.BLOCK_C) * divide(N, config.ROWS), config.num_warps, *tensors, *sizes, *scalars,
        channels_last, config.V, config.LARGE, config.ROWS, N % config.ROWS == 0, config.BLOCK_C, config.BLOCK_S, step.value,
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
