"""Wrong calls raise ValueError or TypeError at the door, with one sentence; what a backend cannot do raises NotImplementedError."""

import inspect

import pytest
import torch
import torch.nn.functional as F

import normops
from normops import backends

IMAGE, SEQUENCE = (2, 6, 4), (2, 5, 6)


def batch():
    return {"x": torch.randn(IMAGE), "running_mean": torch.zeros(6), "weight": torch.randn(6), "bias": torch.randn(6), "training": True}


FUNCTIONS = {  # right calls: the function and its arguments, of 6 channels or rows of 6
    "group_norm": (normops.group_norm, lambda: {"x": torch.randn(IMAGE), "num_groups": 3, "weight": torch.randn(6), "bias": torch.randn(6)}),
    "instance_norm": (normops.instance_norm, lambda: {
        "x": torch.randn(IMAGE), "running_mean": torch.zeros(6), "running_var": torch.ones(6), "weight": torch.randn(6), "bias": torch.randn(6)
    }),
    "adaptive_instance_norm": (normops.adaptive_instance_norm, lambda: {"x": torch.randn(IMAGE), "style": torch.randn(2, 6, 3)}),
    "batch_norm": (normops.batch_norm, lambda: batch() | {"running_var": torch.ones(6)}),
    "sync_batch_norm": (normops.sync_batch_norm, lambda: batch() | {"running_var": torch.ones(6)}),
    "batch_renorm": (normops.batch_renorm, lambda: batch() | {"running_std": torch.ones(6)}),
    "batch_instance_norm": (normops.batch_instance_norm, lambda: batch() | {"running_var": torch.ones(6), "rho": torch.rand(6)}),
    "layer_norm": (normops.layer_norm, lambda: {
        "x": torch.randn(SEQUENCE), "normalized_shape": [6], "weight": torch.randn(6), "bias": torch.randn(6)
    }),
    "layer_norm_dim1": (normops.layer_norm, lambda: {
        "x": torch.randn(IMAGE), "normalized_shape": [6], "weight": torch.randn(6), "bias": torch.randn(6), "dim": 1
    }),
    "rms_norm": (normops.rms_norm, lambda: {"x": torch.randn(SEQUENCE), "normalized_shape": [6], "weight": torch.randn(6)}),
    "rms_norm_dim1": (normops.rms_norm, lambda: {"x": torch.randn(IMAGE), "normalized_shape": [6], "weight": torch.randn(6), "dim": 1}),
    "add_layer_norm": (normops.add_layer_norm, lambda: {
        "x": torch.randn(SEQUENCE), "residual": torch.randn(SEQUENCE), "normalized_shape": [6], "weight": torch.randn(6), "bias": torch.randn(6)
    }),
    "add_rms_norm": (normops.add_rms_norm, lambda: {
        "x": torch.randn(SEQUENCE), "residual": torch.randn(SEQUENCE), "normalized_shape": [6], "weight": torch.randn(6)
    }),
}  # fmt: skip


def call(name, *, operator=False, **changes):
    """A right call, but for `changes`."""
    function, right = FUNCTIONS[name]
    arguments = right() | changes
    entry = getattr(torch.ops.normops, function.__name__) if operator else function
    return entry(arguments.pop("x"), **arguments)


def wrong_x(change):
    """Changes to x and to what must be like it."""
    return lambda x, right: {"x": change(x), **({"residual": change(x)} if "residual" in right else {})}


