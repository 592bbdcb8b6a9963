"""``python -m bench.report``: the README tables and a plot from the CSV files of ``python -m bench``.

Every number in a table is a ratio of medians from one run. A speed-up is torch's time over ours: below 1 normops is slower, and the
tables say how often and where worst.
"""

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean

from bench.norms import NORMS
from bench.run import TIMED, read
from bench.shapes import DTYPES, MIB, OF_PARAMETERS

HERE = Path(__file__).parent
DIRECTIONS = ("forward", "backward", "fwd+bwd")
LARGEST_CACHE = 64 * MIB  # a virtual machine names the whole cache of its host, which its few cores do not have for themselves
CLONE_GOALS = {"forward": 1.4, "backward": 2.5}  # times of x.clone(), on a CPU, out of its caches
HOST_GOALS = {"forward": 1.15, "forward, grad": 1.3, "fwd+bwd": 1.3, "penalty": 1.3}  # times of torch
HOST_NAMES = {
    "forward": "forward, no grad",
    "forward, grad": "forward, grad",
    "fwd+bwd": "forward + backward",
    "penalty": "gradient penalty, (4, 128, 32, 32)",
}
COLUMNS = ("dtype", "layout", "threads", "cases")
Row = dict[str, str]
Rows = list[Row]


@dataclass(frozen=True)
class Goal:
    """Of which rows, in which directions, how many times as fast as eager torch (or `against`), in the geometric mean or in the worst case."""

    cases: str
    chosen: Callable[[Row], bool]
    directions: tuple[str, ...]
    least: float
    of: Callable[[Iterable[float]], float] = geometric_mean
    against: str = "eager"


def _all(row: Row) -> bool:
    return True


def _is_large(row: Row) -> bool:
    return math.prod(map(int, row["shape"].split("x"))) >= 2**20


def _of_models(row: Row) -> bool:
    return row["name"].startswith(("resnet50", "efficientnet", "pointnet"))


EVERY = Goal("the worst", _all, DIRECTIONS, 1, min)
COMPOSED = (EVERY, Goal("all", _all, DIRECTIONS, 3))
GOALS = {
    "instance_norm": (
        Goal("channels last", lambda row: row["layout"] == "NHWC", ("fwd+bwd",), 5),
        Goal("contiguous", lambda row: row["layout"] == "NCHW", ("fwd+bwd",), 2),
        Goal("3-D", lambda row: row["shape"].count("x") == 4, ("fwd+bwd",), 2.5),
    ),
    "layer_norm": (Goal("all", _all, ("forward",), 1.2), Goal("all", _all, ("backward",), 1.5)),
    "rms_norm": (Goal("all", _all, ("backward",), 8),),
    "batch_norm": (
        EVERY,
        Goal("ResNet-50, EfficientNet, PointNet", _of_models, ("forward",), 1.5),
        Goal("ResNet-50, EfficientNet, PointNet", _of_models, ("backward",), 1.8),
        Goal("7x7", lambda row: row["shape"].endswith("x7x7"), DIRECTIONS, 3),
        Goal("residual and ReLU", lambda row: "_add_" in row["name"], DIRECTIONS, 2),
    ),
    "batch_norm_eval": (EVERY,),
    "batch_renorm": COMPOSED,
    "batch_instance_norm": COMPOSED,
    "analytic_norm_weight": (
        Goal("all", _all, ("forward",), 3),
        Goal("2^20 elements and more, against `x.clone()`", _is_large, ("forward",), 0.67, against="clone"),
        Goal("the worst, against `x.clone()`", _all, ("forward",), 0.67, min, "clone"),
    ),
}
BF16_GOAL = Goal("bf16", lambda row: row["dtype"] == "bf16", DIRECTIONS, 2)  # of every norm of activations but group norm, which came before


