"""``python -m bench.report``: the README tables and a plot from the CSV files of ``python -m bench``.

Every number in a table is a ratio of medians from one run. A speed-up is torch's time over ours: below 1 normops is slower, and the
tables say how often and where worst.
"""

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import geometric_mean

from bench.run import read
from bench.shapes import DTYPES

HERE = Path(__file__).parent
DIRECTIONS = ("forward", "backward", "fwd+bwd")
CLONE_GOALS = {"forward": 1.4, "backward": 2.5}  # times of x.clone(), on a CPU, out of its caches
HOST_GOALS = {"forward": 1.15, "forward, grad": 1.3, "fwd+bwd": 1.3, "penalty": 1.3}  # times of torch
HOST_NAMES = {
    "forward": "forward, no grad",
    "forward, grad": "forward, grad",
    "fwd+bwd": "forward + backward",
    "penalty": "gradient penalty, (4, 128, 32, 32)",
}
COLUMNS = ("dtype", "layout", "threads", "cases")
Rows = list[dict[str, str]]


def tables(path: Path) -> str:
    """The markdown of one CSV."""
    facts, rows = read(path)
    cases = [row for row in rows if not _is_host(row)]
    parts = [_heading(facts), _faults(rows)]
    for other, act, title in (
        ("eager", lambda act: act != "none", "against F.group_norm followed by the activation, eager"),
        ("eager", lambda act: act == "none", "against F.group_norm, where no activation follows"),
        ("compile", lambda act: True, f"against torch.compile of the same ({facts.get('compile', '')})"),
    ):
        parts.append(_speedups(cases, other, act, f"Speed-up {title}".replace("group_norm", rows[0]["op"] if rows else "group_norm")))
    parts += [_clones(cases, facts), _host([row for row in rows if _is_host(row)])]
    return "\n\n".join(filter(None, parts)) + "\n"


def _is_host(row: dict[str, str]) -> bool:
    return row["name"].split("/")[0] in ("host", "penalty")


def _heading(facts: dict[str, str]) -> str:
    machine = f"{facts.get('machine', '?')}, {facts.get('cores', '?')} cores" + (f", {facts['simd']}" if "simd" in facts else "")
    versions = [f"{name} {facts[name]}" for name in ("torch", "triton", "driver", "normops", "backend") if facts.get(name, "none") != "none"]
    measured = f"Measured: {facts.get('grid', '?')}. Timer: {facts.get('clocks', '?')}. Medians, methods interleaved."
    return f"**{machine}**: {', '.join(versions)}.\n{measured}"


def _faults(rows: Rows) -> str:
    """What was not timed because it is wrong or does not run."""
    found: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            found.setdefault((row["method"], row["status"].split(":")[0]), set()).add(f"{row['name']} {row['dtype']} {row['layout']}")
    lines = []
    for (method, status), names in found.items():
        some = ", ".join(sorted(names)[:4]) + (", ..." if len(names) > 4 else "")
        lines.append(f"{status}, not timed: `{method}` on {len(names)} cases: {some}.")
    return "\n".join(lines)


def pairs(rows: Rows, other: str) -> Iterator[tuple[dict[str, str], float]]:
    """Our rows, with the time of `other` over ours in the same rounds."""
    key = ("name", "shape", "dtype", "layout", "threads", "timer", "direction")
    theirs = {tuple(row[field] for field in key): row for row in rows if row["method"] == other and row["median_us"]}
    for row in rows:
        match = theirs.get(tuple(row[field] for field in key))
        if row["method"] == "ours" and row["median_us"] and match:
            yield row, float(match["median_us"]) / float(row["median_us"])


def _grouped(found: Iterable[tuple[dict[str, str], float]]) -> dict[tuple[str, ...], dict[str, list[tuple[float, dict[str, str]]]]]:
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
        means = [f"{geometric_mean(ratio for ratio, _ in found[name]):.2f}" if name in found else "" for name in DIRECTIONS]
        slower = sum(ratio < 1 for ratio, _ in every)
        scaled = "" if row["shape"] in row["name"] else f" as {row['shape']}"
        worst_text = f"{worst:.2f} {row['direction']} {row['name']}{scaled}"
        lines.append(_line(*key, max(map(len, found.values())), *means, f"{slower} of {len(every)}", worst_text))
    return _table(f"{title} (geometric mean; > 1: normops is faster)", (*COLUMNS, *DIRECTIONS, "below 1", "worst"), lines)


def _clones(rows: Rows, facts: dict[str, str]) -> str:
    """Our times in units of ``x.clone()``: in the caches, and where x and its copy are larger than the last of them."""
    cache = int(facts.get("last_level_cache_bytes", 0))
    ratios = [(row, 1 / ratio) for row, ratio in pairs(rows, "clone") if row["direction"] in CLONE_GOALS]
    lines = []
    for place in ("in cache", "out of cache"):
        chosen = [pair for pair in ratios if (_copy_bytes(pair[0]) < cache) == (place == "in cache")]
        for key, found in _grouped(chosen).items():
            values = [[ratio for ratio, _ in found.get(name, [])] for name in CLONE_GOALS]
            cells = [f"{geometric_mean(each):.2f} ({max(each):.2f})" if each else "" for each in values]
            lines.append(_line(place, *key, max(map(len, found.values())), *cells))
    title = "Time in units of `x.clone()`, geometric mean (worst); to move everything once is 1 forward, 1.5 backward"
    if "simd" in facts:
        title += "; goal out of cache: " + ", ".join(f"{name} <= {goal}" for name, goal in CLONE_GOALS.items())
    return _table(title, ("x and y", *COLUMNS, *CLONE_GOALS), lines)


def _copy_bytes(row: dict[str, str]) -> int:
    """Bytes of x and a copy of it."""
    return 2 * math.prod(map(int, row["shape"].split("x"))) * DTYPES[row["dtype"]].itemsize


def _host(rows: Rows) -> str:
    lines = []
    for row, ratio in pairs(rows, "eager"):
        goal = HOST_GOALS[row["direction"]]
        ours = float(row["median_us"])
        cells = HOST_NAMES[row["direction"]], row["threads"] or row["timer"], f"{ours:.1f}", f"{ours * ratio:.1f}", f"{1 / ratio:.2f}", goal
        lines.append(_line(*cells))
    title = "Host overhead on (2, 32, 4, 4), and double backward"
    return _table(title, ("call", "threads", "normops, us", "torch, us", "normops / torch", "goal"), lines)


def _table(title: str, columns: tuple[str, ...], lines: list[str]) -> str:
    return "\n".join([title, "", _line(*columns), _line(*("---" for _ in columns)), *lines]) if lines else ""


def _line(*cells: object) -> str:
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
    parser.add_argument("op", nargs="?", default="group_norm")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the CSV files")
    parser.add_argument("--readme", type=Path, default=HERE.parent / "README.md", help="file with <!-- bench:op --> and <!-- /bench -->")
    parser.add_argument("--print", action="store_true", dest="only_print", help="print the tables, change no file")
    options = parser.parse_args(argv)
    files = sorted(options.results.glob(f"{options.op}_*.csv"))
    if not files:
        sys.exit(f"bench: no {options.op}_*.csv in {options.results}; run python -m bench first")
    content = "\n\n".join(tables(path) for path in files)
    if options.only_print:
        print(content)
        return
    for path in files:
        try:
            from bench.plot import draw
        except ImportError:
            print("no plot: matplotlib is not installed")
            break
        print(f"wrote {draw(path)}")
    fill(options.readme, f"bench:{options.op}", content)


if __name__ == "__main__":
    main()
