"""Normalization in plain PyTorch: the oracle of the tests, the backend of last resort and the rule for ``torch.func``.

Everything is seen as ``(N, C, S)``: samples, channels, positions. What shares a statistic is a row of the `Sets.split` view: ``D = C/num_groups``
channels and all positions of a sample (group norm, instance norm) or of all samples (batch norm), or those channels at one position (layer norm,
RMS norm). With ``x - mean`` taken first and the mean kept as two numbers (``mean + mean_lo``)::

    x_hat = (x - mean - mean_lo) * rstd        rstd = 1 / sqrt(var + eps), var biased; RMS: mean = 0, var = mean(x^2)
    t     = x_hat * weight + bias (+ residual)
    y     = act(t)

    dt    = dy * act'(t)
    dx    = rstd * (g - mean(g) - x_hat * mean(g * x_hat))        g = weight * dt, means over the row; RMS: without mean(g)
    dweight = sum dt * x_hat        dbias = sum dt        dresidual = dt

16-bit and float32 inputs are computed in float32, float64 in float64.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from normops.activations import ACTIVATIONS, BY_CODE, CODES
from normops.maps import activation_moments_fwd  # noqa: F401 (functions of a backend)
from normops.weights import analytic_norm_weight_bwd, analytic_norm_weight_fwd  # noqa: F401

HUGE = 2.0**50  # deviations above this are scaled down before they are squared


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics are computed and saved: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Sets(NamedTuple):
    """How elements of ``(N, C, S)`` share statistics: the groups of channels, for all positions together or for each, of each sample or of all
    (`batch`; every channel is a group then)."""

    num_groups: int = 1
    each_position: bool = False
    centered: bool = True
    batch: bool = False

    def split(self, x: Tensor) -> Tensor:
        """``(N, C, S)`` as rows ``(N, G, D*S)``, ``(N, G, S, D)`` or ``(1, C, N*S)``."""
        if self.batch:
            return x.transpose(0, 1).flatten(1).unsqueeze(0)
        grouped = x.unflatten(1, (self.num_groups, x.shape[1] // self.num_groups))
        return grouped.transpose(2, 3) if self.each_position else grouped.flatten(2)

    def join(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `split`."""
        if self.batch:
            return rows.reshape(shape[1], shape[0], shape[2]).transpose(0, 1)
        return (rows.transpose(2, 3) if self.each_position else rows).reshape(shape)


def normalize(x: Tensor, sets: Sets, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``x_hat`` of x ``(N, C, S)``, with mean, mean_lo and rstd of its rows."""
    rows = sets.split(x.to(accumulator(x.dtype))).contiguous()  # torch sums pairwise along contiguous rows only
    first = rows[..., :1]
    mean = mean_lo = torch.zeros_like(first)
    d = rows
    if sets.centered:
        mean = (first + (rows - first).mean(-1, keepdim=True)).detach()
        d = rows - mean
        mean_lo = d.mean(-1, keepdim=True)
        d = d - mean_lo
    size = d.detach().abs().amax(-1, keepdim=True)
    size = torch.where(size > HUGE, size, torch.ones_like(size))  # cancels in x_hat: a constant for the gradient
    d = d / size
    rstd = torch.rsqrt((d * d).mean(-1, keepdim=True) + eps / size / size)
    return sets.join(d * rstd, x.shape), mean, mean_lo, rstd / size


def over(vectors: Tensor, x: Tensor) -> Tensor:
    """Vectors ``(C,)`` or ``(R, C)``, each for N/R samples, shaped to broadcast against x ``(N, C, S)``."""
    samples, channels = x.shape[:2]
    vectors = vectors.to(x.dtype).reshape(-1, channels, 1)
    return vectors if len(vectors) in (1, samples) else vectors.repeat_interleave(samples // len(vectors), 0)


def folded(sums: Tensor, vectors: Tensor) -> Tensor:
    """The gradient of `vectors` from sums per sample and channel: the adjoint of `over`."""
    rows = vectors.numel() // sums.shape[1]
    return sums.unflatten(0, (rows, len(sums) // max(1, rows))).sum(1).reshape(vectors.shape)


def affine(x_hat: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, weight_offset: float = 0.0) -> Tensor:
    """The argument of the activation."""
    t = x_hat
    if weight is not None:
        t = t * (over(weight, t) + weight_offset)
    if bias is not None:
        t = t + over(bias, t)
    if residual is not None:
        t = t + residual.to(t.dtype)
    return t


def norm(
    x: Tensor,
    sets: Sets,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stats: Tensor | None = None,
    weight_offset: float = 0.0,
    eps: float = 1e-5,
    activation: str = "none",
    negative_slope: float = 0.01,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``act(x_hat * weight + bias + residual)`` of ``(N, C, S)``, differentiable any number of times; with `stats`, these are given."""
    x_hat = normalize(x, sets, eps)[0] if stats is None else sets.join(saved_x_hat(x, stats, sets)[0], x.shape)
    t = affine(x_hat, weight, bias, residual, weight_offset)
    return ACTIVATIONS[activation](t, negative_slope)[0].to(out_dtype or x.dtype)


def positions(x: Tensor) -> Tensor:
    """``(N, C, *spatial)`` as ``(N, C, S)``."""
    return x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)


