"""Train one small network on handwritten digits twice, with torch's normalization and with normops', and compare: ``make demo``.

Both networks start from the same weights and see the same batches, step by step side by side. The network is a residual classifier for
scikit-learn's bundled 8x8 digits; each of its norms is followed by a residual sum and SiLU, which normops fuses.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normops

GROUPS, BATCH, WARMUP, GRADIENT_EVERY = 8, 96, 5, 10


class TorchNorm(nn.GroupNorm):
    """Group norm, residual sum and SiLU in plain torch, one after the other."""

    def forward(self, input: Tensor, *, residual: Tensor | None = None) -> Tensor:
        y = super().forward(input)
        return F.silu(y if residual is None else y + residual)


def fused_norm(groups: int, channels: int) -> nn.Module:
    """The same from normops, fused."""
    return normops.nn.GroupNorm(groups, channels, activation="silu")


class Block(nn.Module):
    def __init__(self, norm: Callable[[int, int], nn.Module], inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = norm(GROUPS, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = norm(GROUPS, outputs)
        self.skip = nn.Identity() if inputs == outputs and stride == 1 else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv2(self.norm1(self.conv1(x))), residual=self.skip(x))


class Net(nn.Module):
    def __init__(self, norm: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, padding=1, bias=False)
        self.norm = norm(GROUPS, 32)
        self.blocks = nn.Sequential(Block(norm, 32, 32, 1), Block(norm, 32, 32, 1), Block(norm, 32, 64, 2), Block(norm, 64, 64, 1))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.norm(self.stem(x))).mean((2, 3)))


class Run:
    """One network, its optimizer and what was seen of it."""

    def __init__(self, net: nn.Module, device: str, steps: int) -> None:
        self.net = net.to(device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, max_lr=0.05, total_steps=steps)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, x: Tensor, target: Tensor) -> None:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.net(x), target)
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())  # waits for the GPU
        self.seconds.append(time.perf_counter() - start)
        self.schedule.step()

    def accuracy(self, x: Tensor, target: Tensor) -> float:
        with torch.inference_mode():
            return (self.net(x).argmax(1) == target).float().mean().item()


def gradients(net: nn.Module, x: Tensor, target: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(F.cross_entropy(net(x), target), list(net.parameters())))


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest |ours - theirs| / |theirs| over the parameters, in vector norms."""
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(ours, theirs, strict=True))


class Gradients:
    """What the two networks' gradients differ by at the same weights, and from those in float64."""

    def __init__(self, torch_net: nn.Module, normops_net: nn.Module) -> None:
        self.torch_net, self.normops_net, self.exact_net = torch_net, copy.deepcopy(normops_net), copy.deepcopy(torch_net).double()
        self.rows: list[tuple[float, float, float]] = []

    def compare(self, x: Tensor, target: Tensor) -> None:
        for net in (self.normops_net, self.exact_net):
            net.load_state_dict(self.torch_net.state_dict())
        by_torch, by_normops, exact = (
            gradients(net, x.to(next(net.parameters()).dtype), target) for net in (self.torch_net, self.normops_net, self.exact_net)
        )
        self.rows.append((distance(by_torch, exact), distance(by_normops, exact), distance(by_normops, by_torch)))


def digits(device: str) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test images (N, 1, 8, 8) with mean 0 and standard deviation 1, and their labels; every fifth is for the test."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32, device=device).unsqueeze(1)
    x = ((x - x.mean()) / x.std()).contiguous(memory_format=torch.channels_last)
    target = torch.tensor(data.target, device=device)
    test = torch.arange(len(x), device=device) % 5 == 0
    return (x[~test], target[~test]), (x[test], target[test])


def progress(epochs: int, describe: Callable[[], str]) -> Iterator[int]:
    """The epochs, shown as a bar where rich is installed and as lines elsewhere."""
    try:
        from rich.progress import Progress
    except ImportError:
        for epoch in range(epochs):
            yield epoch
            print(f"epoch {epoch + 1}/{epochs}  {describe()}", flush=True)
        return
    with Progress() as bar:
        task = bar.add_task("training", total=epochs)
        for epoch in range(epochs):
            yield epoch
            bar.update(task, advance=1, description=describe())


def median(run: Run) -> float:
    return statistics.median(run.seconds[WARMUP:])


def table(header: Iterable[str], rows: list[tuple[str, str, str]]) -> str:
    lines = [tuple(header), *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    text = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}" for a, b, c in lines]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def plot(path: str, runs: dict[str, Run]) -> str:
    try:
        import matplotlib
    except ImportError:
        return "no plot: matplotlib is not installed"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for (name, run), style in zip(runs.items(), ("-", "--"), strict=True):
        left.semilogy(run.losses, style, label=name, linewidth=1.2)
        right.plot([1e3 * seconds for seconds in run.seconds[WARMUP:]], ".", label=name, markersize=3)
    left.set(title="the two runs learn the same", xlabel="step", ylabel="training loss")
    right.set(title="time of a training step", xlabel="step", ylabel="ms", ylim=(0, 2e3 * max(map(median, runs.values()))))
    left.legend()
    right.legend()
    figure.savefig(path, dpi=120)
    return f"plot: {path}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plot", default="demo.png")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    torch.backends.cudnn.allow_tf32 = False  # differences below are those of the norms in float32
    (x, target), test = digits(options.device)
    steps = options.epochs * (len(x) // BATCH)
    torch_net, normops_net = Net(TorchNorm), Net(fused_norm)
    normops_net.load_state_dict(torch_net.state_dict())
    runs = {"torch": Run(torch_net, options.device, steps), "normops": Run(normops_net, options.device, steps)}
    generator = torch.Generator().manual_seed(options.seed)
    compared = Gradients(torch_net, normops_net)

    for _ in progress(options.epochs, lambda: "  ".join(f"{name} loss {run.losses[-1]:.4f}" for name, run in runs.items())):
        for batch in torch.randperm(len(x), generator=generator)[: len(x) // BATCH * BATCH].split(BATCH):
            images, labels = x[batch.to(x.device)], target[batch.to(x.device)]
            done = len(runs["torch"].losses)
            if done % GRADIENT_EVERY == 0:
                compared.compare(images, labels)
            for run in list(runs.values())[:: 1 if done % 2 else -1]:  # who goes first alternates: neither always finds the cache warm
                run.step(images, labels)

    losses = [run.losses for run in runs.values()]
    backend = next(name for name in normops.backends.ORDER[options.device] if normops.backends.unavailable(name) is None)
    torch_error, normops_error, difference = (f"{max(column):.1e}" for column in zip(*compared.rows, strict=True))
    rows = [
        ("test accuracy", *(f"{100 * run.accuracy(*test):.1f} %" for run in runs.values())),
        ("median time of a step", *(f"{1e3 * median(run):.2f} ms" for run in runs.values())),
        ("training loss, mean of the last 10 steps", *(f"{statistics.fmean(each[-10:]):.5f}" for each in losses)),
        (f"largest loss difference of the two runs ({steps} steps)", "", f"{max(abs(a - b) for a, b in zip(*losses, strict=True)):.1e}"),
        (f"gradients at equal weights, every {GRADIENT_EVERY}th step: largest relative difference", "", difference),
        ("    and from the gradients in float64", torch_error, normops_error),
        ("computed by", f"torch {torch.__version__}", f"{backend} on {options.device}"),
    ]
    print("\n" + table(("", *runs), rows))
    print("\n" + plot(options.plot, runs))


if __name__ == "__main__":
    main()
