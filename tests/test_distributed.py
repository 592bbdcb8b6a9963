"""Synchronized batch norm on real processes: what the workers compute from their shards is what one process computes from the whole batch.

Every worker draws the same whole batch and takes its part. The tolerance is relative to one process: at most twice as far from float64 as
`batch_norm` of the whole batch, plus a rounding floor of ``FLOOR`` roundoffs of the largest element.
"""

import copy
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cache

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import workers
from oracle import ACTIVATIONS, FLOOR, LAYOUTS, accumulator, over, roundoff
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from workers import Workers, on_workers

import normops
from normops.nn import SyncBatchNorm, convert_sync_batchnorm

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
EPS, MOMENTUM, SLOPE = 1e-5, 0.3, 0.2


@pytest.fixture(scope="module", autouse=True)
def stop_workers():
    yield
    workers.close()


@dataclass(frozen=True)
class Case:
    """A whole batch and how many of its samples each worker has. The first field says why it is here."""

    why: str
    sizes: tuple[int, ...] = (3, 1, 4)
    shape: tuple[int, ...] = (5, 4, 3)  # of a sample: C, *spatial
    layouts: tuple[str, ...] = ("contiguous",) * 3
    dtype: torch.dtype = torch.float64
    vectors: str | None = "C"  # weight and bias; "NC": others for each sample
    vectors_dtype: torch.dtype | None = None  # also of the running statistics; x's, unless given
    residual: bool = False
    modulated: bool = False
    activation: str = "none"
    out_dtype: torch.dtype | None = None
    mean: float = 0.5
    std: float = 2.0
    apart: float = 0.0  # by how much the workers' means differ


CASES = {
    "uneven": Case("workers of different sizes, whose means differ by more than a standard deviation", apart=5.0),
    "empty": Case("a worker without samples", sizes=(3, 0, 5), apart=5.0),
    "alone": Case("all samples on one worker", sizes=(0, 0, 4)),
    "vector_inputs": Case("(N, C): one value per channel on a worker", sizes=(1, 6, 2), shape=(5,), apart=5.0),
    "volumes": Case("three spatial dimensions", shape=(3, 2, 3, 4)),
    "channels_last": Case("channels last, with an empty worker", sizes=(2, 0, 3), layouts=("channels_last",) * 3, apart=5.0),
    "layouts": Case("every worker another memory order, one of them packed first", layouts=("channels_last", "sliced", "contiguous"), apart=1.0),
    "silu": Case("an activation, whose argument depends on what all workers have", activation="silu", apart=1.0),
    "relu_residual": Case("as in a residual network", activation="relu", residual=True, layouts=("channels_last",) * 3, sizes=(3, 0, 5)),
    "fused": Case("everything at once", activation="gelu", residual=True, modulated=True),
    "conditional": Case("weights of each sample, an empty worker", vectors="NC", activation="tanh", sizes=(3, 0, 5), apart=1.0),
    "plain": Case("neither weight nor bias", vectors=None, residual=True),
    "float32": Case("float32", dtype=torch.float32, apart=5.0, activation="relu"),
    "float32_wide": Case("more channels and positions than a block", sizes=(2, 1, 3), shape=(67, 33, 9), dtype=torch.float32, apart=1.0),
    "far": Case("mean/std of 1e4", dtype=torch.float32, mean=1e4, std=1.0, apart=1.0),
    "far_channels_last": Case("mean/std of 1e4", dtype=torch.float32, mean=1e4, std=1.0, layouts=("channels_last",) * 3, activation="silu"),
    "huge": Case("values whose squares overflow", sizes=(3, 0, 5), dtype=torch.float32, mean=1e30, std=1e30),
    "tiny": Case("a variance far below eps", dtype=torch.float32, mean=0.0, std=1e-6),
    "bfloat16": Case("bfloat16 with float32 vectors", dtype=torch.bfloat16, vectors_dtype=torch.float32, activation="silu", apart=2.0),
    "bfloat16_all": Case("bfloat16 all of it, an empty worker", dtype=torch.bfloat16, sizes=(3, 0, 5), residual=True, apart=2.0),
    "float16_wide_result": Case("float16 in, float32 out", dtype=torch.float16, vectors_dtype=torch.float32, out_dtype=torch.float32),
}