# changes to the right call as a function of x and of its arguments, exception, what the message says: expected, got
GENERAL = {
    "integer_x": (wrong_x(torch.Tensor.long), TypeError, "x of dtype .*, got torch.int64"),
    "complex_x": (wrong_x(lambda x: x.to(torch.complex64)), TypeError, "x of dtype .*, got torch.complex64"),
    "bool_x": (wrong_x(torch.Tensor.bool), TypeError, "x of dtype .*, got torch.bool"),
    "weight_shape": (lambda x, _: {"weight": torch.randn(32)}, ValueError, r"weight of shape \(6,\)( or \(2, 6\))?, got \(32,\)"),
    "weight_groups": (lambda x, _: {"weight": torch.randn(3)}, ValueError, r"weight of shape .*, got \(3,\)"),
    "weight_scalar": (lambda x, _: {"weight": torch.tensor(1.0)}, ValueError, r"weight of shape .*, got \(\)"),
    "weight_broadcast": (lambda x, _: {"weight": torch.randn(1, 6)}, ValueError, r"weight of shape .*, got \(1, 6\)"),
    "weight_C_1": (lambda x, _: {"weight": torch.randn(6, 1)}, ValueError, r"weight of shape .*, got \(6, 1\)"),
    "bias_shape": (lambda x, _: {"bias": torch.randn(5)}, ValueError, r"bias of shape \(6,\)( or \(2, 6\))?, got \(5,\)"),
    "bias_samples": (lambda x, _: {"bias": torch.randn(3, 6)}, ValueError, r"bias of shape .*, got \(3, 6\)"),
    "weight_dtype": (lambda x, _: {"weight": torch.ones(6, dtype=torch.int32)}, TypeError, "weight of dtype .*, got torch.int32"),
    "bias_dtype": (lambda x, _: {"bias": torch.ones(6, dtype=torch.complex64)}, TypeError, "bias of dtype .*, got torch.complex64"),
    "weight_device": (lambda x, _: {"weight": torch.randn(6, device="meta")}, ValueError, "weight on x's device cpu, got meta"),
    "bias_device": (lambda x, _: {"bias": torch.randn(6, device="meta")}, ValueError, "bias on x's device cpu, got meta"),
    "x_device": (lambda x, _: {"x": x.to("meta"), "weight": torch.randn(6)}, ValueError, "weight on x's device meta, got cpu"),
    "residual_shape": (lambda x, _: {"residual": x[..., 1:]}, ValueError, r"residual of x's shape \(2, \d, \d\), got \(2, \d, \d\)"),
    "residual_broadcast": (lambda x, _: {"residual": x[:1]}, ValueError, r"residual of x's shape .*, got \(1, \d, \d\)"),
    "residual_rank": (lambda x, _: {"residual": x[0]}, ValueError, r"residual of x's shape .*, got \(\d, \d\)"),
    "residual_dtype": (lambda x, _: {"residual": x.half()}, TypeError, "residual of x's dtype torch.float32, got torch.float16"),
    "residual_device": (lambda x, _: {"residual": x.to("meta")}, ValueError, "residual on x's device cpu, got meta"),
    "scale_shape": (lambda x, _: {"scale": torch.randn(6)}, ValueError, r"scale of shape \(2, 6\), got \(6,\)"),
    "scale_full": (lambda x, _: {"scale": x}, ValueError, r"scale of shape \(2, 6\), got \(2, \d, \d\)"),
    "scale_broadcast": (lambda x, _: {"scale": torch.randn(1, 6)}, ValueError, r"scale of shape \(2, 6\), got \(1, 6\)"),
    "shift_shape": (lambda x, _: {"shift": torch.randn(2, 3)}, ValueError, r"shift of shape \(2, 6\), got \(2, 3\)"),
    "scale_dtype": (lambda x, _: {"scale": torch.ones(2, 6, dtype=torch.long)}, TypeError, "scale of dtype .*, got torch.int64"),
    "shift_device": (lambda x, _: {"shift": torch.randn(2, 6, device="meta")}, ValueError, "shift on x's device cpu, got meta"),
    "weight_shape_with_scale": (
        lambda x, _: {"weight": torch.randn(5), "scale": torch.randn(2, 6)}, ValueError, r"weight of shape .*, got \(5,\)"
    ),
    "bias_shape_with_shift": (lambda x, _: {"bias": torch.randn(1), "shift": torch.randn(2, 6)}, ValueError, r"bias of shape .*, got \(1,\)"),
    "weight_dtype_with_scale": (
        lambda x, _: {"weight": torch.ones(6).long(), "scale": torch.randn(2, 6)}, TypeError, "weight of dtype .*, got torch.int64"
    ),
    "integer_x_with_scale": (
        lambda x, right: wrong_x(torch.Tensor.long)(x, right) | {"scale": torch.randn(2, 6)}, TypeError, "x of dtype .*, got torch.int64"
    ),
    "eps_negative": (lambda x, _: {"eps": -1e-5}, ValueError, "eps >= 0, got -1e-05"),
    "eps_nan": (lambda x, _: {"eps": float("nan")}, ValueError, "eps >= 0, got nan"),
    "activation": (lambda x, _: {"activation": "swish"}, ValueError, "activation out of none, relu, .*, got 'swish'"),
    "activation_case": (lambda x, _: {"activation": "SiLU"}, ValueError, "activation out of .*, got 'SiLU'"),
    "activation_empty": (lambda x, _: {"activation": ""}, ValueError, "activation out of .*, got ''"),
    "out_dtype_narrow": (lambda x, _: {"out_dtype": torch.float16}, TypeError, "out_dtype .*, got torch.float16"),
    "out_dtype_integer": (lambda x, _: {"out_dtype": torch.int32}, TypeError, "out_dtype .*, got torch.int32"),
    "out_dtype_wide": (lambda x, _: {"out_dtype": torch.float64}, TypeError, "out_dtype .*, got torch.float64"),
    "out_dtype_f64": (
        lambda x, right: wrong_x(torch.Tensor.double)(x, right) | {"out_dtype": torch.float32}, TypeError, "out_dtype .*, got torch.float32"
    ),
    "out_dtype_other_half": (
        lambda x, right: wrong_x(torch.Tensor.half)(x, right) | {"out_dtype": torch.bfloat16}, TypeError, "out_dtype .*, got torch.bfloat16"
    ),
}  # fmt: skip
CHANNELS = {
    "rank_1": (lambda x, _: {"x": torch.randn(6)}, ValueError, r"x of shape \(N, C, \*spatial\), got \(6,\)"),
    "rank_0": (lambda x, _: {"x": torch.tensor(1.0)}, ValueError, r"x of shape \(N, C, \*spatial\), got \(\)"),
}
LAST = "input whose last dimensions are normalized_shape"
ROWS = {
    "normalized_shape": (lambda x, _: {"normalized_shape": [5]}, ValueError, rf"{LAST} \(5,\), got \(2, 5, 6\)"),
    "normalized_shape_rank": (lambda x, _: {"normalized_shape": [2, 2, 5, 6]}, ValueError, rf"{LAST} \(2, 2, 5, 6\), got \(2, 5, 6\)"),
    "normalized_shape_inner": (lambda x, _: {"normalized_shape": [2, 5]}, ValueError, rf"{LAST} \(2, 5\), got \(2, 5, 6\)"),
    "normalized_shape_empty": (lambda x, _: {"normalized_shape": []}, ValueError, rf"{LAST} \(\), got \(2, 5, 6\)"),
    "normalized_shape_broadcast": (lambda x, _: {"normalized_shape": [1]}, ValueError, rf"{LAST} \(1,\), got"),
    "rank_0": (lambda x, _: {"x": torch.tensor(1.0)}, ValueError, rf"{LAST} \(6,\), got \(\)"),
    "scale_of_no_sample": (
        lambda x, right: {"x": x[0, 0], "scale": torch.randn(6)} | ({"residual": x[0, 0]} if "residual" in right else {}), ValueError,
        r"input of shape \(N, \.\.\., \*normalized_shape\) beside scale and shift, got \(6,\)",
    ),
    "weight_of_two_dimensions": (
        lambda x, _: {"normalized_shape": [5, 6], "weight": torch.randn(6)}, ValueError, r"weight of shape \(5, 6\), got \(6,\)"
    ),
}  # fmt: skip
DIM = {
    "dim_0": (lambda x, _: {"dim": 0}, ValueError, r"dim=1 with normalized_shape \(6,\) or dim=None, got dim=0 with \(6,\)"),
    "dim_last": (lambda x, _: {"dim": -1}, ValueError, r"dim=1 .*, got dim=-1 with \(6,\)"),
    "normalized_shape": (lambda x, _: {"normalized_shape": [4]}, ValueError, r"dim=1 with normalized_shape \(6,\) .*, got dim=1 with \(4,\)"),
    "two_dimensions": (lambda x, _: {"normalized_shape": [6, 4]}, ValueError, r"dim=1 .*, got dim=1 with \(6, 4\)"),
}


