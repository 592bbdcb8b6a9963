"""The operators ``torch.ops.normops.*``: schemas, argument checks, fake kernels and the launchers behind them.

``group_norm`` is public and differentiable (``autograd.py`` registers its gradient). ``group_norm_fwd`` and ``group_norm_bwd`` are what
compiled graphs hold.
"""

import torch
from torch import Tensor

from normops import backends, cpu
from normops.reference import CODES, accumulator

FLOATS = tuple(cpu.DTYPES)  # what every backend takes

lib = torch.library.Library("normops", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
lib.define(
    "group_norm(Tensor x, int num_groups, Tensor? weight=None, Tensor? bias=None, float eps=1e-05, *, str activation='none', "
    "float negative_slope=0.01, Tensor? residual=None, Tensor? scale=None, Tensor? shift=None, ScalarType? out_dtype=None) -> Tensor",
    tags=_TAGS,
)
lib.define(
    "group_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, int num_groups, float eps, str activation, "
    "float negative_slope, ScalarType? out_dtype) -> (Tensor y, Tensor stats)",
    tags=_TAGS,
)
lib.define(
    "group_norm_bwd(Tensor dy, Tensor x, Tensor stats, Tensor? weight, Tensor? bias, Tensor? residual, int num_groups, str activation, "
    "float negative_slope, bool[4] output_mask) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
    tags=_TAGS,
)


def check(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str,
    out_dtype: torch.dtype | None,
) -> None:
    """Raise ``ValueError`` or ``TypeError`` with one sentence unless the arguments fit together."""
    shape = x.shape
    if x.dtype not in FLOATS:
        raise TypeError(f"group_norm: expected x of dtype float16, bfloat16, float32 or float64, got {x.dtype}")
    if len(shape) < 2:
        raise ValueError(f"group_norm: expected x of shape (N, C, *spatial), got {tuple(shape)}")
    channels = shape[1]
    if num_groups <= 0 or channels % num_groups or not channels:
        raise ValueError(f"group_norm: expected num_groups to divide the number of channels {channels}, got {num_groups}")
    for value in (weight, bias):  # the usual case passes quickly
        if value is not None and (
            value.dim() != 1 or value.numel() != channels or value.dtype not in FLOATS or not value.is_cpu or not x.is_cpu
        ):  # fmt: skip
            _check_vector("weight" if value is weight else "bias", value, x)
    if residual is not None:
        if residual.shape != shape:
            raise ValueError(f"group_norm: expected residual of x's shape {tuple(shape)}, got {tuple(residual.shape)}")
        if residual.dtype != x.dtype:
            raise TypeError(f"group_norm: expected residual of x's dtype {x.dtype}, got {residual.dtype}")
        _check_kind("residual", residual, x)
    if not eps >= 0:
        raise ValueError(f"group_norm: expected eps >= 0, got {eps}")
    if activation not in CODES:
        raise ValueError(f"group_norm: expected activation out of {', '.join(CODES)}, got {activation!r}")
    if out_dtype is not None and out_dtype != x.dtype and (out_dtype != torch.float32 or x.dtype == torch.float64):
        raise TypeError(f"group_norm: expected out_dtype of x's dtype {x.dtype} or float32 for 16-bit x, got {out_dtype}")


def _check_vector(name: str, value: Tensor, x: Tensor) -> None:
    if value.dim() not in (1, 2) or value.shape != x.shape[2 - value.dim() : 2]:
        samples, channels = x.shape[:2]
        raise ValueError(f"group_norm: expected {name} of shape ({channels},) or ({samples}, {channels}), got {tuple(value.shape)}")
    _check_kind(name, value, x)


def _check_kind(name: str, value: Tensor, x: Tensor) -> None:
    if value.dtype not in FLOATS:
        raise TypeError(f"group_norm: expected {name} of dtype float16, bfloat16, float32 or float64, got {value.dtype}")
    if value.device != x.device:
        raise ValueError(f"group_norm: expected {name} on x's device {x.device}, got {value.device}")


def modulate(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The per-sample affine ``(N, C)`` of ``(x_hat*weight + bias) * (1+scale) + shift``, differentiable."""
    for name, value in (("scale", scale), ("shift", shift)):
        if value is None:
            continue
        if value.shape != x.shape[:2]:
            raise ValueError(f"group_norm: expected {name} of shape {tuple(x.shape[:2])}, got {tuple(value.shape)}")
        _check_kind(name, value, x)
    dtype = accumulator(x.dtype)
    if scale is not None:
        scale = scale.to(dtype)
        weight = 1 + scale if weight is None else torch.addcmul(weight.to(dtype), weight.to(dtype), scale)
        bias = None if bias is None else torch.addcmul(bias.to(dtype), bias.to(dtype), scale)
    if shift is not None:
        bias = shift if bias is None else shift + bias
    return weight, bias


def dense(x: Tensor) -> Tensor:
    """`x` itself when the kernels can read it in place, else packed once, channels last if its channels are contiguous."""
    if x.is_contiguous() or _order(x) is not None:
        return x
    if x.stride(1) != 1 or x.shape[1] == 1:
        return x.contiguous()
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _order(x: Tensor) -> bool | None:
    """True for (N, spatial, C) in memory, False for (N, C, spatial), None for neither; spatial dims in any order among themselves."""
    channels = x.shape[1]
    spatial = sorted(zip(x.stride()[2:], x.shape[2:], strict=True))
    for channels_last in (False, True):
        step = channels if channels_last else 1
        size = 1
        for stride, length in spatial:
            if length != 1 and stride != step * size:
                break
            size = size * length
        else:
            if (channels == 1 or x.stride(1) == (1 if channels_last else size)) and (x.shape[0] == 1 or x.stride(0) == channels * size):
                return channels_last
    return None


def _readable(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, bool]:
    """The inputs as the kernels want them (x dense, residual in its order, vectors contiguous), and whether x is channels last."""
    channels_last = False
    if not x.is_contiguous():
        x = dense(x)
        channels_last = not x.is_contiguous() and bool(_order(x))
    if weight is not None and not weight.is_contiguous():
        weight = weight.contiguous()
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    if residual is not None and residual.stride() != x.stride():
        residual = torch.empty_like(x).copy_(residual)
    return x, weight, bias, residual, channels_last


def _empty_stats(x: Tensor, num_groups: int) -> Tensor:
    if x.dtype.itemsize >= 4:
        return x.new_empty((3, x.shape[0], num_groups))
    return x.new_empty((3, x.shape[0], num_groups), dtype=torch.float32)


def group_norm_fwd(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    num_groups: int,
    eps: float,
    activation: str,
    negative_slope: float,
    out_dtype: torch.dtype | None,
    save_stats: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Launch the forward kernel: ``y`` and ``stats`` of shape (3, N, G): mean, what its rounding lost, 1/std."""
    if x.is_cpu and residual is None and out_dtype is None and backends.everyday:
        result = cpu.group_norm_fwd_at_once(x, weight, bias, num_groups, eps, CODES.get(activation), negative_slope, save_stats)
        if result is not None:
            return result
    check(x, num_groups, weight, bias, residual, eps, activation, out_dtype)
    x, weight, bias, residual, channels_last = _readable(x, weight, bias, residual)
    y = torch.empty_like(x) if out_dtype is None else torch.empty_like(x, dtype=out_dtype)
    stats = _empty_stats(x, num_groups) if save_stats else None
    if x.numel():
        code = CODES[activation]
        backends.run("group_norm_fwd", x, y, stats, x, weight, bias, residual, num_groups, channels_last, eps, code, negative_slope)
    return y, stats


def group_norm_bwd(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    num_groups: int,
    activation: str,
    negative_slope: float,
    output_mask: list[bool] | tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Launch the backward kernel: dx, dweight, dbias, dresidual, each None unless wanted."""
    if x.is_cpu and residual is None and backends.everyday:
        result = cpu.group_norm_bwd_at_once(dy, x, stats, weight, bias, num_groups, CODES[activation], negative_slope, output_mask)
        if result is not None:
            return result
    x, weight, bias, residual, channels_last = _readable(x, weight, bias, residual)
    dx, dweight, dbias, dresidual = _empty_gradients(x, weight, bias, output_mask)
    if x.numel():
        if dy.stride() != x.stride():
            dy = torch.empty_like(x, dtype=dy.dtype).copy_(dy)
        code = CODES[activation]
        backends.run(
            "group_norm_bwd", x, dx, dweight, dbias, dresidual, dy, x, stats, weight, bias, residual,
            num_groups, channels_last, code, negative_slope,
        )  # fmt: skip
    else:
        for gradient in (dweight, dbias):
            if gradient is not None:
                gradient.zero_()
    return dx, dweight, dbias, dresidual


def _empty_gradients(x: Tensor, weight: Tensor | None, bias: Tensor | None, mask: list[bool] | tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """For x, weight, bias (all as the kernels want them) and residual."""
    return (
        torch.empty_like(x) if mask[0] else None,
        torch.empty_like(weight) if mask[1] and weight is not None else None,
        torch.empty_like(bias) if mask[2] and bias is not None else None,
        torch.empty_like(x) if mask[3] else None,
    )


# Tensor returns cannot be None in a schema: what is not wanted has no elements
def _group_norm_bwd(dy, x, stats, weight, bias, residual, num_groups, activation, negative_slope, output_mask):
    check(x, num_groups, weight, bias, residual, 0.0, activation, None)
    if dy.shape != x.shape or stats.shape != (3, x.shape[0], num_groups):
        raise ValueError(f"group_norm_bwd: expected dy of shape {tuple(x.shape)} and stats of (3, N, G), got {tuple(dy.shape)}, {tuple(stats.shape)}")
    gradients = group_norm_bwd(dy, x, stats, weight, bias, residual, num_groups, activation, negative_slope, output_mask)
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _group_norm_fwd(x, weight, bias, residual, num_groups, eps, activation, negative_slope, out_dtype):
    return group_norm_fwd(x, weight, bias, residual, num_groups, eps, activation, negative_slope, out_dtype)


def _fake_fwd(x, weight, bias, residual, num_groups, eps, activation, negative_slope, out_dtype):
    check(x, num_groups, weight, bias, residual, eps, activation, out_dtype)
    return torch.empty_like(dense(x), dtype=out_dtype), _empty_stats(x, num_groups)


def _fake_bwd(dy, x, stats, weight, bias, residual, num_groups, activation, negative_slope, output_mask):
    x, weight, bias, _, _ = _readable(x, weight, bias, None)
    gradients = _empty_gradients(x, weight, bias, output_mask)
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in gradients)


for _name, _kernel, _fake in (("group_norm_fwd", _group_norm_fwd, _fake_fwd), ("group_norm_bwd", _group_norm_bwd, _fake_bwd)):
    lib.impl(_name, _kernel, "CompositeExplicitAutograd")
    lib.impl(_name, torch.library.fallthrough_kernel, "Autograd")  # keeps requires_grad off their outputs
    torch.library.register_fake(f"normops::{_name}", _fake, lib=lib)