@dataclass
class Batch:
    """The whole batch. `tensors` have gradients; those of `samples` are split, those of all samples are every worker's."""

    case: Case
    tensors: dict[str, Tensor]
    dy: Tensor
    running: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, case: Case, device: str) -> "Batch":
        samples, channels = sum(case.sizes), case.shape[0]

        def random(*shape, dtype=case.dtype, mean=0.0, std=1.0):
            return (torch.randn(shape, dtype=torch.float64) * std + mean).to(dtype).to(device)

        own = case.vectors_dtype or case.dtype
        apart = torch.arange(3.0).repeat_interleave(torch.tensor(case.sizes)).view(-1, *(1,) * len(case.shape)) * case.apart
        tensors = {"input": random(samples, *case.shape, mean=case.mean + apart, std=case.std)}
        if case.vectors:
            shape = (channels,) if case.vectors == "C" else (samples, channels)
            tensors |= {"weight": random(*shape, dtype=own, mean=0.5), "bias": random(*shape, dtype=own)}
        if case.residual:
            tensors["residual"] = random(samples, *case.shape)
        if case.modulated:
            tensors |= {"scale": random(samples, channels, dtype=own), "shift": random(samples, channels, dtype=own)}
        running = random(channels, dtype=own), random(channels, dtype=own).square() + 0.5
        return cls(case, tensors, random(samples, *case.shape, dtype=case.out_dtype or case.dtype), running)

    def shared(self, name: str) -> bool:
        """Whether a gradient is a sum over all samples."""
        return name in ("dweight", "dbias") and self.case.vectors == "C"

    def shard(self, rank: int) -> "Batch":
        def part(value):
            return value.split(self.case.sizes)[rank]

        tensors = {name: value if self.shared(f"d{name}") else part(value) for name, value in self.tensors.items()}
        if tensors["input"].numel():
            tensors["input"] = LAYOUTS[self.case.layouts[rank]](tensors["input"])
        return Batch(self.case, tensors, part(self.dy), self.running)

    def to(self, dtype: torch.dtype) -> "Batch":
        tensors = {name: value.to(dtype) for name, value in self.tensors.items()}
        return Batch(self.case, tensors, self.dy.to(dtype), tuple(value.to(dtype) for value in self.running))

    def results(self, function) -> dict[str, Tensor]:
        """y, the gradients and the running statistics after one step of `function`."""
        leaves = {name: value.detach().requires_grad_() for name, value in self.tensors.items()}
        running = tuple(value.clone() for value in self.running)
        y = function(leaves["input"], *running, **{name: value for name, value in leaves.items() if name != "input"})
        gradients = torch.autograd.grad(y, list(leaves.values()), self.dy)
        found = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
        return {"y": y.detach()} | found | dict(zip(("running_mean", "running_var"), running, strict=True))

    def second(self, function) -> dict[str, Tensor]:
        """The gradients of a sum over samples of the squares of first gradients, and of products with those of what all samples share."""
        leaves = {name: value.detach().requires_grad_() for name, value in (self.tensors | {"dy": self.dy}).items()}
        tensors = {name: value for name, value in leaves.items() if name not in ("input", "dy")}
        y = function(leaves["input"], *(value.clone() for value in self.running), **tensors)
        names = ["input", *tensors]
        first = torch.autograd.grad(y, [leaves[name] for name in names], leaves["dy"], create_graph=True)
        along = torch.linspace(-1, 2, y.shape[1], dtype=torch.float64, device=y.device)
        terms = [
            (value.double() * along).sum() if self.shared(f"d{name}") else value.double().square().sum()
            for name, value in zip(names, first, strict=True)
        ]
        found = torch.autograd.grad(sum(terms), list(leaves.values()), materialize_grads=True)
        return {f"d{name}": gradient for name, gradient in zip(leaves, found, strict=True)}

    def options(self) -> dict:
        case = self.case
        options = {"activation": case.activation, "negative_slope": SLOPE, "out_dtype": case.out_dtype}
        return {"training": True, "momentum": MOMENTUM, "eps": EPS} | options

    def one_process(self, *args, **tensors) -> Tensor:
        return normops.batch_norm(*args, **tensors, **self.options())

    def synchronized(self, *args, **tensors) -> Tensor:
        return normops.sync_batch_norm(*args, **tensors, **self.options())

    def composed(self, x, running_mean, running_var, weight=None, bias=None, residual=None, scale=None, shift=None) -> Tensor:
        t = F.batch_norm(x, running_mean, running_var, None, None, True, MOMENTUM, EPS)
        t = t if weight is None else t * over(weight, x, 0) + over(bias, x, 0)
        t = t if scale is None else t * (1 + over(scale, x, 0)) + over(shift, x, 0)
        return ACTIVATIONS[self.case.activation](t if residual is None else t + residual, SLOPE)


