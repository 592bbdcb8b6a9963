"""The differentiable operators: eager calls go past the dispatcher, others to ``torch.ops.normops``, whose kernels for every key are here.

``torch.func`` transforms and forward-mode AD use the differentiable reference; vmap folds its dimension into the samples.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import Function

from normops import checks, distributed, launch, ops, reference
from normops.autograd import AddRowNorm, BatchNorm, GroupNorm, GroupNormAndStats, Moments, RowNorm, any_requires_grad, eager, transforming
from normops.layout import dense, dense_rows

# ---- the differentiable calls. direct: past the dispatcher, for plain tensors ----

# Function.apply without its Python half, which only serves functorch: that case never gets here
_apply_group = super(Function, GroupNorm).apply
_apply_batch = super(Function, BatchNorm).apply
_apply_row = super(Function, RowNorm).apply


def group(direct: bool, x, weight, bias, residual, given, *options):
    """y of the kernels ``group_norm_fwd`` with options `Groups`."""
    if not direct and transforming():
        num_groups, eps, activation, negative_slope, out_dtype = options
        return reference.group_norm(x, num_groups, weight, bias, eps, activation, negative_slope, residual, out_dtype, given)
    fwd = launch.group_norm_fwd if direct else torch.ops.normops.group_norm_fwd.default
    if torch.is_grad_enabled() and any_requires_grad(x, weight, bias, residual):
        return _apply_group(fwd, x if x.is_contiguous() else dense(x), weight, bias, residual, given, options)
    return fwd(x, weight, bias, residual, given, *options, *((False,) if direct else ()))[0]


def group_and_stats(direct: bool, x, weight, bias, residual, *options):
    """y and the statistics (3, N, G)."""
    if not direct and transforming():
        y = group(False, x, weight, bias, residual, None, *options)
        return y, reference.statistics(x.detach(), options[0], options[1])
    fwd = launch.group_norm_fwd if direct else torch.ops.normops.group_norm_fwd.default
    if torch.is_grad_enabled() and any_requires_grad(x, weight, bias, residual):
        return GroupNormAndStats.apply(fwd, dense(x), weight, bias, residual, None, options)
    return fwd(x, weight, bias, residual, None, *options)


def batch(direct: bool, x, weight, bias, residual, given, group: str | None, *options, running: launch.Running | None = None):
    """y and the statistics, unless they are given: (4, 1, C), or those of all workers of the process group, (5, 1, C). Running statistics are
    updated by direct calls without a group only."""
    if not direct and transforming():
        eps, activation, negative_slope, out_dtype = options
        if group is not None:
            raise NotImplementedError("sync_batch_norm: expected no torch.func transform and no forward-mode derivative")
        stats = reference.batch_statistics(x.detach(), eps) if given is None else None
        return reference.batch_norm(x, weight, bias, eps, activation, negative_slope, residual, out_dtype), stats
    fwd = launch.batch_norm_fwd if direct else torch.ops.normops.batch_norm_fwd.default
    merged = None
    if group is not None and given is None:
        x, statistics = dense(x), launch.batch_norm_stats if direct else torch.ops.normops.batch_norm_stats.default
        merged = given = distributed.merged_statistics(statistics(x.detach(), 0.0), x.numel() // x.shape[1], options[0], group)
    if torch.is_grad_enabled() and any_requires_grad(x, weight, bias, residual):
        y, stats = _apply_batch(fwd, x if x.is_contiguous() else dense(x), weight, bias, residual, given, group, options, running)
    else:
        y, stats = fwd(x, weight, bias, residual, given, *options, *((running,) if direct else ()))
    return y, stats if merged is None else merged


def frozen(direct: bool, x, weight, bias, residual, mean, var, num_groups, eps, *options):
    """y by statistics (C,) that do not depend on x."""
    mean, var = mean.detach(), var.detach()
    if direct:
        return group(True, x, weight, bias, residual, (mean, var), num_groups, eps, *options)
    given = launch.frozen_statistics(x, mean, var, eps)
    return torch.ops.normops.group_norm_and_stats.default(x, weight, bias, residual, given, num_groups, eps, *options)[0]


def row(direct: bool, x, weight, bias, residual, *options):
    """y of the kernels ``row_norm_fwd`` with options `Rows`."""
    if not direct and transforming():
        return reference.row_norm(x, weight, bias, residual, *options)
    fwd = launch.row_norm_fwd if direct else torch.ops.normops.row_norm_fwd.default
    if torch.is_grad_enabled() and any_requires_grad(x, weight, bias, residual):
        return _apply_row(fwd, x if x.is_contiguous() else dense_rows(x, options[0]), weight, bias, residual, options)
    return fwd(x, None, weight, bias, residual, *options, *((False,) if direct else ()))[0]


def add_row(direct: bool, x, addend, weight, bias, *options):
    """y and x + addend."""
    if not direct and transforming():
        total = x + addend
        return reference.row_norm(total, weight, bias, None, *options), total
    fwd = launch.row_norm_fwd if direct else torch.ops.normops.row_norm_fwd.default
    if torch.is_grad_enabled() and any_requires_grad(x, addend, weight, bias):
        return AddRowNorm.apply(fwd, dense_rows(x, options[0]), addend, weight, bias, options)
    return fwd(x, addend, weight, bias, None, *options, *((False,) if direct else ()))[:2]


def moments(x: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and ``sqrt(var + eps)`` (N, G) of groups, in float64."""
    if transforming():
        mean, std = reference.moments(x, num_groups, eps)
        return mean.double(), std.double()
    return Moments.apply(dense(x), num_groups, eps)


