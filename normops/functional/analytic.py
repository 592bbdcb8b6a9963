"""Means and variances that go through activations, maxima and layers, and normalization by them: analytic normalization.

A variable is given by its mean and variance, tensors that broadcast together, and taken as normal where its distribution matters. Results have the
dtypes of the means and variances that were given; inside all is float64. Differentiable twice.

Source: Shekhovtsov & Flach 2018, Normalization of Neural Networks using Analytic Variance Propagation (arXiv 1803.10560).
"""

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from normops import checks, maps, operators, ops, statistics
from normops.autograd import plain, transforming
from normops.reference import accumulator


def activation_moments(mean: Tensor, var: Tensor, activation: str, parameters: Sequence[float] = ()) -> tuple[Tensor, Tensor]:
    """Mean and variance of ``f(X)`` for normal X: ``m = E f(X)``, ``V = E (f(X) - m)^2`` with ``X ~ N(mean, var)``.

    activation, with its `parameters`: ``none``, ``relu``, ``leaky_relu`` (slope), ``abs``, ``hardtanh`` (low, high), ``relu6``, ``hardsigmoid``,
    ``hardswish``, ``step``, ``sign``, ``square``, ``exp``, ``sin``, ``elu`` (alpha, scale), ``selu``, ``sigmoid``, ``tanh``, ``silu``, ``softplus``,
    ``mish``, ``gelu`` (erf), ``gelu_tanh`` or ``erf``. No torch function equals it; ``f(mean + var.sqrt() * torch.randn(n, 1))`` has this mean and
    variance for n without end.

    var is not negative; where it is 0, the result is ``f(mean)`` and 0. Closed forms that keep their digits in the tails, or quadrature with an
    error of about 1e-13 (see :mod:`normops.maps`). mean and var broadcast. Raises ``ValueError`` for a negative var (on a CPU: elsewhere the
    question would wait for the device) and unknown activations.

    Source: the rectifier's moments and their use are those of Frey & Hinton 1999 and Shekhovtsov & Flach 2018 (arXiv 1803.10560).
    """
    statistics.check_moments("activation_moments", mean, var)
    parameters = checks.check_map(activation, parameters)
    if plain(mean, var):
        return statistics.activation_moments(True, mean, var, activation, parameters)
    return torch.ops.normops.activation_moments.default(mean, var, activation, parameters)