def hold(whole: Batch, results: Callable[[Batch, Callable], dict[str, Tensor]], factor: float = 2) -> None:
    """What this worker computes of its shard is as near to float64 as one process is that has the whole batch."""
    rank, exact = dist.get_rank(), results(whole.to(torch.float64), whole.composed)
    measured, ratio = whole, 1.0
    if accumulator(whole.case.dtype) == torch.float64:  # the oracle's own: what float32 loses says what rounding costs
        measured, ratio = whole.to(torch.float32), roundoff(torch.float64) / roundoff(torch.float32)
    by_one, by_composition = results(measured, whole.one_process), results(measured.to(torch.float64), whole.composed)
    for name, value in results(whole.shard(rank), whole.synchronized).items():
        expected, loss = exact[name], (by_one[name] - by_composition[name]).abs().max().item() * ratio
        unit = max(roundoff(value.dtype), roundoff(accumulator(whole.case.dtype)))
        limit = factor * loss + FLOOR * unit * expected.abs().max().item()
        if whole.shared(name):
            value = summed(value).to(value.dtype)
        elif not name.startswith("running"):
            expected = expected.split(whole.case.sizes)[rank]
        assert value.shape == expected.shape
        error = (value - expected).abs().max().item() if value.numel() else 0.0
        assert error <= limit, f"{name}: error {error:.3g} > {limit:.3g} (one process {loss:.3g})"


def summed(value: Tensor) -> Tensor:
    """The sum over the workers, in float64."""
    total = value.double()
    dist.all_reduce(total)
    return total


def same_everywhere(*tensors: Tensor) -> None:
    for value in tensors:
        every = [torch.empty_like(value) for _ in range(dist.get_world_size())]
        dist.all_gather(every, value)
        assert all(torch.equal(value, other) for other in every)


@on_workers
@pytest.mark.parametrize("case", CASES)
def test_whole_batch(case, backend, device):
    """y, all gradients and the running statistics, which are the same on all workers in bits."""
    whole = Batch.of(CASES[case], device)
    hold(whole, Batch.results)
    shard = whole.shard(dist.get_rank())
    results = shard.results(whole.synchronized)
    same_everywhere(results["running_mean"], results["running_var"])
    assert results["y"].dtype == (whole.case.out_dtype or whole.case.dtype)
    for name, value in shard.tensors.items():
        assert results[f"d{name}"].dtype == value.dtype


@on_workers
@pytest.mark.parametrize("case", ["uneven", "empty", "channels_last", "silu", "relu_residual", "fused", "conditional", "plain", "float32"])
def test_second_derivatives(case, backend, device):
    """Through gradients of everything, as a gradient penalty takes them."""
    hold(Batch.of(CASES[case], device), Batch.second, factor=4)  # squares of what may be off by twice as much