def running(flag, second="running_var"):
    """Running statistics that do not fit; `flag` False: those normalize."""
    one = torch.ones(6)
    return {
        "running_mean_shape": (lambda x, _: {"running_mean": torch.zeros(5)}, ValueError, r"running_mean of shape \(6,\), got \(5,\)"),
        "running_mean_samples": (lambda x, _: {"running_mean": torch.zeros(2, 6)}, ValueError, r"running_mean of shape \(6,\), got \(2, 6\)"),
        "second_scalar": (lambda x, _: {second: torch.tensor(1.0)}, ValueError, rf"{second} of shape \(6,\), got \(\)"),
        "second_dtype": (lambda x, _: {second: one.long()}, TypeError, f"{second} of dtype .*, got torch.int64"),
        "running_mean_device": (lambda x, _: {"running_mean": one.to("meta")}, ValueError, "running_mean on x's device cpu, got meta"),
        "running_mean_alone": (lambda x, _: {second: None}, ValueError, f"running_mean and {second}.*, got"),
        "second_alone": (lambda x, _: {"running_mean": None}, ValueError, f"running_mean and {second}.*, got"),
        "running_mean_requires_grad": (lambda x, _: {"running_mean": torch.zeros(6, requires_grad=True)}, ValueError, "running_mean .*grad"),
        "second_requires_grad": (lambda x, _: {second: torch.ones(6, requires_grad=True)}, ValueError, f"{second} .*grad"),
        "no_running_mean": (lambda x, _: {"running_mean": None, flag: False}, ValueError, f"running_mean when {flag} is False, got None"),
        "no_second": (lambda x, _: {second: None, flag: False}, ValueError, f"{second} when {flag} is False, got None"),
    }


