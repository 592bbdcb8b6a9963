"""The numerics contract, for every norm on every backend: far from zero, 16 bits, constants, huge values, outliers, NaN, kinks, empty tensors."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from cases import ACTIVATIONS, BATCH, HALF, KINDS, LAYOUTS, Inputs, case_of, grid, roundoff

import normops

OWN = [kind for kind, fields in KINDS.items() if not fields.get("frozen")]  # by statistics of x
CENTERED = [kind for kind in OWN if "rms" not in kind and "renorm" not in kind]
LAYOUT_IDS = ["contiguous", "channels_last"]


def quotient(got, want, size=0.0):
    return (got.to(want) - want).abs().max().item() / max(want.abs().max().item(), size)


@grid(KINDS, small=(2, 8, 6, 7), S1=(3, 32, 1, 1), long=(1, 4, 190, 190), odd=(2, 34, 16, 15), wide=(2, 770, 3, 5))
@pytest.mark.parametrize("ratio", [1e2, 1e3, 1e4])
def test_far_from_zero(kind, shape, ratio, backend, device, poison):
    """mean/std up to 1e4 in float32: y, dx and dweight at rounding level, where torch loses 3e-4 to 3e-3."""
    inputs = Inputs.of(case_of(kind, "far from zero", shape, mean=ratio, std=1.0), device)
    got, want = inputs.run(), inputs.torch(torch.float64)
    weight = inputs.tensors["weight"]
    errors = {
        "y": quotient(got.y, want.y),
        "dx": quotient(got.gradients["x"], want.gradients["x"]),
        # a sum of n terms is as large as sqrt(n) of them, unless it is smaller by chance
        "dweight": quotient(got.gradients["weight"], want.gradients["weight"], (inputs.dy.numel() / weight.numel()) ** 0.5),
    }
    assert max(errors.values()) <= 1e-6, errors
    if "bias" in got.gradients:
        theirs = inputs.torch(torch.float32)  # dbias is far from nothing: a plain sum of dy
        assert quotient(got.gradients["bias"], want.gradients["bias"]) <= max(1e-6, 2 * quotient(theirs.gradients["bias"], want.gradients["bias"]))


def assert_one_rounding(got, exact, dtype, floor):
    """No error but that of rounding to 16 bits."""
    limit = roundoff(dtype) * exact.abs() + floor * exact.abs().max() + torch.finfo(dtype).smallest_normal * roundoff(dtype)
    assert ((got.to(exact) - exact).abs() <= limit).all()


@grid(KINDS, few=(2, 8, 17, 16), wide=(2, 400, 3, 3))
@pytest.mark.parametrize("dtype", HALF, ids=["float16", "bfloat16"])
def test_far_from_zero_16_bit(kind, shape, dtype, backend, device, poison):
    """16-bit values as far from zero as the format allows: one rounding of the output, and nothing else."""
    mean, std = (500.0, 4.0) if dtype == torch.float16 else (60.0, 4.0)
    case = case_of(kind, "far from zero", shape, dtype=dtype, affine_dtype=torch.float32, mean=mean, std=std, activation="silu")
    inputs = Inputs.of(case, device)
    got, want = inputs.run(), inputs.torch(torch.float64)
    assert_one_rounding(got.y, want.y, dtype, 1e-6)
    assert_one_rounding(got.gradients["x"], want.gradients["x"], dtype, 1e-6)
    for name in set(got.gradients) & {"weight", "bias"}:
        assert quotient(got.gradients[name], want.gradients[name]) <= 1e-6, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", HALF, ids=["float16", "bfloat16"])
@pytest.mark.parametrize("activation", ["none", "silu", "gelu"])
def test_one_rounding_in_16_bits(activation, dtype, kind, backend, device, poison):
    """With everything fused there is one rounding to 16 bits, where torch's composition has one an op."""
    inputs = Inputs.of(case_of(kind, "", (2, 12, 9, 8), 3, residual=True, dtype=dtype, scale=True, shift=True, activation=activation), device)
    got, want = inputs.run(), inputs.torch(torch.float64)
    assert_one_rounding(got.y, want.y, dtype, 2e-6)
    for key in ("x", "residual"):
        assert_one_rounding(got.gradients[key], want.gradients[key], dtype, 2e-6)