# ---- the differentiable operators ----


def _group_norm(x, num_groups, weight=None, bias=None, eps=1e-5, *, activation="none", negative_slope=0.01, residual=None, scale=None, shift=None,
                out_dtype=None):  # fmt: skip
    checks.check_group("group_norm", x, num_groups, weight, bias, residual, eps, activation, out_dtype)
    weight, bias = checks.modulate("group_norm", x, x.shape[1:2], weight, bias, scale, shift)
    return group(False, x, weight, bias, residual, None, num_groups, eps, activation, negative_slope, out_dtype)


def _group_norm_and_stats(x, weight, bias, residual, given, *options):
    """As ``group_norm_fwd``, differentiable: statistics that are given are not returned."""
    if given is None:
        return group_and_stats(False, x, weight, bias, residual, *options)
    return group(False, x, weight, bias, residual, given, *options), x.new_empty(0)


def _batch_norm_and_stats(x, weight, bias, residual, given, *options):
    """As ``batch_norm_fwd``, differentiable: statistics that are given are not returned."""
    y, stats = batch(False, x, weight, bias, residual, given, *options)
    return y, x.new_empty(0) if given is not None else stats


def _row_norm(x, weight, bias, *, residual=None, **options):
    return row(False, x, weight, bias, residual, *_row_options(**options))


def _add_row_norm(x, addend, weight, bias, **options):
    return add_row(False, x, addend, weight, bias, *_row_options(**options))


def _row_options(ndim, centered, weight_offset, eps, activation, negative_slope, out_dtype):
    return ndim, centered, weight_offset, eps, activation, negative_slope, out_dtype


def autocast_cuda(op: str) -> Callable:
    """As CUDA autocast treats group, layer and RMS norm: the result is float32 unless `out_dtype` says another. x itself stays 16-bit, and so
    does what is saved for backward; beside a float32 residual it is widened."""

    def kernel(x, *args, out_dtype=None, residual=None, **options):
        adds = op.startswith("add_")
        if adds:
            residual, args = args[0], args[1:]
        if out_dtype is None and residual is not None and residual.dtype != x.dtype:
            x, residual = x.float(), residual.float()
        elif out_dtype is None and x.dtype in (torch.float16, torch.bfloat16):
            out_dtype = torch.float32
        if adds:
            args = residual, *args
        elif residual is not None:
            options["residual"] = residual
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)):
            return getattr(torch.ops.normops, op).default(x, *args, out_dtype=out_dtype, **options)

    return kernel


def _vmap(rule: Callable, call: Callable, *tensors: Tensor | None):
    """vmap of `call` by a `rule` of the mapped size, the mapped dimensions and the tensors."""
    from torch._functorch.autograd_function import custom_function_call_vmap_helper
    from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

    interpreter: Any = retrieve_current_functorch_interpreter()
    return custom_function_call_vmap_helper(interpreter, lambda info, dims, *values: rule(info.batch_size, dims, *values), call, *tensors)


def _first(value: Tensor, dim: int | None, batch: int) -> Tensor:
    """`value` with the mapped dimension in front, repeated if there is none."""
    return value.unsqueeze(0).expand(batch, *value.shape) if dim is None else value.movedim(dim, 0)


def _group_norm_vmap(x, num_groups, weight=None, bias=None, eps=1e-5, *, residual=None, scale=None, shift=None, **options):
    """Fold the mapped dimension into N; mapped vectors become per-sample ones."""

    def rule(batch, dims, x, *others):
        def folded(value, dim):  # (N, ...) -> (batch*N, ...); a (C,) vector is repeated over N once it differs between samples
            if value is None or (value.dim() == 1 and dim is None):
                return value
            value = _first(value, dim, batch)
            if value.dim() == 2:
                value = value.unsqueeze(1).expand(-1, samples, -1)
            return value.flatten(0, 1)

        samples = x.shape[0] if dims[0] is None else x.movedim(dims[0], 0).shape[1]
        y = call(*(folded(value, dim) for value, dim in zip((x, *others), dims, strict=True)))
        return y.unflatten(0, (batch, samples)), 0

    def call(x, weight, bias, residual, scale, shift):
        return torch.ops.normops.group_norm.default(x, num_groups, weight, bias, eps, residual=residual, scale=scale, shift=shift, **options)

    return _vmap(rule, call, x, weight, bias, residual, scale, shift)


