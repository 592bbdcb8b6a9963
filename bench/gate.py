"""No speed for a wrong result: every method's result and gradients are compared with float64 before it is timed."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.methods import Upstream, penalty
from bench.norms import KINKS, NORMS, Call, following
from bench.norms import truth as exact_call
from bench.shapes import DTYPES, Case, lay_out

CHUNK = 2**25  # elements that are computed in float64 at a time
# largest error over largest value; several roundings of the dtype, as torch's own composition makes them. bench.accuracy looks closer.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4, torch.float16: 8e-3, torch.bfloat16: 5e-2}

Part = tuple[slice, ...]  # index of some samples, or of some channels where samples share statistics; without its first slice, of vectors


@dataclass(frozen=True)
class Exact:
    """The float64 results of a case by name, the size against which dx is measured, and the gradient-penalty step where it is timed."""

    values: dict[str, Tensor]
    dx_size: float
    penalty: tuple[Tensor, ...] = ()


def upstream(case: Case, inputs: dict[str, Tensor]) -> Upstream:
    """A random dy for every result, 0 where the argument of the activation is so near a kink that its rounding decides about the derivative."""
    x = inputs["x"].detach()
    generator = torch.Generator(x.device).manual_seed(1)
    dtype = torch.promote_types(x.dtype, torch.float32)
    shapes = [x.shape[:1] if name == "bias" else x.shape for name in NORMS[case.norm].results]
    dys = [torch.randn(shape, generator=generator, device=x.device, dtype=dtype) for shape in shapes]
    dy, *others = [lay_out(each.to(x.dtype), case.layout) for each in dys]
    if kinks := KINKS.get(following(case)):
        call = exact_call(replace(case, act="none"), False)
        margin = max(8 * torch.finfo(x.dtype).eps, 1e-5)
        with torch.no_grad():
            for part in _parts(case):
                t = call(*_leaves(case, inputs, part).values())
                for kink in kinks:
                    dy[part].masked_fill_((t - kink).abs() < margin, 0)
    return dy, *others


def truth(case: Case, inputs: dict[str, Tensor], dy: Upstream, second: bool = False) -> Exact:
    """The results and the gradients in float64, from the very tensors the methods get, a part at a time."""
    norm = NORMS[case.norm]
    values = {name: torch.empty_like(each, dtype=torch.float64) for name, each in zip(norm.results, dy, strict=True)}
    values |= {f"d{name}": torch.zeros_like(value, dtype=torch.float64) for name, value in inputs.items()}
    dx_size = 0.0
    for part in _parts(case):
        leaves = _leaves(case, inputs, part)
        upstream = [each[part].double() for each in dy]
        found = _tuple(exact_call(case, False)(*leaves.values()))
        for name, value in zip(norm.results, found, strict=True):
            values[name][part] = value.detach()
        for name, gradient in zip(leaves, torch.autograd.grad(found, list(leaves.values()), upstream), strict=True):
            if name in norm.vectors:
                values[f"d{name}"][part[1:]] += gradient
            else:
                values[f"d{name}"][part] = gradient
        (term,) = torch.autograd.grad(exact_call(case, True)(*leaves.values()), [leaves["x"]], upstream)
        dx_size = max(dx_size, term.abs().max().item())
    if not second:
        return Exact(values, dx_size)
    step = penalty(exact_call(case, False), list(_leaves(case, inputs, (slice(None),)).values()), tuple(each.double() for each in dy))
    return Exact(values, dx_size, step())


def _parts(case: Case) -> Iterator[Part]:
    length = case.shape[case.over_samples]
    step = max(1, CHUNK * length // max(1, case.numel))
    return ((slice(None),) * case.over_samples + (slice(start, start + step),) for start in range(0, length, step))


def _leaves(case: Case, inputs: dict[str, Tensor], part: Part) -> dict[str, Tensor]:
    """The inputs of a part in float64."""
    shared = NORMS[case.norm].vectors
    return {name: value[part[1:] if name in shared else part].detach().double().requires_grad_() for name, value in inputs.items()}


def _tuple(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else tuple(found)


def results(case: Case, call: Call, inputs: dict[str, Tensor], dy: Upstream) -> dict[str, Tensor]:
    """The results and the gradients as a method gives them."""
    leaves = list(inputs.values())
    found = _tuple(call(*leaves))
    gradients = torch.autograd.grad(found, leaves, dy)
    names = (*NORMS[case.norm].results, *(f"d{name}" for name in inputs))
    return dict(zip(names, (*(value.detach() for value in found), *gradients), strict=True))


def error(value: Tensor, exact: Tensor, size: float = 0.0) -> float:
    """Largest absolute error over the largest absolute value, or over `size` if that is larger; NaN where there is a NaN."""
    if value.shape != exact.shape:
        return float("inf")
    rows = max(1, CHUNK * exact.shape[0] // max(1, exact.numel()))
    worst = [(a.double() - b).abs().max() for a, b in zip(value.split(rows), exact.split(rows), strict=True)]
    return (torch.stack(worst).max() / torch.linalg.vector_norm(exact, torch.inf).clamp_min(size or 1e-300)).item()


def wrong(case: Case, call: Call, inputs: dict[str, Tensor], dy: Upstream, exact: Exact) -> dict[str, float]:
    """Which results are wrong and by how much; empty when none is."""
    tolerance = TOLERANCE[DTYPES[case.dtype]]
    return {name: off for name, off in _errors(case, call, inputs, dy, exact) if not off <= tolerance}


def verdict(case: Case, call: Call, inputs: dict[str, Tensor], dy: Upstream, exact: Exact, rival: bool) -> str:
    """``ok`` or what is wrong. A rival whose 16-bit sums lose digits is only called inaccurate: torch's layer norm adds bf16 dweight up in bf16."""
    off = wrong(case, call, inputs, dy, exact)
    text = ", ".join(f"{name} {value:.1e}" for name, value in off.items())
    sums = all(name in [f"d{vector}" for vector in NORMS[case.norm].vectors] and value < 1 for name, value in off.items())
    return f"{'inaccurate' if rival and sums else 'WRONG'}: {text}" if off else "ok"


def _errors(case: Case, call: Call, inputs: dict[str, Tensor], dy: Upstream, exact: Exact) -> Iterator[tuple[str, float]]:
    with torch.no_grad():
        found = _tuple(call(*inputs.values()))
    for name, value in zip(NORMS[case.norm].results, found, strict=True):
        yield f"{name} without grad", error(value, exact.values[name])
    del found
    for name, value in results(case, call, inputs, dy).items():
        yield name, error(value, exact.values[name], exact.dx_size if name == "dx" else 0.0)
    if exact.penalty:
        for name, value, right in zip(("d2x", "d2weight"), penalty(call, list(inputs.values()), dy)(), exact.penalty, strict=True):
            yield name, error(value, right)
