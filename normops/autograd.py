"""The gradients: ``torch.autograd.Function`` pairs forward with backward, and backward with double backward.

Eager calls reach the launchers directly; under compile, export, fake tensors and tensor subclasses the same Functions call
``torch.ops.normops``, so that graphs hold ``X_fwd`` and ``X_bwd``. ``torch.func`` transforms and forward-mode AD use the
differentiable reference; vmap folds its batch into N.
"""

from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from normops import launch, reference
from normops.families import Batch, Family, Groups, Rows

_C = torch._C


def _private(name: str, default):
    """A private torch probe; where a torch version lacks it, the answer that is always safe."""
    return getattr(_C, name, None) or getattr(getattr(_C, "_functorch", None), name, None) or (lambda *args: default)


any_requires_grad = _private("_any_requires_grad", True)
_dispatch_modes = _private("_len_torch_dispatch_stack", 1)
_function_modes = _private("_len_torch_function_stack", 1)
_transforms_active = _private("peek_interpreter_stack", True)
_graph_task = _private("_current_graph_task_id", -1)
_any_autocast = _private("_is_any_autocast_enabled", True)
_tracing = _private("_get_tracing_state", True)
_is_compiling = torch.compiler.is_dynamo_compiling  # other tracers run under a dispatch mode
_PLAIN = (Tensor, torch.nn.Parameter)


def transforming() -> bool:
    """Whether a torch.func transform or forward-mode AD is active."""
    return _transforms_active() is not None or forward_ad._current_level >= 0


def recomputing() -> bool:
    """Whether a backward pass is running in this thread: what is called now was called before, and a checkpoint needs it again."""
    return not _is_compiling() and _graph_task() != -1


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
    ctx.save_for_backward(x, given if isinstance(given, Tensor) else stats, weight, bias, None if options[2] == "none" else residual)
    ctx.family, ctx.direct = (Groups, (*options, given is not None)), fwd is launch.group_norm_fwd
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


class BatchNorm(Function):
    """y and the statistics, which have no gradient of their own. Statistics that are `given` are those of x, or of all workers of the process
    `group`, and differentiated."""

    @staticmethod
    def forward(ctx, fwd, x, weight, bias, residual, given, group, options, running):  # options: those of batch_norm_fwd
        y, stats = fwd(x, weight, bias, residual, given, *options, *(() if running is None else (running,)))
        ctx.save_for_backward(x, stats if given is None else given, weight, bias, None if options[1] == "none" else residual)
        ctx.family, ctx.direct = (Batch, (x.shape[1], *options, False, group)), fwd is launch.batch_norm_fwd
        ctx.set_materialize_grads(False)  # zeros for the statistics would be a launch
        if stats is not None:
            ctx.mark_non_differentiable(stats)
        return y, stats

    @staticmethod
    def backward(ctx, dy, *_):
        if dy is None:
            return (None,) * 9
        return None, *_backward(ctx, dy, None, ctx.needs_input_grad[1:5]), None, None, None, None


class RowNorm(Function):
    """Saves what GroupNorm saves."""

    @staticmethod
    def forward(ctx, fwd, x, weight, bias, residual, options):  # options: the fields of Rows
        y, _, stats = fwd(x, None, weight, bias, residual, *options)
        ctx.save_for_backward(x, stats, weight, bias, None if options[4] == "none" else residual)
        ctx.family, ctx.direct = (Rows, options), fwd is launch.row_norm_fwd
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
        ctx.family, ctx.direct = (Rows, options), fwd is launch.row_norm_fwd
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


