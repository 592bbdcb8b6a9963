"""A convolutional network in batches of 1, 2, 8 and 64, by batch norm, group norm and analytic norm: ``python examples/analytic/batch_sizes.py``.

Scikit-learn's digits: few are trained on, so that there is something to generalize to; the rest is for the choice of the learning rate (by the loss
there, the same grid for every norm and batch size) and for the test. Without norm means analytic initialization alone.
"""

import argparse
import statistics
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import common
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normops
from normops import analytic

NORMS = ("batch norm", "group norm", "analytic norm", "no norm")
STEPS = {1: 2000, 2: 1500, 8: 800, 64: 300}  # by batch size
GRID = 0.001, 0.003, 0.01, 0.03, 0.1
TUNING = 1000  # the first seed of the runs that choose the learning rate
LAYERS = (16, 1), (32, 2), (32, 1), (64, 2)  # channels, stride


def net(kind: str, x: Tensor) -> nn.Module:
    layers: list[nn.Module] = []
    channels = 1
    for outputs, stride in LAYERS:
        layers.append(nn.Conv2d(channels, outputs, 3, stride, padding=1))
        if kind == "batch norm":
            layers.append(normops.nn.BatchNorm2d(outputs))
        elif kind == "group norm":
            layers.append(normops.nn.GroupNorm(8, outputs))
        layers.append(nn.ReLU())
        channels = outputs
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))
    if kind in ("analytic norm", "no norm"):
        moments = analytic.input_moments([x], progress=False)
        analytic.initialize_(model, moments)
        if kind == "analytic norm":
            analytic.normalize(model, moments)
    return model


class Run(NamedTuple):
    kind: str
    batch: int
    steps: int
    lr: float
    seed: int


class Outcome(NamedTuple):
    losses: list[float]  # of every step
    training: float  # loss in evaluation mode
    validation: float  # loss
    accuracy: float  # on the test set


def split() -> tuple[tuple[Tensor, Tensor], ...]:
    """A fifth to train on, a sixth to choose the learning rate, the rest to test."""
    (x, target), training = common.digits("cpu")
    return training, (x[:300], target[:300]), (x[300:], target[300:])


def train(run: Run) -> Outcome:
    torch.set_num_threads(1)  # nothing here is large enough for two
    torch.manual_seed(run.seed)
    (x, target), *others = split()
    model = net(run.kind, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=run.lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, run.steps)
    generator = torch.Generator().manual_seed(run.seed)
    order = torch.empty(0, dtype=torch.long)
    losses = []
    for _ in range(run.steps):
        if len(order) < run.batch:
            order = torch.randperm(len(x), generator=generator)
        batch, order = order[: run.batch], order[run.batch :]
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[batch]), target[batch])
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        outputs = [(model(x), target) for x, target in ((x, target), *others)]
    training, validation, _ = (F.cross_entropy(y, target).nan_to_num(torch.inf).item() for y, target in outputs)
    y, target = outputs[-1]
    return Outcome(losses, training, validation, 100 * (y.argmax(1) == target).float().mean().item())


def plot(path: Path, found: dict[tuple[int, str], list[Outcome]]) -> None:
    from matplotlib.figure import Figure

    sizes = list(dict.fromkeys(batch for batch, _ in found))
    figure = Figure(figsize=(12, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for number, kind in enumerate(NORMS):
        columns = {
            left: [[outcome.training for outcome in found[batch, kind]] for batch in sizes],
            middle: [[outcome.accuracy for outcome in found[batch, kind]] for batch in sizes],
        }
        for axis, values in columns.items():
            at = [place + 0.08 * (number - 1.5) for place in range(len(sizes))]
            mean = [statistics.fmean(each) for each in values]
            ends = [[m - min(v) for m, v in zip(mean, values, strict=True)], [max(v) - m for m, v in zip(mean, values, strict=True)]]
            axis.errorbar(at, mean, ends, fmt="o-", capsize=3, label=kind)
        curves = [outcome.losses for outcome in found[sizes[0], kind]]
        piece = max(1, len(curves[0]) // 20)
        means = [statistics.fmean(value for curve in curves for value in curve[start : start + piece]) for start in range(0, len(curves[0]), piece)]
        right.plot(range(piece, piece * len(means) + 1, piece), means, label=kind)
    for axis in (left, middle):
        axis.set_xticks(range(len(sizes)), [str(size) for size in sizes])
        axis.set_xlabel("batch size")
    left.set(yscale="log", title="loss on the training set, after training")
    middle.set(title="test accuracy, %")
    right.set(yscale="log", title=f"loss of training steps, batch size {sizes[0]}", xlabel="step")
    left.legend()
    common.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shorten", type=int, default=1, help="divides the number of steps")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--grid", type=float, nargs="+", default=GRID, help="learning rates")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=common.RESULTS)
    options = parser.parse_args()

    settings = [(kind, batch, max(1, steps // options.shorten)) for batch, steps in STEPS.items() for kind in NORMS]
    with get_context("spawn").Pool(options.processes) as pool:

        def outcomes(runs: list[Run]) -> list[Outcome]:
            shown = common.track(runs, lambda run: f"{run.kind}, batches of {run.batch}, learning rate {run.lr:g}, seed {run.seed}")
            return [outcome for _, outcome in zip(shown, pool.imap(train, runs), strict=True)]

        tried = [Run(*setting, lr, TUNING) for setting in settings for lr in options.grid]
        losses = {run: outcome.validation for run, outcome in zip(tried, outcomes(tried), strict=True)}
        chosen = [min((run for run in tried if run[:3] == setting), key=losses.__getitem__) for setting in settings]
        runs = [run._replace(seed=seed) for run in chosen for seed in range(options.seeds)]
        found: dict[tuple[int, str], list[Outcome]] = {}
        for run, outcome in zip(runs, outcomes(runs), strict=True):
            found.setdefault((run.batch, run.kind), []).append(outcome)
    rows = []
    for run in chosen:
        results = found[run.batch, run.kind]
        rows.append(
            {
                "batch size": run.batch,
                "norm": run.kind,
                "learning rate": run.lr,
                "loss of the last tenth of steps": common.spread([statistics.fmean(o.losses[-max(1, run.steps // 10) :]) for o in results], 4),
                "training loss, evaluated": common.spread([o.training for o in results], 4),
                "test accuracy, %": common.spread([o.accuracy for o in results], 1),
            }
        )
    common.write(options.out / "batch_sizes.csv", rows)
    plot(options.out / "batch_sizes.png", found)


if __name__ == "__main__":
    main()
