"""``python -m bench.accuracy``: relative errors against float64 by how far the data lies from zero.

The input has standard deviation 1 and the mean of the column `mean / std`, is rounded to the dtype, and the exact result is computed in
float64 from what the rounding left. An error is ``||value - exact|| / ||exact||``. Written to a CSV and between
``<!-- accuracy:group_norm -->`` and ``<!-- /accuracy -->`` of the README.
"""

import argparse
import csv
from pathlib import Path

import torch
from torch import Tensor

import normops
from bench import gate, machine
from bench.methods import NORMS, Call
from bench.report import fill
from bench.shapes import DTYPES, Case, lay_out

HERE = Path(__file__).parent
# mean / std as far as the format holds it: with p bits of mantissa, a spread of 1 around 2^k keeps p-k of them
RATIOS = {"fp32": (0, 10, 100, 1000, 10000), "bf16": (0, 2, 8), "fp16": (0, 10, 100)}
RESULTS = ("y", "dx", "dweight", "dbias")
FIELDS = ("op", "dtype", "layout", "ratio", "method", *RESULTS)
Row = dict[str, str]


def inputs(case: Case, ratio: float, device: str) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of `case` with x at mean/std = `ratio`, and dy."""
    tensors = NORMS[case.norm].inputs(case, device)
    generator = torch.Generator(device).manual_seed(2)
    x = torch.randn(case.shape, generator=generator, device=device, dtype=torch.float64) + ratio
    tensors["x"] = lay_out(x.to(DTYPES[case.dtype]), case.layout)
    return {name: value.requires_grad_() for name, value in tensors.items()}, gate.upstream(case, tensors)


def relative(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact).norm() / exact.norm()).item()


def methods(case: Case, device: str) -> dict[str, tuple[str | None, Call]]:
    """Method -> the backend of normops to force (None: torch) and the call."""
    norm = NORMS[case.norm]
    found: dict[str, tuple[str | None, Call]] = {"torch": (None, norm.eager(case))}
    for backend in (machine.default_backend(device), "reference"):
        found[f"normops {backend}"] = (backend, norm.ours(case))
    return found


def measure(op: str, device: str) -> list[Row]:
    rows = []
    for dtype, ratios in RATIOS.items():
        for layout in ("NCHW", "NHWC"):
            for ratio in ratios:
                case = Case(op, "accuracy", (4, 64, 32, 32), dtype, layout, 8, "none", 1e-5, 1, "")
                tensors, dy = inputs(case, ratio, device)
                exact = gate.truth(case, tensors, dy).values
                for method, (backend, call) in methods(case, device).items():
                    if backend is None:
                        values = gate.results(call, tensors, dy)
                    else:
                        with normops.backend(backend):
                            values = gate.results(call, tensors, dy)
                    errors = {name: f"{relative(values[name], exact[name]):.2e}" for name in RESULTS}
                    rows.append({"op": op, "dtype": dtype, "layout": layout, "ratio": f"{ratio:g}", "method": method} | errors)
    return rows


def table(rows: list[Row], facts: dict[str, str]) -> str:
    """Markdown: a row per dtype, layout and ratio; a cell holds the default backend's error, then torch's."""
    ours = f"normops {facts['backend']}"
    lines = [
        f"Relative error, normops ({facts['backend']} backend) / torch {facts['torch']}, on {facts['machine']}; (4, 64, 32, 32), 8 groups",
        "",
        f"| dtype | layout | mean / std | {' | '.join(RESULTS)} |",
        "|" + " --- |" * (3 + len(RESULTS)),
    ]
    index = {(row["dtype"], row["layout"], row["ratio"], row["method"]): row for row in rows}
    for (dtype, layout, ratio, method), row in index.items():
        if method == ours:
            torch_row = index[dtype, layout, ratio, "torch"]
            cells = " | ".join(f"{float(row[name]):.0e} / {float(torch_row[name]):.0e}" for name in RESULTS)
            lines.append(f"| {dtype} | {layout} | {ratio} | {cells} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy", description="errors of normops and torch against float64")
    parser.add_argument("op", nargs="?", default="group_norm", choices=list(NORMS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the CSV")
    parser.add_argument("--readme", type=Path, default=HERE.parent / "README.md", help="file with <!-- accuracy:op --> and <!-- /accuracy -->")
    parser.add_argument("--print", action="store_true", dest="only_print", help="print the table, leave the README")
    options = parser.parse_args(argv)
    facts = machine.describe(options.device)
    rows = measure(options.op, options.device)
    path = options.out / f"accuracy_{options.op}_{machine.slug(options.device)}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        file.writelines(f"# {name}: {value}\n" for name, value in facts.items())
        out = csv.DictWriter(file, FIELDS, lineterminator="\n")
        out.writeheader()
        out.writerows(rows)
    text = table(rows, facts)
    print(text, f"wrote {path}", sep="\n\n")
    if not options.only_print:
        fill(options.readme, f"accuracy:{options.op}", text)


if __name__ == "__main__":
    main()
