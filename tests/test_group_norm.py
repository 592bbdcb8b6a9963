"""Group norm, forward and gradients, on every backend: the cases of ``cases.py``, and what the tolerance alone does not say."""

import itertools

import pytest
import torch
from cases import ACTIVATIONS, CASES, HALF, IN_PLACE, LAYOUTS, Case, Inputs, assert_layout, check, composed, roundoff

import normops
from normops import backends, ops
from normops.reference import CODES

LAYOUT_IDS = ["contiguous", "channels_last"]


def quotient(got, want):
    return (got.double() - want).abs().max().item() / want.abs().max().item()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_case(case, backend, device, poison):
    """y and all gradients against float64; shape, dtype and memory format of y and dx."""
    inputs = Inputs.of(case, device)
    result = inputs.run(normops.group_norm)
    check(result, inputs)
    x = inputs.tensors["x"]
    assert_layout(result.y, x, case.layout)
    assert_layout(result.gradients["x"], x, case.layout)


@pytest.mark.parametrize("case", [CASES[name] for name in ("rank4", "cl_C33", "long_group", "bfloat16", "bf16_out_f32")],
                         ids=["rank4", "cl_C33", "long_group", "bfloat16", "bf16_out_f32"])  # fmt: skip
def test_same_result_without_gradients(case, backend, device, poison):
    """Inference, which saves no statistics, and torch.ops give bitwise the y of training."""
    inputs = Inputs.of(case, device)
    y = inputs.run(normops.group_norm).y
    arguments = dict(inputs.tensors)
    args = arguments.pop("x"), case.groups, arguments.pop("weight"), arguments.pop("bias"), case.eps
    for call in (normops.group_norm, torch.ops.normops.group_norm):
        with torch.no_grad():
            assert torch.equal(call(*args, **arguments, **case.options()), y)
        with torch.inference_mode():
            assert torch.equal(call(*args, **arguments, **case.options()), y)
    op = inputs.run(torch.ops.normops.group_norm)
    function = inputs.run(normops.group_norm)
    assert all(torch.equal(op.gradients[name], function.gradients[name]) for name in op.gradients)


@pytest.mark.parametrize("name", ["rank4", "cl_C33", "everything", "weight_NC_cl", "bfloat16", "long_group", "cl_C20", "S1"])
def test_each_gradient_alone(name, backend, device, poison):
    """What is not wanted is not computed, and changes no bit of the others."""
    inputs = Inputs.of(CASES[name], device)
    full = inputs.run(normops.group_norm)
    for wanted in itertools.chain(((name,) for name in inputs.tensors), itertools.combinations(inputs.tensors, 2)):
        some = inputs.run(normops.group_norm, wanted)
        assert set(some.gradients) == set(wanted)
        for key, gradient in some.gradients.items():
            assert torch.equal(gradient, full.gradients[key]), f"d{key}, when only {wanted} require grad"


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "residual"])
def test_unwanted_gradients_are_not_computed(wanted, activation, backend, device, monkeypatch):
    """The launcher makes nothing for what requires no grad; a linear residual's gradient is dy, and no kernel makes that either."""
    made, launch = [], ops.group_norm_bwd
    monkeypatch.setattr(ops, "group_norm_bwd", lambda *args: made.append(launch(*args)) or made[-1])
    inputs = Inputs.of(Case("mask", (2, 6, 5), 3, residual="contiguous", activation=activation), device)
    inputs.run(normops.group_norm, (wanted,))
    expected = [name == wanted and not (name == "residual" and activation == "none") for name in ("x", "weight", "bias", "residual")]
    found = [[gradient is not None for gradient in gradients] for gradients in made]
    assert found == [expected] or (found == [] and not any(expected))


# what kernels may do differently: sums over programs, over samples, over threads; both memory orders
REPEATED = ["long_group", "many_small_groups", "many_samples", "cl_long", "cl_C320", "cl_many_positions", "everything", "bf16_long"]


