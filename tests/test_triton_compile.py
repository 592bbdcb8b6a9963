"""Compiles every kernel that the heuristics pick for real shapes, without a GPU, and asserts what predicts speed in the machine code:
no spills, full-width accesses wherever the contiguous length allows them, no atomics, and few enough instructions an element."""

import dataclasses
import multiprocessing
import os
import re

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from normops.kernels.config import Config, Device, RowConfig, choose, choose_batch, choose_rows, choose_weight

from bench.compiled import (
    batch_launches,
    compile_variant,
    executed,
    global_accesses,
    group_launches,
    moments_launches,
    resources,
    row_launches,
    weight_launches,
)
from normops import maps

B, H, F, D = torch.bfloat16, torch.float16, torch.float32, torch.float64

# N, C, S, groups, dtype, channels last, activation, residual, rows of weight and bias, frozen
GROUP = [
    (2, 640, 32 * 32, 32, B, False, 3, False, 1, False),  # held, the largest
    (2, 320, 32 * 32, 32, H, False, 3, False, 1, False),
    (2, 1280, 8 * 8, 32, B, False, 3, True, 2, False),
    (64, 64, 56 * 56, 32, F, False, 1, False, 1, False),
    (2, 320, 32 * 32, 32, F, False, 5, False, 1, False),
    (64, 2048, 7 * 7, 32, F, False, 1, True, 1, False),  # 49 positions: nothing divides
    (64, 512, 14 * 14, 32, B, False, 8, False, 1, False),
    (2, 1280, 16 * 16, 32, B, True, 3, False, 1, False),
    (8, 64, 8 * 8, 32, F, True, 1, False, 1, False),  # held channels last, under a sector
    (2, 320, 8 * 8 * 8, 320, H, False, 2, False, 1, False),  # instance norm, held
    (64, 512, 257, 512, B, False, 4, False, 1, False),  # held, odd
    (2, 320, 64 * 64, 32, B, False, 3, False, 1, False),  # split, merged in apply
    (2, 320, 64 * 64, 32, F, False, 3, True, 1, False),
    (2, 320, 64 * 64, 32, B, True, 3, False, 1, False),
    (2, 320, 64 * 64, 32, F, True, 3, False, 2, False),
    (1, 128, 1 << 20, 32, B, False, 3, False, 1, False),  # split, folded
    (1, 128, 1 << 20, 32, B, True, 3, False, 1, False),
    (2, 30, 96 * 97, 3, F, True, 7, False, 1, False),  # 30 channels: two at a time
    (8, 512, 49999, 512, B, False, 4, False, 1, False),  # split, odd
    (1, 512, 49999, 1, F, False, 6, False, 1, False),
    (2, 64, 33**3, 8, D, False, 3, True, 1, False),
    (2, 64, 8 * 8, 8, D, True, 6, False, 1, False),
    (4, 128, 126 * 126, 128, F, False, 2, False, 1, False),
    (2, 32, 1 << 21, 32, H, True, 2, False, 1, False),  # instance norm, split
    (32, 64, 112 * 112, 64, F, False, 1, True, 1, True),  # given statistics
    (32, 64, 112 * 112, 64, B, True, 1, False, 1, True),
]
# N, C, S, groups, dtype, centered, activation, addend, rows of weight and bias (0: there are none)
ROW = [
    (401408, 96, 1, 1, B, True, 0, False, 1),  # many rows a program
    (262144, 128, 1, 1, B, False, 0, False, 1),
    (16384, 4096, 1, 64, B, True, 0, False, 1),  # a group norm of single positions
    (1024, 8192, 1, 512, F, True, 3, False, 1024),
    (32768, 512, 1, 1, B, False, 0, False, 1),  # a warp for each row
    (25216, 768, 1, 1, B, True, 0, False, 1),
    (8192, 4096, 1, 1, B, False, 0, True, 1),
    (8192, 4096, 1, 1, H, True, 0, False, 64),  # a weight and a bias for each sample
    (8192, 4096, 1, 1, B, True, 3, False, 1),
    (16384, 7168, 1, 1, B, True, 0, False, 1),  # the longest that backward holds
    (8192, 8192, 1, 1, B, False, 0, False, 1),
    (4096, 16384, 1, 1, F, True, 0, False, 1),  # the longest that forward holds
    (64, 4096, 1, 1, B, False, 0, True, 1),  # few rows
    (16384, 131072, 1, 1, B, True, 0, False, 1),  # long
    (16, 1 << 22, 1, 1, F, True, 0, False, 1),  # split
    (4096, 1024, 1, 1, D, True, 3, False, 1),
    (4096, 65535, 1, 1, F, False, 0, False, 0),  # odd
    (112, 64, 1 << 18, 1, F, False, 0, False, 0),  # across
    (128, 192, 28 * 28, 1, B, True, 0, False, 1),
    (128, 768, 7 * 7, 1, B, True, 0, False, 1),  # across, long, odd
]
# N, C, S, C, dtype, channels last, activation, residual
BATCH = [
    (32, 2048, 7 * 7, 2048, B, False, 1, True),  # held; 49 positions: nothing divides
    (256, 2048, 7 * 7, 2048, F, False, 1, False),  # held, backward several samples a tile
    (128, 512, 7 * 7, 512, H, False, 3, False),
    (32, 1024, 14 * 14, 1024, B, False, 1, True),
    (256, 672, 14 * 14, 672, B, False, 3, False),  # several samples a tile
    (30, 512, 14 * 14, 512, F, False, 1, False),  # held, 30 of 32 samples
    (32, 512, 28 * 28, 512, B, False, 1, False),  # held forward, 64 elements a thread
    (256, 64, 56 * 56, 64, B, False, 1, False),  # split
    (32, 24, 111 * 111, 24, F, False, 1, True),  # split, odd
    (256, 256, 28 * 28, 256, B, True, 1, True),
    (1024, 64, 1, 64, B, True, 1, False),  # held forward
    (32, 512, 1, 512, F, True, 1, False),
    (64, 32, 6 * 6, 32, D, False, 3, True),
]
# outputs, inputs of a group, taps, groups, dtype, channels last
WEIGHT = [
    (512, 512, 9, 1, F, False),  # held, 4608 of 8192; backward split
    (2048, 1024, 1, 1, F, False),
    (8192, 1, 9, 8192, F, False),  # depthwise: rows of several groups in a tile
    (64, 3, 49, 1, F, False),
    (4096, 16384, 1, 1, B, False),  # long
    (256, 64, 9, 1, B, True),
    (256, 8, 9, 32, H, False),
    (1024, 512, 4, 1, D, False),
]
CAPABILITIES = [90, 80, 100]
COOPERATIVE = Device(cooperative=True)
# Those of the above whose programs may meet.
MEETING = [
    (call, backward)
    for call in GROUP + BATCH
    for backward in (False, True)
    if (
        choose(*call[:4], call[4].itemsize, call[5], backward, COOPERATIVE, call[9])
        if call in GROUP
        else choose_batch(*call[:3], call[4].itemsize, call[5], backward, COOPERATIVE)
    ).regime
    == "meet"
]
# Instructions an element at which the issue slots and the HBM of an H200 are even; erf alone takes 25.
BUDGET = {(B, False): 29, (B, True): 42, (H, False): 29, (H, True): 42, (F, False): 57, (F, True): 84}


