"""Mean m and variance V of f(X) for X ~ N(mu, v), and their derivatives, for use inside Triton kernels; in float64.

With s = sqrt(v), t = |mu|/s and the normal density phi and distribution Phi, all closed forms are made of
    phi(t)      beyond = Phi(-t)      h = E max(0, x - t) = phi - t beyond      r = Var max(0, x - t) = beyond - h (t + h)
each to its own relative precision. What has no closed form is integrated relative to f(mu), over x = mu + s t; derivatives by Stein's identities:
    dm/dmu = E f'      dm/dv = E f''/2      dV/dmu = 2 Cov(f, f')      dV/dv = E f'^2 + Cov(f, f'')
Smooth functions by the trapezoid rule, functions with kinks by Gauss-Legendre between them, where f'' has the jump of f' as a delta.

mu, v are [ROWS, 1], nodes of an integral lie along the second axis. MAP is a constexpr code, out of those below; what else there is are these with
parameters: relu (leaky_relu), relu6 (hardtanh), selu (elu). No libdevice import, so that the interpreter can run every line.
"""

import triton
import triton.language as tl

NONE, LEAKY_RELU, ABS, HARDTANH = tl.constexpr(0), tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)
HARDSIGMOID, HARDSWISH, STEP, SIGN, SQUARE = tl.constexpr(6), tl.constexpr(7), tl.constexpr(8), tl.constexpr(9), tl.constexpr(10)
EXP, SIN, ELU, SIGMOID, TANH = tl.constexpr(11), tl.constexpr(12), tl.constexpr(13), tl.constexpr(15), tl.constexpr(16)
SILU, SOFTPLUS, MISH, GELU, GELU_TANH = tl.constexpr(17), tl.constexpr(18), tl.constexpr(19), tl.constexpr(20), tl.constexpr(21)
TINY = tl.constexpr(1e-40)  # variances that are no more than this are taken as 0
FAR = tl.constexpr(40.0)  # standard deviations beyond which phi is 0, and an exponent to which 1 is nothing
REACH = tl.constexpr(8.5)  # standard deviations beyond which lies less than 2e-17
PANEL = tl.constexpr(64)  # nodes between two kinks
HALF = tl.constexpr(17)  # steps of the coarsest trapezoid rule on each side of mu
HALVINGS = tl.constexpr(9)  # of its step, at most
TERMS = tl.constexpr(80)  # of the continued fraction: all digits from two standard deviations on
WIDE = tl.constexpr(10)  # times the distance of the bounds: there the closed form of hardtanh loses digits of what is left of the variance
SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
TWO_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
TWO_OVER_SQRT_PI = tl.constexpr(1.1283791670955126)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def density(t):
    return tl.exp(-0.5 * t * t) * INV_SQRT_2PI


@triton.jit
def at_most(x, bound):
    """The lesser of both; NaN if x is."""
    return tl.where(x > bound, bound, x)


@triton.jit
def expm1(x):
    """exp(x) - 1 of x <= 0: the rounding of u = exp(x) is that of the exponent log(u)."""
    x = tl.where(x < -FAR, -FAR, x)
    u = tl.exp(x)
    return tl.where(u == 1.0, x, (u - 1.0) * (x / tl.log(u)))