@pytest.mark.parametrize("name", REPEATED)
def test_bitwise_repeatable(name, backend, device):
    """No atomics: every run gives the same bits; on the CPU, with any number of threads."""
    inputs = Inputs.of(CASES[name], device)
    first = inputs.run(normops.group_norm)
    threads = torch.get_num_threads()
    counts = (1, 2, 3) if backend == "cpu" else (threads,) * 3
    try:
        for count in counts:
            torch.set_num_threads(count)
            again = inputs.run(normops.group_norm)
            assert torch.equal(again.y, first.y), f"y with {count} threads"
            for key, gradient in again.gradients.items():
                assert torch.equal(gradient, first.gradients[key]), f"d{key} with {count} threads"
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("layout", LAYOUT_IDS)
@pytest.mark.parametrize("shape", [(2, 6, 9, 11), (1, 4, 130, 131), (3, 32, 1, 1), (2, 40, 8, 8)], ids=str)
def test_samples_do_not_meet(shape, layout, backend, device):
    """A sample alone gives the bits that it gives in a batch: nothing but dweight and dbias crosses samples. NaN in one stays in it."""
    inputs = Inputs.of(Case("batch", (shape[0] + 1, *shape[1:]), 2, layout, activation="silu"), device)
    inputs.tensors["x"][-1].fill_(torch.nan)
    whole = inputs.run(normops.group_norm)
    assert whole.y[-1].isnan().all()
    kept = slice(0, shape[0])
    first = Inputs(inputs.case, dict(inputs.tensors, x=inputs.tensors["x"][kept]), inputs.dy[kept])
    part = first.run(normops.group_norm)
    torch.testing.assert_close(part.y, whole.y[kept], rtol=4e-7, atol=4e-7)
    torch.testing.assert_close(part.gradients["x"], whole.gradients["x"][kept], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("layout", LAYOUT_IDS)
@pytest.mark.parametrize("ratio", [1e2, 1e3, 1e4])
@pytest.mark.parametrize("shape", [(2, 8, 6, 7), (3, 32, 1, 1), (1, 4, 190, 190), (2, 33, 16, 16)], ids=["small", "S1", "long", "odd"])
def test_far_from_zero(shape, ratio, layout, backend, device, poison):
    """mean/std up to 1e4 in float32: y, dx and dweight at rounding level, where torch loses 3e-4 to 3e-3."""
    groups = 11 if shape[1] == 33 else 2
    inputs = Inputs.of(Case("far from zero", shape, groups, layout, mean=ratio, std=1.0), device)
    got, want = inputs.run(normops.group_norm), inputs.torch(torch.float64)
    errors = {"y": quotient(got.y, want.y)} | {f"d{key}": quotient(got.gradients[key], want.gradients[key]) for key in ("x", "weight")}
    assert max(errors.values()) <= 1e-6, errors
    theirs = inputs.torch(torch.float32)  # dbias is far from nothing: a plain sum of dy
    assert quotient(got.gradients["bias"], want.gradients["bias"]) <= max(1e-6, 2 * quotient(theirs.gradients["bias"], want.gradients["bias"]))


@pytest.mark.parametrize("layout", LAYOUT_IDS)
@pytest.mark.parametrize("dtype", HALF, ids=["float16", "bfloat16"])
def test_far_from_zero_16_bit(dtype, layout, backend, device, poison):
    """16-bit values as far from zero as the format allows: one rounding of the output, and nothing else."""
    mean, std = (500.0, 4.0) if dtype == torch.float16 else (60.0, 4.0)
    case = Case("far from zero", (2, 8, 17, 16), 2, layout, dtype=dtype, affine_dtype=torch.float32, mean=mean, std=std, activation="silu")
    inputs = Inputs.of(case, device)
    got, want = inputs.run(normops.group_norm), inputs.torch(torch.float64)
    for name, mine, exact in (("y", got.y, want.y), ("dx", got.gradients["x"], want.gradients["x"])):
        limit = roundoff(dtype) * exact.abs() + 1e-6 * exact.abs().max() + torch.finfo(dtype).smallest_normal * roundoff(dtype)
        assert ((mine.double() - exact).abs() <= limit).all(), name
    for name in ("weight", "bias"):
        assert quotient(got.gradients[name], want.gradients[name]) <= 1e-6, name


@pytest.mark.parametrize("layout", LAYOUT_IDS)
@pytest.mark.parametrize("dtype", HALF, ids=["float16", "bfloat16"])
@pytest.mark.parametrize("activation", ["none", "silu", "gelu"])
def test_one_rounding_in_16_bits(activation, dtype, layout, backend, device, poison):
    """With everything fused there is one rounding to 16 bits, where torch's composition has one an op."""
    case = Case("one rounding", (2, 12, 9, 8), 3, layout, dtype=dtype, residual=layout, scale=True, shift=True, activation=activation)
    inputs = Inputs.of(case, device)
    got, want = inputs.run(normops.group_norm), inputs.torch(torch.float64)
    pairs = {"y": (got.y, want.y)} | {f"d{key}": (got.gradients[key], want.gradients[key]) for key in ("x", "residual")}
    for name, (mine, exact) in pairs.items():
        limit = roundoff(dtype) * exact.abs() + 2e-6 * exact.abs().max() + torch.finfo(dtype).smallest_normal * roundoff(dtype)
        assert ((mine.double() - exact).abs() <= limit).all(), name


@pytest.mark.parametrize("layout", LAYOUT_IDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", [(2, 6, 5, 7), (1, 2, 300, 301), (3, 24, 1, 1), (2, 33, 12, 12)], ids=["small", "long", "S1", "odd"])
def test_constant_input_gives_bias(shape, dtype, layout, backend, device, poison):
    """x - mean is exactly zero, whatever the constant (which no sum of n of them need hit)."""
    for constant in (0.1, 3.3e4, -777.7):
        x = LAYOUTS[layout](torch.full(shape, constant, dtype=dtype, device=device))
        weight, bias = torch.randn(2, shape[1], dtype=dtype, device=device)
        y = normops.group_norm(x, shape[1] if shape[1] != 33 else 11, weight, bias, eps=1e-12)
        assert torch.equal(y, bias[(None, ..., *(None,) * (len(shape) - 2))].expand_as(y)), constant


@pytest.mark.parametrize("layout", LAYOUT_IDS)
@pytest.mark.parametrize("shape", [(2, 8, 6, 7), (1, 4, 190, 190), (3, 32, 1, 1)], ids=["small", "long", "S1"])
@pytest.mark.parametrize("magnitude", [1e18, 1e30, 1e-30])
def test_huge_and_tiny(magnitude, shape, layout, backend, device, poison):
    """|x| ~ 1e30 in float32: squares overflow, the result does not; 1e-30 with eps: the result is bias, the gradient finite."""
    inputs = Inputs.of(Case("huge", shape, 2, layout, mean=0.5 * magnitude, std=magnitude), device)
    got, want = inputs.run(normops.group_norm), inputs.torch(torch.float64)
    for name, mine, exact in (("y", got.y, want.y), *((f"d{key}", got.gradients[key], want.gradients[key]) for key in ("x", "weight", "bias"))):
        tiny = torch.finfo(torch.float32).smallest_normal
        error = (mine.double() - exact).abs().max().item()
        assert error <= 2e-6 * exact.abs().max().item() + tiny, f"{name}: {error}"


@pytest.mark.parametrize("layout", LAYOUT_IDS)
@pytest.mark.parametrize("where", [0, 1, 1000, -1])
@pytest.mark.parametrize("shape", [(1, 8, 40, 41), (1, 2, 260, 260)], ids=["short", "long"])
def test_one_outlier(shape, where, layout, backend, device, poison):
    """One element of 1e4 among N(0, 1), also where a shift by the first element would take it for the mean."""
    inputs = Inputs.of(Case("outlier", shape, 2, layout, mean=0.0, std=1.0), device)
    x = inputs.tensors["x"]
    (x.movedim(1, -1) if layout == "channels_last" else x).view(-1)[where] = 1e4
    got, want = inputs.run(normops.group_norm), inputs.torch(torch.float64)
    theirs = inputs.torch(torch.float32)
    for name, mine, exact, other in (("y", got.y, want.y, theirs.y), ("dx", got.gradients["x"], want.gradients["x"], theirs.gradients["x"])):
        assert quotient(mine, exact) <= max(1e-6, 2 * quotient(other, exact)), name


@pytest.mark.parametrize("position", [0, 77, -1])
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "inf"])
def test_not_finite(value, position, backend, device):
    """NaN and inf spoil their own group, all of it, and no other; as in torch."""
    x = torch.randn(2, 4, 10, 10, device=device)
    x[1, :2].view(-1)[position] = value
    y = normops.group_norm(x, 2)
    assert torch.equal(y.isfinite(), torch.group_norm(x, 2).isfinite())
    assert y[1, :2].isnan().all() or value == torch.inf
    assert y[0].isfinite().all() and y[1, 2:].isfinite().all()


