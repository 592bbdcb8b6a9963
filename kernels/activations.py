"""Activations and their derivatives, for use inside Triton kernels.

ACTIVATION is a constexpr code:
    0 none            t                              5 gelu_tanh   t sigmoid(2 u),  u = sqrt(2/pi) (t + 0.044715 t^3)
    1 relu            max(t, 0)                      6 tanh        tanh(t)
    2 leaky_relu      t > 0 ? t : slope t            7 sigmoid     1 / (1 + e^-t)
    3 silu            t sigmoid(t)                   8 hardswish   t min(max(t + 3, 0), 6) / 6
    4 gelu            t Phi(t), Phi from erf
t is fp32 or fp64. NaN goes wherever torch lets it go. No inline assembly and no libdevice import, so that the interpreter
can run every line; a sigmoid costs two special-function instructions (exp2 and rsqrt).
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
GELU_TANH_LINEAR = tl.constexpr(1.5957691216057308)  # 2 sqrt(2/pi)
GELU_TANH_CUBIC = tl.constexpr(0.07135481282553602)  # 2 sqrt(2/pi) 0.044715


@triton.jit
def reciprocal(x):
    """1 / x of x >= 1 for 2 instructions where a division takes 6, at the same 2 ulp."""
    if x.dtype == tl.float64:
        return 1.0 / x
    else:
        root = tl.rsqrt(x)
        return root * root


@triton.jit
def sigmoid(t):
    return reciprocal(1.0 + tl.exp2(t * -LOG2E))


@triton.jit
def sigmoids(t):
    """sigmoid(t) and 1 - sigmoid(t), each to its own last digits. The bound keeps 0 times infinity away."""
    e = tl.minimum(tl.exp2(t * -LOG2E), 2.0**126, propagate_nan=tl.PropagateNan.ALL)
    s = reciprocal(1.0 + e)
    return s, e * s


@triton.jit
def tanh(t):
    # 1 - 2 / (1 + e^2t) loses every digit as t -> 0, so small arguments take a series with full relative accuracy.
    square = t * t
    if t.dtype == tl.float64:
        small = 21.0 + square / 23.0  # Lambert's continued fraction; below 1e-17 for |t| < 0.625
        for k in tl.static_range(10):
            small = (19.0 - 2 * k) + square / small
        small = t / small
    else:
        # Least maximum of the relative error, 5e-9, over |t| < 0.63.
        poly = -0.005681287015 * square + 0.02061862834
        poly = poly * square - 0.05373369831
        poly = poly * square + 0.1333137349
        poly = poly * square - 0.3333327955
        small = poly * square * t + t
    large = 1.0 - 2.0 * reciprocal(1.0 + tl.exp2(t * (2.0 * LOG2E)))
    return tl.where(tl.abs(t) < 0.625, small, large)


@triton.jit
def activate(t, slope, ACTIVATION: tl.constexpr):
    """act(t)."""
    if ACTIVATION == 1:
        return tl.where(t <= 0.0, 0.0, t)
    elif ACTIVATION == 2:
        return tl.where(t > 0.0, t, slope * t)
    elif ACTIVATION == 3:
        return t * sigmoid(t)
    elif ACTIVATION == 4:
        return 0.5 * t * (1.0 + tl.erf(t * SQRT_HALF))
    elif ACTIVATION == 5:
        return t * sigmoid(t * (GELU_TANH_LINEAR + GELU_TANH_CUBIC * t * t))
    elif ACTIVATION == 6:
        return tanh(t)
    elif ACTIVATION == 7:
        return sigmoid(t)
    elif ACTIVATION == 8:
        return tl.where(t <= -3.0, 0.0, tl.where(t >= 3.0, t, t * (t + 3.0) * (1.0 / 6.0)))
    else:
        return t


@triton.jit
def derivative(t, slope, ACTIVATION: tl.constexpr):
    """act'(t); at the kinks, torch's choice."""
    if ACTIVATION == 1:
        return tl.where(t <= 0.0, 0.0, 1.0)
    elif ACTIVATION == 2:
        return tl.where(t > 0.0, 1.0, slope)
    elif ACTIVATION == 3:
        s, rest = sigmoids(t)
        return s * (1.0 + t * rest)
    elif ACTIVATION == 4:
        density = INV_SQRT_2PI * tl.exp2(t * t * (-0.5 * LOG2E))
        return 0.5 * (1.0 + tl.erf(t * SQRT_HALF)) + t * density
    elif ACTIVATION == 5:
        s, rest = sigmoids(t * (GELU_TANH_LINEAR + GELU_TANH_CUBIC * t * t))
        return s * (1.0 + t * rest * (GELU_TANH_LINEAR + 3.0 * GELU_TANH_CUBIC * t * t))
    elif ACTIVATION == 6:
        s, rest = sigmoids(2.0 * t)
        return 4.0 * s * rest
    elif ACTIVATION == 7:
        s, rest = sigmoids(t)
        return s * rest
    elif ACTIVATION == 8:
        return tl.where(t <= -3.0, 0.0, tl.where(t >= 3.0, 1.0, t * (1.0 / 3.0) + 0.5))
    else:
        return tl.full(t.shape, 1.0, t.dtype)
