"""torch.compile and torch.export: one graph of our ops, eager's bits, no recompilation; running statistics mutated in place."""

import io
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS
from norms import IMAGE_LAYOUTS, NORMS, compare, cotangents, leaves, over_layouts, over_norms, with_gradients
from torch._dynamo.testing import CompileCounterWithBackend

import normops
from normops import nn

BUFFERS = ("running_mean", "running_var")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@over_layouts()
def test_aot_eager(norm, layout, backend, device):
    """One graph, forward and backward, bitwise the eager result and strides."""
    values = norm.tensors(layout=layout, dtype=torch.float32, device=device)
    dys = cotangents(norm, values, layout)
    results, gradients = with_gradients(torch.compile(norm, fullgraph=True, backend="aot_eager"), values, dys)
    want, expected = with_gradients(norm, values, dys)
    compare(gradients, expected)
    for mine, eager in zip((*results, gradients[0]), (*want, expected[0]), strict=True):
        assert torch.equal(mine, eager) and mine.stride() == eager.stride()


def graphs_of(f, values):
    """The nodes of the forward and of the backward graph that AOTAutograd makes of `f`."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func

    found = []

    def keep(graph, _):
        found.append([node for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph.forward)

    results = leaves(torch.compile(f, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))(*values))
    wanted = [value for value in values if value.requires_grad]
    if wanted:
        torch.autograd.grad(results, wanted, [torch.randn_like(result) for result in results])
    return found


def ours(nodes):
    return [node.target for node in nodes if getattr(node.target, "namespace", "") == "normops"]


def copied(nodes):
    """The sizes of what is copied."""
    names = {"aten.clone.default", "aten._to_copy.default", "aten.copy.default"}
    return {node.meta["val"].numel() for node in nodes if str(node.target) in names}


@over_norms()
def test_graphs_hold_the_ops(norm):
    """What inductor sees: one op forward, one backward, no copy of large tensors."""
    values = norm.tensors(dtype=torch.float32)
    forward, backward = graphs_of(norm, values)
    adaptive = "style" in norm.others  # the moments of style, whose backward is a norm with given statistics
    assert ours(forward) == [torch.ops.normops.group_norm_stats.default] * adaptive + [norm.fwd]
    assert ours(backward) == [norm.bwd] + [norm.fwd] * adaptive
    assert values[0].numel() not in copied(forward + backward)


def test_inductor_dynamic():
    """Inductor with dynamic=True over three shapes, norms and layouts in one graph: one compilation, same values and strides, gradients too."""
    names = ("group_norm", "instance_norm_tracked", "instance_norm_frozen", "layer_norm_dim1", "add_rms_norm", "adaptive_instance_norm")
    calls = [(NORMS[name], IMAGE_LAYOUTS[i % 2]) for i, name in enumerate(names)]

    def everything(*values):
        values, results = iter(values), []
        for norm, _ in calls:
            results += [result * 2 for result in leaves(norm(*itertools.islice(values, 1 + len(norm.others))))]
        return tuple(results)

    counter = CompileCounterWithBackend("inductor")
    compiled, counts = torch.compile(everything, fullgraph=True, dynamic=True, backend=counter), []
    for sizes in ((2, 5, 4), (3, 7, 9), (4, 11, 3)):
        values, dys = [], []
        for norm, layout in calls:
            own = norm.tensors(sizes, layout=layout, dtype=torch.float32, device=DEVICE)
            values, dys = values + own, dys + cotangents(norm, own, layout)
        results, gradients = with_gradients(compiled, values, dys)
        want, expected = with_gradients(everything, values, dys)
        compare(results, want)
        assert [result.stride() for result in results] == [result.stride() for result in want]
        compare(gradients, expected)
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1], "no recompilation"


@over_norms()
def test_dynamic_sizes_that_meet(norm):
    """N = C and S = C are no special cases of a dynamic graph: checks of (C,) and (N, C) compare ranks before sizes."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled, counts = torch.compile(norm, fullgraph=True, dynamic=True, backend=counter), []
    for sizes in ((2, 5, 4), (3, 7, 9), (6, 7, 3), (6, 6, 6)):
        values = norm.tensors(sizes, requires_grad=False)
        compare(leaves(compiled(*values)), leaves(norm.theirs(*values)))
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1], "no recompilation"


