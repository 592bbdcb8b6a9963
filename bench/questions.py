"""``python -m bench.questions``: what the choices in ``kernels/config.py`` rest on, measured on a GPU in a few minutes.

A question times variants of one thing; its docstring says what the answer decides. `expected` is what public measurements and models say of an H200,
in the same unit; SOURCES says whose they are. Medians of interleaved samples, in GB/s of the bytes that have to move, else in us.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import triton
import triton.language as tl
from normops.kernels import group_norm, row_norm
from normops.kernels.config import Config, choose, choose_rows, device_of
from normops.kernels.exchange import SPACING, meet
from normops.kernels.launch import counters, launch
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

import normops
from bench import machine, norms, report, run, shapes
from bench.methods import DIRECTIONS, HOST
from bench.timing import Events, Graph, Times, Wall
from normops.activations import CODES

DEVICE, MIB = "cuda", 1 << 20
BF16, F32 = torch.bfloat16, torch.float32
COPY, L2 = 4300.0, 9670.0  # GB/s of an H200
TIMERS = {"graph": Graph, "events": Events, "wall": Wall}
FIELDS = ("question", "variant", "timer", "status", "unit", "median", "low", "high", "expected", "of_copy", "median_us")


@dataclass(frozen=True)
class Run:
    """A variant: what is called, how often it does the thing, how many bytes have to move each time (0: its time is asked for), what is expected."""

    variant: str
    call: Callable[[], object]
    moved: int = 0
    repeats: int = 1
    expected: float | None = None
    timer: str = "graph"


# ---- kernels ----


V = tl.constexpr(8)  # lengths come in vectors of 16 bytes, which is what makes accesses that wide


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr, READ: tl.constexpr, WRITE: tl.constexpr, REVERSE: tl.constexpr):
    pid = tl.num_programs(0) - 1 - tl.program_id(0) if REVERSE else tl.program_id(0)
    i = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, i < n * V, eviction_policy=READ), i < n * V, eviction_policy=WRITE)


@triton.jit
def _read_kernel(x_ptr, sums_ptr, n, BLOCK: tl.constexpr, READ: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, i < n * V, other=0.0, eviction_policy=READ)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(x.to(tl.float32)))


@triton.jit
def _meet_kernel(counters_ptr, P, times):
    for _ in range(times):
        meet(counters_ptr + tl.program_id(0) // P * SPACING, tl.program_id(0) % P, P)


@triton.jit
def _empty_kernel(x_ptr, a, b, c, d, e, f, g, h, i):
    pass


@triton.jit
def _chained_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """EARLY: launched while the kernel before it runs, for which it waits."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    tl.store(y_ptr + i, tl.load(x_ptr + i, i < n * V), i < n * V)


# ---- questions ----


def _tensor(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=DEVICE).normal_()