@triton.jit
def log1p(x):
    """log(1 + x) of x >= 0, as above."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / (u - 1.0)))


# ---- closed forms ----


@triton.jit
def tail_of(a):
    """t = |a|, phi, beyond, h, r."""
    t = at_most(tl.abs(a), FAR)
    phi = density(t)
    # Phi(-t)/phi = 1/(t + k1), k1 = 1/(t + k2), k2 = 2/(t + 3/(t + 4/(t + ...))): in terms of these h and r do not cancel. k2 from the front, as
    # numerator and denominator: all terms are positive, and there is one division.
    far = tl.where(t > 2.0, t, 2.0)
    above, below = tl.zeros_like(t), tl.full(t.shape, 1.0, tl.float64)
    above_before, below_before = below, above
    for i in range(2, TERMS):
        above, above_before = far * above + i * above_before, above
        below, below_before = far * below + i * below_before, below
    rest = 0.5 * (tl.sqrt(far * far + 4.0 * TERMS) - far)
    k2 = (above + rest * above_before) / (below + rest * below_before)
    k1 = 1.0 / (far + k2)
    beyond = phi / (far + k1)
    h = k1 * beyond
    beyond_near = 0.5 - 0.5 * tl.erf(t * SQRT_HALF)
    h_near = phi - t * beyond_near
    near = t <= 2.0
    r = tl.where(near, beyond_near - h_near * (t + h_near), h * (k2 - h))
    return t, phi, tl.where(near, beyond_near, beyond), tl.where(near, h_near, h), r


@triton.jit
def leaky_relu(mu, v, slope):
    s, rest = tl.sqrt(v), 1.0 - slope
    t, phi, beyond, h, r = tail_of(mu / s)
    up = mu > 0.0
    below, above = tl.where(up, beyond, 1.0 - beyond), tl.where(up, 1.0 - beyond, beyond)
    g = tl.where(up, t + h, h)  # of max(0, X)/s
    r = tl.where(up, above - g * h, r)
    a_phi = tl.where(up, t, -t) * phi
    return (
        tl.where(up, mu, slope * mu) + rest * s * h,
        v * (slope * slope + 2.0 * slope * rest * above + rest * rest * r),
        slope + rest * above,
        rest * phi / (2.0 * s),
        2.0 * rest * s * (slope * phi + rest * g * below),
        slope * slope + 2.0 * slope * rest * (above - 0.5 * a_phi) + rest * rest * (above - g * phi),
    )


@triton.jit
def absolute(mu, v):
    s = tl.sqrt(v)
    t, phi, beyond, h, r = tail_of(mu / s)
    sign = tl.where(mu < 0.0, -1.0, 1.0)
    return (
        tl.abs(mu) + 2.0 * s * h,
        v * (1.0 - 4.0 * h * (t + h)),
        sign * (1.0 - 2.0 * beyond),
        phi / s,
        4.0 * s * sign * (t * beyond - h + 2.0 * h * beyond),
        1.0 - 2.0 * (t + 2.0 * h) * phi,
    )


@triton.jit
def clipped(mu, v, low, high):
    """hardtanh: between the bounds as X + max(0, low - X) - max(0, X - high), beyond one as the bound and what reaches over it."""
    s = tl.sqrt(v)
    t_l, phi_l, beyond_l, h_l, r_l = tail_of((mu - low) / s)
    t_u, phi_u, beyond_u, h_u, r_u = tail_of((high - mu) / s)
    under, over = mu < low, mu > high
    outside = under | over
    h_near, h_far = tl.where(under, h_l, h_u), tl.where(under, h_u, h_l)
    t_near, t_far = tl.where(under, t_l, t_u), tl.where(under, t_u, t_l)
    m = tl.where(under, low + s * (h_l - h_u), tl.where(over, high - s * (h_u - h_l), mu + s * (h_l - h_u)))
    inside = tl.where(under, beyond_l - beyond_u, tl.where(over, beyond_u - beyond_l, 1.0 - beyond_l - beyond_u))
    variance = inside - t_l * h_l - t_u * h_u - (h_l - h_u) * (h_l - h_u)
    beside = tl.where(under, r_l - r_u, r_u - r_l) - 2.0 * h_far * (t_far - t_near + h_far - h_near)
    return (
        m,
        v * tl.where(outside, beside, variance),
        inside,
        (phi_l - phi_u) / (2.0 * s),
        2.0 * ((mu - m) * inside + s * (phi_l - phi_u)),
        inside + ((low - m) * phi_l - (high - m) * phi_u) / s,
    )


@triton.jit
def hardtanh(mu, v, low, high, legendre_ptr):
    wide = tl.sqrt(v) > (high - low) * WIDE
    m, variance, m_mu, m_v, v_mu, v_v = clipped(mu, v, low, high)
    m_w, variance_w, m_mu_w, m_v_w, v_mu_w, v_v_w = kinked(mu, v, low, high, legendre_ptr, HARDTANH)
    return (
        tl.where(wide, m_w, m),
        tl.where(wide, variance_w, variance),
        tl.where(wide, m_mu_w, m_mu),
        tl.where(wide, m_v_w, m_v),
        tl.where(wide, v_mu_w, v_mu),
        tl.where(wide, v_v_w, v_v),
    )


@triton.jit
def step(mu, v):
    """1 where X > 0, else 0."""
    s = tl.sqrt(v)
    t, phi, beyond, h, r = tail_of(mu / s)
    up = mu > 0.0
    below, above = tl.where(up, beyond, 1.0 - beyond), tl.where(up, 1.0 - beyond, beyond)
    slope, bend = tl.where(v > TINY, phi / s, 0.0), tl.where(up, -t, t) * phi / (2.0 * v)
    return above, beyond * (1.0 - beyond), slope, bend, slope * (below - above), bend * (below - above)


@triton.jit
def sine(mu, v):
    damp, lost = tl.exp(-0.5 * v), -expm1(-v)
    square, c, s = damp * damp, tl.cos(mu), tl.sin(mu)
    two = square * (c - s) * (c + s)
    both = lost + 2.0 * square * c * c  # = 1 + two
    return damp * s, 0.5 * lost * both, damp * c, -0.5 * damp * s, -2.0 * lost * square * s * c, 0.5 * (square * both - lost * two)


# ---- by integration ----


@triton.jit
def logistic(x):
    e = tl.exp(-tl.abs(x))
    s = tl.where(x > 0.0, 1.0, e) / (1.0 + e)
    slope = e / ((1.0 + e) * (1.0 + e))
    return s, slope, slope * tl.where(x > 0.0, e - 1.0, 1.0 - e) / (1.0 + e)


@triton.jit
def gated(x, gate, first, second):
    """x gate."""
    return x * gate, gate + x * first, 2.0 * first + x * second


@triton.jit
def curve(x, first, second, MAP: tl.constexpr):
    """f, f', f''. first, second: the bounds of hardtanh; alpha and scale of elu."""
    if MAP == HARDTANH:
        inside = (x > first) & (x < second)
        return tl.where(x <= first, first, at_most(x, second)), tl.where(inside, 1.0, 0.0), tl.zeros_like(x)
    elif MAP == HARDSWISH:
        inside = (x > -3.0) & (x < 3.0)
        f = tl.where(inside, x * (x + 3.0) / 6.0, tl.where(x <= -3.0, 0.0, x))
        return f, tl.where(inside, x / 3.0 + 0.5, tl.where(x > 0.0, 1.0, 0.0)), tl.where(inside, 1.0 / 3.0, tl.zeros_like(x))
    elif MAP == ELU:
        below = at_most(x, 0.0)
        growth = second * first * tl.exp(below)
        up = x > 0.0
        return tl.where(up, second * x, second * first * expm1(below)), tl.where(up, second, growth), tl.where(up, 0.0, growth)
    elif MAP == SIGMOID:
        return logistic(x)
    elif MAP == TANH:
        e, n = expm1(-2.0 * tl.abs(x)), tl.exp(-2.0 * tl.abs(x))
        th = e / (2.0 + e)
        th = tl.where(x > 0.0, -th, th)
        slope = 4.0 * n / ((1.0 + n) * (1.0 + n))
        return th, slope, -2.0 * th * slope
    elif MAP == SILU:
        s, slope, bend = logistic(x)
        return gated(x, s, slope, bend)
    elif MAP == SOFTPLUS:
        s, slope, bend = logistic(x)
        return tl.where(x > 0.0, x, 0.0) + log1p(tl.exp(-tl.abs(x))), s, slope
    elif MAP == MISH:  # tanh(softplus(x)) is a fraction in exp(x)
        n = tl.exp(at_most(x, FAR))
        far = x > FAR
        d = n * (n + 2.0) + 2.0
        slope = tl.where(far, 0.0, 4.0 * n * (n + 1.0) / (d * d))
        bend = tl.where(far, 0.0, 4.0 * n * ((2.0 * n + 1.0) * d - 4.0 * n * (n + 1.0) * (n + 1.0)) / (d * d * d))
        return gated(x, n * (n + 2.0) / d, slope, bend)
    elif MAP == GELU:
        phi = density(x)
        return gated(x, 0.5 + 0.5 * tl.erf(x * SQRT_HALF), phi, -tl.where(phi > 0.0, x, 0.0) * phi)
    elif MAP == GELU_TANH:  # = x logistic(w)
        t = at_most(tl.where(x < -FAR, -FAR, x), FAR)
        w, w1 = (t + t * t * t * CUBIC) * TWO_SQRT_2_OVER_PI, (1.0 + t * t * 3.0 * CUBIC) * TWO_SQRT_2_OVER_PI
        s, slope, bend = logistic(w)
        return gated(x, s, slope * w1, bend * w1 * w1 + slope * t * (6.0 * TWO_SQRT_2_OVER_PI * CUBIC))
    else:
        slope = tl.exp(-x * x) * TWO_OVER_SQRT_PI
        return tl.erf(x), slope, -2.0 * slope * x


