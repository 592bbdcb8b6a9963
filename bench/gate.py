"""No speed for a wrong result: every method's result and gradients are compared with float64 before it is timed."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.methods import KINKS, NORMS, Call, penalty
from bench.shapes import DTYPES, Case, lay_out

CHUNK = 2**25  # elements that are computed in float64 at a time
# largest error over largest value; several roundings of the dtype, as torch's own composition makes them. bench.accuracy looks closer.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4, torch.float16: 8e-3, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Exact:
    """The float64 results of a case by name, the size against which dx is measured, and the gradient-penalty step where it is timed."""

    values: dict[str, Tensor]
    dx_size: float
    penalty: tuple[Tensor, ...] = ()


def upstream(case: Case, inputs: dict[str, Tensor]) -> Tensor:
    """A random dy, 0 where the argument of the activation is so near a kink that its rounding decides about the derivative."""
    x = inputs["x"].detach()
    generator = torch.Generator(x.device).manual_seed(1)
    dy = torch.randn(x.shape, generator=generator, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
    dy = lay_out(dy.to(x.dtype), case.layout)
    if kinks := KINKS.get(case.act):
        call = NORMS[case.norm].truth(replace(case, act="none"), False)
        margin = max(8 * torch.finfo(x.dtype).eps, 1e-5)
        with torch.no_grad():
            for part in _parts(case):
                t = call(*_leaves(case, inputs, part).values())
                for kink in kinks:
                    dy[part].masked_fill_((t - kink).abs() < margin, 0)
    return dy


def truth(case: Case, inputs: dict[str, Tensor], dy: Tensor, second: bool = False) -> Exact:
    """y and the gradients in float64, from the very tensors the methods get, a few samples at a time."""
    norm = NORMS[case.norm]
    values = {"y": torch.empty_like(dy, dtype=torch.float64)}
    values |= {f"d{name}": torch.zeros_like(value, dtype=torch.float64) for name, value in inputs.items()}
    dx_size = 0.0
    for part in _parts(case):
        leaves = _leaves(case, inputs, part)
        upstream = dy[part].double()
        y = norm.truth(case, False)(*leaves.values())
        values["y"][part] = y.detach()
        for name, gradient in zip(leaves, torch.autograd.grad(y, list(leaves.values()), upstream), strict=True):
            if name in norm.per_sample:
                values[f"d{name}"][part] = gradient
            else:
                values[f"d{name}"] += gradient
        (term,) = torch.autograd.grad(norm.truth(case, True)(*leaves.values()), [leaves["x"]], upstream)
        dx_size = max(dx_size, term.abs().max().item())
    if not second:
        return Exact(values, dx_size)
    step = penalty(norm.truth(case, False), list(_leaves(case, inputs, slice(None)).values()), dy.double())
    return Exact(values, dx_size, step())


def _parts(case: Case) -> Iterator[slice]:
    step = max(1, CHUNK * case.shape[0] // max(1, case.numel))
    return (slice(start, start + step) for start in range(0, case.shape[0], step))


def _leaves(case: Case, inputs: dict[str, Tensor], part: slice) -> dict[str, Tensor]:
    """The inputs of some samples in float64."""
    split = NORMS[case.norm].per_sample
    return {name: (value[part] if name in split else value).detach().double().requires_grad_() for name, value in inputs.items()}


def results(call: Call, inputs: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    """y and the gradients as a method gives them."""
    leaves = list(inputs.values())
    y = call(*leaves)
    gradients = torch.autograd.grad(y, leaves, dy)
    return {"y": y.detach()} | {f"d{name}": gradient for name, gradient in zip(inputs, gradients, strict=True)}


def error(value: Tensor, exact: Tensor, size: float = 0.0) -> float:
    """Largest absolute error over the largest absolute value, or over `size` if that is larger; NaN where there is a NaN."""
    if value.shape != exact.shape:
        return float("inf")
    rows = max(1, CHUNK * exact.shape[0] // max(1, exact.numel()))
    worst = [(a.double() - b).abs().max() for a, b in zip(value.split(rows), exact.split(rows), strict=True)]
    return (torch.stack(worst).max() / exact.abs().max().clamp_min(size or 1e-300)).item()


def wrong(case: Case, call: Call, inputs: dict[str, Tensor], dy: Tensor, exact: Exact) -> str:
    """Which results are wrong and by how much; empty when none is."""
    tolerance = TOLERANCE[DTYPES[case.dtype]]
    return ", ".join(f"{name} {off:.1e}" for name, off in _errors(call, inputs, dy, exact) if not off <= tolerance)


def _errors(call: Call, inputs: dict[str, Tensor], dy: Tensor, exact: Exact) -> Iterator[tuple[str, float]]:
    with torch.no_grad():
        y = call(*inputs.values())
    yield "y without grad", error(y, exact.values["y"])
    del y
    for name, value in results(call, inputs, dy).items():
        yield name, error(value, exact.values[name], exact.dx_size if name == "dx" else 0.0)
    if exact.penalty:
        for name, value, right in zip(("d2x", "d2weight"), penalty(call, list(inputs.values()), dy)(), exact.penalty, strict=True):
            yield name, error(value, right)
