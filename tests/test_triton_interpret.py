"""Runs triton_cases.py with TRITON_INTERPRET=1. That must be set before Triton is first imported, hence a process of its own."""

import os
import pathlib
import subprocess
import sys

import pytest


def test_triton_in_the_interpreter():
    pytest.importorskip("triton", reason="triton is not installed")
    here = pathlib.Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(here / "triton_cases.py")],
        cwd=here.parent,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
