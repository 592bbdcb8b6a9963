"""Runs of the benchmark in parts: what a run that ends early leaves, and the one that goes on."""

import pytest
from test_bench import CASE, PLAN

import bench.__main__ as command
from bench import machine, run


@pytest.fixture
def start(monkeypatch, tmp_path):
    for name, value in machine.MALLOC.items():
        monkeypatch.setenv(name, value)  # else the program would start itself again
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")

    def started(*options):
        command.main(["group_norm", "--quick", "--device", "cpu", "--shapes", "tiny/[12]*", "--threads", "1", "--out", str(tmp_path), *options])
        (path,) = tmp_path.glob("group_norm_cpu_*.csv")
        return path

    return started


def test_no_case_begins_after_the_end():
    said = []
    assert not list(command._batches(run, [CASE, CASE], PLAN, said.append, 2, end=0.0))
    assert said == ["group_norm: 2 cases are left to measure"]


def test_the_missing_cases_are_measured(start, capsys):
    path = start()
    rows = run.read(path)[1]
    some = [line for line in path.read_text().splitlines() if ",2x2048x1x1," not in line or ",bf16," not in line]
    path.write_text("\n".join(some) + "\n")
    capsys.readouterr()
    start("--resume", "--minutes", "0")
    assert "group_norm: 1 cases are left to measure" in capsys.readouterr().out
    start("--resume", "--warm", "1")
    said = capsys.readouterr().out
    assert "1 cases compiled by 1 processes" in said and "[1/1]" in said
    assert path.read_text().splitlines()[: len(some)] == some
    assert sorted(map(run.key, run.read(path)[1])) == sorted(map(run.key, rows))
    start("--resume")
    assert "group_norm: 0 cases are left to measure" in capsys.readouterr().out


def test_other_versions_are_not_mixed(start):
    path = start()
    path.write_text(path.read_text().replace("# torch: ", "# torch: older than "))
    with pytest.raises(SystemExit, match="cannot be resumed, its torch differ"):
        start("--resume")


def test_what_is_compiled_is_called_in_both_directions(monkeypatch):
    called = []

    def ours(x, weight, bias):
        called.append((tuple(x.shape), x.requires_grad and run.torch.is_grad_enabled()))
        return x * weight[:, None] + bias[:, None]

    monkeypatch.setattr(run, "methods", lambda case, device: {"ours": ours, "eager": pytest.fail})
    run.warm(CASE, PLAN)
    assert called == [(CASE.shape, False), (CASE.shape, True)]