def test_inductor_inference():
    """Under no_grad, in modules, next to ops that inductor fuses."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3), nn.GroupNorm(3, 6, activation="silu"), torch.nn.Conv2d(6, 6, 1), nn.InstanceNorm2d(6, track_running_stats=True),
        nn.LayerNorm2d(6), torch.nn.Conv2d(6, 2, 1), nn.RMSNorm(6),
    ).to(DEVICE).eval()  # fmt: skip
    x = torch.randn(2, 3, 9, 8, device=DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=2e-5, atol=2e-5)


@over_norms("group_norm", "instance_norm", "layer_norm", "rms_norm_dim1", "add_rms_norm", "adaptive_instance_norm")
def test_compiled_options(norm):
    """Options are constants of the graph: another activation is another graph, not the first one's result."""
    compiled = torch.compile(lambda values, name: norm(*values, activation=name), fullgraph=True, backend="aot_eager")
    values = norm.tensors(requires_grad=False)
    for name in ("none", "relu", "gelu"):
        assert all(map(torch.equal, leaves(compiled(values, name)), leaves(norm(*values, activation=name))))


@over_norms("group_norm", "instance_norm_frozen", "rms_norm", "add_layer_norm")
def test_compiled_double_backward_is_refused_or_right(norm):
    """AOTAutograd supports no double backward: it must say so, not drop gradients."""
    values = norm.tensors()
    y = leaves(torch.compile(norm, fullgraph=True, backend="aot_eager")(*values))[0]
    (dx,) = torch.autograd.grad(y.square().sum(), values[0], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        dx.square().sum().backward()


@over_norms()
def test_compiled_func_grad(norm):
    """torch.func inside of compile: the differentiable reference is traced."""
    values = norm.tensors(requires_grad=False)

    def loss(call):
        return lambda *values: sum(result.sin().sum() for result in leaves(call(*values)))

    got = torch.compile(torch.func.grad(loss(norm), (0, 1)), fullgraph=True, backend="aot_eager")(*values)
    compare(got, torch.func.grad(loss(norm.theirs), (0, 1))(*values))


def test_compiled_autograd():
    """The backward that compiled autograd traces."""
    model = torch.nn.Sequential(
        torch.nn.Conv1d(6, 6, 1), nn.GroupNorm(3, 6, activation="silu"), nn.InstanceNorm1d(6, affine=True), nn.LayerNorm2d(6), nn.RMSNorm(4),
    )  # fmt: skip
    x = torch.randn(2, 6, 4)
    model(x).square().sum().backward()
    want = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        model(x).square().sum().backward()
    compare([parameter.grad for parameter in model.parameters()], want)


def test_fresh_process():
    """The first call of a process may be under compile, with nothing warmed up."""
    program = """
import torch, normops
f = torch.compile(lambda x, w: normops.rms_norm(normops.instance_norm(x, weight=w, activation="silu"), 4), fullgraph=True, backend="aot_eager")
x, w = torch.randn(2, 6, 4, requires_grad=True), torch.randn(6, requires_grad=True)
y = f(x, w)
y.sum().backward()
torch.testing.assert_close(y, torch.nn.functional.rms_norm(torch.nn.functional.silu(torch.nn.functional.instance_norm(x, weight=w)), (4,)))
assert w.grad is not None
print("fine")
"""
    root = str(Path(__file__).parent.parent)
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and done.stdout.endswith("fine\n"), done.stderr


# ---- running statistics ----


def tracking(kind=nn.InstanceNorm2d, device="cpu", **options):
    return kind(6, affine=True, track_running_stats=True, **options).to(device)


def statistics(module):
    return [getattr(module, name) for name in BUFFERS]


@pytest.mark.parametrize("layout", IMAGE_LAYOUTS)
def test_running_statistics(layout, backend, device):
    """Compiled training steps update the module's own buffers, bitwise as eager's; the outputs and gradients are eager's too."""
    eager, other = tracking(device=device, activation="leaky_relu"), tracking(device=device, activation="leaky_relu")
    addresses = [value.data_ptr() for value in statistics(other)]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(other, fullgraph=True, backend=counter)
    for _ in range(3):
        x = LAYOUTS[layout](torch.randn(2, 6, 5, 4, device=device)).requires_grad_()
        y, want = compiled(x), eager(x)
        assert torch.equal(y, want) and y.stride() == want.stride()
        assert torch.equal(*(torch.autograd.grad(result.square().sum(), x)[0] for result in (y, want)))
    assert all(map(torch.equal, statistics(other), statistics(eager)))
    assert [value.data_ptr() for value in statistics(other)] == addresses
    assert counter.frame_count == 1
    before = [value.clone() for value in statistics(other)]
    assert torch.equal(compiled.eval()(x), eager.eval()(x)), "the same module, told to evaluate"
    assert all(map(torch.equal, statistics(other), before))


@pytest.mark.parametrize("training", [True, False])
def test_running_statistics_graph(training):
    """One op forward, one backward, and arithmetic on vectors between."""
    module = tracking().train(training)

    def f(x, mean, var, weight):
        return normops.instance_norm(x, mean, var, weight, use_input_stats=training, activation="silu")

    x, weight = torch.randn(2, 6, 5, 4, requires_grad=True), torch.randn(6, requires_grad=True)
    forward, backward = graphs_of(f, [x, *statistics(module), weight])
    assert ours(forward) == [NORMS["instance_norm"].fwd] and ours(backward) == [NORMS["instance_norm"].bwd]
    assert x.numel() not in copied(forward + backward)
    assert torch.ops.aten.clone.default not in {node.target for node in forward}, "the buffers themselves"


def test_inductor_running_statistics():
    eager, other = tracking(device=DEVICE), tracking(device=DEVICE)
    compiled = torch.compile(lambda x: other(x * 2) + 1, fullgraph=True, dynamic=True)
    for size in (3, 4, 7):
        x = torch.randn(2, 6, size, 5, device=DEVICE)
        torch.testing.assert_close(compiled(x), eager(x * 2) + 1)
    compare(statistics(other), statistics(eager))


# ---- export ----


def image(samples, device="cpu"):
    return torch.randn(samples, 6, 5, 4, device=device)


MODULES = {
    "group_norm": lambda: nn.GroupNorm(3, 6, activation="gelu"),
    "instance_norm": lambda: nn.InstanceNorm2d(6, affine=True, activation="gelu"),
    "instance_norm_training": lambda: tracking(activation="gelu"),
    "instance_norm_eval": lambda: tracking(activation="gelu").eval(),
    "layer_norm": lambda: nn.LayerNorm((5, 4), activation="gelu"),
    "rms_norm": lambda: nn.RMSNorm(4, activation="gelu"),
    "layer_norm_2d": lambda: nn.LayerNorm2d(6, activation="gelu"),
    "rms_norm_2d": lambda: nn.RMSNorm2d(6, activation="gelu"),
}


class Model(torch.nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm
        for parameter in norm.parameters():
            torch.nn.init.normal_(parameter)

    def forward(self, x, residual):
        return self.norm(x, residual=residual) + 1


def reloaded(program):
    """A module of the exported program as another process would read it, with parameters and buffers of its own."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return torch.export.load(buffer).module()


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_export(make, strict):
    """A dynamic batch, decompositions, and a file: same values, gradients and running statistics."""
    model = Model(make()).to(DEVICE)
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(model, (image(2, DEVICE), image(2, DEVICE)), dynamic_shapes=({0: batch},) * 2, strict=strict)
    lowered = exported.run_decompositions()
    assert [len(ours(program.graph.nodes)) for program in (exported, lowered)] == [1, 1], "one operator, however it is composed"
    trainable, inference = reloaded(exported), reloaded(lowered)
    for samples in (2, 5):
        values = [image(samples, DEVICE).requires_grad_() for _ in range(2)]
        y, got = model(*values), trainable(*values)
        torch.testing.assert_close(got, y)
        torch.testing.assert_close(inference(*values), y)
        dy = torch.randn_like(y)
        compare(torch.autograd.grad(got, values, dy), torch.autograd.grad(y, values, dy))
    for program in (trainable, inference):
        for name in set(BUFFERS) & dict(model.norm.named_buffers()).keys():
            torch.testing.assert_close(program.state_dict()[f"norm.{name}"], getattr(model.norm, name))


def test_functional_inside():
    """Calls of the functions with everything fused, next to torch's own ops: one graph."""

    def f(x, style, scale):
        y = normops.adaptive_instance_norm(x, style, activation="relu")
        y, total = normops.add_layer_norm(F.gelu(y), x, (5, 4), scale=scale)
        return normops.rms_norm(y, 6, dim=1) + total

    values = image(2), image(2), torch.randn(2, 5, 4)
    torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(*values), f(*values))