@grid(CENTERED, small=(2, 6, 5, 7), long=(1, 2, 300, 301), S1=(3, 24, 1, 1), odd=(2, 33, 12, 12), wide=(2, 771, 3, 1))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=lambda dtype: str(dtype)[6:])
def test_constant_input_gives_bias(kind, shape, dtype, backend, device, poison):
    """x - mean is exactly zero, whatever the constant (which no sum of n of them need hit)."""
    for constant in (0.1, 3.3e4, -777.7):
        case = case_of(kind, "constant", shape, shape[1] if shape[1] % 2 == 0 else 3, dtype=dtype, mean=constant, std=0.0, eps=1e-12)
        inputs = Inputs.of(case, device)
        if inputs.dtotal is not None:
            inputs.tensors["residual"].fill_(1.0)
        result = inputs.call()
        y, bias = result[0] if isinstance(result, tuple) else result, inputs.tensors["bias"]
        assert torch.equal(y, (bias if case.trailing else bias[(..., *(None,) * (y.dim() - 2))]).expand_as(y)), constant


@grid(OWN, small=(2, 8, 6, 7), long=(1, 4, 190, 190), S1=(3, 32, 1, 1), wide=(2, 770, 3, 1))
@pytest.mark.parametrize("magnitude", [1e18, 1e30, 1e-30])
def test_huge_and_tiny(kind, shape, magnitude, backend, device, poison):
    """|x| ~ 1e30 in float32: squares overflow, the result does not; 1e-30 with eps: the result is bias, the gradient finite."""
    inputs = Inputs.of(case_of(kind, "huge", shape, mean=0.5 * magnitude, std=magnitude), device)
    if inputs.dtotal is not None:
        inputs.tensors["residual"].zero_()
        inputs.dtotal.zero_()
    got, want = inputs.run(), inputs.torch(torch.float64)
    for name, mine, exact in (("y", got.y, want.y), *((f"d{key}", value, want.gradients[key]) for key, value in got.gradients.items())):
        tiny = torch.finfo(torch.float32).smallest_normal
        error = (mine.to(exact) - exact).abs().max().item()
        size = (inputs.dy.numel() / mine.numel()) ** 0.5 if name == "drho" else 0.0  # of one sample it is 0 but for rounding
        assert error <= 2e-6 * max(size, exact.abs().max().item()) + tiny, f"{name}: {error}"


@grid(OWN, short=(1, 8, 40, 41), long=(1, 2, 260, 260), wide=(1, 1030, 3, 1))
@pytest.mark.parametrize("where", [0, 1, 1000, -1])
def test_one_outlier(kind, shape, where, backend, device, poison):
    """One element of 1e4 among N(0, 1), also where a shift by the first element would take it for the mean."""
    inputs = Inputs.of(case_of(kind, "outlier", shape, mean=0.0, std=1.0), device)
    x = inputs.tensors["x"]
    (x.movedim(1, -1) if kind.endswith("cl") else x).view(-1)[where] = 1e4
    got, want = inputs.run(), inputs.torch(torch.float64)
    theirs = inputs.torch(torch.float32)
    for name, mine, exact, other in (("y", got.y, want.y, theirs.y), ("dx", got.gradients["x"], want.gradients["x"], theirs.gradients["x"])):
        assert quotient(mine, exact) <= max(1e-6, 2 * quotient(other, exact)), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", [(0, 0), (1, 5), (-1, -1)], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "inf"])
