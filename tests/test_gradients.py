"""Derivatives of every order, of every norm: gradcheck and gradgradcheck in float64, third order, double backward at lower precision."""

import math
from functools import partial

import pytest
import torch
from cases import ACTIVATIONS, ADAPTIVE, FLOOR, Inputs, case_of, grid, roundoff
from cases import KINDS as EVERY_KIND
from torch.autograd import grad, gradcheck, gradgradcheck

F64 = torch.float64
SAME = ("batch_norm_nc", "batch_norm_conditional", "batch_renorm_cl", "batch_instance_norm_cl")  # whose derivatives are computed as others'
KINDS = {kind: fields for kind, fields in EVERY_KIND.items() if kind not in SAME}
ALL = KINDS | ADAPTIVE
OPTIONS = {  # what is given beside x
    "plain": {},
    "residual": {"residual": True},
    "modulation": {"scale": True, "shift": True},
    "no_weight": {"weight": None},
    "no_bias": {"bias": None},
    "no_affine": {"weight": None, "bias": None},
    "offset": {"weight_offset": 0.5},
    "per_sample_residual": {"weight": "NC", "bias": "NC", "residual": True},
}


def takes(kind: str, option: str) -> bool:
    """Whether the option makes another call of this kind."""
    if "conditional" in kind:
        return option in ("plain", "residual", "modulation")
    rows = "layer" in kind or "rms" in kind
    if kind in ADAPTIVE:
        return option in ("plain", "residual")
    if option == "residual" and "add" in kind or "bias" in option and "rms" in kind:
        return False
    return option != ("per_sample_residual" if rows else "offset")


def every(kinds=ALL, options=OPTIONS):
    return pytest.mark.parametrize("kind, option", [(kind, option) for kind in kinds for option in options if takes(kind, option)])


def make(kind, option="plain", shape=(2, 4, 3), groups=2, device="cpu", dtype=F64, mean=0.0, eps=1e-3, **fields):
    """The call's inputs, all of which require grad."""
    inputs = Inputs.of(case_of(kind, option, shape, groups, dtype=dtype, mean=mean, std=1.0, eps=eps, **OPTIONS[option], **fields), device)
    for value in inputs.tensors.values():
        value.requires_grad_()
    return inputs, tuple(inputs.tensors.values())


def function(inputs, call=None):
    """The results as a function of the tensors, in order."""

    def f(*values):
        found = inputs.call(call, **dict(zip(inputs.tensors, values, strict=True)))
        return found if isinstance(found, tuple) else (found,)

    return f


def both(inputs):
    """normops, and torch's composition."""
    return function(inputs), function(inputs, inputs.composition())


def check_twice(inputs, values):
    if "renorm" in inputs.case.norm and not inputs.case.frozen:  # far beyond its bounds r and d do not depend on x, as the gradient has it
        mean, std = inputs.running
        far = torch.tensor([9.0, -9.0], dtype=F64, device=mean.device).repeat(len(mean))[: len(mean)]
        std = std * far.exp()
        inputs.running = mean + far * std, std
    assert gradcheck(function(inputs), values)
    assert gradgradcheck(function(inputs), values)


@every()
def test_gradcheck(kind, option, backend, device, poison):
    for activation in ("none", "silu") if option in ("plain", "residual") else ("silu",):
        check_twice(*make(kind, option, device=device, activation=activation))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["group_norm", "group_norm_cl", "batch_norm_cl", "layer_norm", "rms_norm_cf", "frozen_cl"])
def test_gradcheck_activations(kind, activation, backend, device, poison):
    check_twice(*make(kind, "residual", device=device, activation=activation))


@grid(ALL, rank2=(3, 6), rank4=(2, 4, 2, 2), rank5=(1, 2, 2, 1, 3), S1=(2, 3, 1))
def test_gradcheck_shapes(kind, shape, backend, device, poison):
    groups = shape[1] if shape[1] < 4 else 2  # (2, 3, 1): groups of one element
    check_twice(*make(kind, "residual", shape, groups, device, activation="silu", eps=0.1))


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_gradcheck_adaptive_layer_norm(kind, backend, device, poison):
    """Vectors per sample over two dimensions, each for several rows, and one of them missing."""
    for fields in ({"scale": True}, {"shift": True}, {"scale": True, "shift": True, "weight": None, "bias": None}):
        check_twice(*make(kind, shape=(2, 6, 3), groups=3, device=device, weight_offset=1.0, activation="gelu", **fields))


