"""The command line: ``python -m bench [op ...]``."""

import argparse
import itertools
import math
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    about = "normops against torch on the norm calls of real models: prints tables and writes a CSV"
    parser = argparse.ArgumentParser(prog="python -m bench", description=about)
    parser.add_argument("ops", nargs="*", metavar="op", help="norms to measure (default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where torch sees one")
    parser.add_argument("--shapes", metavar="NAME_OR_GLOB", help="only these cases: the tag of a model, or a glob over model/shape/activation")
    parser.add_argument("--quick", action="store_true", help="few cases, small, a minute for all norms")
    parser.add_argument("--threads", nargs="+", type=int, help="thread counts on a CPU (default: 1 and all)")
    parser.add_argument("--compile", choices=("none", "some", "all"), help="cases for torch.compile, seconds each (default: some; quick: none)")
    parser.add_argument("--warm", type=int, default=0, metavar="N", help="first compile what all cases need, in N processes")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no case after so many minutes")
    parser.add_argument("--resume", action="store_true", help="keep the cases that the CSV has of the same machine and versions")
    parser.add_argument("--out", type=Path, help=f"folder of the CSV (default: {HERE.name}/results for a whole run, else build/bench)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    import torch

    from bench import machine, methods, norms, report, run, shapes
    from bench.progress import tracked

    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.device == "cpu":
        machine.keep_pages("bench", argv)
    out = options.out or (HERE.parent / "build" / "bench" if options.quick or options.shapes else HERE / "results")
    end = time.monotonic() + 60 * options.minutes
    threads = tuple(options.threads or sorted({1, torch.get_num_threads()})) if options.device == "cpu" else ()
    if unknown := set(options.ops) - set(norms.NORMS):
        sys.exit(f"bench: expected op out of {', '.join(norms.NORMS)}, got {', '.join(unknown)}")
    grids = {op: shapes.grid(op, options.device, options.shapes, options.quick) for op in options.ops or norms.NORMS}
    if not any(grids.values()):
        sys.exit(f"bench: no case is called {options.shapes}")
    jobs = []
    for op, cases in grids.items():
        if not cases:
            continue
        budget = 0.06 if options.quick else 0.2 if options.device == "cpu" else 0.05
        plan = run.Plan(options.device, threads, budget, options.compile or ("none" if options.quick else "some"))
        if op == "group_norm" and not options.shapes:
            cases += [methods.HOST, methods.PENALTY]
        compiled = ", ".join(shapes.names(op, shapes.compiled(options.device))) if plan.compile == "some" else plan.compile
        facts = machine.describe(options.device) | {
            "grid": shapes.rule(op, options.device, options.quick),
            "compile": compiled + (", at the largest thread count" if threads and plan.compile != "none" else ""),
            "clocks": "wall: warm caches" if options.device == "cpu" else "events: cold L2; graph: cold L2, replay of a CUDA graph; wall: host",
        }
        path = out / f"{op}_{machine.slug(options.device)}.csv"
        kept = _kept(run, path, facts) if options.resume else []
        done = set(map(run.key, kept))
        jobs.append((op, path, facts, plan, kept, [case for case in cases if run.case_key(case) not in done]))
    if options.warm:
        _warm(options.warm, run.warm, [(case, plan) for *_, plan, _, cases in jobs for case in cases])
    for op, path, facts, plan, kept, cases in jobs:
        if not cases or time.monotonic() > end:
            print(f"{op}: {len(cases)} cases are left to measure")
            continue
        for name, value in facts.items():
            print(f"{name}: {value}")
        with tracked(cases) as (each, say):
            run.write(path, facts, itertools.chain([kept], _batches(run, each, plan, say, len(cases), end)))
        print(f"\n{report.tables(path)}\nwrote {path}")


def _warm(workers: int, call, jobs: list) -> None:
    """`call(case, plan)` for all of `jobs`, in processes with a compiler of one thread each."""
    start = time.monotonic()
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for done in [pool.submit(call, *job) for job in jobs]:
            done.exception()  # whoever fails will do so again when it is measured
    print(f"{len(jobs)} cases compiled by {workers} processes in {time.monotonic() - start:.0f} s")


def _kept(run, path: Path, facts: dict[str, str]) -> list:
    """The rows of an earlier run at `path`."""
    if not path.exists():
        return []
    then, rows = run.read(path)
    if other := [name for name in facts if name != "grid" and _clean(facts[name]) != _clean(then.get(name, ""))]:
        sys.exit(f"bench: {path} cannot be resumed, its {', '.join(other)} differ")
    return rows


def _clean(fact: str) -> str:
    return fact.replace("-dirty", "")  # the file itself may be what was changed


def _batches(run, cases, plan, say, total: int, end: float):
    for number, case in enumerate(cases, 1):
        if time.monotonic() > end:
            say(f"{case.norm}: {total - number + 1} cases are left to measure")
            return
        rows = run.measure(case, plan)
        say(f"{case.norm} [{number}/{total}] {case.name} {'x'.join(map(str, case.shape))} {case.dtype} {case.layout}: {_line(rows)}")
        yield rows


def _line(rows) -> str:
    """Speed against eager of every direction, and what is wrong."""
    words = []
    for row in rows:
        if row["method"] == "ours" and "vs_eager" in row:
            conditions = [f"{row['threads']}t" if row["threads"] else "", "" if row["timer"] == "wall" else row["timer"]]
            words.append(" ".join([row["direction"], *filter(None, conditions), f"{float(row['vs_eager']):.2f}x"]))
    return ", ".join(words + sorted({f"{row['method']} {row['status']}" for row in rows if row["status"] != "ok"}))


if __name__ == "__main__":
    main()
