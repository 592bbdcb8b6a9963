"""Numerics of the Triton kernels for layer and RMS norm in Triton's interpreter; `test_triton_interpret.py` runs this file in a process of its own.

The same measure as in `triton_cases.py`, over the pair that normalizes the D channels of each group of one position.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from normops.kernels import row_norm
from normops.kernels.config import RowConfig, choose_rows
from triton_cases import ACTIVATIONS, CODE, check_guards, compare, error, guarded, poisoned, random

__all__ = ["poisoned"]  # a fixture


def held(V, ROWS, GROUPS, BLOCK, P=2):
    return RowConfig("held", V, ROWS, GROUPS, BLOCK, 4, P=P, STAGES=2)


def long(V, ROWS, BLOCK, regime="long", P=2):
    return RowConfig(regime, V, ROWS, 1, BLOCK, 4, P=P)


# name: N, C, S, groups, config. Between them every branch of every kernel.
PLACES = {
    "rows": (11, 24, 1, 1, held(8, 4, 1, 32)),
    "one row": (6, 40, 1, 1, held(8, 1, 1, 64, P=4)),
    "two channels": (4, 8, 1, 4, held(2, 2, 4, 2)),
    "groups": (6, 24, 1, 3, held(8, 4, 2, 8)),
    "odd groups": (6, 21, 1, 3, held(1, 4, 4, 8)),
    "across": (6, 12, 20, 1, held(4, 8, 1, 16)),
    "across odd": (6, 6, 13, 1, held(1, 8, 1, 8, P=3)),
    "long": (6, 100, 1, 1, long(4, 1, 32)),
    "long groups": (6, 72, 1, 2, long(4, 1, 16)),
    "long across": (2, 40, 12, 1, long(4, 8, 16)),
    "long across odd": (2, 20, 7, 1, long(1, 4, 8)),
    "split": (2, 100, 1, 1, long(4, 1, 32, "split")),
    "split groups": (2, 72, 1, 2, long(4, 1, 16, "split")),
}


def expected(x, addend, dy, dtotal, weight, bias, residual, G, centered, weight_offset, eps, activation, dtype):
    """y, dx, dweight, dbias, dresidual, total by torch in `dtype`; None for what is not there."""
    N, C, S = x.shape
    total = x if addend is None else x + addend
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in (total, weight, bias, residual)]
    x, weight, bias, residual = leaves
    rows = x.view(N, G, C // G, S).movedim(2, 3)
    rows = F.layer_norm(rows, rows.shape[3:], eps=eps) if centered else F.rms_norm(rows, rows.shape[3:], eps=eps)
    t = rows.movedim(3, 2).reshape(N, C, S)
    if weight is not None:
        t = t * (weight + weight_offset).view(-1, C, 1).repeat_interleave(N * C // weight.numel(), 0)
    if bias is not None:
        t = t + bias.view(-1, C, 1).repeat_interleave(N * C // bias.numel(), 0)
    y = ACTIVATIONS[activation](t if residual is None else t + residual)
    y.backward(dy.to(dtype))
    if dtotal is not None:
        x.grad += dtotal.to(dtype)
    return [y.detach()] + [None if t is None else t.grad for t in leaves] + [None if addend is None else total.to(dtype)]


def run(place, x, addend, dy, dtotal, weight, bias, residual, centered=True, weight_offset=0.0, eps=1e-5, activation="silu", want=(True,) * 4):
    N, C, S, G, config = place
    code = CODE[activation]
    total = None if addend is None else guarded(x)
    y, stats = guarded(dy), guarded(torch.empty(3 if centered else 1, N, G, S, dtype=torch.promote_types(x.dtype, torch.float32)))
    row_norm.forward(config, y, total, stats, x, addend, weight, bias, residual, N, C, G, centered, weight_offset, eps, code, 0.1)
    config = replace(config, regime="held" if config.regime == "held" else "split")
    gradients = [guarded(t) if t is not None and wanted else None for t, wanted in zip((x, weight, bias, residual), want, strict=True)]
    saved = x if addend is None else total
    row_norm.backward(config, *gradients, dy, dtotal, saved, stats, weight, bias, residual, N, C, G, centered, weight_offset, code, 0.1)
    check_guards()
    return [y, *gradients, total], stats


def check(
    place, dtype=torch.float32, rows=(1, 1), with_residual=True, with_addend=True, activation="silu", centered=True, weight_offset=0.0,
    mean=0.0, limit=None, dy_dtype=None, weight_dtype=None, want=(True,) * 4,
):  # fmt: skip
    torch.manual_seed(0)
    N, C, S, G, _ = place
    with_addend = with_addend and S == 1
    x = random(N, C, S, dtype=dtype, mean=mean)
    addend, dtotal = (random(N, C, S, dtype=dtype) if with_addend else None for _ in range(2))
    residual = random(N, C, S, dtype=dtype) if with_residual else None
    dy = random(N, C, S, dtype=dy_dtype or dtype)
    weight, bias = (None if r is None else random(r, C, dtype=weight_dtype or dtype) for r in rows)
    arguments = (x, addend, dy, dtotal, weight, bias, residual)
    ours, _ = run(place, *arguments, centered, weight_offset, activation=activation, want=want)
    exact, theirs = (expected(*arguments, G, centered, weight_offset, 1e-5, activation, kind) for kind in (torch.float64, dtype))
    compare(ours, theirs, exact, ("y", "dx", "dweight", "dbias", "dresidual", "total"), limit)


@pytest.mark.parametrize("centered", [True, False], ids=["layer", "rms"])
@pytest.mark.parametrize("place", PLACES)
def test_place(place, centered):
    check(PLACES[place], centered=centered, weight_offset=0.0 if centered else 1.0)


@pytest.mark.parametrize("place", ["rows", "groups", "across", "long", "split groups"])
@pytest.mark.parametrize("rows", [(2, 2), (None, None), (1, None), (None, 2), (2, 1), (1, "N"), ("N", "N")], ids=str)
def test_affine(place, rows):
    rows = tuple(PLACES[place][0] if r == "N" else r for r in rows)
    if place == "rows":  # 2 does not divide 11
        rows = tuple(11 if r == 2 else r for r in rows)
    check(PLACES[place], rows=rows, with_residual=False, with_addend=False, activation="none", weight_offset=1.0)


def test_weight_and_bias_shared_differently():
    """2 rows of weight and 3 of bias over 6 samples: 6 segments."""
    for place in ("groups", "across odd", "long"):
        check(PLACES[place], rows=(2, 3))


@pytest.mark.parametrize("place", ["rows", "groups", "across", "long"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtype(place, dtype):
    check(PLACES[place], dtype)


@pytest.mark.parametrize("place", ["rows", "across odd"])
def test_wide_output(place):
    check(PLACES[place], torch.float16, dy_dtype=torch.float32, weight_dtype=torch.float32, with_residual=False, with_addend=False)


@pytest.mark.parametrize("place", ["rows", "long"])
@pytest.mark.parametrize("want", [(True, False, False, True), (False, True, True, False), (False, False, True, True)], ids=str)
def test_wanted(place, want):
    check(PLACES[place], want=want)


@pytest.mark.parametrize("place", ["rows", "across", "long", "long across", "split", "split groups"])
def test_without_stats(place):
    N, C, S, G, config = PLACES[place]
    torch.manual_seed(0)
    x, y, silent = random(N, C, S, dtype=torch.float32), torch.empty(N, C, S), torch.empty(N, C, S)
    for centered in (True, False):
        stats = torch.empty(3 if centered else 1, N, G, S)
        row_norm.forward(config, y, None, stats, x, None, None, None, None, N, C, G, centered, 0.0, 1e-5, 0, 0.0)
        row_norm.forward(config, silent, None, None, x, None, None, None, None, N, C, G, centered, 0.0, 1e-5, 0, 0.0)
        assert torch.equal(silent, y)


STATISTICS = ["rows", "groups", "across odd", "long", "long across", "split", "split groups"]


@pytest.mark.parametrize("place", STATISTICS)
def test_far_from_zero(place):
    """mean / std = 1e4: still at rounding level, where torch loses three digits."""
    check(PLACES[place], activation="none", with_residual=False, with_addend=False, mean=1e4, limit=1e-6)


@pytest.mark.parametrize("place", STATISTICS)
@pytest.mark.parametrize("value", [0.1, 6e37])
def test_constant(place, value):
    """Constant input gives the bias, bit for bit, and a finite gradient."""
    N, C, S, _, _ = PLACES[place]
    x, weight, bias = torch.full((N, C, S), value), random(C, dtype=torch.float32), random(C, dtype=torch.float32)
    ours, stats = run(PLACES[place], x, None, x / value, None, weight, bias, None, activation="none")
    assert torch.equal(ours[0], bias.view(1, C, 1).expand_as(x)) and torch.equal(stats[0], torch.full_like(stats[0], x[0, 0, 0]))
    assert all(t.isfinite().all() for t in ours[1:4])


@pytest.mark.parametrize("centered", [True, False], ids=["layer", "rms"])
@pytest.mark.parametrize("place", STATISTICS)
def test_huge(place, centered):
    """1e30: the sum of squares overflows fp32, nothing else does. float64 tells what is right."""
    N, C, S, G, _ = PLACES[place]
    torch.manual_seed(0)
    x = random(N, C, S, dtype=torch.float64).mul(1e30)
    x[-1] *= 1e-30  # its neighbours must not scale what does not overflow
    x = x.float()
    dy, weight, bias = (random(*s, dtype=torch.float32) for s in ((N, C, S), (C,), (C,)))
    arguments = (x, None, dy, None, weight, bias, None)
    ours, _ = run(PLACES[place], *arguments, centered)
    exact = expected(*arguments, G, centered, 0.0, 1e-5, "silu", torch.float64)
    compare(ours[:1] + ours[2:4], exact[:1] + exact[2:4], exact[:1] + exact[2:4], ("y", "dweight", "dbias"))
    for rows in (slice(0, -1), slice(-1, None)):
        compare([ours[1][rows]], [exact[1][rows]], [exact[1][rows]], ("dx",))


def test_blocks_far_apart():
    """A row that steps from 0 to 1e4: blocks whose means differ by much more than they vary inside."""
    torch.manual_seed(0)
    for place in ("rows", "long", "split", "long across"):
        N, C, S, G, _ = PLACES[place]
        x = random(N, C, S, dtype=torch.float32) + 1e4 * (torch.arange(C) > C // 3).view(1, C, 1)
        arguments = (x, None, random(N, C, S, dtype=torch.float32), None, None, None, None)
        ours, _ = run(PLACES[place], *arguments, activation="none")
        exact = expected(*arguments, G, True, 0.0, 1e-5, "none", torch.float64)
        compare(ours, exact, exact, ("y", "dx", "dweight", "dbias", "dresidual", "total"), 2e-6)


def test_sums_are_the_same_however_they_are_split():
    torch.manual_seed(0)
    N, C, S, G, config = PLACES["rows"]
    x, dy, weight = (random(*s, dtype=torch.float32) for s in ((N, C, S), (N, C, S), (C,)))
    configs = (config, config, held(8, 1, 1, 32, P=5), long(8, 1, 16), long(8, 1, 8, "split", P=3))
    results = [run((N, C, S, G, c), x, None, dy, None, weight, None, None)[0][:3] for c in configs]
    for once, again, *others in zip(*results, strict=True):
        assert torch.equal(once, again)
        assert all(error(other, once.double()) <= 2**-21 for other in others)


CHOSEN = [(5, 70, 1, 1), (3, 60, 1, 6), (2, 10, 9, 1), (1, 16400, 1, 1)]


@pytest.mark.parametrize("N, C, S, G", CHOSEN, ids=str)
def test_chosen(N, C, S, G):
    """Through the public pair, with the configuration that it chooses."""
    torch.manual_seed(0)
    x, dy, weight = (random(*s, dtype=torch.float32) for s in ((N, C, S), (N, C, S), (C,)))
    y, dx, dweight, stats = guarded(x), guarded(x), guarded(weight), guarded(torch.empty(3, N, G, S))
    row_norm.row_norm_fwd(y, None, stats, x, None, weight, None, None, N, C, G, True, 0.0, 1e-5, 0, 0.0)
    row_norm.row_norm_bwd(dx, dweight, None, None, dy, None, x, stats, weight, None, None, N, C, G, True, 0.0, 0, 0.0)
    check_guards()
    exact, theirs = (expected(x, None, dy, None, weight, None, None, G, True, 0.0, 1e-5, "none", d) for d in (torch.float64, torch.float32))
    compare([y, dx, dweight], theirs[:3], exact[:3], ("y", "dx", "dweight"))


@pytest.mark.parametrize("backward", [False, True])
def test_every_choice_is_consistent(backward):
    """Blocks cover their rows, vectors divide lengths, and nothing exceeds what a program may hold."""
    for C, G in ((1, 1), (96, 1), (768, 1), (4096, 64), (8192, 512), (7168, 1), (20480, 1), (65535, 1), (1 << 22, 1), (30, 15)):
        for S in (1, 7, 49, 196, 1024) if G == 1 and C < 1 << 20 else (1,):
            for N, segments in ((1, 1), (64, 1), (1 << 16, 8), (12, 12)):
                for itemsize in (2, 4, 8):
                    c = choose_rows(N, C, S, G, itemsize, segments, backward, True)
                    D = C // G
                    assert all(v & (v - 1) == 0 and v > 0 for v in (c.V, c.ROWS, c.GROUPS, c.BLOCK, c.num_warps))
                    assert (S if S > 1 else D) % c.V == 0 and (c.ROWS if S > 1 else c.BLOCK) >= c.V
                    assert c.num_warps <= 32 and c.ROWS * c.GROUPS * c.BLOCK * itemsize <= 65536
                    assert c.regime != "held" or c.BLOCK >= D
                    assert c.regime == "held" or (c.GROUPS == 1 and (c.regime == "long") <= (not backward))
                    assert c.P >= 1 if backward else c.P == 0
