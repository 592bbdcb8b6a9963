"""Numerics of the Triton kernels for propagated statistics in Triton's interpreter; `test_triton_interpret.py` runs this file in a process of its
own.

Moments of activations against the maps in PyTorch, and by the bodies of `test_statistics.py`. Normalized weights by the measure of `triton_cases.py`,
where torch's way is the formula written out, of 16-bit weights in float32.
"""

import functools

import mpmath
import pytest
import test_statistics as shared
import torch
import triton
import triton.language as tl
from normops.kernels import activation_moments, analytic_norm_weight
from normops.kernels.analytic_norm_weight import place_chunk
from normops.kernels.config import RowConfig, choose_weight
from triton_cases import ROUNDING, check_guards, error, guarded, poisoned, random

import normops
from normops import backends, maps

__all__ = ["poisoned"]  # a fixture
CALLS = pytest.mark.parametrize(("name", "parameters"), shared.CALLS, ids=shared.IDS)


@pytest.fixture
def public(monkeypatch):
    """normops runs on these kernels, with many elements a program: a program costs more here than its elements."""
    forward = functools.partial(activation_moments.forward, 64)
    monkeypatch.setattr(activation_moments, "activation_moments_fwd", forward)
    monkeypatch.setattr(backends, "run", lambda op, x, *args: backends._load("triton", op)(*args))


# ---- moments of activations ----


def six(name, mean, var, parameters=(), rows=64):
    parameters = (*parameters, *maps.PARAMETERS.get(name, ())[len(parameters) :], 0.0, 0.0)
    out = guarded(torch.empty(6, len(mean), dtype=torch.float64))
    activation_moments.forward(rows, out, mean, var, maps.CODES[name], *parameters[:2])
    check_guards()
    return out


@CALLS
def test_six_values_are_the_maps(name, parameters):
    mean, var = shared.grid(21, 15, "cpu")
    expected = maps.moments(name, mean, var, (*parameters, *maps.PARAMETERS.get(name, ())[len(parameters) :]))
    found = six(name, mean, var, parameters)
    assert (found[1] >= 0).all()
    for value, truth in zip(found, expected, strict=True):
        assert shared.error(value, truth) < (1e-12 if name in maps.SMOOTH else 1e-13)


@CALLS
def test_no_variance(public, name, parameters):
    shared.test_no_variance("triton", "cpu", name, parameters)


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "abs"])
def test_tails_keep_their_digits(public, name):
    shared.test_tails_keep_their_digits("triton", "cpu", name)


def test_tails_where_their_forms_meet():
    """Just beyond two standard deviations the continued fraction converges slowest; 4e-13 as for the others."""
    a = torch.tensor([-1.99, -2.0, -2.001, -2.05, -2.2, -2.6]).double()
    found = six("relu", a, torch.ones_like(a))
    with mpmath.workdps(40):
        for mean, m, variance in zip(map(mpmath.mpf, a.tolist()), *found[:2].tolist(), strict=True):
            phi, cdf = mpmath.npdf(mean), mpmath.ncdf(mean)
            g = phi + mean * cdf
            assert abs(m / g - 1) < 4e-13 and abs(variance / ((mean**2 + 1) * cdf + mean * phi - g**2) - 1) < 4e-13, float(mean)


# Each of the smooth ones takes a second for its finest steps: those whose derivatives are made of more than a logistic function.
FINE = {"sigmoid", "silu", "softplus", "tanh"}


@pytest.mark.parametrize("name", [name for name in maps.MAPS if name not in {"exp", "square"} | FINE])
def test_huge_and_nan(public, name):
    shared.test_huge_and_nan("triton", "cpu", name)


@pytest.mark.parametrize("name", ["relu", "hardtanh", "hardswish", "tanh"])
def test_neighbours_change_nothing(name):
    """What is not finite in the same program does not make the others' step finer; what is may, within rounding."""
    mean, var = torch.tensor([0.3, -2.0, 0.0, 5.0]).double(), torch.tensor([1.0, 4.0, 0.0, 1e-6]).double()
    alone = six(name, mean, var)
    bad = torch.tensor([float("nan"), 1.0, float("nan"), 0.0]).double(), torch.tensor([1.0, float("nan"), float("inf"), float("inf")]).double()
    beside = six(name, torch.cat((mean, bad[0])), torch.cat((var, bad[1])))
    assert torch.equal(beside[:, :4], alone)
    assert beside[:, 4].isnan().any() and beside[:, 5].isnan().any()
    assert shared.error(six(name, torch.cat((mean, mean)), torch.cat((var, var + 100)))[:, :4], alone) < 2e-13


