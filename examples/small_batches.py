"""Train a small network on handwritten digits in tiny batches, with batch norm, batch renorm and group norm: ``make small-batches``.

Batch norm trains with the statistics of each batch and is tested with their running average. Where batches are tiny, and each holds one class, the
two differ, and what was learned with the one fails with the other. Batch renormalization is drawn from the one to the other during training; group
norm has no statistics of batches. Everything else is the same for all three: network, first weights, batches, optimizer, learning rate, share of a
batch in the running statistics. The schedule of batch renorm is the published one, shortened from 80000 steps to those of the run.
"""

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from digits import digits
from torch import Tensor, nn
from torch.nn import functional as F

import normops

NORMS = ("batch norm", "batch renorm", "group norm")
BATCHES = {"4, shuffled": (4, False), "4 of one class": (4, True), "2 of one class": (2, True)}
RUN = 2  # so many batches of one class follow each other
CHECKS = 20  # the network is tested so often
LR, MOMENTUM, EPS = 0.02, 0.01, 1e-5


def norm(kind: str, channels: int, steps: int) -> nn.Module:
    if kind == "group norm":
        return normops.nn.GroupNorm(4, channels, EPS, activation="relu")
    if kind == "batch norm":
        return normops.nn.BatchNorm2d(channels, EPS, MOMENTUM, activation="relu")
    schedule = normops.nn.RenormSchedule(start=steps // 16, r_max=3.0, r_end=steps // 2, d_max=5.0, d_end=steps * 5 // 16)
    return normops.nn.BatchRenorm2d(channels, EPS, MOMENTUM, activation="relu", schedule=schedule)


class Net(nn.Module):
    def __init__(self, kind: str, steps: int) -> None:
        super().__init__()
        layers = []
        for inputs, outputs, stride in ((1, 16, 1), (16, 32, 2), (32, 64, 2)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), norm(kind, outputs, steps)]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def batches(target: Tensor, size: int, one_class: bool, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """The samples of every step: of the shuffled set, or of one class, which is drawn anew for every `RUN` steps."""
    members = [(target == label).nonzero().flatten() for label in range(10)]
    order = torch.empty(0, dtype=torch.long)
    for step in range(steps):
        if one_class:
            if step % RUN == 0:
                chosen = members[torch.randint(10, (), generator=generator)]
            yield chosen[torch.randint(len(chosen), (size,), generator=generator)]
            continue
        if len(order) < size:
            order = torch.randperm(len(target), generator=generator)
        yield order[:size]
        order = order[size:]


def train(kind: str, size: int, one_class: bool, steps: int, seed: int) -> tuple[list[float], list[float]]:
    """The loss of every step, and `CHECKS` accuracies on the test set on the way."""
    torch.manual_seed(seed)
    (x, target), (test_x, test_target) = digits("cpu")
    net = Net(kind, steps)
    optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses, accuracies = [], []
    for step, batch in enumerate(batches(target, size, one_class, steps, torch.Generator().manual_seed(seed)), 1):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x[batch]), target[batch])
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step * CHECKS // steps > len(accuracies):
            net.eval()
            with torch.no_grad():
                accuracies.append((net(test_x).argmax(1) == test_target).float().mean().item())
            net.train()
    return losses, accuracies


def spread(values: list[float], places: int) -> str:
    """Mean and standard deviation."""
    return f"{statistics.fmean(values):.{places}f} ± {statistics.stdev(values) if len(values) > 1 else 0:.{places}f}"


def plot(path: Path, found: dict[tuple[str, str], list[list[float]]], steps: int) -> str:
    """Test accuracy during training: the mean over the seeds, and from the lowest to the highest."""
    try:
        import matplotlib
    except ImportError:
        return "no plot: matplotlib is not installed"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(BATCHES), figsize=(4.2 * len(BATCHES), 3.8), sharey=True, layout="constrained")
    along = [steps * (check + 1) // CHECKS for check in range(CHECKS)]
    for axis, name in zip(axes, BATCHES, strict=True):
        for kind in NORMS:
            columns = [[100 * value for value in column] for column in zip(*found[name, kind], strict=True)]
            (line,) = axis.plot(along, [statistics.fmean(column) for column in columns], label=kind)
            axis.fill_between(along, [min(column) for column in columns], [max(column) for column in columns], color=line.get_color(), alpha=0.2)
        axis.set(title=f"batches of {name}", xlabel="step", ylim=(0, 100))
    axes[0].set_ylabel("test accuracy, %")
    axes[0].legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return f"plot: {path}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--plot", type=Path, default=Path("build/small_batches.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)  # nothing here is large enough for two

    runs = [(name, kind, seed) for name in BATCHES for kind in NORMS for seed in range(options.seeds)]
    curves: dict[tuple[str, str], list[list[float]]] = {}
    last: dict[tuple[str, str], list[float]] = {}
    for number, (name, kind, seed) in enumerate(runs, 1):
        losses, accuracies = train(kind, *BATCHES[name], options.steps, seed)
        curves.setdefault((name, kind), []).append(accuracies)
        last.setdefault((name, kind), []).append(statistics.fmean(losses[-max(1, options.steps // 10) :]))
        print(f"[{number}/{len(runs)}] batches of {name}, {kind}, seed {seed}: test accuracy {100 * accuracies[-1]:.1f} %", flush=True)

    print(f"\n{options.steps} steps, mean ± standard deviation over {options.seeds} seeds\n")
    print("| batches of | norm | test accuracy, % | training loss, last tenth |", "| --- | --- | --- | --- |", sep="\n")
    for (name, kind), found in curves.items():
        print(f"| {name} | {kind} | {spread([100 * each[-1] for each in found], 1)} | {spread(last[name, kind], 3)} |")
    print("\n" + plot(options.plot, curves, options.steps))


if __name__ == "__main__":
    main()
