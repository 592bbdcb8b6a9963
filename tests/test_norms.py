"""Every norm, forward and gradients, on every backend: the cases of ``cases.py``, and what the tolerance alone does not say of a call."""

import inspect
import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import BATCH, CASES, COMPOSED, IN_PLACE, KINDS, LAYOUTS, NORM_CASES, Inputs, assert_layout, case_of, check, grid, roundoff

import normops
from normops import backends, launch, reference
from normops.reference import CODES

ALL = CASES | NORM_CASES
NAMES = ("x", "weight", "bias", "residual")  # of which kernels compute gradients


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
    "batch_2d_cf", "batch_C33_cl", "batch_NC_cl", "batch_classifier", "batch_out_f32_cl", "batch_eval_2d_cl", "renorm_modulation_cf", "renorm_odd",
    "blend_2d_cf", "blend_modulation_cl", "blend_eval_NC_cf",
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
    "frozen_modulation_cf", "frozen_modulation_cl", "adain_fused_cf", "batch_C33_cf", "batch_NC_cl", "batch_modulation_cf", "batch_modulation_cl",
    "batch_odd", "batch_eval_modulation_cl", "renorm_modulation_cf", "renorm_C33_cl", "blend_modulation_cf", "blend_C33_cl", "layer_modulation_cf",
    "layer_modulation_cl", "rms_C33_cl", "layer_norm_adaLN_affine", "layer_norm_residual_silu", "layer_norm_D17", "rms_norm_qk_norm",
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
@pytest.mark.parametrize("kind, wanted", [(kind, name) for kind in KINDS for name in NAMES if name != "bias" or "rms" not in kind])
def test_unwanted_gradients_are_not_computed(wanted, activation, kind, backend, device, monkeypatch):
    """The launcher makes nothing for what requires no grad; a linear residual's gradient is dy, and no kernel makes that either."""
    made = []

    def recorded(launch):
        return lambda *args: made.append(launch(*args)) or made[-1]

    for name in ("group_norm_bwd", "batch_norm_bwd", "row_norm_bwd"):
        monkeypatch.setattr(launch, name, recorded(getattr(launch, name)))
    inputs = Inputs.of(case_of(kind, "mask", (2, 6, 5), 3, residual=True, activation=activation), device)
    inputs.run(wanted=(wanted,))
    computed = "x" if wanted == "residual" and "add" in kind else wanted
    expected = [name == computed and not (name == "residual" and activation == "none") for name in NAMES]
    if "renorm" in kind and "eval" not in kind and wanted == "weight":
        expected[2] = True  # the kernel's bias is bias + weight*d
    found = [[gradient is not None for gradient in gradients] for gradients in made]
    if "batch_instance" in kind:  # the sums are also the gradients of the statistics, of which its vectors are made
        sums = [False, True, True, False]
        assert sums in found or wanted == "residual"
        found, expected = [made for made in found if made != sums], expected if wanted in ("x", "residual") else [False] * 4
    assert [made for made in found if any(made)] == [expected] * any(expected)


