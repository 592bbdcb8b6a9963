"""The benchmark: no speed for wrong results, the byte formulas, and a run from the command line to the README."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import accuracy, gate, report, run, shapes, timing
from bench.methods import HOST, NORMS, PENALTY, minimum_bytes

ROOT = Path(__file__).parent.parent
CASE = shapes.Case("group_norm", "test/2x6x5/silu", (2, 6, 5), "fp32", "NCHW", 3, "silu", 1e-5, 1, "")
PLAN = run.Plan("cpu", (1,), budget=0.0, compile="none")


class Scaled(torch.autograd.Function):
    """The identity with a gradient that is 1 % too large."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return 1.01 * dy


BROKEN = {
    "y": lambda y: 1.01 * y,
    "one element of y": lambda y: torch.cat((y.flatten()[:-1], y.flatten()[-1:] + 0.01 * y.detach().abs().max())).view_as(y),
    "NaN": lambda y: y * torch.tensor(math.nan),
    "gradients": Scaled.apply,
    "shape": lambda y: y[:, :-1],
}


@pytest.mark.parametrize("damage", BROKEN.values(), ids=BROKEN)
def test_a_wrong_method_gets_no_speed(monkeypatch, damage):
    norm = NORMS["group_norm"]
    monkeypatch.setitem(NORMS, "group_norm", replace(norm, ours=lambda case: lambda *leaves: damage(norm.eager(case)(*leaves))))
    rows = run.measure(CASE, PLAN)
    ours = [row for row in rows if row["method"] == "ours"]
    assert len(ours) == 3
    for row in ours:
        assert row["status"].startswith(("WRONG", "error"))
        assert "median_us" not in row
    assert all(float(row["median_us"]) > 0 for row in rows if row["method"] in ("eager", "clone", "copy_"))


def test_a_wrong_double_backward_gets_no_speed(monkeypatch):
    norm = NORMS["group_norm"]

    class Once(torch.autograd.Function):  # right forward and backward; its backward forgets how dy depends on x
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            return dy + 0.01 * (dy.detach() - dy)

    monkeypatch.setitem(NORMS, "group_norm", replace(norm, eager=lambda case: lambda x, *rest: Once.apply(norm.ours(case)(Once.apply(x), *rest))))
    rows = {row["method"]: row for row in run.measure(PENALTY, PLAN)}
    assert rows["eager"]["status"].startswith("WRONG: d2x")
    assert rows["ours"]["status"] == "ok"


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("act", ["none", "relu", "hardswish", "gelu_tanh"])
@pytest.mark.parametrize("residual", [False, True])
def test_every_method_passes_the_gate(act, dtype, layout, residual):
    case = replace(CASE, shape=(3, 6, 4, 5), act=act, dtype=dtype, layout=layout, residual=residual)
    norm = NORMS[case.norm]
    inputs = {name: value.requires_grad_() for name, value in norm.inputs(case, "cpu").items()}
    dy = gate.upstream(case, inputs)
    exact = gate.truth(case, inputs, dy)
    for method in (norm.ours, norm.eager):
        assert gate.wrong(case, method(case), inputs, dy, exact) == ""


def test_truth_in_parts_is_the_truth(monkeypatch):
    case = replace(CASE, shape=(5, 6, 7), dtype="fp64")
    inputs = {name: value.requires_grad_() for name, value in NORMS[case.norm].inputs(case, "cpu").items()}
    dy = torch.randn(case.shape, dtype=torch.float64)
    whole = gate.truth(case, inputs, dy).values
    monkeypatch.setattr(gate, "CHUNK", 2 * 6 * 7)
    for name, value in gate.truth(case, inputs, dy).values.items():
        torch.testing.assert_close(value, whole[name])


@pytest.mark.parametrize(
    ("act", "residual", "forward", "backward"),
    [("none", False, 2, 3), ("silu", False, 2, 3), ("none", True, 3, 3), ("silu", True, 3, 5)],  # without an activation dresidual is dy itself
)
def test_minimum_bytes(act, residual, forward, backward):
    case = replace(CASE, shape=(2, 4, 8, 8), dtype="bf16", act=act, residual=residual)
    size = 2 * 4 * 8 * 8 * 2
    assert case.nbytes == size
    assert minimum_bytes(case, "forward") == forward * size
    assert minimum_bytes(case, "backward") == backward * size
    assert minimum_bytes(case, "fwd+bwd") == (forward + backward) * size


def test_scale():
    assert shapes.scale((8, 64, 7, 9), 2**20) == (2, 64, 7, 9)
    assert shapes.scale((2, 64, 128, 64), 2**20) == (2, 64, 32, 64)
    assert shapes.scale((4096, 256), 2**20) == (1024, 256)
    assert shapes.scale((1, 2**20, 1), 2**20) == (1, 2**20, 1)  # nothing left to halve


