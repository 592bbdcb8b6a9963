"""The questions to a GPU, without one: their kernels compile for every architecture, and all of them run, small, in Triton's interpreter."""

import functools
import os
import pathlib
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from concurrency import concurrently
from normops.kernels import fold, group_norm, row_norm
from normops.kernels.config import Device
from normops.kernels.launch import launch

from bench import questions, run, shapes

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRET, reason="runs in the interpreter, in a process of its own")


@pytest.mark.skipif(INTERPRET, reason="the interpreter compiles nothing")
def test_in_the_interpreter():
    arguments = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(arguments, cwd=pathlib.Path(__file__).parent.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(INTERPRET, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_every_kernel_compiles(capability):
    """Copies in accesses of 16 bytes."""
    from bench.compiled import Launch, compile_variant, executed, global_accesses, meta

    x, n, meeting = meta(4096, dtype=torch.bfloat16), 4096 // 8, meta(4096, dtype=torch.int32)
    copy = (x, x, n, 8192, "evict_first", "evict_last", True)
    launches = [
        Launch(questions._copy_kernel, 1, 8, copy),
        Launch(questions._read_kernel, 1, 8, (x, x, n, 8192, "evict_last")),
        Launch(questions._meet_kernel, 2, 8, (meeting, 2, 100), cooperative=True),
        Launch(questions._empty_kernel, 1, 4, (x, *range(9))),
        Launch(questions._chained_kernel, 1, 8, (x, x, n, 8192, capability >= 90)),
    ]
    found = {launch.kernel.__name__: compile_variant(launch, capability) for launch in launches}
    accesses = global_accesses(executed(found["_copy_kernel"]))
    assert accesses == {("ld", 128): 4, ("st", 128): 4}
    text = {name: compiled.asm["ptx"] for name, compiled in found.items()}
    assert re.search(r"(ld|atom)\.\S*acquire", text["_meet_kernel"])
    assert ("griddepcontrol.wait" in text["_chained_kernel"]) == (capability >= 90)
    assert "evict_first" in text["_copy_kernel"] and "evict_last" in text["_copy_kernel"]


class Once:
    """A timer that calls everything once."""

    def sampler(self, call):
        call()
        return lambda: 1e-3


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(questions, "DEVICE", "cpu")
    monkeypatch.setattr(questions, "MIB", 256)
    monkeypatch.setattr(questions, "WAVES", (8, 40, 64))
    monkeypatch.setattr(questions, "TIMERS", dict.fromkeys(questions.TIMERS, Once))
    grid = shapes.grid
    monkeypatch.setattr(shapes, "grid", lambda *of: [replace(case, shape=(2, *case.shape[1:2], 3, 2)) for case in grid(*of)])
    monkeypatch.setattr(questions, "device_of", functools.lru_cache(lambda index: Device(processors=3)))
    for module in (fold, group_norm, row_norm):  # one program of each of the library's own kernels, whose results other tests look at
        monkeypatch.setattr(module, "launch", lambda kernel, programs, *rest, **options: launch(kernel, 1, *rest, **options))
    for name in ("gdc_wait", "gdc_launch_dependents"):  # unknown to the interpreter, which runs one launch after the other
        monkeypatch.setattr(questions, name, lambda: None)


@interpreted
@pytest.mark.parametrize("reverse", [False, True])
def test_what_is_moved(reverse):
    """Copies and sums are right, also where the last tile is not full, and of slices one after the other."""
    x = torch.arange(20_000, dtype=torch.float32).sin().to(torch.bfloat16)
    y, z, sums = torch.empty_like(x), torch.empty_like(x), torch.full((3,), torch.nan)
    questions._copy(x, y, 4096, 4, "evict_first", "", reverse)
    assert torch.equal(x, y)
    questions._wave(x, z, sums, 16_384, ("evict_last", "evict_first", ""), reverse)
    assert torch.equal(x, z)
    torch.testing.assert_close(sums[0], x[16_384:].float().sum())  # of the second slice, its only tile


@interpreted
def test_programs_meet(small, monkeypatch, tmp_path):
    """All programs of a launch at once, in teams, as often as they are told."""
    meetings, real = [], questions.meet
    monkeypatch.setattr(questions, "MEETINGS", 3)
    monkeypatch.setattr(questions, "meet", lambda *of: meetings.append(of[2]) or real(*of))
    with concurrently(0):
        rows = questions.ask("exchange", 0.0)
    assert [row["variant"] for row in rows[:5]] == [
        f"{each} a processor, {teams} teams of {P}" for each, teams, P in ((1, 1, 2), (1, 1, 3), (2, 3, 2), (2, 1, 4), (2, 1, 6))
    ]
    assert len(meetings) == 3 * (2 + 3 + 6 + 4 + 6)


@interpreted
@pytest.mark.parametrize("name", [name for name in questions.QUESTIONS if name != "exchange"])
def test_every_question_is_answered(small, name, tmp_path, capsys):
    questions.main(["--only", name, "--out", str(tmp_path), "--budget", "0"])
    (path,) = tmp_path.glob("questions_*.csv")
    facts, rows = run.read(path)
    assert {"machine", "torch", "triton", f"expected, {name}"} <= facts.keys()
    assert rows and all(row["status"] == "ok" for row in rows), [row for row in rows if row["status"] != "ok"]
    assert len({(row["variant"], row["timer"]) for row in rows}) == len(rows)
    printed = capsys.readouterr().out
    assert printed.startswith(f"{name}: ") and printed.count("\n| ") <= questions.SHOWN + 2
