"""Every norm, forward and gradients, on every backend: the cases of ``cases.py``, and what the tolerance alone does not say of a call."""

import inspect
import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, COMPOSED, IN_PLACE, KINDS, LAYOUTS, NORM_CASES, Inputs, assert_layout, case_of, check, grid, roundoff

import normops
from normops import backends, ops, reference
from normops.reference import CODES

ALL = CASES | NORM_CASES


def some(*names: str):
    return pytest.mark.parametrize("case", [ALL[name] for name in names], ids=names)


@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_case(case, backend, device, poison):
    """y and all gradients against float64; shape, dtype and memory format of y and dx."""
    inputs = Inputs.of(case, device)
    result = inputs.run()
    check(result, inputs)
    assert_layout(result.y, inputs)
    assert_layout(result.gradients["x"], inputs)


@some(
    "rank4", "cl_C33", "long_group", "bfloat16", "bf16_out_f32", "instance_modulation_cl", "frozen_2d_cf", "frozen_C33_cl", "adain_fused_cl",
    "layer_2d_cl", "rms_modulation_cf", "layer_norm_adaLN", "layer_norm_out_f32", "rms_norm_offset_bf16", "add_layer_norm_mixed", "add_rms_norm_D257",
)  # fmt: skip
def test_same_result_without_gradients(case, backend, device, poison):
    """Inference, which saves no statistics, and torch.ops give bitwise the results of training."""
    inputs = Inputs.of(case, device)
    trained, op = inputs.run(), getattr(torch.ops.normops, case.norm)
    for function in (None, op):
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                result = inputs.call(function)
            y, total = result if isinstance(result, tuple) else (result, None)
            assert torch.equal(y, trained.y)
            assert total is trained.total is None or torch.equal(total, trained.total)
    again = inputs.run(op)
    assert all(torch.equal(again.gradients[name], trained.gradients[name]) for name in again.gradients)


@some(
    "rank4", "cl_C33", "everything", "weight_NC_cl", "bfloat16", "long_group", "cl_C20", "S1", "instance_C33_cf", "instance_modulation_cl",
    "frozen_modulation_cf", "frozen_modulation_cl", "adain_fused_cf", "layer_modulation_cf", "layer_modulation_cl", "rms_C33_cl",
    "layer_norm_adaLN_affine", "layer_norm_residual_silu", "layer_norm_D17", "rms_norm_qk_norm",
    "add_layer_norm_adaLN_affine", "add_rms_norm_bfloat16",
)  # fmt: skip
def test_each_gradient_alone(case, backend, device, poison):
    """What is not wanted is not computed, and changes no bit of the others."""
    inputs = Inputs.of(case, device)
    full = inputs.run()
    for wanted in itertools.chain(((name,) for name in inputs.tensors), itertools.combinations(inputs.tensors, 2)):
        some = inputs.run(wanted=wanted)
        assert set(some.gradients) == set(wanted)
        for key, gradient in some.gradients.items():
            assert torch.equal(gradient, full.gradients[key]), f"d{key}, when only {wanted} require grad"


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize(
    "kind, wanted", [(kind, name) for kind in KINDS for name in ("x", "weight", "bias", "residual") if name != "bias" or "rms" not in kind]
)
def test_unwanted_gradients_are_not_computed(wanted, activation, kind, backend, device, monkeypatch):
    """The launcher makes nothing for what requires no grad; a linear residual's gradient is dy, and no kernel makes that either."""
    made = []

    def recorded(launch):
        return lambda *args: made.append(launch(*args)) or made[-1]

    for name in ("group_norm_bwd", "row_norm_bwd"):
        monkeypatch.setattr(ops, name, recorded(getattr(ops, name)))
    inputs = Inputs.of(case_of(kind, "mask", (2, 6, 5), 3, residual=True, activation=activation), device)
    inputs.run(wanted=(wanted,))
    computed = "x" if wanted == "residual" and "add" in kind else wanted
    expected = [name == computed and not (name == "residual" and activation == "none") for name in ("x", "weight", "bias", "residual")]
    found = [[gradient is not None for gradient in gradients] for gradients in made]
    assert found == [expected] or (found == [] and not any(expected))


