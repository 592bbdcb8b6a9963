"""The operators of propagated statistics: what an activation makes of means and variances, and the weight that they normalize.

``activation_moments`` and ``analytic_norm_weight`` are differentiable; ``X_fwd`` and ``X_bwd`` are what compiled graphs hold. Means and variances are
float64 inside: they are vectors of channels, and a network's length of roundings lies between the first and the last.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from normops import backends, checks, maps, ops, weights
from normops.autograd import any_requires_grad, plain, transforming
from normops.layout import packed

ops.define(
    "activation_moments(Tensor mean, Tensor var, str activation, float[] parameters=[]) -> (Tensor mean, Tensor var)",
    "activation_moments_fwd(Tensor mean, Tensor var, str activation, float[] parameters) -> Tensor",
    "analytic_norm_weight(Tensor weight, Tensor mean, Tensor var, Tensor? scale=None, Tensor? bias=None, int groups=1, float eps=1e-10, *, "
    "int[] stride=[], int[] dilation=[]) -> (Tensor weight, Tensor bias, Tensor m, Tensor q)",
    "analytic_norm_weight_fwd(Tensor weight, Tensor mean, Tensor var, Tensor? scale, Tensor? bias, int groups, float eps) -> "
    "(Tensor weight, Tensor bias, Tensor stats)",
    "analytic_norm_weight_bwd(Tensor dweight, Tensor dbias, Tensor dstats, Tensor weight, Tensor mean, Tensor var, Tensor? scale, Tensor stats, "
    "int groups, float eps) -> (Tensor dweight, Tensor dmean, Tensor dvar, Tensor dscale)",
)


# ---- launchers ----


def activation_moments_fwd(mean: Tensor, var: Tensor, activation: str, parameters: list[float] | tuple[float, ...]) -> Tensor:
    """(6, *): mean and variance of the activation and their derivatives dm/dmu, dm/dv, dV/dmu, dV/dv; in float64."""
    if mean.shape != var.shape:
        mean, var = torch.broadcast_tensors(mean, var)
    mean, var = mean.double().contiguous(), var.double().contiguous()
    out = mean.new_empty((6, *mean.shape))
    if mean.numel():
        first, second = (*parameters, 0.0, 0.0)[:2]
        backends.run("activation_moments_fwd", mean, out, mean, var, maps.CODES[activation], first, second)
    return out


def _weight_layout(weight: Tensor) -> tuple[Tensor, bool]:
    """weight as it lies, if it is contiguous or channels last, else packed; and whether its channels are contiguous."""
    if weight.is_contiguous():
        return weight, False
    moved = weight.movedim(1, -1)
    return (weight, True) if moved.is_contiguous() else (weight.contiguous(), False)


def analytic_norm_weight_fwd(weight, mean, var, scale, bias, groups, eps):
    """The normalized weight in weight's layout, its bias, and stats (2, O) in float64: m and q."""
    weight, last = _weight_layout(weight)
    outputs = weight.shape[0]
    mean, var = mean.double().contiguous(), var.double().contiguous()
    new = torch.empty_like(weight)
    new_bias = weight.new_empty(outputs)
    stats = mean.new_empty(2, outputs)
    backends.run(
        "analytic_norm_weight_fwd", weight, new, new_bias, stats, weight, mean, var, packed(scale), packed(bias),
        outputs, weight.numel() // (outputs * weight.shape[1]), groups, last, eps,
    )  # fmt: skip
    return new, new_bias, stats


def analytic_norm_weight_bwd(dweight, dbias, dstats, weight, mean, var, scale, stats, groups, eps):
    """The gradients of weight, mean, var and scale from those of the normalized weight and bias, m and q."""
    weight, last = _weight_layout(weight)
    outputs = weight.shape[0]
    if dweight.stride() != weight.stride():
        dweight = torch.empty_like(weight).copy_(dweight)
    mean, var = mean.double().contiguous(), var.double().contiguous()
    of_weight, of_mean, of_var = torch.empty_like(weight), torch.empty_like(mean), torch.empty_like(var)
    of_scale = stats.new_empty(outputs)
    backends.run(
        "analytic_norm_weight_bwd", weight, of_weight, of_mean, of_var, of_scale, dweight, packed(dbias.double()), packed(dstats), weight, mean, var,
        packed(scale), stats, outputs, weight.numel() // (outputs * weight.shape[1]), groups, last, eps,
    )  # fmt: skip
    return of_weight, of_mean, of_var, of_scale


# ---- gradients ----


