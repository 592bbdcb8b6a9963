"""Statistics of each row or position: layer and RMS norm."""

import torch
from torch import Tensor

from normops import checks, operators, ops
from normops.autograd import plain
from normops.reference import accumulator

_ROWS = f"float weight_offset=0., {ops.ACTIVATION}"


@operators.public(
    "Tensor input, SymInt[] normalized_shape, Tensor? weight=None, Tensor? bias=None, float eps=1e-05, *, int? dim=None, "
    f"{_ROWS}, Tensor? residual=None, {ops.MODULATION}) -> Tensor"
)
def layer_norm(
    input: Tensor,
    normalized_shape: int | list[int] | tuple[int, ...] | torch.Size,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dim: int | None = None,
    weight_offset: float = 0.0,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Normalize over the last dimensions, or with ``dim=1`` over the channels of each position of ``(N, C, *spatial)``.

    Same as ``torch.nn.functional.layer_norm(input, normalized_shape, weight, bias, eps)`` except for the keyword arguments: those of
    :mod:`normops.functional`, and `weight_offset`, which is added to weight (1 where weight is stored around zero). ``dim=1`` is
    ``F.layer_norm(input.movedim(1, -1), (C,), weight, bias, eps).movedim(-1, 1)`` without the two copies: channels-first and channels-last images
    are read in place.

    Shapes: the last dimensions of input are normalized_shape (with ``dim=1``: normalized_shape is ``C``); weight, bias normalized_shape; scale,
    shift ``(N, *normalized_shape)`` with N the size of input's first dimension: another one per sample.

    Source: Ba et al. 2016, Layer Normalization (arXiv 1607.06450).
    """
    return _rows(
        "layer_norm", True, input, None, normalized_shape, weight, bias, eps, dim, weight_offset, activation, negative_slope, residual, scale,
        shift, out_dtype,
    )  # fmt: skip


@operators.public(
    "Tensor input, SymInt[] normalized_shape, Tensor? weight=None, float? eps=None, *, int? dim=None, "
    f"{_ROWS}, Tensor? residual=None, {ops.MODULATION}) -> Tensor"
)
def rms_norm(
    input: Tensor,
    normalized_shape: int | list[int] | tuple[int, ...] | torch.Size,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    dim: int | None = None,
    weight_offset: float = 0.0,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Divide by the root mean square of the last dimensions: ``x_hat = input / sqrt(mean(input**2) + eps)``.

    Same as ``torch.nn.functional.rms_norm(input, normalized_shape, weight, eps)`` except for the keyword arguments, which are those of `layer_norm`.
    eps=None is torch's rule: the machine epsilon of the dtype it is computed in, float32's for 16-bit and float32 input, float64's for float64.
    Zero-centred weights as in Gemma: ``weight_offset=1``.

    Source: Zhang & Sennrich 2019, Root Mean Square Layer Normalization (arXiv 1910.07467).
    """
    return _rows(
        "rms_norm", False, input, None, normalized_shape, weight, None, eps, dim, weight_offset, activation, negative_slope, residual, scale,
        shift, out_dtype,
    )  # fmt: skip


@operators.public(
    "Tensor input, Tensor residual, SymInt[] normalized_shape, Tensor? weight=None, Tensor? bias=None, float eps=1e-05, *, "
    f"{_ROWS}, {ops.MODULATION}) -> (Tensor y, Tensor sum)"
)
def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: int | list[int] | tuple[int, ...] | torch.Size,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    weight_offset: float = 0.0,
    activation: str = "none",
    negative_slope: float = 0.01,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`layer_norm` of ``input + residual``, and that sum: input and residual are read once, both results written once.

    Same as ``sum = input + residual; return layer_norm(sum, ...), sum``. residual has input's shape and dtype; the sum is rounded to it.
    """
    return _rows(
        "add_layer_norm", True, input, residual, normalized_shape, weight, bias, eps, None, weight_offset, activation, negative_slope, None, scale,
        shift, out_dtype,
    )  # fmt: skip


@operators.public(
    "Tensor input, Tensor residual, SymInt[] normalized_shape, Tensor? weight=None, float? eps=None, *, "
    f"{_ROWS}, {ops.MODULATION}) -> (Tensor y, Tensor sum)"
)
def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: int | list[int] | tuple[int, ...] | torch.Size,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    activation: str = "none",
    negative_slope: float = 0.01,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`rms_norm` of ``input + residual``, and that sum; see `add_layer_norm`."""
    return _rows(
        "add_rms_norm", False, input, residual, normalized_shape, weight, None, eps, None, weight_offset, activation, negative_slope, None, scale,
        shift, out_dtype,
    )  # fmt: skip


def _rows(
    op, centered, x, addend, normalized_shape, weight, bias, eps, dim, weight_offset, activation, negative_slope, residual, scale, shift, out_dtype
):
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if dim is None:
        ndim = len(shape)
        if not ndim or x.dim() < ndim or x.shape[-ndim:] != shape:
            raise ValueError(f"{op}: expected input whose last dimensions are normalized_shape {shape}, got {tuple(x.shape)}")
    else:
        ndim = 0
        checks.check_channels(op, x)
        if dim != 1 or shape != x.shape[1:2]:
            raise ValueError(f"{op}: expected dim=1 with normalized_shape {tuple(x.shape[1:2])} or dim=None, got dim={dim} with {shape}")
    if eps is None:
        eps = torch.finfo(accumulator(x.dtype)).eps
    checks.check(op, x, shape, weight, bias, residual, eps, activation, out_dtype)
    if addend is not None:
        checks.check_like(op, "residual", addend, x)
    if scale is not None or shift is not None:
        if ndim == x.dim():
            raise ValueError(f"{op}: expected input of shape (N, ..., *normalized_shape) beside scale and shift, got {tuple(x.shape)}")
        weight, bias = checks.modulate(op, x, shape, weight, bias, scale, shift, weight_offset)
        weight_offset = 0.0
    options = ndim, centered, weight_offset, eps, activation, negative_slope, out_dtype
    direct = plain(x, addend, weight, bias, residual)
    if direct:
        if addend is None:
            return operators.row(True, x, weight, bias, residual, *options)
        return operators.add_row(True, x, addend, weight, bias, *options)
    names = dict(zip(("ndim", "centered", "weight_offset", "eps", "activation", "negative_slope", "out_dtype"), options, strict=True))
    if addend is None:
        return torch.ops.normops.row_norm.default(x, weight, bias, residual=residual, **names)
    return torch.ops.normops.add_row_norm.default(x, addend, weight, bias, **names)
