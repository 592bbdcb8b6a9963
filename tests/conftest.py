"""Every body runs on every backend that can run here.

On CPU tensors ``cpu`` and ``reference``, on CUDA tensors ``triton``, ``cuda`` and ``reference``. ``NORMOPS_TEST_DEVICE=cuda`` leaves out the others.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # the checkout, installed or not

import normops
from normops import backends

# convolutions around the norms: float32 rounds like float32, and every time alike
torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True
DEVICES = [os.environ["NORMOPS_TEST_DEVICE"]] if "NORMOPS_TEST_DEVICE" in os.environ else ["cpu"] + ["cuda"] * torch.cuda.is_available()
ALL = [(name, device) for device in DEVICES for name in backends.ORDER[torch.device(device).type]]
RUNNABLE = [(name, device) for name, device in ALL if backends.unavailable(name) is None]


def pytest_report_header() -> list[str]:
    lines = [f"normops runs {', '.join(f'{name} on {device}' for name, device in RUNNABLE)}; torch {torch.__version__}"]
    absent = {name: backends.unavailable(name) for names in backends.ORDER.values() for name in names}
    return lines + [f"normops does not run {name}: {reason}" for name, reason in absent.items() if reason]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        only = getattr(metafunc.module, "ONLY", None)  # a file for tensors of one device
        pairs = [(name, device) for name, device in RUNNABLE if only in (None, device)]
        ids = [name if name != "reference" else f"reference-{device}" for name, device in pairs]
        metafunc.parametrize("backend", pairs, ids=ids, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """``NORMOPS_TEST_SHARE=3/16`` leaves the third sixteenth, for as many processes at once."""
    if share := os.environ.get("NORMOPS_TEST_SHARE"):
        number, count = map(int, share.split("/"))
        config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % count != number - 1])
        items[:] = items[number - 1 :: count]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed and "NORMOPS_TEST_SHARE" in os.environ:  # at once: the other processes have far to go
        lines = report.longreprtext.splitlines()
        print(report.nodeid, next((line for line in lines if line.startswith("E ")), lines[-1]), file=sys.stderr, flush=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest):
    """The name of the one backend that runs during the test."""
    name, _ = request.param
    with normops.backend(name):
        yield name


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """The device of the test's tensors: the backend's, where the test runs on a backend."""
    return request.node.callspec.params["backend"][1] if "backend" in request.fixturenames else DEVICES[-1]


@pytest.fixture
def poison():
    """Memory that ``torch.empty``, ``empty_like`` and ``new_empty`` hand out is full of NaN: what a kernel forgets to write is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(20240607)