@pytest.mark.parametrize("name", ["gelu", "selu", "relu6", "step"])
def test_chosen_block(name):
    mean, var = shared.grid(5, 7, "cpu")
    assert shared.error(six(name, mean, var, rows=None), six(name, mean, var)) < 2e-13


def test_activation_gradients(public):
    mean, var = (value.requires_grad_() for value in shared.grid(3, 4, "cpu"))
    m, variance = normops.activation_moments(mean, var, "relu")
    torch.autograd.backward((m, variance), (torch.full_like(m, 2.0), torch.full_like(m, 3.0)))
    _, _, m_mu, m_v, v_mu, v_v = six("relu", mean.detach(), var.detach())
    torch.testing.assert_close((mean.grad, var.grad), (2 * m_mu + 3 * v_mu, 2 * m_v + 3 * v_v), rtol=1e-14, atol=0)


# ---- weights ----


def tile(V, ROWS, BLOCK, P=2, regime="held"):
    return RowConfig(regime, V, ROWS, 1, BLOCK, 4, P=P)


# name: outputs, inputs of a group, taps; groups, channels last, config. Between them every branch of every kernel.
PLACES = {
    "rows": ((11, 5, 3), 1, False, tile(1, 4, 16)),
    "one row": ((6, 8, 4), 1, False, tile(8, 1, 32, P=4)),
    "linear": ((9, 24, 1), 1, False, tile(8, 2, 32)),
    "channels last": ((7, 6, 4), 1, True, tile(4, 2, 32, P=3)),
    "groups": ((12, 5, 2), 3, False, tile(2, 2, 16)),
    "groups channels last": ((9, 4, 3), 3, True, tile(4, 2, 16, P=1)),
    "groups of one tap": ((8, 12, 1), 2, True, tile(4, 4, 16, P=1)),
    "several groups in a tile": ((12, 3, 2), 6, False, tile(2, 8, 8)),
    "several groups in a tile, channels last": ((9, 2, 3), 3, True, tile(2, 4, 8)),
    "depthwise": ((10, 1, 9), 10, True, tile(1, 4, 16)),
    "rows of one": ((70, 1, 1), 1, False, tile(1, 32, 1)),
    "one": ((1, 1, 1), 1, False, tile(1, 1, 1, P=1)),
    "long": ((5, 20, 3), 1, False, tile(4, 1, 16, regime="long")),
    "long channels last": ((5, 7, 9), 1, True, tile(1, 1, 16, regime="long")),
    "long groups": ((4, 25, 2), 2, False, tile(2, 1, 16, P=1, regime="long")),
    "more programs than rows": ((2, 9, 2), 1, False, tile(2, 1, 32, P=5)),
}


def formula(tensors, upstream, groups, eps, kind):
    """new, new_bias, m, q and the gradients of weight, mean, var, scale by torch in `kind`, weight as (outputs, inputs, taps)."""
    weight, mean, var, scale, bias = leaves = [None if t is None else t.detach().to(kind).requires_grad_() for t in tensors]
    rows = weight.view(groups, -1, *weight.shape[1:])
    m = (rows * mean.view(groups, 1, -1, 1)).sum((2, 3)).flatten()
    q = (rows.square() * var.view(groups, 1, -1, 1)).sum((2, 3)).flatten()
    r = (q + eps).rsqrt() * (1 if scale is None else scale)
    results = [weight * r.view(-1, 1, 1), (0 if bias is None else bias) - m * r, m, q]
    torch.autograd.backward(results, [t.to(kind) for t in upstream])
    return [t.detach() for t in results] + [None if t is None else t.grad for t in leaves[:4]]