class BatchInstanceNorm(Function):
    """Instance norm with vectors that depend on the statistics too: `reference.blend` of them. Their gradient joins that of instance norm."""

    @staticmethod
    def forward(ctx, x, rho, weight, bias, residual, given, eps, activation, negative_slope, out_dtype):
        options = x.shape[1], eps, activation, negative_slope, out_dtype
        stats = launch.group_norm_stats(x, x.shape[1], eps)
        mean, std = _mean_and_std(stats)
        scale, shift = reference.blend(mean, std, rho, weight, bias, given)
        y, _ = launch.group_norm_fwd(x, scale, shift, residual, stats, *options)
        ctx.mark_non_differentiable(mean, std)
        ctx.save_for_backward(x, rho, weight, bias, None if activation == "none" else residual, given, stats, scale, shift)
        ctx.options = options
        return y, mean, std

    @staticmethod
    def backward(ctx, dy, *unused):
        x, rho, weight, bias, residual, given, stats, scale, shift = ctx.saved_tensors
        channels, eps, activation, negative_slope, _ = ctx.options
        wanted = *ctx.needs_input_grad[:4], residual is not None and ctx.needs_input_grad[4]
        dresidual = dy if residual is None and ctx.needs_input_grad[4] else None
        if torch.is_grad_enabled():
            roots: list = [value if value is None else value.view_as(value) for value in (x, rho, weight, bias, residual)]
            x, rho, weight, bias, residual = roots
            mean, std = Moments.apply(x, channels, eps)
            vectors = reference.blend(mean, std, rho, weight, bias, given)
            y = GroupNorm.apply(launch.group_norm_fwd, x, *vectors, residual, None, ctx.options)
            found = iter(torch.autograd.grad(y, [root for root, of in zip(roots, wanted, strict=True) if of], dy, create_graph=True))
            gradients = [next(found) if of else None for of in wanted]
            return *gradients[:4], gradients[4] if wanted[4] else dresidual, *(None,) * 5
        call = dy, x, stats, scale, shift, residual, channels
        dscale, dshift = launch.norm_sums(launch.group_norm_bwd, *call, activation, negative_slope)
        mean, std = _mean_and_std(stats)
        dmean, dstd, *dvectors = reference.blend_gradients(mean, std, rho, weight, bias, given, dscale, dshift)
        dx, dt = None, None
        if wanted[0] or wanted[4]:
            means = torch.stack((scale * dscale - std * dstd, scale * dshift - std * dmean)) / max(1, x.numel() // max(1, mean.numel()))
            mask = wanted[0], False, False, wanted[4]
            dx, _, _, dt = launch.group_norm_bwd(*call, True, activation, negative_slope, mask, means.to(stats.dtype))
        return dx, *dvectors, dt if wanted[4] else dresidual, *(None,) * 5


def _mean_and_std(stats: Tensor) -> tuple[Tensor, Tensor]:
    """In float64: all that the statistics know."""
    mean, mean_lo, rstd = stats.double()
    return mean + mean_lo, 1 / rstd


class Moments(Function):
    """Mean and std of groups, in float64. Its backward is the forward kernel with given statistics."""

    @staticmethod
    def forward(ctx, x, num_groups, eps):
        stats = (launch.group_norm_stats if plain(x) else torch.ops.normops.group_norm_stats.default)(x, num_groups, eps)
        ctx.save_for_backward(x, stats)
        ctx.options = num_groups, eps
        return _mean_and_std(stats)

    @staticmethod
    def backward(ctx, dmean, dstd):
        x, stats = ctx.saved_tensors
        num_groups, eps = ctx.options
        if torch.is_grad_enabled():
            with torch.enable_grad():
                root = x.view_as(x)
                values = [value.double() for value in reference.moments(root, num_groups, eps)]
                return *torch.autograd.grad(values, root, (dmean, dstd), create_graph=True), None, None
        channels = x.shape[1] // num_groups
        size = max(1, x.numel() // max(1, dmean.numel()))
        weight, bias = ((value / size).repeat_interleave(channels, 1) for value in (dstd, dmean))
        fwd = launch.group_norm_fwd if plain(x, dmean, dstd) else torch.ops.normops.group_norm_fwd.default
        return fwd(x, weight, bias, None, stats, num_groups, eps, "none", 0.0, None)[0], None, None