@triton.jit
def no_sums(ROWS: tl.constexpr, NODES: tl.constexpr):
    zero = tl.zeros((ROWS, NODES), tl.float64)
    return zero, zero, zero, zero, zero, zero, zero


@triton.jit
def add(sums, w, x, here, first, second, MAP: tl.constexpr):
    """The sums with nodes x of weight w. here = f(mu) is the median of f(X) where f is monotone, at most a standard deviation from its mean, so
    that the differences in `moments_of` keep their digits."""
    weight, d, square, f1, f2, d_f1, bend = sums
    f, slope, curvature = curve(x, first, second, MAP)
    difference = f - here
    part = w * difference
    return (
        weight + w,
        d + part,
        square + part * difference,
        f1 + w * slope,
        f2 + w * curvature,
        d_f1 + part * slope,
        bend + (w * slope * slope + part * curvature),
    )


@triton.jit
def mean_of(x, k):
    return k * tl.sum(x, axis=1, keep_dims=True)


@triton.jit
def moments_of(here, sums):
    weight, d, square, f1, f2, d_f1, bend = sums
    k = 1.0 / tl.sum(weight, axis=1, keep_dims=True)
    shift, f1, f2 = mean_of(d, k), mean_of(f1, k), mean_of(f2, k)
    variance, v_mu = mean_of(square, k) - shift * shift, 2.0 * (mean_of(d_f1, k) - shift * f1)
    return here + shift, variance, f1, 0.5 * f2, v_mu, mean_of(bend, k) - shift * f2


