"""Tensors of more than 2^31 elements, forward and backward: what lies at the start, around element 2^31 and at the end.

Slices that share no statistic with the rest, samples or channels, are held to the oracle as calls of their own.
"""

import math
from dataclasses import replace

import pytest
import torch
from cases import ADAPTIVE, KINDS, Inputs, case_of, check
from oracle import Result

ONLY = "cuda"  # for conftest.py
if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)

LIMIT = 1 << 31
SHAPES = {
    "planes": ((37, 36, 1308, 1308), torch.bfloat16),
    "odd_planes": ((37, 36, 1309, 1307), torch.float16),
    "samples": (((1 << 20) + 5000, 32, 8, 8), torch.float16),
}  # fmt: skip
TENSORS = 16  # of x's size, at once: x, residual, y, their gradients, what an oracle makes of a slice


def cut(inputs: Inputs, result: Result, dim: int, index: slice) -> tuple[Inputs, Result]:
    """The call of some samples (dim 0) or channels (dim 1), as far as its results are parts of the whole's."""
    small = {name for name in inputs.tensors if name in ("weight", "bias", "rho")}

    def part(name, value):
        if value is None or dim == 0 and name in small:
            return value
        return value[index] if dim == 0 or value.dim() == 1 else value[:, index]

    def parts(values):
        return {name: part(name, value) for name, value in values.items()}

    gradients = {name: value for name, value in result.gradients.items() if dim == 1 or name not in small}
    tensors, running = parts(inputs.tensors), inputs.running
    if dim == 1:
        running, result = tuple(part("running", value) for value in running), replace(result, running=parts(result.running))
    inner = replace(
        inputs, case=replace(inputs.case, shape=tuple(tensors["x"].shape)), tensors=tensors, dy=part("dy", inputs.dy),
        dtotal=part("dtotal", inputs.dtotal), running=running,
    )  # fmt: skip
    return inner, replace(result, y=part("y", result.y), total=part("total", result.total), gradients=parts(gradients))


@pytest.mark.parametrize("shape, dtype", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", [*KINDS, *ADAPTIVE])
def test_large(kind, shape, dtype, backend, device):
    if backend == "reference":
        pytest.skip("torch's ops would hold dozens of such tensors, in float32")
    torch.cuda.empty_cache()
    wanted, free = TENSORS * dtype.itemsize * math.prod(shape), torch.cuda.mem_get_info()[0]
    if free < wanted:
        pytest.skip(f"it takes {wanted >> 30} GiB of device memory, {free >> 30} are free")
    rows = kind.startswith(("layer", "rms", "add"))
    vectors = {} if rows or kind in ADAPTIVE or "conditional" in kind else {"scale": True, "shift": True}
    case = case_of(kind, "more than 2^31 elements", shape, dtype=dtype, residual=kind not in ADAPTIVE, activation="silu", **vectors)
    inputs = Inputs.of(case, device)
    result = inputs.run()
    assert result.y.numel() > LIMIT
    dim = 0 if rows or "group" in kind else 1
    length = case.shape[dim]
    count = 1 if dim == 1 else max(1, (1 << 21) * length // result.y.numel())
    middle = length // 2 if dim == 1 else LIMIT * length // result.y.numel() - count // 2
    for first in (0, middle, length - count):
        part, found = cut(inputs, result, dim, slice(first, first + count))
        check(found, part)
