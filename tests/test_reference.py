"""The oracle first: ``normops.reference`` against torch.nn.functional in float64, and its derivatives against autograd."""

import pytest
import torch
from cases import ACTIVATIONS, channels_last, composed

from normops import reference

F64 = torch.float64
SHAPES = {"rank2": (5, 12), "rank3": (3, 6, 7), "rank4": (2, 6, 5, 4), "rank5": (2, 6, 2, 3, 4), "S1": (2, 12, 1)}
OPTIONS = {
    "plain": (),
    "no_weight": ("weight",),
    "no_bias": ("bias",),
    "no_affine": ("weight", "bias"),
    "residual": (),
    "per_sample": (),
}


def draw(*shape):
    return torch.randn(shape, dtype=F64)


def inputs(shape, option):
    samples, channels = shape[:2]
    vector = (samples, channels) if option == "per_sample" else (channels,)
    found = {"x": draw(*shape) * 2 + 3, "weight": draw(*vector), "bias": draw(*vector), "residual": draw(*shape)}
    absent = OPTIONS[option] + (() if option == "residual" else ("residual",))
    return {name: None if name in absent else value for name, value in found.items()}


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
    same = torch.equal(reference._BY_CODE[reference.CODES[name]](t, 0.2)[0], reference.ACTIVATIONS[activation](t, 0.2)[0])
    assert same == (name == activation)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_differentiable_reference(shape, option):
    case = inputs(shape, option)
    leaves = {name: None if value is None else value.requires_grad_() for name, value in case.items()}
    x, weight, bias, residual = leaves.values()
    groups, dy = 3, draw(*shape)
    given = [leaf for leaf in leaves.values() if leaf is not None]
    y = reference.group_norm(x, groups, weight, bias, 1e-3, "silu", residual=residual)
    theirs = composed(x, groups, weight, bias, 1e-3, activation="silu", residual=residual)
    close(y, theirs)
    for got, want in zip(torch.autograd.grad(y, given, dy), torch.autograd.grad(theirs, given, dy), strict=True):
        close(got, want)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", [torch.clone, channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("option", OPTIONS)
def test_out_variants(option, layout, activation):
    """The pair of functions that a backend offers."""
    shape, groups, eps, slope = (2, 6, 5, 4), 3, 1e-3, 0.2
    case = inputs(shape, option)
    x, weight, bias, residual = case.values()
    x = layout(x)
    residual = None if residual is None else layout(residual)
    dy = layout(draw(*shape))
    y, stats = torch.full_like(x, torch.nan), torch.full((3, 2, groups), torch.nan, dtype=F64)
    code, last = reference.CODES[activation], layout is channels_last
    reference.group_norm_fwd(y, stats, x, weight, bias, residual, groups, last, eps, code, slope)
    again = torch.full_like(x, torch.nan)
    reference.group_norm_fwd(again, None, x, weight, bias, residual, groups, last, eps, code, slope)
    assert torch.equal(y, again), "without statistics"

    leaves = [None if value is None else value.clone().requires_grad_() for value in (x, weight, bias, residual)]
    theirs = composed(leaves[0], groups, *leaves[1:3], eps, activation=activation, negative_slope=slope, residual=leaves[3])
    close(y, theirs.detach())
    flat = x.reshape(2, groups, -1)
    close(stats[0] + stats[1], flat.mean(2))
    close(stats[2], (flat.var(2, unbiased=False) + eps).rsqrt())

    given = [leaf for leaf in leaves if leaf is not None]
    wanted = iter(torch.autograd.grad(theirs, given, dy))
    want = [None if leaf is None else next(wanted) for leaf in leaves]
    outs = [None if leaf is None else torch.full_like(leaf, torch.nan).detach() for leaf in leaves]
    args = dy, x, stats, weight, bias, residual, groups, last, code, slope
    reference.group_norm_bwd(*outs, *args)
    for got, expected in zip(outs, want, strict=True):
        if got is not None:
            close(got, expected)
    for i, out in enumerate(outs):  # each alone: what is not wanted changes nothing
        if out is not None:
            alone = [torch.full_like(out, torch.nan) if i == j else None for j in range(4)]
            reference.group_norm_bwd(*alone, *args)
            assert torch.equal(alone[i], out)


def test_far_from_zero_and_huge():
    """What makes it an oracle for float32 too: two-number means, and squares that do not overflow."""
    x = draw(2, 4, 50)
    for scale, offset in ((1.0, 1e4), (1e30, 0.0), (1e-10, 0.0), (1e30, 1e32)):
        x32 = (x * scale + offset).float()
        want = torch.group_norm((x32.double() - offset) / scale, 2, eps=0)
        error = (reference.group_norm(x32, 2, eps=0).double() - want).abs().max().item()
        assert error < 2e-6, f"x = {scale}*randn + {offset}: error {error}"
