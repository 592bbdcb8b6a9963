"""The demo runs, and its two networks learn the same."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_digits(tmp_path):
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    command = [sys.executable, "examples/digits.py", "--epochs", "1", "--plot", str(tmp_path / "demo.png")]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    for row in ("test accuracy", "median time of a step", "largest loss difference", "largest relative difference", "computed by"):
        assert row in result.stdout
    (difference,) = re.findall(r"largest relative difference\s+(\S+)", result.stdout)
    assert float(difference) < 1e-4  # float32, through ten norms and their convolutions
