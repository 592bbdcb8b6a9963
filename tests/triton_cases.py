"""Numerics of the Triton kernels in Triton's interpreter; `test_triton_interpret.py` runs this file in a process of its own.

The measure is torch's own kernel on the same inputs: our largest error against float64, relative to the largest value, is at most
twice torch's, or within the rounding of the output dtype. Shapes are tiny (a program costs 2 ms here), so configurations are forced.
"""

import os

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1 before Triton is first imported"

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from concurrency import concurrently
from normops.kernels import group_norm
from normops.kernels.config import Config, choose
from normops.kernels.fold import fold

ACTIVATIONS = {
    "none": lambda t: t,
    "relu": F.relu,
    "leaky_relu": lambda t: F.leaky_relu(t, 0.1),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "hardswish": F.hardswish,
}
CODE = {name: code for code, name in enumerate(ACTIVATIONS)}
# One rounding of the output (the interpreter truncates bf16); in fp32 and fp64 the about 16 roundings between x and dx.
ROUNDING = {torch.float64: 2**-49, torch.float32: 2**-20, torch.float16: 2**-11, torch.bfloat16: 2**-7}


def split(V, OUTER, BLOCK_C, BLOCK_S, SIDE=False, **flags):
    return Config("split", V, SIDE, 1, OUTER, BLOCK_C, BLOCK_S, 4, **flags)


def held(V, ROWS, OUTER, BLOCK_C, BLOCK_S, SIDE=False, SLOTS=None):
    return Config("held", V, SIDE, ROWS, OUTER, BLOCK_C, BLOCK_S, 4, SLOTS=SLOTS)


# The last 3 of 67 positions cross a vector's end without filling one.
# name: shape, groups, channels_last, config. Between them every branch of every kernel.
PLACES = {
    "held": ((2, 6, 4, 6), 2, False, held(8, 1, 1, 4, 32)),
    "held rows over samples and groups": ((3, 6, 4, 4), 3, False, held(4, 4, 1, 2, 16)),
    "held outer": ((2, 4, 8, 8), 2, False, held(4, 1, 4, 2, 16)),
    "held odd": ((2, 6, 37), 2, False, held(4, 1, 1, 4, 64, SIDE=True)),
    "held odd rows": ((3, 4, 19), 4, False, held(8, 2, 1, 1, 32, SIDE=True)),
    "held odd outer": ((2, 2, 67), 1, False, held(4, 1, 4, 2, 32, SIDE=True)),
    "held samples folded into slots": ((5, 6, 3, 3), 3, False, held(1, 4, 1, 2, 16, SLOTS=2)),
    "held channels last": ((2, 8, 5, 3), 2, True, held(4, 1, 1, 4, 16)),
    "held channels last rows": ((3, 12, 2, 2), 4, True, held(1, 8, 1, 4, 4)),
    "held instance": ((2, 4, 3, 2), 4, False, held(2, 4, 1, 1, 8)),
    "split": ((2, 6, 8, 12), 2, False, split(4, 1, 2, 32)),
    "split outer": ((1, 8, 8, 12), 2, False, split(4, 2, 4, 16)),
    "split merged in apply": ((2, 6, 8, 12), 1, False, split(4, 1, 2, 32, FOLD=True, LARGE=True)),
    "split odd": ((2, 6, 67), 2, False, split(4, 1, 2, 32, SIDE=True)),
    "split odd merged in apply": ((1, 4, 97), 2, False, split(8, 2, 2, 32, SIDE=True, FOLD=True)),
    "split channels last": ((2, 12, 7, 5), 4, True, split(4, 1, 8, 16)),
    "split channels last merged in apply": ((2, 8, 7, 5), 2, True, split(4, 1, 4, 16, FOLD=True)),
    "split channels last primes": ((1, 11, 13, 3), 1, True, split(1, 1, 8, 16)),
    "split channels last instance": ((2, 12, 7, 5), 12, True, split(4, 1, 8, 16)),
    "split in steps": ((2, 4, 8, 17), 2, False, split(4, 1, 2, 16, STEPS=4)),
    "split in steps merged in apply": ((1, 4, 8, 17), 2, False, split(4, 2, 2, 8, STEPS=2, FOLD=True)),
    "split channels last in steps": ((2, 12, 7, 5), 4, True, split(4, 1, 8, 4, STEPS=4)),
    "split in waves of samples": ((3, 6, 8, 12), 2, False, split(4, 1, 1, 32, FOLD=True, LARGE=True, SET_N=2)),
    "split in waves of groups": ((2, 6, 8, 12), 3, False, split(4, 1, 2, 32, FOLD=True, LARGE=True, SET_N=1, SET_C=2, STEPS=2)),
}
STATISTICS = ["held", "held rows over samples and groups", "held odd outer", "held channels last"] + [
    "split", "split merged in apply", "split odd", "split channels last primes", "split channels last instance",
    "split in steps", "split channels last in steps", "split in waves of samples",
]  # fmt: skip


