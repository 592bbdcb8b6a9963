"""The oracle first: ``normops.reference`` against torch.nn.functional in float64, and its derivatives against autograd."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import ACTIVATIONS, COMPOSED

from normops import reference

F64 = torch.float64
OPTIONS = {  # what is given beside x
    "plain": ("weight", "bias"),
    "no_weight": ("bias",),
    "no_bias": ("weight",),
    "no_affine": (),
    "residual": ("weight", "bias", "residual"),
    "per_sample": ("weight", "bias"),
}


def draw(*shape):
    return torch.randn(shape, dtype=F64)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_names_are_torchs():
    assert list(reference.ACTIVATIONS) == list(ACTIVATIONS)
    assert list(reference.CODES.values()) == list(range(9)), "the codes are what the compiled kernels know"


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_and_derivatives(activation):
    """act, act' and act'' of every activation: against torch, autograd of torch, and autograd of act'."""
    t = torch.cat((torch.linspace(-9, 9, 1601, dtype=F64), torch.tensor([-40.0, -20.0, 20.0, 40.0], dtype=F64)))
    t = t[(t.abs() > 1e-9) & ((t.abs() - 3).abs() > 1e-9)].requires_grad_()  # but at the kinks
    act, first, second = reference.ACTIVATIONS[activation](t, 0.2)
    theirs = ACTIVATIONS[activation](t, 0.2)
    close(act, theirs)
    (slope,) = torch.autograd.grad(theirs.sum(), t, create_graph=True)
    close(first, slope)
    if slope.requires_grad:
        close(second, torch.autograd.grad(slope.sum(), t)[0])
    else:
        close(second, torch.zeros_like(t))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_at_the_kinks(activation):
    """At 0 and +-3, where relu, leaky_relu and hardswish have no derivative, act' is what torch's backward says."""
    t = torch.tensor([-3.0, -0.0, 0.0, 3.0], dtype=F64, requires_grad=True)
    theirs = ACTIVATIONS[activation](t, 0.2)
    act, first, _ = reference.ACTIVATIONS[activation](t.detach(), 0.2)
    close(act, theirs.detach())
    close(first, torch.autograd.grad(theirs.sum(), t)[0])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_codes(name, activation):
    """Code k computes activation k and no other."""
    t = draw(40) * 3
    same = torch.equal(reference.BY_CODE[reference.CODES[name]](t, 0.2)[0], reference.ACTIVATIONS[activation](t, 0.2)[0])
    assert same == (name == activation)


# name -> shapes of x and of its vectors, the reference and torch's composition as functions of x
CHANNELS = [(5, 12), (3, 6, 7), (2, 6, 5, 4), (2, 6, 2, 3, 4), (2, 12, 1)]
DIFFERENTIABLE = {
    "group": (CHANNELS, 0, partial(reference.group_norm, num_groups=3), partial(COMPOSED["group_norm"], num_groups=3)),
    "batch": (CHANNELS, 0, reference.batch_norm, partial(COMPOSED["batch_norm"], running_mean=None, running_var=None, training=True)),
    **{f"{name}_last_{ndim}": ([(8, 6), (3, 8, 6), (2, 3, 8, 6)], ndim, partial(reference.row_norm, ndim=ndim, centered=name == "layer"),
                               COMPOSED[f"{name}_norm"]) for name in ("layer", "rms") for ndim in (1, 2)},
    **{f"{name}_across": (CHANNELS, 0, partial(reference.row_norm, ndim=0, centered=name == "layer"), partial(COMPOSED[f"{name}_norm"], dim=1))
       for name in ("layer", "rms")},
}  # fmt: skip


@pytest.mark.parametrize(
    "name, option", [(name, option) for name in DIFFERENTIABLE for option in OPTIONS if name in ("group", "batch") or option != "per_sample"]
)
def test_differentiable_reference(name, option):
    shapes, ndim, ours, torchs = DIFFERENTIABLE[name]
    for shape in shapes:
        vector = shape[len(shape) - ndim :] if ndim else shape[1:2]
        sizes = dict.fromkeys(("weight", "bias"), shape[:2] if option == "per_sample" else vector) | {"residual": shape}
        given = {key: draw(*sizes[key]).requires_grad_() for key in OPTIONS[option] if key != "bias" or not name.startswith("rms")}
        x, dy = (draw(*shape) * 2 + 3).requires_grad_(), draw(*shape)
        options = {"eps": 1e-3, "activation": "silu", "negative_slope": 0.2} | given
        theirs = torchs
        if name not in ("group", "batch"):
            options["weight_offset"] = 0.5
            theirs = partial(torchs, normalized_shape=vector)
        y, want = ours(x, **options), theirs(x, **options)
        close(y, want)
        leaves = [x, *given.values()]
        for mine, other in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(want, leaves, dy), strict=True):
            close(mine, other)


def test_moments():
    """Mean and ``sqrt(var + eps)`` of groups, with gradients; statistics that kernels would give."""
    x, dmean, dstd = draw(3, 6, 4, 5).requires_grad_(), draw(3, 2), draw(3, 2)
    mean, std = reference.moments(x, 2, 1e-3)
    var, average = torch.var_mean(x.reshape(3, 2, -1), 2, correction=0)
    theirs = (var + 1e-3).sqrt()
    close(mean, average)
    close(std, theirs)
    close(torch.autograd.grad((mean, std), x, (dmean, dstd))[0], torch.autograd.grad((average, theirs), x, (dmean, dstd))[0])
    high, low, rstd = reference.statistics(x, 2, 1e-3)
    close(high + low, average)
    close(rstd, 1 / theirs)


@pytest.mark.parametrize("shape", [(3, 6, 4, 5), (7, 6), (1, 6, 1)], ids=str)
def test_batch_statistics(shape):
    x = draw(*shape) * 2 + 3
    stats = reference.batch_statistics(x, 1e-3)
    assert stats.shape == (4, 1, 6)
    var, mean = torch.var_mean(x.transpose(0, 1).flatten(1), 1, correction=0)
    count = x.numel() // 6
    close(stats[0] + stats[1], mean[None])
    close(stats[2], (var + 1e-3).rsqrt()[None])
    close(stats[3], (var * count / max(1, count - 1))[None])


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.7, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_update_running(dtype, momentum):
    """F.batch_norm's, rounded once; momentum 0 and 1 are exact."""
    x = draw(4, 5, 6) * 2 + 3
    ours = draw(5).to(dtype), torch.rand(5, dtype=F64).to(dtype)
    theirs = [value.double() for value in ours]
    var, mean = torch.var_mean(x.transpose(0, 1).flatten(1), 1)
    before, addresses = [value.clone() for value in ours], [value.data_ptr() for value in ours]
    F.batch_norm(x, *theirs, training=True, momentum=momentum)
    reference.update_running(*ours, mean, var, momentum)
    for mine, exact, old, value, address in zip(ours, theirs, before, (mean, var), addresses, strict=True):
        assert mine.dtype == dtype and mine.data_ptr() == address
        unit = torch.finfo(dtype).eps / 2 if dtype == torch.float16 else torch.finfo(dtype).eps * 2
        torch.testing.assert_close(mine.double(), exact, rtol=unit * (1 + 1e-3), atol=1e-12 if dtype == F64 else 1e-7)
        if momentum in (0.0, 1.0):
            assert torch.equal(mine, value.to(torch.promote_types(dtype, torch.float32)).to(dtype) if momentum else old)


