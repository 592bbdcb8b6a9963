"""What a call costs the host on the way to the Triton kernels, without a GPU: ``python -m bench.host [norm ...]``.

CPU tensors are taken for CUDA tensors, and compiled kernels are replaced by one that does nothing. Checks, autograd, allocation and the launcher
(kernels/launch.py) are real. Not in it: the driver's own launch, the thread that runs backward on a GPU, and that CUDA memory comes from another
allocator. torch's op of the same name on the same tensors, computed on the CPU, is the yardstick for what the framework costs.
"""

import argparse
import contextlib
import cProfile
import pstats
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import normops.kernels.launch
import torch
from triton.runtime.jit import KernelInterface

from bench import gate, shapes
from bench.compiled import recording
from bench.machine import describe, slug
from bench.methods import DIRECTIONS
from bench.norms import NORMS, eager, inputs, ours
from bench.run import write
from bench.shapes import Case
from normops import backends

FIELDS = ("op", "shape", "direction", "launches", "ours_us", "launching_us", "torch_us", "ratio")
CALLS = 100  # in a sample
STEPS = ("forward", "forward, grad", "fwd+bwd")


class Compiled:
    """A kernel that does nothing, as the launcher calls it."""

    function = packed_metadata = None
    run = "".format  # takes whatever it is given, in C


@contextlib.contextmanager
def stub_driver() -> Iterator[None]:
    """CPU tensors go to the Triton kernels, whose launches reach the driver and nothing else."""
    launcher = normops.kernels.launch
    with contextlib.ExitStack() as stack:
        for name in ("group_norm", "batch_norm", "row_norm", "activation_moments", "analytic_norm_weight"):
            stack.enter_context(mock.patch.object(getattr(normops.kernels, name), "INTERPRET", True))  # what lets CPU tensors pass
        for owner, name, value in (
            (launcher, "INTERPRET", False),
            (launcher, "_compiled", {}),
            (launcher, "_hooks", []),
            (launcher, "_current_stream", int),
            (torch.cuda, "current_device", (-1).__int__),  # what get_device() says of a CPU tensor
            (KernelInterface, "__getitem__", lambda kernel, grid: lambda *args, **options: Compiled),
            (normops.kernels, "unavailable", lambda: None),
            (backends, "ORDER", {"cpu": ("triton",)}),
            (backends, "everyday", False),
        ):
            stack.enter_context(mock.patch.object(owner, name, value, create=True))
        backends._candidates.cache_clear()
        stack.callback(backends._candidates.cache_clear)
        yield


def small(norm: str) -> Case:
    """A call that computes next to nothing."""
    case = shapes.load(norm)[0]
    shape = (2, 32, *[4] * (len(case.shape) - 2))
    return replace(
        case, shape=shape, dtype="fp32", layout="row" if case.layout == "row" else "NCHW", groups=8 if norm == "group_norm" else 0, act="none"
    )


def prepare(case: Case, direction: str) -> tuple[Any, Any]:
    """The calls to time: ours and torch's."""
    leaves = {name: value.requires_grad_() for name, value in inputs(case, "cpu").items()}
    dy = gate.upstream(case, leaves)
    make = DIRECTIONS[direction][1]
    calls = ours(case), eager(case)
    return tuple(call and make(call, list(leaves.values()), dy) for call in calls)


def cost(rounds: int, **runs: Callable[[], object]) -> dict[str, float]:
    """Median microseconds of processor time a call: on a machine that is shared, more of them than seconds on the wall are our own."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.thread_time()
            for _ in range(CALLS):
                run()
            found[name].append((time.thread_time() - start) / CALLS * 1e6)
    return {name: statistics.median(values) for name, values in found.items()}


def measure(case: Case, direction: str, rounds: int) -> dict[str, Any]:
    """The row of one direction. `launching`: of the launcher alone, for the same launches."""
    mine, theirs = prepare(case, direction)
    with torch.set_grad_enabled(DIRECTIONS[direction][0]), stub_driver():
        with recording() as launches:
            mine()
        launch = normops.kernels.launch.launch

        def launching() -> None:
            for kernel, programs, num_warps, args, cooperative in launches:
                launch(kernel, programs, num_warps, *args, cooperative=cooperative)

        us = cost(rounds, ours=mine, launching=launching, **{"torch": theirs} if theirs else {})
    row = {"op": case.norm, "shape": "x".join(map(str, case.shape)), "direction": direction, "launches": len(launches)}
    numbers = {f"{name}_us": value for name, value in us.items()} | ({"ratio": us["ours"] / us["torch"]} if theirs else {})
    return row | {name: f"{value:.4g}" for name, value in numbers.items()}


def profile(case: Case, direction: str, repetitions: int = 5000) -> None:
    """Where the time goes, by function."""
    mine, _ = prepare(case, direction)
    with torch.set_grad_enabled(DIRECTIONS[direction][0]), stub_driver():
        mine()
        with cProfile.Profile() as found:
            for _ in range(repetitions):
                mine()
    pstats.Stats(found).sort_stats("tottime").print_stats(30)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("norms", nargs="*", default=list(NORMS), metavar="norm", help=", ".join(NORMS))
    parser.add_argument("--rounds", type=int, default=51, help=f"samples of {CALLS} calls for each measurement")
    parser.add_argument("--profile", choices=STEPS, help="only print where the time of this direction goes")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results") / f"host_{slug('cpu')}.csv")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    cases = [small(norm) for norm in options.norms]
    if options.profile:
        return [profile(case, options.profile) for case in cases][0]
    found = describe("cpu")
    facts = {"host": "launches reach a driver that does nothing; not run on a GPU; microseconds of processor time, median"}
    facts |= {name: found[name] for name in ("machine", "cores", "system", "torch", "triton", "normops")}
    rows = []
    for case in cases:
        for direction in STEPS:
            rows.append(measure(case, direction, options.rounds))
            print("  ".join(f"{rows[-1].get(name, ''):>14}" for name in FIELDS), flush=True)
    write(options.out, facts, [rows], FIELDS)


if __name__ == "__main__":
    main()