ONE_POSITION = {
    "one_position": (lambda x, _: {"x": x[..., :1]}, ValueError, r"more than 1 position to compute statistics from, got .* \(2, 6, 1\)"),
    "no_position": (lambda x, _: {"x": x[..., 0]}, ValueError, r"more than 1 position to compute statistics from, got .* \(2, 6\)"),
}
ONE_VALUE = {
    "one_value": (lambda x, _: {"x": x[:1, :, :1]}, ValueError, r"more than 1 value per channel in training, got input of shape \(1, 6, 1\)"),
    "one_sample": (lambda x, _: {"x": x[:1, :, 0]}, ValueError, r"more than 1 value per channel in training, got input of shape \(1, 6\)"),
    "no_channels": (lambda x, _: {"x": torch.randn(2, 0, 4)}, ValueError, ".*, got"),
}
SINGLE = {
    "on_single_value": (lambda x, _: {"on_single_value": "skip"}, ValueError, "on_single_value out of raise, running, got 'skip'"),
    "on_single_value_without_statistics": (
        lambda x, _: {"x": x[:1, :, :1], "on_single_value": "running", "running_mean": None, "running_var": None}, ValueError,
        "running_mean .*single value per channel.*, got None",
    ),
}  # fmt: skip
STYLE = r"style of shape \(2, 6, \*\), got"
SPECIAL = {
    "group_norm": CHANNELS | {
        "groups_do_not_divide": (lambda x, _: {"num_groups": 4}, ValueError, "num_groups to divide the number of channels 6, got 4"),
        "more_groups_than_channels": (lambda x, _: {"num_groups": 12}, ValueError, "num_groups .* channels 6, got 12"),
        "no_groups": (lambda x, _: {"num_groups": 0}, ValueError, "num_groups .* channels 6, got 0"),
        "negative_groups": (lambda x, _: {"num_groups": -3}, ValueError, "num_groups .* channels 6, got -3"),
        "no_channels": (lambda x, _: {"x": torch.randn(2, 0, 4)}, ValueError, "num_groups .* channels 0, got 3"),
        "rank_1_with_scale": (lambda x, _: {"x": torch.randn(6), "scale": torch.randn(6)}, ValueError, r"x of shape \(N, C, .*, got \(6,\)"),
    },
    "instance_norm": CHANNELS | ONE_POSITION | running("use_input_stats"),
    "batch_norm": CHANNELS | ONE_VALUE | SINGLE | running("training"),
    "sync_batch_norm": CHANNELS | ONE_VALUE | SINGLE | running("training"),
    "batch_renorm": CHANNELS | ONE_VALUE | running("training", "running_std") | {
        "no_statistics": (lambda x, _: {"running_mean": None, "running_std": None}, ValueError, "running_mean and running_std, got None"),
        "r_max_shape": (lambda x, _: {"r_max": torch.ones(2)}, ValueError, r"r_max of one element, got shape \(2,\)"),
        "d_max_shape": (lambda x, _: {"d_max": torch.ones(6)}, ValueError, r"d_max of one element, got shape \(6,\)"),
    },
    "batch_instance_norm": CHANNELS | ONE_POSITION | running("training") | {
        "rho_shape": (lambda x, _: {"rho": torch.rand(5)}, ValueError, r"rho of shape \(6,\), got \(5,\)"),
        "rho_samples": (lambda x, _: {"rho": torch.rand(2, 6)}, ValueError, r"rho of shape \(6,\), got \(2, 6\)"),
        "rho_scalar": (lambda x, _: {"rho": torch.tensor(0.5)}, ValueError, r"rho of shape \(6,\), got \(\)"),
        "rho_dtype": (lambda x, _: {"rho": torch.ones(6).long()}, TypeError, "rho of dtype .*, got torch.int64"),
        "rho_device": (lambda x, _: {"rho": torch.ones(6, device="meta")}, ValueError, "rho on x's device cpu, got meta"),
    },
    "adaptive_instance_norm": CHANNELS | {
        "style_rank": (lambda x, _: {"style": torch.randn(6)}, ValueError, r".* of shape \(N, C, \*.*\), got \(6,\)"),
        "style_samples": (lambda x, _: {"style": torch.randn(1, 6, 3)}, ValueError, rf"{STYLE} \(1, 6, 3\)"),
        "style_channels": (lambda x, _: {"style": torch.randn(2, 3, 3)}, ValueError, rf"{STYLE} \(2, 3, 3\)"),
        "style_dtype": (lambda x, _: {"style": torch.ones(2, 6, 3).long()}, TypeError, ".* of dtype .*, got torch.int64"),
        "style_device": (lambda x, _: {"style": torch.ones(2, 6, 3, device="meta")}, ValueError, "style on content's device cpu, got meta"),
    },
    "layer_norm": ROWS,
    "layer_norm_dim1": CHANNELS | DIM,
    "rms_norm": ROWS,
    "rms_norm_dim1": CHANNELS | DIM,
    "add_layer_norm": ROWS,
    "add_rms_norm": ROWS,
}  # fmt: skip