@pytest.mark.parametrize("layout", LAYOUT_IDS)
def test_activation_at_the_kinks(layout, backend, device):
    """t exactly 0 and +-3 (from bias, at constant x): act' there is torch's."""
    bias = torch.tensor([0.0, -0.0, 3.0, -3.0, 1.0, -1.0], device=device)
    x = LAYOUTS[layout](torch.ones(2, 6, 3, 3, device=device)).requires_grad_()
    dy = LAYOUTS[layout](torch.randn(2, 6, 3, 3, device=device))
    for activation in ACTIVATIONS:
        b, c = bias.clone().requires_grad_(), bias.clone().requires_grad_()
        got = torch.autograd.grad(normops.group_norm(x, 6, None, b, activation=activation, negative_slope=0.2), b, dy)[0]
        want = torch.autograd.grad(ACTIVATIONS[activation](c[:, None, None].expand_as(x), 0.2), c, dy)[0]
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6, msg=lambda text, name=activation: f"{name}: {text}")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_of_large_arguments(activation, backend, device):
    """exp overflows or vanishes: no NaN, forward or backward, and no error that shows beside t."""
    bias = torch.tensor([-1e18, -1e9, -200.0, -100.0, -89.0, 89.0, 100.0, 200.0, 1e9, 1e18], device=device, requires_grad=True)
    theirs = bias.detach().double().requires_grad_()
    x = torch.ones(2, 10, 5, device=device)
    y = normops.group_norm(x, 10, None, bias, activation=activation)
    want = ACTIVATIONS[activation](theirs[:, None].expand_as(x), 0.01)
    slope, exact = torch.autograd.grad(y.sum(), bias)[0].double(), torch.autograd.grad(want.sum(), theirs)[0]
    size = theirs.detach().abs()
    assert ((y.double() - want).abs() <= 2e-6 * want.abs() + 1e-30 * size[:, None]).all()
    assert ((slope - exact).abs() <= 2e-6 * exact.abs() + 1e-30 * size).all(), slope