@triton.jit
def smooth(mu, v, WIDTH: tl.constexpr, NODES: tl.constexpr, MAP: tl.constexpr):
    """The trapezoid rule, with steps in x of at most WIDTH for the largest finite s of the program."""
    s = tl.sqrt(v)
    largest = tl.max(tl.ravel(tl.where(s < float("inf"), s, 0.0)), axis=0)
    half = tl.full((), HALF, tl.float64)
    for _ in tl.static_range(HALVINGS):
        half = tl.where(largest * REACH > half * WIDTH, 2.0 * half, half)
    here, _, _ = curve(mu, 0.0, 0.0, MAP)
    sums = no_sums(mu.shape[0], NODES)
    for start in range(0, 2 * half.to(tl.int32) + 1, NODES):
        i = start + tl.arange(0, NODES)[None, :].to(tl.float64) - half
        t = i * REACH / half
        sums = add(sums, tl.where(i > half, 0.0, density(t)), mu + s * t, here, 0.0, 0.0, MAP)
    return moments_of(here, sums)


@triton.jit
def kinked(mu, v, first, second, legendre_ptr, MAP: tl.constexpr):
    """legendre_ptr: PANEL nodes on [-1, 1], then their weights."""
    if MAP == HARDTANH:
        lower, upper, lower_jump, upper_jump = first, second, 1.0, -1.0
    elif MAP == HARDSWISH:
        lower, upper, lower_jump, upper_jump = -3.0, 3.0, -0.5, -0.5
    else:  # elu: below -FAR nothing is left of exp
        lower, upper, lower_jump, upper_jump = -FAR, 0.0, 0.0, second * (1.0 - first)
    lower, upper = tl.full(mu.shape, lower, tl.float64), tl.full(mu.shape, upper, tl.float64)
    s = tl.sqrt(v)
    node = tl.load(legendre_ptr + tl.arange(0, PANEL)[None, :])
    node_weight = tl.load(legendre_ptr + PANEL + tl.arange(0, PANEL)[None, :])
    here, _, _ = curve(mu, first, second, MAP)
    sums = no_sums(mu.shape[0], PANEL)
    left = tl.full(mu.shape, -REACH, tl.float64)
    for panel in tl.static_range(3):
        right = tl.full(mu.shape, REACH, tl.float64)
        if panel < 2:
            right = at_most(((lower if panel == 0 else upper) - mu) / s, REACH)
            right = tl.where(right < left, left, right)
        half = 0.5 * (right - left)
        t = left + half + half * node
        sums = add(sums, half * node_weight * density(t), mu + s * t, here, first, second, MAP)
        left = right
    m, variance, m_mu, m_v, v_mu, v_v = moments_of(here, sums)
    for kink in tl.static_range(2):
        place = lower if kink == 0 else upper
        delta = (lower_jump if kink == 0 else upper_jump) * density((place - mu) / s) / s
        f, _, _ = curve(place, first, second, MAP)
        m_v += 0.5 * delta
        v_v += delta * (f - m)
    return m, variance, m_mu, m_v, v_mu, v_v