def wrong_calls():
    """(function, name of the case) -> changes, exception, text, for every argument that the function has."""
    found = {}
    for name, (function, right) in FUNCTIONS.items():
        arguments = right()
        known = {"x", *inspect.signature(function).parameters}
        for case, entry in (GENERAL | SPECIAL[name]).items():
            changes = entry[0](arguments["x"], arguments)
            if changes.keys() <= known:
                found[name, case] = changes, *entry[1:]
    return found


WRONG = wrong_calls()
over_wrong = pytest.mark.parametrize("name, case", WRONG, ids=["-".join(key) for key in WRONG])
over_functions = pytest.mark.parametrize("name", FUNCTIONS)


@pytest.mark.parametrize("mode", ["plain", "training", "torch.ops"])
@over_wrong
def test_wrong_calls(name, case, mode):
    changes, exception, text = WRONG[name, case]
    statistics = {key: value for key, value in FUNCTIONS[name][1]().items() if key.startswith("running")}
    changes = statistics | changes
    if mode == "training":
        changes = {key: value.clone().requires_grad_() if isinstance(value, torch.Tensor) and value.is_floating_point() and key not in statistics
                   else value for key, value in (FUNCTIONS[name][1]() | changes).items()}  # fmt: skip
    with pytest.raises(exception, match=f"^{FUNCTIONS[name][0].__name__}: expected {text}") as caught:
        call(name, operator=mode == "torch.ops", **changes)
    assert "\n" not in str(caught.value), "one sentence"
    for key, value in statistics.items():
        assert torch.equal(value, torch.full((6,), float(key != "running_mean"))), f"{key} was written"