def tables(path: Path) -> str:
    """The markdown of one CSV."""
    facts, rows = read(path)
    cases = [row for row in rows if not _is_host(row)]
    norm = NORMS[rows[0]["op"]]
    parts = [_heading(facts), _faults(rows), _goals(rows)]
    if rows[0]["op"] in OF_PARAMETERS:
        parts.append(_times(rows))
        return "\n\n".join(filter(None, parts)) + "\n"
    for other, act, title in (
        ("eager", lambda act: act != "none", f"against {norm.torch} followed by the activation, eager"),
        ("eager", lambda act: act == "none", f"against {norm.torch}, where no activation follows"),
        ("manual", lambda act: True, f"against {norm.written}, eager"),
        ("compile", lambda act: True, f"against torch.compile of the same ({facts.get('compile', '')})"),
    ):
        parts.append(_speedups(cases, other, act, f"Speed-up {title}"))
    parts += [_clones(cases, facts), _host([row for row in rows if _is_host(row)])]
    return "\n\n".join(filter(None, parts)) + "\n"


def files(results: Path, op: str) -> list[Path]:
    """The CSV files of a norm, of all machines."""
    return sorted(path for device in ("cpu", "cuda") for path in results.glob(f"{op}_{device}_*.csv"))


def summary(paths: Iterable[Path]) -> str:
    """For every machine a line per norm, layout and dtype: against eager torch at the largest thread count."""
    found: dict[str, list[str]] = {}
    for path in paths:
        facts, rows = read(path)
        most = max((row["threads"] for row in rows if row["threads"]), key=int, default="")
        chosen = [row for row in rows if not _is_host(row) and row["threads"] == most and row["timer"] in ("wall", "graph")]
        lines = found.setdefault(f"{facts['machine']}, {facts['cores']} cores, torch {facts['torch']}, backend {facts['backend']}", [])
        for (dtype, layout, _), ratios in _grouped(pairs(chosen, "eager")).items():
            every = [ratio for each in ratios.values() for ratio, _ in each]
            below = f"{sum(ratio < 1 for ratio in every)} of {len(every)}"
            lines.append(line(rows[0]["op"], dtype, layout, max(map(len, ratios.values())), *_means(ratios), below, f"{min(every):.2f}"))
    columns = ("norm", "dtype", "layout", "cases", *DIRECTIONS, "below 1", "worst")
    title = "Torch's time over normops', eager, all cores, geometric mean over the cases, on"
    return "\n\n".join(table(f"{title} {machine}", columns, lines) for machine, lines in found.items())


def _is_host(row: Row) -> bool:
    return row["name"].split("/")[0] in ("host", "penalty")


def _heading(facts: dict[str, str]) -> str:
    machine = f"{facts.get('machine', '?')}, {facts.get('cores', '?')} cores" + (f", {facts['simd']}" if "simd" in facts else "")
    versions = [f"{name} {facts[name]}" for name in ("torch", "triton", "driver", "normops", "backend") if facts.get(name, "none") != "none"]
    measured = f"Measured: {facts.get('grid', '?')}. Timer: {facts.get('clocks', '?')}. Medians, methods interleaved."
    return f"**{machine}**: {', '.join(versions)}.\n{measured}"


def _faults(rows: Rows) -> str:
    """What is wrong or does not run, and so was not timed, and what is inaccurate."""
    found: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            found.setdefault((row["method"], row["status"].split(":")[0]), set()).add(f"{row['name']} {row['dtype']} {row['layout']}")
    lines = []
    for (method, status), names in found.items():
        some = ", ".join(sorted(names)[:4]) + (", ..." if len(names) > 4 else "")
        sums = " or ".join(f"d{name}" for name in NORMS[rows[0]["op"]].vectors)
        what = f"inaccurate {sums}, timed all the same" if status in TIMED else f"{status}, not timed"
        lines.append(f"{what}: `{method}` on {len(names)} cases: {some}.")
    return "\n".join(lines)


def pairs(rows: Rows, other: str) -> Iterator[tuple[Row, float]]:
    """Our rows, with the time of `other` over ours in the same rounds."""
    key = ("name", "shape", "dtype", "layout", "threads", "timer", "direction")
    theirs = {tuple(row[field] for field in key): row for row in rows if row["method"] == other and row["median_us"]}
    for row in rows:
        match = theirs.get(tuple(row[field] for field in key))
        if row["method"] == "ours" and row["median_us"] and match:
            yield row, float(match["median_us"]) / float(row["median_us"])