@some(  # what kernels may do differently: sums over programs, over samples, over threads; both memory orders
    "long_group", "many_small_groups", "many_samples", "cl_long", "cl_C320", "cl_many_positions", "everything", "bf16_long", "instance_C320_cf",
    "instance_C320_cl", "instance_large_S_cf", "instance_large_S_cl", "instance_many_samples_cl", "frozen_large_S_cf", "frozen_large_S_cl",
    "frozen_C320_cl", "adain_fused_cl", "batch_C320_cf", "batch_C320_cl", "batch_large_S_cf", "batch_large_S_cl", "batch_long_cf", "batch_long_cl",
    "batch_many_samples_cf", "batch_many_samples_cl", "batch_many_large_samples_cf", "batch_many_large_samples_cl", "batch_NC_long_cf",
    "batch_NC_long_cl", "batch_NC_wide_cl", "batch_tall", "batch_wide", "renorm_many_samples_cl", "blend_large_planes_cf", "blend_many_samples_cl",
    "layer_large_S_cf", "layer_large_S_cl", "layer_C4099_cf", "rms_C4099_cl", "rms_C70001_cf", "layer_many_samples_cf", "layer_norm_tiny_rows",
    "layer_norm_many_rows", "layer_norm_long_row", "rms_norm_long_rows", "layer_norm_transformer", "rms_norm_bf16_long", "layer_norm_adaLN_affine",
    "add_layer_norm_many_rows", "add_rms_norm_transformer",
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
            for key, value in again.running.items():
                assert torch.equal(value, first.running[key]), f"{key} with {count} threads"
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", KINDS)
def test_hundred_runs(kind, backend, device):
    """The same bits wherever the allocator puts the results; of larger tensors, in ``test_gpu.py``."""
    inputs = Inputs.of(case_of(kind, "a hundred runs", (3, 10, 7, 3), activation="silu"), device)
    first, kept = inputs.run(), []
    for _ in range(99):
        again = inputs.run()
        kept.append(again.y)  # other addresses each time
        for mine, other in ((again.gradients, first.gradients), (again.running, first.running), ({"y": again.y}, {"y": first.y})):
            assert all(torch.equal(value, other[name]) for name, value in mine.items())


SHAPES = {"small": (2, 6, 9, 11), "long": (1, 4, 130, 131), "S1": (3, 32, 1, 1), "wide": (2, 40, 8, 8)}


@grid([kind for kind in KINDS if kind not in BATCH], **SHAPES)
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


@grid([kind for kind in KINDS if "batch" in kind], **SHAPES)
def test_channels_do_not_meet(kind, shape, backend, device):
    """Some channels give what they give among others. NaN in one stays in it."""
    inputs = Inputs.of(case_of(kind, "channels", (shape[0], shape[1] + 1, *shape[2:]), activation="silu"), device)
    inputs.tensors["x"][:, -1] = torch.nan
    whole = inputs.run()
    assert whole.y[:, -1].isnan().all()
    x, running = (value[:, :-1] for value in (inputs.tensors["x"], torch.stack(inputs.running)))
    tensors = {name: value[..., :-1] for name, value in inputs.tensors.items()} | {"x": LAYOUTS[inputs.case.layout](x)}
    part = replace(inputs, tensors=tensors, dy=inputs.dy[:, :-1], running=tuple(running)).run()
    torch.testing.assert_close(part.y, whole.y[:, :-1], rtol=4e-7, atol=4e-7)
    for name, value in part.gradients.items():
        cut = whole.gradients[name][:, :-1] if name == "x" else whole.gradients[name][..., :-1]
        torch.testing.assert_close(value, cut, rtol=2e-6, atol=2e-6 * (shape[0] * 50 if name != "x" else 1))
    for name, value in part.running.items():
        torch.testing.assert_close(value, whole.running[name][:-1], rtol=4e-7, atol=4e-7)


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
    **dict.fromkeys(("group_norm", "instance_norm", "frozen", "batch_norm", "batch_norm_eval", "batch_renorm", "batch_instance_norm"), IN_PLACE),
    **dict.fromkeys(("layer_norm_cf", "rms_norm_cf"), IN_PLACE),
    **dict.fromkeys(("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"), ("contiguous", "offset")),
}
LAUNCHED = {  # kind -> its kernels, unless they are one pair
    "batch_norm": ["batch_norm_fwd", "batch_norm_bwd"],
    "batch_renorm": ["batch_norm_fwd", "group_norm_fwd", "batch_norm_bwd"],
    "batch_instance_norm": ["group_norm_fwd", "group_norm_fwd", "group_norm_bwd", "group_norm_bwd"],
}