@over_functions
def test_wrong_calls_reach_no_kernel(name, monkeypatch):
    """Nothing runs, so nothing is half-written."""
    monkeypatch.setattr(backends, "run", lambda *args: pytest.fail("a kernel was called"))
    monkeypatch.setattr(backends, "everyday", False)
    for (function, _), (changes, exception, _) in WRONG.items():
        if function == name:
            for operator in (False, True):
                with pytest.raises(exception):
                    call(name, operator=operator, **changes)


@over_wrong
def test_fake_kernels_check_too(name, case):
    """Under compile and export the same error comes at tracing."""
    changes, exception, text = WRONG[name, case]
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode, pytest.raises(exception, match=text):
        arguments = FUNCTIONS[name][1]() | changes
        fake = {key: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for key, value in arguments.items()}
        call(name, operator=True, **fake)


@pytest.mark.parametrize("name, value, least", [("r_max", 0.9, 1), ("r_max", float("nan"), 1), ("d_max", -0.1, 0), ("d_max", float("nan"), 0)])
def test_wrong_bounds(name, value, least):
    """Numbers are checked; those in tensors would have to be read from the device."""
    statistics = torch.zeros(6), torch.ones(6)
    with pytest.raises(ValueError, match=f"^batch_renorm: expected {name} >= {least}, got {value}$"):
        normops.batch_renorm(torch.randn(IMAGE), *statistics, training=True, **{name: value})
    assert not statistics[0].any() and statistics[1].eq(1).all()