@some(  # what kernels may do differently: sums over programs, over samples, over threads; both memory orders
    "long_group", "many_small_groups", "many_samples", "cl_long", "cl_C320", "cl_many_positions", "everything", "bf16_long",
    "instance_C320_cf", "instance_C320_cl", "instance_large_S_cf", "instance_large_S_cl", "instance_many_samples_cl", "frozen_large_S_cf",
    "frozen_large_S_cl", "frozen_C320_cl", "adain_fused_cl", "layer_large_S_cf", "layer_large_S_cl", "layer_C4099_cf", "rms_C4099_cl",
    "rms_C70001_cf", "layer_many_samples_cf", "layer_norm_tiny_rows", "layer_norm_many_rows", "layer_norm_long_row", "rms_norm_long_rows",
    "layer_norm_transformer", "rms_norm_bf16_long", "layer_norm_adaLN_affine", "add_layer_norm_many_rows", "add_rms_norm_transformer",
)  # fmt: skip
def test_bitwise_repeatable(case, backend, device):
    """No atomics: every run gives the same bits; on the CPU, with any number of threads."""
    inputs = Inputs.of(case, device)
    first = inputs.run()
    threads = torch.get_num_threads()
    counts = (1, 2, 3) if backend == "cpu" else (threads,) * 3
    try:
        for count in counts:
            torch.set_num_threads(count)
            again = inputs.run()
            assert torch.equal(again.y, first.y), f"y with {count} threads"
            for key, gradient in again.gradients.items():
                assert torch.equal(gradient, first.gradients[key]), f"d{key} with {count} threads"
    finally:
        torch.set_num_threads(threads)


@grid(KINDS, small=(2, 6, 9, 11), long=(1, 4, 130, 131), S1=(3, 32, 1, 1), wide=(2, 40, 8, 8))
def test_samples_do_not_meet(kind, shape, backend, device):
    """A sample alone gives what it gives in a batch: nothing but dweight and dbias crosses samples. NaN in one stays in it."""
    inputs = Inputs.of(case_of(kind, "batch", (shape[0] + 1, *shape[1:]), activation="silu"), device)
    inputs.tensors["x"][-1].fill_(torch.nan)
    whole = inputs.run()
    assert whole.y[-1].isnan().all()
    kept = slice(0, shape[0])
    tensors = {name: value[kept] if name in ("x", "residual") else value for name, value in inputs.tensors.items()}
    part = replace(inputs, tensors=tensors, dy=inputs.dy[kept], dtotal=None if inputs.dtotal is None else inputs.dtotal[kept]).run()
    torch.testing.assert_close(part.y, whole.y[kept], rtol=4e-7, atol=4e-7)
    torch.testing.assert_close(part.gradients["x"], whole.gradients["x"][kept], rtol=2e-6, atol=2e-6)


def launched(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """The arguments by name with which kernels ran, in order."""
    calls, run = [], backends.run

    def recorded(op, x, *args):
        calls.append(inspect.signature(getattr(reference, op)).bind(*args).arguments | {"op": op})
        return run(op, x, *args)

    monkeypatch.setattr(backends, "run", recorded)
    inputs.run()
    return calls


READ = {  # kind -> layouts which it reads in place
    **dict.fromkeys(("group_norm", "instance_norm", "frozen", "layer_norm_cf", "rms_norm_cf"), IN_PLACE),
    **dict.fromkeys(("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"), ("contiguous", "offset")),
}


@pytest.mark.parametrize("kind", READ)
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout not in ("scalar", "expanded_positions")])
def test_kernels_read_in_place(layout, kind, backend, device, monkeypatch):
    """Dense x, dy and residual reach the kernels as they are; other x is packed once, forward, and its packed copy is what is saved."""
    monkeypatch.setattr(backends, "everyday", False)
    case = replace(case_of(kind, "in place", (4, 6, 5, 8), 3, activation="silu"), shape=(4, 6, 5, 8), layout=layout)
    in_place = layout in READ[kind]
    inputs = Inputs.of(replace(case, residual=layout if in_place else "contiguous"), device)
    forward, backward = launched(inputs, monkeypatch)
    family = "row_norm" if case.rows else "group_norm"
    assert (forward["op"], backward["op"]) == (f"{family}_fwd", f"{family}_bwd")
    x, given = forward["x"], inputs.tensors["x"]
    assert (x.data_ptr() == given.data_ptr()) == in_place
    kept = x if forward.get("total") is None else forward["total"]
    assert backward["x"].data_ptr() == kept.data_ptr() and backward["x"].stride() == kept.stride()
    assert backward["dy"].data_ptr() == inputs.dy.data_ptr()
    if family == "group_norm":
        assert forward["channels_last"] == backward["channels_last"] == ("channels_last" in layout)
    if in_place:
        addend = forward["residual"] if forward.get("addend") is None else forward["addend"]
        assert addend.data_ptr() == inputs.tensors["residual"].data_ptr()
        assert backward["dx"].stride() == x.stride()


