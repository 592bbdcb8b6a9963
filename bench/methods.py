"""What is measured: a norm is one entry of ``NORMS``, a way of calling it one entry of ``DIRECTIONS``.

The method ``ours`` is the library, ``eager`` the same result from torch's own ops one after the other (plain ``F.group_norm`` where
nothing is fused), ``compile`` that composition under ``torch.compile``, ``truth`` a formula that is exact enough in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import normops
from bench.shapes import DTYPES, Case, lay_out

Call = Callable[..., Tensor]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "hardswish": F.hardswish,
}
KINKS = {"relu": (0.0,), "leaky_relu": (0.0,), "hardswish": (-3.0, 3.0)}  # where the derivative jumps


@dataclass(frozen=True)
class Norm:
    """A norm: how its tensors are made, who computes it, and the fewest bytes that a computation can move.

    `inputs` gives the tensors of a case by name, in the order in which the calls take them; those in `per_sample` have a batch dimension.
    `ours`, `eager` and `truth` make the call of a case; `truth` with True takes the statistics for constants, which leaves of dx the first of
    the terms that cancel, and so the size of its rounding. `bytes` gives the bytes of forward and backward.
    """

    inputs: Callable[[Case, str], dict[str, Tensor]]
    per_sample: tuple[str, ...]
    ours: Callable[[Case], Call]
    eager: Callable[[Case], Call]
    truth: Callable[[Case, bool], Call]
    bytes: Callable[[Case], dict[str, int]]


def _group_norm_inputs(case: Case, device: str) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    dtype = DTYPES[case.dtype]

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.promote_types(dtype, torch.float32))

    inputs = {"x": lay_out((random(*case.shape) * 1.5 + 0.5).to(dtype), case.layout)}
    inputs |= {name: random(case.shape[1]).to(dtype) for name in ("weight", "bias")}
    if case.residual:
        inputs["residual"] = lay_out(random(*case.shape).to(dtype), case.layout)
    return inputs


def _group_norm_ours(case: Case) -> Call:
    options: dict[str, Any] = {} if case.act == "none" else {"activation": case.act}

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return normops.group_norm(x, case.groups, weight, bias, case.eps, **options)

    def call_residual(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return normops.group_norm(x, case.groups, weight, bias, case.eps, residual=residual, **options)

    return call_residual if case.residual else call


def _group_norm_eager(case: Case, group_norm: Call = F.group_norm) -> Call:
    act = ACTIVATIONS.get(case.act)

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return group_norm(x, case.groups, weight, bias, case.eps)

    def composed(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        t = group_norm(x, case.groups, weight, bias, case.eps)
        if residual is not None:
            t = t + residual
        return t if act is None else act(t)

    return plain if act is None and not case.residual else composed


def _formula(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, frozen: bool = False) -> Tensor:
    grouped = x.reshape(x.shape[0], groups, -1)
    mean = grouped.mean(2, keepdim=True)
    rstd = torch.rsqrt((grouped - mean).square().mean(2, keepdim=True) + eps)
    if frozen:
        mean, rstd = mean.detach(), rstd.detach()
    x_hat = ((grouped - mean) * rstd).reshape(x.shape)
    column = (-1,) + (1,) * (x.dim() - 2)
    return x_hat * weight.view(column) + bias.view(column)


def _group_norm_bytes(case: Case) -> dict[str, int]:
    """Forward reads x and writes y; backward reads x, dy and writes dx.

    A residual is read once more in forward; in backward it is read and its gradient written only if an activation follows.
    """
    residual_bwd = 2 if case.residual and case.act != "none" else 0
    return {"forward": (2 + case.residual) * case.nbytes, "backward": (3 + residual_bwd) * case.nbytes}


NORMS: dict[str, Norm] = {
    "group_norm": Norm(
        inputs=_group_norm_inputs,
        per_sample=("x", "residual"),
        ours=_group_norm_ours,
        eager=_group_norm_eager,
        truth=lambda case, frozen: _group_norm_eager(case, partial(_formula, frozen=frozen)),
        bytes=_group_norm_bytes,
    )
}


def compiled(case: Case) -> Call:
    """The eager composition under ``torch.compile``."""
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False  # else its backward runs once per forward and could not be timed alone
    torch.compiler.reset()
    return torch.compile(NORMS[case.norm].eager(case), dynamic=False)


def minimum_bytes(case: Case, direction: str) -> int:
    """The fewest bytes that `direction` moves: every tensor of x's size once; vectors and statistics are left out."""
    sizes = NORMS[case.norm].bytes(case)
    if direction in ("forward", "forward, grad"):
        return sizes["forward"]
    return sizes["backward"] if direction == "backward" else sum(sizes.values())


def _forward(call: Call, leaves: list[Tensor], dy: Tensor) -> Callable[[], object]:
    return lambda: call(*leaves)


def _backward(call: Call, leaves: list[Tensor], dy: Tensor) -> Callable[[], object]:
    y = call(*leaves)
    return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)


def _both(call: Call, leaves: list[Tensor], dy: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(call(*leaves), leaves, dy)


def penalty(call: Call, leaves: list[Tensor], dy: Tensor) -> Callable[[], tuple[Tensor, ...]]:
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
HOST = Case("group_norm", "host/2x32x4x4/none", (2, 32, 4, 4), "fp32", "NCHW", 8, "none", 1e-5, 1, "too small for anything but the host's overhead")
PENALTY = Case("group_norm", "penalty/4x128x32x32/none", (4, 128, 32, 32), "fp32", "NCHW", 32, "none", 1e-5, 1, "double backward")


def directions(case: Case) -> tuple[str, ...]:
    """What is timed of a case."""
    if case.name == HOST.name:
        return "forward", "forward, grad", "fwd+bwd"
    return ("penalty",) if case.name == PENALTY.name else ("forward", "backward", "fwd+bwd")
