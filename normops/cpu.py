"""The C++ CPU kernels ``normops._C`` as a backend: addresses and dtype codes for a plain C call.

The kernels have one dtype for x, y, dy and dx; another dtype of y or dy is met by a cast, as torch does.
"""

import importlib
from functools import cache

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}


def group_norm_fwd(y, stats, x, weight, bias, residual, num_groups, channels_last, eps, activation, negative_slope) -> None:
    if y.dtype != x.dtype:
        x = x.to(y.dtype)
        residual = None if residual is None else residual.to(y.dtype)
    shape = x.shape
    _cpu_kernels().group_norm_fwd(
        y.data_ptr(), eps,
        x.data_ptr(), _address(residual), _address(stats), DTYPES[x.dtype], *_parameters(weight, bias),
        shape[0], shape[1], x.numel(), num_groups, channels_last, activation, negative_slope,
    )  # fmt: skip


def group_norm_bwd(
    dx, dweight, dbias, dresidual, dy, x, stats, weight, bias, residual, num_groups, channels_last, activation, negative_slope
) -> None:
    if dy.dtype != x.dtype:
        wide_dx, wide_dresidual = (None if out is None else torch.empty_like(dy) for out in (dx, dresidual))
        residual = None if residual is None else residual.to(dy.dtype)
        group_norm_bwd(
            wide_dx, dweight, dbias, wide_dresidual, dy, x.to(dy.dtype), stats, weight, bias, residual,
            num_groups, channels_last, activation, negative_slope,
        )  # fmt: skip
        for out, wide in ((dx, wide_dx), (dresidual, wide_dresidual)):
            if out is not None:
                out.copy_(wide)
        return
    shape = x.shape
    _cpu_kernels().group_norm_bwd(
        _address(dx), _address(dresidual), dy.data_ptr(), *_parameters(dweight, dbias),
        x.data_ptr(), _address(residual), stats.data_ptr(), DTYPES[x.dtype], *_parameters(weight, bias),
        shape[0], shape[1], x.numel(), num_groups, channels_last, activation, negative_slope,
    )  # fmt: skip


def group_norm_fwd_at_once(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    eps: float,
    activation: int | None,
    negative_slope: float,
    save_stats: bool,
) -> tuple[Tensor, Tensor | None] | None:
    """The everyday call in as few steps as Python allows: contiguous x on the CPU, vectors of C. None when anything is out of the ordinary.

    On small tensors the checks, the choice of a backend and the calls between them cost more than the arithmetic.
    """
    shape, dtype = x.shape, DTYPES.get(x.dtype)
    if dtype is None or activation is None or len(shape) < 2 or not x.is_contiguous() or not eps >= 0:
        return None
    channels, numel = shape[1], x.numel()
    if not numel or num_groups <= 0 or channels % num_groups:
        return None
    weight_at = weight_dtype = bias_at = bias_dtype = 0
    if weight is not None:
        weight_dtype = DTYPES.get(weight.dtype, -1)
        if weight_dtype < 0 or weight.dim() != 1 or weight.numel() != channels or not weight.is_cpu or not weight.is_contiguous():
            return None
        weight_at = weight.data_ptr()
    if bias is not None:
        bias_dtype = DTYPES.get(bias.dtype, -1)
        if bias_dtype < 0 or bias.dim() != 1 or bias.numel() != channels or not bias.is_cpu or not bias.is_contiguous():
            return None
        bias_at = bias.data_ptr()
    y = torch.empty_like(x)
    stats = None
    if save_stats:
        stats = x.new_empty((3, shape[0], num_groups)) if dtype in (0, 3) else x.new_empty((3, shape[0], num_groups), dtype=torch.float32)
    _cpu_kernels().group_norm_fwd(
        y.data_ptr(), eps, x.data_ptr(), 0, 0 if stats is None else stats.data_ptr(), dtype, weight_at, weight_dtype, 1, bias_at, bias_dtype, 1,
        shape[0], channels, numel, num_groups, False, activation, negative_slope,
    )  # fmt: skip
    return y, stats


def group_norm_bwd_at_once(
    dy: Tensor, x: Tensor, stats: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int, activation: int, negative_slope: float, mask
) -> tuple[Tensor | None, ...] | None:
    """The backward of :func:`group_norm_fwd_at_once`: dx, dweight, dbias, dresidual; None when anything is out of the ordinary."""
    dtype = DTYPES[x.dtype]
    if mask[3] or not x.is_contiguous() or not dy.is_contiguous() or dy.dtype is not x.dtype or not x.numel():
        return None
    dx = torch.empty_like(x) if mask[0] else None
    dweight = dbias = None
    weight_at = weight_dtype = bias_at = bias_dtype = dweight_at = dbias_at = 0
    if weight is not None:
        if weight.dim() != 1 or not weight.is_contiguous():
            return None
        weight_at, weight_dtype = weight.data_ptr(), DTYPES[weight.dtype]
        if mask[1]:
            dweight = torch.empty_like(weight)
            dweight_at = dweight.data_ptr()
    if bias is not None:
        if bias.dim() != 1 or not bias.is_contiguous():
            return None
        bias_at, bias_dtype = bias.data_ptr(), DTYPES[bias.dtype]
        if mask[2]:
            dbias = torch.empty_like(bias)
            dbias_at = dbias.data_ptr()
    shape = x.shape
    _cpu_kernels().group_norm_bwd(
        0 if dx is None else dx.data_ptr(), 0, dy.data_ptr(), dweight_at, weight_dtype, 1, dbias_at, bias_dtype, 1,
        x.data_ptr(), 0, stats.data_ptr(), dtype, weight_at, weight_dtype, 1, bias_at, bias_dtype, 1,
        shape[0], shape[1], x.numel(), num_groups, False, activation, negative_slope,
    )  # fmt: skip
    return dx, dweight, dbias, None


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _parameters(weight: Tensor | None, bias: Tensor | None) -> tuple[int, ...]:
    """Address, dtype and number of dimensions of both."""
    if weight is not None and bias is not None:
        return weight.data_ptr(), DTYPES[weight.dtype], weight.dim(), bias.data_ptr(), DTYPES[bias.dtype], bias.dim()
    if weight is not None:
        return weight.data_ptr(), DTYPES[weight.dtype], weight.dim(), 0, 0, 0
    if bias is not None:
        return 0, 0, 0, bias.data_ptr(), DTYPES[bias.dtype], bias.dim()
    return 0, 0, 0, 0, 0, 0


@cache
def _cpu_kernels():
    return importlib.import_module("normops._C")