@triton.jit
def spread(mu, v, first, second, legendre_ptr, MAP: tl.constexpr, WIDTH: tl.constexpr, NODES: tl.constexpr):
    """m, V, dm/dmu, dm/dv, dV/dmu, dV/dv of v > 0."""
    if WIDTH is not None:
        return smooth(mu, v, WIDTH, NODES, MAP)
    elif MAP == LEAKY_RELU:
        return leaky_relu(mu, v, first)
    elif MAP == ABS:
        return absolute(mu, v)
    elif MAP == HARDTANH:
        return hardtanh(mu, v, first, second, legendre_ptr)
    elif MAP == HARDSIGMOID:
        m, variance, m_mu, m_v, v_mu, v_v = hardtanh(mu / 6.0 + 0.5, v / 36.0, 0.0, 1.0, legendre_ptr)
        return m, variance, m_mu / 6.0, m_v / 36.0, v_mu / 6.0, v_v / 36.0
    elif MAP == HARDSWISH or MAP == ELU:
        return kinked(mu, v, first, second, legendre_ptr, MAP)
    elif MAP == STEP:
        return step(mu, v)
    elif MAP == SIGN:
        m, variance, m_mu, m_v, v_mu, v_v = step(mu, v)
        return tl.erf(mu / tl.sqrt(v) * SQRT_HALF), 4.0 * variance, 2.0 * m_mu, 2.0 * m_v, 4.0 * v_mu, 4.0 * v_v
    elif MAP == SQUARE:
        return mu * mu + v, 2.0 * v * (v + 2.0 * mu * mu), 2.0 * mu, tl.full(mu.shape, 1.0, tl.float64), 8.0 * mu * v, 4.0 * (v + mu * mu)
    elif MAP == EXP:
        m, largest = tl.exp(mu + 0.5 * v), tl.exp(2.0 * (mu + v))
        variance = -largest * expm1(-v)
        return m, variance, m, 0.5 * m, 2.0 * variance, variance + largest
    elif MAP == SIN:
        return sine(mu, v)
    else:
        one = tl.full(mu.shape, 1.0, tl.float64)
        return mu, v, one, 0.0 * one, 0.0 * one, one