def collectives(group: dist.ProcessGroup | None = None) -> int:
    """How many a process group has started so far."""
    return (group or dist.group.WORLD)._get_sequence_number_for_group()


@on_workers
def test_one_collective_forward_and_one_backward(backend, device):
    """With everything that a call can have; none in evaluation, nor in a backward that nobody asks for dx."""
    shard = Batch.of(CASES["fused"], device).shard(dist.get_rank())
    leaves = {name: value.detach().requires_grad_() for name, value in shard.tensors.items()}
    x = leaves.pop("input")
    start = collectives()
    y = shard.synchronized(x, *shard.running, **leaves)
    assert collectives() == start + 1
    y.backward(shard.dy)
    assert collectives() == start + 2
    with torch.no_grad():
        shard.synchronized(x, *shard.running, **leaves)
    assert collectives() == start + 3
    normops.sync_batch_norm(x, *shard.running, **leaves, training=False).backward(shard.dy)
    assert collectives() == start + 3
    shard.synchronized(x.detach(), *shard.running, **leaves).backward(shard.dy)
    assert collectives() == start + 4


@on_workers
@pytest.mark.parametrize("case", ["fused", "empty", "bfloat16", "channels_last"])
def test_same_bits(case, backend, device):
    """By the operator, without gradients, and with those of weight and bias alone."""
    shard = Batch.of(CASES[case], device).shard(dist.get_rank())
    results = shard.results(shard.synchronized)
    by_operator = shard.results(lambda *args, **tensors: torch.ops.normops.sync_batch_norm(*args, **tensors, **shard.options()))
    for name, value in by_operator.items():
        exactly = {} if name.startswith("running") else {"rtol": 0, "atol": 0}  # traced, they are updated by torch's operators
        torch.testing.assert_close(value, results[name], **exactly)
    x, others = shard.tensors["input"], {name: value for name, value in shard.tensors.items() if name != "input"}
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            running = tuple(value.clone() for value in shard.running)
            assert torch.equal(shard.synchronized(x, *running, **others), results["y"])
            assert torch.equal(running[0], results["running_mean"]) and torch.equal(running[1], results["running_var"])
    leaves = {name: value.detach().requires_grad_() for name, value in others.items()}
    shard.synchronized(x, *shard.running, **leaves).backward(shard.dy)
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, results[f"d{name}"])


