"""Derivatives of every order: gradcheck and gradgradcheck in float64, third order, double backward at lower precision."""

import pytest
import torch
from cases import ACTIVATIONS, FLOOR, LAYOUTS, composed, roundoff
from torch.autograd import grad, gradcheck, gradgradcheck

import normops

F64 = torch.float64
LAYOUT_IDS = ["contiguous", "channels_last"]
# what is given beside x
OPTIONS = {
    "plain": ("weight", "bias"),
    "residual": ("weight", "bias", "residual"),
    "modulation": ("weight", "bias", "scale", "shift"),
    "no_weight": ("bias",),
    "no_bias": ("weight",),
    "no_affine": (),
    "per_sample_residual": ("weight_NC", "bias_NC", "residual"),
}


def make(names, shape=(2, 4, 3), layout="contiguous", dtype=F64, device="cpu", std=1.0, mean=0.0):
    """x and the tensors of these names, all of which require grad."""
    samples, channels = shape[:2]
    shapes = {"residual": shape, "weight": (channels,), "bias": (channels,)}
    found = {}
    for name in ("x", *names):
        size = shapes.get(name, (samples, channels)) if name != "x" else shape
        value = torch.randn(size, dtype=F64)
        if name == "x":
            value = value * std + mean
        if size == shape:
            value = LAYOUTS[layout](value)
        found[name.removesuffix("_NC")] = value.to(dtype).to(device).requires_grad_()
    return found


def function(names, groups=2, eps=1e-3, call=None, **options):
    """The op as a function of the tensors of these names, in order."""
    keys = ["x", *(name.removesuffix("_NC") for name in names)]

    def f(*values):
        given = dict(zip(keys, values, strict=True))
        return (call or normops.group_norm)(given.pop("x"), groups, given.pop("weight", None), given.pop("bias", None), eps, **given, **options)

    return f


