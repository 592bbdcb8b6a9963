"""Wrong calls raise ValueError or TypeError at the door, with one sentence; what a backend cannot do raises NotImplementedError."""

import pytest
import torch

import normops
from normops import backends

X = (2, 6, 4)


def call(entry, **changes):
    """A right call, but for `changes`."""
    arguments = {"x": torch.randn(X), "num_groups": 3, "weight": torch.randn(6), "bias": torch.randn(6), "eps": 1e-5} | changes
    positional = [arguments.pop(name) for name in ("x", "num_groups", "weight", "bias", "eps")]
    return entry(*positional, **arguments)


# name -> (changes to the right call, exception, what the message says: expected, got)
WRONG = {
    "rank_1": ({"x": torch.randn(6)}, ValueError, r"x of shape \(N, C, \*spatial\), got \(6,\)"),
    "rank_0": ({"x": torch.tensor(1.0)}, ValueError, r"x of shape \(N, C, \*spatial\), got \(\)"),
    "integer_x": ({"x": torch.ones(X, dtype=torch.long)}, TypeError, "x of dtype .*, got torch.int64"),
    "complex_x": ({"x": torch.ones(X, dtype=torch.complex64)}, TypeError, "x of dtype .*, got torch.complex64"),
    "bool_x": ({"x": torch.ones(X, dtype=torch.bool)}, TypeError, "x of dtype .*, got torch.bool"),
    "groups_do_not_divide": ({"num_groups": 4}, ValueError, "num_groups to divide the number of channels 6, got 4"),
    "more_groups_than_channels": ({"num_groups": 12}, ValueError, "num_groups .* channels 6, got 12"),
    "no_groups": ({"num_groups": 0}, ValueError, "num_groups .* channels 6, got 0"),
    "negative_groups": ({"num_groups": -3}, ValueError, "num_groups .* channels 6, got -3"),
    "no_channels": ({"x": torch.randn(2, 0, 4), "weight": None, "bias": None}, ValueError, "num_groups .* channels 0, got 3"),
    "weight_shape": ({"weight": torch.randn(32)}, ValueError, r"weight of shape \(6,\) or \(2, 6\), got \(32,\)"),
    "weight_groups": ({"weight": torch.randn(3)}, ValueError, r"weight of shape .*, got \(3,\)"),
    "weight_scalar": ({"weight": torch.tensor(1.0)}, ValueError, r"weight of shape .*, got \(\)"),
    "weight_broadcast": ({"weight": torch.randn(1, 6)}, ValueError, r"weight of shape .*, got \(1, 6\)"),
    "weight_C_1": ({"weight": torch.randn(6, 1)}, ValueError, r"weight of shape .*, got \(6, 1\)"),
    "bias_shape": ({"bias": torch.randn(5)}, ValueError, r"bias of shape \(6,\) or \(2, 6\), got \(5,\)"),
    "bias_samples": ({"bias": torch.randn(3, 6)}, ValueError, r"bias of shape .*, got \(3, 6\)"),
    "weight_dtype": ({"weight": torch.ones(6, dtype=torch.int32)}, TypeError, "weight of dtype .*, got torch.int32"),
    "bias_dtype": ({"bias": torch.ones(6, dtype=torch.complex64)}, TypeError, "bias of dtype .*, got torch.complex64"),
    "weight_device": ({"weight": torch.randn(6, device="meta")}, ValueError, "weight on x's device cpu, got meta"),
    "bias_device": ({"bias": torch.randn(6, device="meta")}, ValueError, "bias on x's device cpu, got meta"),
    "x_device": ({"x": torch.randn(X, device="meta")}, ValueError, "weight on x's device meta, got cpu"),
    "residual_shape": ({"residual": torch.randn(2, 6, 5)}, ValueError, r"residual of x's shape \(2, 6, 4\), got \(2, 6, 5\)"),
    "residual_broadcast": ({"residual": torch.randn(1, 6, 4)}, ValueError, r"residual of x's shape .*, got \(1, 6, 4\)"),
    "residual_rank": ({"residual": torch.randn(2, 6)}, ValueError, r"residual of x's shape .*, got \(2, 6\)"),
    "residual_dtype": ({"residual": torch.randn(X).half()}, TypeError, "residual of x's dtype torch.float32, got torch.float16"),
    "residual_device": ({"residual": torch.randn(X, device="meta")}, ValueError, "residual on x's device cpu, got meta"),
    "scale_shape": ({"scale": torch.randn(6)}, ValueError, r"scale of shape \(2, 6\), got \(6,\)"),
    "scale_full": ({"scale": torch.randn(X)}, ValueError, r"scale of shape \(2, 6\), got \(2, 6, 4\)"),
    "shift_shape": ({"shift": torch.randn(2, 3)}, ValueError, r"shift of shape \(2, 6\), got \(2, 3\)"),
    "scale_dtype": ({"scale": torch.ones(2, 6, dtype=torch.long)}, TypeError, "scale of dtype .*, got torch.int64"),
    "shift_device": ({"shift": torch.randn(2, 6, device="meta")}, ValueError, "shift on x's device cpu, got meta"),
    "weight_shape_with_scale": ({"weight": torch.randn(5), "scale": torch.randn(2, 6)}, ValueError, r"weight of shape .*, got \(5,\)"),
    "bias_shape_with_shift": ({"bias": torch.randn(1), "shift": torch.randn(2, 6)}, ValueError, r"bias of shape .*, got \(1,\)"),
    "weight_dtype_with_scale": ({"weight": torch.ones(6).long(), "scale": torch.randn(2, 6)}, TypeError, "weight of dtype .*, got torch.int64"),
    "rank_1_with_scale": ({"x": torch.randn(6), "scale": torch.randn(6)}, ValueError, r"x of shape \(N, C, \*spatial\), got \(6,\)"),
    "integer_x_with_scale": ({"x": torch.ones(X, dtype=torch.long), "scale": torch.randn(2, 6)}, TypeError, "x of dtype .*, got torch.int64"),
    "eps_negative": ({"eps": -1e-5}, ValueError, "eps >= 0, got -1e-05"),
    "eps_nan": ({"eps": float("nan")}, ValueError, "eps >= 0, got nan"),
    "activation": ({"activation": "swish"}, ValueError, "activation out of none, relu, .*, got 'swish'"),
    "activation_case": ({"activation": "SiLU"}, ValueError, "activation out of .*, got 'SiLU'"),
    "activation_empty": ({"activation": ""}, ValueError, "activation out of .*, got ''"),
    "out_dtype_narrow": ({"out_dtype": torch.float16}, TypeError, "out_dtype .*, got torch.float16"),
    "out_dtype_integer": ({"out_dtype": torch.int32}, TypeError, "out_dtype .*, got torch.int32"),
    "out_dtype_wide": ({"out_dtype": torch.float64}, TypeError, "out_dtype .*, got torch.float64"),
    "out_dtype_f64": ({"x": torch.randn(X).double(), "out_dtype": torch.float32}, TypeError, "out_dtype .*, got torch.float32"),
    "out_dtype_other_half": ({"x": torch.randn(X).half(), "out_dtype": torch.bfloat16}, TypeError, "out_dtype .*, got torch.bfloat16"),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["plain", "training", "torch.ops"])
