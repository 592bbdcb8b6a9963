"""torch.compile and torch.export: one graph of our ops, eager's bits, no recompilation; running statistics mutated in place."""

import io
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS
from norms import IMAGE_LAYOUTS, NORMS, compare, cotangents, leaves, over_layouts, over_norms, with_gradients
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from torch.utils.checkpoint import checkpoint

import normops
from normops import nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def fresh_compiler():
    """No graph of an earlier test, nor of an earlier normops: the caches on disk know our operators by name only."""
    torch._dynamo.reset()
    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
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
    one_kernel = norm.function is not normops.batch_instance_norm  # whose composition of operators has one backward more than the eager call
    for mine, eager in zip((*results, gradients[0]), (*want, expected[0]), strict=True):
        assert (torch.equal(mine, eager) or not one_kernel) and mine.stride() == eager.stride()


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
    """What inductor sees: one op forward, one backward, beside what gives statistics; no copy of large tensors."""
    values = norm.tensors(dtype=torch.float32)
    forward, backward = graphs_of(norm, values)
    assert ours(forward) == norm.forward_ops
    assert ours(backward) == norm.backward_ops
    assert values[0].numel() not in copied(forward + backward)


def test_inductor_dynamic():
    """Inductor with dynamic=True over three shapes, norms and layouts in one graph: one compilation, same values and strides, gradients too."""
    names = (
        "group_norm", "instance_norm_tracked", "batch_norm_eval", "batch_norm", "layer_norm_dim1", "add_rms_norm", "adaptive_instance_norm",
    )  # fmt: skip
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


@over_norms("group_norm", "instance_norm", "batch_norm", "layer_norm", "rms_norm_dim1", "add_rms_norm", "adaptive_instance_norm")
def test_compiled_options(norm):
    """Options are constants of the graph: another activation is another graph, not the first one's result."""
    compiled = torch.compile(lambda values, name: norm(*values, activation=name), fullgraph=True, backend="aot_eager")
    values = norm.tensors(requires_grad=False)
    for name in ("none", "relu", "gelu"):
        assert all(map(torch.equal, leaves(compiled(values, name)), leaves(norm(*values, activation=name))))


@over_norms("group_norm", "instance_norm_frozen", "batch_norm", "batch_instance_norm", "rms_norm", "add_layer_norm")
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
        torch.nn.Conv1d(6, 6, 1), nn.GroupNorm(3, 6, activation="silu"), nn.InstanceNorm1d(6, affine=True), nn.BatchNorm1d(6),
        nn.LayerNorm2d(6), nn.RMSNorm(4),
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
    tracked = {"affine": True, "track_running_stats": True} if kind is nn.InstanceNorm2d else {}
    return kind(6, **tracked, **options).to(device)


def renorm(features, **options):
    """Bounds that let some channels through."""
    return nn.BatchRenorm2d(features, schedule=lambda step: (1.0 + 0.1 * step, 0.1 * step), momentum=0.1, **options)


TRACKING = {
    "instance_norm": nn.InstanceNorm2d,
    "batch_norm": nn.BatchNorm2d,
    "sync_batch_norm": nn.SyncBatchNorm,
    "batch_renorm": renorm,
    "batch_instance_norm": nn.BatchInstanceNorm2d,
}
over_tracking = pytest.mark.parametrize("kind", TRACKING.values(), ids=TRACKING)


def statistics(module):
    return list(module.buffers())


