"""The operators ``torch.ops.normops.*``: schemas, argument checks, fake kernels and the launchers behind them.

``X_fwd`` and ``X_bwd`` are what compiled graphs hold. ``group_norm``, ``row_norm`` and ``add_row_norm`` are differentiable (``autograd.py`` registers
their gradients); the other public operators are compositions of these (``functional.py``).

group  a statistic for D = C/num_groups channels and all positions of a sample: group norm, instance norm
row    a statistic for those of one position: layer norm, RMS norm. ``ndim`` trailing dimensions, or with 0 dimension 1 of ``(N, C, *spatial)``
"""

import math
from typing import Any

import torch
from torch import Tensor

from normops import backends, cpu
from normops.checks import check_group
from normops.reference import CODES

lib = torch.library.Library("normops", "DEF")


def define(*schemas: str) -> None:
    """Declare operators; what they do is registered elsewhere."""
    for schema in schemas:
        lib.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


ACTIVATION = "str activation='none', float negative_slope=0.01"
_ROW = "int ndim, bool centered, float weight_offset, float eps, str activation, float negative_slope, ScalarType? out_dtype"
define(
    f"group_norm(Tensor x, int num_groups, Tensor? weight=None, Tensor? bias=None, float eps=1e-05, *, {ACTIVATION}, "
    "Tensor? residual=None, Tensor? scale=None, Tensor? shift=None, ScalarType? out_dtype=None) -> Tensor",
    "group_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? given, int num_groups, float eps, str activation, "
    "float negative_slope, ScalarType? out_dtype) -> (Tensor y, Tensor stats)",
    "group_norm_bwd(Tensor dy, Tensor x, Tensor stats, Tensor? weight, Tensor? bias, Tensor? residual, int num_groups, bool frozen, "
    "str activation, float negative_slope, bool[4] output_mask) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
    "group_norm_stats(Tensor x, int num_groups, float eps) -> Tensor",
    "group_norm_and_stats(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? given, int num_groups, float eps, str activation, "
    "float negative_slope, ScalarType? out_dtype) -> (Tensor y, Tensor stats)",
    "group_moments(Tensor x, int num_groups, float eps) -> (Tensor mean, Tensor std)",
    f"row_norm(Tensor x, Tensor? weight, Tensor? bias, *, {_ROW}, Tensor? residual=None) -> Tensor",
    f"add_row_norm(Tensor x, Tensor addend, Tensor? weight, Tensor? bias, *, {_ROW}) -> (Tensor y, Tensor total)",
    "row_norm_fwd(Tensor x, Tensor? addend, Tensor? weight, Tensor? bias, Tensor? residual, int ndim, bool centered, float weight_offset, "
    "float eps, str activation, float negative_slope, ScalarType? out_dtype) -> (Tensor y, Tensor total, Tensor stats)",
    "row_norm_bwd(Tensor dy, Tensor? dtotal, Tensor x, Tensor stats, Tensor? weight, Tensor? bias, Tensor? residual, int ndim, bool centered, "
    "float weight_offset, str activation, float negative_slope, bool[4] output_mask) -> "
    "(Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
)


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


def dense_rows(x: Tensor, ndim: int) -> Tensor:
    """`dense` for rows over the last `ndim` dimensions, or over dimension 1."""
    return x.contiguous() if ndim else dense(x)


def _like(value: Any, x: Tensor) -> Any:
    """`value` in x's memory order."""
    return value if value is None or value.stride() == x.stride() else torch.empty_like(x, dtype=value.dtype).copy_(value)


def _packed(vectors: Tensor | None) -> Tensor | None:
    return vectors if vectors is None or vectors.is_contiguous() else vectors.contiguous()


def _last(x: Tensor) -> bool:
    """Whether dense x is channels last and not contiguous too."""
    return not x.is_contiguous() and bool(_order(x))


def _empty_stats(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape) if x.dtype.itemsize >= 4 else x.new_empty(shape, dtype=torch.float32)


def row_length(x: Tensor, ndim: int) -> int:
    """How many elements share a statistic."""
    return math.prod(x.shape[-ndim:]) if ndim else x.shape[1]


