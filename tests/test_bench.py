"""The benchmark: no speed for wrong results, the byte formulas, and a run from the command line to the README."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import accuracy, gate, nnunet, norms, report, run, shapes, timing
from bench.methods import HOST, PENALTY, methods
from bench.norms import NORMS, minimum_bytes

ROOT = Path(__file__).parent.parent
CASE = shapes.Case("group_norm", "test/2x6x5/silu", (2, 6, 5), "fp32", "NCHW", "silu", 1e-5, 1, "", groups=3)
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
    monkeypatch.setitem(
        NORMS, "group_norm", replace(NORMS["group_norm"], ours=lambda case: lambda *leaves, **options: damage(norms.eager(case)(*leaves)))
    )
    rows = run.measure(CASE, PLAN)
    ours = [row for row in rows if row["method"] == "ours"]
    assert len(ours) == 3
    for row in ours:
        assert row["status"].startswith(("WRONG", "error"))
        assert "median_us" not in row
    assert all(float(row["median_us"]) > 0 for row in rows if row["method"] in ("eager", "clone", "copy_"))


def test_a_wrong_double_backward_gets_no_speed(monkeypatch):
    class Once(torch.autograd.Function):  # right forward and backward; its backward forgets how dy depends on x
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            return dy + 0.01 * (dy.detach() - dy)

    monkeypatch.setitem(
        NORMS, "group_norm", replace(NORMS["group_norm"], eager=lambda case: lambda x, *rest: Once.apply(norms.ours(case)(Once.apply(x), *rest)))
    )
    rows = {row["method"]: row for row in run.measure(PENALTY, PLAN)}
    assert rows["eager"]["status"].startswith("WRONG: d2x")
    assert rows["ours"]["status"] == "ok"


def exact_of(case):
    """The inputs of a case, dy and the float64 results."""
    inputs = {name: value.requires_grad_() for name, value in norms.inputs(case, "cpu").items()}
    dy = gate.upstream(case, inputs)
    return inputs, dy, gate.truth(case, inputs, dy)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("act", ["none", "relu", "hardswish", "gelu_tanh"])
@pytest.mark.parametrize("residual", [False, True])
def test_every_method_passes_the_gate(act, dtype, layout, residual):
    case = replace(CASE, shape=(3, 6, 4, 5), act=act, dtype=dtype, layout=layout, residual=residual)
    expected = exact_of(case)
    for call in methods(case).values():
        assert gate.wrong(case, call, *expected) == {}


LAYOUTS = [(norm, "row") for norm in ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")]
LAYOUTS += [(norm, layout) for norm in NORMS if norm != "group_norm" and not norm.startswith("add_") for layout in ("NCHW", "NHWC")]


@pytest.mark.parametrize("options", [{}, {"act": "leaky_relu", "residual": True}, {"affine": False}], ids=["plain", "fused", "not affine"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("norm", "layout"), LAYOUTS)
def test_every_method_of_every_norm_passes_the_gate(norm, layout, dtype, options):
    if "residual" in options and norm.startswith("add_"):
        pytest.skip("the sum is this norm's residual")
    if "residual" in options and norm in shapes.OF_PARAMETERS:
        pytest.skip("nothing follows")
    if "affine" in options and norm in ("batch_renorm", "batch_instance_norm", "analytic_norm", *shapes.OF_PARAMETERS):
        pytest.skip("its composition has a weight")
    case = replace(CASE, norm=norm, shape=(7, 24) if layout == "row" else (3, 6, 4, 5), dtype=dtype, layout=layout, **({"act": "none"} | options))
    expected = exact_of(case)
    found = methods(case)
    written = ("adaptive_instance_norm", "rms_norm", "batch_renorm", "batch_instance_norm", "analytic_norm")
    assert ("manual" in found) == (norm in written or (norm, layout != "row") == ("layer_norm", True))
    for call in found.values():
        assert gate.wrong(case, call, *expected) == {}


PARAMETERS = {
    "linear": {"norm": "analytic_norm_weight", "shape": (5, 24)},
    "convolution": {"norm": "analytic_norm_weight", "shape": (7, 6, 3, 3)},
    "depthwise": {"norm": "analytic_norm_weight", "shape": (6, 1, 3, 3), "groups": 6},
} | {act: {"norm": "activation_moments", "shape": (1, 33), "dtype": "fp64", "act": act} for act in ("relu", "gelu", "tanh")}


@pytest.mark.parametrize("options", PARAMETERS.values(), ids=PARAMETERS)
def test_every_method_of_parameters_passes_the_gate(options):
    """Torch has a rival where users write one; nothing takes the activation for one that follows."""
    case = replace(CASE, **({"act": "none", "groups": 0} | options))
    expected = exact_of(case)
    found = methods(case)
    assert ("eager" in found) == (case.act in ("none", "relu"))
    for call in found.values():
        assert gate.wrong(case, call, *expected) == {}
    for number, result in enumerate(NORMS[case.norm].results):

        def damaged(*tensors, number=number):
            return [(1.01 if number == each else 1) * value for each, value in enumerate(found["ours"](*tensors))]

        assert gate.verdict(case, damaged, *expected, False).startswith(f"WRONG: {result} without grad 1.0e-02")


def test_times_of_parameters():
    """Every case has its line, also one that torch has no rival of."""
    cases = [replace(CASE, **({"name": name, "groups": 0} | options)) for name, options in PARAMETERS.items() if "act" in options]
    rows = [{field: str(row.get(field, "")) for field in run.FIELDS} for case in cases for row in run.measure(case, PLAN)]
    lines = [line.split(" | ") for line in report._times(rows).splitlines()[4:]]
    assert [cells[0] for cells in lines] == ["| relu", "| gelu", "| tanh"]
    for name, *place, forward, _, _ in lines:
        assert place == ["fp64", "NCHW", "1"]
        ours, eager, compiled, clone = forward.split(" / ")
        assert float(ours) > 0 and float(clone) > 0 and compiled == "-" and (eager == "-") == (name != "| relu")


def test_a_rival_may_lose_digits_of_sums_only():
    case = replace(CASE, act="none")
    expected = exact_of(case)

    def call(x, weight, bias):  # its dweight is off by a tenth
        return norms.eager(case)(x, 1.1 * weight - 0.1 * weight.detach(), bias)

    assert gate.verdict(case, call, *expected, True).startswith("inaccurate: dweight")
    assert gate.verdict(case, call, *expected, False).startswith("WRONG: dweight")
    assert gate.verdict(case, lambda x, *vectors: call(1.1 * x - 0.1 * x.detach(), *vectors), *expected, True).startswith("WRONG: dx")


@pytest.mark.parametrize("norm", ["group_norm", "batch_norm", "batch_instance_norm"])
def test_truth_in_parts_is_the_truth(monkeypatch, norm):
    case = replace(CASE, norm=norm, shape=(5, 6, 7), dtype="fp64")
    inputs, dy, exact = exact_of(case)
    whole = exact.values
    monkeypatch.setattr(gate, "CHUNK", 2 * 6 * 7)
    assert len(list(gate._parts(case))) > 1
    for name, value in gate.truth(case, inputs, dy).values.items():
        torch.testing.assert_close(value, whole[name])


def test_a_timed_call_gives_the_same_every_time():
    """Batch renorm depends on the running statistics, which its calls update."""
    case = replace(CASE, norm="batch_renorm")
    inputs, dy, exact = exact_of(case)
    for call in methods(case).values():
        for _ in range(50):
            call(*inputs.values())
        assert gate.wrong(case, call, inputs, dy, exact) == {}


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


@pytest.mark.parametrize(("norm", "forward", "backward"), [("instance_norm", 2, 3), ("adaptive_instance_norm", 3, 5), ("add_rms_norm", 4, 4)])
def test_minimum_bytes_of_other_norms(norm, forward, backward):
    case = replace(CASE, norm=norm, shape=(2, 4), act="none")
    assert minimum_bytes(case, "forward") == forward * case.nbytes
    assert minimum_bytes(case, "fwd+bwd") == (forward + backward) * case.nbytes


def test_scale():
    assert shapes.scale((8, 64, 7, 9), 2**20) == (2, 64, 7, 9)
    assert shapes.scale((2, 64, 128, 64), 2**20) == (2, 64, 32, 64)
    assert shapes.scale((4096, 256), 2**20) == (1024, 256)
    assert shapes.scale((1, 2**20, 1), 2**20) == (1, 2**20, 1)  # nothing left to halve
    assert shapes.scale((32, 512, 7, 7), 2**20, keep_batch=True) == (8, 512, 7, 7)
    assert shapes.scale((32, 64, 128, 64), 2**20, keep_batch=True) == (2, 64, 32, 64)
    assert shapes.scale((3, 8, 7), 2**20, keep_batch=True) == (3, 8, 7)


@pytest.mark.parametrize("norm", NORMS)
def test_the_grid(norm):
    cases = shapes.load(norm)
    found = {case.name: case for case in cases}
    assert shapes.names(norm, shapes.REPRESENTATIVE)
    assert all(case.src and (norm != "group_norm" or not case.shape[1] % case.groups) for case in cases)
    assert len({(case.name, case.dtype, case.layout) for case in cases}) == len(cases), "the report tells cases apart by these"
    cpu = shapes.grid(norm, "cpu")
    for case in cpu:
        limit = shapes.LARGE_LIMIT if case.name in shapes.LARGE else shapes.LIMIT
        assert 4 * case.numel <= limit or case.shape[0] == 1 or (norm in shapes.OF_PARAMETERS and case.shape == found[case.name].shape)
        assert case.act == found[case.name].act
    assert {case.dtype for case in cpu} == ({"fp64"} if norm == "activation_moments" else set(shapes.CPU_DTYPES))


def test_every_chosen_name_is_a_case():
    for chosen in (shapes.REPRESENTATIVE, shapes.LARGE, shapes.compiled("cuda")):
        assert sorted(name for norm in NORMS for name in shapes.names(norm, chosen)) == sorted(chosen)


def test_a_pattern_chooses_cases():
    every = shapes.load("group_norm")
    assert {case.shape for case in shapes.grid("group_norm", "cuda", "tiny")} == {case.shape for case in every if case.name.startswith("tiny/")}


@pytest.mark.parametrize("norm", NORMS)
def test_layouts(norm):
    for case in shapes.grid(norm, "cpu", quick=True):
        x = norms.inputs(case, "cpu")["x"]
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


def test_the_files_of_a_norm(tmp_path):
    for name in ("batch_norm_cpu_x.csv", "batch_norm_cuda_y.csv", "batch_norm_eval_cpu_x.csv", "batch_norm_cpu_x.svg"):
        (tmp_path / name).touch()
    assert [path.name for path in report.files(tmp_path, "batch_norm")] == ["batch_norm_cpu_x.csv", "batch_norm_cuda_y.csv"]


def test_the_readme_holds_the_tables_of_the_csv_files():
    readme = (ROOT / "README.md").read_text()
    for norm in NORMS:
        if files := report.files(ROOT / "bench" / "results", norm):
            content = "\n\n".join(map(report.tables, files))
            assert report.replace(readme, f"bench:{norm}", content) == readme, f"python -m bench.report was not run after python -m bench {norm}"


def test_every_norm_has_its_place_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    for marker in [f"bench:{name}" for name in (*NORMS, "summary", "nnunet")] + [f"accuracy:{name}" for name in accuracy.OPS]:
        report.replace(readme, marker, "")


def test_goals_and_summary(tmp_path):
    row = dict.fromkeys(run.FIELDS, "") | {
        "op": "instance_norm",
        "threads": "2",
        "act": "none",
        "status": "ok",
        "timer": "wall",
        "direction": "fwd+bwd",
    }
    row |= {"shape": "2x8x4x4x4", "name": "m/2x8x4x4x4/none", "direction": "fwd+bwd"}
    times = {("fp32", "NCHW"): 3, ("fp32", "NHWC"): 12, ("bf16", "NHWC"): 0.5}
    both = [row | {"dtype": dtype, "layout": layout} for dtype, layout in times]
    rows = [each | {"method": "ours", "median_us": "1"} for each in both]
    rows += [each | {"method": "eager", "median_us": str(times[each["dtype"], each["layout"]])} for each in both]
    lines = report._goals(rows).splitlines()[4:]
    assert lines == [
        "| channels last | fwd+bwd | 5 | bf16 0.50 (missed), fp32 12.00 |",
        "| contiguous | fwd+bwd | 2 | fp32 3.00 |",
        "| 3-D | fwd+bwd | 2.5 | bf16 0.50 (missed), fp32 6.00 |",
        "| bf16 | forward, backward, fwd+bwd | 2 | bf16 0.50 (missed) |",
    ]
    slow = [each | {"op": "batch_norm", "name": "resnet50_add_b32/2x8x7x7/relu", "shape": "2x8x7x7"} for each in rows]
    assert report._goals(slow).splitlines()[4:6] == [
        "| the worst | forward, backward, fwd+bwd | 1 | bf16 0.50 (missed), fp32 3.00 |",
        "| ResNet-50, EfficientNet, PointNet | forward | 1.5 |  |",
    ]
    path = tmp_path / "instance_norm_x.csv"
    run.write(path, {"machine": "m", "cores": "2", "torch": "t", "backend": "cpu"}, [rows])
    text = report.summary([path])
    assert "| instance_norm | fp32 | NHWC | 1 |  |  | 12.00 | 0 of 1 | 12.00 |" in text
    assert "| instance_norm | bf16 | NHWC | 1 |  |  | 0.50 | 1 of 1 | 0.50 |" in text


@pytest.mark.parametrize("op", accuracy.OPS)
def test_accuracy_table(monkeypatch, op):
    monkeypatch.setattr(accuracy, "RATIOS", {"fp32": (0, 10)})
    monkeypatch.setattr(accuracy, "SHAPES", {"NCHW": (2, 8, 16, 16), "NHWC": (2, 8, 16, 16), "row": (8, 64)})
    rows = accuracy.measure(op, "cpu")
    results = [name for name in rows[0] if name not in accuracy.FIELDS]
    assert {"y", "dx"} <= set(results)
    assert {row["method"] for row in rows} >= {"torch", "normops reference"}
    assert all(float(row[name]) < 1e-6 for row in rows if row["method"] != "torch" for name in results)
    text = accuracy.table(rows, {"backend": "reference", "torch": "x", "machine": "y"})
    assert text.count("| fp32 |") == (6 if op in ("layer_norm", "rms_norm") else 4)


def test_nnunet():
    rows = [row for layout in nnunet.LAYOUTS for row in nnunet.measure((1, 3, 6, 5, 4), "fp32", layout, 0.0)]
    assert all(row["norm_gives"] == nnunet.LAYOUTS[row["layout"]] for row in rows if row["method"] == "normops")
    text = nnunet.table(rows, {"machine": "m", "cores": "2", "torch": "t", "backend": "cpu"})
    assert text.count("| 1x3x6x5x4 | fp32 |") == 2


def test_command_line(tmp_path):
    def python(*arguments):
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    python("bench", "group_norm", "--quick", "--device", "cpu", "--shapes", "tiny/[12]*", "--threads", "1", "--out", str(tmp_path))
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
    readme.write_text("# title\n<!-- bench:group_norm -->\n<!-- /bench -->\n<!-- bench:summary -->\n<!-- /bench -->\nend\n")
    python("bench.report", "--results", str(tmp_path), "--readme", str(readme))
    text = readme.read_text()
    assert text.startswith("# title\n<!-- bench:group_norm -->\n**")
    assert "| group_norm | bf16 | NCHW | 2 |" in text
    assert text.endswith("<!-- /bench -->\nend\n")
    assert "| fp32 | NCHW | 1 | 2 |" in text


def test_host_cases_are_reported(monkeypatch):
    rows = [{field: str(row.get(field, "")) for field in run.FIELDS} for case in (HOST, PENALTY) for row in run.measure(case, PLAN)]
    text = report._host(rows)
    assert [line.split(" | ")[0] for line in text.splitlines()[4:]] == [f"| {name}" for name in report.HOST_NAMES.values()]
