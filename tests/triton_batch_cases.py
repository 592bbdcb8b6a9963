"""Numerics of the Triton kernels for batch norm in Triton's interpreter; `test_triton_interpret.py` runs this file in a process of its own.

The same measure as in `triton_cases.py`, over the pair whose statistics are those of a channel in all samples.
"""

import pytest
import torch
import torch.nn.functional as F
from normops.kernels import batch_norm, group_norm
from normops.kernels.config import Config, choose_batch
from triton_cases import ACTIVATIONS, CODE, check_guards, compare, error, guarded, poisoned, random, split

__all__ = ["poisoned"]  # a fixture


def held(V, ROWS, BLOCK_C, BLOCK_S):
    return Config("held", V, False, ROWS, 1, BLOCK_C, BLOCK_S, 4)


def samples(V, ROWS, BLOCK_C, BLOCK_S, LARGE=False):
    return Config("samples", V, False, ROWS, 1, BLOCK_C, BLOCK_S, 4, LARGE=LARGE)


# name: shape, channels_last, config. Between them every branch of every kernel.
PLACES = {
    "held": ((6, 5, 3, 4), False, held(4, 8, 2, 16)),
    "held full": ((4, 6, 7, 7), False, held(1, 4, 4, 64)),
    "held one sample": ((1, 4, 6, 6), False, held(4, 1, 2, 64)),
    "held channels last": ((3, 12, 5, 3), True, held(4, 64, 8, 1)),
    "held single positions": ((7, 12), True, held(4, 8, 16, 1)),
    "samples": ((7, 6, 7, 7), False, samples(1, 2, 4, 64)),
    "samples full": ((8, 2, 14, 14), False, samples(4, 4, 1, 256, LARGE=True)),
    "split": ((3, 4, 8, 12), False, split(4, 1, 2, 64)),
    "split odd": ((3, 3, 67), False, split(4, 1, 2, 64, SIDE=True, LARGE=True)),
    "split channels last": ((3, 12, 7, 5), True, split(4, 1, 8, 32)),
}
APART = ("held", "held channels last", "samples", "split", "split channels last")  # channels side by side in a program
MOMENTUM = 0.3


def torch_way(x, dy, weight, bias, residual, running, eps, activation, dtype):
    """y, dx, dweight, dbias, dresidual, running mean and variance by torch in `dtype`; None for what is not there."""
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in (x, weight, bias, residual)]
    x, weight, bias, residual = leaves
    running = [None if t is None else t.to(dtype, copy=True) for t in running]
    t = F.batch_norm(x, *running, None, None, True, MOMENTUM, eps)
    for parameter, combine in ((weight, torch.mul), (bias, torch.add)):
        if parameter is not None:
            t = combine(t, parameter.reshape(-1, x.shape[1], *[1] * (x.dim() - 2)))
    y = ACTIVATIONS[activation](t if residual is None else t + residual)
    y.backward(dy.to(dtype))
    return [y.detach()] + [None if t is None else t.grad for t in leaves] + running


def run(place, x, dy, weight, bias, residual, running, eps=1e-5, activation="silu", want=(True,) * 4):
    """Through the public pair where `place` has no config."""
    shape, channels_last, config = place
    N, C = shape[:2]
    y, stats, code = guarded(dy), guarded(torch.empty(4, 1, C, dtype=torch.promote_types(x.dtype, torch.float32))), CODE[activation]
    running = [None if t is None else guarded(t).copy_(t) for t in running]
    gradients = [guarded(t) if t is not None and wanted else None for t, wanted in zip((x, weight, bias, residual), want, strict=True)]
    forward, backward = batch_norm.batch_norm_fwd, batch_norm.batch_norm_bwd
    if config:
        forward, backward = (lambda *args, f=f: f(config, *args) for f in (batch_norm.forward, batch_norm.backward))
    forward(y, stats, *running, x, weight, bias, residual, N, C, channels_last, MOMENTUM, eps, code, 0.1)
    backward(*gradients, dy, x, stats, weight, bias, residual, N, C, channels_last, code, 0.1)
    check_guards()
    return [y, *gradients, *running], stats