@pytest.mark.parametrize("kind", KINDS)
def test_no_copies(kind, backend, device):
    """No aten copy, clone or contiguous runs, forward or backward, unless the backend itself is made of aten ops."""
    if backend == "reference":
        pytest.skip("the reference is made of aten ops")
    inputs = Inputs.of(case_of(kind, "copies", (2, 64, 8, 8), 8, residual=True, activation="silu"), device)
    inputs.run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        inputs.run()
    large = {
        event.name for event in profile.events() if any(shape and torch.Size(shape).numel() >= inputs.dy.numel() for shape in event.input_shapes)
    }
    assert "aten::empty_like" in large, "the profiler sees ops"
    assert not large & {"aten::clone", "aten::contiguous", "aten::copy_", "aten::_to_copy", "aten::to", "aten::add"}, large


SAVED = {  # the call, tensors of x's size that are saved
    "plain": ({}, 1),
    "silu": ({"activation": "silu"}, 1),
    "residual": ({"residual": True}, 1),
    "residual_silu": ({"residual": True, "activation": "silu"}, 2),
    "modulation": ({"scale": True, "shift": True, "activation": "silu"}, 1),
    "bf16": ({"dtype": torch.bfloat16, "activation": "silu"}, 1),
    "bf16_out_f32": ({"dtype": torch.bfloat16, "out_dtype": torch.float32, "activation": "silu"}, 1),
    "sliced": ({"layout": "sliced"}, 1),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fields, large", SAVED.values(), ids=SAVED)
def test_saved_for_backward(fields, large, kind, backend, device):
    """x (and the residual, if the activation needs it), statistics in float32, small vectors; of an addition the sum. y and x_hat are not kept."""
    case = case_of(kind, "saved", (4, 8, 16, 16), 4, **fields)
    inputs, saved = Inputs.of(case, device), []
    added = "add" in kind
    with torch.autograd.graph.saved_tensors_hooks(lambda value: saved.append(value) or value, lambda value: value):
        result = inputs.call(**{name: value.detach().requires_grad_() for name, value in inputs.tensors.items()})
    y, x = (result[0], result[1]) if added else (result, inputs.tensors["x"])
    unique = {(value.data_ptr(), value.shape): value for value in saved}.values()
    big = [value for value in unique if value.numel() >= x.numel()]
    small = [value for value in unique if value.numel() < x.numel()]
    assert len(big) == (1 if added else large) and all(value.dtype == x.dtype for value in big)
    assert y.data_ptr() not in {value.data_ptr() for value in big}
    if case.layout in IN_PLACE:
        assert x.data_ptr() in {value.data_ptr() for value in big}, "x itself or the sum, no copy of it"
    statistics = case.statistics()
    if not case.frozen:
        assert any(value.numel() == statistics and value.dtype == torch.float32 for value in small), "statistics"
    assert sum(value.numel() for value in small) <= statistics + torch.Size(case.vector).numel() * (2 if not case.scale else 8 * case.shape[0])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("sets", ["group", "moments", "layer", "rms", "last"])
def test_statistics(sets, dtype, layout, backend, device, poison):
    """X_fwd returns mean (two numbers) and 1/std in the accumulation dtype, all written; the same in both layouts."""
    x = LAYOUTS[layout]((torch.randn(3, 10, 7, 6, dtype=torch.float64) + 100).to(dtype).to(device))
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    exact = x.double()
    if sets in ("group", "moments"):
        rows, shape = exact.reshape(3, 5, -1), (3, 3, 5)
        if sets == "group":
            y, stats = torch.ops.normops.group_norm_fwd(x, None, None, None, None, 5, 1e-5, "none", 0.0, None)
        else:
            y, stats = x, torch.ops.normops.group_norm_stats(x, 5, 1e-5)
    else:
        across = sets != "last"
        rows = exact.movedim(1, -1) if across and layout == "channels_last" else exact.flatten(2).movedim(1, -1) if across else exact
        rows = rows.flatten(0, -2)
        shape = (1 if sets == "rms" else 3, len(rows))
        y, total, stats = torch.ops.normops.row_norm_fwd(
            x, None, None, None, None, 0 if across else 1, sets != "rms", 0.0, 1e-5, "none", 0.0, None
        )  # fmt: skip
        assert total.numel() == 0
    assert stats.shape == shape and stats.dtype == acc and stats.is_contiguous()
    unit = roundoff(acc)
    if sets == "rms":
        want = (rows.square().mean(-1) + 1e-5).rsqrt()
    else:
        rows = rows - 100  # exact
        high, low, _ = stats.double()
        std = rows.std(-1, unbiased=False)
        want = (std.square() + 1e-5).rsqrt()
        assert ((high - 100 - rows.mean(-1)).abs() <= 2 * unit * 128).all(), "the first number is the mean, rounded"
        assert (((rows + 100 - high[..., None]).mean(-1) - low).abs() <= 8 * unit * std).all(), "the second what that lost, exact to the spread"
    assert ((stats[-1].double() - want).abs() <= 8 * unit * want).all()
    assert y.dtype == dtype


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("op", ["group", "frozen", "last", "across", "added"])
def test_backward_mask(op, activation, backend, device, poison):
    """X_bwd: what the mask leaves out comes back with no elements."""
    x, dy, residual = torch.randn(3, 2, 6, 5, device=device)
    weight, bias = torch.randn(2, 5 if op in ("last", "added") else 6, device=device)
    if op in ("group", "frozen"):
        given = torch.rand(3, 1, 3, device=device) if op == "frozen" else None
        _, stats = torch.ops.normops.group_norm_fwd(x, weight, bias, residual, given, 3, 1e-5, activation, 0.0, None)
        stats = stats if given is None else given
        backward = torch.ops.normops.group_norm_bwd
        args = (dy, x, stats, weight, bias, residual, 3, op == "frozen", activation, 0.0)
    else:
        ndim, addend = int(op != "across"), residual if op == "added" else None
        residual = None if op == "added" else residual
        _, total, stats = torch.ops.normops.row_norm_fwd(x, addend, weight, bias, residual, ndim, True, 0.0, 1e-5, activation, 0.0, None)
        backward = torch.ops.normops.row_norm_bwd
        args = (dy, addend, x if addend is None else total, stats, weight, bias, residual, ndim, True, 0.0, activation, 0.0)
    whole = backward(*args, (True,) * 4)
    for mask in itertools.product((True, False), repeat=4):
        for gradient, wanted, expected in zip(backward(*args, mask), mask, whole, strict=True):
            assert torch.equal(gradient, expected if wanted else expected.new_empty(0))
            assert not gradient.isnan().any()


def test_every_activation_code_reaches_the_kernel(backend, device):
    """Each name computes its own function: no two alike, and none falls to another's branch."""
    x = torch.randn(2, 4, 64, device=device)
    for norm in (lambda x, **options: normops.group_norm(x, 2, **options), lambda x, **options: normops.layer_norm(x, 64, **options)):
        found = {name: norm(x, activation=name, negative_slope=0.3) for name in CODES}
        for first, second in itertools.combinations(found, 2):
            assert not torch.allclose(found[first], found[second], atol=1e-5), (first, second)


@some(
    "everything", "instance_modulation_cl", "frozen_modulation_cf", "adain_fused_cl", "layer_modulation_cl", "layer_norm_adaLN_affine",
    "rms_norm_residual_silu", "add_layer_norm_adaLN_affine", "add_rms_norm_bfloat16",
)  # fmt: skip
def test_inputs_are_left_alone(case, backend, device):
    """No input is written, not even where it is a view of a larger tensor."""
    inputs = Inputs.of(case, device)
    given = [*inputs.tensors.values(), inputs.dy, *inputs.running, *(() if inputs.dtotal is None else (inputs.dtotal,))]
    before = [value.clone() for value in given]
    result = inputs.run()
    assert all(torch.equal(value, old) for value, old in zip(given, before, strict=True))
    outputs = [result.y, *(() if result.total is None else (result.total,))]
    assert not {y.data_ptr() for y in outputs} & {value.data_ptr() for value in given}, "the result is no input"


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("shape", [(3, 35, 7, 3), (2, 5, 1, 67)], ids=["odd", "few"])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_written_outside(kind, shape, residual, backend, device, monkeypatch):
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

    inputs = Inputs.of(case_of(kind, "guards", shape, 5, residual=residual, activation="silu"), device)
    with monkeypatch.context() as patch:
        patch.setattr(ops.torch, "empty_like", like)
        patch.setattr(torch.Tensor, "new_empty", lambda x, size, dtype=None: guarded(size, new_empty(x, size, dtype=dtype).stride(), dtype))
        result = inputs.run()
    kernels = len(inputs.tensors) - ("add" in kind)  # gradients; of an addition one for both
    assert len(guards) >= 2 + kernels - ("frozen" in kind) + (result.total is not None), "y, sum, stats and gradients"
    for whole in guards:
        assert (whole[:pad] == 12345).all() and (whole[-pad:] == 12345).all()
    check(result, inputs)


@pytest.mark.parametrize("order", ["contiguous", "channels_last"])
def test_composed_is_what_torch_offers(order):
    """The oracle's compositions are torch's norms, then the torch functions of those names, in that order."""
    x, residual = (LAYOUTS[order](torch.randn(2, 6, 5, 4, dtype=torch.float64)) for _ in range(2))
    weight, bias, mean, var = torch.rand(4, 6, dtype=torch.float64) + 0.5
    scale, shift = torch.randn(2, 2, 6, dtype=torch.float64)
    fused = {"weight": weight, "eps": 1e-3, "activation": "silu", "scale": scale, "shift": shift}

    def follows(t, vectors=(scale[..., None, None], shift[..., None, None]), added=residual):
        return F.silu(t * (1 + vectors[0]) + vectors[1] + added)

    def close(norm, got, want):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13, msg=lambda text: f"{norm}: {text}")

    for norm, how, t in (
        ("group_norm", {"num_groups": 3, "bias": bias}, F.group_norm(x, 3, weight, bias, 1e-3)),
        ("instance_norm", {"bias": bias}, F.instance_norm(x, None, None, weight, bias, eps=1e-3)),
        (
            "instance_norm",
            {"running_mean": mean, "running_var": var, "bias": bias, "use_input_stats": False},
            F.batch_norm(x, mean, var, weight, bias, eps=1e-3),
        ),
        ("layer_norm", {"normalized_shape": (6,), "dim": 1, "bias": bias}, F.layer_norm(x.movedim(1, 3), (6,), weight, bias, 1e-3).movedim(3, 1)),
        ("rms_norm", {"normalized_shape": (6,), "dim": 1, "weight_offset": 1.0}, F.rms_norm(x.movedim(1, 3), (6,), weight + 1, 1e-3).movedim(3, 1)),
    ):  # fmt: skip
        close(norm, COMPOSED[norm](x, residual=residual, **fused, **how), follows(t))
    x, residual = x.movedim(1, -1), residual.movedim(1, -1)
    over = scale[:, None, None], shift[:, None, None]
    close(
        "rms_norm",
        COMPOSED["rms_norm"](x, normalized_shape=(6,), residual=residual, **fused),
        follows(F.rms_norm(x, (6,), weight, 1e-3), over, residual),
    )
    for norm, t in (
        ("add_layer_norm", F.layer_norm(x + residual, (6,), weight, bias, 1e-3)),
        ("add_rms_norm", F.rms_norm(x + residual, (6,), weight, 1e-3)),
    ):
        y, total = COMPOSED[norm](x, residual, normalized_shape=(6,), **fused, **({"bias": bias} if "layer" in norm else {}))
        close(norm, y, follows(t, over, 0))
        assert torch.equal(total, x + residual)