@on_workers
def test_no_sample_anywhere(backend, device):
    """Nothing to learn from: statistics stay as they are, gradients are zero."""
    module = SyncBatchNorm(4).to(device)
    x = torch.zeros(0, 4, 3, 2, device=device, requires_grad=True)
    y = module(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    assert torch.equal(module.running_mean, torch.zeros(4, device=device)) and torch.equal(module.running_var, torch.ones(4, device=device))
    assert not module.weight.grad.any() and not module.bias.grad.any()


@on_workers
def test_single_value(backend, device):
    """One value per channel, on one worker: as in torch, the variance is zero."""
    module = SyncBatchNorm(3, momentum=1.0).to(device)
    nn.init.normal_(module.bias)
    x = torch.full((int(dist.get_rank() == 1), 3), 7.0, device=device)
    assert torch.equal(module(x), module.bias.expand_as(x))
    assert torch.equal(module.running_mean, torch.full((3,), 7.0, device=device)) and not module.running_var.any()


@on_workers
def test_constant_channel(backend, device):
    """Gives exactly bias; NaN and inf spoil their own channel, on all workers."""
    module = SyncBatchNorm(4).to(device)
    nn.init.normal_(module.bias)
    x = torch.randn(1 + dist.get_rank(), 4, 5, device=device)
    x[:, 1] = 12345.678
    if dist.get_rank() == 1:
        x[0, 2, 0] = float("nan")
        x[0, 3, 0] = float("inf")
    y = module(x)
    assert torch.equal(y[:, 1], module.bias[1].expand_as(y[:, 1]))
    assert y[:, 0].isfinite().all() and y[:, 2:].isnan().all()
    assert module.running_mean.isfinite().tolist() == module.running_var.isfinite().tolist() == [True, True, False, False]


@on_workers
def test_evaluation(backend, device):
    """By the running statistics, each worker for itself."""
    module = SyncBatchNorm(5, activation="silu", dtype=torch.float64).to(device).eval()
    nn.init.normal_(module.running_mean)
    x = torch.randn(dist.get_rank(), 5, 3, dtype=torch.float64, device=device)
    if dist.get_rank() == 2:  # the others are not even called
        want = F.silu(F.batch_norm(x, module.running_mean, module.running_var, module.weight, module.bias))
        torch.testing.assert_close(module(x), want)


@cache
def group_of(*ranks: int) -> dist.ProcessGroup | None:
    """A process group of some workers; every worker must ask for it."""
    return dist.new_group(ranks)


@on_workers
def test_process_group(backend, device):
    """Statistics of the group's workers only; a group of one is batch norm, without a collective."""
    batch, rank = Batch.of(CASES["uneven"], device), dist.get_rank()
    pair, single = group_of(0, 2), group_of(1)
    shard = batch.shard(rank)
    x = shard.tensors["input"].detach().requires_grad_()
    group = single if rank == 1 else pair
    module = SyncBatchNorm(5, process_group=group, dtype=torch.float64).to(device)
    other = normops.nn.BatchNorm2d(5, dtype=torch.float64).to(device)
    start, world = collectives(group), collectives()
    y = module(x)
    (dx,) = torch.autograd.grad(y, x, shard.dy)
    assert collectives(group) == start + (0 if rank == 1 else 2) and collectives() == world
    parts = [rank] if rank == 1 else [0, 2]
    whole = torch.cat([batch.shard(part).tensors["input"] for part in parts]).requires_grad_()
    (want,) = torch.autograd.grad(other(whole), whole, torch.cat([batch.shard(part).dy for part in parts]))
    mine = slice(whole.shape[0] - x.shape[0], None) if rank == 2 else slice(0, x.shape[0])
    exactly = {"rtol": 0, "atol": 0} if rank == 1 else {}
    torch.testing.assert_close(y, other(whole)[mine], **exactly)
    torch.testing.assert_close(dx, want[mine], **exactly)
    assert torch.equal(module.num_batches_tracked, torch.tensor(1, device=device))


# ---- with DistributedDataParallel, against torch's own batch norm on one process ----


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 2, bias=False), nn.BatchNorm2d(5), nn.SiLU(), nn.Flatten(),
        nn.Linear(45, 4), nn.BatchNorm1d(4), nn.Linear(4, 3),
    ).double()  # fmt: skip


def networks(**options) -> tuple[nn.Module, nn.Module]:
    """One for one process, and the same of all workers."""
    one = network()
    return one, DistributedDataParallel(convert_sync_batchnorm(copy.deepcopy(one)), **options)


def batches(count: int, sizes: tuple[int, ...]) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Images and labels, and this worker's part of them."""
    found = []
    for _ in range(count):
        x, target = torch.randn(sum(sizes), 2, 6, 6, dtype=torch.float64), torch.randint(3, (sum(sizes),))
        x += torch.arange(len(x)).view(-1, 1, 1, 1)  # the workers' means differ
        found.append((x, target, x.split(sizes)[dist.get_rank()], target.split(sizes)[dist.get_rank()]))
    return found


def local_loss(y: Tensor, target: Tensor, total: int) -> Tensor:
    """The part of the whole batch's mean loss that DistributedDataParallel, which averages over workers, makes the whole of: n_i R/N times the
    local mean, also where there is no sample."""
    return F.cross_entropy(y, target, reduction="sum") * dist.get_world_size() / total


def same_network(ours: nn.Module, one: nn.Module, gradients: bool = False) -> None:
    mine, theirs = ours.module.state_dict(), one.state_dict()
    assert mine.keys() == theirs.keys()
    same_everywhere(*mine.values())
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)
    if gradients:
        for a, b in zip(ours.parameters(), one.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-11)