def layer_norm(x, normalized_shape, weight, bias, eps):
    """By group_norm: the third derivatives of F.layer_norm are wrong, as of torch 2.13."""
    t = torch.group_norm(x.reshape(-1, 1, math.prod(normalized_shape)), 1, eps=eps).reshape(x.shape)
    t = t if weight is None else t * weight
    return t if bias is None else t + bias


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("kind", ALL)
def test_third_order(kind, activation, backend, device):
    """Gradients of gradients of gradients are torch's."""
    inputs, values = make(kind, "residual" if kind in ADAPTIVE else "modulation", device=device, activation=activation)
    seeds = [torch.randn_like(value) for value in values]
    found = []
    theirs = partial(inputs.composition(), norm=layer_norm) if "layer" in kind else inputs.composition()
    for f in (function(inputs), function(inputs, theirs)):
        out = sum(result.sin().sum() for result in f(*values))
        orders = []
        for _ in range(3):
            gradients = grad(out, values, create_graph=True)
            orders.append(gradients)
            out = sum((gradient * seed).sum() for gradient, seed in zip(gradients, seeds, strict=True)).sin()
        found.append(orders)
    for order, (got, want) in enumerate(zip(*found, strict=True)):
        for mine, theirs, name in zip(got, want, inputs.tensors, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9, msg=lambda text, o=order, n=name: f"order {o + 1}, {n}: {text}")


def penalty(inputs, seeds, call=None):
    """The double backward of a random direction in every first gradient; `seeds`: those of the results and the directions."""
    leaves = [value.detach().requires_grad_() for value in inputs.tensors.values()]
    results = function(inputs, call)(*leaves)
    dys = [seed.to(result.dtype).requires_grad_() for seed, result in zip(seeds, results, strict=False)]
    first = grad(results, leaves, dys, create_graph=True)
    return grad(first, [*leaves, *dys], [seed.to(leaf.dtype) for seed, leaf in zip(seeds[len(dys) :], leaves, strict=True)], allow_unused=True)


