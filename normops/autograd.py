"""The gradients: ``torch.autograd.Function`` pairs forward with backward, and backward with double backward.

Eager calls reach the launchers directly; under compile, export, fake tensors and tensor subclasses the same Functions call
``torch.ops.normops``, so that graphs hold ``X_fwd`` and ``X_bwd``. ``torch.func`` transforms and forward-mode AD use the
differentiable reference; vmap folds its batch into N.
"""

import math
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from normops import ops, reference

_C = torch._C


def _private(name: str, default):
    """A private torch probe; where a torch version lacks it, the answer that is always safe."""
    return getattr(_C, name, None) or getattr(getattr(_C, "_functorch", None), name, None) or (lambda *args: default)


any_requires_grad = _private("_any_requires_grad", True)
_dispatch_modes = _private("_len_torch_dispatch_stack", 1)
_function_modes = _private("_len_torch_function_stack", 1)
_transforms_active = _private("peek_interpreter_stack", True)
_any_autocast = _private("_is_any_autocast_enabled", True)
_tracing = _private("_get_tracing_state", True)
_is_compiling = torch.compiler.is_dynamo_compiling  # other tracers run under a dispatch mode
_PLAIN = (Tensor, torch.nn.Parameter)


def transforming() -> bool:
    """Whether a torch.func transform or forward-mode AD is active."""
    return _transforms_active() is not None or forward_ad._current_level >= 0


def eager() -> bool:
    """Whether no tracer, mode, transform or autocast is active."""
    return not (
        _is_compiling()
        or _dispatch_modes()
        or _function_modes()
        or _transforms_active() is not None
        or forward_ad._current_level >= 0
        or _any_autocast()
        or _tracing() is not None
    )


def plain(x: Tensor, *others: Tensor | None) -> bool:
    """Whether a call on these tensors may bypass the dispatcher: eager, and no tensor subclass."""
    if type(x) not in _PLAIN:
        return False
    for tensor in others:
        if tensor is not None and type(tensor) not in _PLAIN:
            return False
    return eager()


# ---- what the two families of kernels have in common: each call as (N, C, S), and which sums its derivatives need ----