INTERNAL = {  # what graphs hold: the operator, its arguments, what it says
    "group_norm_fwd": ((torch.ones(IMAGE), torch.ones(5), None, None, None, 3, 1e-5, "none", 0.0, None), r"weight of shape .*, got \(5,\)"),
    "group_norm_bwd": (
        (torch.ones(2, 6, 5), torch.ones(IMAGE), torch.ones(3, 2, 3), None, None, None, 3, False, "none", 0.0, [True] * 4),
        r"dy of shape \(2, 6, 4\), got \(2, 6, 5\)",
    ),
    "group_norm_stats": ((torch.ones(IMAGE), 4, 1e-5), "num_groups to divide the number of channels 6, got 4"),
    "batch_norm_fwd": ((torch.ones(IMAGE), torch.ones(5), None, None, None, 1e-5, "none", 0.0, None), r"weight of shape .*, got \(5,\)"),
    "batch_norm_bwd": (
        (torch.ones(2, 6, 5), torch.ones(IMAGE), torch.ones(4, 1, 6), None, None, None, "none", 0.0, [True] * 4),
        r"dy of shape \(2, 6, 4\), got \(2, 6, 5\)",
    ),
    "batch_norm_stats": ((torch.ones(6), 1e-5), r"x of shape \(N, C, \*spatial\), got \(6,\)"),
    "row_norm_fwd": ((torch.ones(IMAGE), torch.ones(IMAGE), None, None, None, 0, True, 0.0, 1e-5, "none", 0.0, None), "addend"),
    "row_norm_bwd": (
        (torch.ones(2, 6, 5), None, torch.ones(IMAGE), torch.ones(3, 12), None, None, None, 1, True, 0.0, "none", 0.0, [True] * 4),
        r"dy of shape \(2, 6, 4\), got \(2, 6, 5\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", INTERNAL)
def test_internal_operators(name):
    """They are called from graphs that others made: no wrong shape may reach a kernel."""
    arguments, text = INTERNAL[name]
    with pytest.raises(ValueError, match=text):
        getattr(torch.ops.normops, name)(*arguments)


@pytest.mark.parametrize("name", ["group_norm_fwd", "batch_norm_fwd"])
def test_internal_vectors(name):
    """As many elements as there are channels do not make a vector."""
    arguments = torch.ones(IMAGE), torch.ones(6, 1), None, None, None, *((3,) if name == "group_norm_fwd" else ()), 1e-5, "none", 0.0, None
    with pytest.raises(ValueError, match=r"weight of shape .*, got \(6, 1\)"):
        getattr(torch.ops.normops, name)(*arguments)


@pytest.mark.parametrize("ndim, vector", [(4, 6), (-1, 6), (1, 5), (0, 5), (1, 20)])
def test_internal_rows(ndim, vector):
    x, weight = torch.ones(IMAGE), torch.ones(vector)
    with pytest.raises(ValueError, match="^row_norm_fwd: expected (ndim of 0 to 3|vectors)"):
        torch.ops.normops.row_norm_fwd(x, None, weight, None, None, ndim, True, 0.0, 1e-5, "none", 0.0, None)


@over_functions
def test_right_calls(name):
    """What the table changes is right, also as an operator."""
    x = FUNCTIONS[name][1]()["x"]
    for operator in (False, True):
        result = call(name, operator=operator)
        assert [y.shape for y in (result if isinstance(result, tuple) else (result,))] == [x.shape] * (1 + name.startswith("add"))


def test_positional_and_keyword():
    """The first arguments as in torch.nn.functional; the rest by name only."""
    x, rows, w = torch.randn(IMAGE), torch.randn(SEQUENCE), torch.rand(6)
    assert torch.equal(normops.group_norm(input=x, num_groups=3, weight=None, bias=None, eps=1e-5), normops.group_norm(x, 3))
    for function, theirs, arguments in (
        (normops.group_norm, F.group_norm, (x, 3, w, w, 1e-3)),
        (normops.instance_norm, F.instance_norm, (x, w, w + 1, w, w, False, 0.1, 1e-3)),
        (normops.batch_norm, F.batch_norm, (x, w, w + 1, w, w, False, 0.1, 1e-3)),
        (normops.layer_norm, F.layer_norm, (rows, (6,), w, w, 1e-3)),
        (normops.rms_norm, F.rms_norm, (rows, (6,), w, 1e-3)),
    ):
        want = theirs(*arguments)
        torch.testing.assert_close(function(*arguments), want)
        names = list(inspect.signature(theirs).parameters)
        torch.testing.assert_close(function(**dict(zip(names, arguments, strict=False))), want)
        with pytest.raises(TypeError):
            function(*arguments, "silu")
    for function in (normops.add_layer_norm, normops.add_rms_norm, normops.adaptive_instance_norm):
        with pytest.raises(TypeError):
            function(rows, rows, *[None] * 5, "silu")


def test_one_number_as_normalized_shape():
    """6 and (6,) are the same, as a torch.Size is."""
    rows = torch.randn(SEQUENCE)
    for function in (normops.layer_norm, normops.rms_norm):
        for shape in (6, [6], torch.Size([6])):
            assert torch.equal(function(rows, shape), function(rows, (6,)))


# ---- backends ----


@pytest.mark.parametrize("other", ["triton", "cuda"])
@over_functions
def test_forced_backend_does_not_fall_back(name, other):
    """On CPU tensors: NotImplementedError with the backend and the reason, forward and backward; nothing is written."""
    x = FUNCTIONS[name][1]()["x"].requires_grad_()
    statistics = {key: value for key, value in FUNCTIONS[name][1]().items() if key.startswith("running")}
    y = call(name, x=x)
    y = y[0] if isinstance(y, tuple) else y
    kernel = (
        "batch_norm"
        if name in ("batch_norm", "sync_batch_norm", "batch_renorm")
        else "row_norm"
        if "layer" in name or "rms" in name
        else "group_norm"
    )
    with normops.backend(other):
        with pytest.raises(NotImplementedError, match=f"{kernel}_fwd: backend '{other}' .* cpu"):
            call(name, x=x, **statistics)
        with pytest.raises(NotImplementedError, match=f"{kernel}_bwd: backend '{other}' .* cpu"):
            y.sum().backward()
    assert x.grad is None
    assert all(torch.equal(value, torch.full((6,), float(key != "running_mean"))) for key, value in statistics.items())
    call(name, x=x)


@pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="the C++ CPU backend is not built")
@pytest.mark.parametrize("op", backends.OPS)
def test_forced_cpu_backend_refuses_other_devices(op):
    with normops.backend("cpu"), pytest.raises(NotImplementedError, match=f"{op}: backend 'cpu' does not run on meta"):
        backends.run(op, torch.empty(1, device="meta"))