def check(
    place, dtype=torch.float32, activation="silu", rows=(1, 1), with_residual=True, dy_dtype=None, weight_dtype=None, running_dtype=torch.float32,
    want=(True,) * 4, mean=0.0, limit=None,
):  # fmt: skip
    torch.manual_seed(0)
    shape, channels_last, _ = place
    x = random(*shape, dtype=dtype, channels_last=channels_last, mean=mean)
    dy = random(*shape, dtype=dy_dtype or dtype, channels_last=channels_last)
    residual = random(*shape, dtype=dtype, channels_last=channels_last) if with_residual else None
    weight, bias = (None if r is None else random(r, shape[1], dtype=weight_dtype or dtype) for r in rows)
    running = [None if running_dtype is None else random(shape[1], dtype=running_dtype) for _ in range(2)]
    ours, stats = run(place, x, dy, weight, bias, residual, running, activation=activation, want=want)
    exact, theirs = (torch_way(x, dy, weight, bias, residual, running, 1e-5, activation, kind) for kind in (torch.float64, dtype))
    compare(ours, theirs, exact, ("y", "dx", "dweight", "dbias", "dresidual", "running_mean", "running_var"), limit)
    values = x.double().transpose(0, 1).flatten(1)
    assert error(stats[0].double() + stats[1].double() - mean, values.mean(1) - mean) < 1e-6 and error(stats[3], values.var(1)) < 1e-6


@pytest.mark.parametrize("place", PLACES)
def test_place(place):
    check(PLACES[place])


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_activation(activation):
    """The others: `triton_cases.py`, every kernel calls the same functions."""
    check(PLACES["held"], activation=activation, with_residual=activation == "relu", running_dtype=None)