@pytest.mark.parametrize("given", [False, True], ids=["training", "eval"])
@pytest.mark.parametrize("option", ["plain", "no_weight", "no_bias", "no_affine", "per_sample"])
def test_blend(option, given):
    """The vectors that make instance norm batch-instance norm, and their gradients, by hand and by autograd."""
    N, C, eps = 3, 4, 1e-3
    x, rho = draw(N, C, 5) * 2 + draw(N, C, 1) * 3, torch.rand(C, dtype=F64)
    vectors = [draw(*((N, C) if option == "per_sample" else (C,))) if name in OPTIONS[option] else None for name in ("weight", "bias")]
    running = draw(C), torch.rand(C, dtype=F64) + 0.5
    theirs = COMPOSED["batch_instance_norm"](x, *running, rho, *vectors, training=not given, momentum=0.0, eps=eps)
    mean, std = (value.detach() for value in reference.moments(x, C, eps))
    leaves = [None if value is None else value.requires_grad_() for value in (mean, std, rho, *vectors)]
    statistics = torch.stack((running[0], (running[1] + eps).sqrt())) if given else None
    scale, shift = reference.blend(*leaves, statistics)
    close(torch.group_norm(x, C, eps=eps) * scale[..., None] + shift[..., None], theirs)
    if not given:
        var, of_batch = torch.var_mean(x.transpose(0, 1).flatten(1), 1, correction=0)
        for mine, exact in zip(reference.batch_moments(mean, std, None), (of_batch, (var + eps).sqrt()), strict=True):
            close(mine, exact)
    upstream = draw(N, C), draw(N, C)
    present = [leaf for leaf in leaves if leaf is not None]
    exact = iter(torch.autograd.grad((scale, shift), present, upstream))
    with torch.no_grad():
        found = reference.blend_gradients(*leaves, statistics, *upstream)
    for gradient, leaf in zip(found, leaves, strict=True):
        assert (gradient is None) == (leaf is None)
        if leaf is not None:
            close(gradient, next(exact))


