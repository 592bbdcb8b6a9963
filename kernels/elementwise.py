"""What happens to one element once its statistics are known; the same expressions, in the same order, in every kernel.

d = x - hi      x_hat = fma(d, rstd, -lo rstd)      t = fma(x_hat, weight, bias) + residual      y = act(t)      dt = dy act'(t)
"""

import triton
import triton.language as tl

from .activations import activate, derivative
from .algebra import load


@triton.jit
def fma(x, y, z):
    x, y = tl.broadcast(x, y)
    x, z = tl.broadcast(x, z)
    y, z = tl.broadcast(y, z)
    return tl.fma(x, y, z)


@triton.jit
def centre(x, mask, hi):
    """d: x relative to its mean, 0 in lanes that hold nothing, so that none of them can overflow."""
    return tl.where(mask, x - hi, 0.0)


@triton.jit
def normalize(d, lo, rstd):
    return fma(d, rstd, -lo * rstd)


@triton.jit
def argument(x_hat, offset, mask, residual_ptr, weight, bias, ACC: tl.constexpr, POLICY: tl.constexpr):
    """t, the argument of the activation."""
    t = fma(x_hat, weight, bias)
    return t if residual_ptr is None else t + load(residual_ptr, offset, mask, ACC, POLICY)


@triton.jit
def forward_of(
    d, offset, mask, residual_ptr, y_ptr, lo, rstd, weight, bias, slope,
    ACTIVATION: tl.constexpr, ACC: tl.constexpr, POLICY: tl.constexpr,
):  # fmt: skip
    """Store y of d = x - hi."""
    t = argument(normalize(d, lo, rstd), offset, mask, residual_ptr, weight, bias, ACC, POLICY)
    y = activate(t, slope, ACTIVATION)
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=mask, eviction_policy=POLICY)


@triton.jit
def backward_of(
    dy_ptr, x_ptr, offset, mask, residual_ptr, hi, lo, rstd, weight, bias, slope,
    ACTIVATION: tl.constexpr, ACC: tl.constexpr, POLICY: tl.constexpr,
):  # fmt: skip
    """x_hat and dt; dt is 0 where masked."""
    dy = load(dy_ptr, offset, mask, ACC, POLICY)
    x_hat = normalize(centre(load(x_ptr, offset, mask, ACC, POLICY), mask, hi), lo, rstd)
    if ACTIVATION == 0:
        return x_hat, dy
    else:
        t = argument(x_hat, offset, mask, residual_ptr, weight, bias, ACC, POLICY)
        return x_hat, dy * derivative(t, slope, ACTIVATION)


@triton.jit
def load_coefficients(means_ptr, row, rows, mask, rstd):
    """c2, c3 from the means of g x_hat and of g."""
    return -rstd * load(means_ptr, row, mask, rstd.dtype), -rstd * load(means_ptr + rows, row, mask, rstd.dtype)


@triton.jit
def store_gradients(x_hat, dt, g, offset, mask, dtotal_ptr, dx_ptr, dresidual_ptr, factor, c2, c3, POLICY: tl.constexpr):
    """dx = factor g + c2 x_hat + c3, where factor g = rstd weight dt. c2 = None: the statistics do not depend on x, so dx not on x_hat."""
    if dx_ptr is not None:
        if c2 is None:
            dx = factor * g
        else:
            dx = fma(factor, g, fma(c2, x_hat, c3))
        if dtotal_ptr is not None:
            dx += load(dtotal_ptr, offset, mask, dx.dtype, POLICY)
        tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=mask, eviction_policy=POLICY)
    if dresidual_ptr is not None:
        tl.store(dresidual_ptr + offset, dt.to(dresidual_ptr.dtype.element_ty), mask=mask, eviction_policy=POLICY)