@dataclasses.dataclass
class Variant:
    call: tuple
    backward: bool
    capability: int
    name: str
    programs: int
    config: Config | RowConfig
    named: dict  # the arguments by name, True for tensors
    elements: float  # a thread's, of a tile; 0 where there is no such tile
    count: float  # instructions for a tile
    usage: dict
    opcodes: list  # of a whole program, or of the loop over tiles
    ptx: str

    @property
    def dtype(self):
        return self.call[4]


def inspect(job):
    call, backward, capability, *device = job
    N, C, S, G, dtype, *rest = call
    found = []
    if call in GROUP:
        channels_last, activation, residual, rows, frozen = rest
        config = choose(N, C, S, G, dtype.itemsize, channels_last, backward, *device or (Device(),), frozen)
        launches = group_launches(config, N, C, S, G, dtype, channels_last, backward, activation, residual, rows, frozen)
    elif call in BATCH:
        config = choose_batch(N, C, S, dtype.itemsize, rest[0], backward, *device)
        launches = batch_launches(config, N, C, S, dtype, rest[0], backward, *rest[1:])
    else:
        centered, activation, addend, rows = rest
        config = choose_rows(N, C, S, G, dtype.itemsize, max(1, rows), backward, rows > 0)
        launches = row_launches(config, N, C, S, G, dtype, centered, backward, activation, addend, rows)
    for launch in launches:
        named = {name: True if isinstance(value, torch.Tensor) else value for name, value in launch.named.items()}
        walks, steps = "STAGES" in named, named.get("STEPS", 1)
        lanes = named.get("ROWS", 1) * named.get("OUTER", 1) * named.get("BLOCK_C", 1) * named.get("BLOCK_S", 1)
        lanes *= named.get("GROUPS", 1) * named.get("BLOCK", 1)
        elements = lanes / (32 * launch.num_warps) if "BLOCK_S" in named or "BLOCK" in named else 0
        compiled, name = compile_variant(launch, capability), launch.kernel.__name__
        opcodes = executed(compiled, once=walks)
        # Once through the loop over tiles is in there, and in forward the first tile before it.
        rounds = steps - (1 if backward else 2)
        count = (len(opcodes) + rounds * len(executed(compiled, once=True))) / steps if steps > 1 else len(opcodes)
        usage, ptx = resources(compiled), compiled.asm["ptx"]
        found.append(Variant(call, backward, capability, name, launch.programs, config, named, elements, count, usage, opcodes, ptx))
    return found


