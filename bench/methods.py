"""What is timed of a case: one entry of ``DIRECTIONS`` each, and who computes it."""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.norms import Call, eager, manual, ours
from bench.rivals import rivals
from bench.shapes import Case


def methods(case: Case, device: str = "cpu") -> dict[str, Call]:
    """Name -> call, of all but ``compile``, which takes seconds."""
    found = {"ours": ours(case), "eager": eager(case), "manual": manual(case)}
    others = rivals(case) if device == "cuda" and "penalty" not in directions(case) else {}
    return {name: call for name, call in found.items() if call is not None} | others


def compiled(case: Case) -> Call:
    """The eager composition under ``torch.compile``."""
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False  # else its backward runs once per forward and could not be timed alone
    torch.compiler.reset()
    return torch.compile(eager(case), dynamic=False)


Upstream = tuple[Tensor, ...]  # a gradient for every result


def _forward(call: Call, leaves: list[Tensor], dy: Upstream) -> Callable[[], object]:
    return lambda: call(*leaves)


def _backward(call: Call, leaves: list[Tensor], dy: Upstream) -> Callable[[], object]:
    y = call(*leaves)
    return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)


def _both(call: Call, leaves: list[Tensor], dy: Upstream) -> Callable[[], object]:
    return lambda: torch.autograd.grad(call(*leaves), leaves, dy)


def penalty(call: Call, leaves: list[Tensor], dy: Upstream) -> Callable[[], tuple[Tensor, ...]]:
    """A gradient-penalty step: the gradients of ``sum(dx**2)`` for x and weight."""

    def run() -> tuple[Tensor, ...]:
        (dx,) = torch.autograd.grad(call(*leaves), leaves[:1], dy, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), leaves[:2])

    return run


# name -> whether grad mode is on, and what makes the function to time out of a method's call, its leaf tensors and dy
DIRECTIONS = {
    "forward": (False, _forward),
    "backward": (True, _backward),
    "fwd+bwd": (True, _both),
    "forward, grad": (True, _forward),
    "penalty": (True, penalty),
}
HOST = Case("group_norm", "host/2x32x4x4/none", (2, 32, 4, 4), "fp32", "NCHW", "none", 1e-5, 1, "too small for anything but the host's overhead", 8)
PENALTY = Case("group_norm", "penalty/4x128x32x32/none", (4, 128, 32, 32), "fp32", "NCHW", "none", 1e-5, 1, "double backward", 32)


def directions(case: Case) -> tuple[str, ...]:
    """What is timed of a case."""
    if case.name == HOST.name:
        return "forward", "forward, grad", "fwd+bwd"
    return ("penalty",) if case.name == PENALTY.name else ("forward", "backward", "fwd+bwd")