class ActivationMoments(Function):
    """Saves the partial derivatives; differentiated again, it computes them again with torch functions."""

    @staticmethod
    def forward(ctx, fwd, mean, var, activation, parameters):
        six = fwd(mean, var, activation, parameters)
        ctx.save_for_backward(mean, var, six)
        ctx.options = activation, parameters
        return six[0].to(mean.dtype), six[1].to(var.dtype)

    @staticmethod
    def backward(ctx, dm, dvariance):
        mean, var, six = ctx.saved_tensors
        if torch.is_grad_enabled():
            six = maps.moments(ctx.options[0], mean.double(), var.double(), ctx.options[1])
        _, _, m_mu, m_v, v_mu, v_v = six
        dmean, dvar = torch.addcmul(dm * m_mu, dvariance, v_mu), torch.addcmul(dm * m_v, dvariance, v_v)
        return None, dmean.sum_to_size(mean.shape).to(mean.dtype), dvar.sum_to_size(var.shape).to(var.dtype), None, None


class AnalyticNormWeight(Function):
    """Saves what it was given, m and q."""

    @staticmethod
    def forward(ctx, fwd, weight, mean, var, scale, bias, groups, eps):
        new, new_bias, stats = fwd(weight, mean, var, scale, bias, groups, eps)
        ctx.save_for_backward(weight, mean, var, scale, bias, stats)
        ctx.options, ctx.direct = (groups, eps), fwd is analytic_norm_weight_fwd
        ctx.set_materialize_grads(False)
        return new, new_bias, stats

    @staticmethod
    def backward(ctx, dweight, dbias, dstats):
        weight, mean, var, scale, bias, stats = ctx.saved_tensors
        dweight, dbias, dstats = (
            torch.zeros_like(like) if gradient is None else gradient for gradient, like in ((dweight, weight), (dbias, stats[0]), (dstats, stats))
        )
        if torch.is_grad_enabled():
            needed = [value is not None and wanted for value, wanted in zip(ctx.saved_tensors, ctx.needs_input_grad[1:6], strict=False)]
            leaves = [value if value is None else value.view_as(value) for value in (weight, mean, var, scale, bias)]
            results = weights.analytic_norm_weight(*leaves, *ctx.options)
            wanted = [leaf for leaf, want in zip(leaves, needed, strict=True) if want and leaf is not None]
            found = iter(torch.autograd.grad(results, wanted, (dweight, dbias, *dstats), create_graph=True, allow_unused=True))
            return None, *(next(found) if want else None for want in needed), None, None
        bwd = analytic_norm_weight_bwd if ctx.direct and plain(dweight) else torch.ops.normops.analytic_norm_weight_bwd.default
        of_weight, of_mean, of_var, of_scale = bwd(dweight, dbias, dstats, weight, mean, var, scale, stats, *ctx.options)
        of_scale = None if scale is None else of_scale.to(scale.dtype)
        return None, of_weight, of_mean.to(mean.dtype), of_var.to(var.dtype), of_scale, None if bias is None else dbias.to(bias.dtype), None, None


# Function.apply without its Python half, which only serves functorch: that case never gets here
_apply_moments = super(Function, ActivationMoments).apply
_apply_weight = super(Function, AnalyticNormWeight).apply


# ---- calls ----


def check_moments(op: str, mean: Tensor, var: Tensor) -> None:
    """Mean and variance of the same variables."""
    for name, value in (("mean", mean), ("var", var)):
        if not isinstance(value, Tensor) or value.dtype not in checks.FLOATS:
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{op}: expected {name}, a tensor of dtype float16, bfloat16, float32 or float64, got {got}")
    if mean.device != var.device:
        raise ValueError(f"{op}: expected var on mean's device {mean.device}, got {var.device}")
    if mean.shape != var.shape:
        checks.broadcast(op, "mean and var", mean.shape, var.shape)
    check_variance(op, var)


def check_variance(op: str, var: Tensor) -> None:
    """No negative variance; elsewhere than on a CPU the question would wait for the device."""
    if var.is_cpu and plain(var) and var.numel() and (least := var.detach().min().item()) < 0:
        raise ValueError(f"{op}: expected var >= 0, got {least:g}")


def activation_moments(direct: bool, mean: Tensor, var: Tensor, activation: str, parameters: Any) -> tuple[Tensor, Tensor]:
    """Mean and variance of the activation. direct: past the dispatcher, for plain tensors."""
    if not direct and transforming():
        m, variance, *_ = maps.moments(activation, mean.double(), var.double(), tuple(parameters))
        return m.to(mean.dtype), variance.to(var.dtype)
    fwd = activation_moments_fwd if direct else torch.ops.normops.activation_moments_fwd.default
    if not (torch.is_grad_enabled() and any_requires_grad(mean, var)):
        m, variance = fwd(mean, var, activation, parameters)[:2]
        return m.to(mean.dtype), variance.to(var.dtype)
    return _apply_moments(fwd, mean, var, activation, tuple(parameters))