@pytest.mark.parametrize("place", ["held", "samples", "split channels last"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtype(place, dtype):
    check(PLACES[place], dtype)


@pytest.mark.parametrize("place", ["held", "samples", "split"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtype_of_parameters_and_running_statistics(place, dtype):
    check(PLACES[place], torch.float64 if place == "split" else torch.float16, dy_dtype=torch.float32, weight_dtype=dtype, running_dtype=dtype)


def test_running_statistics_in_float64():
    """They are not rounded to the dtype in which x is summed."""
    torch.manual_seed(0)
    shape, _, config = PLACES["held"]
    x, running = random(*shape, dtype=torch.float32), [random(shape[1], dtype=torch.float64) for _ in range(2)]
    stats, ours = torch.empty(4, 1, shape[1]), [t.clone() for t in running]
    batch_norm.forward(config, None, stats, *ours, x, None, None, None, *shape[:2], False, MOMENTUM, 1e-5, 0, 0.0)
    for mine, before, value in zip(ours, running, (stats[0].double() + stats[1].double(), stats[3].double()), strict=True):
        assert error(mine, before + MOMENTUM * (value[0] - before)) < 1e-15


@pytest.mark.parametrize("place", ["held", "samples", "split"])
@pytest.mark.parametrize("rows", [(None, None), (1, None), (None, 1)], ids=str)
def test_affine(place, rows):
    check(PLACES[place], rows=rows, with_residual=False)


@pytest.mark.parametrize("rows", [("N", "N"), ("N", 1), (None, "N")], ids=str)
@pytest.mark.parametrize("place", ["held", "split channels last"])
def test_conditional(place, rows):
    """Another weight or bias for each sample."""
    shape, channels_last, _ = PLACES[place]
    check((shape, channels_last, None), rows=[shape[0] if r == "N" else r for r in rows])


@pytest.mark.parametrize("place", ["held", "samples", "split"])
@pytest.mark.parametrize("want", [(True, False, False, True), (False, True, True, False), (False, False, True, True)], ids=str)
def test_wanted(place, want):
    check(PLACES[place], want=want)


@pytest.mark.parametrize("place", ["held", "samples", "split", "split channels last"])
def test_statistics_alone(place):
    shape, channels_last, config = PLACES[place]
    C = shape[1]
    x = random(*shape, dtype=torch.float32, channels_last=channels_last)
    (stats, mean, var), alone = ([guarded(torch.empty(4, 1, C)), torch.zeros(C), torch.ones(C)] for _ in range(2))
    for y, into in ((torch.empty_like(x), (stats, mean, var)), (None, alone)):
        batch_norm.forward(config, y, *into, x, None, None, None, *shape[:2], channels_last, MOMENTUM, 1e-5, 0, 0.0)
    check_guards()
    assert torch.equal(alone[0], stats) and torch.equal(alone[1], mean) and torch.equal(alone[2], var)


@pytest.mark.parametrize("place", PLACES)
def test_far_from_zero(place):
    """mean / std = 1e4: still at rounding level, where torch loses three digits."""
    check(PLACES[place], activation="none", with_residual=False, running_dtype=None, mean=1e4, limit=1e-6)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("value", [0.1, 6e37])
def test_constant_channels(place, value):
    """A constant channel gives its bias, bit for bit, and finite gradients."""
    shape, channels_last, _ = PLACES[place]
    x = random(*shape, dtype=torch.float32, channels_last=channels_last).fill_(value)
    weight, bias = random(1, shape[1], dtype=torch.float32), random(1, shape[1], dtype=torch.float32)
    ours, stats = run(PLACES[place], x, x / value, weight, bias, None, (None, None), activation="none")
    assert torch.equal(ours[0], bias.view(1, -1, *[1] * (x.dim() - 2)).expand_as(x))
    assert torch.equal(stats[0], torch.full_like(stats[0], x.flatten()[0])) and not stats[3].any()
    assert all(t.isfinite().all() for t in ours[1:4])


@pytest.mark.parametrize("place", PLACES)
def test_huge(place):
    """1e30: the sum of squares overflows fp32, nothing else does. A channel of NaN and one of infinity do not touch the others."""
    shape, channels_last, _ = PLACES[place]
    torch.manual_seed(0)
    x = random(*shape, dtype=torch.float64, channels_last=channels_last).mul(1e30).float()
    dy = random(*shape, dtype=torch.float32, channels_last=channels_last)
    weight, bias = random(1, shape[1], dtype=torch.float32), random(1, shape[1], dtype=torch.float32)
    ours, _ = run(PLACES[place], x, dy, weight, bias, None, (None, None))
    exact = torch_way(x, dy, weight, bias, None, (None, None), 1e-5, "silu", torch.float64)
    compare(ours[:4], exact[:4], exact[:4], ("y", "dx", "dweight", "dbias"))
    if place in APART:
        x[0, 0].flatten()[-1:].fill_(float("nan"))
        x[-1, 2].flatten()[:1].fill_(float("inf"))
        spoilt, _ = run(PLACES[place], x, dy, weight, bias, None, (None, None))
        others = [c for c in range(shape[1]) if c not in (0, 2)]
        for mine, before in zip(spoilt[:4], ours[:4], strict=True):
            assert torch.equal(mine[:, others], before[:, others])
        assert spoilt[0][:, [0, 2]].isnan().all() and spoilt[2][:, [0, 2]].isnan().all()


@pytest.mark.parametrize("place", ["held", "samples", "split"])
def test_variance_that_just_fits(place):
    """The sum of squares overflows fp32, the variance does not."""
    shape, channels_last, config = PLACES[place]
    torch.manual_seed(0)
    x, stats = random(*shape, dtype=torch.float64).mul(8e18).float(), torch.empty(4, 1, shape[1])
    batch_norm.forward(config, None, stats, None, None, x, None, None, None, *shape[:2], channels_last, MOMENTUM, 1e-5, 0, 0.0)
    values = x.double().transpose(0, 1).flatten(1)
    assert values.square().sum(1).min() > torch.finfo(torch.float32).max and error(stats[3], values.var(1)) < 1e-6


def test_sums_are_the_same_however_they_are_split():
    """Configurations of the same call agree to rounding; run twice, one agrees with itself bit for bit."""
    shape = PLACES["samples"][0]
    torch.manual_seed(0)
    x, dy = random(*shape, dtype=torch.float32), random(*shape, dtype=torch.float32)
    configs = (samples(1, 2, 4, 64), samples(1, 2, 4, 64), held(1, 8, 2, 64), split(1, 1, 8, 32))
    once, *others = [run((shape, False, config), x, dy, None, None, None, (None, None))[0][:2] for config in configs]
    assert all(map(torch.equal, once, others[0]))
    assert all(error(other, mine.double()) <= 2**-21 for result in others for other, mine in zip(result, once, strict=True))


@pytest.mark.parametrize("N, T", [(5, 130), (700, 1), (3, 515)])
def test_many_partials(N, T):
    """More than 512 chunks a channel are brought together in steps; the last chunk of each sample is shorter."""
    torch.manual_seed(0)
    C, CHUNK, short = 3, 4, 3
    x = random(N, T, C, CHUNK, dtype=torch.float64, mean=1e4)
    x[:, -1, :, short:] = float("nan")
    mean = x.nanmean(3)
    root_M2 = (x - mean[..., None]).square().nansum(3).sqrt()
    partials = torch.stack([mean.float(), mean - mean.float(), root_M2]).float()
    stats = guarded(torch.empty(4, 1, C))
    group_norm.fold_moments(partials, stats, 1, (T - 1) * CHUNK + short, CHUNK, 1e-5)
    check_guards()
    values = x.movedim(2, 0).flatten(1)
    mean, n = values.nanmean(1), N * ((T - 1) * CHUNK + short)
    M2 = (values - mean[:, None]).square().nansum(1)
    assert error(stats[0].double() + stats[1].double() - 1e4, mean - 1e4) < 1e-5
    assert error(stats[2], (M2 / n + 1e-5).rsqrt()) < 1e-6 and error(stats[3], M2 / (n - 1)) < 1e-6


CHOSEN = [
    ((5, 1), True), ((40, 5), True), ((3, 20, 7, 7), False), ((2, 3, 14, 14), False), ((1, 2, 17, 17), False),
    ((150, 2, 11, 11), False), ((90, 3, 7, 7), True), ((2, 1, 9, 1000), False),
]  # fmt: skip


@pytest.mark.parametrize("shape, channels_last", CHOSEN, ids=str)
def test_chosen(shape, channels_last):
    """Through the public pair, with the configuration that it chooses."""
    check((shape, channels_last, None), with_residual=False)


def test_single_value():
    """One value a channel: the biased variance is 0, and the unbiased one is said to be."""
    x, y, stats = random(1, 5, dtype=torch.float32), torch.empty(1, 5), torch.empty(4, 1, 5)
    running = torch.zeros(5), torch.ones(5)
    batch_norm.batch_norm_fwd(y, stats, *running, x, None, x, None, 1, 5, True, 0.5, 1e-5, 0, 0.0)
    assert torch.equal(y, x) and torch.equal(stats[0], x) and not stats[3].any()
    assert torch.equal(running[0], x[0] / 2) and torch.equal(running[1], torch.full((5,), 0.5))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_every_choice_is_consistent(channels_last, backward):
    """A held channel is all in its tile, vectors divide lengths, and nothing exceeds what a program may hold."""
    regimes = set()
    for N in (1, 5, 32, 256, 4096, 1 << 20):
        for C in (1, 3, 24, 64, 2048):
            for S in (1, 4, 49, 196, 289, 3136, 65535):
                for itemsize in (2, 4, 8):
                    c = choose_batch(N, C, S, itemsize, channels_last, backward)
                    regimes.add(c.regime)
                    rows, positions = (N * S, 1) if channels_last else (N, S)
                    assert all(v & (v - 1) == 0 and v > 0 for v in (c.V, c.ROWS, c.OUTER, c.BLOCK_C, c.BLOCK_S, c.num_warps))
                    assert c.num_warps <= 16 and c.ROWS * c.OUTER * c.BLOCK_C * c.BLOCK_S * itemsize <= 65536
                    assert c.SIDE or (C if channels_last else S) % c.V == 0
                    assert not c.FOLD or c.regime == "split"
                    if c.regime != "split":
                        assert c.BLOCK_S >= positions and not c.SIDE and c.ROWS * C * positions < 1 << 31
                        assert c.ROWS >= rows or c.regime == "samples"
                    assert not (c.regime == "held" and c.LARGE)
    assert regimes == ({"held", "split"} if channels_last else {"held", "samples", "split"})
