"""``torch.library.opcheck`` of every operator, and the shapes, strides and dtypes that fake and meta tensors promise."""

import re
from pathlib import Path

import pytest
import torch
from cases import LAYOUTS
from norms import NORMS, leaves, over_norms
from torch.library import opcheck

OPS = torch.ops.normops
SAMPLES = {  # (N, *spatial), layout, dtype
    "plain": ((2, 5, 4), "contiguous", torch.float32),
    "channels_last": ((2, 5, 4), "channels_last", torch.float32),
    "channels_last_3d": ((2, 2, 3, 4), "channels_last", torch.float32),
    "sliced": ((2, 5, 4), "sliced", torch.float32),
    "transposed": ((3, 4), "transposed", torch.float32),
    "rank2": ((4,), "contiguous", torch.float32),
    "bfloat16": ((2, 4), "contiguous", torch.bfloat16),
    "float64": ((2, 5, 4), "channels_last", torch.float64),
    "empty": ((0, 4), "contiguous", torch.float32),
}
over_samples = pytest.mark.parametrize("sample", SAMPLES)
# one norm of each kind in every sample, the others where a kernel's fake might differ
PUBLIC = [(name, sample) for name in NORMS for sample in SAMPLES
          if (name in ("group_norm", "layer_norm_dim1", "batch_norm") or sample in ("channels_last", "sliced", "bfloat16", "empty"))
          and (name, sample) != ("batch_instance_norm", "bfloat16")]  # the sum of two gradients, rounded once or twice  # fmt: skip


@pytest.mark.parametrize("name, sample", PUBLIC, ids=["-".join(pair) for pair in PUBLIC])
def test_public(name, sample, device):
    """Schema, mutation, autograd registration, fake kernel, AOT dispatch with dynamic shapes."""
    norm, (sizes, layout, dtype) = NORMS[name], SAMPLES[sample]
    x, *others = norm.tensors(sizes, layout, dtype, device)
    options = norm.options(x.detach(), *others)
    if dtype == torch.bfloat16:  # the modulation's own rounding is checked in float32 and float64
        options |= {key: None for key in ("scale", "shift") if key in options} | {"out_dtype": torch.float32}
    opcheck(norm.operator, (x,), options)


def both_ways(sizes, layout, dtype, device):
    """x, dy, vectors and a tensor like x; with and without the optional tensors, and the mask of what backward is to give."""
    x, weight, bias, other, *_ = NORMS["group_norm"].tensors(sizes, layout, dtype, device, requires_grad=False)
    dy = LAYOUTS["contiguous"](torch.randn_like(x))
    for w, b, r, mask in ((weight, bias, other, [True] * 4), (None, bias, None, [True, False, True, False]), (None, None, None, [False] * 4)):
        yield x, dy, w, b, r, mask


@over_samples
def test_group(sample, backend, device):
    """What compiled graphs hold, statistics computed and given."""
    for x, dy, weight, bias, residual, mask in both_ways(*SAMPLES[sample], device):
        options = (weight, bias, residual, None, 3, 1e-5, "silu", 0.01, None)
        opcheck(OPS.group_norm_fwd.default, (x, *options))
        stats = OPS.group_norm_fwd(x, *options)[1]
        opcheck(OPS.group_norm_bwd.default, (dy, x, stats, weight, bias, residual, 3, False, "silu", 0.01, mask))
    alike = stats.new_ones(3, 1, 3)
    opcheck(OPS.group_norm_fwd.default, (x, weight, bias, residual, alike, 3, 1e-5, "silu", 0.01, None))
    opcheck(OPS.group_norm_bwd.default, (dy, x, alike, weight, bias, residual, 3, True, "silu", 0.01, [True, False, False, False]))
    opcheck(OPS.group_norm_and_stats.default, (x.clone().requires_grad_(), None, None, None, None, 3, 1e-5, "silu", 0.01, None))
    opcheck(OPS.group_norm_stats.default, (x, 3, 1e-5))
    opcheck(OPS.group_moments.default, (x.clone().requires_grad_(), 3, 1e-5))


@over_samples
def test_batch(sample, device):
    """Statistics computed and given."""
    for x, dy, weight, bias, residual, mask in both_ways(*SAMPLES[sample], device):
        options = (1e-5, "silu", 0.01, None)
        opcheck(OPS.batch_norm_fwd.default, (x, weight, bias, residual, None, *options))
        stats = OPS.batch_norm_stats(x, 1e-5)
        opcheck(OPS.batch_norm_bwd.default, (dy, x, stats, weight, bias, residual, "silu", 0.01, mask))
    opcheck(OPS.batch_norm_fwd.default, (x, weight, bias, residual, stats, *options))
    opcheck(OPS.batch_norm_and_stats.default, (x.clone().requires_grad_(), None, None, None, stats, None, *options))
    opcheck(OPS.batch_norm_and_stats.default, (x.clone().requires_grad_(), None, None, None, None, None, *options))
    opcheck(OPS.batch_norm_stats.default, (x, 1e-5))


