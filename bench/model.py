"""How long the Triton kernels take on an H200, predicted from what can be read without one: ``python -m bench.model [norm ...]``.

Each call is made on meta tensors. Its launches and torch ops are noted, every kernel is compiled for sm_90, and programs, registers, instructions
and traffic give a time. Nothing of it was run on a GPU: ``CONSTANTS`` were measured by others. Written to a CSV and between
``<!-- bench:model -->`` and ``<!-- /bench -->`` of the README.

    memory       bytes from HBM at `hbm`, all bytes at `l2`, less where fewer are in flight than `RAMP` wants; the last programs are fewer
    arithmetic   instructions at `issue` a processor and cycle and, of one warp, at best one in `warp` cycles; MUFU, shuffles, fp64 at `PIPES`
    launch       the longer of the two, and of the other what neither another program of the processor nor the next one hides, in the long run
                 `exposed`; `graph` or `stream`, and `meeting`
A tensor comes from L2 if not much more than `cache` was touched since it was last. The last of the first reading is the first of the second.
"""

import argparse
import math
import multiprocessing
import os
import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from normops.kernels.config import Device
from normops.kernels.exchange import SPACING
from torch import Tensor

from bench import report, shapes
from bench.compiled import Call, Launch, Op, Program, compile_variant, executed, global_accesses, loops, program, record, resources, source
from bench.machine import describe
from bench.norms import NORMS, minimum_bytes
from bench.run import read, write
from bench.shapes import Case

HERE = Path(__file__).parent
README, RESULT = HERE.parent / "README.md", HERE / "results" / "model_h200.csv"
# name -> value, and where it comes from
CONSTANTS = {
    "processors": (132, "NVIDIA Hopper white paper"),
    "clock": (1.8e9, "1/s; NVIDIA H200 boosts to 1.98 GHz, less under load"),
    "hbm": (4.3e12, "B/s; copies through PyTorch on an H200, read and written"),
    "l2": (9.7e12, "B/s; RRZE-HPC gpu-benches, gpu-l2-cache/h200.txt at 40 MB"),
    "cache": (40e6, "B; the same file: level to 40 MB, then falling; of 60 MB"),
    "beside": (32e6, "B; a guess: of it beside outputs that pass through, 28 to 36 MB"),
    "graph": (0.65e-6, "s; RRZE-HPC gpu-small-kernels/h200_graph.txt: 1.35 us from one 64 KB copy to the next, less 0.7 of latency that RAMP has"),
    "stream": (1.8e-6, "s; h200.txt there: 2.5 us, likewise"),
    "meeting": (1.2e-6, "s; h200_gsync.txt and h200_pt.txt there: 1.25 and 1.15 us"),
    "issue": (4, "warp instructions a cycle and processor: CUDA programming guide, 128 lanes"),
    "exposed": (0.25, "of the shorter of memory and arithmetic: so that layer norm of 4096 x 16384 float32 is as fast as Liger-Kernel's on an H100"),
    "warp": (2, "cycles; assumed: ALU latency is 4 (Jia et al. 2018, Volta), two instructions are independent"),
}  # fmt: skip
H200 = SimpleNamespace(**{name: value for name, (value, _) in CONSTANTS.items()})
# KB in flight in a processor -> share of the bandwidth: RRZE-HPC gpu-stream/gh200.txt has 2.8 to 3.2 TB/s of 4 at 16 KB, 3.8 at 32
RAMP = ((0, 0.0), (16, 0.75), (32, 0.95), (64, 1.0))
# results a cycle and processor of compute capability 9.0: CUDA programming guide, throughput of arithmetic instructions
PIPES = {"MUFU": 16, "SHFL": 32, "DADD": 64, "DMUL": 64, "DFMA": 64, "F2F": 64}
FIELDS = (
    "op", "name", "shape", "dtype", "layout", "groups", "act", "direction", "regime", "launches", "bytes", "ideal_us", "graph_us", "stream_us",
    "of_copy", "bound", "kernel", "programs", "warps", "registers", "spilled", "per_processor", "access_bits", "instructions", "mufu", "meetings",
)  # fmt: skip


