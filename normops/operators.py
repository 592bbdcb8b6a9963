"""The differentiable operators: eager calls go past the dispatcher, others to ``torch.ops.normops``, whose kernels for every key are here.

``torch.func`` transforms and forward-mode AD use the differentiable reference; vmap folds its dimension into the samples.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from normops import checks, ops, reference
from normops.autograd import AddRowNorm, GroupNorm, GroupNormAndStats, Moments, RowNorm, any_requires_grad, transforming

# ---- the differentiable calls. direct: past the dispatcher, for plain tensors ----

# Function.apply without its Python half, which only serves functorch: that case never gets here
_apply_group = super(Function, GroupNorm).apply
_apply_row = super(Function, RowNorm).apply


def group(direct: bool, x, weight, bias, residual, given, *options):
    """y of the kernels ``group_norm_fwd`` with options `Groups`."""
    if not direct and transforming():
        num_groups, eps, activation, negative_slope, out_dtype = options
        return reference.group_norm(x, num_groups, weight, bias, eps, activation, negative_slope, residual, out_dtype, given)
    fwd = ops.group_norm_fwd if direct else torch.ops.normops.group_norm_fwd.default
    if torch.is_grad_enabled() and any_requires_grad(x, weight, bias, residual):
        return _apply_group(fwd, x if x.is_contiguous() else ops.dense(x), weight, bias, residual, given, options)
    return fwd(x, weight, bias, residual, given, *options, *((False,) if direct else ()))[0]


def group_and_stats(direct: bool, x, weight, bias, residual, *options):
    """y and the statistics (3, N, G)."""
    if not direct and transforming():
        y = group(False, x, weight, bias, residual, None, *options)
        return y, reference.statistics(x.detach(), options[0], options[1])
    fwd = ops.group_norm_fwd if direct else torch.ops.normops.group_norm_fwd.default
    if torch.is_grad_enabled() and any_requires_grad(x, weight, bias, residual):
        return GroupNormAndStats.apply(fwd, ops.dense(x), weight, bias, residual, None, options)
    return fwd(x, weight, bias, residual, None, *options)


def row(direct: bool, x, weight, bias, residual, *options):
    """y of the kernels ``row_norm_fwd`` with options `Rows`."""
    if not direct and transforming():
        return reference.row_norm(x, weight, bias, residual, *options)
    fwd = ops.row_norm_fwd if direct else torch.ops.normops.row_norm_fwd.default
    if torch.is_grad_enabled() and any_requires_grad(x, weight, bias, residual):
        return _apply_row(fwd, x if x.is_contiguous() else ops.dense_rows(x, options[0]), weight, bias, residual, options)
    return fwd(x, None, weight, bias, residual, *options, *((False,) if direct else ()))[0]


def add_row(direct: bool, x, addend, weight, bias, *options):
    """y and x + addend."""
    if not direct and transforming():
        total = x + addend
        return reference.row_norm(total, weight, bias, None, *options), total
    fwd = ops.row_norm_fwd if direct else torch.ops.normops.row_norm_fwd.default
    if torch.is_grad_enabled() and any_requires_grad(x, addend, weight, bias):
        return AddRowNorm.apply(fwd, ops.dense_rows(x, options[0]), addend, weight, bias, options)
    return fwd(x, addend, weight, bias, None, *options, *((False,) if direct else ()))[:2]


def moments(x: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and ``sqrt(var + eps)`` (N, G) of groups, in the accumulation dtype."""
    if transforming():
        return reference.moments(x, num_groups, eps)
    return Moments.apply(ops.dense(x), num_groups, eps)


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
    size = ops.row_length(full[0], ndim)

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
    return torch.empty_like(ops.dense(x), dtype=out_dtype)


def _row_norm_fake(x, weight, bias, *, ndim, out_dtype, **options):
    return torch.empty_like(ops.dense_rows(x, ndim), dtype=out_dtype)


def _add_row_norm_fake(x, addend, weight, bias, *, ndim, out_dtype, **options):
    x = ops.dense_rows(x, ndim)
    return torch.empty_like(x, dtype=out_dtype), torch.empty_like(x)


def _moments_fake(x, num_groups, eps):
    stats = ops.fake_stats(x, num_groups)
    mean, _, rstd = stats
    return mean, torch.empty_like(rstd)


for _name, _kernel, _batched, _fake in (
    ("group_norm", _group_norm, _group_norm_vmap, _group_norm_fake),
    ("row_norm", _row_norm, _row_norm_vmap, _row_norm_fake),
    ("add_row_norm", _add_row_norm, _add_row_norm_vmap, _add_row_norm_fake),
    ("group_norm_and_stats", _group_norm_and_stats, _group_norm_and_stats, ops.fake_group_norm_fwd),
    ("group_moments", moments, moments, _moments_fake),
):
    ops.lib.impl(_name, _kernel, "Autograd")
    ops.lib.impl(_name, _kernel, "CompositeExplicitAutograd")
    ops.lib.impl(_name, _batched, "FuncTorchBatched")
    torch.library.register_fake(f"normops::{_name}", _fake, lib=ops.lib)
ops.lib.impl("group_norm", autocast_cuda("group_norm"), "AutocastCUDA")