def test_unknown_backend():
    with pytest.raises(ValueError, match="triton, cuda, cpu, reference, got 'nonsense'"), normops.backend("nonsense"):
        pass
    with pytest.raises(ValueError, match="got 'nonsense'"):
        backends.unavailable("nonsense")
    assert call("group_norm").shape == IMAGE, "nothing stays forced"


def test_backend_is_restored_after_an_exception():
    before = backends._forced
    with pytest.raises(KeyError), normops.backend("reference"), normops.backend("triton"):
        raise KeyError
    assert backends._forced == before


def refuses(*args):
    raise NotImplementedError("not today")


@over_functions
def test_next_backend_runs_where_one_cannot(name, monkeypatch):
    """NotImplementedError of one backend hands the call to the next; when none is left, all reasons are told."""
    calls = []
    monkeypatch.setattr(backends, "everyday", False)
    monkeypatch.setattr(backends, "_candidates", lambda *args: (refuses, lambda *args: calls.append(args)))
    call(name)
    assert len(calls) == 1 + (name in ("adaptive_instance_norm", "batch_renorm", "batch_instance_norm")), "statistics, then the norm"
    monkeypatch.setattr(backends, "_candidates", lambda *args: (refuses, refuses))
    with pytest.raises(NotImplementedError, match="(group|batch|row)_norm_fwd: no backend can run this: not today; not today"):
        call(name)


@over_functions
def test_other_errors_are_not_swallowed(name, monkeypatch):
    def breaks(*args):
        raise RuntimeError("broken")

    monkeypatch.setattr(backends, "everyday", False)
    monkeypatch.setattr(backends, "_candidates", lambda *args: (breaks, lambda *args: None))
    with pytest.raises(RuntimeError, match="broken"):
        call(name)


@pytest.mark.parametrize("name", ["triton", "cuda", "cpu", "reference"])
def test_reasons(name):
    """None, or one sentence that says what is missing."""
    reason = backends.unavailable(name)
    assert reason is None or (len(reason) > 10 and "\n" not in reason)