@pytest.fixture(scope="module")
def compiled():
    jobs = [(call, backward, capability) for capability in CAPABILITIES for call in GROUP + ROW + BATCH for backward in (False, True)]
    # The older and the newer architectures differ in the back end only: a quarter of the calls shows that it takes every kernel.
    jobs = [job for i, job in enumerate(jobs) if job[2] == 90 or i % 4 == 0]
    jobs += [(call, backward, capability, COOPERATIVE) for capability in CAPABILITIES for call, backward in MEETING]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return [variant for found in pool.map(inspect, jobs, chunksize=1) for variant in found]


def every(compiled, complaint):
    """`complaint` says what is wrong with a variant, or nothing; all complaints together are the failure."""
    complaints = [f"sm_{v.capability} {v.call} {v.name} {v.config}: {text}" for v in compiled if (text := complaint(v))]
    assert not complaints, "\n".join(complaints)


def test_no_spills(compiled):
    def complaint(v):
        if v.dtype == D:  # a few registers are saved around the functions that divide and exponentiate in fp64
            return None
        spilled = any(opcode.startswith(("LDL", "STL")) for opcode in v.opcodes)
        # ptxas may give up two registers for a step of occupancy (that of Triton 3.6 does, once), and twelve where x, dy, weight and sums of
        # 8192 channels fill the 128 that a thread of 16 warps can have; it must not be more.
        # Held x and dy of batch norm with an address for each element, four.
        # Programs that meet are compiled for 128.
        allowed = (
            48
            if v.config.regime == "meet"
            else 8
            if v.config.num_warps < 16
            else 48
            if "STAGES" in v.named
            else 16
            if v.name == "_batch_norm_bwd_kernel"
            else 8
        )
        return v.usage if v.usage["stack"] > allowed or v.usage["local"] or (spilled and not v.usage["stack"]) else None

    every(compiled, complaint)


def test_no_atomics(compiled):
    """Programs that meet count themselves, as often as they meet."""

    def complaint(v):
        expected = 0 if v.named.get("STEP") != 3 else 1 if v.named["FOLD"] else 2
        found = re.findall(r"\b(?:atom|red)\.[\w.]+", v.ptx)
        return None if len(found) == expected and all("gpu" in atomic and ".add." in atomic for atomic in found) else found

    every(compiled, complaint)


def test_meeting_programs_are_resident(compiled):
    """Two a processor, whose 65536 registers and 160 KB of shared memory they share, on a grid that is no larger."""

    def complaint(v):
        if v.named.get("STEP") != 3:
            return None
        return v.usage if v.config.num_warps * 32 * v.usage["reg"] * 2 > 65536 or v.usage["shared"] * 2 > 160 << 10 or v.programs > 264 else None

    assert len({(v.call, v.backward) for v in compiled if v.named.get("STEP") == 3}) == len(MEETING) > 10
    every(compiled, complaint)