def _copy(x: Tensor, y: Tensor, tile: int, warps: int, read: str = "", write: str = "", reverse: bool = False) -> None:
    """Programs of `tile` bytes."""
    block = tile // x.element_size()
    launch(_copy_kernel, triton.cdiv(x.numel(), block), warps, x, y, x.numel() // V.value, block, read, write, reverse)


def copy() -> Iterator[Run]:
    """Tiles, warps and hints of a plain copy: the ceiling of every kernel, and how many bytes on their way it takes."""
    x = _tensor(128 * MIB)
    y, moved = torch.empty_like(x), 4 * x.numel()
    for tile in (4096, 8192, 16384, 32768, 65536):
        for warps in (4, 8, 16):
            for hint in ("", "evict_first"):
                yield Run(f"{tile >> 10} KB, {warps} warps {hint}", partial(_copy, x, y, tile, warps, hint, hint), moved, expected=COPY)


MEETINGS = 100


def exchange() -> Iterator[Run]:
    """A meeting of P programs beside a launch: below which size rows are not spread over programs, and whether to meet or to launch again."""
    processors, x = device_of(torch.empty(0, device=DEVICE).get_device()).processors, _tensor(1)
    for resident in (processors, 2 * processors):
        for P in sorted({min(P, resident) for P in (2, 4, 8, 16, 32, 64, resident)}):
            teams = resident // P
            variant = f"{resident // processors} a processor, {teams} teams of {P}"
            expected = 1.15 if P == processors else None
            yield Run(variant, partial(_meetings, x, teams, P), repeats=MEETINGS, expected=expected)
    for timer, expected in (("graph", 1.35), ("events", 2.5)):
        yield Run("an empty kernel", partial(_empty, x, MEETINGS), repeats=MEETINGS, expected=expected, timer=timer)


def _meetings(x: Tensor, teams: int, P: int) -> None:
    launch(_meet_kernel, teams * P, 8, counters(x, teams), P, MEETINGS, cooperative=True)


def _empty(x: Tensor, times: int) -> None:
    for _ in range(times):
        launch(_empty_kernel, 1, 4, x, *range(9))


WAVES = (8, 16, 24, 32, 40, 48, 64, 512)  # MiB; the last one is the whole tensor


def waves() -> Iterator[Run]:
    """A tensor read, then read again and written, a slice at a time: how much is read twice from L2, `Device.wave`, and in which order."""
    x = _tensor(WAVES[-1] * MIB // 2)
    y, sums = torch.empty_like(x), torch.empty(x.numel() // 8192 + 1, dtype=F32, device=DEVICE)
    for size in WAVES:
        twice = size / L2 if size <= 40 else size / COPY
        for hints in (("", "", ""), ("evict_last", "evict_first", "evict_first")):
            for reverse in (False, True):
                variant = f"{size} MiB{' hints' * bool(hints[0])}{' reverse' * reverse}"
                call = partial(_wave, x, y, sums, size * MIB // 2, hints, reverse)
                yield Run(variant, call, 4 * x.numel(), expected=2 * size / (2 * size / COPY + twice))


def _wave(x: Tensor, y: Tensor, sums: Tensor, size: int, hints: tuple[str, str, str], reverse: bool) -> None:
    for a, b in zip(x.split(size), y.split(size), strict=True):
        launch(_read_kernel, triton.cdiv(a.numel(), 8192), 8, a, sums, a.numel() // V.value, 8192, hints[0])
        _copy(a, b, 16384, 8, *hints[1:], reverse)


SLABS = {  # norm, name, dtype -> us forward and backward
    ("group_norm", "hunyuan_vae/1x128x20x256x256/silu", "bf16"): (185, 325),
    ("group_norm", "sdxl_unet/2x320x64x64/silu", "bf16"): (6.34, 7.75),
    ("instance_norm", "kb1_34/112x64x512x512/none", "fp32"): (4070, 6100),
    ("batch_norm", "resnet50_b256/256x64x56x56/relu", "fp32"): (116, 172),
}


def slabs() -> Iterator[Run]:
    """The norms with programs that keep their tiles and meet (NORMOPS_COOPERATIVE=1) and with waves: which of the two is the default."""
    for (norm, name, dtype), expected in SLABS.items():
        (case,) = (case for case in shapes.grid(norm, DEVICE, name) if (case.dtype, case.layout) == (dtype, "NCHW"))
        inputs, dy = list(norms.inputs(case, DEVICE).values()), (_tensor(*case.shape, dtype=shapes.DTYPES[case.dtype]),)
        for direction, us in zip(("forward", "backward"), expected, strict=True):
            leaves, moved = _leaves(inputs, direction), norms.minimum_bytes(case, direction)
            for switch in ("0", "1"):
                call = _switched(switch, partial(DIRECTIONS[direction][1], norms.ours(case), leaves, dy))
                variant = f"{name} {direction}{', meeting' * (switch == '1')}"
                yield Run(variant, partial(_switched, switch, call), moved, expected=moved / us / 1e3)


def _leaves(tensors: list[Tensor], direction: str) -> list[Tensor]:
    return tensors if direction == "forward" else [value.detach().requires_grad_() for value in tensors]


def _switched(switch: str, call: Callable[[], object]) -> object:
    """`call()` where programs may meet or not; a graph keeps what was chosen when it was captured."""
    before = os.environ.get("NORMOPS_COOPERATIVE", "0")
    os.environ["NORMOPS_COOPERATIVE"] = switch
    device_of.cache_clear()
    try:
        return call()
    finally:
        os.environ["NORMOPS_COOPERATIVE"] = before
        device_of.cache_clear()


def dependent() -> Iterator[Run]:
    """Kernels that read what the one before wrote, launched while that one still runs: whether launches become dependent ones."""
    for kib in (64, 1024, 16384):
        x = _tensor(kib * MIB // 2048)
        y = torch.empty_like(x)
        for early in (False, True):
            variant = f"{kib} KiB{', dependent' * early}"
            yield Run(variant, partial(_chain, x, y, early), repeats=10, expected=None if kib > 64 else 0.35 if early else 1.35)


def _chain(x: Tensor, y: Tensor, early: bool) -> None:
    options = {"launch_pdl": True} if early else {}
    for _ in range(5):
        for a, b in ((x, y), (y, x)):
            _chained_kernel[(triton.cdiv(x.numel(), 8192),)](a, b, x.numel() // V.value, 8192, early, num_warps=8, **options)


def row_backward() -> Iterator[Run]:
    """Layer norm backward: programs, stages and warps of `choose_rows`."""
    for C in (1024, 4096, 8192):
        N = 128 * MIB // C
        x, dy, weight = _tensor(N, C), _tensor(N, C), _tensor(C)
        dx, dweight, dbias, stats = torch.empty_like(x), *(torch.empty_like(weight) for _ in range(2)), torch.empty(3, N, 1, 1, device=DEVICE)
        sizes = (None, N, C, 1, True, 0.0)
        choice = choose_rows(N, C, 1, 1, 2, 1, False, True, device_of(x.get_device()))
        row_norm.forward(choice, torch.empty_like(x), None, stats, x, None, weight, weight, *sizes, 1e-5, 0, 0.0)
        choice = choose_rows(N, C, 1, 1, 2, 1, True, True, device_of(x.get_device()))
        changes = [{"P": max(1, int(factor * choice.P)), "STAGES": stages} for factor in (0.5, 1, 2) for stages in (1, 2, 3)]
        for change in [*changes, {"num_warps": max(1, choice.num_warps // 2)}, {"num_warps": min(32, 2 * choice.num_warps)}]:
            config = replace(choice, **change)
            call = partial(row_norm.backward, config, dx, dweight, dbias, None, dy, None, x, stats, weight, weight, *sizes, 0, 0.0)
            variant = f"{C}: {config.P} programs, {config.STAGES} stages, {config.num_warps} warps{' (chosen)' * (config == choice)}"
            yield Run(variant, call, 6 * x.numel(), expected=0.9 * COPY)


def odd() -> Iterator[Run]:
    """Rows that no vector access divides: whether they are worth an aligned interior with a head and a tail, as odd S has."""
    for length in (65535, 65536):
        x = _tensor(max(1, 128 * MIB // 65536), length, dtype=F32)
        yield Run(f"RMS norm of {length}", partial(normops.rms_norm, x, (length,)), 8 * x.numel(), expected=0.92 * COPY)


def channels_last() -> Iterator[Run]:
    """How many neighbouring channels a tile has: loads and stores of 64 bytes a position, or 128 and more."""
    N, C = 8, 256
    S = 128 * MIB // (N * C)
    x = _tensor(N, S, C)
    y, stats = torch.empty_like(x), torch.zeros(3, N, 32, device=DEVICE)
    for frozen, moved in ((False, 2), (True, 4)):
        for width, part in ((32, 0.95), (64, 1.0), (128, 1.0)):
            config = Config("split", min(8, width // 8), False, 1, 1, width, 128, width // 8)  # 128 positions: as many partials, whatever the width
            arguments = (y if frozen else None, stats, x, None, None, None, N, C, 32, True, frozen, 1e-5, 0, 0.0)
            variant = f"{2 * width} bytes a position, {'read and written' if frozen else 'read'}"
            yield Run(variant, partial(group_norm.forward, config, *arguments), moved * x.numel(), expected=part * COPY)


# thread instructions an element, of 29 for which there is time while 4 bytes move
INSTRUCTIONS = {"none": 8, "relu": 8, "leaky_relu": 9, "silu": 12, "gelu": 40, "gelu_tanh": 14}


def activations() -> Iterator[Run]:
    """The last step of a norm, x read and y written, with every activation: whether one of them takes longer than the memory."""
    N, C, S = 8, 256, 65536 * MIB >> 20
    x, vector, stats = _tensor(N, C, S), _tensor(C), torch.ones(3, 1, C, device=DEVICE)
    y, config = torch.empty_like(x), choose(N, C, S, C, 2, False, False, device_of(x.get_device()), True)
    for name, code in CODES.items():
        call = partial(group_norm.forward, config, y, stats, x, vector, vector, None, N, C, C, False, True, 1e-5, code, 0.01)
        expected = COPY * min(0.92, 29 / INSTRUCTIONS[name]) if name in INSTRUCTIONS else None
        yield Run(name, call, 4 * x.numel(), expected=expected)


def host() -> Iterator[Run]:
    """What a launch and a call cost the host: whether `launch` is worth its private call, and what is left above it."""
    x = _tensor(1)
    yield Run("kernel[grid], 10 arguments", lambda: _empty_kernel[(1,)](x, *range(9)), expected=9, timer="wall")
    yield Run("launch, 10 arguments", partial(_empty, x, 1), expected=3.2, timer="wall")
    inputs, dy = list(norms.inputs(HOST, DEVICE).values()), (_tensor(*HOST.shape, dtype=F32),)
    for direction in ("forward", "forward, grad", "fwd+bwd"):
        yield Run(f"group norm, {direction}", DIRECTIONS[direction][1](norms.ours(HOST), _leaves(inputs, direction), dy), timer="wall")


QUESTIONS: dict[str, Callable[[], Iterator[Run]]] = {
    question.__name__: question for question in (copy, exchange, waves, slabs, dependent, row_backward, odd, channels_last, activations, host)
}
SOURCES = {
    "copy": "4.3 TB/s through PyTorch on an H200",
    "exchange": "RRZE gpu-small-kernels, H200: h200_pt.txt, h200_graph.txt, h200.txt",
    "waves": "a model: two HBM transfers and one L2 reading (RRZE gpu-l2-cache, h200.txt: 9.67 TB/s up to 40 MB) one after the other",
    "slabs": "a model, of programs that keep their tiles",
    "dependent": "an estimate: 1 us less than a graph's node, RRZE gpu-small-kernels, h200_graph.txt",
    "row_backward": "goal: 90 % of the copy",
    "odd": "goal: 92 % of the copy",
    "channels_last": "quack, AI/global_memory_coalescing_notes.md, H100: 64 bytes 5 % slower",
    "activations": "goal: 92 % of the copy, or instructions counted in machine code at 128 a clock and processor",
    "host": "tritonbench PR 669: 5.7 us without, 13.2 us with 19 arguments; direct 2.8 and 3.6",
}


# ---- asking ----


def ask(name: str, budget: float) -> list[run.Row]:
    """The rows of one question, torch's copy among them where bytes move; `budget` is seconds for each timer."""
    runs, rows = list(QUESTIONS[name]()), []
    if runs[0].moved:
        x = _tensor(128 * MIB)
        runs.insert(0, Run("copy_", partial(torch.empty_like(x).copy_, x), 4 * x.numel(), expected=COPY))
    for timer in TIMERS:
        chosen = {each.variant: each for each in runs if each.timer == timer}
        if chosen:
            found = run.timed({variant: partial(getattr, each, "call") for variant, each in chosen.items()}, TIMERS[timer](), budget)
            rows += [_row(name, each, found[variant]) for variant, each in chosen.items()]
    for row in rows:
        if rows[0]["unit"] == row["unit"] == "GB/s" and "median" in row and "median" in rows[0]:
            row["of_copy"] = f"{float(str(row['median'])) / float(str(rows[0]['median'])):.3f}"
    return rows


def _row(name: str, each: Run, found: Times | str) -> run.Row:
    row: run.Row = {"question": name, "variant": each.variant, "timer": each.timer, "status": "ok", "unit": "GB/s" if each.moved else "us"}
    if each.expected is not None:
        row["expected"] = f"{each.expected:.4g}"
    if isinstance(found, str):
        return row | {"status": found}
    low, median, high = (value / each.repeats * 1e6 for value in (found.low, found.median, found.high))
    figures = (each.moved / median / 1e3, each.moved / high / 1e3, each.moved / low / 1e3) if each.moved else (median, low, high)
    return row | {"median_us": f"{median:.6g}"} | {field: f"{value:.4g}" for field, value in zip(("median", "low", "high"), figures, strict=True)}


SHOWN = 12


def table(name: str, rows: list[run.Row]) -> str:
    """Of many variants the best and the worst; all of them are in the CSV."""
    shown = rows
    if len(rows) > SHOWN:
        timed = [row for row in rows if row["status"] == "ok"]
        best = sorted(timed, key=lambda row: float(str(row["median"])), reverse=rows[0]["unit"] == "GB/s")
        shown = best[: SHOWN - 2] + best[SHOWN - 2 :][-2:] + [row for row in rows if row["status"] != "ok"]
    lines = []
    for row in shown:
        figure = f"{row['median']} ({row['low']} to {row['high']})" if row["status"] == "ok" else row["status"]
        lines.append(report.line(row["variant"], row["timer"], row["unit"], figure, row.get("of_copy", ""), row.get("expected", "")))
    doc = (QUESTIONS[name].__doc__ or "").strip()
    title = f"{name}: {doc} Expected: {SOURCES[name]}."
    return report.table(title, ("variant", "timer", "unit", "median (20 % to 80 %)", "of the copy", "expected"), lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.questions", description="what the block sizes depend on, measured on a GPU")
    parser.add_argument("--only", nargs="+", choices=QUESTIONS, default=list(QUESTIONS), metavar="NAME", help=", ".join(QUESTIONS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the CSV (default: bench/results)")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds for each question and timer, beside what is compiled")
    options = parser.parse_args(argv)
    if DEVICE == "cuda" and not torch.cuda.is_available():
        sys.exit("bench.questions: expected a GPU, torch sees none")
    path = options.out / f"questions_{machine.slug(DEVICE).removeprefix('cuda_')}.csv"
    facts = machine.describe(DEVICE) | {f"expected, {name}": SOURCES[name] for name in options.only}
    stream = nullcontext() if DEVICE == "cpu" else torch.cuda.stream(torch.cuda.Stream())  # graphs are captured on a side stream
    with stream:
        run.write(path, facts, _answers(options.only, options.budget), FIELDS)
    print(f"wrote {path}")


def _answers(only: Iterable[str], budget: float) -> Iterator[list[run.Row]]:
    for name in only:
        rows = ask(name, budget)
        print(f"{table(name, rows)}\n", flush=True)
        yield rows


if __name__ == "__main__":
    main()