@pytest.mark.parametrize("kind", READ)
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout not in ("scalar", "expanded_positions")])
def test_kernels_read_in_place(layout, kind, backend, device, monkeypatch):
    """Dense x, dy and residual reach the kernels as they are; other x is packed once, forward, and its packed copy is what is saved."""
    monkeypatch.setattr(backends, "everyday", False)
    case = replace(case_of(kind, "in place", (4, 6, 5, 8), 3, activation="silu"), shape=(4, 6, 5, 8), layout=layout)
    in_place = layout in READ[kind]
    inputs = Inputs.of(replace(case, residual=layout if in_place else "contiguous"), device)
    calls = launched(inputs, monkeypatch)
    family = "row_norm" if case.rows else "group_norm"
    assert [call["op"] for call in calls] == LAUNCHED.get(kind, [f"{family}_fwd", f"{family}_bwd"])
    forward, backward = ([call for call in calls if call["op"].endswith(way)] for way in ("fwd", "bwd"))
    x, given = forward[0]["x"], inputs.tensors["x"]
    assert (x.data_ptr() == given.data_ptr()) == in_place
    assert all(call["x"].data_ptr() == x.data_ptr() for call in forward)
    kept = x if forward[-1].get("total") is None else forward[-1]["total"]
    for call in backward:
        assert call["x"].data_ptr() == kept.data_ptr() and call["x"].stride() == kept.stride()
        assert call["dy"].data_ptr() == inputs.dy.data_ptr()
    if not case.rows:
        assert all(call["channels_last"] == ("channels_last" in layout) for call in calls)
    if in_place:
        addend = forward[-1]["residual"] if forward[-1].get("addend") is None else forward[-1]["addend"]
        assert addend.data_ptr() == inputs.tensors["residual"].data_ptr()
        assert backward[-1]["dx"].stride() == x.stride()


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 1, 1)], ids=str)
@pytest.mark.parametrize("kind", ["frozen", "batch_norm", "batch_norm_conditional", "batch_norm_eval", "batch_renorm"])
def test_one_position_is_channels_last(kind, shape, backend, device, monkeypatch):
    """Both orders are one, and kernels are told the one in which channels are adjacent."""
    monkeypatch.setattr(backends, "everyday", False)
    calls = launched(Inputs.of(case_of(kind, "one position", shape), device), monkeypatch)
    assert len(calls) >= 2 and all(call["channels_last"] for call in calls)


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
    if case.scale and len(case.shape) == 2:
        pytest.skip("a vector for each sample is as large as x")
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
    vectors = 8 if case.scale or "batch_instance" in kind or "renorm" in kind else 2
    vectors *= case.shape[0] if case.scale or "batch_instance" in kind or case.weight == "NC" else 1
    assert sum(value.numel() for value in small) <= statistics + torch.Size(case.vector).numel() * vectors


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("sets", ["group", "moments", "batch", "batch_moments", "layer", "rms", "last"])
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
    elif sets in ("batch", "batch_moments"):
        rows, shape = exact.transpose(0, 1).flatten(1).unsqueeze(0), (4, 1, 10)
        if sets == "batch":
            y, stats = torch.ops.normops.batch_norm_fwd(x, None, None, None, None, 1e-5, "none", 0.0, None)
        else:
            y, stats = x, torch.ops.normops.batch_norm_stats(x, 1e-5)
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
    if shape[0] == 4:
        *stats, variance = stats
        exact = (rows - 100).var(-1)
        assert ((variance.double() - exact).abs() <= 8 * unit * exact).all(), "the last is the unbiased variance"
        stats = torch.stack(stats)
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
@pytest.mark.parametrize("op", ["group", "frozen", "batch", "conditional", "last", "across", "added"])
def test_backward_mask(op, activation, backend, device, poison):
    """X_bwd: what the mask leaves out comes back with no elements."""
    x, dy, residual = torch.randn(3, 2, 6, 5, device=device)
    weight, bias = torch.randn(2, 5 if op in ("last", "added") else 6, device=device)
    if op in ("batch", "conditional"):
        weight, bias = (value.expand(2, 6).contiguous() if op == "conditional" else value for value in (weight, bias))
        _, stats = torch.ops.normops.batch_norm_fwd(x, weight, bias, residual, None, 1e-5, activation, 0.0, None)
        backward = torch.ops.normops.batch_norm_bwd
        args = (dy, x, stats, weight, bias, residual, activation, 0.0)
    elif op in ("group", "frozen"):
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
    for norm in (
        lambda x, **options: normops.group_norm(x, 2, **options),
        lambda x, **options: normops.batch_norm(x, None, None, training=True, **options),
        lambda x, **options: normops.layer_norm(x, 64, **options),
    ):
        found = {name: norm(x, activation=name, negative_slope=0.3) for name in CODES}
        for first, second in itertools.combinations(found, 2):
            assert not torch.allclose(found[first], found[second], atol=1e-5), (first, second)


