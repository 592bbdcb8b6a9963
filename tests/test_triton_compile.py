"""Compiles every kernel that the heuristics pick for real shapes, without a GPU, and asserts what predicts speed in the machine code:
no spills, full-width accesses wherever the contiguous length allows them, no atomics, and few enough instructions an element."""

import math
import multiprocessing
import os
import re

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from normops.kernels.config import choose
from triton_variants import compile_variant, executed, global_accesses, launches, resources

B, H, F, D = torch.bfloat16, torch.float16, torch.float32, torch.float64

# shape, groups, dtype, channels last, activation, residual, rows of weight (1) or one a sample (2)
CALLS = [
    ((2, 640, 32, 32), 32, B, False, 3, False, 1),  # held, the largest
    ((2, 320, 32, 32), 32, H, False, 3, False, 1),
    ((2, 1280, 8, 8), 32, B, False, 3, True, 2),
    ((64, 64, 56, 56), 32, F, False, 1, False, 1),
    ((2, 320, 32, 32), 32, F, False, 5, False, 1),
    ((64, 2048, 7, 7), 32, F, False, 1, True, 1),  # 49 positions: nothing divides
    ((64, 512, 14, 14), 32, B, False, 8, False, 1),
    ((2, 1280, 16, 16), 32, B, True, 3, False, 1),
    ((8, 64, 8, 8), 32, F, True, 1, False, 1),  # held channels last, under a sector
    ((16384, 4096), 64, B, False, 0, False, 1),  # (N, C), backward walks over samples
    ((1024, 8192), 512, F, False, 3, False, 2),
    ((64, 512, 257), 512, B, False, 4, False, 1),  # held, odd
    ((2, 320, 64, 64), 32, B, False, 3, False, 1),  # split, merged in apply
    ((2, 320, 64, 64), 32, F, False, 3, True, 1),
    ((2, 320, 64, 64), 32, B, True, 3, False, 1),
    ((2, 320, 64, 64), 32, F, True, 3, False, 2),
    ((1, 128, 1024, 1024), 32, B, False, 3, False, 1),  # split, folded
    ((1, 128, 1024, 1024), 32, B, True, 3, False, 1),
    ((2, 30, 96, 97), 3, F, True, 7, False, 1),  # 30 channels: two at a time
    ((8, 512, 49999), 512, B, False, 4, False, 1),  # split, odd
    ((1, 512, 49999), 1, F, False, 6, False, 1),
    ((2, 64, 33, 33, 33), 8, D, False, 3, True, 1),
    ((2, 64, 8, 8), 8, D, True, 6, False, 1),
    ((4, 128, 126, 126), 128, F, False, 2, False, 1),
    ((4, 40000), 1, B, False, 0, False, 1),  # (N, C), split
]
CAPABILITIES = [90, 80, 100]
# Instructions an element at which the issue slots and the HBM of an H200 are even; erf alone takes 25.
BUDGET = {(B, False): 29, (B, True): 42, (H, False): 29, (H, True): 42, (F, False): 57, (F, True): 84}


def inspect(job):
    call, backward, capability = job
    shape, G, dtype, channels_last, activation, residual, dims = call
    N, C = shape[:2]
    config = choose(N, C, math.prod(shape[2:]), G, dtype.itemsize, channels_last, backward)
    found = []
    for kernel, num_warps, args in launches(config, shape, G, dtype, channels_last, backward, activation, residual, dims):
        compiled = compile_variant(kernel, num_warps, args, capability)
        named = dict(zip((p.name for p in kernel.params), args, strict=True))
        named = {name: True if isinstance(value, torch.Tensor) else value for name, value in named.items()}
        opcodes = executed(compiled)
        found.append((kernel.__name__, num_warps, named, config, resources(compiled), global_accesses(opcodes), opcodes, compiled.asm["ptx"]))
    return found


@pytest.fixture(scope="module")
def compiled():
    jobs = [(call, backward, capability) for capability in CAPABILITIES for call in CALLS for backward in (False, True)]
    # The older and the newer architectures differ in the back end only: a quarter of the calls shows that it takes every kernel.
    jobs = [job for i, job in enumerate(jobs) if job[2] == 90 or i % 4 == 0]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return list(zip(jobs, pool.map(inspect, jobs, chunksize=1), strict=True))


def every(compiled, complaint):
    """`complaint` says what is wrong with a variant, or nothing; all complaints together are the failure."""
    complaints = []
    for (call, backward, capability), found in compiled:
        for variant in found:
            if text := complaint(call, backward, *variant):
                complaints.append(f"sm_{capability} {call} {variant[0]} {variant[3]}: {text}")
    assert not complaints, "\n".join(complaints)


def elements_of(named, num_warps):
    """Elements a thread."""
    return named.get("ROWS", 1) * named["OUTER"] * named["BLOCK_C"] * named["BLOCK_S"] / (32 * num_warps)


def test_no_spills(compiled):
    def complaint(call, backward, name, num_warps, named, config, usage, accesses, opcodes, ptx):
        if call[2] == D:  # a few registers are saved around the functions that divide and exponentiate in fp64
            return None
        spilled = any(opcode.startswith(("LDL", "STL")) for opcode in opcodes)
        # ptxas may give up two registers for a step of occupancy (that of Triton 3.6 does, once); it must not be more.
        return usage if usage["stack"] > 8 or usage["local"] or (spilled and not usage["stack"]) else None

    every(compiled, complaint)


def test_no_atomics(compiled):
    every(compiled, lambda *variant: re.search(r"\b(atom|red)\.", variant[-1]))


def test_full_width(compiled):
    """Tensors of x's size are read and written in vectors of V elements only."""

    def complaint(call, backward, name, num_warps, named, config, usage, accesses, opcodes, ptx):
        if "OUTER" not in named:
            return None
        vectors = max(1, int(elements_of(named, num_warps)) // config.V)
        width = config.V * call[2].itemsize * 8
        read = vectors * sum(named.get(name) is not None for name in ("x_ptr", "dy_ptr", "residual_ptr"))
        written = vectors * sum(named.get(name) is not None for name in ("y_ptr", "dx_ptr", "dresidual_ptr"))
        if accesses["ld", width] < read or accesses["st", width] < written:
            return f"expected {read} loads and {written} stores of {width} bits, got {accesses}"
        # What may be narrow: weight and bias of 8 channels, the one value that moments start from, a head and tail.
        if width == 128 and (accesses["ld", 16] > 18 or accesses["st", 16] > 2 or accesses["st", 8] or accesses["ld", 8]):
            return f"narrow accesses: {accesses}"
        return None

    every(compiled, complaint)


def test_instructions(compiled):
    def complaint(call, backward, name, num_warps, named, config, usage, accesses, opcodes, ptx):
        budget = BUDGET.get((call[2], backward))
        # Below 32 elements a thread the fixed costs of a program weigh more. Most of those do not fill the device; (N, C) and odd S
        # backward may, and lie over the budget or near it (34 and 44 of 29 and 42 for (N, C)): not asserted, still to be measured.
        if "OUTER" not in named or budget is None or config.V * call[2].itemsize < 16 or call[4] == 4 or elements_of(named, num_warps) < 32:
            return None
        count = len(opcodes) / elements_of(named, num_warps)
        return f"{count:.1f} instructions an element, budget {budget}, {usage}" if count > budget else None

    every(compiled, complaint)