def test_full_width(compiled):
    """Tensors of x's size are read and written in vectors of V elements only."""

    def complaint(v):
        if not v.elements:
            return None
        vectors = max(1, int(v.elements) // v.config.V)
        width = v.config.V * v.dtype.itemsize * 8
        # Without y or dx the step of a long row gathers moments or sums; WHOLE reads its row twice.
        step = v.named.get("STEP")
        read = sum(v.named.get(name) is not None for name in ("x_ptr", "dy_ptr", "residual_ptr", "addend_ptr", "dtotal_ptr"))
        written = sum(v.named.get(name) is not None for name in ("y_ptr", "dx_ptr", "dresidual_ptr", "total_ptr"))
        if step == 1:
            read, written = read - (v.named.get("dtotal_ptr") is not None), v.named.get("total_ptr") is not None
        elif step == 0 and "long" in v.name:
            read *= 2
        accesses = global_accesses(v.opcodes)
        if accesses["ld", width] < read * vectors or accesses["st", width] < written * vectors:
            return f"expected {read * vectors} loads and {written * vectors} stores of {width} bits, got {accesses}"
        # What may be narrow: weight and bias of 8 channels, the one value that moments start from, a head and tail.
        if width == 128 and (accesses["ld", 16] > 18 or accesses["st", 16] > 2 or accesses["st", 8] or accesses["ld", 8]):
            return f"narrow accesses: {accesses}"
        return None

    every(compiled, complaint)


def test_instructions(compiled):
    def complaint(v):
        if v.named.get("STEP") == 3 or v.named.get("STEPS", 1) > 1 and v.capability == 100:
            return None  # merging and waiting are in there, once for each program; the loop over tiles is not told apart from that of an overflow
        budget = BUDGET.get((v.dtype, v.backward))
        # Below 32 elements a thread (16 in a loop over tiles) the fixed costs of a program weigh more. Most of those do not fill the device;
        # odd S backward may, and lies near the budget (44 of 42): not asserted, still to be measured. So does what goes across channels in
        # accesses of 8 bytes (30 of 29 forward).
        enough = 16 if "STAGES" in v.named or v.named.get("STEPS", 1) > 1 else 32
        # Batch norm of 7 x 7 in 16 bits takes 41 forward: a twentieth of what a ResNet normalizes.
        if v.call in BATCH and v.config.V * v.dtype.itemsize == 2:
            budget = 42
        elif v.config.V * v.dtype.itemsize < (8 if v.call in BATCH else 16):
            budget = None
        if budget is None or 4 in v.call[5:7] or v.elements < enough:
            return None
        if v.named.get("FOLD"):
            budget *= 1.05  # each program merges partials, too
        if v.named.get("residual_ptr"):
            budget *= 1.5  # three tensors to move instead of two, backward more
        count = v.count / v.elements
        return f"{count:.1f} instructions an element, budget {budget}, {v.usage}" if count > budget else None

    every(compiled, complaint)


# ---- propagated statistics ----


def inspect_statistics(job):
    """Step, usage, accesses, PTX of every kernel of a map or of the weight of an analytic norm."""
    call, backward, capability = job
    if isinstance(call, str):
        config, launches = None, moments_launches(maps.CODES[call])
    else:
        outputs, inputs, taps, groups, dtype, _ = call
        config = choose_weight(outputs, inputs * taps, groups, dtype.itemsize, backward)
        launches = weight_launches(config, *call, backward)
    found = []
    for launch in launches:
        compiled, name, step = compile_variant(launch, capability), launch.kernel.__name__, launch.named.get("STEP")
        opcodes = executed(compiled)
        found.append((job, name, config, step, resources(compiled), global_accesses(opcodes), compiled.asm["ptx"]))
    return found


@pytest.fixture(scope="module")
def statistics():
    """Every map on every architecture; of the weights a quarter on those but the first."""
    jobs = [(name, False, capability) for name in maps.MAPS if name not in ("relu", "relu6", "selu") for capability in CAPABILITIES]
    weights = [(call, backward, capability) for capability in CAPABILITIES for call in WEIGHT for backward in (False, True)]
    jobs += [job for i, job in enumerate(weights) if job[2] == 90 or i % 4 == 0]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return [kernel for found in pool.map(inspect_statistics, jobs, chunksize=1) for kernel in found]


def test_statistics_do_not_spill(statistics):
    for job, name, config, _, usage, _, _ in statistics:
        # sin and cos of huge angles have a table of 40 bytes on the stack, beside which ptxas may save a register or two. Where 16 warps fill the
        # registers it may give up a few.
        allowed = 48 if job[0] == "sin" else 32 if config and config.num_warps == 16 else 8
        assert usage["stack"] <= allowed and not usage["local"], (job, name, config, usage)


def test_statistics_have_no_atomics(statistics):
    assert not [(job, name) for job, name, *_, ptx in statistics if re.search(r"\b(atom|red)\.", ptx)]


def test_weights_at_full_width(statistics):
    """A thread's elements of the weight are read and written in vectors of V."""
    for job, name, config, step, _, accesses, _ in statistics:
        if "norm_weight" in name and job[0][4].itemsize * config.V > 2:
            vectors = max(1, config.ROWS * config.BLOCK // (32 * config.num_warps) // config.V)
            width = 8 * config.V * job[0][4].itemsize
            written = 0 if step == 1 else vectors  # the first step of long rows gathers products only
            assert accesses["ld", width] >= vectors * (2 if job[1] else 1) and accesses["st", width] >= written, (job, name, config, accesses)
