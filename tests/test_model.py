"""The model of times on a GPU against what one computes by hand, and the driver that does nothing. No GPU, no time is measured."""

import math
import os
import random

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from normops.kernels import launch as launcher
from normops.kernels.config import Device

from bench import report
from bench.compiled import Launch, program, record
from bench.host import prepare, small, stub_driver
from bench.model import H200, PIPES, README, RESULT, Work, from_memory, inspect, predict, ramp, seconds, tables, total, variant
from bench.norms import minimum_bytes
from bench.run import read
from bench.shapes import Case


def case(norm, shape, dtype, **options):
    return Case(norm, "case", shape, dtype, "row" if len(shape) == 2 else "NCHW", "none", 1e-5, 1, "", **options)


def row_of(case, direction):
    call = record(case, direction, Device())
    return predict(call, {variant(step): inspect(step) for step in call.steps if isinstance(step, Launch)})


# In bytes: x, dy, y and dx, vectors and statistics, and the sums that 1056 programs leave of two rows of 1024 float32 channels.
LAYER = case("layer_norm", (8192, 1024), "bf16")
T = LAYER.nbytes


def test_traffic_of_rows():
    row = row_of(LAYER, "forward")
    assert (row["launches"], row["bytes"]) == (1, 2 * T + 2 * 1024 * 2)
    row = row_of(LAYER, "backward")
    sums = 2 * 1024 * 4
    call = record(LAYER, "backward", Device())
    P = call.steps[0].programs
    # the bias is not read: without activation backward does not need it
    assert row["bytes"] == pytest.approx(3 * T + 3 * 8192 * 4 + 1024 * 2 + P * sums, rel=0.01)


def test_second_reading_comes_from_cache():
    fits = case("group_norm", (2, 128, 64, 64), "fp32", groups=8)  # 4 MB
    row = row_of(fits, "forward")
    assert row["regime"] == "split" and 2 * fits.nbytes <= row["bytes"] <= 2.05 * fits.nbytes
    row = row_of(fits, "backward")
    assert 3 * fits.nbytes <= row["bytes"] <= 3.05 * fits.nbytes


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_no_call_is_faster_than_its_bytes(direction):
    for one in (LAYER, case("batch_norm", (32, 96, 56, 56), "fp32", residual=True), case("batch_norm_eval", (8, 64, 28, 28), "fp32")):
        row = row_of(one, direction)
        assert row["bytes"] >= minimum_bytes(one, direction)
        assert float(row["graph_us"]) > minimum_bytes(one, direction) / H200.hbm * 1e6


def test_no_launch_is_faster_than_its_bounds():
    draw = random.Random(0)
    for _ in range(1000):
        programs, warps = draw.randint(1, 100000), draw.choice([1, 4, 16])
        counts = {pipe: draw.randint(0, 1000) for pipe in ("", *PIPES)}
        work = Work("", programs, warps, draw.randint(1, 8), 10 ** draw.uniform(1, 6), counts, hbm=1e6, traffic=2e6)
        time = seconds(work)
        bounds = {"HBM": work.hbm / H200.hbm, "L2": work.traffic / H200.l2}
        bounds["instructions"] = programs * warps * counts[""] / (H200.processors * H200.issue * H200.clock)
        assert time[""] == max(time.values()) and all(time[name] >= bound * (1 - 1e-9) for name, bound in bounds.items())


def test_ramp():
    values = [ramp(1000 * kilobytes) for kilobytes in range(100)]
    assert values == sorted(values) and values[16] == 0.75 and values[64:] == [1.0] * 36


def works(size):
    """Two readings of x, the second of which writes y."""
    x, y = ("x", None), ("y", None)
    first = Work("first", 1, read=[(x, size, True)], touched={x: (size, False)})
    return [first, Work("second", 1, read=[(x, size, True)], touched={x: (size, False), y: (size, False)}, hbm=size)]


def test_what_stays_in_cache():
    for size, again in ((H200.cache / 2, 0.0), (H200.cache, 0.5), (10 * H200.cache, 0.95)):
        one, two = works(size)
        from_memory([one, two])
        assert total(one, two) == 2 * size
        assert one.hbm == size and two.hbm == pytest.approx((1 + again) * size)


def test_loops_are_counted():
    call = record(case("layer_norm", (5000, 1024), "fp32"), "backward", Device())
    step = call.steps[0]
    what = program(step, inspect(step).ttir)
    assert what.trips == [math.ceil(5000 / step.named["P"])] and what.meetings == 0
    read = {access.name: access for access in what.accesses if not access.store}
    assert read["x_ptr"].times == what.trips[0] and read["x_ptr"].lanes == 1024 and read["weight_ptr"].times == 1
    assert {access.name for access in what.accesses if access.store} == {"dx_ptr", "sums_ptr"}


@pytest.mark.parametrize("norm, forward", [("group_norm", 1), ("layer_norm", 1), ("batch_norm", 1)])
def test_stub_driver(norm, forward):
    """Every launch of a call reaches the driver, by the launcher's short way from the second call on."""
    with stub_driver(), torch.no_grad():
        run, _ = prepare(small(norm), "forward")
        for _ in range(2):
            run()
        assert len(launcher._compiled) == forward
    assert not launcher._compiled, "what the stub left behind would be launched"


def test_the_readme_has_the_table_of_the_csv():
    readme = README.read_text()
    assert report.replace(readme, "bench:model", tables(read(RESULT)[1])) == readme, "python -m bench.model --report"