@over_samples
@pytest.mark.parametrize("ndim, centered", [(0, True), (1, False)], ids=["layer_norm_dim1", "rms_norm"])
def test_row(ndim, centered, sample, backend, device):
    for x, dy, weight, bias, other, mask in both_ways(*SAMPLES[sample], device):
        if ndim:  # over the last dimension
            weight, bias = (value if value is None else value.new_ones(x.shape[-1:]) for value in (weight, bias))
        addend, residual, dtotal = (other, None, dy) if ndim else (None, other, None)
        settings = (ndim, centered, 0.5, 1e-5, "silu", 0.01)
        options = (addend, weight, bias, residual, *settings, None)
        opcheck(OPS.row_norm_fwd.default, (x, *options))
        stats = OPS.row_norm_fwd(x, *options)[2]
        opcheck(OPS.row_norm_bwd.default, (dy, dtotal, x, stats, weight, bias, residual, *settings[:3], *settings[4:], mask))
    named = dict(zip(("ndim", "centered", "weight_offset", "eps", "activation", "negative_slope", "out_dtype"), (*settings, None), strict=True))
    opcheck(OPS.row_norm.default, (x.clone().requires_grad_(), None, None), named)
    if ndim:
        opcheck(OPS.add_row_norm.default, (x.clone().requires_grad_(), dy, None, None), named)


def test_all_operators_are_checked():
    text = "".join((Path(__file__).parent / name).read_text() for name in ("test_opcheck.py", "test_analytic_ops.py"))
    tested = {norm.function.__name__ for norm in NORMS.values()} | set(re.findall(r"opcheck\(OPS\.(\w+)\.default", text))
    assert tested == {name[9:] for name in torch._C._dispatch_get_all_op_names() if name.startswith("normops::")}


# ---- fake tensors and meta ----


def like(x, y):
    """y as meta or fake tensor promises it."""
    return (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout not in ("scalar", "expanded_positions")])
@over_norms()
def test_fake_and_meta_strides(norm, layout, requires_grad, device):
    """Fake and meta results have the real ones' shape, strides and dtype, in every layout."""
    x, *others = norm.tensors((4, 5, 8), layout, torch.float32, device, requires_grad)

    def meta(value):
        return value.detach().to("meta").as_strided(value.shape, value.stride()).requires_grad_(requires_grad)

    real = leaves(norm(x, *others))
    values = [meta(value) for value in (x, *others)]
    promised = leaves(norm(*values))
    assert all(y.is_meta for y in promised) and all(map(like, promised, real))
    with torch._subclasses.FakeTensorMode() as mode:
        fake = leaves(norm(*map(mode.from_tensor, (x, *others))))
        assert all(map(like, fake, real)) and all(y.device == x.device for y in fake)
    if requires_grad:
        dx = torch.autograd.grad(real, x, [torch.randn_like(y) for y in real])[0]
        assert like(torch.autograd.grad(promised, values[0], [torch.empty_like(y) for y in promised])[0], dx)


@over_norms()
def test_meta_out_dtype(norm):
    x, *others = norm.tensors(dtype=torch.bfloat16, device="meta", requires_grad=False)
    y, *total = leaves(norm(x, *others, out_dtype=torch.float32))
    assert y.dtype == torch.float32 and all(value.dtype == x.dtype for value in total)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_meta_statistics(dtype):
    """Statistics are saved in the dtype of accumulation."""
    x = torch.empty(2, 6, 4, dtype=dtype, device="meta")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    with torch.inference_mode():  # else the operator makes it of others
        of_workers = OPS.batch_norm_and_stats(x, None, None, None, None, "workers", 1e-5, "none", 0.0, None)[1]
    for found, shape in (
        (OPS.group_norm_fwd(x, None, None, None, None, 3, 1e-5, "none", 0.0, None)[1], (3, 2, 3)),
        (OPS.row_norm_fwd(x, None, None, None, None, 1, True, 0.0, 1e-5, "none", 0.0, None)[2], (3, 12)),
        (OPS.row_norm_fwd(x, None, None, None, None, 0, False, 0.0, 1e-5, "none", 0.0, None)[2], (1, 8)),
        (OPS.group_norm_stats(x, 3, 1e-5), (3, 2, 3)),
        (OPS.batch_norm_fwd(x, None, None, None, None, 1e-5, "none", 0.0, None)[1], (4, 1, 6)),
        (OPS.batch_norm_stats(x, 1e-5), (4, 1, 6)),
        (of_workers, (5, 1, 6)),
    ):
        assert (found.dtype, found.shape) == (wide, shape)
