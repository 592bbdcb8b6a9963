"""Mean and variance of f(X) for X ~ N(mu, v), and their derivatives, for the activations of deep networks; in float64.

Every map gives m = E f(X), V = Var f(X) and dm/dmu, dm/dv, dV/dmu, dV/dv. With s = sqrt(v), a = mu/s, the normal density phi and distribution
Phi of a, and g(a) = phi + a*Phi = E max(0, a + t), R(a) = Var max(0, a + t) = Phi - g(a)*g(-a)::

    relu   m = s*g     V = v*R     dm/dmu = Phi     dm/dv = phi/(2s)     dV/dmu = 2*s*g*Phi(-a)     dV/dv = Phi - g*phi

Second moments minus squared means cancel in the tails (in float32: negative variances at a = -10), so no map forms them. What has no closed form
is integrated over x = mu + s*t, relative to f(mu); the derivatives by Stein's identities, without a division by s::

    m - f(mu) = E[f(x) - f(mu)]     dm/dmu = E f'     dm/dv = E f''/2     dV/dmu = 2*Cov(f, f')     dV/dv = E f'^2 + Cov(f, f'')

Smooth functions by the trapezoid rule, whose error falls exponentially in the distance of the nearest pole over the step; functions with kinks by
Gauss-Legendre between the kinks, where f'' has the jump of f' as a delta.

Where v is 0: m = f(mu), V = 0, dm/dmu = f'(mu), dV/dv = f'(mu)^2 and, where the limits are infinite or differ, 0 for the others.

Sources: Clark 1961 (maximum), Frey & Hinton 1999 (rectifier), Shekhovtsov & Flach 2018 (arXiv 1803.10560). The stable forms are our own.
"""

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from normops.activations import ACTIVATIONS

Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
SQRT_HALF = math.sqrt(0.5)
SQRT_2PI = math.sqrt(2 * math.pi)
REACH = 8.5  # standard deviations beyond which lies less than 2e-17
PANEL = 64  # nodes between two kinks
STEPS = 16384  # at most, of the trapezoid rule
TINY = 1e-40  # variances that are no more than this are taken as 0


def density(a: Tensor) -> Tensor:
    """phi(a)."""
    return torch.exp(-0.5 * a * a) / SQRT_2PI


def distribution(a: Tensor) -> Tensor:
    """Phi(a)."""
    return 0.5 * torch.special.erfc(a * -SQRT_HALF)


def ramp(a: Tensor) -> tuple[Tensor, Tensor]:
    """g(a) and R(a), each to its own relative precision."""
    t = a.clamp(-40, -2).neg()
    mills = math.sqrt(math.pi / 2) * torch.special.erfcx(t * SQRT_HALF)
    far = density(t)
    rest = 1 - t * mills
    body = a.clamp_min(-2)
    phi, cdf = density(body), distribution(body)
    g = phi + body * cdf
    tail = a < -2
    return (
        torch.where(tail, far * rest, g),
        torch.where(tail, far * ((1 + t * t) * mills - t - far * rest * rest), cdf - g * (phi - body * distribution(-body))),
    )


def leaky_relu(mu: Tensor, v: Tensor, slope: float = 0.01) -> Six:
    """slope*X + (1 - slope)*max(0, X), of any slope."""
    s = v.sqrt()
    a = mu / s
    g, r = ramp(a)
    phi, cdf = density(a), distribution(a)
    rest = 1 - slope
    return (
        slope * mu + rest * s * g,
        v * (slope * slope + 2 * slope * rest * cdf + rest * rest * r),
        slope + rest * cdf,
        rest * phi / (2 * s),
        2 * rest * s * (slope * phi + rest * g * distribution(-a)),
        slope * slope + 2 * slope * rest * (cdf - 0.5 * a * phi) + rest * rest * (cdf - g * phi),
    )


def absolute(mu: Tensor, v: Tensor) -> Six:
    """|X|."""
    s = v.sqrt()
    a = (mu / s).abs()
    h, _ = ramp(-a)
    phi, tail = density(a), distribution(-a)
    sign = torch.where(mu < 0, -1.0, 1.0).to(mu.dtype)
    return (
        s * (a + 2 * h),
        v * (1 - 4 * h * (a + h)),
        sign * (1 - 2 * tail),
        phi / s,
        4 * s * sign * (2 * a * tail - phi + 2 * h * tail),
        1 - 2 * (a + 2 * h) * phi,
    )