@pytest.fixture(autouse=True)
def poisoned():
    """Workspaces arrive full of NaN, and programs run at the same time, so that a race between them is seen."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    with concurrently():
        yield
    torch.use_deterministic_algorithms(False)
    _guards.clear()


_guards = []


def guarded(x):
    """An output like x, full of NaN, between guards that `check_guards` looks at."""
    if x is None:
        return None
    memory = torch.full((x.numel() + 128,), 7.0, dtype=x.dtype)
    _guards.append(memory)
    return memory[64:-64].fill_(float("nan")).as_strided(x.shape, x.stride())


def check_guards():
    for memory in _guards:
        assert (memory[:64] == 7).all() and (memory[-64:] == 7).all(), "a kernel wrote beside its output"


def random(*shape, dtype, channels_last=False, mean=0.0):
    x = (torch.randn(shape, dtype=torch.float64) + mean).to(dtype)
    return x.to(memory_format=torch.channels_last) if channels_last and x.dim() == 4 else x


def torch_way(x, dy, weight, bias, residual, G, eps, activation, dtype):
    """y, dx, dweight, dbias, dresidual by torch, every tensor in `dtype`; None for what is not there."""
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in (x, weight, bias, residual)]
    x, weight, bias, residual = leaves
    if (weight is None or weight.dim() == 1) and (bias is None or bias.dim() == 1):
        t = F.group_norm(x, G, weight, bias, eps)
    else:
        t = F.group_norm(x, G, None, None, eps)
        for parameter, combine in ((weight, torch.mul), (bias, torch.add)):
            if parameter is not None:
                t = combine(t, parameter.reshape(-1, x.shape[1], *[1] * (x.dim() - 2)))
    y = ACTIVATIONS[activation](t if residual is None else t + residual)
    y.backward(dy.to(dtype))
    return [y.detach()] + [None if t is None else t.grad for t in leaves]


def error(value, exact):
    return ((value.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-300)).item()


def compare(ours, theirs, exact, names=("y", "dx", "dweight", "dbias", "dresidual"), limit=None):
    for name, mine, other, truth in zip(names, ours, theirs, exact, strict=True):
        if mine is None:
            continue
        allowed = limit or max(2 * error(other, truth), ROUNDING[mine.dtype])
        assert error(mine, truth) <= allowed, f"{name}: error {error(mine, truth):.2e}, allowed {allowed:.2e}"


def run(place, x, dy, weight, bias, residual, eps=1e-5, activation="silu", want=(True, True, True), stats=None):
    shape, G, channels_last, config = place
    N, C = shape[:2]
    frozen = stats is not None
    if not frozen:
        stats = guarded(torch.empty(3, N, G, dtype=torch.promote_types(x.dtype, torch.float32)))
    y, code = guarded(dy), CODE[activation]
    group_norm.forward(config, y, stats, x, weight, bias, residual, N, C, G, channels_last, frozen, eps, code, 0.1)
    config = replace(config, SLOTS=config.SLOTS or N)
    dx, dweight, dbias = (guarded(t) if wanted else None for t, wanted in zip((x, weight, bias), want, strict=True))
    dresidual = guarded(residual)
    group_norm.backward(config, dx, dweight, dbias, dresidual, dy, x, stats, weight, bias, residual, None, N, C, G, channels_last, frozen, code, 0.1)
    check_guards()
    return [y, dx, dweight, dbias, dresidual], stats


def check(
    place, dtype=torch.float32, activation="silu", dims=(1, 1), with_residual=True, weight_dtype=None, dy_dtype=None, want=(True,) * 3,
    mean=0.0, limit=None,
):  # fmt: skip
    torch.manual_seed(0)
    shape, G, channels_last, _ = place
    N, C = shape[:2]
    x = random(*shape, dtype=dtype, channels_last=channels_last, mean=mean)
    dy = random(*shape, dtype=dy_dtype or dtype, channels_last=channels_last)
    residual = random(*shape, dtype=dtype, channels_last=channels_last) if with_residual else None
    weight, bias = (None if d is None else random(*(N, C)[2 - d :], dtype=weight_dtype or dtype) for d in dims)
    ours, _ = run(place, x, dy, weight, bias, residual, activation=activation, want=want)
    exact = torch_way(x, dy, weight, bias, residual, G, 1e-5, activation, torch.float64)
    theirs = torch_way(x, dy, weight, bias, residual, G, 1e-5, activation, dtype)
    compare(ours, theirs, exact, limit=limit)


@pytest.mark.parametrize("place", PLACES)
def test_place(place):
    check(PLACES[place])


@pytest.mark.parametrize("place", ["held", "split", "split merged in apply"])
def test_without_stats_or_y(place):
    shape, G, channels_last, config = PLACES[place]
    x, y, silent = random(*shape, dtype=torch.float32), torch.empty(shape), torch.empty(shape)
    stats, alone = torch.empty(3, shape[0], G), torch.empty(3, shape[0], G)
    group_norm.forward(config, y, stats, x, None, None, None, *shape[:2], G, channels_last, False, 1e-5, 0, 0.0)
    group_norm.forward(config, silent, None, x, None, None, None, *shape[:2], G, channels_last, False, 1e-5, 0, 0.0)
    group_norm.forward(config, None, alone, x, None, None, None, *shape[:2], G, channels_last, False, 1e-5, 0, 0.0)
    assert torch.equal(silent, y) and error(alone, stats.double()) <= 2**-22


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation(activation):
    """One place: every kernel calls the same functions."""
    check(PLACES["held"], activation=activation, with_residual=activation == "gelu")


@pytest.mark.parametrize("place", ["held rows over samples and groups", "held odd", "split", "split channels last merged in apply"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtype(place, dtype):
    check(PLACES[place], dtype)


@pytest.mark.parametrize("place", ["held", "held rows over samples and groups", "split", "split channels last"])
@pytest.mark.parametrize("dims", [(2, 2), (None, None), (1, None), (None, 2), (2, 1), (1, 2)], ids=str)
def test_affine(place, dims):
    check(PLACES[place], dims=dims, with_residual=False)


@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_weight_dtype(weight_dtype):
    for dtype in (torch.float16, torch.float64):
        check(PLACES["held"], dtype, weight_dtype=weight_dtype)
    check(PLACES["split"], torch.float32, weight_dtype=weight_dtype)


@pytest.mark.parametrize("place", ["held", "split"])
def test_wide_output(place):
    """Under autocast 16-bit x gives fp32 y, rounded nowhere."""
    check(PLACES[place], torch.float16, dy_dtype=torch.float32, weight_dtype=torch.float32, with_residual=False)


@pytest.mark.parametrize("place", ["held", "split"])
@pytest.mark.parametrize("want", [(True, False, False), (False, True, True), (False, False, True), (False, False, False)], ids=str)
def test_wanted(place, want):
    check(PLACES[place], want=want)


@pytest.mark.parametrize("place", STATISTICS)
def test_far_from_zero(place):
    """mean / std = 1e4: still at rounding level, where torch loses three digits."""
    check(PLACES[place], activation="none", with_residual=False, mean=1e4, limit=1e-6)


@pytest.mark.parametrize("place", STATISTICS)
@pytest.mark.parametrize("value", [0.1, 6e37])
def test_constant(place, value):
    """Constant input gives the bias, bit for bit, and a finite gradient."""
    shape, G, channels_last, _ = PLACES[place]
    x = random(*shape, dtype=torch.float32, channels_last=channels_last).fill_(value)
    weight, bias = random(shape[1], dtype=torch.float32), random(shape[1], dtype=torch.float32)
    ours, stats = run(PLACES[place], x, x / value, weight, bias, None, activation="none")
    expected = bias.view(1, -1, *[1] * (x.dim() - 2)).expand_as(x)
    assert torch.equal(ours[0], expected) and torch.equal(stats[0], torch.full_like(stats[0], x.flatten()[0]))
    assert all(t.isfinite().all() for t in ours[1:4])


HUGE = [(place, torch.float32) for place in STATISTICS] + [("held", torch.bfloat16), ("split", torch.bfloat16)]


@pytest.mark.parametrize("place, dtype", HUGE, ids=str)
def test_huge(place, dtype):
    """1e30: the sum of squares overflows fp32, nothing else does. float64 tells what is right."""
    shape, G, channels_last, _ = PLACES[place]
    torch.manual_seed(0)
    x = random(*shape, dtype=torch.float64, channels_last=channels_last).mul(1e30).to(dtype)
    dy, weight, bias = (random(*s, dtype=dtype, channels_last=channels_last) for s in (shape, shape[1:2], shape[1:2]))
    ours, _ = run(PLACES[place], x, dy, weight, bias, None)
    exact = torch_way(x, dy, weight, bias, None, G, 1e-5, "silu", torch.float64)
    compare(ours, exact, exact)


def test_sums_are_the_same_however_they_are_split():
    """Two configurations of the same call agree to rounding; run twice, one agrees with itself bit for bit."""
    shape, G, _, config = PLACES["split"]
    torch.manual_seed(0)
    x, dy = random(*shape, dtype=torch.float32), random(*shape, dtype=torch.float32)
    results = [run((shape, G, False, c), x, dy, None, None, None)[0][:2] for c in (config, config, held(4, 1, 1, 4, 128))]
    for once, again, other in zip(*results, strict=True):
        assert torch.equal(once, again)
        assert error(other, once.double()) <= 2**-21


FROZEN = ["split", "split odd", "split channels last", "split channels last instance"]


@pytest.mark.parametrize("place", FROZEN)
@pytest.mark.parametrize("dims, shared", [((1, 1), True), ((2, 1), True), ((1, 1), False)], ids=str)
def test_frozen(place, dims, shared):
    """Given statistics: an elementwise function of x and the gradients of one, whatever x is."""
    shape, G, channels_last, _ = PLACES[place]
    N, C = shape[:2]
    torch.manual_seed(0)
    x, dy, residual = (random(*shape, dtype=torch.float32, channels_last=channels_last) for _ in range(3))
    stats = torch.stack([random(1 if shared else N, G, dtype=torch.float32) for _ in range(3)])
    stats[1] *= 1e-8
    stats[2].exp_()
    weight, bias = (random(*(N, C)[2 - d :], dtype=torch.float32) for d in dims)

    def exact(dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weight, bias, residual)]
        mean, lo, rstd = (t.to(dtype).repeat_interleave(C // G, 1).view(-1, C, *[1] * (x.dim() - 2)) for t in stats)
        w, b = (p.view(-1, C, *[1] * (x.dim() - 2)) for p in leaves[1:3])
        y = F.silu((leaves[0] - mean - lo) * rstd * w + b + leaves[3])
        y.backward(dy.to(dtype))
        return [y.detach()] + [t.grad for t in leaves]

    ours, _ = run(PLACES[place], x, dy, weight, bias, residual, stats=stats)
    compare(ours, exact(torch.float32), exact(torch.float64))
    # Through the public pair, which may see all samples as one; again with an x that is not finite.
    outputs = [guarded(t) for t in (x, x, weight, bias, residual)]
    arguments = (N, C, G, channels_last, True)
    group_norm.group_norm_fwd(outputs[0], stats, x, weight, bias, residual, *arguments, 1e-5, 3, 0.0)
    group_norm.group_norm_bwd(*outputs[1:], dy, x, stats, weight, bias, residual, None, *arguments, 3, 0.0)
    check_guards()
    compare(outputs, exact(torch.float32), exact(torch.float64))
    x[0, 1, 2] = float("inf")
    group_norm.group_norm_bwd(outputs[1], None, None, None, dy, x, stats, weight, bias, None, None, *arguments, 0, 0.0)
    assert outputs[1].isfinite().all()


@pytest.mark.parametrize("place", FROZEN)
@pytest.mark.parametrize("shared", [True, False])
def test_given_means(place, shared):
    """dx where the means of g x_hat and of g come from elsewhere, with and without the sums for weight and bias."""
    shape, G, channels_last, _ = PLACES[place]
    N, C = shape[:2]
    torch.manual_seed(0)
    x, dy = (random(*shape, dtype=torch.float32, channels_last=channels_last) for _ in range(2))
    weight, bias = random(C, dtype=torch.float32), random(C, dtype=torch.float32)
    stats, means = (torch.stack([random(1 if shared else N, G, dtype=torch.float32).exp() for _ in range(k)]) for k in (3, 2))

    def expected(dtype):
        over = [t.to(dtype).repeat_interleave(C // G, 1).view(-1, C, *[1] * (x.dim() - 2)) for t in (*stats, *means)]
        w, b = (t.to(dtype).view(-1, *[1] * (x.dim() - 2)) for t in (weight, bias))
        x_hat = (x.to(dtype) - over[0] - over[1]) * over[2]
        t = (x_hat * w + b).requires_grad_()
        F.silu(t).backward(dy.to(dtype))
        others = [0, *range(2, x.dim())]
        return [over[2] * (w * t.grad - over[4] - x_hat * over[3]), (t.grad * x_hat).sum(others), t.grad.sum(others)]

    for want in (True, False):
        ours = [guarded(t) if wanted else None for t, wanted in ((x, True), (weight, want), (bias, want))]
        group_norm.group_norm_bwd(*ours, None, dy, x, stats, weight, bias, None, means, N, C, G, channels_last, True, 3, 0.0)
        check_guards()
        compare(ours, expected(torch.float32), expected(torch.float64), ("dx", "dweight", "dbias"))


def test_many_partials():
    """More than 512 chunks a sample are brought together in two steps."""
    torch.manual_seed(0)
    N, T, C, D, CHUNK = 2, 519, 6, 3, 4
    x = random(N, T, C, CHUNK, dtype=torch.float64, mean=1e4)
    x[:, -1, :, 3] = float("nan")  # the last chunk is one position short
    mean = x.nanmean(3)
    root_M2 = (x - mean[..., None]).square().nansum(3).sqrt()
    partials = torch.stack([mean.float(), mean - mean.float(), root_M2]).float()
    stats = guarded(torch.empty(3, N, C // D))
    group_norm.fold_moments(partials, stats, D, T * CHUNK - 1, CHUNK, 1e-5)
    groups = x.view(N, T, C // D, D, CHUNK).movedim(2, 1).flatten(2)
    mean = groups.nanmean(2)
    rstd = ((groups - mean[..., None]).square().nanmean(2) + 1e-5).rsqrt()
    assert error(stats[0].double() + stats[1].double() - 1e4, mean - 1e4) < 1e-5 and error(stats[2], rstd) < 1e-6

    sums = random(2, 3 * 600, 5, dtype=torch.float32)
    dweight, dbias = guarded(torch.empty(3, 5)), guarded(torch.empty(5))
    fold(sums, dweight, dbias)
    check_guards()
    theirs, exact = ([s[0].view(3, 600, 5).sum(1), s[1].sum(0)] for s in (sums, sums.double()))
    compare([dweight, dbias], theirs, exact, ("dweight", "dbias"))


CHOSEN = [((2, 12, 7, 5), 4, False), ((1, 4, 257), 2, False), ((2, 8, 4, 4), 2, True), ((2, 6, 5, 5), 6, True)]


@pytest.mark.parametrize("shape, G, channels_last", CHOSEN, ids=str)
def test_chosen(shape, G, channels_last):
    """Through the public pair, with the configuration that it chooses."""
    torch.manual_seed(0)
    x, dy = (random(*shape, dtype=torch.float32, channels_last=channels_last) for _ in range(2))
    weight, bias = random(shape[1], dtype=torch.float32), random(shape[1], dtype=torch.float32)
    y, dx, dweight, dbias, stats = (guarded(t) for t in (x, x, weight, bias, torch.empty(3, shape[0], G)))
    arguments = (*shape[:2], G, channels_last, False)
    group_norm.group_norm_fwd(y, stats, x, weight, bias, None, *arguments, 1e-5, 3, 0.0)
    group_norm.group_norm_bwd(dx, dweight, dbias, None, dy, x, stats, weight, bias, None, None, *arguments, 3, 0.0)
    check_guards()
    exact = torch_way(x, dy, weight, bias, None, G, 1e-5, "silu", torch.float64)
    theirs = torch_way(x, dy, weight, bias, None, G, 1e-5, "silu", torch.float32)
    compare([y, dx, dweight, dbias, None], theirs, exact)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_every_choice_is_consistent(channels_last, backward):
    """Blocks cover their group or lie in it, vectors divide lengths, and nothing exceeds what a program may hold."""
    for C, G in ((32, 32), (320, 32), (64, 1), (30, 3), (1280, 32), (1024, 512), (6, 2), (40000, 1)):
        for S in (2, 49, 64, 196, 257, 1024, 3136, 65535, 1 << 20):
            for itemsize in (2, 4, 8):
                c = choose(4, C, S, G, itemsize, channels_last, backward)
                D, last, P = C // G, channels_last, c.OUTER * c.BLOCK_S
                assert all(v & (v - 1) == 0 and v > 0 for v in (c.V, c.ROWS, c.OUTER, c.BLOCK_C, c.BLOCK_S, c.num_warps))
                assert c.num_warps <= 16 and c.ROWS * c.OUTER * c.BLOCK_C * c.BLOCK_S * itemsize <= 65536 and (c.ROWS == 1 or c.OUTER == 1)
                assert c.SIDE or ((D if c.regime == "held" else C) if last else S) % c.V == 0
                assert not c.SIDE or not last
                if c.regime == "held":
                    assert c.BLOCK_C >= D and P >= S and 1 <= c.SLOTS <= 4
                else:
                    assert not c.FOLD or D % c.BLOCK_C == 0
