"""What the experiments share: data, progress, tables."""

import csv
import io
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from runpy import run_path
from typing import Any

import torch
from torch import Tensor

EXAMPLES = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
digits = cache(run_path(str(EXAMPLES / "digits.py"))["digits"])


def patches(count: int, size: int) -> Tensor:
    """Random (count, 3, size, size) cuts of scikit-image's photographs, each channel with mean 0 and standard deviation 1."""
    style = run_path(str(EXAMPLES / "style.py"))
    pictures = [style["photograph"](name)[0] for name in style["PHOTOGRAPHS"]]
    generator = torch.Generator().manual_seed(0)
    cuts = []
    for number in range(count):
        picture = pictures[number % len(pictures)]
        top, left = (int(torch.randint(length - size + 1, (), generator=generator)) for length in picture.shape[1:])
        cuts.append(picture[:, top : top + size, left : left + size])
    x = torch.stack(cuts)
    return (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)


def track(runs: list, describe: Callable[[Any], str]) -> Iterator:
    """The runs one after the other: a bar where rich is installed, lines elsewhere."""
    try:
        from rich.progress import Progress
    except ImportError:
        for number, run in enumerate(runs, 1):
            print(f"[{number}/{len(runs)}] {describe(run)}", flush=True)
            yield run
        return
    with Progress() as bar:
        task = bar.add_task("", total=len(runs))
        for run in runs:
            bar.update(task, description=describe(run))
            yield run
            bar.advance(task)


def spread(values: Sequence[float], places: int) -> str:
    """Mean and standard deviation."""
    return f"{statistics.fmean(values):.{places}f} ± {statistics.stdev(values) if len(values) > 1 else 0:.{places}f}"


def write(path: Path, rows: list[dict], shown: list[dict] | None = None) -> None:
    """The rows as a CSV file; they, or what is shown of them, as a table of Markdown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    shown = shown or rows
    print("\n| " + " | ".join(shown[0]) + " |\n|" + " --- |" * len(shown[0]))
    for row in shown:
        print("| " + " | ".join(map(str, row.values())) + " |")
    print(f"\ntable: {path}")


def save(figure: Any, path: Path) -> None:
    """The figure as a picture of few colours, which is small."""
    from PIL import Image

    picture = io.BytesIO()
    figure.savefig(picture, dpi=80)
    Image.open(picture).convert("RGB").quantize(64, Image.Quantize.MAXCOVERAGE).save(path, optimize=True)
    print(f"plot: {path}")
