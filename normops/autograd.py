"""The gradient of every op: ``torch.autograd.Function`` pairs forward with backward, and backward with double backward.

Eager calls reach the launchers directly; under compile, export, fake tensors and tensor subclasses the same Functions call
``torch.ops.normops``, so that graphs hold ``group_norm_fwd`` and ``group_norm_bwd``. ``torch.func`` transforms and forward-mode AD use the
differentiable reference; vmap folds its batch into N.
"""

from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from normops import ops, reference

_C = torch._C


def _private(name: str, default):
    """A private torch probe; where a torch version lacks it, the answer that is always safe."""
    return getattr(_C, name, None) or getattr(getattr(_C, "_functorch", None), name, None) or (lambda *args: default)


_any_requires_grad = _private("_any_requires_grad", True)
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


class GroupNorm(Function):
    """Saves x, the statistics and the small vectors; the activation's argument is computed again in backward."""

    @staticmethod
    def forward(ctx, fwd, x, weight, bias, residual, options):  # options: num_groups, eps, activation, negative_slope, out_dtype
        y, stats = fwd(x, weight, bias, residual, *options)
        ctx.save_for_backward(x, stats, weight, bias, None if options[2] == "none" else residual)
        ctx.options, ctx.past_dispatcher = options, fwd is ops.group_norm_fwd
        return y

    @staticmethod
    def backward(ctx, dy):
        x, stats, weight, bias, residual = ctx.saved_tensors
        num_groups, eps, activation, negative_slope, _ = ctx.options
        mask = ctx.needs_input_grad[1:5]
        dresidual = None
        if activation == "none" and mask[3]:
            mask, dresidual = (*mask[:3], False), dy
        args = (dy, x, stats, weight, bias, residual, num_groups, activation, negative_slope, mask)
        if torch.is_grad_enabled():
            gradients = GroupNormBackward.apply(*args, eps)
        elif ctx.past_dispatcher and plain(dy):
            gradients = ops.group_norm_bwd(*args)
        else:
            gradients = torch.ops.normops.group_norm_bwd.default(*args)
        return (
            None,
            gradients[0] if mask[0] else None,
            gradients[1] if mask[1] else None,
            gradients[2] if mask[2] else None,
            gradients[3] if mask[3] else dresidual,
            None,
        )


class GroupNormBackward(Function):
    """``group_norm_bwd`` as a differentiable function of dy, x, weight, bias and residual."""

    @staticmethod
    def forward(ctx, dy, x, stats, weight, bias, residual, num_groups, activation, negative_slope, mask, eps):
        bwd = ops.group_norm_bwd if plain(dy, x, weight, bias, residual) else torch.ops.normops.group_norm_bwd.default
        ctx.save_for_backward(dy, x, stats, weight, bias, residual)
        ctx.options = num_groups, activation, negative_slope, eps
        ctx.set_materialize_grads(False)
        return tuple(bwd(dy, x, stats, weight, bias, residual, num_groups, activation, negative_slope, mask))

    @staticmethod
    def backward(ctx, u, ddweight, ddbias, ddresidual):
        dy, x, stats, weight, bias, residual = ctx.saved_tensors
        num_groups, activation, negative_slope, eps = ctx.options
        upstream = (u, ddweight, ddbias, ddresidual)
        if all(g is None for g in upstream):
            return (None,) * 11
        if torch.is_grad_enabled():
            grads = _differentiable(upstream, dy, x, weight, bias, residual, num_groups, activation, negative_slope, eps)
        else:
            grads = _double_backward(upstream, dy, x, stats, weight, bias, residual, num_groups, activation, negative_slope)
        dy_, x_, weight_, bias_, residual_ = grads
        return dy_, x_, None, weight_, bias_, residual_, None, None, None, None, None


def _differentiable(upstream, dy, x, weight, bias, residual, num_groups, activation, negative_slope, eps):
    """The double backward through the reference, itself differentiable: third and higher order."""
    given = (dy, x, weight, bias, residual)
    roots: list
    with torch.enable_grad():
        # aliases: dy may itself be a function of x, and that path is not ours to follow
        roots = [value if value is None else value.view_as(value) if value.requires_grad else value.detach().requires_grad_() for value in given]
        y = reference.group_norm(roots[1], num_groups, roots[2], roots[3], eps, activation, negative_slope, roots[4], dy.dtype)
        wanted = [(root, g) for root, g in zip(roots[1:], upstream, strict=True) if root is not None and g is not None]
        first = torch.autograd.grad(y, [root for root, _ in wanted], roots[0], create_graph=True)
        leaves = [root for root, value in zip(roots, given, strict=True) if value is not None and value.requires_grad]
        second = iter(torch.autograd.grad(first, leaves, [g for _, g in wanted], create_graph=True, allow_unused=True))
    return [next(second) if value is not None and value.requires_grad else None for value in given]