@pytest.mark.parametrize("shape", [(0, 6, 4, 4), (3, 6, 0, 4), (0, 6), (2, 6, 0)], ids=str)
@pytest.mark.parametrize("options", [{}, {"activation": "silu"}, {"scale": True, "residual": True}], ids=["plain", "silu", "fused"])
def test_empty(shape, options, backend, device, poison):
    """Empty batch, empty positions: empty y and dx, zero dweight and dbias."""
    options = dict(options)
    x = torch.randn(shape, device=device, requires_grad=True)
    weight, bias = (torch.randn(6, device=device, requires_grad=True) for _ in range(2))
    if options.pop("scale", False):
        options["scale"] = torch.randn(shape[:2], device=device, requires_grad=True)
    if options.pop("residual", False):
        options["residual"] = torch.randn(shape, device=device, requires_grad=True)
    y = normops.group_norm(x, 3, weight, bias, **options)
    assert y.shape == x.shape and y.dtype == x.dtype
    leaves = [x, weight, bias, *(value for value in options.values() if isinstance(value, torch.Tensor))]
    for leaf, gradient in zip(leaves, torch.autograd.grad(y.sum(), leaves), strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout not in ("scalar", "expanded_positions")])
def test_kernels_read_in_place(layout, backend, device, monkeypatch):
    """Dense x, dy and residual reach the kernels as they are; other x is packed once, forward, and its packed copy is what is saved."""
    calls = []
    run = backends.run
    monkeypatch.setattr(ops.backends, "run", lambda op, x, *args: (calls.append((op, args)), run(op, x, *args)))
    case = Case("in place", (4, 6, 5, 8), 3, layout, residual=layout if layout in IN_PLACE else "contiguous", activation="silu")
    inputs = Inputs.of(case, device)
    inputs.run(normops.group_norm)
    (forward, (_, _, x, _, _, residual, *options)), (backward, (dx, *_, dy, x_again, _, _, _, residual_again, _, last, _, _)) = calls
    assert (forward, backward) == ("group_norm_fwd", "group_norm_bwd")
    assert x.data_ptr() == x_again.data_ptr() and x.stride() == x_again.stride()
    assert dy.data_ptr() == inputs.dy.data_ptr()
    assert (x.data_ptr() == inputs.tensors["x"].data_ptr()) == (layout in IN_PLACE)
    assert last == options[1] == ("channels_last" in layout)
    if layout in IN_PLACE:
        assert residual.data_ptr() == residual_again.data_ptr() == inputs.tensors["residual"].data_ptr()
        assert dx.stride() == x.stride()


