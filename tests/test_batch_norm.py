"""What only the batch family has: running statistics, a single value, renormalization, the blend of two norms, and the operators beneath."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import ACTIVATIONS, COMPOSED, FLOOR, LAYOUTS, Case, Inputs, channels_last, roundoff
from oracle import accumulator
from torch.utils.checkpoint import checkpoint

import normops
from normops import launch

F64 = torch.float64
DTYPES = [torch.float16, torch.bfloat16, torch.float32, F64]
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
over_layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
TRACKED = ("batch_norm", "batch_instance_norm", "batch_renorm")


def running(channels, device="cpu", dtype=torch.float32):
    return torch.randn(channels, dtype=dtype, device=device), torch.rand(channels, dtype=dtype, device=device) + 0.5


def call(norm, x, mean, var, *args, training=True, **options):
    """A norm of the family, of which batch-instance norm wants a rho."""
    rho = (torch.full(x.shape[1:2], 0.25, device=x.device),) if norm == "batch_instance_norm" else ()
    return getattr(normops, norm)(x, mean, var, *rho, *args, training=training, **options)


def expected(norm, x, ours, momentum, eps=1e-5):
    """Running statistics after the call, by torch in float64."""
    mean, var = (value.double() for value in ours)
    if norm == "batch_renorm":
        std = (x.double().transpose(0, 1).flatten(1).var(1, correction=0) + eps).sqrt()
        F.batch_norm(x.double(), mean, torch.ones_like(mean), training=True, momentum=momentum)
        return mean, var + momentum * (std - var)
    F.batch_norm(x.double(), mean, var, training=True, momentum=momentum)
    return mean, var


FLOAT32 = 2 * FLOOR * roundoff(torch.float32)


def assert_rounded(got, exact, dtype, floor=FLOAT32):
    """One rounding to the buffer's dtype, of what was computed in float32 or better."""
    for mine, want in zip(got, exact, strict=True):
        assert mine.dtype == dtype
        limit = roundoff(dtype) * want.abs() + floor * want.abs().max() + torch.finfo(dtype).smallest_normal * roundoff(dtype)
        assert ((mine.double() - want).abs() <= limit).all(), (mine, want)


def assert_same(got, want, **tolerance):
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other, **tolerance)


@pytest.mark.parametrize("norm", TRACKED)
@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", [(9, 6), (3, 6, 11), (2, 33, 7, 5), (2, 2, 200, 91)], ids=str)
@over_layouts
@pytest.mark.parametrize("mean", [0.5, 1e4])
def test_running_statistics(mean, layout, shape, momentum, norm, backend, device, poison):
    """torch's, in float64: the mean and the unbiased variance, or the deviation that normalizes. y and the gradients do not depend on them."""
    if norm == "batch_instance_norm" and len(shape) == 2:
        pytest.skip("there is one position")
    x = LAYOUTS[layout](torch.randn(shape, device=device) * 2 + mean)
    ours = running(shape[1], device)
    exact, versions = expected(norm, x, ours, momentum), [value._version for value in ours]
    leaves = [value.requires_grad_() for value in (x, *torch.randn(2, shape[1], device=device))]
    y = call(norm, leaves[0], *ours, *leaves[1:], momentum=momentum, eps=1e-5, activation="silu")
    assert_rounded(ours, exact, torch.float32)
    assert all(value._version > version for value, version in zip(ours, versions, strict=True)), "autograd sees the change"
    assert not any(value.requires_grad for value in ours)
    if norm != "batch_renorm":
        bare = call(norm, leaves[0], None, None, *leaves[1:], eps=1e-5, activation="silu")
        assert torch.equal(y, bare)
        dy = torch.randn_like(y)
        assert_same(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(bare, leaves, dy), rtol=0, atol=0)