def _grouped(found: Iterable[tuple[Row, float]]) -> dict[tuple[str, ...], dict[str, list[tuple[float, Row]]]]:
    """(dtype, layout, threads or timer) -> direction -> the ratios and their rows."""
    groups: dict = {}
    for row, ratio in found:
        key = row["dtype"], row["layout"], row["threads"] or row["timer"]
        groups.setdefault(key, {}).setdefault(row["direction"], []).append((ratio, row))
    return dict(sorted(groups.items(), key=lambda group: [part.rjust(8) for part in group[0]]))


def _speedups(rows: Rows, other: str, act: Callable[[str], bool], title: str) -> str:
    lines = []
    groups = _grouped(pairs([row for row in rows if act(row["act"])], other))
    for key, found in groups.items():
        every = [pair for ratios in found.values() for pair in ratios]
        worst, row = min(every, key=lambda pair: pair[0])
        slower = sum(ratio < 1 for ratio, _ in every)
        scaled = "" if row["shape"] in row["name"] else f" as {row['shape']}"
        worst_text = f"{worst:.2f} {row['direction']} {row['name']}{scaled}"
        lines.append(line(*key, max(map(len, found.values())), *_means(found), f"{slower} of {len(every)}", worst_text))
    return table(f"{title} (geometric mean; > 1: normops is faster)", (*COLUMNS, *DIRECTIONS, "below 1", "worst"), lines)


def _means(found: dict[str, list[tuple[float, Row]]]) -> list[str]:
    return [f"{geometric_mean(ratio for ratio, _ in found[name]):.2f}" if name in found else "" for name in DIRECTIONS]


def _goals(rows: Rows) -> str:
    """What was to be reached and what is, over all thread counts, and where it is less."""
    op = rows[0]["op"]
    lines = []
    goals = () if op == "group_norm" else (*GOALS.get(op, ()), *[BF16_GOAL] * (op not in OF_PARAMETERS))
    for goal in goals:
        found = [(row["dtype"], ratio) for row, ratio in pairs(rows, goal.against) if goal.chosen(row) and row["direction"] in goal.directions]
        reached = []
        for dtype in DTYPES:
            if ratios := [ratio for each, ratio in found if each == dtype]:
                value = goal.of(ratios)
                reached.append(f"{dtype} {value:.2f}{' (missed)' if value < goal.least else ''}")
        lines.append(line(goal.cases, ", ".join(goal.directions), goal.least, ", ".join(reached)))
    return table("Goals: speed-up against eager torch, geometric mean", ("cases", "direction", "goal", "reached"), lines)


def _clones(rows: Rows, facts: dict[str, str]) -> str:
    """Our times in units of ``x.clone()``: in the caches, and where x and its copy are larger than the last of them."""
    cache = min(int(facts.get("last_level_cache_bytes", 0)), LARGEST_CACHE)
    ratios = [(row, 1 / ratio) for row, ratio in pairs(rows, "clone") if row["direction"] in CLONE_GOALS]
    lines = []
    for place in ("in cache", "out of cache"):
        chosen = [pair for pair in ratios if (_copy_bytes(pair[0]) < cache) == (place == "in cache")]
        for key, found in _grouped(chosen).items():
            values = [[ratio for ratio, _ in found.get(name, [])] for name in CLONE_GOALS]
            cells = [f"{geometric_mean(each):.2f} ({max(each):.2f})" if each else "" for each in values]
            lines.append(line(place, *key, max(map(len, found.values())), *cells))
    title = "Time in units of `x.clone()`, geometric mean (worst); to move everything once is 1 forward, 1.5 backward"
    if "simd" in facts:
        title += "; goal out of cache: " + ", ".join(f"{name} <= {goal}" for name, goal in CLONE_GOALS.items())
    return table(title, ("x and y", *COLUMNS, *CLONE_GOALS), lines)