def _row_sizes(x: Tensor, ndim: int) -> tuple[int, int]:
    """N and C as the row kernels see dense x; channels last over dimension 1 is one sample for each position."""
    channels = row_length(x, ndim)
    return x.numel() // channels if ndim or _last(x) else x.shape[0], channels


def _empty_row_stats(x: Tensor, ndim: int, centered: bool) -> Tensor:
    channels = row_length(x, ndim)
    return _empty_stats(x, 3 if centered else 1, x.numel() // channels if channels else 0)


def _empty_gradients(x: Tensor, weight: Tensor | None, bias: Tensor | None, mask: list[bool] | tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """For x, weight, bias (all as the kernels want them) and residual; of empty x, zeros."""
    dx, dweight, dbias, dresidual = (
        torch.empty_like(x) if mask[0] else None,
        torch.empty_like(weight) if mask[1] and weight is not None else None,
        torch.empty_like(bias) if mask[2] and bias is not None else None,
        torch.empty_like(x) if mask[3] else None,
    )
    if not x.numel():
        for gradient in (dweight, dbias):
            if gradient is not None:
                gradient.zero_()
    return dx, dweight, dbias, dresidual


def group_norm_fwd(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    given: Tensor | None,
    num_groups: int,
    eps: float,
    activation: str,
    negative_slope: float,
    out_dtype: torch.dtype | None,
    save_stats: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Launch the forward kernel: ``y`` and ``stats`` of shape (3, N, G): mean, what its rounding lost, 1/std. Statistics that are `given`
    ((3, 1, G) for all samples alike, or (3, N, G)) are not returned."""
    if x.is_cpu and residual is None and out_dtype is None and given is None and backends.everyday:
        result = cpu.group_norm_fwd_at_once(x, weight, bias, num_groups, eps, CODES.get(activation), negative_slope, save_stats)
        if result is not None:
            return result
    check_group("group_norm", x, num_groups, weight, bias, residual, eps, activation, out_dtype)
    x, weight, bias = dense(x), _packed(weight), _packed(bias)
    residual = _like(residual, x)
    y = torch.empty_like(x) if out_dtype is None else torch.empty_like(x, dtype=out_dtype)
    stats = given
    if given is None and save_stats:
        stats = _empty_stats(x, 3, x.shape[0], num_groups)
    if x.numel():
        _run_group_norm_fwd(y, stats, x, weight, bias, residual, num_groups, given is not None, eps, CODES[activation], negative_slope)
    return y, stats if given is None else None


def _run_group_norm_fwd(y, stats, x, weight, bias, residual, num_groups, frozen, eps, activation, negative_slope) -> None:
    options: tuple
    N, C = x.shape[:2]
    last, single = _last(x), x.numel() == N * C
    if single and not frozen and y is not None:
        options = N, C, num_groups, True, 0.0, eps, activation, negative_slope
        return backends.run("row_norm_fwd", x, y, None, stats, x, None, weight, bias, residual, *options)
    options = N, C, num_groups, last or single, frozen, eps, activation, negative_slope
    backends.run("group_norm_fwd", x, y, stats, x, weight, bias, residual, *options)


def group_norm_bwd(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    num_groups: int,
    frozen: bool,
    activation: str,
    negative_slope: float,
    output_mask: list[bool] | tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Launch the backward kernel: dx, dweight, dbias, dresidual, each None unless wanted. `frozen`: `stats` do not depend on x."""
    if x.is_cpu and residual is None and not frozen and backends.everyday:
        result = cpu.group_norm_bwd_at_once(dy, x, stats, weight, bias, num_groups, CODES[activation], negative_slope, output_mask)
        if result is not None:
            return result
    x, weight, bias = dense(x), _packed(weight), _packed(bias)
    residual, dy = _like(residual, x), _like(dy, x)
    gradients = _empty_gradients(x, weight, bias, output_mask)
    if x.numel():
        N, C = x.shape[:2]
        last, single, code = _last(x), x.numel() == N * C, CODES[activation]
        if single and not frozen:
            backends.run("row_norm_bwd", x, *gradients, dy, None, x, stats, weight, bias, residual, N, C, num_groups, True, 0.0, code, negative_slope)
        else:
            options = N, C, num_groups, last or single, frozen, code, negative_slope
            backends.run("group_norm_bwd", x, *gradients, dy, x, stats, weight, bias, residual, *options)
    return gradients


def group_norm_stats(x: Tensor, num_groups: int, eps: float) -> Tensor:
    """The statistics (3, N, G) of groups alone."""
    check_group("group_norm_stats", x, num_groups, None, None, None, eps, "none", None)
    x = dense(x)
    stats = _empty_stats(x, 3, x.shape[0], num_groups)
    if x.numel():
        _run_group_norm_fwd(None, stats, x, None, None, None, num_groups, False, eps, CODES["none"], 0.0)
    return stats


def row_norm_fwd(
    x: Tensor,
    addend: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    ndim: int,
    centered: bool,
    weight_offset: float,
    eps: float,
    activation: str,
    negative_slope: float,
    out_dtype: torch.dtype | None,
    save_stats: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Launch the forward kernel: ``y``, ``total`` = x + addend, and ``stats`` of shape (3, rows): mean, what its rounding lost, 1/std; not
    `centered`: (1, rows). weight and bias: vectors of a row's length, one for all rows or R of them, each for rows/R."""
    if ndim and x.is_cpu and residual is None and addend is None and out_dtype is None and backends.everyday:
        channels = row_length(x, ndim)
        result = cpu.row_norm_fwd_at_once(x, weight, bias, channels, centered, weight_offset, eps, CODES.get(activation), negative_slope, save_stats)
        if result is not None:
            return result[0], None, result[1]
    x, weight, bias = dense_rows(x, ndim), _packed(weight), _packed(bias)
    residual, addend = _like(residual, x), _like(addend, x)
    y = torch.empty_like(x) if out_dtype is None else torch.empty_like(x, dtype=out_dtype)
    total = None if addend is None else torch.empty_like(x)
    stats = _empty_row_stats(x, ndim, centered) if save_stats else None
    if x.numel():
        N, C = _row_sizes(x, ndim)
        args = (y, total, stats, x, addend, weight, bias, residual, N, C, 1, centered, weight_offset, eps, CODES[activation], negative_slope)
        backends.run("row_norm_fwd", x, *args)
    return y, total, stats


def row_norm_bwd(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    ndim: int,
    centered: bool,
    weight_offset: float,
    activation: str,
    negative_slope: float,
    output_mask: list[bool] | tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Launch the backward kernel: dx (to which `dtotal` is added), dweight, dbias, dresidual, each None unless wanted."""
    if ndim and x.is_cpu and residual is None and dtotal is None and backends.everyday:
        channels, code = row_length(x, ndim), CODES[activation]
        result = cpu.row_norm_bwd_at_once(dy, x, stats, weight, bias, channels, centered, weight_offset, code, negative_slope, output_mask)
        if result is not None:
            return result
    x, weight, bias = dense_rows(x, ndim), _packed(weight), _packed(bias)
    residual, dy, dtotal = _like(residual, x), _like(dy, x), _like(dtotal, x)
    gradients = _empty_gradients(x, weight, bias, output_mask)
    if x.numel():
        N, C = _row_sizes(x, ndim)
        args = (dy, dtotal, x, stats, weight, bias, residual, N, C, 1, centered, weight_offset, CODES[activation], negative_slope)
        backends.run("row_norm_bwd", x, *gradients, *args)
    return gradients


# ---- the operators: a Tensor result cannot be None in a schema, so what is not wanted has no elements ----


def _present(results: tuple[Tensor | None, ...], x: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(0) if result is None else result for result in results)


def _check_backward(op: str, x: Tensor, dy: Tensor) -> None:
    if dy.shape != x.shape:
        raise ValueError(f"{op}: expected dy of shape {tuple(x.shape)}, got {tuple(dy.shape)}")


def _check_rows(op: str, x: Tensor, ndim: int, addend: Tensor | None, *vectors: Tensor | None) -> None:
    if not (0 <= ndim <= x.dim()) or (ndim == 0 and x.dim() < 2):
        raise ValueError(f"{op}: expected ndim of 0 to {x.dim()}, got {ndim}")
    if ndim == 0 and addend is not None:
        raise ValueError(f"{op}: expected no addend with ndim of 0, got one of shape {tuple(addend.shape)}")
    size = row_length(x, ndim)
    samples = x.numel() // size if ndim and size else x.shape[0]
    for value in vectors:
        if value is not None and x.numel() and (not value.numel() or value.numel() % size or samples % (value.numel() // size)):
            raise ValueError(f"{op}: expected vectors of {size} elements, as many as divide {samples}, got {tuple(value.shape)}")


def _group_norm_fwd(x, weight, bias, residual, given, num_groups, eps, activation, negative_slope, out_dtype):
    return _present(group_norm_fwd(x, weight, bias, residual, given, num_groups, eps, activation, negative_slope, out_dtype), x)


def _group_norm_bwd(dy, x, stats, weight, bias, residual, num_groups, frozen, activation, negative_slope, output_mask):
    check_group("group_norm_bwd", x, num_groups, weight, bias, residual, 0.0, activation, None)
    _check_backward("group_norm_bwd", x, dy)
    return _present(group_norm_bwd(dy, x, stats, weight, bias, residual, num_groups, frozen, activation, negative_slope, output_mask), x)


def _row_norm_fwd(x, addend, weight, bias, residual, ndim, *options):
    _check_rows("row_norm_fwd", x, ndim, addend, weight, bias)
    return _present(row_norm_fwd(x, addend, weight, bias, residual, ndim, *options), x)


def _row_norm_bwd(dy, dtotal, x, stats, weight, bias, residual, ndim, *options):
    _check_rows("row_norm_bwd", x, ndim, dtotal, weight, bias)
    _check_backward("row_norm_bwd", x, dy)
    return _present(row_norm_bwd(dy, dtotal, x, stats, weight, bias, residual, ndim, *options), x)


def fake_group_norm_fwd(x, weight, bias, residual, given, num_groups, eps, activation, negative_slope, out_dtype):
    """The fake kernel of ``group_norm_fwd``."""
    check_group("group_norm", x, num_groups, weight, bias, residual, eps, activation, out_dtype)
    stats = fake_stats(x, num_groups) if given is None else None
    return _present((torch.empty_like(dense(x), dtype=out_dtype), stats), x)


def _fake_group_norm_bwd(dy, x, stats, weight, bias, residual, num_groups, frozen, activation, negative_slope, output_mask):
    return _present(_empty_gradients(dense(x), _packed(weight), _packed(bias), output_mask), x)


def fake_stats(x: Tensor, num_groups: int, eps: float = 0.0) -> Tensor:
    """The fake kernel of ``group_norm_stats``."""
    return _empty_stats(x, 3, x.shape[0], num_groups)


def _fake_row_norm_fwd(x, addend, weight, bias, residual, ndim, centered, weight_offset, eps, activation, negative_slope, out_dtype):
    _check_rows("row_norm_fwd", x, ndim, addend, weight, bias)
    x = dense_rows(x, ndim)
    total = None if addend is None else torch.empty_like(x)
    return _present((torch.empty_like(x, dtype=out_dtype), total, _empty_row_stats(x, ndim, centered)), x)


def _fake_row_norm_bwd(dy, dtotal, x, stats, weight, bias, residual, ndim, centered, weight_offset, activation, negative_slope, output_mask):
    return _present(_empty_gradients(dense_rows(x, ndim), _packed(weight), _packed(bias), output_mask), x)


for _name, _kernel, _fake in (
    ("group_norm_fwd", _group_norm_fwd, fake_group_norm_fwd),
    ("group_norm_bwd", _group_norm_bwd, _fake_group_norm_bwd),
    ("group_norm_stats", group_norm_stats, fake_stats),
    ("row_norm_fwd", _row_norm_fwd, _fake_row_norm_fwd),
    ("row_norm_bwd", _row_norm_bwd, _fake_row_norm_bwd),
):
    lib.impl(_name, _kernel, "CompositeExplicitAutograd")
    lib.impl(_name, torch.library.fallthrough_kernel, "Autograd")  # keeps requires_grad off their outputs
    torch.library.register_fake(f"normops::{_name}", _fake, lib=lib)
