"""Normalization in plain PyTorch: the oracle of the tests, the backend of last resort and the rule for ``torch.func``.

Everything is seen as ``(N, C, S)``: samples, channels, positions. What shares a statistic is a row of the `Sets.split` view: ``D = C/num_groups``
channels and all positions of a sample (group norm, instance norm), or those channels at one position (layer norm, RMS norm). With ``x - mean``
taken first and the mean kept as two numbers (``mean + mean_lo``)::

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

SQRT_HALF = math.sqrt(0.5)
SQRT_2_OVER_PI = math.sqrt(2 / math.pi)
INV_SQRT_2PI = 1 / math.sqrt(2 * math.pi)
GELU_TANH_CUBIC = 0.044715
HUGE = 2.0**50  # deviations above this are scaled down before they are squared


def _silu(t: Tensor, slope: float) -> tuple[Tensor, Tensor, Tensor]:
    s = torch.sigmoid(t)
    return t * s, s * (1 + t * (1 - s)), s * (1 - s) * (2 + t * (1 - 2 * s))


def _gelu(t: Tensor, slope: float) -> tuple[Tensor, Tensor, Tensor]:
    cdf = 0.5 * (1 + torch.erf(t * SQRT_HALF))
    pdf = torch.exp(-0.5 * t * t) * INV_SQRT_2PI
    return t * cdf, cdf + t * pdf, pdf * (2 - t * t)


def _gelu_tanh(t: Tensor, slope: float) -> tuple[Tensor, Tensor, Tensor]:
    u = SQRT_2_OVER_PI * (t + GELU_TANH_CUBIC * t * t * t)
    du = SQRT_2_OVER_PI * (1 + 3 * GELU_TANH_CUBIC * t * t)
    th = torch.tanh(u)
    e = torch.exp(-2 * u.abs())
    sech2 = 4 * e / (1 + e).square()  # 1 - th*th without its cancellation
    first = 0.5 * (1 + th) + 0.5 * t * sech2 * du
    second = sech2 * du * (1 - t * th * du) + 0.5 * t * sech2 * (6 * GELU_TANH_CUBIC * SQRT_2_OVER_PI * t)
    return 0.5 * t * (1 + th), first, second


def _tanh(t: Tensor, slope: float) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.tanh(t)
    return y, 1 - y * y, -2 * y * (1 - y * y)


def _sigmoid(t: Tensor, slope: float) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.sigmoid(t)
    return y, y * (1 - y), y * (1 - y) * (1 - 2 * y)


def _relu(t: Tensor, slope: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.relu(t), (t > 0).to(t.dtype), torch.zeros_like(t)


def _leaky_relu(t: Tensor, slope: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.where(t > 0, t, t * slope), torch.where(t > 0, torch.ones_like(t), slope), torch.zeros_like(t)


def _hardswish(t: Tensor, slope: float) -> tuple[Tensor, Tensor, Tensor]:
    inside = (t > -3) & (t < 3)
    first = torch.where(inside, t / 3 + 0.5, (t >= 3).to(t.dtype))
    return t * torch.clamp(t / 6 + 0.5, 0, 1), first, inside.to(t.dtype) / 3


# name -> function of t and slope that gives (act, act', act'')
ACTIVATIONS = {
    "none": lambda t, slope: (t, torch.ones_like(t), torch.zeros_like(t)),
    "relu": _relu,
    "leaky_relu": _leaky_relu,
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "hardswish": _hardswish,
}
CODES = {name: code for code, name in enumerate(ACTIVATIONS)}  # what the kernels call them
_BY_CODE = tuple(ACTIVATIONS.values())


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics are computed and saved: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Sets(NamedTuple):
    """How elements of ``(N, C, S)`` share statistics: the groups of channels, for all positions together or for each."""

    num_groups: int = 1
    each_position: bool = False
    centered: bool = True

    def split(self, x: Tensor) -> Tensor:
        """``(N, C, S)`` as rows ``(N, G, D*S)`` or ``(N, G, S, D)``."""
        grouped = x.unflatten(1, (self.num_groups, x.shape[1] // self.num_groups))
        return grouped.transpose(2, 3) if self.each_position else grouped.flatten(2)

    def join(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `split`."""
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
    channels = sums.shape[1]
    return sums.reshape(vectors.numel() // channels, -1, channels).sum(1).reshape(vectors.shape)


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
    """The rows of ``x_hat`` from the statistics of the forward pass (``(3, N or 1, ...)``, RMS ``(1, N, ...)``), and ``rstd``."""
    rows = sets.split(x.to(stats.dtype))
    samples = 1 if stats.numel() < stats.shape[0] * rows[..., 0].numel() else rows.shape[0]
    stats = stats.reshape(stats.shape[0], samples, *rows.shape[1:-1], 1)
    d = rows - stats[0] - stats[1] if sets.centered else rows
    return d * stats[-1], stats[-1]


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
        y.copy_(_BY_CODE[activation](affine(x_hat, weight, bias, residual, weight_offset), negative_slope)[0])


def _backward(
    dx, dweight, dbias, dresidual, dy, dtotal, x, stats, weight, bias, residual, sets, frozen, weight_offset, activation, negative_slope
) -> None:
    rows, rstd = saved_x_hat(x, stats, sets)
    x_hat = sets.join(rows, x.shape)
    dt = dy.to(stats.dtype)
    if activation != CODES["none"]:
        dt = dt * _BY_CODE[activation](affine(x_hat, weight, bias, residual, weight_offset), negative_slope)[1]
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
        g = sets.join(rstd * g, x.shape)
        dx.copy_(g if dtotal is None else g + dtotal)


@torch.no_grad()
def group_norm_fwd(y, stats, x, weight, bias, residual, N, C, num_groups, channels_last, frozen, eps, activation, negative_slope) -> None:
    y, x, residual = (_seen(value, N, C, channels_last) for value in (y, x, residual))
    _forward(y, stats, x, weight, bias, residual, Sets(num_groups), frozen, 0.0, eps, activation, negative_slope)


@torch.no_grad()
def group_norm_bwd(
    dx, dweight, dbias, dresidual, dy, x, stats, weight, bias, residual, N, C, num_groups, channels_last, frozen, activation, negative_slope
) -> None:
    dx, dresidual, dy, x, residual = (_seen(value, N, C, channels_last) for value in (dx, dresidual, dy, x, residual))
    _backward(dx, dweight, dbias, dresidual, dy, None, x, stats, weight, bias, residual, Sets(num_groups), frozen, 0.0, activation, negative_slope)


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
    _backward(dx, dweight, dbias, dresidual, dy, dtotal, x, stats, weight, bias, residual, sets, False, weight_offset, activation, negative_slope)