def penalties(inputs):
    """By name, what `penalty` gives by normops, and by torch in float64 and in float32."""
    values = list(inputs.tensors.values())
    results = 1 if inputs.dtotal is None else 2
    seeds = [torch.randn_like(value) for value in (*values[:1] * results, *values)]
    call = inputs.composition()
    found = penalty(inputs, seeds), penalty(inputs.to(F64), seeds, call), penalty(inputs.to(torch.float32), seeds, call)
    return zip((*inputs.tensors, "dy", "dtotal")[: len(values) + results], *found, strict=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("activation", ["none", "silu"])
@every(options=("plain", "residual", "modulation", "no_affine"))
def test_double_backward_precision(kind, option, activation, dtype, backend, device, poison):
    """Against float64 torch on the same rounded inputs: at most twice what torch loses in float32, and one rounding of the output dtype."""
    errors, losses, sizes = {}, {}, {}
    for _ in range(3):  # errors in the 2-norm and over several draws: a maximum over a few sums is a matter of luck
        inputs, _ = make(kind, option, (3, 12, 5, 5), device=device, dtype=dtype, activation=activation)
        for name, mine, exact, other in penalties(inputs):
            if exact is None or mine is None:  # no dependence: torch says None or zeros, by version
                assert (exact is None or not exact.any()) and (mine is None or not mine.any())
                continue
            assert mine.dtype == dtype and mine.shape == exact.shape
            for sums, value in ((errors, mine.double() - exact), (losses, other.to(dtype).double() - exact), (sizes, exact)):
                sums[name] = sums.get(name, 0.0) + value.square().sum().item()
    for name in errors:
        error, loss, size = (found[name] ** 0.5 for found in (errors, losses, sizes))
        assert error <= 2 * loss + FLOOR * roundoff(dtype) * size, f"{name}: {error} against {loss}, size {size}"


@pytest.mark.parametrize("kind", ALL)
def test_double_backward_far_from_zero(kind, backend, device):
    """The double backward subtracts the same two-number mean."""
    inputs, _ = make(kind, "plain", (2, 4, 9, 9), device=device, dtype=torch.float32, mean=1e3, activation="silu")
    for name, mine, exact, _ in penalties(inputs):
        assert (mine.double() - exact).abs().max() <= 3e-6 * exact.abs().max(), name


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("activation", ["none", "silu", "relu"])
def test_gradient_penalty(activation, kind, backend, device):
    """WGAN-GP: the loss is the norm of the input's gradient."""
    found = []
    inputs, values = make(kind, "plain", (3, 8, 4, 4), device=device, activation=activation)
    for f in both(inputs):
        (dx,) = grad(sum(result.square().sum() for result in f(*values)), values[0], create_graph=True)
        loss = (dx.flatten(1).norm(dim=1) - 1).square().mean()
        found.append(grad(loss, values, allow_unused=True))
    for mine, theirs in zip(*found, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@every(options=("residual", "modulation", "per_sample_residual"))
def test_double_backward_of_some(kind, option, backend, device):
    """Any subset of the first gradients may be used, and any subset of the inputs differentiated: None upstream is zero."""
    inputs, values = make(kind, option, device=device, activation="silu")
    for used in range(len(values)):
        for wanted in range(len(values)):
            found = []
            for f in both(inputs):
                leaves = [value.detach().requires_grad_(i in (used, wanted)) for i, value in enumerate(values)]
                (first,) = grad(sum(result.sin().sum() for result in f(*leaves)), leaves[used], create_graph=True)
                found.append(grad(first.square().sum(), leaves[wanted], allow_unused=True, materialize_grads=True)[0])
            torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9, msg=lambda text, u=used, w=wanted: f"d({u}) d({w}): {text}")


@pytest.mark.parametrize("used", [0, 1], ids=["y", "sum"])
@pytest.mark.parametrize("kind", ["add_layer_norm", "add_rms_norm"])
def test_one_of_two_results(kind, used, backend, device):
    """Only y, or only the sum, has a gradient, first and second; input's and residual's are the same tensor's values, each its own to change."""
    inputs, values = make(kind, device=device, activation="silu")
    found = []
    for f in both(inputs):
        first = grad(f(*values)[used].sin().sum(), values, create_graph=True, allow_unused=True, materialize_grads=True)
        second = grad(sum(gradient.square().sum() for gradient in first), values, allow_unused=True, materialize_grads=True)
        found.append((*first, *second))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    of_x, of_residual = (found[0][list(inputs.tensors).index(name)].detach() for name in ("x", "residual"))
    assert torch.equal(of_x, of_residual)
    sum(result.sum() for result in function(inputs)(*values)).backward()
    x, residual = inputs.tensors["x"], inputs.tensors["residual"]
    kept = residual.grad.clone()
    x.grad.fill_(0.0)
    assert torch.equal(residual.grad, kept), "accumulated gradients are two tensors"


@pytest.mark.parametrize("kind", KINDS)
def test_double_backward_of_linear_residual(kind, backend, device):
    """Without activation the residual's gradient is dy itself, and the sum's of an addition: its derivative is the identity."""
    inputs, values = make(kind, "residual", device=device)
    results = function(inputs)(*values)
    dys = [torch.randn_like(result, requires_grad=True) for result in results]
    named = dict(zip(inputs.tensors, values, strict=True))
    dx, dresidual = grad(results, (named["x"], named["residual"]), dys, create_graph=True)
    direction = torch.randn_like(dresidual)
    assert torch.equal(grad(dresidual, dys[-1], direction, retain_graph=True)[0], direction)
    assert dx.requires_grad


@pytest.mark.parametrize("kind", ALL)
def test_undefined_gradient(kind, backend, device):
    """A consumer that returns no gradient: backward has nothing to do, and does nothing."""

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            return None

    inputs, values = make(kind, device=device, dtype=torch.float32, activation="silu")
    gone = sum(Nothing.apply(result).sum() for result in function(inputs)(*values))
    for gradient in grad(gone, values, allow_unused=True):
        assert gradient is None or not gradient.any()
    gone = sum(Nothing.apply(result).sum() for result in function(inputs)(*values))
    dx, *others = grad(gone + values[0].sum(), values, allow_unused=True)
    assert torch.equal(dx, torch.ones_like(dx)) and not any(gradient is not None and gradient.any() for gradient in others)


@pytest.mark.parametrize("kind", ALL)
def test_backward_twice(kind, backend, device):
    """retain_graph: the same graph gives the same gradients again, and no gradient is a view of another."""
    inputs, values = make(kind, "residual", device=device)
    results = function(inputs)(*values)
    dys = [torch.randn_like(result) for result in results]
    one, two = grad(results, values, dys, retain_graph=True), grad(results, values, dys)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    one[0].fill_(1.0)
    assert not torch.equal(one[0], two[0])


@pytest.mark.parametrize("kind", ALL)
def test_in_place_change_is_seen(kind, backend, device):
    """x, or the sum of an addition, changed between forward and backward raises, as for every op of torch."""
    inputs, values = make(kind, device=device)
    x = values[0] * 1
    results = function(inputs)(x, *values[1:])
    (x if len(results) == 1 else results[1].detach()).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        results[0].sum().backward()


@pytest.mark.parametrize("kind", ALL)
def test_gradient_does_not_alias_dy(kind, backend, device):
    """Without activation dresidual is dy: accumulating into residual.grad must not change what the caller holds."""
    inputs, values = make(kind, "residual", device=device)
    results = function(inputs)(*values)
    dys = [torch.randn_like(result) for result in results]
    kept = [dy.clone() for dy in dys]
    residual = inputs.tensors["residual"]
    torch.autograd.backward(results, dys, retain_graph=True)
    once = residual.grad.clone()
    torch.autograd.backward(results, dys)
    assert all(torch.equal(dy, old) for dy, old in zip(dys, kept, strict=True))
    torch.testing.assert_close(residual.grad, 2 * once)
