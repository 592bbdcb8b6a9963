"""Measure the cases of a norm and write one CSV: a row per case, thread count, direction, timer and method."""

import csv
import traceback
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from bench import gate
from bench.methods import DIRECTIONS, HOST, compiled, directions, methods
from bench.norms import Call, minimum_bytes
from bench.norms import inputs as inputs_of
from bench.rivals import inputs_of as rival_inputs
from bench.shapes import Case
from bench.shapes import compiled as compiled_names
from bench.timing import Times, Wall, interleave, timers

# the fields are in microseconds (us), bytes, 1e9 bytes per second (gb_s) and ratios of times (x_clone: to x.clone(); vs_eager: eager's to this one's)
FIELDS = (
    "op", "name", "shape", "dtype", "layout", "groups", "act", "eps", "count", "threads", "timer", "direction", "method", "status",
    "median_us", "q20_us", "q80_us", "min_bytes", "gb_s", "of_copy", "x_clone", "vs_eager",
)  # fmt: skip
TIMED = ("ok", "inaccurate")
Row = dict[str, object]
T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """How to measure: `threads` is empty on a GPU; `budget` is seconds per case, thread count, direction and timer."""

    device: str
    threads: tuple[int, ...]
    budget: float
    compile: str  # for which cases torch.compile is measured: none, some (shapes.compiled) or all

    def compiles(self, case: Case) -> bool:
        return self.compile == "all" or (self.compile == "some" and case.name in compiled_names(self.device))


def measure(case: Case, plan: Plan) -> list[Row]:
    """The rows of one case. On a GPU everything runs on one side stream, so that graphs can capture it."""
    if plan.device == "cpu":
        return _measure(case, plan)
    try:
        with torch.cuda.stream(torch.cuda.Stream()):
            return _measure(case, plan)
    except torch.OutOfMemoryError:
        return [_row(case, "", "", "", "ours", "out of memory")]
    finally:
        torch.cuda.empty_cache()


def warm(case: Case, plan: Plan) -> None:
    """Call what is compiled once in either direction, so that it lies on disk when a later process measures it."""
    if plan.device == "cuda":
        torch.cuda.empty_cache()  # this process is one of several on the device
    inputs = {name: value.requires_grad_() for name, value in inputs_of(case, plan.device).items()}
    calls = methods(case, plan.device) | ({"compile": compiled(case)} if plan.compiles(case) else {})
    for name in calls.keys() - {"eager", "manual"}:
        _attempt(_once, calls[name], list(rival_inputs(case, name, inputs).values()))


def _once(call: Call, leaves: list[Tensor]) -> None:
    with torch.no_grad():
        call(*leaves)
    found = call(*leaves)
    found = (found,) if isinstance(found, Tensor) else found
    torch.autograd.grad(found, leaves, [torch.ones_like(value) for value in found])


def _measure(case: Case, plan: Plan) -> list[Row]:
    inputs = {name: value.requires_grad_() for name, value in inputs_of(case, plan.device).items()}
    x = inputs["x"].detach()
    dy = gate.upstream(case, inputs)
    exact = gate.truth(case, inputs, dy, second="penalty" in directions(case))
    ready = []
    for threads in plan.threads or (None,):
        _use(threads)
        calls = methods(case, plan.device)
        most = threads == max(plan.threads, default=None)
        if not most:
            calls.pop("manual", None)  # slow, and of interest with all cores only
        if most and plan.compiles(case):
            calls["compile"] = compiled(case)
        given = {name: rival_inputs(case, name, inputs) for name in calls}
        ready.append((threads, calls, given, {name: _status(name, case, call, given[name], dy, exact) for name, call in calls.items()}))
    del exact  # several times the size of x
    target = torch.empty_like(x)
    context = {"clone": lambda: x.clone, "copy_": lambda: partial(target.copy_, x)}
    rows = []
    for threads, calls, given, status in ready:
        _use(threads)
        for direction in directions(case):
            grad, make = DIRECTIONS[direction]
            with nullcontext() if grad else torch.no_grad():
                for timer in timers("cpu" if case is HOST else plan.device):
                    right = {name: call for name, call in calls.items() if status[name].startswith(TIMED)}
                    runs = context | {name: partial(make, call, list(given[name].values()), dy) for name, call in right.items()}
                    times = timed(runs, timer, plan.budget)
                    for name in (*calls, *context):
                        found = times.get(name)
                        row = _row(case, threads or "", timer.name, direction, name, found if isinstance(found, str) else status.get(name, "ok"))
                        if isinstance(found, Times):
                            row |= _numbers(case, direction, times, name)
                        rows.append(row)
    return rows


