"""What shows only on a GPU: accesses beside a tensor, the order of sums, graphs, streams, devices, compiled training steps.

Every body runs for every norm and the operators of propagated statistics, forward and backward, on every backend of CUDA tensors. Values are held to
an oracle elsewhere; here to the bits of another run.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from cases import ADAPTIVE, KINDS, Inputs, case_of, grid
from norms import NORMS, leaves, over_norms
from torch import Tensor

import normops
from normops import nn

ONLY = "cuda"  # for conftest.py
if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)


@dataclass
class Step:
    """A call and its gradients."""

    given: list[Tensor]  # what it reads, also if that is changed in place
    run: Callable[[], list[Tensor]]  # all that it computes


def of_norm(kind: str, shape: tuple[int, ...], device: str, function: Callable | None = None) -> Step:
    inputs = Inputs.of(case_of(kind, "", shape, residual="adaptive" not in kind, activation="silu"), device)
    case = inputs.case
    tensors = {name: value.to(device) for name, value in case.options().items() if isinstance(value, Tensor)}

    def call(*args, **options):
        return (function or getattr(normops, case.norm))(*args, **options | tensors)

    def run():
        result = inputs.run(call)
        return [result.y, *leaves(() if result.total is None else result.total), *result.gradients.values(), *result.running.values()]

    return Step([*inputs.tensors.values(), inputs.dy, *leaves(() if inputs.dtotal is None else inputs.dtotal), *inputs.running], run)


def of_call(call: Callable, *values: Tensor) -> Step:
    """Of half the sum of squares of its results."""

    def run():
        inputs = [value.detach().requires_grad_() for value in values]
        results = leaves(call(*inputs))
        found = [result.detach() for result in results]
        return [*found, *torch.autograd.grad(results, inputs, found)]

    return Step(list(values), run)


def of_moments(shape, device):
    """A closed form, one with kinks and an integral."""
    mean, var = torch.randn(2, *shape[:2], dtype=torch.float64, device=device)
    names = "relu", "hardswish", "silu"
    return of_call(lambda mean, var: sum((normops.activation_moments(mean, var, name) for name in names), ()), mean, var.square() + 0.1)


def of_weight(shape, device):
    sizes = (2 * shape[0], *shape[1:]), (2, 2 * shape[1]), (2, 2 * shape[0])
    weight, (mean, var), (scale, bias) = (torch.randn(size, device=device) for size in sizes)
    return of_call(partial(normops.analytic_norm_weight, groups=2), weight, mean, var.square() + 0.1, scale, bias)


def of_analytic_norm(shape, device):
    x, vectors = torch.randn(shape, device=device), torch.randn(4, shape[1], device=device)
    return of_call(partial(normops.analytic_norm, activation="silu"), x, vectors[0], vectors[1].square() + 0.1, *vectors[2:])


STEPS = {
    **{kind: partial(of_norm, kind) for kind in (*KINDS, *ADAPTIVE)},
    "sync_batch_norm": partial(of_norm, "batch_norm", function=normops.sync_batch_norm),  # of one worker
    "activation_moments": of_moments,
    "analytic_norm_weight": of_weight,
    "analytic_norm": of_analytic_norm,
}
SMALL = {"odd": (3, 10, 7, 3), "long": (1, 4, 131, 131), "samples": (520, 6, 5, 5), "S1": (5, 32, 1, 1)}
REGIMES = {  # on an H200: what one program holds; tiles; samples together; programs that loop; 70 MB, in waves of samples
    "held": (8, 64, 16, 16), "odd": (4, 34, 15, 17), "S1": (300, 256, 1, 1), "split": (2, 32, 256, 256), "samples": (600, 64, 7, 7),
    "channels": (3, 8200, 6), "large": (140, 8, 128, 130), "waves": (12, 16, 301, 300),
}  # fmt: skip


def same(got: list[Tensor], want: list[Tensor], when: str = "") -> None:
    assert [torch.equal(mine, other) for mine, other in zip(got, want, strict=True)] == [True] * len(want), when


@grid(STEPS, **SMALL)
def test_every_op(kind, shape, backend, device):
    """Small enough for compute-sanitizer, and every way to compute."""
    assert all(result.isfinite().all() for result in STEPS[kind](shape, device).run())


@grid(STEPS, **REGIMES)
def test_hundred_runs(kind, shape, backend, device):
    """The same bits, also while another stream keeps the device busy, so that programs come and go in other orders."""
    step, other = STEPS[kind](shape, device), torch.cuda.Stream()
    noise = torch.randn(4096, 1024, device=device)
    other.wait_stream(torch.cuda.current_stream())
    first = step.run()
    for i in range(99):
        with torch.cuda.stream(other):
            noise = noise.cos()
        same(step.run(), first, f"run {i + 2}")
    torch.cuda.synchronize()


# ---- graphs ----


def captured(run: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A graph of `run` and the results that it writes; kernels are compiled before, on a stream aside, as torch wants it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


@grid(STEPS, **REGIMES)
def test_graphs(kind, shape, backend, device):
    """Two graphs in turns, with other values in their inputs each time, give eager's bits."""
    if backend == "reference" and kind == "activation_moments":
        pytest.skip("the reference asks for the largest variance, and so waits for the device")
    steps = [STEPS[kind](shape, device) for _ in range(2)]
    graphs = [captured(step.run) for step in steps]
    for _ in range(3):
        for step, (graph, results) in zip(steps, graphs, strict=True):
            for value in step.given:
                value.mul_(0.75)
            graph.replay()
            same(results, step.run())


