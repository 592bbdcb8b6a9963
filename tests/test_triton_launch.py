"""The launcher's bookkeeping, with a kernel and a driver that only take notes."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from normops.kernels import activation_moments
from normops.kernels import launch as launcher


class Compiled:
    function, packed_metadata = "function", "metadata"

    def __init__(self, notes):
        self.run = lambda *args: notes.append(("run", *args))


class Kernel:
    def __init__(self, notes):
        self.fn, self.notes = object(), notes
        self.arg_names = ["x_ptr", "size"]

    def __getitem__(self, grid):
        def call(*args, **options):
            self.notes.append(("compile", grid, *args))
            assert options == {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
            return Compiled(self.notes)

        return call


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(launcher, "INTERPRET", False)
    monkeypatch.setattr(launcher, "_compiled", {})
    monkeypatch.setattr(launcher, "_hooks", [], raising=False)
    monkeypatch.setattr(launcher, "_current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)  # what get_device() says of a CPU tensor
    return Kernel([])


def test_second_launch_is_direct(kernel):
    x = torch.zeros(64)
    for _ in range(2):
        launcher.launch(kernel, 3, 4, x, None, 5, 1e-5, True)
    first, second = kernel.notes
    assert first[:2] == ("compile", (3,))
    assert second[:10] == ("run", 3, 1, 1, "stream of -1", "function", "metadata", None, None, None)
    assert second[10] is x and second[11:] == (None, 5, 1e-5, True)


def test_what_selects_a_binary_is_in_the_key(kernel):
    x = torch.zeros(64)
    for args in ((x, 5), (x.double(), 5), (x, 6), (x, None)):
        launcher.launch(kernel, 1, 4, *args)
    assert [note[0] for note in kernel.notes] == ["compile"] * 4


def test_misaligned_tensors_go_through_triton(kernel):
    x = torch.zeros(64)
    for tensor in (x, x[1:], x[1:], x):
        launcher.launch(kernel, 1, 4, tensor)
    assert [note[0] for note in kernel.notes] == ["compile", "compile", "compile", "run"]


def test_hooks_and_missing_private_calls_go_through_triton(kernel, monkeypatch):
    x = torch.zeros(64)
    launcher.launch(kernel, 1, 4, x)
    monkeypatch.setattr(launcher, "_hooks", ["somebody listens"])
    launcher.launch(kernel, 1, 4, x)
    monkeypatch.setattr(launcher, "_hooks", [])
    monkeypatch.setattr(launcher, "_current_stream", None)
    launcher.launch(kernel, 1, 4, x)
    assert [note[0] for note in kernel.notes] == ["compile"] * 3


def test_the_cache_is_bounded(kernel, monkeypatch):
    monkeypatch.setattr(launcher, "CAPACITY", 2)
    x = torch.zeros(64)
    for size in range(5):
        launcher.launch(kernel, 1, 4, x, size)
    assert len(launcher._compiled) <= 2


def test_the_nodes_of_an_integral_are_made_once(kernel, monkeypatch):
    """What a map calls for is there at the second call: nothing is computed or copied on the way to the launch."""
    monkeypatch.setattr(activation_moments, "_activation_moments_kernel", kernel)
    mean, out = torch.zeros(64, dtype=torch.float64), torch.zeros(6, 64, dtype=torch.float64)
    for _ in range(2):
        activation_moments.forward(None, out, mean, mean, 7, 0.0, 0.0)
    (_, _, *first), (_, *second) = kernel.notes
    assert kernel.notes[1][0] == "run" and any(arg is first[3] for arg in second)
    nodes, weights = first[3].view(2, -1)
    torch.testing.assert_close(weights @ nodes.pow(126), torch.tensor(2 / 127, dtype=torch.float64))  # exact for polynomials of degree 127
