"""Time of a training step of ResNet-20, and of one with four times its channels, by norm: ``python examples/analytic/cost.py``.

Forward, backward and a step of SGD, in batches of 64 images 3 x 32 x 32, as on CIFAR-10; random data. Norms of normops are fused with the residual
sum and the rectifier. All take turns, in another order each round; times are compared within a round. Nothing else should run meanwhile.
"""

import argparse
import itertools
import platform
import random
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import common
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

import normops
from normops import analytic

WARMUP = 2  # rounds


class Unfused(nn.Module):
    """A norm (or none), then the sum with `residual` and the rectifier."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        return F.relu(y if residual is None else y + residual)


def fused_batch_norm(channels: int) -> nn.Module:
    return normops.nn.BatchNorm2d(channels, activation="relu")


def fused_group_norm(channels: int) -> nn.Module:
    return normops.nn.GroupNorm(8, channels, activation="relu")


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "no norm": lambda channels: Unfused(nn.Identity()),
    "batch norm, torch": lambda channels: Unfused(nn.BatchNorm2d(channels)),
    "batch norm, normops": fused_batch_norm,
    "group norm, torch": lambda channels: Unfused(nn.GroupNorm(8, channels)),
    "group norm, normops": fused_group_norm,
    "weight norm, torch": lambda channels: Unfused(nn.Identity()),
    "analytic norm": lambda channels: Unfused(nn.Identity()),
}


class Block(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module], inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=bias)
        self.norm1 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=bias)
        self.norm2 = norm(outputs)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv2(self.norm1(self.conv1(x))), residual=self.skip(x))


class ResNet(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module], blocks: int, width: int, bias: bool) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, padding=1, bias=bias), norm(width)
        sizes = [width] * (blocks + 1) + [2 * width] * blocks + [4 * width] * blocks
        self.blocks = nn.Sequential(*(Block(norm, *pair, bias) for pair in zip(sizes, sizes[1:], strict=False)))
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.blocks(self.norm(self.stem(x))), 1).flatten(1))


def net(name: str, blocks: int, width: int, x: Tensor) -> nn.Module:
    model = ResNet(NORMS[name], blocks, width, bias="batch" not in name and "group" not in name)
    if name.startswith("weight norm"):
        for module in list(model.modules()):
            if isinstance(module, nn.Conv2d):
                weight_norm(module)
    if name == "analytic norm":
        moments = analytic.input_moments([x], progress=False)
        analytic.initialize_(model, moments)
        analytic.normalize(model, moments)
    return model


def stepper(model: nn.Module, x: Tensor, target: Tensor) -> Callable[[], float]:
    """Takes a training step, returns its seconds."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()
        return time.perf_counter() - start

    return step


def machine() -> str:
    """What the times were taken on."""
    found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE) if Path("/proc/cpuinfo").exists() else None
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, {found[1] if found else platform.processor()}"


def plot(path: Path, rows: list[dict]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    groups = list(dict.fromkeys((row["channels"], row["layout"]) for row in rows))
    for number, (channels, layout) in enumerate(groups):
        chosen = [row for row in rows if (row["channels"], row["layout"]) == (channels, layout)]
        at = [place + 0.8 / len(groups) * (number - (len(groups) - 1) / 2) for place in range(len(chosen))]
        bars = axis.barh(at, [float(row["time / no norm"]) for row in chosen], 0.72 / len(groups), label=f"{channels} channels, {layout}")
        axis.bar_label(bars, padding=3, fontsize=7)
    axis.set_yticks(range(len(chosen)), [row["norm"] for row in chosen])
    axis.invert_yaxis()
    axis.axvline(1, color="grey", linewidth=0.8)
    axis.set(xlabel="time of a training step / without norm")
    axis.margins(x=0.1)
    figure.legend(loc="outside lower right", ncols=2, fontsize=8)
    common.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--blocks", type=int, default=3, help="at each of three resolutions: 6 blocks + 2 layers")
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 64], help="channels of the first stage; 16 is ResNet-20")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", type=Path, default=common.RESULTS)
    options = parser.parse_args()

    rows = []
    formats = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
    for width, (layout, memory_format) in itertools.product(options.widths, formats.items()):
        torch.manual_seed(0)
        x = torch.randn(options.batch, 3, 32, 32).to(memory_format=memory_format)
        target = torch.randint(10, (options.batch,))
        steps = {name: stepper(net(name, options.blocks, width, x).to(memory_format=memory_format), x, target) for name in NORMS}
        seconds: dict[str, list[float]] = {name: [] for name in NORMS}
        rounds = [(width, layout, number) for number in range(WARMUP + options.rounds)]
        for *_, number in common.track(rounds, lambda run: "{} channels, {}, round {}".format(*run)):
            for name in random.sample(list(NORMS), len(NORMS)):
                taken = steps[name]()
                if number >= WARMUP:
                    seconds[name].append(taken)
        for name, values in seconds.items():
            ratios = sorted(value / plain for value, plain in zip(values, seconds["no norm"], strict=True))
            low, high = ratios[len(ratios) // 5], ratios[len(ratios) * 4 // 5]
            rows.append(
                {
                    "channels": width,
                    "layout": layout,
                    "norm": name,
                    "ms a step": f"{1e3 * statistics.median(values):.1f}",
                    "time / no norm": f"{statistics.median(ratios):.3f}",
                    "20 % .. 80 %": f"{low:.3f} .. {high:.3f}",
                }
            )
    print(f"\nmedian of {options.rounds} rounds, {machine()}")
    common.write(options.out / "cost.csv", rows)
    plot(options.out / "cost.png", rows)


if __name__ == "__main__":
    main()
