"""The operators ``torch.ops.normops.*``: schemas, argument checks and fake kernels around the launchers.

``X_fwd`` and ``X_bwd`` are what compiled graphs hold. The differentiable operators are declared here too; ``operators.py`` gives them their kernels,
and makes operators of their compositions in ``functional``.
"""

import torch
from torch import Tensor

from normops import launch
from normops.checks import check_group
from normops.layout import dense, dense_rows, packed

lib = torch.library.Library("normops", "DEF")


def define(*schemas: str) -> None:
    """Declare operators; what they do is registered elsewhere."""
    for schema in schemas:
        lib.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


MODULATION = "Tensor? scale=None, Tensor? shift=None, ScalarType? out_dtype=None"
ACTIVATION = "str activation='none', float negative_slope=0.01"
_ROW = "int ndim, bool centered, float weight_offset, float eps, str activation, float negative_slope, ScalarType? out_dtype"
define(
    f"group_norm(Tensor x, int num_groups, Tensor? weight=None, Tensor? bias=None, float eps=1e-05, *, {ACTIVATION}, "
    "Tensor? residual=None, Tensor? scale=None, Tensor? shift=None, ScalarType? out_dtype=None) -> Tensor",
    "group_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? given, int num_groups, float eps, str activation, "
    "float negative_slope, ScalarType? out_dtype) -> (Tensor y, Tensor stats)",
    "group_norm_bwd(Tensor dy, Tensor x, Tensor stats, Tensor? weight, Tensor? bias, Tensor? residual, int num_groups, bool frozen, "
    "str activation, float negative_slope, bool[4] output_mask, Tensor? means=None) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
    "group_norm_stats(Tensor x, int num_groups, float eps) -> Tensor",
    "group_norm_and_stats(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? given, int num_groups, float eps, str activation, "
    "float negative_slope, ScalarType? out_dtype) -> (Tensor y, Tensor stats)",
    "group_moments(Tensor x, int num_groups, float eps) -> (Tensor mean, Tensor std)",
    "batch_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? given, float eps, str activation, "
    "float negative_slope, ScalarType? out_dtype) -> (Tensor y, Tensor stats)",
    "batch_norm_bwd(Tensor dy, Tensor x, Tensor stats, Tensor? weight, Tensor? bias, Tensor? residual, str activation, "
    "float negative_slope, bool[4] output_mask) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
    "batch_norm_stats(Tensor x, float eps) -> Tensor",
    "batch_norm_and_stats(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? given, str? group, float eps, str activation, "
    "float negative_slope, ScalarType? out_dtype) -> (Tensor y, Tensor stats)",
    f"row_norm(Tensor x, Tensor? weight, Tensor? bias, *, {_ROW}, Tensor? residual=None) -> Tensor",
    f"add_row_norm(Tensor x, Tensor addend, Tensor? weight, Tensor? bias, *, {_ROW}) -> (Tensor y, Tensor total)",
    "row_norm_fwd(Tensor x, Tensor? addend, Tensor? weight, Tensor? bias, Tensor? residual, int ndim, bool centered, float weight_offset, "
    "float eps, str activation, float negative_slope, ScalarType? out_dtype) -> (Tensor y, Tensor total, Tensor stats)",
    "row_norm_bwd(Tensor dy, Tensor? dtotal, Tensor x, Tensor stats, Tensor? weight, Tensor? bias, Tensor? residual, int ndim, bool centered, "
    "float weight_offset, str activation, float negative_slope, bool[4] output_mask) -> "
    "(Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
)


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
    size = launch.row_length(x, ndim)
    samples = x.numel() // size if ndim and size else x.shape[0]
    for value in vectors:
        if value is not None and x.numel() and (not value.numel() or value.numel() % size or samples % (value.numel() // size)):
            raise ValueError(f"{op}: expected vectors of {size} elements, as many as divide {samples}, got {tuple(value.shape)}")


def _group_norm_fwd(x, weight, bias, residual, given, num_groups, eps, activation, negative_slope, out_dtype):
    return _present(launch.group_norm_fwd(x, weight, bias, residual, given, num_groups, eps, activation, negative_slope, out_dtype), x)


def _group_norm_bwd(dy, x, stats, weight, bias, residual, num_groups, frozen, activation, *options):
    check_group("group_norm_bwd", x, num_groups, weight, bias, residual, 0.0, activation, None)
    _check_backward("group_norm_bwd", x, dy)
    return _present(launch.group_norm_bwd(dy, x, stats, weight, bias, residual, num_groups, frozen, activation, *options), x)


def _batch_norm_fwd(x, weight, bias, residual, given, *options):
    return _present(launch.batch_norm_fwd(x, weight, bias, residual, given, *options), x)


def _batch_norm_bwd(dy, x, stats, weight, bias, residual, activation, *options):
    check_group("batch_norm_bwd", x, x.shape[1], weight, bias, residual, 0.0, activation, None)
    _check_backward("batch_norm_bwd", x, dy)
    return _present(launch.batch_norm_bwd(dy, x, stats, weight, bias, residual, activation, *options), x)


def _row_norm_fwd(x, addend, weight, bias, residual, ndim, *options):
    _check_rows("row_norm_fwd", x, ndim, addend, weight, bias)
    return _present(launch.row_norm_fwd(x, addend, weight, bias, residual, ndim, *options), x)


def _row_norm_bwd(dy, dtotal, x, stats, weight, bias, residual, ndim, *options):
    _check_rows("row_norm_bwd", x, ndim, dtotal, weight, bias)
    _check_backward("row_norm_bwd", x, dy)
    return _present(launch.row_norm_bwd(dy, dtotal, x, stats, weight, bias, residual, ndim, *options), x)


def fake_group_norm_fwd(x, weight, bias, residual, given, num_groups, eps, activation, negative_slope, out_dtype):
    """The fake kernel of ``group_norm_fwd``."""
    check_group("group_norm", x, num_groups, weight, bias, residual, eps, activation, out_dtype)
    stats = fake_stats(x, num_groups) if given is None else None
    return _present((torch.empty_like(dense(x), dtype=out_dtype), stats), x)


def _fake_group_norm_bwd(dy, x, stats, weight, bias, residual, num_groups, frozen, activation, negative_slope, output_mask, means=None):
    return _present(launch.empty_gradients(dense(x), packed(weight), packed(bias), output_mask), x)


def fake_stats(x: Tensor, num_groups: int, eps: float = 0.0) -> Tensor:
    """The fake kernel of ``group_norm_stats``."""
    return launch.empty_stats(x, 3, x.shape[0], num_groups)


def fake_batch_norm_fwd(x, weight, bias, residual, given, eps, activation, negative_slope, out_dtype):
    """The fake kernel of ``batch_norm_fwd``."""
    check_group("batch_norm", x, x.shape[1], weight, bias, residual, eps, activation, out_dtype)
    stats = _fake_batch_norm_stats(x, eps) if given is None else None
    return _present((torch.empty_like(dense(x), dtype=out_dtype), stats), x)


def _fake_batch_norm_bwd(dy, x, stats, weight, bias, residual, activation, negative_slope, output_mask):
    return _present(launch.empty_gradients(dense(x), packed(weight), packed(bias), output_mask), x)


def _fake_batch_norm_stats(x: Tensor, eps: float) -> Tensor:
    return launch.empty_stats(x, 4, 1, x.shape[1])


def _fake_row_norm_fwd(x, addend, weight, bias, residual, ndim, centered, weight_offset, eps, activation, negative_slope, out_dtype):
    _check_rows("row_norm_fwd", x, ndim, addend, weight, bias)
    x = dense_rows(x, ndim)
    total = None if addend is None else torch.empty_like(x)
    return _present((torch.empty_like(x, dtype=out_dtype), total, launch.empty_row_stats(x, ndim, centered)), x)


def _fake_row_norm_bwd(dy, dtotal, x, stats, weight, bias, residual, ndim, centered, weight_offset, activation, negative_slope, output_mask):
    return _present(launch.empty_gradients(dense_rows(x, ndim), packed(weight), packed(bias), output_mask), x)


for _name, _kernel, _fake in (
    ("group_norm_fwd", _group_norm_fwd, fake_group_norm_fwd),
    ("group_norm_bwd", _group_norm_bwd, _fake_group_norm_bwd),
    ("group_norm_stats", launch.group_norm_stats, fake_stats),
    ("batch_norm_fwd", _batch_norm_fwd, fake_batch_norm_fwd),
    ("batch_norm_bwd", _batch_norm_bwd, _fake_batch_norm_bwd),
    ("batch_norm_stats", launch.batch_norm_stats, _fake_batch_norm_stats),
    ("row_norm_fwd", _row_norm_fwd, _fake_row_norm_fwd),
    ("row_norm_bwd", _row_norm_bwd, _fake_row_norm_bwd),
):
    lib.impl(_name, _kernel, "CompositeExplicitAutograd")
    lib.impl(_name, torch.library.fallthrough_kernel, "Autograd")  # keeps requires_grad off their outputs
    torch.library.register_fake(f"normops::{_name}", _fake, lib=lib)