def test_not_finite(value, where, kind, backend, device, poison):
    """NaN and inf spoil what torch loses to them, and nothing but what shares a statistic with a NaN, forward or backward."""
    inputs = Inputs.of(case_of(kind, "not finite", (2, 4, 10, 10)), device)

    def spoiled(value, call):
        x = inputs.tensors["x"]
        x[1, where[0]] = value if x.dim() == 2 else x[1, where[0]].index_fill(-1, torch.tensor(where[1] % x.shape[-1], device=device), value)
        result = call()
        return {"y": ~result.y.isfinite().cpu(), "dx": ~result.gradients["x"].isfinite().cpu()}

    least, most = (spoiled(other, lambda: inputs.torch(torch.float32)) for other in (value, torch.nan))
    for name, mine in spoiled(value, inputs.run).items():
        assert (kind in BATCH or not mine[0].any()) and mine.any() == most[name].any()
        assert not (least[name] & ~mine).any() and not (mine & ~most[name]).any(), name


@pytest.mark.parametrize("layout", LAYOUT_IDS)
def test_activation_at_the_kinks(layout, backend, device):
    """t exactly 0 and +-3 (from bias, at constant x): act' there is torch's."""
    bias = torch.tensor([0.0, -0.0, 3.0, -3.0, 1.0, -1.0], device=device)
    x = LAYOUTS[layout](torch.ones(2, 6, 3, 3, device=device)).requires_grad_()
    dy = LAYOUTS[layout](torch.randn(2, 6, 3, 3, device=device))
    for activation in ACTIVATIONS:
        for norm in (
            partial(normops.group_norm, x, 6), partial(normops.batch_norm, x, None, None, training=True), partial(normops.layer_norm, x, 6, dim=1),
        ):  # fmt: skip
            b, c = bias.clone().requires_grad_(), bias.clone().requires_grad_()
            got = torch.autograd.grad(norm(None, b, activation=activation, negative_slope=0.2), b, dy)[0]
            want = torch.autograd.grad(ACTIVATIONS[activation](c[:, None, None].expand_as(x), 0.2), c, dy)[0]
            torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6, msg=lambda text, name=activation: f"{name}: {text}")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_of_large_arguments(activation, backend, device):
    """exp overflows or vanishes: no NaN, forward or backward, and no error that shows beside t."""
    bias = torch.tensor([-1e18, -1e9, -200.0, -100.0, -89.0, 89.0, 100.0, 200.0, 1e9, 1e18], device=device, requires_grad=True)
    theirs = bias.detach().double().requires_grad_()
    x = torch.ones(2, 10, 5, device=device)
    want = ACTIVATIONS[activation](theirs[:, None].expand_as(x), 0.01)
    exact = torch.autograd.grad(want.sum(), theirs)[0]
    size = theirs.detach().abs()
    for y in (
        normops.group_norm(x, 10, None, bias, activation=activation), normops.batch_norm(x, None, None, None, bias, True, activation=activation),
        normops.layer_norm(x.mT, 10, None, bias, activation=activation).mT,
    ):  # fmt: skip
        slope = torch.autograd.grad(y.sum(), bias)[0].double()
        assert ((y.double() - want).abs() <= 2e-6 * want.abs() + 1e-30 * size[:, None]).all()
        assert ((slope - exact).abs() <= 2e-6 * exact.abs() + 1e-30 * size).all(), slope


@grid(KINDS, samples=(0, 6, 4, 4), positions=(3, 6, 0, 4), rank2=(0, 6), rank3=(2, 6, 0))
@pytest.mark.parametrize("options", [{}, {"activation": "silu"}, {"scale": True, "residual": True}], ids=["plain", "silu", "fused"])
def test_empty(kind, shape, options, backend, device, poison):
    """Empty batch, empty positions: empty y and dx, zero dweight and dbias."""
    inputs = Inputs.of(replace(case_of(kind, "empty", (*shape[:2], 2), 3, **options), shape=shape), device)
    result = inputs.run()
    x = inputs.tensors["x"]
    assert result.y.shape == x.shape and result.y.dtype == x.dtype
    for name, gradient in result.gradients.items():
        assert torch.equal(gradient, torch.zeros_like(inputs.tensors[name])), name