@pytest.mark.parametrize("layout", IMAGE_LAYOUTS)
@over_tracking
def test_running_statistics(kind, layout, backend, device):
    """Compiled training steps update the module's own buffers as eager's do; the outputs and gradients are eager's too, and nothing is compiled
    twice. Where one operator follows another in eager calls too, the bits are the same."""
    eager, other = tracking(kind, device, activation="leaky_relu"), tracking(kind, device, activation="leaky_relu")
    other.load_state_dict(eager.state_dict())
    addresses = [value.data_ptr() for value in statistics(other)]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(other, fullgraph=True, backend=counter)
    one_kernel = kind is not nn.BatchInstanceNorm2d
    for _ in range(3):
        x = LAYOUTS[layout](torch.randn(2, 6, 5, 4, device=device)).requires_grad_()
        y, want = compiled(x), eager(x)
        assert y.stride() == want.stride()
        (dx,), (expected,) = (torch.autograd.grad(result.square().sum(), x) for result in (y, want))
        compare((y, dx), (want, expected))
        assert not one_kernel or kind is renorm or (torch.equal(y, want) and torch.equal(dx, expected))
    exact = {"rtol": 0, "atol": 0} if kind is nn.InstanceNorm2d else {"rtol": 1e-6, "atol": 1e-6}
    compare(statistics(other), statistics(eager), **exact)
    assert [value.data_ptr() for value in statistics(other)] == addresses
    assert counter.frame_count == 1
    before = [value.clone() for value in statistics(other)]
    torch.testing.assert_close(compiled.eval()(x), eager.eval()(x))
    assert all(map(torch.equal, statistics(other), before)), "the same module, told to evaluate"


@pytest.mark.parametrize("training", [True, False])
@over_norms("instance_norm_tracked", "batch_norm", "sync_batch_norm", "batch_renorm", "batch_instance_norm")
def test_running_statistics_graph(norm, training):
    """One op forward, one backward, and arithmetic on vectors between: no copy of x, no clone of the buffers."""
    x, *others = norm.tensors(dtype=torch.float32)
    names = [name for name in norm.settings(x) if name.startswith("running")]
    flag = "use_input_stats" if norm.function is normops.instance_norm else "training"
    buffers = [norm.settings(x.detach())[name] for name in names]

    def f(x, first, second, *others):
        return norm(x, *others, **dict(zip(names, (first, second), strict=True)), **{flag: training})

    forward, backward = graphs_of(f, [x, *buffers, *others])
    frozen = not training and norm.function is not normops.batch_instance_norm
    assert ours(forward) == ([torch.ops.normops.group_norm_fwd.default] if frozen else norm.forward_ops)
    assert ours(backward) == ([torch.ops.normops.group_norm_bwd.default] if frozen else norm.backward_ops)
    assert x.numel() not in copied(forward + backward)
    assert torch.ops.aten.clone.default not in {node.target for node in forward}, "the buffers themselves"
    assert [value._version > 0 for value in buffers] == [training] * 2


@pytest.mark.skipif(DEVICE == "cuda", reason="reads the code that inductor makes for CPUs")
def test_inductor_running_statistics():
    """One kernel writes all the buffers of a module in place, and nothing is allocated for them."""
    eager, other = tracking(nn.BatchNorm2d, activation="relu"), tracking(nn.BatchNorm2d, activation="relu")
    compiled = torch.compile(other, fullgraph=True)

    def step(x):
        y = compiled(x)
        return y.detach(), *torch.autograd.grad(y.square().sum(), x)

    x = LAYOUTS["channels_last"](torch.randn(2, 6, 5, 4)).requires_grad_()
    _, codes = run_and_get_code(step, x)
    got = step(x)
    eager(x)
    y = eager(x)
    forward = next(code for code in codes if "batch_norm_fwd" in code)
    forward = forward[forward.index("def call(") : forward.index("return (")]
    kernels = re.findall(r"^ +(?:buf\d+ = )?((?:torch\.ops|cpp)\w*(?:\.\w+)*)\(", forward, re.MULTILINE)
    assert len(kernels) == 2 and kernels[0] == "torch.ops.normops.batch_norm_fwd.default" and kernels[1].startswith("cpp_fused")
    assert "empty_strided" not in forward
    compare(got, (y, *torch.autograd.grad(y.square().sum(), [x])))
    compare(statistics(other), statistics(eager))