def max_moments(mean: Tensor, var: Tensor, other_mean: Tensor, other_var: Tensor, correlation: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """Mean and variance of the larger of two normal variables with a `correlation`::

        d^2  = var1 + var2 - 2*cov        A = (mean1 - mean2)/d        g(a) = phi(a) + a*Phi(a)
        mean = mean1*Phi(A) + mean2*Phi(-A) + d*phi(A)        var = var1*Phi(A) + var2*Phi(-A) - d^2*g(A)*g(-A)

    with ``cov = correlation * sqrt(var1 * var2)``, mean1, var1 `mean` and `var`, mean2, var2 `other_mean` and `other_var`, the normal density phi
    and distribution Phi. Exact; where d is 0, those of the variable with the larger mean. No torch function equals it. Raises ``ValueError``
    for negative variances and shapes that do not broadcast.

    Source: Clark 1961, The Greatest of a Finite Set of Random Variables.
    """
    statistics.check_moments("max_moments", mean, var)
    statistics.check_moments("max_moments", other_mean, other_var)
    if not isinstance(correlation, Tensor) and not -1 <= correlation <= 1:
        raise ValueError(f"max_moments: expected a correlation in [-1, 1], got {correlation}")
    checks.broadcast("max_moments", "the variables", mean.shape, var.shape, other_mean.shape, other_var.shape)
    dtype = mean.dtype
    mean, var, other_mean, other_var = (value.double() for value in (mean, var, other_mean, other_var))
    covariance = correlation * torch.where((var > 0) & (other_var > 0), var * other_var, 1.0).sqrt() * ((var > 0) & (other_var > 0))
    square = var + other_var - 2 * covariance
    certain = square <= maps.TINY
    d = torch.where(certain, 1.0, square).sqrt()
    a = (mean - other_mean) / d
    first, second = maps.distribution(a), maps.distribution(-a)
    product = maps.ramp(a)[0] * maps.ramp(-a)[0]
    larger = mean >= other_mean
    m = torch.where(certain, torch.where(larger, mean, other_mean), mean * first + other_mean * second + d * maps.density(a))
    variance = torch.where(certain, torch.where(larger, var, other_var), var * first + other_var * second - d * d * product)
    return m.to(dtype), variance.to(dtype)


@cache
def _largest_of(count: int) -> tuple[float, float]:
    """Mean and variance of the largest of `count` independent standard normal variables."""
    t = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    weight = maps.density(t) * torch.exp((count - 1) * torch.special.log_ndtr(t))
    weight = weight / weight.sum()
    mean = float((weight * t).sum())
    return mean, float((weight * (t - mean) ** 2).sum())


def max_pool_moments(mean: Tensor, var: Tensor, count: int, correlation: float = 0.0) -> tuple[Tensor, Tensor]:
    """Mean and variance of the largest of `count` normal variables with the same mean and variance, each two of the same `correlation`::

        mean + std*sqrt(1 - correlation)*e        var*(correlation + (1 - correlation)*w)

    with mean e and variance w of the largest of `count` independent standard normal variables, by quadrature. No torch function equals it. Raises
    ``ValueError`` for a count below 1, a correlation outside [0, 1] and a negative var.

    Source: what is the same in all is added to the largest of what is not.
    """
    if count < 1 or count != int(count) or not 0 <= correlation <= 1:
        raise ValueError(f"max_pool_moments: expected a whole count >= 1 and a correlation in [0, 1], got {count} and {correlation}")
    statistics.check_moments("max_pool_moments", mean, var)
    e, w = _largest_of(count)
    certain = var <= 0
    std = torch.where(certain, 1.0, var.double()).sqrt()
    m = torch.where(certain, mean.double(), mean.double() + std * (math.sqrt(1 - correlation) * e))
    return m.to(mean.dtype), var * (correlation + (1 - correlation) * w)


NODES = 129  # of the trapezoid rule on [-7, 7] standard deviations


def argmax_probabilities(mean: Tensor, var: Tensor, dim: int = -1) -> Tensor:
    """How probable each of n independent normal variables along `dim` is to be the largest::

        p_k = E prod_{j != k} Phi((X_k - mean_j) / sqrt(var_j))        X_k ~ N(mean_k, var_k)

    by the trapezoid rule, normalized to the sum 1: with an error of less than 1e-6 where variances differ by a factor of up to 100, of 2e-3 up to
    1000, of 2e-2 beyond. Memory and time grow with n^2. No torch function equals it. Raises ``ValueError`` for a negative var.

    Source: the integral is the definition; approximations without it are in Shekhovtsov & Flach 2019, Feed-forward Propagation in Probabilistic
    Neural Networks with Categorical and Max Layers.
    """
    op = "argmax_probabilities"
    statistics.check_moments(op, mean, var)
    return _argmax(mean, var, dim)


def _argmax(mean: Tensor, var: Tensor, dim: int) -> Tensor:
    dtype, (mean, var) = mean.dtype, (value.double().movedim(dim, -1).unsqueeze(-1) for value in torch.broadcast_tensors(mean, var))
    n = mean.shape[-2]
    std = var.clamp_min(maps.TINY).sqrt()
    t = torch.linspace(-7, 7, NODES, dtype=torch.float64, device=mean.device)
    x = (mean + std * t).unsqueeze(-2)
    below = torch.special.log_ndtr((x - mean.unsqueeze(-3)) / std.unsqueeze(-3))
    others = below.masked_fill(torch.eye(n, dtype=torch.bool, device=mean.device).unsqueeze(-1), 0.0).sum(-2)
    p = (others.exp() * maps.density(t)).sum(-1)
    return (p / p.sum(-1, keepdim=True)).movedim(-1, dim).to(dtype)


def softmax_mean(mean: Tensor, var: Tensor, dim: int = -1) -> Tensor:
    """The expectation of ``torch.softmax`` along `dim` of independent normal variables of these means and variances, approximately:
    `argmax_probabilities` with Gumbel noise, taken as normal with its variance pi^2/6, on each of them (mean, var).

    Mean and largest absolute error against sampling, of normal means with deviation 2 and variances exp(U(-2, 2)): 0.005 and 0.02 for n = 2 and 3,
    0.006 and 0.05 for n = 10, 0.003 and 0.12 for n = 100. No torch function equals it. Raises ``ValueError`` for a negative var.

    Source: the Gumbel noise of a softmax is that of Shekhovtsov & Flach 2019.
    """
    statistics.check_moments("softmax_mean", mean, var)
    return _argmax(mean, var + math.pi**2 / 6, dim)


@operators.public(
    f"Tensor input, Tensor mean, Tensor var, Tensor? weight=None, Tensor? bias=None, float eps=1e-05, *, {ops.ACTIVATION}, "
    f"Tensor? residual=None, {ops.MODULATION}) -> Tensor",
    autocast=False,
)
def analytic_norm(
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Normalize each channel by a mean and a variance that are given, and differentiated: ``x_hat = (input - mean) / sqrt(var + eps)``.

    Same as ``F.batch_norm(input, mean, var, weight, bias, False, 0.0, eps)``, with gradients for mean and var too, and except for the keyword
    arguments (see :mod:`normops.functional`). For statistics that come from a network's weights where they cannot be folded into one.

    Shapes: input, residual ``(N, C, *spatial)``; mean, var ``(C,)``; weight, bias ``(C,)`` or ``(N, C)``; scale, shift ``(N, C)``. Raises
    ``ValueError`` for other shapes.

    Source: Shekhovtsov & Flach 2018 (arXiv 1803.10560).
    """
    op = "analytic_norm"
    checks.check_channels(op, input)
    channels = input.shape[1]
    checks.check_group(op, input, channels, weight, bias, residual, eps, activation, out_dtype)
    for name, value in (("mean", mean), ("var", var)):
        checks.check_vector(op, name, value, input, (channels,))
    statistics.check_variance(op, var)
    weight, bias = checks.modulate(op, input, (channels,), weight, bias, scale, shift)
    if mean.requires_grad or var.requires_grad or transforming():
        weight, bias = _following(mean, var, weight, bias, eps, accumulator(input.dtype))
    direct = plain(input, mean, var, weight, bias, residual)
    return operators.frozen(direct, input, weight, bias, residual, mean, var, channels, eps, activation, negative_slope, out_dtype)


def _following(mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype):
    """weight and bias beside statistics that are held fixed, with the values that they have and the gradients of statistics that are not::

    (x - mean)*rstd*weight + bias = x_hat*(weight*rstd/fixed) + (bias + weight*rstd*(fixed_mean - mean))
    """
    rstd = torch.rsqrt(var.to(dtype) + eps)
    moved = (mean.detach() - mean).to(dtype) * rstd
    ratio = rstd / rstd.detach()
    if weight is None:
        return ratio, moved if bias is None else bias + moved
    return weight * ratio, weight * moved if bias is None else bias + weight * moved


def analytic_norm_weight(
    weight: Tensor,
    mean: Tensor,
    var: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    groups: int = 1,
    eps: float = 1e-10,
    *,
    stride: Sequence[int] = (),
    dilation: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The weight and bias of a linear or convolution layer whose outputs have mean `bias` and standard deviation `scale`::

        m_o = sum_i mean_i * sum_k W_oik        q_o = sum_i var_i * sum_k W_oik^2        independent inputs; k over the taps of a kernel
        weight' = W * scale/sqrt(q + eps)       bias' = bias - m * scale/sqrt(q + eps)

    Returns weight' in weight's dtype and layout, bias' in its dtype, m and q in float64. Gradients reach weight, scale, bias, mean and var.
    No torch function equals it; with mean 0 and var 1 it is weight normalization, ``torch._weight_norm(weight, scale, 0)``.

    Shapes: weight ``(O, I/groups, *kernel)`` of any rank from 2 on; mean, var ``(I,)``; scale (default 1), bias (default 0) ``(O,)``. With a
    `stride`, one number for each dimension of the kernel, it is the weight of a transposed convolution, ``(I, O/groups, *kernel)``: m and q are
    mean and variance over the phases of a stride, in which different taps meet (`dilation`: the distance of taps, default 1).

    Raises ``ValueError`` and ``TypeError`` for what does not fit together. eps is a variance.

    Source: Shekhovtsov & Flach 2018 (arXiv 1803.10560).
    """
    checks.check_norm_weight(weight, mean, var, scale, bias, groups, eps, stride, dilation)
    if plain(weight, mean, var, scale, bias):
        statistics.check_variance("analytic_norm_weight", var)
        return statistics.analytic_norm_weight(True, weight, mean, var, scale, bias, groups, eps, stride, dilation)
    return torch.ops.normops.analytic_norm_weight.default(weight, mean, var, scale, bias, groups, eps, stride=stride, dilation=dilation)