@on_workers
@pytest.mark.parametrize("sizes", [(5, 3, 2), (4, 0, 6)], ids=str)
def test_training(sizes):
    """Several steps on uneven shards give one process's weights and running statistics."""
    one, ours = networks()
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9) for net in (one, ours)]
    for x, target, my_x, my_target in batches(4, sizes):
        for optimizer in optimizers:
            optimizer.zero_grad()
        F.cross_entropy(one(x), target).backward()
        local_loss(ours(my_x), my_target, len(x)).backward()
        for optimizer in optimizers:
            optimizer.step()
    same_network(ours, one)


@on_workers
@pytest.mark.parametrize("broadcast_buffers", [True, False])
def test_two_forwards_before_one_backward(broadcast_buffers):
    one, ours = networks(broadcast_buffers=broadcast_buffers)
    losses, mine = [], []
    for x, target, my_x, my_target in batches(2, (5, 0, 3)):
        losses.append(F.cross_entropy(one(x), target))
        mine.append(local_loss(ours(my_x), my_target, len(x)))
    sum(losses).backward()
    sum(mine).backward()
    same_network(ours, one, gradients=True)


class Checkpointed(nn.Module):
    def __init__(self, body: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.body, self.use_reentrant = body, use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=self.use_reentrant)


@on_workers
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(use_reentrant):
    """Collectives meet in the recomputation too; the running statistics take their batch once."""
    one = network()
    ours = copy.deepcopy(one)
    ours = convert_sync_batchnorm(nn.Sequential(*ours[:1], *(Checkpointed(part, use_reentrant) for part in (ours[1:5], ours[5:9])), *ours[9:]))
    ours = DistributedDataParallel(ours)
    for x, target, my_x, my_target in batches(2, (5, 0, 3)):
        one.zero_grad()
        ours.zero_grad()
        F.cross_entropy(one(x), target).backward()
        start = collectives()
        y = ours(my_x)
        forward = collectives() - start
        local_loss(y, my_target, len(x)).backward()
    norms = [[module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)] for net in (ours, one)]
    for mine, theirs in zip(*norms, strict=True):
        torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), rtol=1e-9, atol=1e-11)
        same_everywhere(*mine.state_dict().values())
    for a, b in zip(ours.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-11)
    assert forward >= 3, "each norm's own"


@on_workers
def test_convert():
    """torch's and our norms become synchronized, with the same parameters and options; others are left alone."""
    mine = normops.nn.BatchNorm2d(3, eps=0.1, momentum=None, activation="relu")
    model = nn.Sequential(
        nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3, affine=False), mine, nn.SyncBatchNorm(3), nn.Flatten(), nn.BatchNorm1d(12, track_running_stats=False),
        normops.nn.BatchRenorm1d(12),
    )  # fmt: skip
    before, state = [id(value) for value in (*model.parameters(), *model.buffers())], copy.deepcopy(model.state_dict())
    group = group_of(0, 2)
    for process_group in (group, None):
        assert SyncBatchNorm.convert_sync_batchnorm(model, process_group) is model
        assert [type(model[i]) is SyncBatchNorm for i in range(7)] == [False, True, True, True, False, True, False]
        assert all(model[i].process_group is process_group for i in (1, 2, 3, 5))
    assert [id(value) for value in (*model.parameters(), *model.buffers())] == before
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert (mine.eps, mine.momentum, mine.activation) == (0.1, None, "relu")
    ours = DistributedDataParallel(model)  # torch's own it refuses on CPUs
    ours(torch.randn(2 + dist.get_rank(), 2, 2, 2)).sum().backward()
    same_everywhere(*model[:6].state_dict().values())


