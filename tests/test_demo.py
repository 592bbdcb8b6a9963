"""The README and the examples run; the demo's two networks learn the same, three workers learn what one does, and a styled picture has the
statistics of the style."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def run(*command: str) -> str:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path}
    result = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_digits(tmp_path):
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    text = run("examples/digits.py", "--epochs", "1", "--plot", str(tmp_path / "demo.png"))
    for row in ("test accuracy", "median time of a step", "largest loss difference", "largest relative difference", "computed by"):
        assert row in text
    (difference,) = re.findall(r"largest relative difference\s+(\S+)", text)
    assert float(difference) < 1e-4  # float32, through ten norms and their convolutions


def test_train_ddp():
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    script = "examples/train_ddp.py", "--epochs", "2", "--dtype", "float64"
    launcher = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"
    losses = []
    for command, name in ((script, "1 worker"), ((*launcher, *script), "3 workers")):
        text = run(*command)
        assert f" {name} " in text
        losses.append(re.findall(r"loss, epoch \d+ +(\S+) +(\S+)", text))
        (difference,) = re.findall(r"largest difference of the losses +(\S+)", text)
        assert float(difference) < 1e-12  # float64, and a loss of about 1
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_readme():
    first, *others = re.findall("```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict = {"__name__": "readme"}
    exec(first, names)
    for block in others:
        exec(block, dict(names))


def test_style(tmp_path):
    pytest.importorskip("skimage", reason="the photographs are scikit-image's")
    pytest.importorskip("matplotlib")
    picture = tmp_path / "style.png"
    text = run("examples/style.py", "--out", str(picture))
    style, result = (re.findall(rf"^{name}.*?((?:\d\.\d+ / \d\.\d+\s*)+)$", text, re.MULTILINE)[0].split() for name in ("style", "result"))
    assert style == result
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_styled_picture_has_the_statistics_of_the_style(backend, device):
    pytest.importorskip("skimage", reason="the photographs are scikit-image's")
    example = runpy.run_path(str(ROOT / "examples" / "style.py"))
    content, style = (example["photograph"](name).to(device) for name in ("chelsea", "rocket"))
    result = example["match"](content, style)
    assert result.shape == content.shape
    for found, expected in zip(example["statistics"](result.double()), example["statistics"](style.double()), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
