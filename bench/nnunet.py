"""``python -m bench.nnunet``: a residual block of a 3-D nnU-Net encoder, with torch's instance norm and with normops'.

    conv, norm, LeakyReLU, conv, norm, + input, LeakyReLU

The layers are nnU-Net's: affine instance norm, slope 0.01, in place. normops fuses the activation into the first norm, sum and activation into the
second. Timed is forward and backward, of the block, and of the norms with what follows them, on inputs of their own. Every result is compared with
float64 first. Written to a CSV and between ``<!-- bench:nnunet -->`` and ``<!-- /bench -->`` of the README.
"""

import argparse
import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normops
from bench import machine, report, run
from bench.accuracy import relative
from bench.shapes import DTYPES, lay_out
from bench.timing import Wall, interleave

HERE = Path(__file__).parent
SHAPES = ((1, 32, 64, 64, 64), (1, 128, 16, 16, 16))  # the first and the third stage for a patch of 64^3; the default is 128^3, batch 2
LAYOUTS = {"NCHW": "contiguous", "NHWC": "channels_last_3d"}
TOLERANCE = {"fp32": 1e-3, "bf16": 0.2}  # where rounding decides about a sign, LeakyReLU's derivative is off by 0.99
FIELDS = ("shape", "dtype", "layout", "part", "method", "norm_gives", "threads", "median_us", "q20_us", "q80_us")


class TorchBlock(nn.Module):
    """The block as nnU-Net has it."""

    norm: Callable[..., nn.Module] = nn.InstanceNorm3d

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv3d(channels, channels, 3, padding=1) for _ in range(2))
        self.norm1, self.norm2 = (self.norm(channels, affine=True) for _ in range(2))

    def first(self, x: Tensor) -> Tensor:
        return F.leaky_relu_(self.norm1(x), 0.01)

    def second(self, x: Tensor, skip: Tensor) -> Tensor:
        return F.leaky_relu_(self.norm2(x) + skip, 0.01)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.conv2(self.first(self.conv1(x))), x)


class Block(TorchBlock):
    """The same with normops."""

    norm = staticmethod(partial(normops.nn.InstanceNorm3d, activation="leaky_relu", negative_slope=0.01))

    def first(self, x: Tensor) -> Tensor:
        return self.norm1(x)

    def second(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.norm2(x, residual=skip)


def step(block: TorchBlock, part: str, images: list[Tensor], dy: list[Tensor]) -> dict[str, Tensor]:
    """The results and the gradients of a training step; the bias of a convolution before a norm has none."""
    if part == "block":
        parameters = {name: value for name, value in block.named_parameters() if name not in ("conv1.bias", "conv2.bias")}
        images, results = images[:1], [block(images[0])]
    else:
        parameters = {name: value for name, value in block.named_parameters() if name.startswith("norm")}
        results = [block.first(images[0]), block.second(images[1], images[2])]
    gradients = torch.autograd.grad(results, [*images, *parameters.values()], dy[: len(results)])
    names = [f"result {number}" for number in range(len(results))] + [f"dx {number}" for number in range(len(images))] + list(parameters)
    return dict(zip(names, [value.detach() for value in results] + list(gradients), strict=True))


def measure(shape: tuple[int, ...], dtype: str, layout: str, budget: float) -> list[run.Row]:
    """The rows of one block: of all of it and of its norms, by torch and by normops."""
    torch.manual_seed(0)
    images, dy = ([lay_out(torch.randn(shape).to(DTYPES[dtype]), layout) for _ in range(count)] for count in (3, 2))
    images = [image.requires_grad_() for image in images]
    blocks = {"torch": TorchBlock(shape[1]).to(DTYPES[dtype]), "normops": Block(shape[1]).to(DTYPES[dtype])}
    blocks["normops"].load_state_dict(blocks["torch"].state_dict())
    double = copy.deepcopy(blocks["torch"]).double()
    rows = []
    for part in ("block", "norms"):
        exact = step(double, part, [image.detach().double().requires_grad_() for image in images], [each.double() for each in dy])
        for name, block in blocks.items():
            errors = {key: relative(value, exact[key]) for key, value in step(block, part, images, dy).items()}
            if not max(errors.values()) <= TOLERANCE[dtype]:
                raise RuntimeError(f"{part} of {name}, {dtype} {layout}: wrong by {errors}")
        samplers = {name: Wall().sampler(partial(step, block, part, images, dy)) for name, block in blocks.items()}
        for name, times in interleave(samplers, budget).items():
            last = blocks[name].norm1(images[0]).is_contiguous(memory_format=torch.channels_last_3d)
            seconds = {"median_us": times.median, "q20_us": times.low, "q80_us": times.high}
            place = {"shape": "x".join(map(str, shape)), "dtype": dtype, "layout": layout, "part": part, "method": name}
            rows.append(place | {"norm_gives": LAYOUTS["NHWC" if last else "NCHW"], "threads": torch.get_num_threads()})
            rows[-1] |= {key: f"{value * 1e6:.6g}" for key, value in seconds.items()}
    return rows


def table(rows: list[run.Row], facts: dict[str, str]) -> str:
    """Markdown: a line per shape, dtype and layout."""
    found: dict[tuple, dict[tuple, run.Row]] = {}
    for row in rows:
        found.setdefault((row["shape"], row["dtype"], LAYOUTS[str(row["layout"])]), {})[row["part"], row["method"]] = row
    lines = []
    for case, cells in found.items():
        times = []
        for part in ("block", "norms"):
            theirs, ours = (float(str(cells[part, method]["median_us"])) / 1e3 for method in ("torch", "normops"))
            times += [f"{theirs:.2f}", f"{ours:.2f}", f"{theirs / ours:.2f}"]
        given = (cells["norms", method]["norm_gives"] for method in ("torch", "normops"))
        lines.append(report.line(*case, *times, " / ".join(map(str, given))))
    title = f"Forward and backward, on {facts['machine']}, {facts['cores']} cores, torch {facts['torch']}, backend {facts['backend']}; medians in ms"
    times = ("torch", "normops", "ratio")
    columns = ("input", "dtype", "layout", *(f"block, {each}" for each in times), *(f"its norms, {each}" for each in times), "a norm gives")
    return report.table(title, columns, lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.nnunet", description="a residual block of nnU-Net, torch against normops, on the CPU")
    parser.add_argument("--quick", action="store_true", help="small images, little time, nothing goes to the README")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the CSV")
    parser.add_argument("--readme", type=Path, default=HERE.parent / "README.md", help="file with <!-- bench:nnunet --> and <!-- /bench -->")
    options = parser.parse_args(argv)
    machine.keep_pages("bench.nnunet", argv)
    facts = machine.describe("cpu")
    rows = []
    for shape in SHAPES if not options.quick else [(1, 8, 12, 12, 12)]:
        for dtype in ("fp32", "bf16"):
            for layout in LAYOUTS:
                rows += measure(shape, dtype, layout, budget=0.02 if options.quick else 3)
                print(*rows[-1].values(), flush=True)
    text = table(rows, facts)
    print(text)
    if not options.quick:
        run.write(options.out / f"nnunet_{machine.slug('cpu')}.csv", facts, [rows], FIELDS)
        report.fill(options.readme, "bench:nnunet", text)


if __name__ == "__main__":
    main()
