"""The activations that norms fuse, with their first two derivatives."""

import math

import torch
from torch import Tensor

SQRT_HALF = math.sqrt(0.5)
SQRT_2_OVER_PI = math.sqrt(2 / math.pi)
INV_SQRT_2PI = 1 / math.sqrt(2 * math.pi)
GELU_TANH_CUBIC = 0.044715


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
BY_CODE = tuple(ACTIVATIONS.values())