PAIRS = {  # what a backend offers: the pair, sizes and what is particular
    "group": ("group", 2, 6, 20, 3, {}),
    "group_cl": ("group", 2, 6, 20, 3, {"channels_last": True}),
    "instance_cl": ("group", 3, 4, 7, 4, {"channels_last": True}),
    "frozen": ("group", 4, 6, 5, 6, {"frozen": 1}),
    "frozen_cl": ("group", 4, 6, 5, 3, {"frozen": 4, "channels_last": True}),
    "frozen_means": ("group", 4, 6, 5, 3, {"frozen": 1, "means": True}),
    "frozen_means_cl": ("group", 4, 6, 5, 6, {"frozen": 4, "means": True, "channels_last": True}),
    "batch": ("batch", 3, 6, 20, 6, {}),
    "batch_cl": ("batch", 3, 6, 20, 6, {"channels_last": True}),
    "batch_S1": ("batch", 7, 6, 1, 6, {"channels_last": True}),
    "batch_N1": ("batch", 1, 6, 5, 6, {}),
    "frozen_S1": ("group", 4, 6, 1, 6, {"frozen": 1, "channels_last": True}),
    "rows": ("row", 4, 9, 1, 1, {"weight_offset": 1.0}),
    "rows_added": ("row", 4, 9, 1, 1, {"added": True}),
    "rows_grouped": ("row", 4, 6, 1, 3, {}),
    "across": ("row", 4, 6, 5, 1, {"weight_offset": 0.5}),
    "rms": ("row", 4, 9, 1, 1, {"centered": False, "weight_offset": 1.0}),
    "rms_added": ("row", 4, 9, 1, 1, {"centered": False, "added": True}),
    "rms_across": ("row", 4, 6, 5, 1, {"centered": False}),
}