def _double_backward(upstream, dy, x, stats, weight, bias, residual, num_groups, activation, negative_slope):
    """Gradients of ``<u, dx> + <ddweight, dweight> + <ddbias, dbias> + <ddresidual, dresidual>`` for dy, x, weight, bias, residual.

    With xh = x_hat, w = weight, dt = dy*act'(t), g = w*dt, P(v) = v - mean(v) - xh*mean(v*xh) over a group, and U = rstd*P(u), which is the
    backward kernel itself applied to u::

        e   = d/d(dt) = w*U + ddweight*xh + ddbias + ddresidual      d/d(dy) = e*act'(t)
        tau = e*dy*act''(t)                                          d/d(residual) = tau
        v   = ddweight*dt + w*tau - rstd*(mean(g*xh)*u + mean(u*xh)*g)
        d/dx = rstd*P(v) - rstd*mean(g*U)*xh
        d/dweight = sum(dt*U) + sum(tau*xh)                          d/dbias = sum(tau)
    """
    acc = stats.dtype
    dtypes = [value if value is None else value.dtype for value in (dy, x, weight, bias, residual)]
    dy, x, residual, u, ddresidual = (value if value is None else value.to(acc) for value in (dy, x, residual, upstream[0], upstream[3]))
    samples, channels = x.shape[:2]
    size = x[0].numel() // num_groups if samples else 1
    spatial = tuple(range(2, x.dim()))
    ones = x.new_ones((samples, channels))

    def project(value, want_dx=True):  # rstd*P(value), and per (n, c) sum(value*xh), sum(value)
        bwd = ops.group_norm_bwd if plain(value, x) else torch.ops.normops.group_norm_bwd.default
        return bwd(value, x, stats, ones, ones, None, num_groups, "none", 0.0, [want_dx, True, True, False])[:3]

    def over(vector):  # (C,) or (N, C), to broadcast against x
        return vector.to(acc)[(...,) + (None,) * len(spatial)]

    def group_mean(sums):  # per (n, c), the mean over the group that c belongs to
        means = sums.unflatten(1, (num_groups, -1)).sum(2, keepdim=True) / size
        return means.expand(-1, -1, channels // num_groups).flatten(1)

    x_hat, rstd = reference.saved_x_hat(x, stats, num_groups)
    x_hat = x_hat.flatten(1, 2)
    rstd = rstd.flatten(1).repeat_interleave(channels // num_groups, 1)
    w = ones if weight is None else weight.to(acc)
    ddweight, ddbias = upstream[1:3]

    linear = activation == "none"
    dt, slope, curvature = dy, dy, dy  # the last two only matter to an activation
    if not linear:
        t = reference.affine(x_hat, weight, bias, residual)
        _, slope, curvature = reference.ACTIVATIONS[activation](t, negative_slope)
        dt = dy * slope

    e, v, d_weight = [], [], []  # terms of sums
    if u is not None:
        projected, u_xh, _ = project(u)
        _, dt_xh, _ = project(dt, want_dx=False)
        e.append(over(w) * projected)
        d_weight.append((dt * projected).sum(spatial) if spatial else dt * projected)
        v.append(torch.addcmul(over(-rstd * group_mean(w * dt_xh)) * u, over(-rstd * group_mean(u_xh) * w), dt))
    if ddweight is not None:
        e.append(over(ddweight) * x_hat)
        v.append(over(ddweight) * dt)
    if ddbias is not None:
        e.append(over(ddbias).expand_as(x))
    if ddresidual is not None:
        e.append(ddresidual)
    d_dt = reduce(torch.add, e)
    tau = d_bias = None
    if not linear:
        tau = d_dt * dy * curvature
        v.append(over(w) * tau)
        _, tau_xh, d_bias = project(tau, want_dx=False)
        d_weight.append(tau_xh)
    d_x: Any = project(reduce(torch.add, v))[0] if v else None
    if u is not None:
        d_x = torch.addcmul(d_x, over(-rstd * group_mean(w * d_weight[0])), x_hat)

    def fold(sums, parameter):  # (N, C) to the parameter's shape
        return None if parameter is None or sums is None else sums if parameter.dim() == 2 else sums.sum(0)

    d_dy = d_dt if linear else d_dt * slope
    grads = (d_dy, d_x, fold(reduce(torch.add, d_weight) if d_weight else None, weight), fold(d_bias, bias), None if residual is None else tau)
    return [value if value is None else value.to(dtype) for value, dtype in zip(grads, dtypes, strict=True)]


def group_norm(
    x: Tensor,
    num_groups: int,
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
    """The differentiable op, as the dispatcher calls it at the Autograd key."""
    ops.check(x, num_groups, weight, bias, residual, eps, activation, out_dtype)
    weight, bias = ops.modulate(x, weight, bias, scale, shift)
    if transforming():
        return reference.group_norm(x, num_groups, weight, bias, eps, activation, negative_slope, residual, out_dtype)
    fwd = torch.ops.normops.group_norm_fwd.default
    if torch.is_grad_enabled() and _any_requires_grad(x, weight, bias, residual):
        return _apply(fwd, ops.dense(x), weight, bias, residual, (num_groups, eps, activation, negative_slope, out_dtype))
    return fwd(x, weight, bias, residual, num_groups, eps, activation, negative_slope, out_dtype)[0]


def group_norm_eager(x, num_groups, weight, bias, eps, activation, negative_slope, residual, scale, shift, out_dtype):
    """The same on plain tensors: past the dispatcher."""
    if scale is not None or shift is not None:
        ops.check(x, num_groups, weight, bias, residual, eps, activation, out_dtype)
        weight, bias = ops.modulate(x, weight, bias, scale, shift)
    if torch.is_grad_enabled() and _any_requires_grad(x, weight, bias, residual):
        if not x.is_contiguous():
            x = ops.dense(x)
        return _apply(ops.group_norm_fwd, x, weight, bias, residual, (num_groups, eps, activation, negative_slope, out_dtype))
    return ops.group_norm_fwd(x, weight, bias, residual, num_groups, eps, activation, negative_slope, out_dtype, False)[0]


# Function.apply without its Python half, which only serves functorch: that case never gets here
_apply = super(Function, GroupNorm).apply


def _autocast_cuda(x, num_groups, weight=None, bias=None, eps=1e-5, *, residual=None, out_dtype=None, **options):
    """As CUDA autocast treats F.group_norm: the result is float32. x itself stays 16-bit, and so does what is saved for backward."""
    if x.dtype in (torch.float16, torch.bfloat16):
        out_dtype = torch.float32
        if residual is not None and residual.dtype != x.dtype:
            x, residual = x.float(), residual.float()
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)):
        return torch.ops.normops.group_norm.default(x, num_groups, weight, bias, eps, residual=residual, out_dtype=out_dtype, **options)


def _vmap(x, num_groups, weight=None, bias=None, eps=1e-5, *, residual=None, scale=None, shift=None, **options):
    """Fold the mapped dimension into N; mapped vectors become per-sample ones."""
    from torch._functorch.autograd_function import custom_function_call_vmap_helper
    from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

    def rule(info, in_dims, x, *others):
        batch = info.batch_size

        def first(value, dim):
            return value.unsqueeze(0).expand(batch, *value.shape) if dim is None else value.movedim(dim, 0)

        def folded(value, dim):  # (N, ...) -> (batch*N, ...); a (C,) vector is repeated over N once it differs between samples
            if value is None or (value.dim() == 1 and dim is None):
                return value
            value = first(value, dim)
            if value.dim() == 2:
                value = value.unsqueeze(1).expand(-1, samples, -1)
            return value.flatten(0, 1)

        samples = x.shape[0] if in_dims[0] is None else x.movedim(in_dims[0], 0).shape[1]
        y = call(*(folded(value, dim) for value, dim in zip((x, *others), in_dims, strict=True)))
        return y.unflatten(0, (batch, samples)), 0

    def call(x, weight, bias, residual, scale, shift):
        return torch.ops.normops.group_norm.default(x, num_groups, weight, bias, eps, residual=residual, scale=scale, shift=shift, **options)

    interpreter: Any = retrieve_current_functorch_interpreter()
    return custom_function_call_vmap_helper(interpreter, rule, call, x, weight, bias, residual, scale, shift)


def _fake(x, num_groups, weight=None, bias=None, eps=1e-5, *, out_dtype=None, **options):
    return torch.empty_like(ops.dense(x), dtype=out_dtype)


ops.lib.impl("group_norm", group_norm, "Autograd")
ops.lib.impl("group_norm", group_norm, "CompositeExplicitAutograd")
ops.lib.impl("group_norm", _autocast_cuda, "AutocastCUDA")
ops.lib.impl("group_norm", _vmap, "FuncTorchBatched")
torch.library.register_fake("normops::group_norm", _fake, lib=ops.lib)