@pytest.mark.parametrize("norm", TRACKED)
@over_dtypes
@pytest.mark.parametrize("own", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_running_statistics_of_other_dtypes(own, dtype, norm, backend, device, poison):
    """They keep their dtype, and are rounded to it once."""
    x = (torch.randn(4, 5, 30, dtype=F64) * 3 + 7).to(dtype).to(device)
    ours = running(5, device, own)
    exact = expected(norm, x, ours, 0.25)
    call(norm, x, *ours, momentum=0.25, eps=1e-5)
    unit = roundoff(F64 if dtype == own == F64 else torch.float32)
    assert_rounded(ours, exact, own, 2 * FLOOR * unit)


@pytest.mark.parametrize("norm", TRACKED)
@pytest.mark.parametrize("kind", ["strided", "offset", "one_strided", "two_dtypes", "transposed"])
def test_running_statistics_in_other_memory(kind, norm, backend, device, poison):
    """Written where they are, and nothing beside them."""
    x = torch.randn(4, 5, 30, device=device) * 3 + 7
    whole = torch.full((3, 2, 8), 12345.0, device=device)
    views = {
        "strided": (whole[0, 0, :5], whole.flatten()[8:23:3]),
        "offset": (whole[0, 0, 1:6], whole[1, 1, 3:8]),
        "one_strided": (torch.zeros(5, device=device), whole.flatten()[1:40:9]),
        "two_dtypes": (torch.zeros(5, dtype=F64, device=device), whole[2, 1, :5]),
        "transposed": (whole[:, :, 0].flatten()[:5], whole.permute(2, 1, 0)[1:6, 0, 1]),
    }[kind]
    mean, var = views
    mean.copy_(torch.randn(5))
    var.copy_(torch.rand(5) + 0.5)
    exact = expected(norm, x, views, 0.25)
    before = whole.clone()
    call(norm, x, mean, var, momentum=0.25, eps=1e-5)
    for mine, want in zip(views, exact, strict=True):
        assert_rounded([mine], [want], mine.dtype)
    untouched = torch.ones_like(whole, dtype=torch.bool)
    for value in views:
        if value.untyped_storage().data_ptr() == whole.data_ptr():
            untouched.as_strided(value.shape, value.stride(), value.storage_offset()).fill_(False)
    assert torch.equal(whole[untouched], before[untouched])


@pytest.mark.parametrize("norm", TRACKED)
def test_cumulative_average(norm, backend, device):
    """momentum = 1/k in the k-th call: the plain mean of what the calls saw."""
    ours, seen = running(5, device), []
    for k in range(1, 6):
        x = torch.randn(3 + k, 5, 6, device=device) * k + 3
        call(norm, x, *ours, momentum=1 / k, eps=1e-5)
        seen.append(torch.stack(expected(norm, x, (ours[0], ours[1]), 1.0)))
    assert_rounded(ours, torch.stack(seen).mean(0), torch.float32, 5 * FLOAT32)


@pytest.mark.parametrize("norm", TRACKED)
def test_updated_once_on_every_path(norm, backend, device):
    """With and without gradients, in inference mode, through the dispatcher, of x that must be packed, in two layouts."""
    x = torch.randn(4, 5, 6, 7, device=device) * 2 + 3
    start = running(5, device)
    exact = expected(norm, x, start, 0.3)
    found = {}

    def record(name, call):
        ours = [value.clone() for value in start]
        call(*ours)
        found[name] = ours

    def plain(x):
        return lambda *ours: call(norm, x, *ours, momentum=0.3, eps=1e-5)

    record("plain", plain(x))
    record("grad", plain(x.clone().requires_grad_()))
    record("backward", lambda *ours: plain(x.clone().requires_grad_())(*ours).sum().backward())
    record("channels_last", plain(channels_last(x)))
    record("packed", plain(LAYOUTS["sliced"](x)))
    with torch.no_grad():
        record("no_grad", plain(x))
    with torch.inference_mode():
        record("inference", plain(x))
        record("inference tensor", plain(x.clone()))
    rho = (torch.ones(5, device=device),) if norm == "batch_instance_norm" else ()
    op = getattr(torch.ops.normops, norm)
    record("dispatcher", lambda *ours: op(x, *ours, *rho, training=True, momentum=0.3, eps=1e-5))
    record("dispatcher, grad", lambda *ours: op(x.clone().requires_grad_(), *ours, *rho, training=True, momentum=0.3, eps=1e-5).sum().backward())
    for name, ours in found.items():
        for mine, want in zip(ours, exact, strict=True):
            torch.testing.assert_close(mine.double(), want, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("norm", TRACKED)
@pytest.mark.parametrize("reentrant", [False, True], ids=["new", "reentrant"])
def test_recomputation_updates_nothing(reentrant, norm, backend, device):
    """A checkpoint runs forward twice, for one update; its gradients are those of the plain call."""
    x = (torch.randn(4, 5, 6, device=device) * 2 + 3).requires_grad_()
    ours, calls = running(5, device), []
    start, exact = [value.clone() for value in ours], expected(norm, x.detach().sin(), ours, 0.3)
    options = {"r_max": 1.5, "d_max": 1.0} if norm == "batch_renorm" else {}

    def block(x, running=ours):
        calls.append(x)
        return call(norm, x.sin(), *running, momentum=0.3, eps=1e-5, activation="silu", **options)

    checkpoint(block, x, use_reentrant=reentrant).square().sum().backward()
    assert len(calls) == 2, "the checkpoint called it again"
    assert_rounded(ours, exact, torch.float32)
    torch.testing.assert_close(x.grad, torch.autograd.grad(block(x, start).square().sum(), x)[0], rtol=1e-5, atol=1e-5)


def test_two_forwards_before_one_backward(backend, device):
    """What the second call writes into the running statistics, the backward of the first does not need."""
    ours, values = running(5, device, F64), [torch.randn(4, 5, 6, dtype=F64, device=device, requires_grad=True) for _ in range(2)]
    weight, bias = (value.requires_grad_() for value in torch.randn(2, 5, dtype=F64, device=device))
    for training in (True, False):
        found = []
        for norm in (normops.batch_norm, COMPOSED["batch_norm"]):
            buffers = [value.clone() for value in ours]
            one = norm(values[0], *buffers, weight, bias, training)
            two = norm(values[1], *buffers, weight, bias, training)
            if norm is normops.batch_norm:
                norm(values[0], *buffers, weight, bias, True)
            found.append(torch.autograd.grad((one * two).sin().sum(), (*values, weight, bias)))
        assert_same(*found, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norm", TRACKED)
def test_running_statistics_are_left_alone(norm, backend, device):
    """By evaluation, by an empty batch, and by a call that is refused, which raises before anything is written."""
    x, ours = torch.randn(3, 5, 12, device=device), running(5, device)
    before, versions = [value.clone() for value in ours], [value._version for value in ours]
    wide = x.requires_grad_()
    call(norm, wide, *ours, training=False).sum().backward()
    for empty in (x[:0], x[:, :, :0]):
        y = call(norm, empty, *ours, activation="silu")
        assert y.shape == empty.shape and y.dtype == empty.dtype
    wrong = [
        {"weight": x[0]},
        {"weight": torch.ones(4, device=device)},
        {"bias": x[0, 0]},
        {"bias": torch.ones(2, 5, device=device)},
        {"eps": -1.0},
        {"eps": float("nan")},
        {"activation": "swish"},
        {"residual": x[0]},
        {"residual": x.double()},
        {"scale": x},
        {"shift": torch.ones(5, device=device)},
        {"out_dtype": torch.float16},
        {"weight": torch.ones(5, dtype=torch.int32, device=device)},
    ]
    if norm == "batch_norm":
        wrong += [{"on_single_value": "skip"}]
    if norm == "batch_renorm":
        wrong += [{"r_max": 0.9}, {"d_max": -0.1}, {"r_max": torch.ones(2)}, {"d_max": torch.zeros(5)}, {"r_max": float("nan")}]
    for options in wrong:
        with pytest.raises((ValueError, TypeError)):
            call(norm, x, *ours, **options)
    if norm == "batch_instance_norm":
        for rho in (torch.ones(4), torch.ones(3, 5), torch.ones(5, dtype=torch.int64)):
            with pytest.raises((ValueError, TypeError), match="rho"):
                normops.batch_instance_norm(x, *ours, rho.to(device), training=True)
    with pytest.raises(ValueError, match="value|position"):
        call(norm, x[:1, :, :1], *ours)
    for pair in ((ours[0], None), (None, ours[1]), (ours[0], ours[1][:3]), (ours[0][None], ours[1]), (ours[0].int(), ours[1])):
        with pytest.raises((ValueError, TypeError), match="running"):
            call(norm, x, *pair)
    with pytest.raises(ValueError, match="gradient"):
        call(norm, x, ours[0], ours[1].clone().requires_grad_())
    assert all(torch.equal(value, old) for value, old in zip(ours, before, strict=True))
    assert [value._version for value in ours] == versions


@pytest.mark.parametrize("shape", [(1, 5), (1, 5, 1), (1, 5, 1, 1)], ids=str)
def test_single_value(shape, backend, device):
    """torch's error, or the running statistics, which are not updated: the result and the gradients of evaluation."""
    x, weight, bias = torch.randn(shape, device=device), *torch.randn(2, 5, device=device)
    ours = running(5, device)
    with pytest.raises(ValueError, match=r"more than 1 value per channel in training, got input of shape \(1, 5"):
        normops.batch_norm(x, *ours, weight, bias, True)
    before, versions = [value.clone() for value in ours], [value._version for value in ours]
    found = []
    for training in (True, False):
        leaves = [value.clone().requires_grad_() for value in (x, weight, bias)]
        y = normops.batch_norm(leaves[0], *ours, *leaves[1:], training, on_single_value="running", activation="silu")
        found.append((y, *torch.autograd.grad(y.sin().sum(), leaves)))
    assert_same(*found, rtol=0, atol=0)
    assert all(torch.equal(value, old) for value, old in zip(ours, before, strict=True)) and [value._version for value in ours] == versions
    torch.testing.assert_close(found[0][0], F.silu(F.batch_norm(x, *ours, weight, bias)), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="running_mean"):
        normops.batch_norm(x, None, None, weight, bias, True, on_single_value="running")
    two = torch.cat((x, x + 1))
    assert torch.equal(
        normops.batch_norm(two, *ours, training=True, momentum=0.0, on_single_value="running"), normops.batch_norm(two, None, None, training=True)
    ), "two values are values"


@pytest.mark.parametrize("scale", [1.0, 1e-6])
@over_layouts
def test_running_variance_of_constant_and_tiny_channels(layout, scale, backend, device, poison):
    """Zero is zero, and a variance far below eps keeps its digits: it is not taken from 1/sqrt(var + eps)."""
    x = torch.randn(3, 4, 9, 31, device=device, dtype=F64) * scale
    x[:, 0] = 3.3
    x[:, 1] += 4.0 * scale
    x = LAYOUTS[layout](x.float())
    mean, var = torch.zeros(2, 4, device=device)
    weight, bias = torch.randn(2, 4, device=device)
    y = normops.batch_norm(x, mean, var, weight, bias, True, 1.0)
    exact = x.double().transpose(0, 1).flatten(1)
    assert var[0] == 0 and mean[0] == x[0, 0, 0, 0] and (y[:, 0] == bias[0]).all(), "a constant channel among others is exactly bias"
    assert_rounded([var], [exact.var(1)], torch.float32)
    assert ((var.double() - exact.var(1)).abs() <= FLOAT32 * exact.var(1)).all()


def test_not_finite_running_statistics(backend, device):
    """NaN and inf reach the statistics of their own channel, and no other's."""
    x, ours = torch.randn(4, 6, 30, device=device), running(6, device)
    x[1, 2, 3], x[2, 4, 5] = torch.nan, torch.inf
    clean = [value.clone() for value in ours]
    normops.batch_norm(x.nan_to_num(0.0, 0.0), *clean, training=True)
    normops.batch_norm(x, *ours, training=True)
    for mine, other in zip(ours, clean, strict=True):
        assert mine.isfinite().tolist() == [True, True, False, True, False, True]
        torch.testing.assert_close(mine[mine.isfinite()], other[mine.isfinite()], rtol=1e-6, atol=1e-6)


@over_dtypes
@pytest.mark.parametrize("shape", [(3, 6, 5, 4), (2, 33, 3, 7)], ids=str)
def test_one_norm_in_many_shapes(shape, dtype, backend, device):
    """Spatial dimensions are one and (N, C, 1, 1) is (N, C), to the bit; channels last is (N*S, C): with gradients and running statistics."""
    x, dy = (torch.randn(2, *shape, device=device) * 3 + 1).to(dtype)
    weight, bias = torch.randn(2, shape[1], device=device).to(dtype)

    def results(x, dy):
        ours = [torch.zeros(shape[1], device=device), torch.ones(shape[1], device=device)]
        leaves = [value.detach().requires_grad_() for value in (x, weight, bias)]
        y = normops.batch_norm(leaves[0], *ours, *leaves[1:], True, activation="silu")
        return y.detach(), *torch.autograd.grad(y, leaves, dy), *ours

    def rows(x):
        return x.movedim(1, -1).flatten(0, -2).contiguous()

    unit = 4 * max(roundoff(dtype), roundoff(accumulator(dtype)))
    size = 8 * (x.numel() / shape[1]) ** 0.5  # of the largest sums
    y, dx, *others = results(x, dy)
    flat = results(x.flatten(2), dy.flatten(2))
    assert_same(flat, (y.flatten(2), dx.flatten(2), *others), rtol=0, atol=0)
    last = results(channels_last(x), channels_last(dy))
    assert_same(last, (y, dx, *others), rtol=unit, atol=unit * size)
    vectors = results(rows(x), rows(dy))
    assert_same(vectors, (rows(last[0]), rows(last[1]), *last[2:]), rtol=unit, atol=unit * size)
    of_one = results(rows(x)[..., None, None], rows(dy)[..., None, None])
    assert_same((*(value[..., 0, 0] for value in of_one[:2]), *of_one[2:]), vectors, rtol=0, atol=0)


# ---- batch renormalization ----


def bounded(x, mean, std, r_max, d_max, eps):
    """r and d (C,), as the paper has them."""
    var, center = torch.var_mean(x.double().transpose(0, 1).flatten(1), 1, correction=0)
    r = ((var + eps).sqrt() / std.double()).clamp(1 / r_max, r_max)
    return r, ((center - mean.double()) / std.double()).clamp(-d_max, d_max), center, (var + eps).sqrt()


@over_layouts
@pytest.mark.parametrize("shape", [(4, 6, 5, 7), (9, 6)], ids=str)
def test_renorm_is_batch_norm_and_evaluation(shape, layout, backend, device):
    """r_max = 1, d_max = 0: batch norm, the default too. Unclipped: what evaluation gives, but other gradients."""
    x = LAYOUTS[layout](torch.randn(shape, dtype=F64, device=device) * 2 + 3)
    leaves = [value.requires_grad_() for value in (x, *torch.randn(2, 6, dtype=F64, device=device))]
    mean, std = running(6, device, F64)
    dy = torch.randn_like(x).detach()

    def results(norm, *buffers, **options):
        y = norm(leaves[0], *buffers, *leaves[1:], eps=1e-3, activation="silu", **options)
        return y, *torch.autograd.grad(y, leaves, dy)

    batch = results(normops.batch_norm, None, None, training=True)
    for bounds in ({}, {"r_max": 1.0, "d_max": 0.0}, {"r_max": 1, "d_max": 0}):
        assert_same(results(normops.batch_renorm, mean.clone(), std.clone(), training=True, **bounds), batch, rtol=1e-11, atol=1e-11)
    free = results(normops.batch_renorm, mean.clone(), std.clone(), training=True, r_max=1e9, d_max=1e9)
    evaluated = results(normops.batch_renorm, mean, std, training=False)
    torch.testing.assert_close(free[0], evaluated[0], rtol=1e-11, atol=1e-11)
    assert not torch.allclose(free[1], evaluated[1], rtol=1e-3, atol=1e-3), "the gradient still goes through the statistics of the batch"
    assert_same(free[2:], evaluated[2:], rtol=1e-11, atol=1e-11)


def test_renorm_clips_on_both_sides(backend, device):
    """Each of r and d below, within and above its bounds, in a channel of its own."""
    x = torch.randn(6, 9, 8, dtype=F64, device=device) * 2 + 1
    std = torch.tensor([0.1, 2.0, 100.0], dtype=F64, device=device).repeat(3)
    mean = 1 + torch.tensor([-9.0, 0.1, 9.0], dtype=F64, device=device).repeat_interleave(3) * std
    r, d, center, own = bounded(x, mean, std, 1.5, 0.6, 1e-3)
    assert (r == 1.5).sum() == (r == 1 / 1.5).sum() == 3 and (d == 0.6).sum() >= 3 and (d == -0.6).sum() >= 3
    assert ((d.abs() < 0.6) & (d != 0)).any()
    weight, bias = torch.randn(2, 9, dtype=F64, device=device)
    want = ((x - center[:, None]) / own[:, None] * r[:, None] + d[:, None]) * weight[:, None] + bias[:, None]
    for bounds in ((1.5, 0.6), (torch.tensor(1.5), torch.tensor([0.6], dtype=F64)), (torch.tensor([[1.5]], dtype=torch.float16), 0.6)):
        given = mean.clone(), std.clone()
        y = normops.batch_renorm(x, *given, weight, bias, True, 0.25, 1e-3, r_max=bounds[0], d_max=bounds[1])
        torch.testing.assert_close(y, want, rtol=1e-11, atol=1e-11)
        assert_same(given, (mean + 0.25 * (center - mean), std + 0.25 * (own - std)), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("weight, bias", [(True, True), (True, False), (False, True), (False, False)], ids=["both", "weight", "bias", "none"])
def test_renorm_constants(weight, bias, backend, device):
    """r and d come from the old statistics, whatever the momentum, and are constants for the gradient, first and second."""
    x, dy = torch.randn(2, 4, 5, 6, dtype=F64, device=device) * 2 + 1
    mean, std = running(5, device, F64)
    mean, std = mean + 1, std * 2
    r, d, *_ = bounded(x, mean, std, 1.3, 0.4, 1e-3)
    leaves = [x.requires_grad_(), *(torch.randn(5, dtype=F64, device=device, requires_grad=True) for given in (weight, bias) if given)]

    def ours(momentum):
        given = dict(zip([name for name, wanted in (("weight", weight), ("bias", bias)) if wanted], leaves[1:], strict=True))
        return normops.batch_renorm(x, mean.clone(), std.clone(), **given, training=True, momentum=momentum, r_max=1.3, d_max=0.4, activation="silu")

    def theirs():
        t = F.batch_norm(x, None, None, training=True, eps=1e-3) * r[:, None] + d[:, None]
        t = t * leaves[1][:, None] if weight else t
        return F.silu(t + leaves[-1][:, None] if bias else t)

    assert torch.equal(ours(0.0), ours(1.0)), "the update comes after r and d"
    found = []
    for y in (ours(0.5), theirs()):
        first = torch.autograd.grad(y, leaves, dy, create_graph=True)
        found.append((y, *first, *torch.autograd.grad(sum(gradient.sin().sum() for gradient in first), leaves)))
    assert_same(*found, rtol=1e-9, atol=1e-9)


def test_renorm_of_narrow_statistics(backend, device):
    """The square of a deviation of 300 is no float16, and that of 1e-20 no float32: neither is taken in that dtype."""
    x = torch.randn(4, 5, 6, device=device)
    for std, dtype in ((300.0, torch.float16), (1e-3, torch.float16), (1e-20, torch.float32), (1e25, torch.float32)):
        given = torch.zeros(5, dtype=dtype, device=device), torch.full((5,), std, dtype=dtype, device=device)
        y = normops.batch_renorm(x * std, *given)
        torch.testing.assert_close(y, (x * std).double().div(given[1][0].double()).float(), rtol=1e-6, atol=1e-6)


# ---- batch-instance norm ----


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@over_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_blend_ends(dtype, layout, training, backend, device):
    """rho = 1 is batch norm, rho = 0 instance norm, in evaluation too: results, gradients and running statistics."""
    case = Case("ends", (4, 6, 7, 5), layout=layout, norm="batch_instance_norm", frozen=not training, dtype=dtype, affine_dtype=torch.float32,
                residual=layout, scale=True, shift=True, activation="silu")  # fmt: skip
    inputs = Inputs.of(case, device)
    x = inputs.tensors["x"]
    x += torch.randn(4, 6, 1, 1, device=device).to(dtype)  # instances that differ
    rho = inputs.tensors.pop("rho")
    for end, alike in ((1.0, "batch_norm"), (0.0, "instance_norm")):
        blended = replace(inputs, tensors=inputs.tensors | {"rho": torch.full_like(rho, end)}).run()
        one = replace(inputs, case=replace(case, norm=alike, frozen=not training and end == 1.0), running=inputs.running if end else ()).run()
        unit = 2 * roundoff(dtype) if dtype != torch.float32 else 4e-6
        torch.testing.assert_close(blended.y, one.y, rtol=unit, atol=unit)
        for name, want in one.gradients.items():
            size = want.abs().max().item()
            torch.testing.assert_close(blended.gradients[name], want, rtol=unit, atol=unit * size, msg=lambda text, n=name: f"{n}: {text}")
        for name, want in one.running.items():
            torch.testing.assert_close(blended.running[name], want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("vectors", ["C", "NC", None])
@pytest.mark.parametrize("given", [False, True], ids=["training", "eval"])
@over_dtypes
def test_blend_of_mixed_dtypes(dtype, given, vectors, backend, device):
    """rho in any dtype beside float32 x and vectors: its rounding is its own, not that of the other gradients."""
    inputs = Inputs.of(Case("rho", (3, 6, 7), norm="batch_instance_norm", frozen=given, weight=vectors, bias=vectors), device)
    inputs.tensors["rho"] = inputs.tensors["rho"].to(dtype)
    got, want = inputs.run(), inputs.torch(F64)
    torch.testing.assert_close(got.y.to(want.y), want.y, rtol=1e-6, atol=1e-6)
    for name, gradient in got.gradients.items():
        unit = max(1e-6, roundoff(dtype)) if name == "rho" else 2e-6
        exact = want.gradients[name]
        torch.testing.assert_close(gradient.to(exact), exact, rtol=unit, atol=2e-6 * exact.abs().max().item())


def test_blend_beyond_its_interval(backend, device):
    """Nothing clips rho: a step of an optimizer may leave [0, 1], and comes back by its gradient."""
    rho = torch.tensor([-0.5, 1.5, 0.0, 1.0], dtype=F64, device=device, requires_grad=True)
    x = torch.randn(3, 4, 7, dtype=F64, device=device)
    found = []
    for norm in (normops.batch_instance_norm, COMPOSED["batch_instance_norm"]):
        y = norm(x, None, None, rho, training=True)
        found.append((y, *torch.autograd.grad(y.sin().sum(), rho)))
    assert_same(*found, rtol=1e-11, atol=1e-11)
    assert found[0][1].all()


def test_blend_far_from_zero(backend, device):
    """mean_I - mean_B at 1e4: the difference of two means is that of the deviations, not of their roundings."""
    x = torch.randn(4, 5, 11, 12, device=device) + 1e4 + torch.randn(4, 5, 1, 1, device=device)
    inputs = Inputs.of(Case("far", tuple(x.shape), norm="batch_instance_norm"), device)
    inputs.tensors["x"] = x
    got, want = inputs.run(), inputs.torch(F64)
    assert (got.y.to(want.y) - want.y).abs().max() <= 1e-6 * want.y.abs().max()
    for name, gradient in got.gradients.items():
        exact = want.gradients[name]
        assert (gradient.to(exact) - exact).abs().max() <= 2e-6 * exact.abs().max(), name


# ---- the operators beneath ----


@pytest.mark.parametrize("samples", ["all", "each"])
@pytest.mark.parametrize("vectors", [1, 2, None])
@pytest.mark.parametrize(
    "shape, groups", [((3, 12, 5, 7), 12), ((3, 12, 5, 7), 4), ((5, 12), 12), ((5, 12, 1), 3), ((2, 33, 9), 33), ((2, 2, 5003), 2)], ids=str
)
@pytest.mark.parametrize("layout, dtype, activation", [("contiguous", torch.float32, "silu"), ("channels_last", torch.float32, "none"),
                                                       ("channels_last", torch.bfloat16, "gelu"), ("contiguous", F64, "relu")])  # fmt: skip
def test_means_from_elsewhere(layout, dtype, activation, shape, groups, vectors, samples, backend, device, poison):
    """dx = rstd*(w*dt - mean(g) - x_hat*mean(g*x_hat)), where the means are given; the sums and dresidual are those without them."""
    N, C = shape[:2]
    acc = accumulator(dtype)

    def random(*size, dtype=dtype):
        return torch.randn(size, dtype=F64).to(dtype).to(device)

    x, dy, residual = (LAYOUTS[layout](random(*shape)) for _ in range(3))
    weight, bias = (None, None) if vectors is None else (random(*(N, C)[2 - vectors :]) for _ in range(2))
    stats = random(3, 1 if samples == "all" else N, groups, dtype=acc)
    stats[1] *= 1e-3
    stats[2] = stats[2].abs() + 0.5
    means = random(2, stats.shape[1], groups, dtype=acc)
    options = groups, True, activation, 0.0
    dx, *others = launch.group_norm_bwd(dy, x, stats, weight, bias, residual, *options, (True,) * 4, means)
    plain, *same = launch.group_norm_bwd(dy, x, stats, weight, bias, residual, *options, (True,) * 4)
    unit, size = 8 * max(roundoff(dtype), roundoff(acc)), 8 * (x.numel() / C) ** 0.5  # of the largest sums
    assert_same([value for value in others if value is not None], [value for value in same if value is not None], rtol=unit, atol=unit * size)
    assert [value is None for value in others] == [value is None for value in same] == [vectors is None, vectors is None, False]
    alone = launch.group_norm_bwd(dy, x, stats, weight, bias, residual, *options, (True, False, False, False), means)
    assert torch.equal(alone[0], dx) and all(value is None for value in alone[1:])

    def formula(means, *dtypes):
        """By torch's ops in the last of the dtypes, of inputs rounded to all of them."""

        def wide(value, times=1):
            for dtype in dtypes:
                value = value.to(dtype)
            return value.repeat_interleave(times, -1)[(..., *(None,) * (len(shape) - 2))]

        mean, low, rstd, first, second = (wide(value, C // groups) for value in (*stats, *means))
        t, added, upstream = (value.view(shape) for value in (wide(x), wide(residual), wide(dy)))
        x_hat = ((t - mean - low) * rstd).requires_grad_()
        t = x_hat if weight is None else x_hat * wide(weight) + wide(bias)
        (g,) = torch.autograd.grad(ACTIVATIONS[activation](t + added, 0.0), x_hat, upstream)
        return (rstd * (g - second - x_hat * first)).detach()

    unit = roundoff(torch.float32)
    for mine, given in ((dx, means), (plain, torch.zeros_like(means))):
        exact = formula(given, F64)
        loss = (formula(given, torch.float32) - formula(given, torch.float32, F64)).abs().max() * (roundoff(acc) / unit)
        limit = roundoff(dtype) * exact.abs() + 2 * loss + FLOOR * roundoff(acc) * exact.abs().max()
        assert ((mine.double() - exact).abs() <= limit).all()


OPERATOR = [  # shape, weight and bias, residual, activation
    ((4, 6, 5, 3), 1, True, "silu"),
    ((4, 6, 5, 3), 2, True, "gelu"),
    ((4, 6, 5, 3), None, False, "none"),
    ((9, 6), 1, False, "relu"),
    ((9, 6), 2, True, "tanh"),
]


@pytest.mark.parametrize("shape, vectors, with_residual, activation", OPERATOR)
@over_layouts
def test_operators(layout, shape, vectors, with_residual, activation, backend, device, poison):
    """torch.ops.normops.batch_norm_fwd, _bwd and _stats against autograd of torch's ops in float64; given statistics are used as they are."""
    N, C = shape[:2]
    inputs = Inputs.of(
        Case("operators", shape, layout=layout, norm="batch_norm", dtype=F64, weight={1: "C", 2: "NC", None: None}[vectors], tracked=False,
             bias={1: "C", 2: "NC", None: None}[vectors], residual=layout if with_residual else None, activation=activation), device)  # fmt: skip
    want = inputs.run(COMPOSED["batch_norm"])
    names = ("x", "weight", "bias", "residual")
    x, weight, bias, residual = (inputs.tensors.get(name) for name in names)
    ops = torch.ops.normops
    y, stats = ops.batch_norm_fwd(x, weight, bias, residual, None, 1e-5, activation, 0.2, None)
    torch.testing.assert_close(y, want.y, rtol=1e-11, atol=1e-11)
    assert stats.shape == (4, 1, C) and torch.equal(ops.batch_norm_stats(x, 1e-5), stats)
    again, none = ops.batch_norm_fwd(x, weight, bias, residual, stats, 1e-5, activation, 0.2, None)
    torch.testing.assert_close(again, y, rtol=1e-12, atol=1e-12)
    assert none.numel() == 0
    for saved in (stats, stats[:3].contiguous()):
        found = ops.batch_norm_bwd(inputs.dy, x, saved, weight, bias, residual, activation, 0.2, [True] * 4)
        for name, mine in zip(names, found, strict=True):
            if name in want.gradients:
                torch.testing.assert_close(mine, want.gradients[name], rtol=1e-10, atol=1e-10)
            elif name != "residual":
                assert mine.numel() == 0
        torch.testing.assert_close(found[3], want.gradients.get("residual", found[3]), rtol=1e-10, atol=1e-10)
    root = x.clone().requires_grad_()
    differentiable, buffers = ops.batch_norm_and_stats(root, weight, bias, residual, None, None, 1e-5, activation, 0.2, None)
    assert differentiable.requires_grad and not buffers.requires_grad, "what running statistics are made of has no gradient"
    assert torch.equal(differentiable, y) and torch.equal(buffers, stats)
    shifted, _ = ops.batch_norm_fwd(x, None, None, None, stats + 1, 1e-5, "none", 0.0, None)
    mean, low, rstd, _ = (stats[:, 0] + 1)[(..., *(None,) * (len(shape) - 2))]
    torch.testing.assert_close(shifted, (x - mean - low) * rstd, rtol=1e-11, atol=1e-11)


def test_operators_of_one_value_and_of_none(backend, device, poison):
    """Below the public functions a single value is allowed: x_hat = 0, the unbiased variance 0; no values at all: zeros."""
    ops, bias = torch.ops.normops, torch.randn(5, device=device)
    x = torch.randn(1, 5, 1, device=device)
    y, stats = ops.batch_norm_fwd(x, None, bias, None, None, 1e-5, "none", 0.0, None)
    assert torch.equal(y[0, :, 0], bias) and torch.equal(stats[3], torch.zeros_like(stats[3])) and torch.equal(stats[0, 0], x[0, :, 0])
    dx, _, dbias, _ = ops.batch_norm_bwd(torch.ones_like(x), x, stats, None, bias, None, "none", 0.0, [True] * 4)
    assert not dx.any() and torch.equal(dbias, torch.ones_like(bias))
    for empty in (x[:0], x[:, :, :0]):
        y, stats = ops.batch_norm_fwd(empty, bias, bias, None, None, 1e-5, "silu", 0.0, None)
        assert y.shape == empty.shape and stats.shape == (4, 1, 5) and not stats.isnan().any()
        dx, dweight, dbias, _ = ops.batch_norm_bwd(empty, empty, stats, bias, bias, None, "silu", 0.0, [True] * 4)
        assert dx.shape == empty.shape and not dweight.any() and not dbias.any()
