"""Group normalization in plain PyTorch: the oracle of the tests, the backend of last resort and the rule for ``torch.func``.

With ``n`` elements per group, ``x - mean`` taken first and the mean kept as two numbers (``mean + mean_lo``)::

    x_hat = (x - mean - mean_lo) * rstd        rstd = 1 / sqrt(var + eps), var biased
    t     = x_hat * weight + bias (+ residual)
    y     = act(t)

    dt    = dy * act'(t)
    dx    = rstd * (g - mean(g) - x_hat * mean(g * x_hat))        g = weight * dt, means over the group
    dweight = sum dt * x_hat        dbias = sum dt        dresidual = dt

16-bit and float32 inputs are computed in float32, float64 in float64.
"""

import math

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


def grouped(x: Tensor, num_groups: int) -> Tensor:
    """``(N, C, *spatial)`` as ``(N, G, C/G, *spatial)``; a view for every memory format."""
    return x.unflatten(1, (num_groups, x.shape[1] // num_groups))


def normalize(x: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``x_hat`` in x's shape, with mean, mean_lo and rstd of its groups, (N, G, 1)."""
    rows = grouped(x.to(accumulator(x.dtype)), num_groups).flatten(2).contiguous()  # torch sums pairwise along contiguous rows only
    first = rows[..., :1]
    mean = (first + (rows - first).mean(2, keepdim=True)).detach()
    d = rows - mean
    mean_lo = d.mean(2, keepdim=True)
    d = d - mean_lo
    size = d.detach().abs().amax(2, keepdim=True)
    size = torch.where(size > HUGE, size, torch.ones_like(size))  # cancels in x_hat: a constant for the gradient
    d = d / size
    rstd = torch.rsqrt((d * d).mean(2, keepdim=True) + eps / size / size)
    return (d * rstd).reshape(x.shape), mean, mean_lo, rstd / size


def over(vector: Tensor, t: Tensor) -> Tensor:
    """A ``(C,)`` or ``(N, C)`` vector, shaped to broadcast against ``(N, C, *spatial)``."""
    return vector.to(t.dtype)[(...,) + (None,) * (t.dim() - 2)]


def affine(x_hat: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """The argument of the activation."""
    t = x_hat
    if weight is not None:
        t = t * over(weight, t)
    if bias is not None:
        t = t + over(bias, t)
    if residual is not None:
        t = t + residual.to(t.dtype)
    return t


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
) -> Tensor:
    """``act(x_hat * weight + bias + residual)``, differentiable any number of times. ``weight``, ``bias``: ``(C,)`` or ``(N, C)``."""
    if x.numel() == 0:
        return x.to(out_dtype or x.dtype, copy=True)
    t = affine(normalize(x, num_groups, eps)[0], weight, bias, residual)
    return ACTIVATIONS[activation](t, negative_slope)[0].to(out_dtype or x.dtype)


@torch.no_grad()
def group_norm_fwd(y, stats, x, weight, bias, residual, num_groups, channels_last, eps, activation, negative_slope) -> None:
    x_hat, *moments = normalize(x, num_groups, eps)
    y.copy_(_BY_CODE[activation](affine(x_hat, weight, bias, residual), negative_slope)[0])
    if stats is not None:
        for saved, value in zip(stats, moments, strict=True):
            saved.copy_(value.flatten(1))


def saved_x_hat(x: Tensor, stats: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """``grouped(x_hat)`` from the statistics of the forward pass, and ``rstd``."""
    mean, mean_lo, rstd = stats[(...,) + (None,) * (x.dim() - 1)]
    return (grouped(x.to(stats.dtype), num_groups) - mean).sub_(mean_lo).mul_(rstd), rstd


@torch.no_grad()
def group_norm_bwd(
    dx, dweight, dbias, dresidual, dy, x, stats, weight, bias, residual, num_groups, channels_last, activation, negative_slope
) -> None:
    x_hat, rstd = saved_x_hat(x, stats, num_groups)
    dt = dy.to(stats.dtype)
    if activation != CODES["none"]:
        dt = dt * _BY_CODE[activation](affine(x_hat.flatten(1, 2), weight, bias, residual), negative_slope)[1]
    for out, value in ((dweight, dt * x_hat.flatten(1, 2)), (dbias, dt)):
        if out is not None:
            sums = value.flatten(2).contiguous().sum(2) if value.dim() > 2 else value
            out.copy_(sums if out.dim() == 2 else sums.sum(0))
    if dresidual is not None:
        dresidual.copy_(dt)
    if dx is not None:
        g = grouped(dt if weight is None else dt * over(weight, dt), num_groups).flatten(2).contiguous()
        x_hat = x_hat.flatten(2).contiguous()
        g = g - g.mean(2, keepdim=True) - x_hat * (g * x_hat).mean(2, keepdim=True)
        dx.copy_((rstd.flatten(2) * g).reshape(x.shape))