@some(
    "everything", "instance_modulation_cl", "frozen_modulation_cf", "adain_fused_cl", "batch_modulation_cl", "batch_NC_cf",
    "batch_eval_modulation_cf", "renorm_modulation_cf", "renorm_eval_2d_cl", "blend_modulation_cf", "blend_eval_NC_cl", "layer_modulation_cl",
    "layer_norm_adaLN_affine", "rms_norm_residual_silu", "add_layer_norm_adaLN_affine", "add_rms_norm_bfloat16",
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
    guards, pad = [], 64

    def guarded(size, stride, dtype):
        numel = 1 + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        whole = torch.full((numel + 2 * pad,), 12345.0, dtype=dtype, device=device)
        guards.append(whole)
        return whole[pad:-pad].as_strided(size, stride).fill_(torch.nan)

    def within(make):
        def made(*args, **options):
            value = make(*args, **options)
            return guarded(value.shape, value.stride(), value.dtype)

        return made

    inputs = Inputs.of(case_of(kind, "guards", shape, 5, residual=residual, activation="silu"), device)
    elsewhere = inputs.run()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", within(torch.empty_like))
        patch.setattr(torch.Tensor, "new_empty", within(torch.Tensor.new_empty))
        result = inputs.run()
    kernels = len(inputs.tensors) - ("add" in kind) - ("rho" in inputs.tensors)  # gradients; of an addition one for both
    kernels += 2 * (kind in BATCH) + (result.total is not None) - (inputs.case.frozen and "rho" not in inputs.tensors)
    assert len(guards) >= 2 + kernels, "y, sum, stats, running statistics and gradients"
    for whole in guards:
        assert (whole[:pad] == 12345).all() and (whole[-pad:] == 12345).all()
    assert torch.equal(result.y, elsewhere.y)
    for found in ("gradients", "running"):
        for name, value in getattr(result, found).items():
            assert torch.equal(value, getattr(elsewhere, found)[name]), name


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

    def over(vector):
        return vector[..., None, None]

    ours, theirs = (mean.clone(), var.clone()), (mean.clone(), var.clone())
    by_batch = F.batch_norm(x, *theirs, training=True, momentum=0.3, eps=1e-3)
    tracked = {"running_mean": ours[0], "running_var": ours[1], "training": True, "momentum": 0.3, "bias": bias}
    close("batch_norm", COMPOSED["batch_norm"](x, residual=residual, **fused, **tracked), follows(by_batch * over(weight) + over(bias)))
    for mine, other in zip(ours, theirs, strict=True):
        close("running statistics", mine, other)
    evaluated = {"running_mean": mean, "running_var": var, "bias": bias}
    gate = torch.rand(6, dtype=torch.float64)
    blended = over(gate) * F.batch_norm(x, mean, var, eps=1e-3) + over(1 - gate) * F.instance_norm(x, eps=1e-3)
    for norm, how, t in (
        ("batch_instance_norm", evaluated | {"rho": gate}, blended * over(weight) + over(bias)),
        ("batch_norm", evaluated, F.batch_norm(x, mean, var, weight, bias, eps=1e-3)),
        ("batch_renorm", {"running_mean": mean, "running_std": var, "bias": bias}, F.batch_norm(x, mean, var**2, weight, bias, eps=0)),
        ("batch_renorm", {"running_mean": ours[0], "running_std": ours[1], "bias": bias, "training": True},
         F.batch_norm(x, None, None, weight, bias, True, eps=1e-3)),
        ("batch_renorm", {"running_mean": mean.clone(), "running_std": var.clone(), "bias": bias, "training": True, "r_max": 1e9, "d_max": 1e9},
         F.batch_norm(x, mean, var**2, weight, bias, eps=0)),
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
