"""How far propagated means and variances are from sampled ones, by depth and kind of layer: ``python examples/analytic/closure.py``.

Propagation takes the inputs of a layer as independent and what reaches a non-linearity as normal. Random networks are initialized analytically and
run on data; then the means and standard deviations of what every linear layer or convolution gives are compared. The data are independent normal
numbers, scikit-learn's digits, and patches of scikit-image's photographs, whose pixels are correlated. Some networks are trained before. What
propagation can be told is told to some: statistics of the input by position or of patches, zeros at the border, sampled correlations.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import common
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normops import analytic

BATCH, LR = 64, 0.003  # of training
CHUNK = 500  # samples that are propagated at a time
SHOWN = 1, 2, 4, 6, 8, 12  # layers in the summary


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + x)


def connected(inputs: int, depth: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(inputs, 128), activation()]
        inputs = 128
    return nn.Sequential(*layers, nn.Linear(inputs, 10))


def convolutions(depth: int, pool: type[nn.Module] | None = None) -> nn.Sequential:
    """A pooling behind every second convolution, of its output, since relu(max) = max(relu)."""
    layers: list[nn.Module] = []
    for number in range(depth):
        layers += [nn.Conv2d(24 if number else 3, 24, 3, padding=1), nn.ReLU()]
        if pool and number % 2:
            layers.insert(len(layers) - (pool is nn.MaxPool2d), pool(2))
    return nn.Sequential(*layers)


def residual(blocks: int) -> nn.Sequential:
    body = [Block(16) for _ in range(blocks)]
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def correlation(net: nn.Module, x: Tensor) -> dict[str, float]:
    """What `propagate` can be told: sampled correlations of the positions of a pooling window, and of the two terms of a residual sum."""
    found: dict[str, list[float]] = {}

    def standard(x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, (0, 2, 3), keepdim=True)
        return (x - mean) * (var + 1e-12).rsqrt()

    def window(module, args, output):
        if args[0].shape[-1] > module.kernel_size:
            average = F.avg_pool2d(standard(args[0]), 2).square().mean().item()  # of four with correlation c: (1 + 3 c)/4
            found.setdefault("pooling", []).append((4 * average - 1) / 3)

    def terms(module, args, output):
        found.setdefault("residual", []).append((standard(args[0]) * standard(output)).mean().item())

    pools = [module for module in net.modules() if isinstance(module, nn.MaxPool2d | nn.AvgPool2d)]
    bodies = [module.body for module in net.modules() if isinstance(module, Block)]
    handles = [module.register_forward_hook(hook) for modules, hook in ((pools, window), (bodies, terms)) for module in modules]
    with torch.no_grad():
        net(x)
    for handle in handles:
        handle.remove()
    return {name: statistics.fmean(values) for name, values in found.items()}


class Case(NamedTuple):
    panel: str
    name: str
    net: Callable[[], nn.Module]
    x: Tensor
    kind: str = "channel"  # of the input's statistics, or "one" for all units
    padding: str = "ignore"
    told: bool = False  # measured with and without the correlations
    target: Tensor | None = None  # the network is trained
    norm: bool = False  # with analytic norm


Errors = list[tuple[float, float]]  # by layer: of the mean, in standard deviations, and the ratio of standard deviations


def measure(case: Case, seed: int, training: int) -> dict[str, Errors]:
    torch.manual_seed(seed)
    net, loader = case.net(), case.x.split(CHUNK)
    if case.kind == "one":
        var, mean = torch.var_mean(case.x)
        moments = analytic.Moments(mean.expand(case.x.shape[1:]), var.expand(case.x.shape[1:]))
    else:
        moments = analytic.input_moments(loader, case.kind, kernel_size=3, progress=False)
    analytic.initialize_(net, moments, padding=case.padding)
    if case.target is not None:
        train(net, moments, case, training)
    options = {case.name: {}} | ({f"{case.name}, correlation told": correlation(net, case.x[:CHUNK])} if case.told else {})
    found = {}
    for name, told in options.items():
        rows = analytic.report(net, loader, moments, padding=case.padding, **told, progress=False).rows
        found[name] = [(row.mean, row.std) for row in rows if row.kind in ("Linear", "Conv2d")]
    return found


def train(net: nn.Module, moments: analytic.Moments, case: Case, steps: int) -> None:
    if case.norm:
        analytic.normalize(net, moments, padding=case.padding)
    optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=0.9)
    for _ in range(steps):
        batch = torch.randint(len(case.x), (BATCH,))
        optimizer.zero_grad()
        F.cross_entropy(net(case.x[batch]), case.target[batch]).backward()
        optimizer.step()
    if case.norm:
        analytic.fold(net)


def cases(samples: int, depth: int) -> list[Case]:
    torch.manual_seed(0)
    normal = torch.randn(samples, 128)
    pixels, photographs = torch.randn(samples // 20, 3, 20, 20), common.patches(samples // 20, 20)
    (x, target), _ = common.digits("cpu")
    x, flat = x.contiguous(), x.flatten(1)
    few, layers = min(depth, 8), min(depth, 6)

    found = []
    for activation in (nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.SELU):
        net = partial(connected, 128, depth, activation)
        found.append(Case("fully connected, normal inputs", activation.__name__, net, normal))
    panel, net = "fully connected, digits", partial(connected, 64, few)
    found += [
        Case(panel, "by position", net, flat),
        Case(panel, "one for all pixels", net, flat, "one"),
        Case(panel, "by position, trained", net, flat, target=target),
        Case(panel, "by position, trained with analytic norm", net, flat, target=target, norm=True),
    ]
    panel, net = "convolutions", partial(convolutions, layers)
    found += [Case(panel, f"normal pixels, padding {padding}", net, pixels, padding=padding) for padding in ("ignore", "coverage")]
    found += [Case(panel, f"photographs by {kind}", net, photographs, kind, "coverage") for kind in ("channel", "position", "patch")]
    for pool, name in ((nn.MaxPool2d, "max"), (nn.AvgPool2d, "average")):
        net = partial(convolutions, layers, pool)
        found.append(Case("pooling", f"{name}, normal pixels", net, pixels, "channel", "coverage", told=True))
        found.append(Case("pooling", f"{name}, photographs", net, photographs, "patch", "coverage", told=True))
    panel, net = "residual, digits", partial(residual, few // 2)
    found.append(Case(panel, "random", net, x, "position", "coverage", told=True))
    found.append(Case(panel, "trained", net, x, "position", "coverage", True, target))
    found.append(Case(panel, "trained with analytic norm", net, x, "position", "coverage", True, target, norm=True))
    return found


def plot(path: Path, found: dict[tuple[str, str], list[Errors]]) -> None:
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys(panel for panel, _ in found))
    figure = Figure(figsize=(3.6 * len(panels), 6.8), layout="constrained")
    axes = figure.subplots(2, len(panels), squeeze=False)
    for panel, upper, lower in zip(panels, *axes, strict=True):
        for name, runs in ((name, runs) for (where, name), runs in found.items() if where == panel):
            layers = range(1, len(runs[0]) + 1)
            errors, ratios = ([statistics.fmean(run[layer - 1][which] for run in runs) for layer in layers] for which in (0, 1))
            style = ".--" if name.endswith("told") else ".-"
            upper.plot(layers, errors, style, label=name)
            lower.plot(layers, ratios, style)
        upper.set(title=panel, ylim=(0, None))
        lower.axhline(1, color="grey", linewidth=0.8)
        lower.set(xlabel="linear layer or convolution", ylim=(0, 1.6))
        lower.legend(*upper.get_legend_handles_labels(), fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    axes[0, 0].set_ylabel("error of the mean / std")
    axes[1, 0].set_ylabel("std, analytic / sampled")
    common.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=20000, help="for fully connected networks; a twentieth of it for images")
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--training", type=int, default=300, help="steps, for networks that are trained before")
    parser.add_argument("--out", type=Path, default=common.RESULTS)
    options = parser.parse_args()

    runs = [(case, seed) for case in cases(options.samples, options.depth) for seed in range(options.seeds)]
    found: dict[tuple[str, str], list[Errors]] = {}
    for case, seed in common.track(runs, lambda run: f"{run[0].panel}: {run[0].name}, seed {run[1]}"):
        for name, errors in measure(case, seed, options.training).items():
            found.setdefault((case.panel, name), []).append(errors)
    rows, summary = [], []
    for (panel, name), results in found.items():
        line = {"network": panel, "variant": name}
        summary.append(line | {f"layer {layer}": "" for layer in SHOWN})
        for layer, values in enumerate(zip(*results, strict=True), 1):
            errors, ratios = zip(*values, strict=True)
            rows.append(line | {"layer": layer, "mean error / std": common.spread(errors, 3), "std, analytic / sampled": common.spread(ratios, 3)})
            if layer in SHOWN:
                summary[-1][f"layer {layer}"] = f"{statistics.fmean(errors):.2f}, {statistics.fmean(ratios):.2f}"
    print("\nerror of the mean in standard deviations, ratio of standard deviations; a mean over networks")
    common.write(options.out / "closure.csv", rows, summary)
    plot(options.out / "closure.png", found)


if __name__ == "__main__":
    main()
