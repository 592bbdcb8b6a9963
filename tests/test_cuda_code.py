"""The machine code of the CUDA kernels, without a GPU: registers, and what the loops over tensors of x's size execute for each element."""

import heapq
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest
from cuda_build import ARCHITECTURES, machine_code

SOURCES = {"group_norm": 130, "row_norm": 40, "statistics": 20}  # and how many kernels there are at least
MAX_REGISTERS = 128  # two blocks of 256 threads for each SM
# Instructions an element at which the issue slots and the HBM of an H200 are even: forward, backward. As for the Triton kernels.
BUDGET = {"BFloat16": (29, 42), "Half": (29, 42), "float": (57, 84)}
pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc"),
    pytest.mark.skipif(not Path(sysconfig.get_path("include"), "Python.h").exists(), reason="no Python headers"),
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("machine_code")
    return folder, {name: machine_code(name, folder) for name in SOURCES}


@pytest.mark.parametrize("name", SOURCES)
def test_kernels_compile_for_every_architecture(compiled, name: str) -> None:
    """No warnings, no spills, no local memory, but for the maps of activations, that call functions. (The host code is compiled with all warnings in
    test_cuda_compile.py.)
    """
    log = compiled[1][name]
    assert "warning" not in log, log
    found = re.findall(r"entry function '(\S+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill.*?Used (\d+) registers", log, re.S)
    kernels = {arch: {name for name, of, *_ in found if of == arch} for arch in ARCHITECTURES}
    assert len(kernels["80"]) > SOURCES[name] and kernels["80"] == kernels["90"] == kernels["100"]
    assert not [entry for entry in found if int(entry[3]) or int(entry[4]) > MAX_REGISTERS]
    assert not [entry for entry in found if int(entry[2]) and "activation_moments" not in entry[0]]


# ---- instructions of loops ----


@dataclass
class Code:
    """A kernel: its instructions (predicate, opcode, operands), and where its labels are among them."""

    instructions: list[tuple[str, str, str]]
    labels: dict[str, int]

    def next(self, i: int) -> list[int]:
        predicate, opcode, rest = self.instructions[i]
        if opcode.startswith(("EXIT", "RET")) and not predicate:
            return []
        if not opcode.startswith("BR") or opcode.startswith("BREAK"):
            return [i + 1]
        targets = [self.labels[name] for name in re.findall(r"\.L_\w+", rest) if name in self.labels]
        sometimes = predicate or re.search(r"\bU?P\d", rest.split("`")[0]) or "DIV" in opcode
        return targets + [i + 1] * bool(sometimes and not opcode.startswith("BRX"))

    def loops(self) -> list[tuple[int, int]]:
        """First and last instruction of the innermost ones."""
        ends: dict[int, int] = {}
        for i in range(len(self.instructions)):
            for target in self.next(i):
                if target <= i:
                    ends[target] = max(i, ends.get(target, 0))
        return [loop for loop in ends.items() if not any(loop[0] <= other[0] and other[1] <= loop[1] for other in ends.items() if other != loop)]

    def shortest(self, loop: tuple[int, int], via: tuple[str, ...]) -> list[str]:
        """Opcodes of the shortest way once through a loop that comes by instructions whose opcodes begin like these; none if there is no such way."""

        def seen(i: int) -> int:
            return sum(1 << k for k, start in enumerate(via) if self.instructions[i][1].startswith(start))

        start = (loop[0], seen(loop[0]))
        length, before, heap = {start: 1}, {}, [(1, start)]
        while heap:
            steps, at = heapq.heappop(heap)
            if at == (loop[1], (1 << len(via)) - 1):
                way = [at]
                while way[-1] in before:
                    way.append(before[way[-1]])
                return [self.instructions[i][1] for i, _ in way]
            for i in self.next(at[0]):
                after = (i, at[1] | seen(min(i, loop[1])))
                if at[0] < i <= loop[1] and steps + 1 < length.get(after, len(self.instructions) + 1):
                    length[after], before[after] = steps + 1, at
                    heapq.heappush(heap, (steps + 1, after))
        return []


@pytest.fixture(scope="module")
def kernels(compiled) -> dict[str, Code]:
    """Those of an H200, by name and template arguments. Triton's wheel has the tools."""
    triton = pytest.importorskip("triton")
    tools, folder = Path(triton.__file__).parent / "backends/nvidia/bin", compiled[0]
    text = ""
    for name in ("group_norm", "row_norm"):
        subprocess.run([tools / "cuobjdump", "-xelf", "sm_90", f"{name}.fatbin"], cwd=folder, check=True, capture_output=True)
    for cubin in folder.glob("*.cubin"):
        text += subprocess.run([tools / "nvdisasm", "-c", cubin], check=True, capture_output=True, text=True).stdout
    found = {}
    for part in re.split(r"^\.text\.", text, flags=re.M)[1:]:
        code = Code([], {})
        for line in part.splitlines():
            if label := re.match(r"(\.L_\w+):", line):
                code.labels[label[1]] = len(code.instructions)
            elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)$", line):
                code.instructions.append((match[1] or "", match[2], match[3]))
        found[part[: part.index(":")]] = code
    names = subprocess.run(["c++filt"], input="\n".join(found), check=True, capture_output=True, text=True).stdout.splitlines()
    noise = r"void normops::|c10::|torch::headeronly::|\((int|bool|normops::Run)\)|normops::"
    plain = [re.sub(noise, "", name).split(">(")[0] + ">" for name in names]
    return dict(zip(plain, found.values(), strict=True))


WIDE = re.compile(r"(\w+)_kernel<(BFloat16|Half|float), \2, (8|4), (\w+)>")
SIZES = {"BFloat16": 2, "Half": 2, "float": 4}
KERNELS = ("apply_fwd", "apply_bwd", "sums", "group_fwd", "group_bwd", "row_fwd", "row_bwd")


def test_loops(kernels) -> None:
    """Where y, dx or sums are computed with SiLU: instructions of an element, width of accesses."""
    checked = set()
    for kernel, code in kernels.items():
        if not (match := WIDE.fullmatch(kernel)):
            continue
        name, dtype, V = match[1], match[2], int(match[3])
        count = 0.0
        for first, last in code.loops():
            opcodes = [opcode for _, opcode, _ in code.instructions[first : last + 1]]
            stores = [opcode for opcode in opcodes if opcode.startswith("STG")]
            way = code.shortest((first, last), ("MUFU.EX2", "MUFU.RCP", "STG")[: 3 if stores else 2])
            if way:
                count += len(way) / V
                checked.add((name, dtype))
                moves = stores + [opcode for opcode in opcodes if opcode.startswith("LDGSTS")]
                assert all(f".{8 * V * SIZES[dtype]}" in opcode for opcode in moves), f"{kernel}: {moves}"
        # row_bwd computes dt twice, rather than to keep it: in 16 bits with SiLU it is bound by instructions.
        budget = BUDGET[dtype][name.endswith("bwd") or name == "sums"] * (1.25 if name == "row_bwd" else 1)
        assert count <= budget, f"{kernel}: {count} instructions of an element, budget {budget}"
    assert checked == {(name, dtype) for name in KERNELS for dtype in BUDGET}