@pytest.mark.parametrize("changes, exception, text", WRONG.values(), ids=WRONG)
def test_wrong_calls(changes, exception, text, mode):
    entry = torch.ops.normops.group_norm if mode == "torch.ops" else normops.group_norm
    changes = dict(changes)
    if mode == "training":
        changes = {name: value.clone().requires_grad_() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
                   for name, value in changes.items()}  # fmt: skip
        changes.setdefault("bias", torch.randn(6, requires_grad=True))
    with pytest.raises(exception, match=f"^group_norm: expected {text}") as caught:
        call(entry, **changes)
    assert "\n" not in str(caught.value), "one sentence"


@pytest.mark.parametrize("name", ["weight_shape", "residual_shape", "groups_do_not_divide", "eps_negative", "activation"])
def test_wrong_calls_reach_no_kernel(name, monkeypatch):
    """Nothing runs, so nothing is half-written."""
    monkeypatch.setattr(backends, "run", lambda *args: pytest.fail("a kernel was called"))
    changes, exception, _ = WRONG[name]
    for requires_grad in (False, True):
        with pytest.raises(exception):
            call(normops.group_norm, **{"x": torch.randn(X, requires_grad=requires_grad)} | changes)


@pytest.mark.parametrize("name", ["weight_shape", "residual_dtype", "groups_do_not_divide", "eps_negative", "activation"])
def test_fake_kernels_check_too(name):
    """Under compile and export the same error comes at tracing."""
    changes, exception, text = WRONG[name]
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode, pytest.raises(exception, match=text):
        fake = {key: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for key, value in changes.items()}
        call(torch.ops.normops.group_norm, **fake)