def _times(rows: Rows) -> str:
    """A line per case: what each method takes."""
    found: dict[tuple[str, ...], dict[tuple[str, str], str]] = {}
    for row in rows:
        if row["median_us"]:
            key = row["name"], *(row[field] for field in COLUMNS[:2]), row["threads"] or row["timer"]
            time = float(row["median_us"])
            found.setdefault(key, {})[row["direction"], row["method"]] = f"{time:.0f}" if time >= 100 else f"{time:.3g}"
    methods = ("ours", "eager", "compile", "clone")
    lines = [line(*key, *(" / ".join(cells.get((name, method), "-") for method in methods) for name in DIRECTIONS)) for key, cells in found.items()]
    title = f"Medians in us: normops / {NORMS[rows[0]['op']].torch}, eager / the same under torch.compile / `x.clone()`"
    return table(title, ("case", *COLUMNS[:3], *DIRECTIONS), lines)


def _copy_bytes(row: Row) -> int:
    """Bytes of x and a copy of it."""
    return 2 * math.prod(map(int, row["shape"].split("x"))) * DTYPES[row["dtype"]].itemsize


def _host(rows: Rows) -> str:
    lines = []
    for row, ratio in pairs(rows, "eager"):
        goal = HOST_GOALS[row["direction"]]
        ours = float(row["median_us"])
        cells = HOST_NAMES[row["direction"]], row["threads"] or row["timer"], f"{ours:.1f}", f"{ours * ratio:.1f}", f"{1 / ratio:.2f}", goal
        lines.append(line(*cells))
    title = "Host overhead on (2, 32, 4, 4), and double backward"
    return table(title, ("call", "threads", "normops, us", "torch, us", "normops / torch", "goal"), lines)


def table(title: str, columns: tuple[str, ...], lines: list[str]) -> str:
    """Markdown; empty where there are no lines."""
    return "\n".join([title, "", line(*columns), line(*("---" for _ in columns)), *lines]) if lines else ""


def line(*cells: object) -> str:
    """A line of a markdown table."""
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def replace(text: str, marker: str, content: str) -> str:
    """`text` with `content` between ``<!-- marker -->`` and ``<!-- /first word of marker -->``."""
    start, end = f"<!-- {marker} -->", f"<!-- /{marker.split(':')[0]} -->"
    pattern = re.compile(f"({re.escape(start)}\n).*?({re.escape(end)})", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"expected the lines {start} and {end}")
    return pattern.sub(lambda match: f"{match[1]}{content.strip()}\n{match[2]}", text, count=1)


def fill(readme: Path, marker: str, content: str) -> None:
    """Put `content` between the markers in the file `readme`."""
    try:
        readme.write_text(replace(readme.read_text(), marker, content))
    except (OSError, ValueError) as error:
        sys.exit(f"bench: {readme} was not changed: {error}")
    print(f"wrote {readme}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="tables and plots from the CSV files of python -m bench")
    parser.add_argument("ops", nargs="*", metavar="op", help="norms (default: all that have a CSV, and the summary)")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the CSV files")
    parser.add_argument("--readme", type=Path, default=HERE.parent / "README.md", help="file with <!-- bench:op --> and <!-- /bench -->")
    parser.add_argument("--print", action="store_true", dest="only_print", help="print the tables, change no file")
    options = parser.parse_args(argv)
    found = {op: files(options.results, op) for op in options.ops or NORMS}
    for op in options.ops:
        if not found[op]:
            sys.exit(f"bench: no {op}_*.csv in {options.results}; run python -m bench {op} first")
    contents = {op: "\n\n".join(map(tables, files)) for op, files in found.items() if files}
    if not options.ops:
        contents["summary"] = summary(path for files in found.values() for path in files)
    if options.only_print:
        print(*contents.values(), sep="\n\n")
        return
    for path in (path for files in found.values() for path in files):
        try:
            from bench.plot import draw
        except ImportError:
            print("no plot: matplotlib is not installed")
            break
        print(f"wrote {draw(path)}")
    for name, content in contents.items():
        fill(options.readme, f"bench:{name}", content)


if __name__ == "__main__":
    main()