def norm_weight(direct: bool, weight, mean, var, scale, bias, groups, eps) -> tuple[Tensor, Tensor, Tensor]:
    """The normalized weight and bias, and stats: m and q."""
    if not direct and transforming():
        new, new_bias, m, q = weights.analytic_norm_weight(weight, mean, var, scale, bias, groups, eps)
        return new, new_bias, torch.stack((m, q))
    fwd = analytic_norm_weight_fwd if direct else torch.ops.normops.analytic_norm_weight_fwd.default
    if not (torch.is_grad_enabled() and any_requires_grad(weight, mean, var, scale, bias)):
        return fwd(weight, mean, var, scale, bias, groups, eps)
    return _apply_weight(fwd, weight, mean, var, scale, bias, groups, eps)


def analytic_norm_weight(direct: bool, weight, mean, var, scale, bias, groups, eps, stride=(), dilation=()):
    """The normalized weight and bias, m and q. stride: of a transposed convolution, whose few weights need no kernel."""
    if stride:
        m, q = weights.transposed_moments(weight, mean, var, groups, stride, dilation or (1,) * len(stride))
        return *weights.normalized(weight, m, q, scale, bias, groups, eps, transposed=True), m, q
    new, new_bias, stats = norm_weight(direct, weight, mean, var, scale, bias, groups, eps)
    m, q = (stats[0], stats[1]) if direct else (stats[0].clone(), stats[1].clone())  # results of an operator share no memory
    return new, new_bias, m, q


# ---- the operators ----


def _activation_moments(mean, var, activation, parameters=()):
    check_moments("activation_moments", mean, var)
    return activation_moments(False, mean, var, activation, checks.check_map(activation, parameters))


def _analytic_norm_weight(weight, mean, var, scale=None, bias=None, groups=1, eps=1e-10, *, stride=(), dilation=()):
    checks.check_norm_weight(weight, mean, var, scale, bias, groups, eps, stride, dilation)
    check_variance("analytic_norm_weight", var)
    return analytic_norm_weight(False, weight, mean, var, scale, bias, groups, eps, stride, dilation)


def _fake_activation_moments(mean, var, activation, parameters=()):
    shape = torch.broadcast_shapes(mean.shape, var.shape)
    return mean.new_empty(shape), var.new_empty(shape)


def _fake_activation_moments_fwd(mean, var, activation, parameters):
    return mean.new_empty((6, *torch.broadcast_shapes(mean.shape, var.shape)), dtype=torch.float64)


def _fake_analytic_norm_weight(weight, mean, var, scale=None, bias=None, groups=1, eps=1e-10, *, stride=(), dilation=()):
    outputs = weight.shape[1] * groups if stride else weight.shape[0]
    m = mean.new_empty(outputs, dtype=torch.float64)
    return torch.empty_like(weight if stride else _weight_layout(weight)[0]), weight.new_empty(outputs), m, torch.empty_like(m)


def _fake_analytic_norm_weight_fwd(weight, mean, var, scale, bias, groups, eps):
    return torch.empty_like(_weight_layout(weight)[0]), weight.new_empty(weight.shape[0]), mean.new_empty((2, weight.shape[0]), dtype=torch.float64)


def _fake_analytic_norm_weight_bwd(dweight, dbias, dstats, weight, mean, var, scale, stats, groups, eps):
    of_mean = mean.new_empty(mean.shape, dtype=torch.float64)
    return torch.empty_like(_weight_layout(weight)[0]), of_mean, torch.empty_like(of_mean), stats.new_empty(weight.shape[0])


_kernel: Callable
_fake: Callable
for _name, _kernel, _fake in (
    ("activation_moments", _activation_moments, _fake_activation_moments),
    ("analytic_norm_weight", _analytic_norm_weight, _fake_analytic_norm_weight),
):
    for _key in ("Autograd", "CompositeExplicitAutograd", "FuncTorchBatched"):
        ops.lib.impl(_name, _kernel, _key)
    torch.library.register_fake(f"normops::{_name}", _fake, lib=ops.lib)
for _name, _kernel, _fake in (
    ("activation_moments_fwd", activation_moments_fwd, _fake_activation_moments_fwd),
    ("analytic_norm_weight_fwd", analytic_norm_weight_fwd, _fake_analytic_norm_weight_fwd),
    ("analytic_norm_weight_bwd", analytic_norm_weight_bwd, _fake_analytic_norm_weight_bwd),
):
    ops.lib.impl(_name, _kernel, "CompositeExplicitAutograd")
    ops.lib.impl(_name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"normops::{_name}", _fake, lib=ops.lib)
