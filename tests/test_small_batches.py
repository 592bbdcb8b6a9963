"""Tiny batches of one class: what batch norm learns fails with its running statistics, what batch renormalization learns does not."""

import importlib
import sys
from pathlib import Path
from statistics import fmean

import pytest
import torch


@pytest.fixture
def example(monkeypatch):
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield importlib.import_module("small_batches")
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("batches", "steps"), [("2 of one class", 2000), ("4 of one class", 3000)])
def test_batch_norm_fails_where_batch_renorm_does_not(example, batches, steps):
    """Over seeds the difference is 26 points with a deviation of 4 for batches of 2, and 41 with 12 for batches of 4."""
    runs = {kind: example.train(kind, *example.BATCHES[batches], steps, seed=0) for kind in ("batch norm", "batch renorm")}
    accuracy = {kind: accuracies[-1] for kind, (_, accuracies) in runs.items()}
    assert accuracy["batch renorm"] > 0.9
    assert accuracy["batch norm"] < accuracy["batch renorm"] - 0.1
    losses = {kind: fmean(values[-steps // 10 :]) for kind, (values, _) in runs.items()}
    assert losses["batch norm"] < losses["batch renorm"], "it is not that batch norm did not learn"


def test_the_example_runs(example, monkeypatch, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "plot.png"
    monkeypatch.setattr(sys, "argv", ["small_batches.py", "--steps", "20", "--seeds", "2", "--plot", str(picture)])
    example.main()
    text = capsys.readouterr().out
    for name in example.BATCHES:
        for kind in example.NORMS:
            assert f"| {name} | {kind} |" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