def given(place, dtype, scale_dtype=torch.float32, bias_dtype=torch.float64):
    (outputs, inputs, taps), groups, last, _ = place
    weight, dnew = random(outputs, inputs, taps, dtype=dtype), random(outputs, inputs, taps, dtype=dtype)
    if last:
        weight, dnew = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (weight, dnew))
    mean, var = torch.randn(groups * inputs).double(), torch.rand(groups * inputs).double()
    scale = None if scale_dtype is None else torch.rand(outputs).add(0.5).to(scale_dtype)
    bias = None if bias_dtype is None else torch.randn(outputs).to(bias_dtype)
    return [weight, mean, var, scale, bias], [dnew, *torch.randn(3, outputs).double()]


def run(place, tensors, upstream, eps=1e-5, config=None):
    """What `formula` gives, and of_scale without scale."""
    (outputs, inputs, taps), groups, last, forced = place
    weight, mean, var, scale, bias = tensors
    new, new_bias = guarded(weight), guarded(torch.empty(outputs, dtype=weight.dtype))
    stats, of_scale = guarded(torch.empty(2, outputs).double()), guarded(torch.empty(outputs).double())
    of_weight, of_mean, of_var = guarded(weight), guarded(mean), guarded(var)
    sizes = (outputs, taps, groups, last, eps)
    tail = (upstream[0], upstream[1], torch.stack(upstream[2:]), weight, mean, var, scale, stats, *sizes)
    analytic_norm_weight.forward(config or forced, new, new_bias, stats, weight, mean, var, scale, bias, *sizes)
    analytic_norm_weight.backward(config or forced, of_weight, of_mean, of_var, of_scale, *tail)
    check_guards()
    return [new, new_bias, *stats, of_weight, of_mean, of_var, of_scale]


NAMES = ("new", "new_bias", "m", "q", "of_weight", "of_mean", "of_var", "of_scale")


def check(place, dtype=torch.float32, eps=1e-5, **dtypes):
    torch.manual_seed(0)
    tensors, upstream = given(place, dtype, **dtypes)
    compare(run(place, tensors, upstream, eps), tensors, upstream, place[1], eps)


def compare(ours, tensors, upstream, groups, eps):
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    exact, theirs = (formula(tensors, upstream, groups, eps, kind) for kind in (torch.float64, wide))
    for name, mine, other, truth in zip(NAMES, ours, theirs, exact, strict=True):
        if truth is None:
            assert mine.isfinite().all()  # of_scale is written all the same
            continue
        rounding = ROUNDING[mine.dtype if "weight" in name or "new" in name else wide]
        assert mine.shape == truth.shape and error(mine, truth) <= max(2 * error(other, truth), rounding), name


@pytest.mark.parametrize("place", PLACES)
def test_place(place):
    check(PLACES[place])


