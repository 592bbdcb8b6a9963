"""Train one network on several processes, and compare with one process: ``torchrun --standalone --nproc-per-node 3 examples/train_ddp.py``.

The workers get parts of different sizes of each batch of scikit-learn's digits: with three of them a half, a third and a sixth. The losses are those
of one process all the same. That takes batch norm by the statistics of all workers, and a loss that counts every sample once. With plain ``python``
there is one worker.
"""

import argparse
import copy
import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from digits import digits, progress, table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import normops

BATCH = 100


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 16, 10),
    )  # fmt: skip


def part(batch: Tensor, rank: int, workers: int) -> Tensor:
    """What a worker gets of a batch: the first the most, the last the least."""
    shares = torch.arange(workers, 0, -1).cumsum(0)
    start, end = (0 if i < 0 else int(len(batch) * shares[i] / shares[-1]) for i in (rank - 1, rank))
    return batch[start:end]


def train(net: nn.Module, x: Tensor, target: Tensor, epochs: Iterable[int], losses: list[float], rank: int = 0, workers: int = 1) -> None:
    """Append the mean loss of all workers' samples in each epoch to `losses`."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(0)  # all workers draw the same batches
    for _ in epochs:
        total = x.new_zeros(())
        for batch in torch.randperm(len(x), generator=generator).split(BATCH):
            mine = part(batch, rank, workers).to(x.device)
            loss = F.cross_entropy(net(x[mine]), target[mine], reduction="sum")
            optimizer.zero_grad()
            (loss * workers / len(batch)).backward()  # DistributedDataParallel takes the mean over workers: what remains is the mean over the batch
            optimizer.step()
            total += loss.detach()
        if workers > 1:
            dist.all_reduce(total)
        losses.append(total.item() / len(x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    options = parser.parse_args()

    local, cuda = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    alone = {} if dist.is_torchelastic_launched() else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("nccl" if cuda else "gloo", **alone)
    rank, workers = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)
    (x, target), (test_x, test_target) = digits(device)
    x, test_x = (value.to(getattr(torch, options.dtype)) for value in (x, test_x))
    one = network().to(x)
    net = DistributedDataParallel(normops.nn.convert_sync_batchnorm(copy.deepcopy(one)))

    name = f"{workers} worker" + "s" * (workers > 1)
    runs: dict[str, list[float]] = {name: [], "one process, torch's batch norm": []}
    mine, theirs = runs.values()
    epochs = progress(options.epochs, lambda: f"{name}  loss {mine[-1]:.4f}") if rank == 0 else range(options.epochs)
    train(net, x, target, epochs, mine, rank, workers)
    if rank == 0:
        train(one, x, target, progress(options.epochs, lambda: f"one process  loss {theirs[-1]:.4f}"), theirs)
        with torch.inference_mode():
            accuracy = [(each.eval()(test_x).argmax(1) == test_target).double().mean().item() for each in (net.module, one)]
        rows = [(f"loss, epoch {epoch}", f"{a:.8f}", f"{b:.8f}") for epoch, (a, b) in enumerate(zip(*runs.values(), strict=True), 1)]
        rows.append(("test accuracy", *(f"{100 * value:.1f} %" for value in accuracy)))
        rows.append(("largest difference of the losses", f"{max(abs(a - b) for a, b in zip(mine, theirs, strict=True)):.1e}", ""))
        print("\n" + table(("", *runs), rows))
    del net  # while it lives, so does its group; the end of a group that it held last can wait for itself
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