MODULES = {
    "BatchNorm2d": nn.BatchNorm2d,
    "SyncBatchNorm": nn.SyncBatchNorm,
    "BatchRenorm2d": partial(nn.BatchRenorm2d, schedule=nn.RenormSchedule(start=0, r_end=4, d_end=4)),
    "BatchInstanceNorm2d": nn.BatchInstanceNorm2d,
    "InstanceNorm2d": partial(nn.InstanceNorm2d, affine=True, track_running_stats=True),
}


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_running_statistics_advance_once_a_replay(make, backend, device):
    module = make(6).to(device)
    eager, start = copy.deepcopy(module), copy.deepcopy(module.state_dict())
    x = torch.randn(4, 6, 9, 8, device=device) * 2 + 1

    def run(module):
        y = module(x)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), list(module.parameters()))]

    graph, results = captured(partial(run, module))
    module.load_state_dict(start)
    for _ in range(3):
        x.add_(0.5)
        graph.replay()
        same(results, run(eager))
        same(list(module.state_dict().values()), list(eager.state_dict().values()))
    assert not torch.equal(module.running_mean, start["running_mean"])


# ---- streams and devices ----


@grid(STEPS, **REGIMES)
def test_two_streams(kind, shape, backend, device):
    """Two calls at once, each on a stream of its own, also when they are the first of this shape."""
    streams, steps = [torch.cuda.Stream() for _ in range(2)], [STEPS[kind](shape, device) for _ in range(2)]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10**7)  # cycles: until everything is in both queues
    found = []
    for _ in range(3):
        for stream, step in zip(streams, steps, strict=True):
            with torch.cuda.stream(stream):
                found.append(step.run())
    for stream in streams:
        torch.cuda.current_stream().wait_stream(stream)
    alone = [step.run() for step in steps]
    for i, results in enumerate(found):
        same(results, alone[i % 2], f"call {i // 2 + 1} on stream {i % 2 + 1}")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
@grid(STEPS, **SMALL)
def test_another_device(kind, shape, backend):
    """Tensors of a device that is not the current one are worked on there."""
    step = STEPS[kind](shape, "cuda:1")
    results = step.run()
    assert torch.cuda.current_device() == 0 and all(result.device == torch.device("cuda:1") for result in results)
    with torch.cuda.device(1):
        same(results, step.run())


# ---- autocast, compilers ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@over_norms()
def test_autocast(norm, dtype, backend, device):
    """The result is what `out_dtype` gives, or x's dtype: the same kernels."""
    x, *others = norm.tensors((3, 9, 8), dtype=dtype, device=device)
    with torch.autocast("cuda", dtype):
        results = leaves(norm(x, *others))
    same(results, leaves(norm(x, *others, out_dtype=results[0].dtype)))
    assert results[0].dtype == (dtype if any(name in norm.function.__name__ for name in ("instance", "batch")) else torch.float32)


class Everything(torch.nn.Module):
    """Every norm, modules with running statistics, propagated statistics, between ops of torch."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.inputs = [norm.tensors((3, 9, 8), device=device, requires_grad=False)[0] for norm in NORMS.values()]
        vectors = [norm.tensors((3, 9, 8), device=device)[1:] for norm in NORMS.values()]
        self.others = torch.nn.ModuleList(torch.nn.ParameterList(value.detach() for value in values) for values in vectors)
        self.tracked = torch.nn.ModuleList(make(6).to(device, torch.float64) for make in MODULES.values())
        self.linear = torch.nn.Linear(6, 4).to(device, torch.float64)

    def forward(self, gain: Tensor) -> Tensor:
        loss = gain.square()
        for norm, x, others in zip(NORMS.values(), self.inputs, self.others, strict=True):
            loss = loss + sum((result * 2).cos().mean() for result in leaves(norm(x * gain, *others)))
        for module in self.tracked:
            loss = loss + module(self.inputs[0] * gain).sin().mean()
        mean, var = normops.activation_moments(self.linear.bias, self.linear.bias.square() + gain.square(), "silu")
        weight, bias, *_ = normops.analytic_norm_weight(self.linear.weight.mT.contiguous(), mean, var)
        return loss + weight.square().mean() + bias.cos().mean()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_training(mode, backend, device):
    """Steps of gradient descent as one graph forward and one backward, by graphs of CUDA where they are asked for, go where eager's go."""
    eager = Everything(device)
    other = copy.deepcopy(eager)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        compiled = torch.compile(other, fullgraph=True, mode=mode)
        losses = []
        for model, call in ((eager, eager), (other, compiled)):
            optimizer, gain = torch.optim.SGD(model.parameters(), 0.1), torch.ones((), dtype=torch.float64, device=device)
            for _ in range(5):
                torch.compiler.cudagraph_mark_step_begin()
                optimizer.zero_grad()
                loss = call(gain)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
    assert losses[4] < losses[0] and not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    # float64: only the order of roundings differs, where inductor fuses
    torch.testing.assert_close(losses[5:], losses[:5], rtol=1e-10, atol=0)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
