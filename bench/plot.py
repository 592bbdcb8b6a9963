"""A plot of a CSV: the speed-up over eager torch of every case, wins and losses in one colour."""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from bench.report import DIRECTIONS, pairs
from bench.run import read

COLOUR = "#3b6ea5"


def draw(path: Path) -> Path:
    """Write ``<name>.svg`` beside the CSV: a panel per direction and thread count (or timer), cases in the order of their speed-up."""
    facts, rows = read(path)
    found: dict[str, dict[str, list[float]]] = {}
    for row, ratio in pairs(rows, "eager"):
        if row["direction"] in DIRECTIONS and not row["name"].startswith("host/"):
            found.setdefault(f"{row['threads']} threads" if row["threads"] else row["timer"], {}).setdefault(row["direction"], []).append(ratio)
    plt.rcParams["svg.hashsalt"] = "normops"  # the same CSV gives the same file
    figure, axes = plt.subplots(max(1, len(found)), len(DIRECTIONS), figsize=(12, 3 * max(1, len(found))), sharey=True, squeeze=False)
    for line, (title, ratios) in zip(axes, found.items(), strict=False):
        for axis, direction in zip(line, DIRECTIONS, strict=True):
            values = sorted(ratios.get(direction, []))
            axis.scatter(range(len(values)), values, s=9, color=COLOUR)
            axis.axhline(1, color="black", linewidth=0.8)
            axis.set_yscale("log", base=2)
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
            axis.set_title(f"{direction}, {title}: {sum(value < 1 for value in values)} of {len(values)} below 1", fontsize=9)
            axis.set_xticks([])
    figure.supylabel("torch eager time / normops time", fontsize=9)
    figure.suptitle(f"{rows[0]['op'] if rows else ''}, {facts.get('machine', '')}, torch {facts.get('torch', '')}", fontsize=10)
    figure.tight_layout()
    target = path.with_suffix(".svg")
    figure.savefig(target, metadata={"Date": None})
    plt.close(figure)
    return target