@pytest.mark.parametrize("place", ["rows", "channels last", "several groups in a tile", "long groups"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtype(place, dtype):
    check(PLACES[place], dtype)


@pytest.mark.parametrize("place", ["rows", "depthwise", "long"])
def test_without_scale_and_bias(place):
    """And without eps: rows that fill a tile but do not exist have no variance."""
    check(PLACES[place], scale_dtype=None, bias_dtype=None, eps=0.0)
    check(PLACES[place], scale_dtype=torch.float16, bias_dtype=None, eps=0.0)


@pytest.mark.parametrize("place", ["rows", "several groups in a tile", "long"])
def test_sizes_beyond_float_squares(place):
    """Rows of 1e-25, 1e25 and of nothing among others, which they leave alone."""
    torch.manual_seed(0)
    place = PLACES[place]
    tensors, upstream = given(place, torch.float32)
    usual = run(place, tensors, upstream, 1e-60)
    size = torch.ones(len(tensors[0])).double()
    size[1], size[2], size[3] = 1e-25, 1e25, 0.0
    scaled = [(tensors[0] * size.view(-1, 1, 1)).float(), *tensors[1:]]
    ours, exact = run(place, scaled, upstream, 1e-60), formula(scaled, upstream, place[1], 1e-60, torch.float64)
    for name, mine, truth, before in zip(NAMES, ours, exact, usual, strict=True):
        assert error(mine, truth) <= 2**-20, name
        if name not in ("of_mean", "of_var"):  # sums over all rows
            assert all(error(mine[row], truth[row]) <= 2**-20 for row in (1, 2)), name
            assert torch.equal(mine[4:], before[4:]) and torch.equal(mine[0], before[0]), name
    assert not ours[0][3].any() and ours[3][3] == 0


@pytest.mark.parametrize("place", ["rows", "several groups in a tile", "long"])
def test_nan_spoils_its_row(place):
    torch.manual_seed(0)
    tensors, upstream = given(PLACES[place], torch.float32)
    tensors[0][1, 0, 0] = float("nan")
    for name, value in zip(NAMES[:5], run(PLACES[place], tensors, upstream)[:5], strict=True):
        rows = value.reshape(len(value), -1)
        assert rows[1].isnan().all() and rows[0].isfinite().all() and rows[2:].isfinite().all(), name


def test_sums_are_the_same_however_they_are_split():
    torch.manual_seed(0)
    place = PLACES["rows"]
    tensors, upstream = given(place, torch.float32)
    configs = (tile(1, 4, 16), tile(1, 4, 16), tile(1, 1, 16, P=5), tile(1, 2, 16, P=1), tile(1, 1, 4, P=3, regime="long"))
    results = [run(place, tensors, upstream, config=config) for config in configs]
    for once, again, *others in zip(*results, strict=True):
        assert torch.equal(once, again)
        assert all(error(other, once.double()) <= 2**-21 for other in others)


CHOSEN = [((5, 70, 1), 1, False), ((20, 3, 9), 1, True), ((30, 1, 9), 30, False), ((2, 3000, 3), 1, False)]


@pytest.mark.parametrize("place", CHOSEN, ids=str)
def test_chosen(place):
    """With the configurations that the public pair chooses."""
    torch.manual_seed(0)
    (outputs, inputs, taps), groups, last = place
    tensors, upstream = given((*place, None), torch.float32)
    weight, mean, var, scale, bias = tensors
    ours = [torch.empty_like(t) for t in (weight, bias.float(), *upstream[2:], weight, mean, var, bias)]
    stats, sizes = torch.empty(2, outputs).double(), (outputs, taps, groups, last, 1e-5)
    analytic_norm_weight.analytic_norm_weight_fwd(ours[0], ours[1], stats, weight, mean, var, scale, bias, *sizes)
    tail = (upstream[0], upstream[1], torch.stack(upstream[2:]), weight, mean, var, scale, stats, *sizes)
    analytic_norm_weight.analytic_norm_weight_bwd(*ours[4:], *tail)
    ours[2:4] = stats
    compare(ours, tensors, upstream, groups, 1e-5)


@pytest.mark.parametrize("key", ["conv channels last", "groups"])
def test_public(public, key):
    shared.test_weight("triton", "cpu", None, key, torch.float32)


@triton.jit
def _start_kernel(out_ptr, chunk, L, per_group, n):
    row, live, start, group = place_chunk(chunk, L, per_group, n, True, 2)
    tl.store(out_ptr + tl.arange(0, 2)[:, None], start)


def test_rows_beyond_int32():
    out = torch.empty(2, dtype=torch.int64)
    _start_kernel[(1,)](out, 3000, 1 << 20, 1 << 20, 1 << 20)
    assert out.tolist() == [6000 << 20, 6001 << 20]


@pytest.mark.parametrize("backward", [False, True])
def test_every_choice_is_consistent(backward):
    """Blocks cover their rows, vectors divide lengths, and nothing exceeds what a program may hold."""
    for n in (1, 9, 27, 147, 576, 2048, 4608, 4609, 25088, 100000, 1 << 22):
        for outputs, groups in ((1, 1), (10, 1), (64, 64), (512, 1), (1024, 32), (10000, 1), (8192, 8192)):
            for itemsize in (2, 4, 8):
                c = choose_weight(outputs, n, groups, itemsize, backward)
                assert all(v & (v - 1) == 0 and v > 0 for v in (c.V, c.ROWS, c.BLOCK, c.num_warps))
                assert n % c.V == 0 and c.num_warps <= 16
                assert (c.BLOCK >= n) == (c.regime == "held") and c.ROWS * c.BLOCK <= 32 * c.num_warps * (8 if backward or itemsize == 8 else 16)
                assert 1 <= c.P <= max(1, outputs // groups) if backward else c.P == 0
    with pytest.raises(NotImplementedError, match="2\\^30 elements"):
        choose_weight(2, 1 << 30, 1, 2, backward)
