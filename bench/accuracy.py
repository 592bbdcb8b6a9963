"""``python -m bench.accuracy``: relative errors against float64 by how far the data lies from zero.

The input has standard deviation 1 and the mean of the column `mean / std`, is rounded to the dtype, and the exact result is computed in
float64 from what the rounding left. An error is ``||value - exact|| / ||exact||``. Written to a CSV and between
``<!-- accuracy:group_norm -->`` and ``<!-- /accuracy -->`` of the README, and so for every norm. (Not the norms of a sum: what its rounding leaves
is all that tells them from the others.)
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

import normops
from bench import gate, machine, norms, run
from bench.methods import Upstream
from bench.norms import NORMS, Call
from bench.report import fill
from bench.shapes import DTYPES, Case, lay_out

HERE = Path(__file__).parent
OPS = [op for op, norm in NORMS.items() if norm.results == ("y",)]
# mean / std as far as the format holds it: with p bits of mantissa, a spread of 1 around 2^k keeps p-k of them
RATIOS = {"fp32": (0, 10, 100, 1000, 10000), "bf16": (0, 2, 8), "fp16": (0, 10, 100)}
SHAPES = {"NCHW": (4, 64, 32, 32), "NHWC": (4, 64, 32, 32), "row": (256, 1024)}
GROUPS = 8
FIELDS = ("op", "dtype", "layout", "ratio", "method")
Row = dict[str, str]


def inputs(case: Case, ratio: float, device: str) -> tuple[dict[str, Tensor], Upstream]:
    """The tensors of `case` with x at mean/std = `ratio`, and dy."""
    tensors = norms.inputs(case, device)
    generator = torch.Generator(device).manual_seed(2)
    x = torch.randn(case.shape, generator=generator, device=device, dtype=torch.float64) + ratio
    tensors["x"] = lay_out(x.to(DTYPES[case.dtype]), case.layout)
    return {name: value.requires_grad_() for name, value in tensors.items()}, gate.upstream(case, tensors)


def relative(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact).norm() / exact.norm()).item()


def methods(case: Case, device: str) -> dict[str, tuple[str | None, Call]]:
    """Method -> the backend of normops to force (None: torch) and the call."""
    found: dict[str, tuple[str | None, Call]] = {"torch": (None, norms.eager(case))}
    for backend in (machine.default_backend(device), "reference"):
        found[f"normops {backend}"] = (backend, norms.ours(case))
    return found


def measure(op: str, device: str) -> list[Row]:
    rows = []
    for dtype, ratios in RATIOS.items():
        for layout in ("row", "NCHW", "NHWC") if op in ("layer_norm", "rms_norm") else ("NCHW", "NHWC"):
            for ratio in ratios:
                case = Case(op, "accuracy", SHAPES[layout], dtype, layout, "none", 1e-5, 1, "", GROUPS, mean=ratio, std=1.0)
                tensors, dy = inputs(case, ratio, device)
                exact = gate.truth(case, tensors, dy).values
                for method, (backend, call) in methods(case, device).items():
                    if backend is None:
                        values = gate.results(case, call, tensors, dy)
                    else:
                        with normops.backend(backend):
                            values = gate.results(case, call, tensors, dy)
                    errors = {name: f"{relative(values[name], exact[name]):.2e}" for name in values}
                    rows.append({"op": op, "dtype": dtype, "layout": layout, "ratio": f"{ratio:g}", "method": method} | errors)
    return rows


def table(rows: list[Row], facts: dict[str, str]) -> str:
    """Markdown: a row per dtype, layout and ratio; a cell holds the default backend's error, then torch's."""
    ours = f"normops {facts['backend']}"
    results = [name for name in rows[0] if name not in FIELDS]
    shapes = [str(SHAPES["NCHW"]), *[f"row: {SHAPES['row']}"] * any(row["layout"] == "row" for row in rows)]
    shapes += [f"{GROUPS} groups"] * (rows[0]["op"] == "group_norm")
    lines = [
        f"Relative error, normops ({facts['backend']} backend) / torch {facts['torch']}, on {facts['machine']}; {', '.join(shapes)}",
        "",
        f"| dtype | layout | mean / std | {' | '.join(results)} |",
        "|" + " --- |" * (3 + len(results)),
    ]
    index = {(row["dtype"], row["layout"], row["ratio"], row["method"]): row for row in rows}
    for (dtype, layout, ratio, method), row in index.items():
        if method == ours:
            torch_row = index[dtype, layout, ratio, "torch"]
            cells = " | ".join(f"{float(row[name]):.0e} / {float(torch_row[name]):.0e}" for name in results)
            lines.append(f"| {dtype} | {layout} | {ratio} | {cells} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy", description="errors of normops and torch against float64")
    parser.add_argument("ops", nargs="*", metavar="op", help=f"out of {', '.join(OPS)} (default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the CSV")
    parser.add_argument("--readme", type=Path, default=HERE.parent / "README.md", help="file with <!-- accuracy:op --> and <!-- /accuracy -->")
    parser.add_argument("--print", action="store_true", dest="only_print", help="print the tables, leave the README")
    options = parser.parse_args(argv)
    if unknown := set(options.ops) - set(OPS):
        parser.error(f"expected op out of {', '.join(OPS)}, got {', '.join(unknown)}")
    facts = machine.describe(options.device)
    for op in options.ops or OPS:
        rows = measure(op, options.device)
        path = options.out / f"accuracy_{op}_{machine.slug(options.device)}.csv"
        run.write(path, facts, [rows], rows[0])
        text = table(rows, facts)
        print(text, f"wrote {path}", sep="\n\n")
        if not options.only_print:
            fill(options.readme, f"accuracy:{op}", text)


if __name__ == "__main__":
    main()
