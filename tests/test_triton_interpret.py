"""Runs triton_cases.py and its like with TRITON_INTERPRET=1, all at a time. That must be set before Triton is first imported, hence processes
of their own."""

import os
import pathlib
import subprocess
import sys

import pytest


def test_triton_in_the_interpreter():
    pytest.importorskip("triton", reason="triton is not installed")
    here = pathlib.Path(__file__).parent
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(here / name)],
            cwd=here.parent,
            env={**os.environ, "TRITON_INTERPRET": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in ("triton_cases.py", "triton_row_cases.py", "triton_batch_cases.py", "triton_statistics_cases.py", "triton_meeting_cases.py")
    ]
    outputs = [process.communicate()[0] for process in started]
    assert all(process.returncode == 0 for process in started), "\n".join(outputs)
