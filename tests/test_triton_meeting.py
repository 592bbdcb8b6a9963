"""What the compiler makes of `kernels/exchange.py: meet`, without a GPU: that nothing leaves the order on which a meeting relies.

stores of all threads    barrier    release    poll: acquire    barrier    loads of all threads
"""

import os
import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton
import triton.language as tl
from normops.kernels.config import Config
from normops.kernels.exchange import meet

from bench.compiled import Launch, batch_launches, compile_variant, group_launches, meta, tool


@triton.jit
def swap(counter_ptr, work_ptr, change_ptr, P, BLOCK: tl.constexpr):
    """Two programs exchange a tile. What is read after the meeting was read before it, too."""
    member, i = tl.program_id(0) % P, tl.arange(0, BLOCK)
    others = work_ptr + (P - 1 - member) * BLOCK + i
    old = tl.load(others)
    tl.store(work_ptr + member * BLOCK + i, old + 1)
    meet(counter_ptr, member, P)
    tl.store(change_ptr + member * BLOCK + i, tl.load(others) - old)


MARKS = {"LDG.*STRONG.GPU": "p", "LDG": "l", "STG": "s", "ATOM.*STRONG.GPU": "a", "BAR": "b", "MEMBAR.*GPU": "m", "CCTL.IVALL": "i"}


def marks(compiled):
    """Accesses to global memory and what orders them, as they lie in the machine code: a letter each, "r" for a branch back."""
    labels, found = set(), ""
    line = re.compile(r"^(\.L_\w+):|^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(?:.*`\((\.L_\w+)\))?", re.M)
    for label, opcode, target in line.findall(tool("nvdisasm", "-c", cubin=compiled.asm["cubin"])):
        labels.add(label)
        found += "r" if target in labels and opcode == "BRA" else next((mark for pattern, mark in MARKS.items() if re.match(pattern, opcode)), "")
    return found


def check_order(compiled, meetings=1):
    ptx = compiled.asm["ptx"]
    assert ptx.count("atom.") == ptx.count("atom.global.gpu.release.add") == meetings
    assert ptx.count("acquire") == ptx.count("ld.global.gpu.acquire") == meetings  # loads, not additions of 0: programs that wait do not queue
    # Stores, barrier, fence, arrival; again and again poll and forget the L1; barrier, loads.
    assert len(re.findall("s[br]*bmab*pib*rb+l", marks(compiled))) == meetings, marks(compiled)


@pytest.mark.parametrize("capability, P", [(80, 2), (90, 2), (100, 2), (90, 1)])
def test_order(capability, P):
    work = meta(2, 512, dtype=torch.float32)
    compiled = compile_variant(Launch(swap, 2, 4, (meta(1, dtype=torch.int32), work, work, P, 512), True), capability)
    check_order(compiled)
    assert re.fullmatch("ls[bmapir]+lsr", marks(compiled)), marks(compiled)  # read again


GROUP, BATCH = Config("meet", 8, False, 1, 1, 4, 256, 4, LARGE=True, SET_N=1, SET_C=2), Config("meet", 8, False, 4, 1, 64, 1, 4, LARGE=True, SET_C=1)
NORMS = {
    "group": lambda backward: group_launches(GROUP, 2, 64, 4096, 8, torch.bfloat16, False, backward),
    "group, merged by each": lambda backward: group_launches(replace(GROUP, FOLD=True), 2, 64, 4096, 8, torch.bfloat16, False, backward),
    "batch": lambda backward: batch_launches(BATCH, 128, 512, 1, torch.bfloat16, True, backward),
    "batch, merged by each": lambda backward: batch_launches(BATCH, 32, 512, 1, torch.bfloat16, True, backward),
}


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_order_in_norms(norm, backward):
    """A second meeting where one program merges for all."""
    (launch,) = (launch for launch in NORMS[norm](backward) if launch.cooperative)
    check_order(compile_variant(launch, 90), 1 if "each" in norm else 2)