def test_the_grid():
    cases = shapes.load("group_norm")
    names = {case.name for case in cases}
    assert names >= {*shapes.REPRESENTATIVE, *shapes.LARGE, *shapes.COMPILED}
    assert all(case.src and not case.shape[1] % case.groups for case in cases)
    cpu = shapes.grid("group_norm", "cpu")
    limits = {case.name: shapes.LARGE_LIMIT if case.name in shapes.LARGE else shapes.LIMIT for case in cpu}
    assert all(4 * case.numel <= limits[case.name] for case in cpu)
    assert {case.dtype for case in cpu} == set(shapes.CPU_DTYPES)
    assert {case.shape for case in shapes.grid("group_norm", "cuda", "tiny")} <= {case.shape for case in cases if case.name.startswith("tiny/")}


def test_layouts():
    for case in shapes.grid("group_norm", "cpu", quick=True):
        x = NORMS[case.norm].inputs(case, "cpu")["x"]
        assert x.shape == case.shape
        assert (x if case.layout != "NHWC" else x.movedim(1, -1)).is_contiguous()


def test_interleaved_samples():
    drawn = []

    def sampler(name):
        def sample():
            drawn.append(name)
            return float(len(drawn))

        return sample

    times = timing.interleave({name: sampler(name) for name in "abc"}, budget=0.0)
    assert all(sorted(drawn[i : i + 3]) == list("abc") for i in range(0, len(drawn), 3))
    assert all(each.low <= each.median <= each.high for each in times.values())


def test_report_counts_losses():
    row = dict.fromkeys(run.FIELDS, "") | {"op": "group_norm", "dtype": "fp32", "layout": "NCHW", "threads": "1", "act": "silu", "status": "ok"}
    row["direction"] = "forward"
    times = {("m/win", "ours"): "1", ("m/win", "eager"): "8", ("m/loss", "ours"): "4", ("m/loss", "eager"): "2"}
    rows = [row | {"name": name, "method": method, "median_us": time} for (name, method), time in times.items()]
    (line,) = [line for line in report._speedups(rows, "eager", lambda act: True, "").splitlines() if "fp32" in line]
    assert line == "| fp32 | NCHW | 1 | 2 | 2.00 |  |  | 1 of 2 | 0.50 forward m/loss |"


def test_replace_between_markers():
    text = "a\n<!-- bench:group_norm -->\nold\n<!-- /bench -->\nb\n<!-- bench:other -->\nkept\n<!-- /bench -->\n"
    new = report.replace(text, "bench:group_norm", "new \\1")
    assert new == text.replace("old", "new \\1")
    assert report.replace(new, "bench:group_norm", "new \\1") == new
    with pytest.raises(ValueError, match="bench:absent"):
        report.replace(text, "bench:absent", "")


def test_accuracy_table(monkeypatch):
    monkeypatch.setattr(accuracy, "RATIOS", {"fp32": (0, 10)})
    rows = accuracy.measure("group_norm", "cpu")
    assert {row["method"] for row in rows} >= {"torch", "normops reference"}
    assert all(float(row[name]) < 1e-6 for row in rows if row["method"] != "torch" for name in accuracy.RESULTS)
    text = accuracy.table(rows, {"backend": "reference", "torch": "x", "machine": "y"})
    assert text.count("| fp32 |") == 4


def test_command_line(tmp_path):
    def python(*arguments):
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    python("bench", "--quick", "--device", "cpu", "--shapes", "tiny/[12]*", "--threads", "1", "--out", str(tmp_path))
    (path,) = tmp_path.glob("group_norm_cpu_*.csv")
    facts, rows = run.read(path)
    assert {"machine", "torch", "normops", "backend", "grid", "compile"} <= facts.keys()
    assert facts["torch"] == torch.__version__
    assert tuple(rows[0]) == run.FIELDS
    assert {(row["shape"], row["dtype"]) for row in rows} == {(shape, dtype) for shape in ("1x64x1x1", "2x2048x1x1") for dtype in ("fp32", "bf16")}
    assert {row["direction"] for row in rows} == set(report.DIRECTIONS)
    for row in rows:
        assert row["status"] == "ok"
        assert float(row["q20_us"]) <= float(row["median_us"]) <= float(row["q80_us"])
        assert float(row["gb_s"]) == pytest.approx(int(row["min_bytes"]) / float(row["median_us"]) / 1e3, rel=1e-3)
    readme = tmp_path / "README.md"
    readme.write_text("# title\n<!-- bench:group_norm -->\n<!-- /bench -->\nend\n")
    python("bench.report", "--results", str(tmp_path), "--readme", str(readme))
    text = readme.read_text()
    assert text.startswith("# title\n<!-- bench:group_norm -->\n**")
    assert text.endswith("<!-- /bench -->\nend\n")
    assert "| fp32 | NCHW | 1 | 2 |" in text


def test_host_cases_are_reported(monkeypatch):
    rows = [{field: str(row.get(field, "")) for field in run.FIELDS} for case in (HOST, PENALTY) for row in run.measure(case, PLAN)]
    text = report._host(rows)
    assert [line.split(" | ")[0] for line in text.splitlines()[4:]] == [f"| {name}" for name in report.HOST_NAMES.values()]