# ---- what a launch does ----


@dataclass
class Code:
    """What is read from a compiled kernel."""

    ttir: str
    registers: int
    shared: int
    spilled: int
    opcodes: list[str]  # of a program, loops run once
    loops: list[list[str]]  # of its outermost loops
    bits: int  # of the widest access of global memory


def inspect(launch: Launch) -> Code:
    compiled = compile_variant(launch, 90)
    usage, opcodes = resources(compiled), executed(compiled)
    bits = max((width for _, width in global_accesses(opcodes)), default=0)
    return Code(compiled.asm["ttir"], usage["reg"], usage["shared"], usage["stack"], opcodes, loops(compiled), bits)


def variant(launch: Launch) -> tuple:
    """What selects a binary."""
    made = source(launch)
    return launch.kernel.__name__, launch.num_warps, launch.cooperative, str(made.signature), str(made.constants)


@dataclass
class Work:
    """What a launch takes, or an Op as well as it could be."""

    name: str
    programs: int
    num_warps: int = 4
    resident: int = 8  # programs of a processor
    in_flight: float = 16384.0  # bytes that a program asks for at once
    counts: dict[str, float] = field(default_factory=dict)  # warp instructions of a program: all, and those of PIPES
    meetings: int = 0
    trips: float = 1  # of its longest loop
    teams: int = 1  # of programs that meet: while one waits another may work
    code: Code | None = None
    read: list[tuple[tuple, float, bool]] = field(default_factory=list)  # memory, bytes, whether for the first time in this launch
    touched: dict[tuple, tuple[float, bool]] = field(default_factory=dict)  # memory -> bytes, whether the cache is asked to let go of it
    late: set[tuple] = field(default_factory=set)  # what is written after all loops
    traffic: float = 0.0  # bytes through L2
    hbm: float = 0.0


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def work_of_op(op: Op) -> Work:
    work = Work(op.name, 1)
    for tensor in (*op.read, *op.written):
        work.touched[storage(tensor), None] = tensor.nbytes, False
        work.traffic += tensor.nbytes
    work.read = [((storage(tensor), None), tensor.nbytes, True) for tensor in op.read]
    work.hbm = sum(tensor.nbytes for tensor in op.written)
    work.programs = max(1, math.ceil(work.traffic / work.in_flight))
    return work


def average(launch: Launch, ttir: str) -> Program:
    """What the programs do: those at the ends may have less."""
    found = program(launch, ttir)
    if not found.trips:
        return found
    some = [program(launch, ttir, int(launch.programs * (i * 0.618 % 1))) for i in range(8)]  # of no period
    pairs = zip(*(one.accesses for one in some), strict=True)
    accesses = [same[0]._replace(times=statistics.mean(access.times for access in same)) for same in pairs]
    trips = [statistics.mean(same) for same in zip(*(one.trips for one in some), strict=True)]
    return Program(accesses, trips, max(one.meetings for one in some))