@dataclass
class Groups:
    """A call of ``group_norm_fwd``: one statistic for all positions of ``C/num_groups`` channels; `frozen`: it does not depend on x."""

    num_groups: int
    eps: float
    activation: str
    negative_slope: float
    out_dtype: torch.dtype | None
    frozen: bool

    weight_offset: ClassVar[float] = 0.0

    @property
    def sets(self) -> reference.Sets:
        return reference.Sets(self.num_groups)

    def backward(self, direct, dy, dtotal, x, stats, weight, bias, residual, mask):
        bwd = ops.group_norm_bwd if direct else torch.ops.normops.group_norm_bwd.default
        return bwd(dy, x, stats, weight, bias, residual, self.num_groups, self.frozen, self.activation, self.negative_slope, mask)

    def differentiable(self, x, stats, weight, bias, residual, out_dtype):
        given = stats if self.frozen else None
        return reference.group_norm(x, self.num_groups, weight, bias, self.eps, self.activation, self.negative_slope, residual, out_dtype, given)

    def view(self, x: Tensor) -> Tensor:
        return reference.positions(x)

    def spread(self, values: Tensor, channels: int) -> Tensor:
        """A value per group, to broadcast against ``(N, C, S)``."""
        return values.repeat_interleave(channels // self.num_groups, 1)

    def project(self, direct, value, x, x_hat, stats, want_dx=True):
        """``rstd*P(value)``, and the cells of ``value*x_hat`` and of ``value``."""
        ones = x.new_ones(x.shape[:2])
        linear = replace(self, activation="none")
        dx, first, second, _ = linear.backward(direct, value, None, x, stats, ones, ones, None, [want_dx, True, True, False])
        return dx, first.unsqueeze(2), second.unsqueeze(2)

    def cells(self, value: Tensor) -> Tensor:
        """Sums over what neither a statistic nor a parameter distinguishes: of each channel."""
        return value.sum(2, keepdim=True)

    def mean(self, cells: Tensor, x: Tensor) -> Tensor:
        """The means over each set, from cells."""
        samples, channels, positions = x.shape
        groups = cells.reshape(samples, self.num_groups, -1).sum(2, keepdim=True)
        return self.spread(groups / (channels // self.num_groups * positions), channels)


@dataclass
class Rows:
    """A call of ``row_norm_fwd``: a statistic for the last `ndim` dimensions, or with 0 for dimension 1 of ``(N, C, *spatial)``."""

    ndim: int
    centered: bool
    weight_offset: float
    eps: float
    activation: str
    negative_slope: float
    out_dtype: torch.dtype | None

    frozen: ClassVar[bool] = False

    @property
    def sets(self) -> reference.Sets:
        return reference.Sets(1, True, self.centered)

    def backward(self, direct, dy, dtotal, x, stats, weight, bias, residual, mask):
        bwd = ops.row_norm_bwd if direct else torch.ops.normops.row_norm_bwd.default
        options = self.ndim, self.centered, self.weight_offset, self.activation, self.negative_slope, mask
        return bwd(dy, dtotal, x, stats, weight, bias, residual, *options)

    def differentiable(self, x, stats, weight, bias, residual, out_dtype):
        options = self.ndim, self.centered, self.weight_offset, self.eps, self.activation, self.negative_slope, out_dtype
        return reference.row_norm(x, weight, bias, residual, *options)

    def view(self, x: Tensor) -> Tensor:
        return x.reshape(-1, math.prod(x.shape[-self.ndim :]), 1) if self.ndim else x.reshape(*x.shape[:2], -1)

    def spread(self, values: Tensor, channels: int) -> Tensor:
        return values.transpose(2, 3).squeeze(1)

    def project(self, direct, value, x, x_hat, stats, want_dx=True):
        bare = replace(self, ndim=2 if self.ndim else 0, activation="none", weight_offset=0.0)  # of (N, C, 1) or (N, C, S)
        dx = bare.backward(direct, value, None, x, stats, None, None, None, [True, False, False, False])[0] if want_dx else None
        return dx, value * x_hat, value

    def cells(self, value: Tensor) -> Tensor:
        return value

    def mean(self, cells: Tensor, x: Tensor) -> Tensor:
        return cells.mean(1, keepdim=True)


Family = Groups | Rows


# ---- the Functions ----


class GroupNorm(Function):
    """Saves x, the statistics and the small vectors; the activation's argument is computed again in backward."""

    @staticmethod
    def forward(ctx, fwd, x, weight, bias, residual, given, options):  # options: the fields of Groups up to out_dtype
        return _group_forward(ctx, fwd, x, weight, bias, residual, given, options)[0]

    @staticmethod
    def backward(ctx, dy):
        return None, *_backward(ctx, dy, None, ctx.needs_input_grad[1:5]), None, None


def _group_forward(ctx, fwd, x, weight, bias, residual, given, options):
    y, stats = fwd(x, weight, bias, residual, given, *options)
    ctx.save_for_backward(x, stats if given is None else given, weight, bias, None if options[2] == "none" else residual)
    ctx.family, ctx.direct = (Groups, (*options, given is not None)), fwd is ops.group_norm_fwd
    return y, stats


class GroupNormAndStats(GroupNorm):
    """Returns the statistics too, for running averages: they have no gradient."""

    @staticmethod
    def forward(ctx, *args):
        y, stats = _group_forward(ctx, *args)
        ctx.mark_non_differentiable(stats)
        return y, stats

    @staticmethod
    def backward(ctx, dy, *_):
        return GroupNorm.backward(ctx, dy)


class RowNorm(Function):
    """Saves what GroupNorm saves."""

    @staticmethod
    def forward(ctx, fwd, x, weight, bias, residual, options):  # options: the fields of Rows
        y, _, stats = fwd(x, None, weight, bias, residual, *options)
        ctx.save_for_backward(x, stats, weight, bias, None if options[4] == "none" else residual)
        ctx.family, ctx.direct = (Rows, options), fwd is ops.row_norm_fwd
        return y

    @staticmethod
    def backward(ctx, dy):
        return None, *_backward(ctx, dy, None, ctx.needs_input_grad[1:5]), None


class AddRowNorm(Function):
    """Of x + addend, which is returned and saved."""

    @staticmethod
    def forward(ctx, fwd, x, addend, weight, bias, options):
        y, total, stats = fwd(x, addend, weight, bias, None, *options)
        ctx.save_for_backward(total, stats, weight, bias, None)
        ctx.family, ctx.direct = (Rows, options), fwd is ops.row_norm_fwd
        ctx.set_materialize_grads(False)
        if not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]):
            ctx.mark_non_differentiable(total)
        return y, total

    @staticmethod
    def backward(ctx, dy, dtotal):
        of_x, of_addend, *of_vectors = ctx.needs_input_grad[1:5]
        dx, dweight, dbias = dtotal, None, None
        if dy is not None:
            dx, dweight, dbias, _ = _backward(ctx, dy, dtotal, (of_x or of_addend, *of_vectors, False))
        return None, dx if of_x else None, dx if of_addend else None, dweight, dbias, None


def _backward(ctx, dy, dtotal, mask):
    """The gradients of x, weight, bias and residual, each None unless wanted."""
    kind, options = ctx.family
    family = kind(*options)
    x, stats, weight, bias, residual = ctx.saved_tensors
    dresidual = None
    if mask[3] and family.activation == "none":
        mask, dresidual = (*mask[:3], False), dy
    if torch.is_grad_enabled():
        dx, dweight, dbias, dt = NormBackward.apply(family, dy, x, stats, weight, bias, residual, mask)
        if dtotal is not None and mask[0]:
            dx = dx + dtotal
    else:
        direct = ctx.direct and plain(dy)
        dx, dweight, dbias, dt = family.backward(direct, dy, dtotal, x, stats, weight, bias, residual, mask)
    return dx if mask[0] else None, dweight if mask[1] else None, dbias if mask[2] else None, dt if mask[3] else dresidual


class NormBackward(Function):
    """The backward kernel as a differentiable function of dy, x, weight, bias and residual."""

    @staticmethod
    def forward(ctx, family, dy, x, stats, weight, bias, residual, mask):
        ctx.save_for_backward(dy, x, stats, weight, bias, residual)
        ctx.family = family
        ctx.set_materialize_grads(False)
        return tuple(family.backward(plain(dy, x, weight, bias, residual), dy, None, x, stats, weight, bias, residual, mask))

    @staticmethod
    def backward(ctx, *upstream):
        if all(g is None for g in upstream):
            return (None,) * 8
        derive = _differentiable if torch.is_grad_enabled() else _double_backward
        dy, x, weight, bias, residual = derive(ctx.family, upstream, *ctx.saved_tensors)
        return None, dy, x, None, weight, bias, residual, None


def _differentiable(family: Family, upstream, dy, x, stats, weight, bias, residual):
    """The double backward through the reference, itself differentiable: third and higher order."""
    given = (dy, x, weight, bias, residual)
    roots: list
    with torch.enable_grad():
        # aliases: dy may itself be a function of x, and that path is not ours to follow
        roots = [value if value is None else value.view_as(value) if value.requires_grad else value.detach().requires_grad_() for value in given]
        y = family.differentiable(roots[1], stats, roots[2], roots[3], roots[4], dy.dtype)
        wanted = [(root, g) for root, g in zip(roots[1:], upstream, strict=True) if root is not None and g is not None]
        first = torch.autograd.grad(y, [root for root, _ in wanted], roots[0], create_graph=True)
        leaves = [root for root, value in zip(roots, given, strict=True) if value is not None and value.requires_grad]
        second = iter(torch.autograd.grad(first, leaves, [g for _, g in wanted], create_graph=True, allow_unused=True))
    return [next(second) if value is not None and value.requires_grad else None for value in given]


def _double_backward(family: Family, upstream, dy, x, stats, weight, bias, residual):
    """Gradients of ``<u, dx> + <ddweight, dweight> + <ddbias, dbias> + <ddresidual, dresidual>`` for dy, x, weight, bias, residual.

    With xh = x_hat, w = weight, dt = dy*act'(t), g = w*dt, P(v) = v - mean(v) - xh*mean(v*xh) over what shares a statistic (RMS: without
    mean(v); frozen: P(v) = v and no means below), and U = rstd*P(u), which is the backward kernel itself applied to u::

        e   = d/d(dt) = w*U + ddweight*xh + ddbias + ddresidual      d/d(dy) = e*act'(t)
        tau = e*dy*act''(t)                                          d/d(residual) = tau
        v   = ddweight*dt + w*tau - rstd*(mean(g*xh)*u + mean(u*xh)*g)
        d/dx = rstd*P(v) - rstd*mean(g*U)*xh
        d/dweight = sum(dt*U) + sum(tau*xh)                          d/dbias = sum(tau)
    """
    acc = stats.dtype
    given = (dy, x, weight, bias, residual)
    dy, x, residual, u, ddresidual = (value if value is None else family.view(value.to(acc)) for value in (dy, x, residual, upstream[0], upstream[3]))
    direct = plain(x, dy)
    rows, rstd = reference.saved_x_hat(x, stats, family.sets)
    x_hat = family.sets.join(rows, x.shape)
    rstd = family.spread(rstd, x.shape[1])
    w = x.new_ones(1, 1, 1) if weight is None else reference.over(weight, x) + family.weight_offset
    ddweight, ddbias = (value if value is None else reference.over(value, x) for value in upstream[1:3])

    linear = family.activation == "none"
    dt, slope, curvature = dy, dy, dy  # the last two only matter to an activation
    if not linear:
        t = reference.affine(x_hat, weight, bias, residual, family.weight_offset)
        _, slope, curvature = reference.ACTIVATIONS[family.activation](t, family.negative_slope)
        dt = dy * slope

    e, v, d_weight = [], [], []  # terms of sums
    if u is not None:
        projected, u_xh, _ = family.project(direct, u, x, x_hat, stats)
        e.append(w * projected)
        d_weight.append(family.cells(dt * projected))
        if not family.frozen:
            _, dt_xh, _ = family.project(direct, dt, x, x_hat, stats, want_dx=False)
            v.append(torch.addcmul(-rstd * family.mean(w * dt_xh, x) * u, -rstd * family.mean(u_xh, x) * w, dt))
    if ddweight is not None:
        e.append(ddweight * x_hat)
        v.append(ddweight * dt)
    if ddbias is not None:
        e.append(ddbias.expand_as(x))
    if ddresidual is not None:
        e.append(ddresidual)
    d_dt = reduce(torch.add, e)
    tau = d_bias = None
    if not linear:
        tau = d_dt * dy * curvature
        v.append(w * tau)
        _, tau_xh, d_bias = family.project(direct, tau, x, x_hat, stats, want_dx=False)
        d_weight.append(tau_xh)
    d_x: Any = family.project(direct, reduce(torch.add, v), x, x_hat, stats)[0] if v else None
    if u is not None and not family.frozen:
        d_x = torch.addcmul(d_x, -rstd * family.mean(w * d_weight[0], x), x_hat)

    def fold(cells, parameter):
        return None if parameter is None or cells is None else reference.folded(cells.sum(2), parameter)

    d_dy = d_dt if linear else d_dt * slope
    grads = (d_dy, d_x, fold(reduce(torch.add, d_weight) if d_weight else None, weight), fold(d_bias, bias), None if residual is None else tau)
    return [value if value is None else value.reshape(like.shape).to(like.dtype) for value, like in zip(grads, given, strict=True)]


class Moments(Function):
    """Mean and std of groups; its backward is the forward kernel with given statistics."""

    @staticmethod
    def forward(ctx, x, num_groups, eps):
        stats = (ops.group_norm_stats if plain(x) else torch.ops.normops.group_norm_stats.default)(x, num_groups, eps)
        ctx.save_for_backward(x, stats)
        ctx.options = num_groups, eps
        mean, mean_lo, rstd = stats
        return mean + mean_lo, 1 / rstd

    @staticmethod
    def backward(ctx, dmean, dstd):
        x, stats = ctx.saved_tensors
        num_groups, eps = ctx.options
        if torch.is_grad_enabled():
            with torch.enable_grad():
                root = x.view_as(x)
                return *torch.autograd.grad(reference.moments(root, num_groups, eps), root, (dmean, dstd), create_graph=True), None, None
        channels = x.shape[1] // num_groups
        size = max(1, x.numel() // max(1, dmean.numel()))
        weight, bias = ((value / size).repeat_interleave(channels, 1) for value in (dstd, dmean))
        fwd = ops.group_norm_fwd if plain(x, dmean, dstd) else torch.ops.normops.group_norm_fwd.default
        return fwd(x, weight, bias, None, stats, num_groups, eps, "none", 0.0, None)[0], None, None