def test_right_call():
    assert call(normops.group_norm).shape == X


def test_positional_and_keyword():
    """The first five as in F.group_norm; the rest by name only."""
    x = torch.randn(X)
    assert torch.equal(normops.group_norm(input=x, num_groups=3, weight=None, bias=None, eps=1e-5), normops.group_norm(x, 3))
    with pytest.raises(TypeError):
        normops.group_norm(x, 3, None, None, 1e-5, "silu")


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_forced_backend_does_not_fall_back(name):
    """On CPU tensors: NotImplementedError with the backend and the reason, forward and backward."""
    x = torch.randn(X, requires_grad=True)
    y = normops.group_norm(x, 3)
    with normops.backend(name):
        with pytest.raises(NotImplementedError, match=f"group_norm_fwd: backend '{name}' .* cpu"):
            normops.group_norm(x, 3)
        with pytest.raises(NotImplementedError, match=f"group_norm_bwd: backend '{name}' .* cpu"):
            y.sum().backward()
    assert x.grad is None
    assert normops.group_norm(x, 3).shape == x.shape, "outside, the usual order again"


@pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="the C++ CPU backend is not built")
def test_forced_cpu_backend_refuses_other_devices():
    with normops.backend("cpu"), pytest.raises(NotImplementedError, match="'cpu' does not run on meta"):
        backends.run("group_norm_fwd", torch.empty(1, device="meta"))


def test_unknown_backend():
    with pytest.raises(ValueError, match="triton, cuda, cpu, reference, got 'nonsense'"), normops.backend("nonsense"):
        pass
    with pytest.raises(ValueError, match="got 'nonsense'"):
        backends.unavailable("nonsense")
    assert call(normops.group_norm).shape == X, "nothing stays forced"


def test_backend_is_restored_after_an_exception():
    before = backends._forced
    with pytest.raises(KeyError), normops.backend("reference"), normops.backend("triton"):
        raise KeyError
    assert backends._forced == before


def test_next_backend_runs_where_one_cannot(monkeypatch):
    """NotImplementedError of one backend hands the call to the next; when none is left, all reasons are told."""

    def refuses(*args):
        raise NotImplementedError("not today")

    calls = []
    monkeypatch.setattr(backends, "_candidates", lambda *args: (refuses, lambda *args: calls.append(args)))
    normops.group_norm(torch.randn(X), 3, residual=torch.randn(X))  # not the short cut
    assert len(calls) == 1
    monkeypatch.setattr(backends, "_candidates", lambda *args: (refuses, refuses))
    with pytest.raises(NotImplementedError, match="group_norm_fwd: no backend can run this: not today; not today"):
        normops.group_norm(torch.randn(X), 3, residual=torch.randn(X))  # not the short cut


def test_other_errors_are_not_swallowed(monkeypatch):
    def breaks(*args):
        raise RuntimeError("broken")

    monkeypatch.setattr(backends, "_candidates", lambda *args: (breaks, lambda *args: None))
    with pytest.raises(RuntimeError, match="broken"):
        normops.group_norm(torch.randn(X), 3, residual=torch.randn(X))  # not the short cut


@pytest.mark.parametrize("name", ["triton", "cuda", "cpu", "reference"])
def test_reasons(name):
    """None, or one sentence that says what is missing."""
    reason = backends.unavailable(name)
    assert reason is None or (len(reason) > 10 and "\n" not in reason)