def work_of_launch(launch: Launch, code: Code, what: Program, share: float) -> Work:
    """share: how much of the tensors this launch works on."""
    named = launch.named
    per_warp = 256 * math.ceil(code.registers / 8)
    resident = min(65536 // (per_warp * launch.num_warps), 64 // launch.num_warps, 32, 227 * 1024 // (code.shared + 1024))
    # What the compiler made of the loops; if it unrolled or merged some, the longest stands for all that run.
    longest = max(code.loops, key=len, default=[])
    alike = len(code.loops) == len(what.trips)
    again = [(trips - 1, opcodes) for trips, opcodes in zip(what.trips, code.loops if alike else [longest] * len(what.trips), strict=True)]
    counts = {
        pipe: sum(opcode.startswith(pipe) for opcode in code.opcodes)
        + sum(times * sum(opcode.startswith(pipe) for opcode in opcodes) for times, opcodes in again if alike or times > 0)
        for pipe in ("", *PIPES)
    }
    name = launch.kernel.__name__.strip("_").removesuffix("_kernel")
    teams = max(arg.numel() // SPACING.value if isinstance(arg, Tensor) and arg.dtype == torch.int32 else 1 for arg in launch.args)
    work = Work(name, launch.programs, launch.num_warps, max(1, resident), 0.0, counts, what.meetings, max([1, *what.trips]), teams, code)
    flights = defaultdict(float)
    for name, store in dict.fromkeys((access.name, access.store) for access in what.accesses):
        tensor, accesses = named[name], [access for access in what.accesses if (access.name, access.store) == (name, store) and access.times]
        widest = max((access.lanes for access in accesses), default=0)
        main = [access for access in accesses if 2 * access.lanes >= widest]  # the others are heads, tails and first values
        asked = launch.programs * sum(access.lanes * access.times for access in main) * tensor.itemsize
        if not asked:
            continue
        # Each byte once, or once in each of several loops, and masked lanes beside them; else a vector that many programs read.
        bytes_here, in_loops = tensor.nbytes * share, len({access.loop for access in main})
        stream = asked < 4 * in_loops * bytes_here
        times = min(in_loops, max(1, int(asked / bytes_here * 1.1))) if stream else 1
        bytes_here = min(bytes_here, 2 * asked)  # of a workspace a launch may use a part
        memory = storage(tensor), (named.get("n_0"), named.get("block_0")) if stream and share < 1 else None
        work.traffic += times * bytes_here if stream else asked
        if store:
            work.hbm += bytes_here
            if what.trips and not any(access.loop for access in main):
                work.late.add(memory)
        else:
            work.read += [(memory, bytes_here, i == 0) for i in range(times)]
            for access in main:
                flights[access.loop] += access.lanes * tensor.itemsize * (min(1, times * bytes_here / asked) if stream else 1)
        work.touched[memory] = bytes_here, store and main[0].passing
    work.in_flight = max(flights.values(), default=1.0)
    return work


def from_memory(works: list[Work]) -> None:
    """Add to `hbm` what of the readings does not come from L2."""
    for j, work in enumerate(works):
        for memory, size, first in work.read:
            before = next((i for i in range(j - 1, -1, -1) if memory in works[i].touched), None)
            if not first:  # again by the same program: what the resident ones touch has to stay
                budget, span = H200.cache, total(work) * min(1, work.resident * H200.processors / work.programs)
                hit = float(span <= budget)
            elif before is None:
                hit = 0.0
            else:
                passing = any(let_go for _, let_go in work.touched.values())
                budget = (H200.beside if passing else H200.cache) - sum(map(total, works[before + 1 : j]))
                span = total(work) if memory in works[before].late else total(works[before], work)
                hit = min(1.0, max(0.0, budget / span)) if span else 1.0
            work.hbm += size * (1 - hit)


def total(*works: Work) -> float:
    """Bytes that the cache would have to keep."""
    return sum({memory: size for work in works for memory, (size, let_go) in work.touched.items() if not let_go}.values())


# ---- how long it takes ----


def seconds(work: Work) -> dict[str, float]:
    """What bounds the launch -> for how long, and "" -> all of it but for the launch itself."""
    slots = work.resident * H200.processors
    full, rest = divmod(work.programs, slots)

    def slowed(programs: int) -> float:
        """The time of `programs` programs, beside that of all at full bandwidth."""
        return programs / work.programs / ramp(programs * work.in_flight / H200.processors) if programs else 0.0

    slow = full * slowed(slots) + slowed(rest)
    busiest = (full * work.resident + math.ceil(rest / H200.processors)) * work.num_warps / H200.clock
    memory = {"HBM": work.hbm / H200.hbm * slow, "L2": work.traffic / H200.l2 * slow}
    arithmetic = {pipe: busiest * 32 * work.counts.get(pipe, 0) / rate for pipe, rate in PIPES.items()}
    arithmetic["instructions"] = busiest * work.counts.get("", 0) / H200.issue
    arithmetic["one warp"] = (full + (rest > 0)) * work.counts.get("", 0) * H200.warp / H200.clock
    short, long = sorted((max(memory.values()), max(arithmetic.values())))
    beside = min(work.resident, math.ceil(work.programs / H200.processors))
    meetings = work.meetings * H200.meeting / min(beside, work.teams)
    exposed = max(H200.exposed, min(1.0, slots / (work.programs * work.trips))) / beside
    return memory | arithmetic | {"meetings": meetings, "": long + short * exposed + meetings}


def ramp(in_flight: float) -> float:
    """The share of the bandwidth with so many bytes in flight in a processor."""
    kilobytes = in_flight / 1000
    for (x_0, y_0), (x_1, y_1) in zip(RAMP, RAMP[1:], strict=False):
        if kilobytes < x_1:
            return max(y_0 + (y_1 - y_0) * (kilobytes - x_0) / (x_1 - x_0), 1e-9)
    return 1.0


def predict(call: Call, codes: dict[tuple, Code]) -> dict[str, Any]:
    """The row of a call."""
    alike = defaultdict(int)
    for step in call.steps:
        if isinstance(step, Launch) and "block_0" in step.named:
            alike[variant(step)] += step.programs
    works, programs = [], {}
    for step in call.steps:
        if isinstance(step, Op):
            works.append(work_of_op(step))
        else:
            key = variant(step)
            if (key, step.programs) not in programs:  # parts of a tensor differ in where they begin
                programs[key, step.programs] = average(step, codes[key].ttir)
            works.append(work_of_launch(step, codes[key], programs[key, step.programs], step.programs / alike.get(key, step.programs)))
    from_memory(works)
    times = [seconds(work) for work in works]
    busy = sum(time[""] for time in times)
    graph, stream = (busy + len(works) * cost for cost in (H200.graph, H200.stream))
    ideal = minimum_bytes(call.case, call.direction) / H200.hbm
    main, time = max(zip(works, times, strict=True), key=lambda pair: pair[1][""])
    lanes = [work.programs * work.num_warps * 32 / call.case.numel for work in works]
    case, code = call.case, main.code
    row = {
        "op": case.norm, "name": case.name, "shape": "x".join(map(str, case.shape)), "dtype": case.dtype, "layout": case.layout,
        "groups": case.groups or "", "act": case.act, "direction": call.direction, "regime": call.regime,
        "launches": len(works), "bytes": round(sum(work.hbm for work in works)), "ideal_us": ideal * 1e6, "graph_us": graph * 1e6,
        "stream_us": stream * 1e6, "of_copy": ideal / graph, "bound": max((key for key in time if key), key=time.__getitem__),
        "kernel": main.name, "programs": main.programs, "warps": main.num_warps, "registers": code.registers if code else "",
        "spilled": code.spilled if code else "", "per_processor": main.resident, "access_bits": code.bits if code else "",
        "instructions": sum(work.counts.get("", 0) * of for work, of in zip(works, lanes, strict=True)),
        "mufu": sum(work.counts.get("MUFU", 0) * of for work, of in zip(works, lanes, strict=True)),
        "meetings": sum(work.meetings for work in works),
    }  # fmt: skip
    if len(works) * H200.graph > busy:
        row["bound"] = "launches"
    return {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}


def model(cases: list[Case], device: Device, workers: int = 2) -> list[dict[str, Any]]:
    calls = [record(case, direction, device) for case in cases for direction in ("forward", "backward")]
    jobs = {variant(step): step for call in calls for step in call.steps if isinstance(step, Launch)}
    _jobs[:] = jobs.values()
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        codes = dict(zip(jobs, pool.imap(_inspect, range(len(_jobs)), chunksize=4), strict=True))
    return [predict(call, codes) for call in calls]


_jobs: list[Launch] = []  # forked workers find here what cannot be sent to them


def _inspect(index: int) -> Code:
    return inspect(_jobs[index])


# ---- the program ----

# what is wanted, in microseconds of a forward
GOALS = (
    ("group_norm", "hunyuan_vae/1x128x20x256x256/silu", 190.0),
    ("batch_norm", "kb1_33/64x64x512x512/none", 3100.0),
    ("instance_norm", "kb1_34/112x64x512x512/none", 4100.0),
    ("group_norm", "kb1_35/112x64x512x512/none", 4100.0),
    ("rms_norm", "kb1_36/112x64x512x512/none", 3900.0),
    ("layer_norm", "kb1_40/16x4194304/none", 180.0),
    ("batch_norm", "tileops_bn_large/128x128x181x181/none", 600.0),
)


def tables(rows: list[dict[str, Any]]) -> str:
    """Markdown: of what does not fit L2, the share of the copy's bandwidth and the worst case; the goals."""
    sets = defaultdict(list)
    for row in rows:
        if float(row["ideal_us"]) >= 1e6 * H200.cache / H200.hbm:
            sets[row["op"], row["direction"], row["regime"]].append(row)
    lines = []
    for key, found in sorted(sets.items()):
        shares = [float(row["of_copy"]) for row in found]
        worst = min(found, key=lambda row: float(row["of_copy"]))
        bound = f"{min(shares):.2f}: {worst['name']} {worst['dtype']} {worst['layout']}, by {worst['bound']}"
        lines.append(report.line(*key, len(found), f"{statistics.geometric_mean(shares):.2f}", bound))
    title = "Model of an H200, **not run on a GPU**: minimum of bytes at the copy's speed over the predicted time, tensors out of L2, switch off"
    shares_of = report.table(title, ("norm", "direction", "regime", "cases", "geometric mean", "worst"), lines)
    lines = [
        report.line(
            name, row["dtype"], row["layout"], *(f"{float(row[field]):.0f}" for field in ("ideal_us", "graph_us", "stream_us")), f"{goal:.0f}"
        )
        for op, name, goal in GOALS
        for row in rows
        if (row["op"], row["name"], row["direction"]) == (op, name, "forward")
    ]
    columns = ("forward", "dtype", "layout", "minimum", "model, graph", "model, stream", "goal")
    return f"{shares_of}\n\n{report.table('The same in us', columns, lines)}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("norms", nargs="*", default=list(NORMS), metavar="norm", help=", ".join(NORMS))
    parser.add_argument("--quick", action="store_true", help="a call of every kind")
    parser.add_argument("--shapes", help="the name of a model, or a glob over names")
    parser.add_argument("--out", type=Path, help="the CSV (default: of a whole run the one in results, whose tables go to the README)")
    parser.add_argument("--report", action="store_true", help="compute nothing: the tables of the CSV that is there, into the README")
    options = parser.parse_args(argv)
    if options.report:
        return report.fill(README, "bench:model", tables(read(RESULT)[1]))
    cases = [case for norm in options.norms for case in shapes.grid(norm, "cuda", options.shapes, options.quick)]
    device = Device(cooperative=os.environ.get("NORMOPS_COOPERATIVE") == "1")
    rows = model(cases, device)
    facts = {"model": "not run on a GPU", "device": f"H200, {device}"} | {name: describe("cpu")[name] for name in ("torch", "triton", "normops")}
    facts |= {name: f"{value:g} {source}" for name, (value, source) in CONSTANTS.items()}
    whole = len(options.norms) == len(NORMS) and not options.quick and not options.shapes and not device.cooperative
    write(options.out or (RESULT if whole else HERE.parent / "build" / "bench" / RESULT.name), facts, [rows], FIELDS)
    print(tables(rows))
    if whole and not options.out:
        report.fill(README, "bench:model", tables(rows))


if __name__ == "__main__":
    main()