@pytest.mark.parametrize("layout", LAYOUT_IDS)
def test_no_copies(layout, backend, device):
    """No aten copy, clone or contiguous runs, forward or backward, unless the backend itself is made of aten ops."""
    if backend == "reference":
        pytest.skip("the reference is made of aten ops")
    inputs = Inputs.of(Case("copies", (2, 64, 8, 8), 8, layout, residual=layout, activation="silu"), device)
    inputs.run(normops.group_norm)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        inputs.run(normops.group_norm)
    names = {event.key for event in profile.key_averages()}
    assert "aten::empty_like" in names, "the profiler sees ops"
    assert not names & {"aten::clone", "aten::contiguous", "aten::copy_", "aten::_to_copy"}, names


# name -> (case, tensors of x's size that are saved)
SAVED = {
    "plain": (Case("", (4, 8, 16, 16), 4), 1),
    "silu": (Case("", (4, 8, 16, 16), 4, activation="silu"), 1),
    "residual": (Case("", (4, 8, 16, 16), 4, residual="contiguous"), 1),
    "residual_silu": (Case("", (4, 8, 16, 16), 4, residual="contiguous", activation="silu"), 2),
    "modulation": (Case("", (4, 8, 16, 16), 4, scale=True, shift=True, activation="silu"), 1),
    "channels_last": (Case("", (4, 8, 16, 16), 4, "channels_last", activation="silu"), 1),
    "bf16": (Case("", (4, 8, 16, 16), 4, dtype=torch.bfloat16, activation="silu"), 1),
    "bf16_out_f32": (Case("", (4, 8, 16, 16), 4, dtype=torch.bfloat16, out_dtype=torch.float32, activation="silu"), 1),
    "sliced": (Case("", (4, 8, 16, 16), 4, "sliced"), 1),
}


@pytest.mark.parametrize("case, large", SAVED.values(), ids=SAVED)
def test_saved_for_backward(case, large, backend, device):
    """x (and the residual, if the activation needs it), (3, N, G) statistics in float32, small vectors; y and x_hat are not kept."""
    inputs, saved = Inputs.of(case, device), []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: saved.append(value) or value, lambda value: value):
        leaves = {name: value.detach().requires_grad_() for name, value in inputs.tensors.items()}
        args = leaves.pop("x"), case.groups, leaves.pop("weight"), leaves.pop("bias"), case.eps
        y = normops.group_norm(*args, **leaves, **case.options())
    x = inputs.tensors["x"]
    unique = {(value.data_ptr(), value.shape): value for value in saved}.values()
    big = [value for value in unique if value.numel() >= x.numel()]
    small = [value for value in unique if value.numel() < x.numel()]
    assert len(big) == large and all(value.dtype == x.dtype for value in big)
    assert y.data_ptr() not in {value.data_ptr() for value in big}
    if case.layout in IN_PLACE:
        assert x.data_ptr() in {value.data_ptr() for value in big}, "x itself, no copy of it"
    assert any(value.shape == (3, 4, case.groups) and value.dtype == torch.float32 for value in small), "statistics"
    assert sum(value.numel() for value in small) <= 3 * 4 * case.groups + (2 * 8 if not case.scale else 8 * 4 * 8)


@pytest.mark.parametrize("layout", LAYOUT_IDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=lambda dtype: str(dtype)[6:])
def test_statistics(dtype, layout, backend, device, poison):
    """group_norm_fwd returns mean (two numbers) and 1/std in the accumulation dtype, all written; the same in both layouts."""
    x = LAYOUTS[layout]((torch.randn(3, 10, 7, 6, dtype=torch.float64) + 100).to(dtype).to(device))
    y, stats = torch.ops.normops.group_norm_fwd(x, None, None, None, 5, 1e-5, "none", 0.0, None)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    assert stats.shape == (3, 3, 5) and stats.dtype == acc and stats.is_contiguous()
    flat = x.double().reshape(3, 5, -1) - 100  # exact
    unit = roundoff(acc)
    high, low, rstd = stats.double()
    std = flat.std(2, unbiased=False)
    want = (std.square() + 1e-5).rsqrt()
    assert ((high - 100 - flat.mean(2)).abs() <= 2 * unit * 128).all(), "the first number is the mean, rounded"
    assert (((flat + 100 - high[..., None]).mean(2) - low).abs() <= 8 * unit * std).all(), "the second what that lost, exact to the spread"
    assert ((rstd - want).abs() <= 8 * unit * want).all()
    assert y.dtype == dtype