class Branches(nn.Module):
    """Norms that could be computed in any order. What they cost in memory, by which a compiler chooses, depends on the batch."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        widths = range(3, 6)
        self.inputs = nn.ModuleList(nn.Linear(8, width) for width in widths)
        self.norms = nn.ModuleList(SyncBatchNorm(width, process_group=group) for width in widths)
        self.outputs = nn.ModuleList(nn.Linear(width, 4 if width % 2 else 64) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        parts = zip(self.inputs, self.norms, self.outputs, strict=True)
        return sum(last(norm(first(x))).relu().sum(1) for first, norm, last in parts)


@on_workers
def test_compiled():
    """One graph, eager's results, as many collectives in one order, in training and evaluation. On two workers only: it takes seconds."""
    group, rank = group_of(0, 2), dist.get_rank()
    if rank == 1:
        return
    nets = Branches(group).double(), Branches(group).double()
    nets[1].load_state_dict(nets[0].state_dict())
    compiled = torch.compile(nets[1], fullgraph=True, dynamic=False)
    x = torch.randn(1000 if rank else 2, 8, dtype=torch.float64) + rank
    results = []
    torch._inductor.config.fx_graph_cache = torch._functorch.config.enable_autograd_cache = False  # they know our operators by name only
    for function, net in zip((nets[0], compiled), nets, strict=True):
        leaf, start = x.clone().requires_grad_(), collectives(group)
        y = function(leaf)
        y.square().sum().backward()
        assert collectives(group) == start + 6
        results.append([y.detach(), leaf.grad, *(value.grad for value in net.parameters()), *net.buffers()])
    torch.testing.assert_close(results[1], results[0])
    for net in nets:
        net.eval()
    with torch.no_grad():
        start = collectives(group)
        torch.testing.assert_close(compiled(x), nets[0](x))
        assert collectives(group) == start


@on_workers
def test_what_it_cannot():
    """torch.func transforms, and third derivatives."""
    x = torch.randn(3, 4, 5)
    for transform in (torch.func.grad, lambda f: torch.func.vmap(lambda x: f(x.unsqueeze(0)))):
        with pytest.raises(NotImplementedError, match="sync_batch_norm"):
            transform(lambda x: normops.sync_batch_norm(x, None, None, training=True).sum())(x)
    leaf = x.requires_grad_()
    (dx,) = torch.autograd.grad(normops.sync_batch_norm(leaf, None, None, training=True).pow(3).sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="sync_batch_norm"):
        torch.autograd.grad(dx.pow(3).sum(), leaf, create_graph=True)


# ---- what goes wrong ----


@on_workers
def test_worker_that_does_not_call():
    """The others wait as long as their process group says."""
    dist.barrier()
    group = dist.new_group(timeout=timedelta(seconds=3))
    if dist.get_rank() != 1:
        start = time.monotonic()
        with pytest.raises(RuntimeError, match="[Tt]imed out"):
            normops.sync_batch_norm(torch.randn(2, 3, 4), None, None, training=True, process_group=group.group_name)
        assert time.monotonic() - start < workers.TIMEOUT / 2
    dist.barrier()


@on_workers
def dies():
    x = torch.randn(2, 3, 4, requires_grad=True)
    y = normops.sync_batch_norm(x, None, None, training=True)
    if dist.get_rank() == 1:
        os._exit(1)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="by peer"):  # closed or reset
        y.sum().backward()
    assert time.monotonic() - start < workers.TIMEOUT / 2


def test_worker_that_dies():
    """Between forward and backward: the others get an error at once."""
    pair = Workers(2)
    try:
        assert pair.run(dies, {}) == [None, "died"]
    finally:
        pair.close()


def test_without_torch_distributed(backend, device):
    """It is batch norm, in bits."""
    whole = Batch.of(CASES["fused"], device)
    torch.testing.assert_close(whole.results(whole.synchronized), whole.results(whole.one_process), rtol=0, atol=0)
    with pytest.raises(ValueError, match="sync_batch_norm: expected more than 1 value per channel in training"):
        normops.sync_batch_norm(torch.randn(1, 3, device=device), None, None, training=True)