def moments(x: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and ``sqrt(var + eps)`` (N, G) of groups, differentiable any number of times."""
    rows = Sets(num_groups).split(positions(x).to(accumulator(x.dtype))).contiguous()
    first = rows[..., :1].detach()
    mean = first + (rows - first).mean(-1, keepdim=True)
    d = rows - mean
    size = d.detach().abs().amax(-1, keepdim=True)
    size = torch.where(size > HUGE, size, torch.ones_like(size))
    std = size * ((d / size).square().mean(-1, keepdim=True) + eps / size / size).sqrt()
    return mean.squeeze(-1), std.squeeze(-1)


def statistics(x: Tensor, num_groups: int, eps: float) -> Tensor:
    """What ``group_norm_stats`` gives: (3, N, G)."""
    _, *found = normalize(positions(x), Sets(num_groups), eps)
    return torch.stack([value.squeeze(-1) for value in found])


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    stats: Tensor | None = None,
) -> Tensor:
    """`norm` of ``(N, C, *spatial)``, a row being a group of channels with all positions."""
    if x.numel() == 0:
        return x.to(out_dtype or x.dtype, copy=True)
    residual = None if residual is None else positions(residual)
    y = norm(
        positions(x), Sets(num_groups), weight, bias, residual, stats,
        eps=eps, activation=activation, negative_slope=negative_slope, out_dtype=out_dtype,
    )  # fmt: skip
    return y.reshape(x.shape)


def batch_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`norm` of ``(N, C, *spatial)``, a row being a channel of all samples."""
    if x.numel() == 0:
        return x.to(out_dtype or x.dtype, copy=True)
    y = norm(
        positions(x), Sets(x.shape[1], batch=True), weight, bias, None if residual is None else positions(residual), None,
        eps=eps, activation=activation, negative_slope=negative_slope, out_dtype=out_dtype,
    )  # fmt: skip
    return y.reshape(x.shape)


def batch_statistics(x: Tensor, eps: float) -> Tensor:
    """What ``batch_norm_stats`` gives: (4, 1, C)."""
    x = positions(x)
    sets = Sets(x.shape[1], batch=True)
    _, *found = normalize(x, sets, eps)
    return torch.stack([value.squeeze(-1) for value in (*found, _unbiased(x, sets).to(found[0].dtype))])


def _unbiased(x: Tensor, sets: Sets) -> Tensor:
    """The unbiased variance of rows, 0 of a single value."""
    rows = sets.split(x.double())
    d = rows - rows.mean(-1, keepdim=True)
    return d.square().sum(-1, keepdim=True) / max(1, rows.shape[-1] - 1)


def blend(mean: Tensor, std: Tensor, rho: Tensor, weight: Tensor | None, bias: Tensor | None, given: Tensor | None) -> tuple[Tensor, Tensor]:
    """The vectors (N, C) that turn instance norm, with these mean and std = sqrt(var + eps) (N, C), into batch-instance norm::

        (rho*x_B + (1 - rho)*x_I) * weight + bias        x_B = x_I * std/std_B + (mean - mean_B)/std_B

    Batch mean and std are `given` (2, C), or follow from those of instances: ``std_B^2 = mean(std^2) + mean((mean - mean_B)^2)``.
    """
    mean_b, std_b = batch_moments(mean, std, given)
    rho = rho.to(mean.dtype)
    gain = rho / std_b
    scale, shift = gain * std + (1 - rho), gain * (mean - mean_b)
    if weight is not None:
        scale, shift = scale * weight, shift * weight
    return scale, shift if bias is None else shift + bias


def batch_moments(mean: Tensor, std: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and std of the batch: `given`, or from those of its instances."""
    if given is not None:
        return given[0], given[1]
    mean_b = mean.mean(0)
    return mean_b, (std.square().mean(0) + (mean - mean_b).square().mean(0)).sqrt()


def blend_gradients(mean, std, rho, weight, bias, given, dscale, dshift):
    """The gradients of `blend` for mean, std, rho, weight and bias."""
    mean_b, std_b = batch_moments(mean, std, given)
    dtype, rho = rho.dtype, rho.to(mean.dtype)
    deviation, gain = mean - mean_b, rho / std_b
    scale, shift = gain * std + (1 - rho), gain * deviation
    dweight = None if weight is None else folded(dscale * scale + dshift * shift, weight).to(weight.dtype)
    dbias = None if bias is None else folded(dshift, bias).to(bias.dtype)
    if weight is not None:
        dscale, dshift = dscale * weight, dshift * weight
    along = dscale * std + dshift * deviation
    drho = (along / std_b - dscale).sum(0).to(dtype)
    dmean, dstd = dshift * gain, dscale * gain
    if given is None:
        dstd_b = -along.sum(0) * gain / std_b / (std_b * len(mean))
        dmean = dmean - dmean.mean(0) + dstd_b * deviation
        dstd = dstd + dstd_b * std
    return dmean, dstd, drho, dweight, dbias


def update_running(running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, momentum: float) -> None:
    """``running += momentum * (value - running)`` in place, rounded once to the buffers' dtype."""
    for running, value in ((running_mean, mean), (running_var, var)):
        dtype = accumulator(running.dtype)
        if running.dtype == dtype:
            running.lerp_(value.to(dtype), momentum)
        else:
            running.copy_(torch.lerp(running.to(dtype), value.to(dtype), momentum))


def row_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    ndim: int = 1,
    centered: bool = True,
    weight_offset: float = 0.0,
    eps: float = 1e-5,
    activation: str = "none",
    negative_slope: float = 0.01,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`norm` over the last `ndim` dimensions of x, or with 0 over dimension 1."""
    if x.numel() == 0:
        return x.to(out_dtype or x.dtype, copy=True)
    shape = (*x.shape[:2], -1) if ndim == 0 else (-1, math.prod(x.shape[-ndim:]), 1)
    y = norm(
        x.reshape(shape), Sets(1, True, centered), weight, bias, None if residual is None else residual.reshape(shape), None,
        weight_offset, eps, activation, negative_slope, out_dtype,
    )  # fmt: skip
    return y.reshape(x.shape)


def saved_x_hat(x: Tensor, stats: Tensor, sets: Sets) -> tuple[Tensor, Tensor]:
    """The rows of ``x_hat`` from the statistics of the forward pass (``(3 or more, N or 1, ...)``, RMS ``(1, N, ...)``), and ``rstd``."""
    rows = sets.split(x.to(stats.dtype))
    samples = 1 if stats[0].numel() < math.prod(rows.shape[:-1]) else rows.shape[0]
    stats = stats.reshape(stats.shape[0], samples, *rows.shape[1:-1], 1)
    if not sets.centered:
        return rows * stats[0], stats[0]
    return (rows - stats[0] - stats[1]) * stats[2], stats[2]


# ---- the backend: dense memory, (N, C, S) or with channels_last (N, S, C) ----


def _seen(x: Tensor | None, N: int, C: int, channels_last: bool = False) -> Tensor | None:
    """The memory of x as ``(N, C, S)``."""
    if x is None:
        return None
    S = x.numel() // (N * C)
    return x.as_strided((N, C, S), (C * S, 1, C) if channels_last else (C * S, S, 1))


def _forward(y, stats, x, weight, bias, residual, sets, frozen, weight_offset, eps, activation, negative_slope) -> None:
    if frozen:
        x_hat = sets.join(saved_x_hat(x, stats, sets)[0], x.shape)
    else:
        x_hat, *moments = normalize(x, sets, eps)
        if stats is not None:
            for saved, value in zip(stats, moments if sets.centered else moments[2:], strict=True):
                saved.view(-1).copy_(value.flatten())
    if y is not None:
        y.copy_(BY_CODE[activation](affine(x_hat, weight, bias, residual, weight_offset), negative_slope)[0])


def _backward(
    dx, dweight, dbias, dresidual, dy, dtotal, x, stats, weight, bias, residual, means, sets, frozen, weight_offset, activation, negative_slope
) -> None:
    rows, rstd = saved_x_hat(x, stats, sets)
    x_hat = sets.join(rows, x.shape)
    dt = dy.to(stats.dtype)
    if activation != CODES["none"]:
        dt = dt * BY_CODE[activation](affine(x_hat, weight, bias, residual, weight_offset), negative_slope)[1]
    for out, value in ((dweight, dt * x_hat), (dbias, dt)):
        if out is not None:
            out.copy_(folded(value.contiguous().sum(2), out))
    if dresidual is not None:
        dresidual.copy_(dt)
    if dx is not None:
        g = sets.split(dt if weight is None else dt * (over(weight, dt) + weight_offset)).contiguous()
        if not frozen:
            rows = rows.contiguous()
            g = g - rows * (g * rows).mean(-1, keepdim=True) - (g.mean(-1, keepdim=True) if sets.centered else 0)
        elif means is not None:
            first, second = means.reshape(2, -1, g.shape[1], 1)
            g = g - rows * first - second
        g = sets.join(rstd * g, x.shape)
        dx.copy_(g if dtotal is None else g + dtotal)


@torch.no_grad()
def group_norm_fwd(y, stats, x, weight, bias, residual, N, C, num_groups, channels_last, frozen, eps, activation, negative_slope) -> None:
    y, x, residual = (_seen(value, N, C, channels_last) for value in (y, x, residual))
    _forward(y, stats, x, weight, bias, residual, Sets(num_groups), frozen, 0.0, eps, activation, negative_slope)


@torch.no_grad()
def group_norm_bwd(
    dx, dweight, dbias, dresidual, dy, x, stats, weight, bias, residual, means, N, C, num_groups, channels_last, frozen, activation, negative_slope
) -> None:
    dx, dresidual, dy, x, residual = (_seen(value, N, C, channels_last) for value in (dx, dresidual, dy, x, residual))
    sets = Sets(num_groups)
    _backward(dx, dweight, dbias, dresidual, dy, None, x, stats, weight, bias, residual, means, sets, frozen, 0.0, activation, negative_slope)


@torch.no_grad()
def batch_norm_fwd(
    y, stats, running_mean, running_var, x, weight, bias, residual, N, C, channels_last, momentum, eps, activation, negative_slope
) -> None:
    y, x, residual = (_seen(value, N, C, channels_last) for value in (y, x, residual))
    sets = Sets(C, batch=True)
    _forward(y, stats[:3], x, weight, bias, residual, sets, False, 0.0, eps, activation, negative_slope)
    stats[3].view(-1).copy_(_unbiased(x, sets).flatten())
    if running_mean is not None:
        update_running(running_mean.view(-1), running_var.view(-1), (stats[0] + stats[1]).view(-1), stats[3].view(-1), momentum)


@torch.no_grad()
def batch_norm_bwd(dx, dweight, dbias, dresidual, dy, x, stats, weight, bias, residual, N, C, channels_last, activation, negative_slope) -> None:
    dx, dresidual, dy, x, residual = (_seen(value, N, C, channels_last) for value in (dx, dresidual, dy, x, residual))
    sets = Sets(C, batch=True)
    _backward(dx, dweight, dbias, dresidual, dy, None, x, stats, weight, bias, residual, None, sets, False, 0.0, activation, negative_slope)


@torch.no_grad()
def row_norm_fwd(
    y, total, stats, x, addend, weight, bias, residual, N, C, num_groups, centered, weight_offset, eps, activation, negative_slope
) -> None:
    if addend is not None:
        x = torch.add(x, addend, out=total)
    y, x, residual = (_seen(value, N, C) for value in (y, x, residual))
    _forward(y, stats, x, weight, bias, residual, Sets(num_groups, True, centered), False, weight_offset, eps, activation, negative_slope)


@torch.no_grad()
def row_norm_bwd(
    dx, dweight, dbias, dresidual, dy, dtotal, x, stats, weight, bias, residual, N, C, num_groups, centered, weight_offset, activation, negative_slope
) -> None:
    dx, dresidual, dy, dtotal, x, residual = (_seen(value, N, C) for value in (dx, dresidual, dy, dtotal, x, residual))
    sets = Sets(num_groups, True, centered)
    _backward(
        dx, dweight, dbias, dresidual, dy, dtotal, x, stats, weight, bias, residual, None, sets, False, weight_offset, activation, negative_slope
    )