def hardtanh(mu: Tensor, v: Tensor, low: float = -1.0, high: float = 1.0) -> Six:
    """min(max(X, low), high): between the bounds around mu, outside around the bound on mu's side."""
    s = v.sqrt()
    below, above = (low - mu) / s, (high - mu) / s
    phi_l, phi_u = density(below), density(above)
    g_l, r_l = ramp(below)  # E max(0, low - X) / s, and its variance
    g_u, r_u = ramp(-above)
    inside = torch.where(mu <= (low + high) / 2, distribution(-below) - distribution(-above), distribution(above) - distribution(below))
    # X clipped = X + max(0, low - X) - max(0, X - high): the three are correlated only through X
    m_inside = mu + s * (g_l - g_u)
    v_inside = inside + below * phi_l - above * phi_u + below * below * distribution(below) + above * above * distribution(-above) - (g_l - g_u) ** 2
    # beyond a bound: clipped = bound + max(0, X - low) - max(0, X - high), and its mirror
    v_outside, m_outside = [], []
    for near, far in ((-below, -above), (above, below)):
        g_near, r_near = ramp(near)
        g_far, r_far = ramp(far)
        m_outside.append(g_near - g_far)
        v_outside.append(r_near + g_near**2 - r_far - g_far**2 - 2 * (near - far) * g_far - (g_near - g_far) ** 2)
    under, over = mu < low, mu > high
    m = torch.where(under, low + s * m_outside[0], torch.where(over, high - s * m_outside[1], m_inside))
    variance = torch.where(under, v_outside[0], torch.where(over, v_outside[1], v_inside))
    return (
        m,
        v * variance.clamp_min(0),  # what is left of 1 where v is far beyond the bounds
        inside,
        (phi_l - phi_u) / (2 * s),
        2 * ((mu - m) * inside + s * (phi_l - phi_u)),
        inside + ((low - m) * phi_l - (high - m) * phi_u) / s,
    )


def step(mu: Tensor, v: Tensor) -> Six:
    """1 where X > 0, else 0."""
    s = v.sqrt()
    a = mu / s
    phi, cdf, rest = density(a), distribution(a), distribution(-a)
    slope, bend = torch.where(v > TINY, phi / s, 0.0), -a * phi / (2 * v)
    return cdf, cdf * rest, slope, bend, slope * (rest - cdf), bend * (rest - cdf)


def sign(mu: Tensor, v: Tensor) -> Six:
    """1 where X > 0, else -1."""
    m, variance, *partials = step(mu, v)
    m_mu, m_v, v_mu, v_v = partials
    return torch.erf(mu / v.sqrt() * SQRT_HALF), 4 * variance, 2 * m_mu, 2 * m_v, 4 * v_mu, 4 * v_v


def square(mu: Tensor, v: Tensor) -> Six:
    """X^2."""
    one = torch.ones_like(mu)
    return mu * mu + v, 2 * v * (v + 2 * mu * mu), 2 * mu, one, 8 * mu * v, 4 * (v + mu * mu)


def exp(mu: Tensor, v: Tensor) -> Six:
    """exp(X): log-normal."""
    m = torch.exp(mu + v / 2)
    variance = m * m * torch.expm1(v)
    return m, variance, m, m / 2, 2 * variance, variance + m * m * torch.exp(v)


def sin(mu: Tensor, v: Tensor) -> Six:
    """sin(X)."""
    damp = torch.exp(-v / 2)
    lost, double = -torch.expm1(-v), torch.exp(-v)
    two = torch.cos(2 * mu)
    m = damp * torch.sin(mu)
    return (
        m,
        0.5 * lost * (1 + double * two),
        damp * torch.cos(mu),
        -m / 2,
        -lost * double * torch.sin(2 * mu),
        0.5 * double * (1 + double * two) - 0.5 * lost * double * two,
    )


# ---- by integration: f with its first two derivatives ----