def test_backward_mask(backend, device, poison):
    """group_norm_bwd: what the mask leaves out comes back with no elements."""
    x, dy, residual = torch.randn(3, 2, 6, 5, device=device)
    weight, bias = torch.randn(2, 6, device=device)
    _, stats = torch.ops.normops.group_norm_fwd(x, weight, bias, residual, 3, 1e-5, "silu", 0.0, None)
    for mask in itertools.product((True, False), repeat=4):
        gradients = torch.ops.normops.group_norm_bwd(dy, x, stats, weight, bias, residual, 3, "silu", 0.0, mask)
        for gradient, wanted, like in zip(gradients, mask, (x, weight, bias, residual), strict=True):
            assert gradient.shape == (like.shape if wanted else (0,))
            assert not gradient.isnan().any()


def test_every_activation_code_reaches_the_kernel(backend, device):
    """Each name computes its own function: no two alike, and none falls to another's branch."""
    x = torch.randn(2, 4, 64, device=device)
    found = {name: normops.group_norm(x, 2, activation=name, negative_slope=0.3) for name in CODES}
    for first, second in itertools.combinations(found, 2):
        assert not torch.allclose(found[first], found[second], atol=1e-5), (first, second)


def test_inputs_are_left_alone(backend, device):
    """No input is written, not even where it is a view of a larger tensor."""
    inputs = Inputs.of(CASES["everything"], device)
    before = {name: value.clone() for name, value in inputs.tensors.items()}, inputs.dy.clone()
    result = inputs.run(normops.group_norm)
    assert all(torch.equal(value, before[0][name]) for name, value in inputs.tensors.items())
    assert torch.equal(inputs.dy, before[1])
    assert all(result.y.data_ptr() != value.data_ptr() for value in inputs.tensors.values()), "the result is no input"


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("layout", LAYOUT_IDS)
def test_nothing_is_written_outside(layout, residual, backend, device, monkeypatch):
    """Outputs between guard elements: kernels that write whole vectors past the end are seen."""
    guards, empty_like, new_empty = [], torch.empty_like, torch.Tensor.new_empty
    pad = 64

    def guarded(size, stride, dtype):
        numel = 1 + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        whole = torch.full((numel + 2 * pad,), 12345.0, dtype=dtype, device=device)
        guards.append(whole)
        return whole[pad:-pad].as_strided(size, stride).fill_(torch.nan)

    def like(value, dtype=None, **options):
        made = empty_like(value, dtype=dtype, **options)
        return guarded(made.shape, made.stride(), made.dtype)

    inputs = Inputs.of(Case("guards", (3, 35, 7, 3), 5, layout, residual=layout if residual else None, activation="silu"), device)
    with monkeypatch.context() as patch:
        patch.setattr(ops.torch, "empty_like", like)
        patch.setattr(torch.Tensor, "new_empty", lambda x, size, dtype=None: guarded(size, new_empty(x, size, dtype=dtype).stride(), dtype))
        result = inputs.run(normops.group_norm)
    assert len(guards) >= 5 + residual, "y, stats, dx, dweight, dbias, dresidual"
    for whole in guards:
        assert (whole[:pad] == 12345).all() and (whole[-pad:] == 12345).all()
    check(result, inputs)


def test_composed_is_what_torch_offers():
    """The oracle's composition is F.group_norm, then the torch functions of those names, in that order."""
    x, residual = torch.randn(2, 2, 6, 5, dtype=torch.float64)
    weight, bias, scale, shift = torch.randn(4, 6, dtype=torch.float64)
    t = torch.nn.functional.group_norm(x, 3, weight, bias, 1e-3) * (1 + scale[:, None]) + shift[:, None] + residual
    got = composed(x, 3, weight, bias, 1e-3, activation="silu", residual=residual, scale=scale.expand(2, 6), shift=shift.expand(2, 6))
    assert torch.equal(got, torch.nn.functional.silu(t))
