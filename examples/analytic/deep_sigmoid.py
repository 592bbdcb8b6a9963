"""A deep sigmoid network, by six ways to start and to normalize it: ``python examples/analytic/deep_sigmoid.py``.

Ten fully connected layers on scikit-learn's digits. With torch's initialization the signal and its gradient are lost on the way. Compared are batch
norm, weight norm, analytic initialization, and analytic norm: of weights that are initialized analytically, and of torch's. These two compute the
same at first, up to the last layer, but a normalized weight of norm r learns as if at the learning rate over r^2, and torch's weights are small.
Each method takes the learning rate of one grid that gives it the lowest loss.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import common
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from normops import analytic

METHODS = ("standard init", "weight norm", "batch norm", "analytic init", "analytic norm", "analytic norm of standard init")
GRID = 0.01, 0.03, 0.1, 0.3, 1.0
TUNING = 1000  # the seed of the runs that choose the learning rate
BATCH, WIDTH = 96, 64
PIECE = 20  # steps that a point of the curves is the mean of


def net(method: str, depth: int, x: Tensor) -> nn.Module:
    layers: list[nn.Module] = []
    for number in range(depth):
        layers.append(nn.Linear(WIDTH if number else x.shape[1], WIDTH))
        if method == "batch norm":
            layers.append(nn.BatchNorm1d(WIDTH))
        layers.append(nn.Sigmoid())
    model = nn.Sequential(*layers, nn.Linear(WIDTH, 10))
    if method == "weight norm":
        for layer in model:
            if isinstance(layer, nn.Linear):
                weight_norm(layer)
    if method.startswith("analytic"):
        moments = analytic.input_moments([x], progress=False)
        if not method.endswith("standard init"):
            analytic.initialize_(model, moments)
        if method.startswith("analytic norm"):
            analytic.normalize(model, moments, preserve=False)
    return model


class Run(NamedTuple):
    method: str
    lr: float
    seed: int


class Outcome(NamedTuple):
    losses: list[float]  # of every step
    seconds: list[float]


def train(run: Run, depth: int, steps: int) -> Outcome:
    torch.manual_seed(run.seed)
    (x, target), _ = common.digits("cpu")
    x = x.flatten(1)
    model = net(run.method, depth, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=run.lr, momentum=0.9)
    generator = torch.Generator().manual_seed(run.seed)
    losses, seconds = [], []
    for _ in range(steps):
        batch = torch.randint(len(x), (BATCH,), generator=generator)
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[batch]), target[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    return Outcome(losses, seconds)


def last(outcome: Outcome) -> float:
    """The loss of the last tenth of the steps."""
    return statistics.fmean(outcome.losses[-max(1, len(outcome.losses) // 10) :])


def plot(path: Path, found: dict[Run, list[Outcome]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for run, outcomes in found.items():
        losses = torch.tensor([outcome.losses for outcome in outcomes])
        piece = min(PIECE, losses.shape[1])
        curves = losses[:, : losses.shape[1] // piece * piece].unflatten(1, (-1, piece)).mean(2)
        steps = torch.arange(1, curves.shape[1] + 1) * piece
        step = statistics.median(second for outcome in outcomes for second in outcome.seconds)
        for axis, along in ((left, steps), (right, steps * step)):
            (line,) = axis.semilogy(along, curves.mean(0), label=f"{run.method}, learning rate {run.lr:g}")
            axis.fill_between(along, curves.amin(0), curves.amax(0), color=line.get_color(), alpha=0.2)
    left.set(xlabel="step", ylabel="training loss")
    right.set(xlabel="seconds")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    common.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--depth", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--grid", type=float, nargs="+", default=GRID, help="learning rates")
    parser.add_argument("--out", type=Path, default=common.RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)  # nothing here is large enough for two

    def outcomes(runs: list[Run]) -> list[Outcome]:
        shown = common.track(runs, lambda run: f"{run.method}, learning rate {run.lr:g}, seed {run.seed}")
        return [train(run, options.depth, options.steps) for run in shown]

    tried = [Run(method, lr, TUNING) for method in METHODS for lr in options.grid]
    losses = {run: last(outcome) for run, outcome in zip(tried, outcomes(tried), strict=True)}
    finite = {run: loss if loss == loss else float("inf") for run, loss in losses.items()}
    chosen = [min((run for run in tried if run.method == method), key=finite.__getitem__) for method in METHODS]
    runs = [run._replace(seed=seed) for seed in range(options.seeds) for run in chosen]  # methods take turns: the machine is the same for all
    found: dict[Run, list[Outcome]] = {run: [] for run in chosen}
    for run, outcome in zip(runs, outcomes(runs), strict=True):
        found[run._replace(seed=TUNING)].append(outcome)
    rows = []
    for run, results in found.items():
        step = statistics.median(second for outcome in results for second in outcome.seconds)
        rows.append(
            {
                "method": run.method,
                "learning rate": run.lr,
                "loss of the last tenth of steps": common.spread([last(outcome) for outcome in results], 4),
                "ms a step": f"{1e3 * step:.1f}",
            }
        )
    common.write(options.out / "deep_sigmoid.csv", rows)
    plot(options.out / "deep_sigmoid.png", found)


if __name__ == "__main__":
    main()