Curve = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def _softplus(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    s = torch.sigmoid(x)
    return torch.nn.functional.softplus(x, threshold=40), s, s * (1 - s)


def _mish(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    soft, s, bend = _softplus(x)
    th = torch.tanh(soft)
    left = 1 - th * th
    slope = left * s
    return x * th, th + x * slope, 2 * slope + x * (left * bend - 2 * th * slope * s)


def _erf(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    slope = torch.exp(-x * x) * (2 / math.sqrt(math.pi))
    return torch.erf(x), slope, -2 * x * slope


def _known(name: str) -> Curve:
    return lambda x: ACTIVATIONS[name](x, 0.0)


# the step in x that leaves an error of at most 1e-13 in all six: by the nearest pole, or where there is none by the width of f'
SMOOTH: dict[str, tuple[Curve, float]] = {
    "sigmoid": (_known("sigmoid"), 0.42),
    "tanh": (_known("tanh"), 0.2),
    "silu": (_known("silu"), 0.4),
    "softplus": (_softplus, 0.44),
    "mish": (_mish, 0.22),
    "gelu": (_known("gelu"), 0.43),
    "gelu_tanh": (_known("gelu_tanh"), 0.34),
    "erf": (_erf, 0.3),
}


def _smooth(curve: Curve, width: float, mu: Tensor, v: Tensor) -> Six:
    s = v.sqrt()
    try:
        largest = float(s.detach().nan_to_num(0.0).max()) if s.numel() else 1.0
    except RuntimeError:  # a torch.func transform knows no values
        largest = 16.0
    count = 35
    while count < STEPS and 2 * REACH / (count - 1) * largest > width:
        count = 2 * count - 1
    t = torch.linspace(-REACH, REACH, count, dtype=torch.float64, device=mu.device)
    w = density(t)
    return _integrated(curve, mu, s, t.expand(*mu.shape, -1), w / w.sum())


def _integrated(curve: Curve, mu: Tensor, s: Tensor, t: Tensor, w: Tensor) -> Six:
    """From nodes t in the last dimension with their weights."""
    f, first, second = curve(mu.unsqueeze(-1) + s.unsqueeze(-1) * t)
    here = curve(mu)[0]
    f = f - here.unsqueeze(-1)
    shift = (w * f).sum(-1)
    f = f - shift.unsqueeze(-1)
    slope = (w * first).sum(-1)
    return (
        here + shift,
        (w * f * f).sum(-1),
        slope,
        (w * second).sum(-1) / 2,
        2 * (w * f * (first - slope.unsqueeze(-1))).sum(-1),
        (w * (first * first + f * second)).sum(-1),
    )


@cache
def _legendre() -> tuple[list[float], list[float]]:
    """Nodes and weights on [-1, 1], by Newton's method on the Legendre polynomial."""
    nodes, weights = [], []
    for i in range(PANEL):
        x, slope = math.cos(math.pi * (i + 0.75) / (PANEL + 0.5)), 1.0
        for _ in range(8):
            before, value = 1.0, x
            for k in range(2, PANEL + 1):
                before, value = value, ((2 * k - 1) * x * value - (k - 1) * before) / k
            slope = PANEL * (x * value - before) / (x * x - 1)
            x -= value / slope
        nodes.append(x)
        weights.append(2 / ((1 - x * x) * slope * slope))
    return nodes, weights


def _kinked(curve: Curve, kinks: tuple[tuple[float, float], ...], mu: Tensor, v: Tensor) -> Six:
    """kinks: where, and the jump of f' there."""
    s = v.sqrt()
    nodes, weights = (torch.tensor(values, dtype=torch.float64, device=mu.device) for values in _legendre())
    at = [(place - mu) / s for place, _ in kinks]
    edges = [torch.full_like(mu, -REACH), *(edge.clamp(-REACH, REACH) for edge in at), torch.full_like(mu, REACH)]
    t, w = [], []
    for left, right in zip(edges[:-1], edges[1:], strict=True):
        half = ((right - left) / 2).unsqueeze(-1)
        t.append((left.unsqueeze(-1) + half) + half * nodes)
        w.append(half * weights * density(t[-1]))
    m, variance, m_mu, m_v, v_mu, v_v = _integrated(curve, mu, s, torch.cat(t, -1), torch.cat(w, -1))
    for edge, (place, jump) in zip(at, kinks, strict=True):
        delta = jump * density(edge) / s
        m_v = m_v + delta / 2
        v_v = v_v + delta * (curve(torch.full_like(mu, place))[0] - m)
    return m, variance, m_mu, m_v, v_mu, v_v


def elu(mu: Tensor, v: Tensor, alpha: float = 1.0, scale: float = 1.0) -> Six:
    """scale*X above 0, scale*alpha*(exp(X) - 1) below: ELU, SELU."""

    def curve(x):
        below = x <= 0
        growth = torch.exp(x.clamp_max(0)) * (scale * alpha)
        negative = scale * alpha * torch.expm1(x.clamp_max(0))
        return torch.where(below, negative, scale * x), torch.where(below, growth, scale), torch.where(below, growth, 0.0)

    return _kinked(curve, ((-40.0, 0.0), (0.0, scale * (1 - alpha))), mu, v)  # below -40 nothing is left of exp(X)


def hardswish(mu: Tensor, v: Tensor) -> Six:
    """X*min(max(X + 3, 0), 6)/6."""
    return _kinked(_known("hardswish"), ((-3.0, -0.5), (3.0, -0.5)), mu, v)


def _affine(base: Callable[..., Six], scale: float, shift: float, *arguments: float) -> Callable[[Tensor, Tensor], Six]:
    """The map of base(scale*X + shift)."""

    def moments(mu: Tensor, v: Tensor) -> Six:
        m, variance, m_mu, m_v, v_mu, v_v = base(scale * mu + shift, scale * scale * v, *arguments)
        return m, variance, scale * m_mu, scale * scale * m_v, scale * v_mu, scale * scale * v_v

    return moments


# ---- all of them, by name ----


def _curve(name: str) -> Callable[[Tensor, Tensor], Six]:
    curve, width = SMOOTH[name]
    return lambda mu, v: _smooth(curve, width, mu, v)


MAPS: dict[str, Callable[..., Six]] = {
    "none": lambda mu, v: (mu, v, torch.ones_like(mu), torch.zeros_like(mu), torch.zeros_like(mu), torch.ones_like(mu)),
    "relu": lambda mu, v: leaky_relu(mu, v, 0.0),
    "leaky_relu": leaky_relu,
    "abs": absolute,
    "hardtanh": hardtanh,
    "relu6": lambda mu, v: hardtanh(mu, v, 0.0, 6.0),
    "hardsigmoid": _affine(hardtanh, 1 / 6, 0.5, 0.0, 1.0),
    "hardswish": hardswish,
    "step": step,
    "sign": sign,
    "square": square,
    "exp": exp,
    "sin": sin,
    "elu": elu,
    "selu": lambda mu, v: elu(mu, v, 1.6732632423543772, 1.0507009873554805),
    **{name: _curve(name) for name in SMOOTH},
}
CODES = {name: code for code, name in enumerate(MAPS)}  # what the kernels call them
_NAMES = tuple(MAPS)
PARAMETERS: dict[str, tuple[float, ...]] = {"leaky_relu": (0.01,), "hardtanh": (-1.0, 1.0), "elu": (1.0, 1.0)}  # with their defaults


def moments(name: str, mu: Tensor, v: Tensor, parameters: tuple[float, ...] = ()) -> Six:
    """The six values of the map `name`, also where v is 0; differentiable in float64."""
    certain = v <= TINY
    m, variance, m_mu, m_v, v_mu, v_v = MAPS[name](mu, torch.where(certain, 1.0, v), *parameters)
    here, _, slope, *_ = MAPS[name](mu, torch.full_like(mu, 1e-300), *parameters)
    nothing = torch.zeros_like(mu)
    return (
        torch.where(certain, here, m),
        torch.where(certain, nothing, variance),
        torch.where(certain, slope, m_mu),
        torch.where(certain, nothing, m_v),
        torch.where(certain, nothing, v_mu),
        torch.where(certain, slope.square(), v_v),
    )


# ---- the backend ----


@torch.no_grad()
def activation_moments_fwd(out, mean, var, function, first, second) -> None:
    name = _NAMES[function]
    for place, value in zip(out, moments(name, mean, var, (first, second)[: len(PARAMETERS.get(name, ()))]), strict=True):
        place.copy_(value)