def x_hat(x, family, groups, eps, given, centered):
    """By torch, of (N, C, S); and mean and 1/std of each row."""
    grouped = x.unflatten(1, (groups, -1))
    if given is not None:
        mean, _, rstd = (value[..., None, None] for value in given)
        return ((grouped - mean) * rstd).flatten(1, 2), None
    if family == "batch":
        rows = x.transpose(0, 1).flatten(1)
        stats = rows.mean(1), (rows.var(1, correction=0) + eps).rsqrt()
        return F.layer_norm(rows, rows.shape[1:], eps=eps).unflatten(1, (len(x), -1)).transpose(0, 1), stats
    rows = grouped.flatten(2) if family == "group" else grouped.movedim(2, -1)
    norm = F.layer_norm if centered else F.rms_norm
    normalized = norm(rows, rows.shape[-1:], eps=eps)
    mean = rows.mean(-1) if centered else torch.zeros_like(rows[..., 0])
    stats = mean, ((rows - mean[..., None]).square().mean(-1) + eps).rsqrt()
    return (normalized if family == "group" else normalized.movedim(-1, 2)).reshape(x.shape), stats


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", PAIRS)
def test_pair(name, option, activation):
    """The functions that a backend offers, on memory whose shape they are not told: results, statistics and every gradient, each alone too."""
    family, N, C, S, G, how = PAIRS[name]
    how = {"channels_last": False, "frozen": 0, "means": False, "added": False, "centered": True, "weight_offset": 0.0} | how
    eps, slope, code = 1e-3, 0.2, reference.CODES[activation]
    forward, backward = (getattr(reference, f"{family}_norm_{way}") for way in ("fwd", "bwd"))
    sharing = N if option == "per_sample" else 2 if family == "row" and option == "plain" else 1  # how many rows of vectors
    present = OPTIONS[option]

    def seen(memory):
        """As (N, C, S)."""
        return memory.view(N, S, C).mT if how["channels_last"] else memory.view(N, C, S)

    def over(vectors):
        return vectors.view(-1, C, 1).repeat_interleave(N * C // vectors.numel(), 0)

    x, dy, dtotal, addend, residual = draw(5, N * C * S)
    x, dtotal, addend = x * 2 + 3, dtotal if how["added"] else None, addend if how["added"] else None
    leaves = {"x": x, "weight": draw(sharing * C), "bias": draw(N * C if sharing == 2 else sharing * C), "residual": residual}
    leaves = {key: value.requires_grad_() if key in ("x", *present) else None for key, value in leaves.items()}
    given = torch.rand(3, how["frozen"], G, dtype=F64) if how["frozen"] else None
    if given is not None:
        given[1] = 0

    total = leaves["x"] if addend is None else leaves["x"] + addend
    t, statistics = x_hat(seen(total), family, G, eps, given, how["centered"])
    t = t if leaves["weight"] is None else t * (over(leaves["weight"]) + how["weight_offset"])
    t = t if leaves["bias"] is None else t + over(leaves["bias"])
    t = t if leaves["residual"] is None else t + seen(leaves["residual"])
    want = ACTIVATIONS[activation](t, slope)
    present = [leaf for leaf in leaves.values() if leaf is not None]
    outputs, cotangents = ([want, total], [seen(dy), dtotal]) if how["added"] else ([want], [seen(dy)])
    gradients = dict(zip((id(leaf) for leaf in present), torch.autograd.grad(outputs, present, cotangents), strict=True))
    means = draw(2, how["frozen"], G) if how["means"] else None
    if means is not None:  # what statistics that depend on x take from dx
        first, second, rstd = torch.stack((*means, given[2])).repeat_interleave(C // G, 2)[..., None]
        with torch.no_grad():
            seen(gradients[id(leaves["x"])]).sub_(rstd * (second + x_hat(seen(x), family, G, eps, given, True)[0] * first))

    plain = {key: None if value is None else value.detach() for key, value in leaves.items()}
    vectors = plain["weight"], plain["bias"], plain["residual"]
    y, stored = torch.full_like(dy, torch.nan), torch.full_like(dy, torch.nan) if how["added"] else None
    stats = given
    if stats is None:
        stats = torch.full((3 if how["centered"] else 1, statistics[0].numel()), torch.nan, dtype=F64)
    if family == "batch":
        sizes, stats, running = (N, C, how["channels_last"]), torch.full((4, 1, C), torch.nan, dtype=F64), (draw(C), draw(C))
        theirs = [value.clone() for value in running]
        forward(y, stats, *running, plain["x"], *vectors, *sizes, 0.3, eps, code, slope)
        F.batch_norm(seen(plain["x"]), *theirs, training=True, momentum=0.3)
        for mine, other in zip((*running, stats[3, 0]), (*theirs, seen(plain["x"]).transpose(0, 1).flatten(1).var(1)), strict=True):
            close(mine, other)
        bare = torch.full_like(stats, torch.nan)
        forward(None, bare, None, None, plain["x"], None, None, None, *sizes, 0.3, eps, 0, slope)
        assert torch.equal(bare, stats), "without y and running statistics"
        stats = stats[:3].flatten(1)
        back = dy, plain["x"], stats, *vectors, *sizes, code, slope
    elif family == "group":
        sizes = N, C, G, how["channels_last"], bool(how["frozen"])
        forward(y, stats, plain["x"], *vectors, *sizes, eps, code, slope)
        back = dy, plain["x"], stats, *vectors, means, *sizes, code, slope
    else:
        sizes = N, C, G, how["centered"], how["weight_offset"]
        forward(y, stored, stats, plain["x"], addend, *vectors, *sizes, eps, code, slope)
        back = dy, dtotal, plain["x"] if stored is None else stored, stats, *vectors, *sizes, code, slope
    close(seen(y), want.detach())
    if stored is not None:
        assert torch.equal(stored, total.detach())
    if given is None:
        close(stats[-1], statistics[1].detach().flatten())
        if how["centered"]:
            close(stats[0] + stats[1], statistics[0].detach().flatten())
    outs = [None if leaf is None else torch.full_like(leaf, torch.nan).detach() for leaf in leaves.values()]
    backward(*outs, *back)
    for i, (out, leaf) in enumerate(zip(outs, leaves.values(), strict=True)):
        if out is not None:
            close(out, gradients[id(leaf)])
            alone = [torch.full_like(out, torch.nan) if i == j else None for j in range(4)]
            backward(*alone, *back)
            assert torch.equal(alone[i], out), "what is not wanted changes nothing"


@pytest.mark.parametrize("norm", ["group", "batch", "layer", "rms"])
def test_far_from_zero_and_huge(norm):
    """What makes it an oracle for float32 too: two-number means, and squares that do not overflow."""
    x = draw(2, 4, 50)
    call = partial(reference.group_norm, num_groups=4, eps=0) if norm == "group" else partial(reference.row_norm, centered=norm == "layer", eps=0)
    if norm == "batch":

        def call(x):
            return reference.batch_norm(x.view(8, 50).mT, eps=0).mT.view(x.shape)

    for scale, offset in ((1.0, 1e4), (1e30, 0.0), (1e-10, 0.0), (1e30, 1e32)):
        x32 = (x * scale + offset).float()
        wide = x32.double() / scale
        wide = wide if norm == "rms" else wide - wide.mean(-1, keepdim=True)
        want = F.rms_norm(wide, (50,), eps=0)
        error = (call(x32).double() - want).abs().max().item()
        assert error < 2e-6, f"x = {scale}*randn + {offset}: error {error}"