def test_inductor_dynamic_running_statistics():
    """Several kinds in one graph of any size."""
    kinds = (nn.InstanceNorm2d, renorm, nn.BatchInstanceNorm2d)
    eager, other = (torch.nn.Sequential(*(tracking(kind, DEVICE) for kind in kinds)) for _ in range(2))
    compiled = torch.compile(lambda x: other(x * 2) + 1, fullgraph=True, dynamic=True)
    for size in (3, 7):
        x = torch.randn(2, 6, size, 5, device=DEVICE)
        torch.testing.assert_close(compiled(x), eager(x * 2) + 1)
    compare(statistics(other), statistics(eager))


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.SyncBatchNorm, nn.BatchInstanceNorm2d])
def test_compiled_checkpoint(kind):
    """A checkpointed region inside of a graph: the same gradients, and statistics updated once. (Of what reads buffers before it updates them, as
    batch renorm, torch's compiled backward sees the new ones.)"""
    x, found = torch.randn(2, 6, 5, 4, requires_grad=True), []
    for compiled in (True, False):
        module = tracking(kind)

        def f(x, module=module, compiled=compiled):
            return (checkpoint(module, x * 2, use_reentrant=False) if compiled else module(x * 2)).sin()

        y = (torch.compile(f, fullgraph=True, backend="aot_eager") if compiled else f)(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()]), *statistics(module)])
    compare(*found)


# ---- export ----


def image(samples, device="cpu"):
    return torch.randn(samples, 6, 5, 4, device=device)


MODULES = {
    "group_norm": lambda: nn.GroupNorm(3, 6, activation="gelu"),
    "instance_norm": lambda: nn.InstanceNorm2d(6, affine=True, activation="gelu"),
    "instance_norm_training": lambda: tracking(activation="gelu"),
    "instance_norm_eval": lambda: tracking(activation="gelu").eval(),
    "batch_norm_training": lambda: tracking(nn.BatchNorm2d, activation="gelu"),
    "batch_norm_eval": lambda: tracking(nn.BatchNorm2d, activation="gelu").eval(),
    "sync_batch_norm_training": lambda: tracking(nn.SyncBatchNorm, activation="gelu"),
    "batch_renorm_training": lambda: tracking(renorm, activation="gelu"),
    "batch_renorm_eval": lambda: tracking(renorm, activation="gelu").eval(),
    "batch_instance_norm_training": lambda: tracking(nn.BatchInstanceNorm2d, activation="gelu"),
    "batch_instance_norm_eval": lambda: tracking(nn.BatchInstanceNorm2d, activation="gelu").eval(),
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
@pytest.mark.parametrize("name", MODULES)
def test_export(name, strict):
    """A dynamic batch, decompositions, and a file: same values, gradients and running statistics."""
    model = Model(MODULES[name]()).to(DEVICE)
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(model, (image(2, DEVICE), image(2, DEVICE)), dynamic_shapes=({0: batch},) * 2, strict=strict)
    lowered = exported.run_decompositions()
    parts = 2 if name.startswith(("batch_renorm_training", "batch_instance_norm")) else 1
    assert [len(ours(program.graph.nodes)) for program in (exported, lowered)] == [1, parts], "one operator, or statistics and one"
    trainable, inference = reloaded(exported), reloaded(lowered)
    for samples in (2, 5):
        values = [image(samples, DEVICE).requires_grad_() for _ in range(2)]
        y, got = model(*values), trainable(*values)
        torch.testing.assert_close(got, y)
        torch.testing.assert_close(inference(*values), y)
        dy = torch.randn_like(y)
        compare(torch.autograd.grad(got, values, dy), torch.autograd.grad(y, values, dy))
    for program in (trainable, inference):
        kept = program.state_dict()
        assert ("norm.running_mean" in kept) == (getattr(model.norm, "running_mean", None) is not None)
        compare([kept[buffer] for buffer, _ in model.named_buffers() if buffer in kept], [v for k, v in model.named_buffers() if k in kept])


def test_functional_inside():
    """Calls of the functions with everything fused, next to torch's own ops: one graph."""

    def f(x, style, scale):
        y = normops.adaptive_instance_norm(x, style, activation="relu")
        y, total = normops.add_layer_norm(F.gelu(y), x, (5, 4), scale=scale)
        return normops.rms_norm(y, 6, dim=1) + total

    values = image(2), image(2), torch.randn(2, 5, 4)
    torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(*values), f(*values))
