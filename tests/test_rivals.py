"""Other libraries in the benchmark: made-up packages with their signatures get their arguments in the right places; what a GPU may run out of."""

import sys
from dataclasses import replace

import pytest
import torch

from bench import gate, norms, rivals, run, shapes

CASE = shapes.Case("", "test", (6, 24), "bf16", "row", "none", 1e-5, 1, "")
# the signatures of liger-kernel 0.8.5 and quack-kernels 0.6.5; in_place=True overwrites dy, quack's layer norm wants float32
LIGER = """
import torch
import torch.nn.functional as F


def liger_layer_norm(X, W, B, eps):
    assert eps == 1e-5
    return F.layer_norm(X, W.shape, W, B, eps)


def liger_group_norm(X, affine_scaling_weight, affine_shifting_bias, num_channels, num_groups, eps):
    assert num_channels == X.shape[1] and eps == 1e-5
    return F.group_norm(X, num_groups, affine_scaling_weight, affine_shifting_bias, eps)


def liger_rms_norm(X, W, eps, offset=0.0, casting_mode="llama", in_place=True):
    assert not in_place and eps == 1e-5 and offset == 0.0 and casting_mode == "llama"
    return F.rms_norm(X, W.shape, W, eps)


def liger_fused_add_rms_norm(X, R, W, eps, offset=0.0, casting_mode="llama", in_place=True):
    assert not in_place and eps == 1e-5 and offset == 0.0 and casting_mode == "llama"
    return F.rms_norm(X + R, W.shape, W, eps), X + R
"""
QUACK = """
import torch
import torch.nn.functional as F


def rmsnorm(x, weight=None, bias=None, residual=None, out_dtype=None, residual_dtype=None, eps=1e-6, prenorm=False, weight_offset=0.0):
    assert eps == 1e-5 and bias is None and out_dtype is None and residual_dtype is None and weight_offset == 0.0
    total = x if residual is None else x + residual
    y = F.rms_norm(total, weight.shape, weight, eps)
    return (y, total) if prenorm and residual is not None else y


def layernorm_fwd(x, weight, bias=None, eps=1e-6, return_rstd=False, return_mean=False):
    assert weight.dtype == bias.dtype == torch.float32 and eps == 1e-5 and return_rstd and return_mean
    y, mean, rstd = torch.native_layer_norm(x.float(), weight.shape, weight, bias, eps)
    return y.to(x.dtype), rstd[:, 0], mean[:, 0]


def layernorm_bwd(x, weight, dout, rstd, mean, has_bias=True):
    assert has_bias and rstd.shape == mean.shape == x.shape[:1]
    x_hat = (x.float() - mean[:, None]) * rstd[:, None]
    g = dout.float() * weight
    dx = (g - g.mean(1, keepdim=True) - x_hat * (g * x_hat).mean(1, keepdim=True)) * rstd[:, None]
    return dx.to(x.dtype), (dout.float() * x_hat).sum(0), dout.float().sum(0)
"""


@pytest.fixture
def packages(monkeypatch, tmp_path):
    for path, text in {"liger_kernel/transformers/functional.py": LIGER, "quack/rmsnorm.py": QUACK}.items():
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    rivals._function.cache_clear()
    yield
    rivals._function.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] in ("liger_kernel", "quack")]:
        del sys.modules[name]


def verdicts(case, only=None):
    inputs = {name: value.requires_grad_() for name, value in norms.inputs(case, "cpu").items()}
    dy = gate.upstream(case, inputs)
    exact = gate.truth(case, inputs, dy)
    calls = rivals.rivals(case)
    return {name: gate.verdict(case, calls[name], rivals.inputs_of(case, name, inputs), dy, exact, True) for name in only or calls}


CALLS = {
    "layer_norm": ({}, {"liger", "quack"}),
    "rms_norm": ({}, {"liger", "quack"}),
    "add_rms_norm": ({}, {"liger", "quack"}),
    "group_norm": ({"groups": 3, "shape": (2, 6, 4, 5), "layout": "NHWC", "act": "silu"}, {"liger"}),
}


@pytest.mark.parametrize("norm", CALLS)
def test_other_libraries_pass_the_gate(packages, norm):
    options, expected = CALLS[norm]
    found = verdicts(replace(CASE, norm=norm, **options))
    assert set(found) == expected
    assert all(verdict == "ok" for verdict in found.values()), found


@pytest.mark.parametrize("options", [{}, {"act": "relu", "residual": True}, {"dtype": "fp32", "shape": (2, 6, 3, 4, 5)}])
def test_the_backends_of_batch_norm(options):
    """cuDNN itself needs a GPU: it gets what `torch.cudnn_batch_norm` asks for, float32 vectors beside 16-bit x."""
    case = replace(CASE, norm="batch_norm", layout="NHWC", **{"shape": (4, 6, 3, 5)} | options)
    assert verdicts(case, ["native"]) == {"native": "ok"}
    inputs = rivals.inputs_of(case, "cudnn", norms.inputs(case, "cpu"))
    asked = []

    def cudnn_batch_norm(x, weight, bias, running_mean, running_var, training, exponential_average_factor, epsilon):
        asked.extend((x.dtype, {value.dtype for value in (weight, bias, running_mean, running_var)}, training, epsilon))
        return x, running_mean, running_var, weight

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "cudnn_batch_norm", cudnn_batch_norm)
        rivals.rivals(case)["cudnn"](*inputs.values())
    assert asked == [shapes.DTYPES[case.dtype], {torch.float32}, True, 1e-5]
    arguments = [argument.name for argument in torch.ops.aten.cudnn_batch_norm.default._schema.arguments]
    assert arguments == ["input", *cudnn_batch_norm.__code__.co_varnames[1:8]]


def test_what_is_not_installed_is_left_out():
    assert rivals.rivals(replace(CASE, norm="layer_norm")) == {}
    assert rivals.rivals(replace(CASE, norm="batch_norm")) == {}  # of two dimensions: torch never takes cuDNN


def test_a_library_that_fails_is_a_row(packages, monkeypatch):
    monkeypatch.setattr(run, "methods", lambda case, device: {"ours": norms.ours(case)} | rivals.rivals(case))
    monkeypatch.setitem(rivals.RIVALS, ("rms_norm", "liger"), ("liger_kernel", lambda case: True, rivals._quack_layer_norm))
    rows = run.measure(replace(CASE, norm="rms_norm"), run.Plan("cpu", (1,), 0.0, "none"))
    status = {row["method"]: row["status"] for row in rows}
    assert status == {"ours": "ok", "liger": "error: TypeError", "quack": "ok", "clone": "ok", "copy_": "ok"}


def test_who_runs_out_of_memory_alone_has_no_time(monkeypatch):
    def greedy(*tensors):
        if torch.is_grad_enabled() and not gated:
            raise torch.OutOfMemoryError
        return norms.eager(case)(*tensors)

    case, gated = replace(CASE, norm="layer_norm"), [True]
    monkeypatch.setattr(run, "methods", lambda case, device: {"ours": norms.ours(case), "eager": greedy})
    monkeypatch.setattr(run, "timers", lambda device: gated.clear() or [run.Wall()])
    rows = run.measure(case, run.Plan("cpu", (1,), 0.0, "none"))
    failed = {(row["method"], row["direction"]) for row in rows if row["status"] == "error: OutOfMemoryError"}
    assert failed == {("eager", "backward"), ("eager", "fwd+bwd")}
    assert all(("median_us" in row) == (row["status"] == "ok") for row in rows)