def timed(runs: dict[str, Callable[[], Callable[[], object]]], timer: Wall, budget: float) -> dict[str, Times | str]:
    """Times of what each of `runs` makes, or what went wrong. What they hold, gigabytes on a GPU, lives as long as this."""
    prepared = {name: _attempt(lambda make: timer.sampler(make()), make) for name, make in runs.items()}
    wrong = {name: failure for name, failure in prepared.items() if isinstance(failure, str)}
    return wrong | interleave({name: sampler for name, sampler in prepared.items() if not isinstance(sampler, str)}, budget)


def _use(threads: int | None) -> None:
    if threads:
        torch.set_num_threads(threads)


def _status(method: str, *arguments) -> str:
    return _attempt(gate.verdict, *arguments, method != "ours")


def _attempt(function: Callable[..., T], *arguments) -> T | str:
    """The function's result, or what went wrong: a method that cannot run is a result like any other."""
    try:
        return function(*arguments)
    except Exception as failure:
        traceback.print_exc(limit=-2)
        return f"error: {type(failure).__name__}"


def _row(case: Case, threads: object, timer: str, direction: str, method: str, status: str) -> Row:
    return {
        "op": case.norm, "name": case.name, "shape": "x".join(map(str, case.shape)), "dtype": case.dtype, "layout": case.layout,
        "groups": case.groups or "", "act": case.act, "eps": case.eps, "count": case.count,
        "threads": threads, "timer": timer, "direction": direction, "method": method, "status": status,
    }  # fmt: skip


def _numbers(case: Case, direction: str, times: dict, name: str) -> Row:
    """A copy moves twice the bytes of x: read and write."""
    mine, clone = times[name], times["clone"]
    moved = 2 * case.nbytes if name in ("clone", "copy_") else minimum_bytes(case, direction)
    numbers: Row = {
        "median_us": mine.median * 1e6,
        "q20_us": mine.low * 1e6,
        "q80_us": mine.high * 1e6,
        "min_bytes": moved,
        "gb_s": moved / mine.median / 1e9,
        "of_copy": moved / mine.median / (2 * case.nbytes / clone.median),
        "x_clone": mine.median / clone.median,
    }
    if isinstance(times.get("eager"), Times):
        numbers["vs_eager"] = times["eager"].median / mine.median
    return {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in numbers.items()}


def write(path: Path, facts: dict[str, str], batches: Iterable[list[Row]], fields: Iterable[str] = FIELDS) -> None:
    """Write `facts` as comments and the rows below them, batch by batch, so that a run that is cut off leaves what it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        file.writelines(f"# {name}: {value}\n" for name, value in facts.items())
        table = csv.DictWriter(file, fields, lineterminator="\n")
        table.writeheader()
        for rows in batches:
            table.writerows(rows)
            file.flush()


def key(row: Row) -> tuple[str, ...]:
    """What tells the cases of a file apart."""
    return tuple(str(row[field]) for field in ("name", "shape", "dtype", "layout"))


def case_key(case: Case) -> tuple[str, ...]:
    return key(_row(case, "", "", "", "", ""))


def read(path: Path) -> tuple[dict[str, str], list[dict[str, str]]]:
    """The facts and the rows of a file that `write` wrote."""
    lines = path.read_text().splitlines()
    facts = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# "))
    return facts, list(csv.DictReader(line for line in lines if not line.startswith("# ")))