@pytest.mark.parametrize("layout", LAYOUT_IDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("option", OPTIONS)
def test_gradcheck(option, activation, layout, backend, device, poison):
    names = OPTIONS[option]
    values = tuple(make(names, layout=layout, device=device).values())
    f = function(names, activation=activation, negative_slope=0.2)
    assert gradcheck(f, values)
    assert gradgradcheck(f, values)


@pytest.mark.parametrize("shape", [(3, 6), (2, 6, 2, 2), (1, 2, 2, 1, 3), (2, 3, 1)], ids=str)
def test_gradcheck_shapes(shape, backend, device, poison):
    names = OPTIONS["residual"]
    groups = shape[1] if shape[1] < 4 else 2  # (2, 3, 1): groups of one element
    values = tuple(make(names, shape, device=device).values())
    f = function(names, groups, activation="silu", eps=0.1)
    assert gradcheck(f, values)
    assert gradgradcheck(f, values)


@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_third_order(activation, backend, device):
    """Gradients of gradients of gradients are torch's."""
    names = ("weight", "bias", "residual", "scale")
    values = tuple(make(names, (2, 4, 3), device=device).values())
    seeds = [torch.randn_like(value) for value in values]
    found = []
    for call in (normops.group_norm, composed):
        out = function(names, activation=activation, call=call)(*values).sin().sum()
        orders = []
        for _ in range(3):
            gradients = grad(out, values, create_graph=True)
            orders.append(gradients)
            out = sum((gradient * seed).sum() for gradient, seed in zip(gradients, seeds, strict=True)).sin()
        found.append(orders)
    for order, (got, want) in enumerate(zip(*found, strict=True)):
        for mine, theirs, name in zip(got, want, ("x", *names), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9, msg=lambda text, o=order, n=name: f"order {o + 1}, {n}: {text}")


def penalty(call, values, names, seeds, **options):
    """The double backward of a random direction in every first gradient; `seeds`: dy and the directions."""
    leaves = [value.detach().requires_grad_() for value in values]
    dy, *directions = (seed.to(values[0].dtype) for seed in seeds)
    y = function(names, call=call, **options)(*leaves)
    first = grad(y, leaves, dy.requires_grad_(), create_graph=True)
    return grad(first, [*leaves, dy], directions, allow_unused=True)


@pytest.mark.parametrize("layout", LAYOUT_IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("activation", ["none", "silu", "gelu_tanh"])
@pytest.mark.parametrize("option", ["plain", "residual", "modulation", "no_affine"])
def test_double_backward_precision(option, activation, dtype, layout, backend, device, poison):
    """Against float64 torch on the same rounded inputs: at most twice what torch loses in float32, and one rounding of the output dtype."""
    names = OPTIONS[option]
    errors, losses, sizes = (dict.fromkeys(("x", *names, "dy"), 0.0) for _ in range(3))
    for _ in range(3):  # errors in the 2-norm and over several draws: a maximum over a few sums is a matter of luck
        values = list(make(names, (3, 12, 5, 5), layout, dtype, device).values())
        seeds = [torch.randn_like(value) for value in (values[0], *values)]
        got = penalty(normops.group_norm, values, names, seeds, activation=activation)
        want = penalty(composed, [value.double() for value in values], names, seeds, activation=activation)
        theirs = penalty(composed, [value.float() for value in values], names, seeds, activation=activation)
        for name, mine, exact, other in zip(errors, got, want, theirs, strict=True):
            if exact is None or mine is None:  # no dependence: torch says None or zeros, by version
                assert (exact is None or not exact.any()) and (mine is None or not mine.any())
                continue
            assert mine.dtype == dtype and mine.shape == exact.shape
            errors[name] += (mine.double() - exact).square().sum().item()
            losses[name] += (other.to(dtype).double() - exact).square().sum().item()
            sizes[name] += exact.square().sum().item()
    for name in errors:
        error, loss, size = (found[name] ** 0.5 for found in (errors, losses, sizes))
        assert error <= 2 * loss + FLOOR * roundoff(dtype) * size, f"{name}: {error} against {loss}, size {size}"


@pytest.mark.parametrize("layout", LAYOUT_IDS)
def test_double_backward_far_from_zero(layout, backend, device):
    """The double backward subtracts the same two-number mean."""
    names = OPTIONS["plain"]
    values = list(make(names, (2, 4, 9, 9), layout, torch.float32, device, mean=1e3).values())
    seeds = [torch.randn_like(value) for value in (values[0], *values)]
    got = penalty(normops.group_norm, values, names, seeds, activation="silu")
    want = penalty(composed, [value.double() for value in values], names, seeds, activation="silu")
    for name, mine, exact in zip(("x", *names, "dy"), got, want, strict=True):
        assert (mine.double() - exact).abs().max() <= 3e-6 * exact.abs().max(), name


@pytest.mark.parametrize("activation", ["none", "silu", "relu"])
def test_gradient_penalty(activation, backend, device):
    """WGAN-GP: the loss is the norm of the input's gradient."""
    names = OPTIONS["plain"]
    found = []
    values = tuple(make(names, (3, 8, 4, 4), device=device).values())
    for call in (normops.group_norm, composed):
        y = function(names, call=call, activation=activation)(*values)
        (dx,) = grad(y.square().sum(), values[0], create_graph=True)
        loss = (dx.flatten(1).norm(dim=1) - 1).square().mean()
        found.append(grad(loss, values, allow_unused=True))
    for mine, theirs in zip(*found, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("option", ["plain", "residual", "modulation", "per_sample_residual"])
def test_double_backward_of_some(option, backend, device):
    """Any subset of the first gradients may be used, and any subset of the inputs differentiated: None upstream is zero."""
    names = OPTIONS[option]
    values = tuple(make(names, (2, 4, 3), device=device).values())
    for used in range(len(values)):
        for wanted in range(len(values)):
            found = []
            for call in (normops.group_norm, composed):
                leaves = [value.detach().requires_grad_(i in (used, wanted)) for i, value in enumerate(values)]
                y = function(names, call=call, activation="silu")(*leaves)
                (first,) = grad(y.sin().sum(), leaves[used], create_graph=True)
                found.append(grad(first.square().sum(), leaves[wanted], allow_unused=True, materialize_grads=True)[0])
            torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9, msg=lambda text, u=used, w=wanted: f"d({u}) d({w}): {text}")


def test_double_backward_of_linear_residual(backend, device):
    """Without activation the residual's gradient is dy itself: its derivative is the identity."""
    x, residual, dy = (torch.randn(2, 4, 3, dtype=F64, device=device, requires_grad=True) for _ in range(3))
    y = normops.group_norm(x, 2, residual=residual)
    dx, dresidual = grad(y, (x, residual), dy, create_graph=True)
    direction = torch.randn_like(dy)
    assert torch.equal(grad(dresidual, dy, direction, retain_graph=True)[0], direction)
    assert dx.requires_grad


def test_undefined_gradient(backend, device):
    """A consumer that returns no gradient: backward has nothing to do, and does nothing."""

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            return None

    x = torch.randn(2, 4, 3, device=device, requires_grad=True)
    weight = torch.randn(4, device=device, requires_grad=True)
    y = normops.group_norm(x, 2, weight, activation="silu")
    dx, dweight = grad(Nothing.apply(y).sum(), (x, weight), allow_unused=True)
    for gradient in (dx, dweight):
        assert gradient is None or not gradient.any()
    y = normops.group_norm(x, 2, weight, activation="silu")
    dx, dweight = grad(Nothing.apply(y).sum() + x.sum(), (x, weight), allow_unused=True)
    assert torch.equal(dx, torch.ones_like(x)) and (dweight is None or not dweight.any())


def test_backward_twice(backend, device):
    """retain_graph: the same graph gives the same gradients again, and no gradient is a view of another."""
    values = tuple(make(OPTIONS["residual"], device=device).values())
    y = function(OPTIONS["residual"])(*values)
    dy = torch.randn_like(y)
    one, two = grad(y, values, dy, retain_graph=True), grad(y, values, dy)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    one[0].fill_(1.0)
    assert not torch.equal(one[0], two[0])


def test_in_place_change_is_seen(backend, device):
    """x changed between forward and backward raises, as for every op of torch."""
    x = torch.randn(2, 4, 3, device=device, requires_grad=True)
    z = x * 1
    y = normops.group_norm(z, 2)
    z.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_gradient_does_not_alias_dy(backend, device):
    """Without activation dresidual is dy: accumulating into residual.grad must not change what the caller holds."""
    x, residual = (torch.randn(2, 4, 3, device=device, requires_grad=True) for _ in range(2))
    dy = torch.randn(2, 4, 3, device=device)
    kept = dy.clone()
    for _ in range(2):
        normops.group_norm(x, 2, residual=residual).backward(dy)
    assert torch.equal(dy, kept)
    torch.testing.assert_close(residual.grad, 2 * kept)
