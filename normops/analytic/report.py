"""How far the propagated statistics of a model are from those of its activations on data."""

from __future__ import annotations

import math
from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch

from normops.analytic.inputs import Stream, first, input_moments, shown
from normops.analytic.moments import Closure, Moments, assuming, given, module_rules


@dataclass(frozen=True)
class Row:
    """Of the units (channels) of a module's output: analytic against sampled."""

    name: str
    kind: str
    units: int
    mean: float  # typical |error| of the mean, in sampled standard deviations: root mean square over units
    mean_worst: float
    std: float  # typical ratio of standard deviations, analytic over sampled: geometric mean
    std_low: float  # its quantiles 0.05 and 0.95
    std_high: float


@dataclass(frozen=True)
class Report:
    """`report`'s rows, as a table (``print``) and as a plot."""

    rows: tuple[Row, ...]
    samples: int

    def __str__(self) -> str:
        width = max([len(row.name) for row in self.rows] + [5])
        columns = f"{'kind':<16} {'units':>6}  {'mean error':>10} {'worst':>7}  {'std ratio':>9}  5 % .. 95 %"
        lines = [f"{'layer':<{width}}  {columns}   of {self.samples} samples"]
        for row in self.rows:
            lines.append(
                f"{row.name:<{width}}  {row.kind:<16} {row.units:>6}  {row.mean:>10.3f} {row.mean_worst:>7.3f}  {row.std:>9.3f}  "
                f"{row.std_low:.3f} .. {row.std_high:.3f}"
            )
        return "\n".join(lines)

    def plot(self, path: str) -> None:
        """Save a picture of both errors by layer; needs matplotlib."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 5), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True)
        at = range(len(self.rows))
        upper.bar(at, [row.mean for row in self.rows])
        upper.set_ylabel("mean error / std")
        low = [row.std - row.std_low for row in self.rows]
        high = [row.std_high - row.std for row in self.rows]
        lower.errorbar(at, [row.std for row in self.rows], yerr=[[max(0.0, v) for v in low], [max(0.0, v) for v in high]], fmt="o", capsize=3)
        lower.axhline(1.0, color="grey", linewidth=0.8)
        lower.set_ylabel("std, analytic / sampled")
        lower.set_xticks(list(at), [row.name for row in self.rows], rotation=90)
        figure.savefig(path)


def report(
    model: torch.nn.Module, loader: Iterable, moments: Moments | None = None, *, padding: str = "ignore", pooling: float = 0.0,
    residual: float = 0.0, progress: bool = True,
) -> Report:  # fmt: skip
    """Compare means and standard deviations of every module's output, propagated and sampled over a data loader, channel by channel.

    moments: of the input, by default those of the loader's (which is then read twice). padding, pooling, residual: see `Closure`; a normalized model
    has its own. The model runs in evaluation mode and is left as it was.
    """
    if moments is None:
        moments = input_moments(loader, progress=progress)
    moments = given("analytic.report", moments, model)
    _, assumptions = getattr(model, "analytic", (None, Closure(padding, pooling, residual)))
    analytic: dict[str, Moments] = {}
    sampled: dict[str, Stream] = {}

    def compare(name: str):
        def hook(module, args, output: Any) -> None:
            if isinstance(output, Moments):
                analytic.setdefault(name, copy(output))  # a function in place may follow
            elif isinstance(output, torch.Tensor) and output.is_floating_point() and output.dim() > 1 and name not in seen:
                seen.add(name)
                rows = output.detach().double()
                sampled.setdefault(name, Stream(False)).add(rows.movedim(1, -1).flatten(0, -2) if rows.dim() > 2 else rows)

        return hook

    seen: set[str] = set()
    leaves = [(name or type(module).__name__, module) for name, module in model.named_modules() if not list(module.children())]
    handles = [module.register_forward_hook(compare(name)) for name, module in leaves]
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            with assuming(assumptions), module_rules(model.modules()):
                model(copy(moments))
            for batch in shown(loader, progress):
                seen.clear()
                model(first(batch).to(moments.device))
    finally:
        for handle in handles:
            handle.remove()
        for module, flag in training.items():
            module.training = flag
    found = [name for name, _ in leaves if name in analytic and name in sampled]
    kinds = dict(leaves)
    if not sampled:
        raise ValueError("analytic.report: expected a loader with samples, that can be read again, got none")
    count = next((sampled[name].count for name in found), 0)
    return Report(tuple(_row(name, type(kinds[name]).__name__, analytic[name], sampled[name]) for name in found), count)


def _row(name: str, kind: str, expected: Moments, found: Stream) -> Row:
    own = expected.channels()
    mean, std = own.mu.flatten(), own.std.flatten()
    sd = found.variance().sqrt()
    alive = sd > 1e-6 * sd.max()
    if not alive.any():
        return Row(name, kind, len(sd), *(math.nan,) * 5)
    error = ((mean - found.mean) / sd)[alive]
    ratio = (std / sd)[alive].clamp_min(1e-30)
    low, high = torch.quantile(ratio, torch.tensor([0.05, 0.95], dtype=ratio.dtype)).tolist()
    return Row(name, kind, len(sd), float(error.square().mean().sqrt()), float(error.abs().max()), float(ratio.log().mean().exp()), low, high)