def _row_vmap(call: Callable, ndim: int, full: tuple[Tensor, Tensor | None], vectors: tuple[Tensor | None, ...]):
    """The mapped dimension becomes the first of the rows'; mapped vectors are one for each of its indices."""
    size = launch.row_length(full[0], ndim)

    def rule(batch, dims, *values):
        def folded(value, dim, whole):
            if value is None or (not whole and dim is None and value.numel() == size):
                return value
            value = _first(value, dim, batch)
            return value.flatten(0, 1) if whole and not ndim else value

        result = call(*(folded(value, dim, i < len(full)) for i, (value, dim) in enumerate(zip(values, dims, strict=True))))
        if ndim:
            return result, (0, 0) if isinstance(result, tuple) else 0
        return result.unflatten(0, (batch, -1)), 0

    return _vmap(rule, call, *full, *vectors)


def _row_norm_vmap(x, weight, bias, *, residual=None, ndim, **options):
    def call(x, residual, weight, bias):
        return torch.ops.normops.row_norm.default(x, weight, bias, residual=residual, ndim=ndim, **options)

    return _row_vmap(call, ndim, (x, residual), (weight, bias))


def _add_row_norm_vmap(x, addend, weight, bias, *, ndim, **options):
    def call(x, addend, weight, bias):
        return torch.ops.normops.add_row_norm.default(x, addend, weight, bias, ndim=ndim, **options)

    return _row_vmap(call, ndim, (x, addend), (weight, bias))


def _group_norm_fake(x, num_groups, weight=None, bias=None, eps=1e-5, *, out_dtype=None, **options):
    return torch.empty_like(dense(x), dtype=out_dtype)


def _batch_norm_and_stats_fake(x, weight, bias, residual, given, group, *options):
    y, stats = ops.fake_batch_norm_fwd(x, weight, bias, residual, given, *options)
    return y, stats if group is None or given is not None else launch.empty_stats(x, 5, 1, x.shape[1])


def _row_norm_fake(x, weight, bias, *, ndim, out_dtype, **options):
    return torch.empty_like(dense_rows(x, ndim), dtype=out_dtype)


def _add_row_norm_fake(x, addend, weight, bias, *, ndim, out_dtype, **options):
    x = dense_rows(x, ndim)
    return torch.empty_like(x, dtype=out_dtype), torch.empty_like(x)


def _moments_fake(x, num_groups, eps):
    stats = ops.fake_stats(x, num_groups)
    mean, _, rstd = stats
    return torch.empty_like(mean, dtype=torch.float64), torch.empty_like(rstd, dtype=torch.float64)


for _name, _kernel, _batched, _fake in (
    ("group_norm", _group_norm, _group_norm_vmap, _group_norm_fake),
    ("row_norm", _row_norm, _row_norm_vmap, _row_norm_fake),
    ("add_row_norm", _add_row_norm, _add_row_norm_vmap, _add_row_norm_fake),
    ("group_norm_and_stats", _group_norm_and_stats, _group_norm_and_stats, ops.fake_group_norm_fwd),
    ("group_moments", moments, moments, _moments_fake),
    ("batch_norm_and_stats", _batch_norm_and_stats, _batch_norm_and_stats, _batch_norm_and_stats_fake),
):
    ops.lib.impl(_name, _kernel, "Autograd")
    ops.lib.impl(_name, _kernel, "CompositeExplicitAutograd")
    ops.lib.impl(_name, _batched, "FuncTorchBatched")
    torch.library.register_fake(f"normops::{_name}", _fake, lib=ops.lib)
ops.lib.impl("group_norm", autocast_cuda("group_norm"), "AutocastCUDA")


# ---- compositions of these ----

Body = TypeVar("Body", bound=Callable)


def public(schema: str, autocast: bool = True) -> Callable[[Body], Body]:
    """Make a composition of differentiable operators an operator too, which stands for it wherever calls are traced."""

    def decorate(body: Body) -> Body:
        name = body.__name__
        ops.define(f"{name}({schema}")
        for key in ("CompositeImplicitAutograd", "FuncTorchBatched"):
            ops.lib.impl(name, body, key)
        if autocast:
            ops.lib.impl(name, autocast_cuda(name), "AutocastCUDA")
        names = [key for key, value in inspect.signature(body).parameters.items() if value.kind == value.POSITIONAL_OR_KEYWORD]

        @wraps(body)
        def function(*args, **kwargs):
            if eager() and (not args or isinstance(args[0], Tensor)):
                return body(*args, **kwargs)
            kwargs |= dict(zip(names, args, strict=False))
            for key, value in kwargs.items():  # operators take no numbers for lists and tensors
                if key == "normalized_shape" and isinstance(value, int):
                    kwargs[key] = [value]
                elif key in ("r_max", "d_max") and isinstance(value, int | float):
                    kwargs[key] = torch.full((), value, dtype=torch.float64, device=kwargs["input"].device)
            return getattr(torch.ops.normops, name).default(*args[len(names) :], **kwargs)

        return cast(Body, function)

    return decorate
