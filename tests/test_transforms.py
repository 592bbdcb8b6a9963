"""compile, export, opcheck, vmap, torch.func, forward mode, autocast, checkpointing, fake tensors, subclasses: same result, same gradients."""

import contextlib
import copy
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS, composed
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import normops
from normops.nn import GroupNorm

LAYOUT_IDS = ["contiguous", "channels_last"]
FWD, BWD = torch.ops.normops.group_norm_fwd.default, torch.ops.normops.group_norm_bwd.default


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tensors(shape=(2, 6, 5, 4), layout="contiguous", dtype=torch.float64, device="cpu", requires_grad=True):
    """x, weight, bias, residual, scale, shift."""
    vector, matrix = shape[1:2], shape[:2]
    values = [torch.randn(size, dtype=torch.float64).to(dtype).to(device) for size in (shape, vector, vector, shape, matrix, matrix)]
    values[0], values[3] = LAYOUTS[layout](values[0]), LAYOUTS[layout](values[3])
    return [value.requires_grad_(requires_grad) for value in values]


def fused(x, weight, bias, residual, scale, shift, activation="silu"):
    return normops.group_norm(x, 3, weight, bias, activation=activation, residual=residual, scale=scale, shift=shift)


def theirs(x, weight, bias, residual, scale, shift, activation="silu"):
    return composed(x, 3, weight, bias, activation=activation, residual=residual, scale=scale, shift=shift)


def compare(got, want, **tolerance):
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other, **tolerance)


def with_gradients(f, values, dy):
    y = f(*values)
    return y.detach(), torch.autograd.grad(y, values, dy)


# ---- torch.compile ----


@pytest.mark.parametrize("layout", LAYOUT_IDS)
def test_aot_eager(layout, backend, device):
    """One graph, forward and backward, bitwise the eager result and strides."""
    values = tensors(layout=layout, dtype=torch.float32, device=device)
    dy = LAYOUTS[layout](torch.randn_like(values[0]).detach())
    y, gradients = with_gradients(torch.compile(fused, fullgraph=True, backend="aot_eager"), values, dy)
    want, expected = with_gradients(fused, values, dy)
    assert torch.equal(y, want) and y.stride() == want.stride()
    compare(gradients, expected)
    assert torch.equal(gradients[0], expected[0]) and gradients[0].stride() == expected[0].stride()


def graphs_of(f, values):
    """The ops in the forward and in the backward graph that AOTAutograd makes of `f`."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func

    found = []

    def keep(graph, _):
        found.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph.forward)

    y = torch.compile(f, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))(*values)
    torch.autograd.grad(y, values, torch.randn_like(y))
    return found


def test_graphs_hold_the_ops():
    """What inductor sees: one op forward, one backward, no copy of large tensors."""
    x, weight, bias, residual, *_ = tensors(dtype=torch.float32)
    forward, backward = graphs_of(lambda x, w, b, r: normops.group_norm(x, 3, w, b, activation="silu", residual=r), [x, weight, bias, residual])
    assert forward.count(FWD) == 1 and backward.count(BWD) == 1
    assert BWD not in forward and FWD not in backward
    assert not {str(target) for target in forward + backward} & {"aten.clone.default", "aten._to_copy.default", "aten.copy.default"}


@pytest.mark.parametrize("layout", LAYOUT_IDS)
def test_inductor_dynamic(layout):
    """Inductor with dynamic=True over three shapes: one compilation, same values and strides, gradients too."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(lambda *values: fused(*values) * 2, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for shape in ((2, 6, 5, 4), (3, 6, 7, 9), (4, 6, 11, 3)):
        values = tensors(shape, layout, torch.float32, device)
        dy = LAYOUTS[layout](torch.randn_like(values[0]).detach())
        y, gradients = with_gradients(compiled, values, dy)
        want, expected = with_gradients(lambda *values: fused(*values) * 2, values, dy)
        torch.testing.assert_close(y, want)
        assert y.stride() == want.stride()
        compare(gradients, expected)
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1], "no recompilation"


def test_dynamic_batch_meets_channels():
    """N = C is no special case of a dynamic graph: checks of (C,) and (N, C) compare ranks before sizes."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled, counts = torch.compile(fused, fullgraph=True, dynamic=True, backend=counter), []
    for shape in ((2, 6, 5, 4), (3, 6, 7, 9), (6, 6, 7, 3)):
        values = tensors(shape, requires_grad=False)
        torch.testing.assert_close(compiled(*values), theirs(*values))
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1], "no recompilation"


def test_inductor_inference():
    """Under no_grad, in a module, next to ops that inductor fuses."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), GroupNorm(3, 6, activation="silu"), torch.nn.Conv2d(6, 2, 1)).to(device)
    x = torch.randn(2, 3, 9, 8, device=device)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=2e-5, atol=2e-5)


def test_compiled_options():
    """Options are constants of the graph: another activation is another graph, not the first one's result."""
    compiled = torch.compile(lambda x, name: normops.group_norm(x, 3, activation=name), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 6, 4)
    for name in ("none", "relu", "gelu"):
        assert torch.equal(compiled(x, name), normops.group_norm(x, 3, activation=name))


def test_compiled_double_backward_is_refused_or_right():
    """AOTAutograd supports no double backward: it must say so, not drop gradients."""
    x = torch.randn(2, 6, 4, requires_grad=True)
    y = torch.compile(lambda x: normops.group_norm(x, 3, activation="silu"), fullgraph=True, backend="aot_eager")(x)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        dx.square().sum().backward()


def test_compiled_func_grad():
    """torch.func inside of compile: the differentiable reference is traced."""
    x, weight = torch.randn(2, 6, 4), torch.randn(6)

    def loss(weight, x):
        return normops.group_norm(x, 3, weight, activation="silu").sin().sum()

    got = torch.compile(torch.func.grad(loss), fullgraph=True, backend="aot_eager")(weight, x)
    want = torch.func.grad(lambda weight, x: F.silu(F.group_norm(x, 3, weight)).sin().sum())(weight, x)
    torch.testing.assert_close(got, want)


def test_compiled_autograd():
    """The backward that compiled autograd traces."""
    model = torch.nn.Sequential(torch.nn.Conv1d(6, 6, 1), GroupNorm(3, 6, activation="silu"))
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
f = torch.compile(lambda x, w: normops.group_norm(x, 3, w, activation="silu"), fullgraph=True, backend="aot_eager")
x, w = torch.randn(2, 6, 4, requires_grad=True), torch.randn(6, requires_grad=True)
y = f(x, w)
y.sum().backward()
torch.testing.assert_close(y, torch.nn.functional.silu(torch.nn.functional.group_norm(x, 3, w)))
assert w.grad is not None
print("fine")
"""
    root = str(Path(__file__).parent.parent)
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and done.stdout.endswith("fine\n"), done.stderr


# ---- export ----


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = GroupNorm(3, 6, activation="gelu")
        torch.nn.init.normal_(self.norm.weight)

    def forward(self, x, residual, scale):
        return self.norm(x, residual=residual, scale=scale) + 1


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
def test_export(strict, backend, device):
    """A dynamic batch, decompositions, and a file that another process could read."""
    model = Model().to(device)
    x, _, _, residual, scale, _ = tensors(dtype=torch.float32, device=device, requires_grad=False)
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(model, (x, residual, scale), dynamic_shapes=({0: batch},) * 3, strict=strict)
    assert torch.ops.normops.group_norm.default in {node.target for node in exported.graph.nodes}
    lowered = exported.run_decompositions()
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer)
    for samples in (2, 5):
        x, _, _, residual, scale, _ = tensors((samples, 6, 5, 4), dtype=torch.float32, device=device, requires_grad=False)
        want = model(x, residual, scale)
        for program in (exported, lowered, loaded):
            torch.testing.assert_close(program.module()(x, residual, scale), want)


# ---- torch.library.opcheck ----

_BASE = {"dtype": torch.float32, "shape": (2, 6, 5, 4), "layout": "contiguous"}
SAMPLES = {
    "plain": _BASE,
    "channels_last": _BASE | {"layout": "channels_last"},
    "channels_last_3d": _BASE | {"layout": "channels_last", "shape": (2, 6, 2, 3, 4)},
    "sliced": _BASE | {"layout": "sliced"},
    "transposed": _BASE | {"layout": "transposed", "shape": (3, 6, 4)},
    "rank2": _BASE | {"shape": (4, 6)},
    "bfloat16": _BASE | {"dtype": torch.bfloat16, "shape": (2, 6, 4)},
    "float64": _BASE | {"dtype": torch.float64, "layout": "channels_last"},
    "empty": _BASE | {"shape": (0, 6, 4)},
}


@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)
def test_opcheck_public(sample, backend, device):
    """Schema, autograd registration, fake kernel, AOT dispatch with dynamic shapes."""
    x, weight, bias, residual, scale, shift = tensors(**sample, device=device)
    options = {"activation": "silu", "residual": residual}
    if sample["dtype"] == torch.bfloat16:
        torch.library.opcheck(torch.ops.normops.group_norm.default, (x.detach(), 3), {"out_dtype": torch.float32})
    else:  # the modulation's own rounding is checked in float32 and float64
        options |= {"scale": scale, "shift": shift}
    torch.library.opcheck(torch.ops.normops.group_norm.default, (x, 3, weight, bias), options)


@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)
def test_opcheck_internal(sample, backend, device):
    """What compiled graphs hold, with and without the optional tensors."""
    x, weight, bias, residual, *_ = tensors(**sample, device=device, requires_grad=False)
    dy = LAYOUTS["contiguous"](torch.randn_like(x))
    for w, b, r, mask in ((weight, bias, residual, [True] * 4), (None, bias, None, [True, False, True, False]), (None, None, None, [False] * 4)):
        torch.library.opcheck(FWD, (x, w, b, r, 3, 1e-5, "silu", 0.01, None))
        _, stats = FWD(x, w, b, r, 3, 1e-5, "silu", 0.01, None)
        torch.library.opcheck(BWD, (dy, x, stats, w, b, r, 3, "silu", 0.01, mask))


# ---- fake tensors and meta ----


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout not in ("scalar", "expanded_positions")])
def test_fake_and_meta_strides(layout, requires_grad, device):
    """Fake and meta results have the real ones' shape, strides and dtype, in every layout."""
    x = LAYOUTS[layout](torch.randn(4, 6, 5, 8, device=device)).requires_grad_(requires_grad)
    real = normops.group_norm(x, 3, activation="silu")
    meta = normops.group_norm(x.detach().to("meta").as_strided(x.shape, x.stride()).requires_grad_(requires_grad), 3, activation="silu")
    assert meta.is_meta and (meta.shape, meta.stride(), meta.dtype) == (real.shape, real.stride(), real.dtype)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = normops.group_norm(mode.from_tensor(x), 3, activation="silu")
        assert (fake.shape, fake.stride(), fake.dtype, fake.device) == (real.shape, real.stride(), real.dtype, real.device)
        if requires_grad:
            gradient = torch.autograd.grad(fake.sum(), mode.from_tensor(x), allow_unused=True)[0]
            assert gradient is None or gradient.shape == x.shape
    if requires_grad:
        y = normops.group_norm(x, 3, activation="silu")
        dx = torch.autograd.grad(y, x, torch.randn_like(y))[0]
        m = x.detach().to("meta").as_strided(x.shape, x.stride()).requires_grad_()
        y = normops.group_norm(m, 3, activation="silu")
        assert torch.autograd.grad(y, m, torch.empty_like(y))[0].stride() == dx.stride()


def test_meta_out_dtype_and_internal():
    x = torch.empty(2, 6, 4, dtype=torch.bfloat16, device="meta")
    assert normops.group_norm(x, 3, out_dtype=torch.float32).dtype == torch.float32
    y, stats = FWD(x, None, None, None, 3, 1e-5, "none", 0.0, None)
    assert (y.dtype, stats.dtype, stats.shape) == (torch.bfloat16, torch.float32, (3, 2, 3))
    wide = FWD(x.double(), None, None, None, 3, 1e-5, "none", 0.0, None)
    assert wide[1].dtype == torch.float64


# ---- vmap and torch.func ----


def native(x, weight, bias, activation="silu"):
    return F.silu(F.group_norm(x, 3, weight, bias))


def ours(x, weight, bias, activation="silu"):
    return normops.group_norm(x, 3, weight, bias, activation=activation)


@pytest.mark.parametrize("dims", [(0, None, None), (1, None, None), (-1, None, None), (2, 0, None), (0, 0, 0), (None, 0, 1), (0, None, 1)], ids=str)
def test_vmap(dims, backend, device):
    """The mapped dimension folds into the samples; mapped vectors become per-sample ones."""

    def mapped(size, dim):
        shape = list(size)
        if dim is not None:
            shape.insert(dim if dim >= 0 else len(shape) + 1 + dim, 5)
        return torch.randn(shape, dtype=torch.float64, device=device)

    values = [mapped(size, dim) for size, dim in zip(((2, 6, 4), (6,), (6,)), dims, strict=True)]
    want = torch.stack([native(*(value if dim is None else value.select(dim, i) for value, dim in zip(values, dims, strict=True))) for i in range(5)])
    torch.testing.assert_close(torch.vmap(ours, dims)(*values), want)
    out = torch.vmap(ours, dims, out_dims=1)(*values)
    torch.testing.assert_close(out.movedim(1, 0), want)


def test_vmap_of_everything(backend, device):
    """residual, scale and shift mapped or not, per-sample weights, and two vmaps at once."""
    values = [torch.randn(5, *value.shape, dtype=value.dtype, device=device) for value in tensors(requires_grad=False)]
    want = torch.stack([theirs(*(value[i] for value in values)) for i in range(5)])
    torch.testing.assert_close(torch.vmap(fused)(*values), want)
    for fixed in range(6):
        some = [value[0] if i == fixed else value for i, value in enumerate(values)]
        dims = tuple(None if i == fixed else 0 for i in range(6))
        want = torch.stack([theirs(*(value if dim is None else value[i] for value, dim in zip(some, dims, strict=True))) for i in range(5)])
        torch.testing.assert_close(torch.vmap(fused, dims)(*some), want)
    weight = torch.randn(5, 2, 6, dtype=torch.float64, device=device)
    got = torch.vmap(lambda x, w: normops.group_norm(x, 3, w))(values[0], weight)
    torch.testing.assert_close(got, torch.stack([composed(values[0][i], 3, weight[i]) for i in range(5)]))
    x, weight = torch.randn(3, 5, 2, 6, 4, dtype=torch.float64, device=device), torch.randn(3, 6, dtype=torch.float64, device=device)
    nested = torch.vmap(torch.vmap(lambda x, w: normops.group_norm(x, 3, w, activation="silu"), (0, None)))(x, weight)
    want = torch.stack([torch.stack([native(x[i, j], weight[i], None) for j in range(5)]) for i in range(3)])
    torch.testing.assert_close(nested, want)


def test_vmap_gradient(backend, device):
    """Gradients flow back through a vmapped call."""
    x = torch.randn(5, 2, 6, 4, dtype=torch.float64, device=device, requires_grad=True)
    weight = torch.randn(6, dtype=torch.float64, device=device, requires_grad=True)
    dy = torch.randn_like(x)
    got = torch.autograd.grad(torch.vmap(lambda x: normops.group_norm(x, 3, weight, activation="silu"))(x), (x, weight), dy)
    want = torch.autograd.grad(F.silu(torch.vmap(lambda x: F.group_norm(x, 3, weight))(x)), (x, weight), dy)
    compare(got, want)


def test_vmap_shape_errors(backend, device):
    weight = torch.randn(5, device=device)
    with pytest.raises(ValueError, match="expected weight of shape"):
        torch.vmap(lambda x: normops.group_norm(x, 3, weight))(torch.randn(4, 2, 6, 3, device=device))


FUNC = {
    "grad": lambda f: torch.func.grad(lambda *args: f(*args).sin().sum(), (0, 1, 2)),
    "vmap_grad": lambda f: torch.vmap(torch.func.grad(lambda x, w, b: f(x[None], w, b).sin().sum(), (0, 1)), (0, None, None)),
    "jacrev": lambda f: torch.func.jacrev(f, (0, 1)),
    "jacfwd": lambda f: torch.func.jacfwd(f, (0, 1)),
    "hessian": lambda f: torch.func.hessian(lambda *args: f(*args).sin().sum(), (0, 1)),
    "jacrev_jacrev": lambda f: torch.func.jacrev(torch.func.jacrev(lambda *args: f(*args).sin().sum())),
    "vjp": lambda f: lambda *args: torch.func.vjp(f, *args)[1](torch.ones(2, 6, 4, dtype=torch.float64)),
    "jvp": lambda f: lambda *args: torch.func.jvp(f, args, tuple(torch.ones_like(value) for value in args)),
}


@pytest.mark.parametrize("transform", FUNC.values(), ids=FUNC)
def test_func(transform):
    """torch.func transforms equal those of F.group_norm and F.silu."""
    values = torch.randn(2, 6, 4, dtype=torch.float64), *torch.randn(2, 6, dtype=torch.float64)
    got, want = (torch.utils._pytree.tree_leaves(transform(f)(*values)) for f in (ours, native))
    compare(got, want)


def test_functional_call():
    """Per-sample gradients of a module's parameters, the usual recipe."""
    module = GroupNorm(3, 6, activation="silu").double()
    reference = torch.nn.GroupNorm(3, 6).double()
    x = torch.randn(5, 6, 4, dtype=torch.float64)

    def per_sample(model, act):
        def loss(parameters, x):
            return act(torch.func.functional_call(model, parameters, (x[None],))).square().sum()

        return torch.vmap(torch.func.grad(loss), (None, 0))(dict(model.named_parameters()), x)

    got, want = per_sample(module, lambda y: y), per_sample(reference, F.silu)
    for name in want:
        torch.testing.assert_close(got[name], want[name])


def test_ensemble():
    """stack_module_state: vmap over parameters and inputs."""
    modules = [GroupNorm(3, 6).double() for _ in range(4)]
    for module in modules:
        torch.nn.init.normal_(module.weight)
    parameters, buffers = torch.func.stack_module_state(modules)
    base = copy.deepcopy(modules[0]).to("meta")
    x = torch.randn(4, 2, 6, 3, dtype=torch.float64)
    got = torch.vmap(lambda p, b, x: torch.func.functional_call(base, (p, b), (x,)))(parameters, buffers, x)
    torch.testing.assert_close(got, torch.stack([module(value) for module, value in zip(modules, x, strict=True)]))


@pytest.mark.parametrize("layout", LAYOUT_IDS)
def test_forward_mode(layout, backend, device):
    """Tangents are carried, never dropped; forward over reverse too."""
    values = tensors(layout=layout, device=device, requires_grad=False)
    tangents = [torch.randn_like(value) for value in values]
    found = []
    for f, lay in ((fused, lambda value: value), (theirs, torch.Tensor.contiguous)):  # torch's has no tangents for channels last
        with forward_ad.dual_level():
            y, tangent = forward_ad.unpack_dual(f(*(forward_ad.make_dual(*map(lay, pair)) for pair in zip(values, tangents, strict=True))))
            found.append((y.clone(), tangent.clone()))
    compare(*found)
    x = values[0].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: normops.group_norm(x, 3, activation="silu"), x, check_forward_ad=True, check_backward_ad=False)


# ---- autocast ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_cpu_autocast(dtype):
    """CPU autocast lists no norm: the input's dtype is the output's."""
    x, weight = torch.randn(2, 6, 4).to(dtype).requires_grad_(), torch.randn(6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = normops.group_norm(x, 3, weight.to(dtype))
        assert y.dtype == F.group_norm(x, 3, weight.to(dtype)).dtype == dtype
        assert normops.group_norm(x, 3, weight).dtype == dtype
    assert torch.autograd.grad(y.float().sum(), x)[0].dtype == dtype


@contextlib.contextmanager
def cuda_autocast():
    """torch.autocast("cuda"), which disables itself where no CUDA device is seen."""
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_cuda_autocast(dtype):
    """CUDA autocast makes the output of F.group_norm float32; here too, but 16-bit x is what is saved. Fake tensors where CUDA is missing."""
    training = torch.cuda.is_available()  # autograd of fake CUDA tensors needs a device

    def draw(*size, dtype=dtype):
        return torch.randn(size, dtype=dtype, device="cuda", requires_grad=training)

    seen, saved = [], []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.extend(args[0].dtype for _ in range(func == FWD))
            return func(*args, **(kwargs or {}))

    context = contextlib.nullcontext() if torch.cuda.is_available() else torch._subclasses.FakeTensorMode()
    with context, Mode(), torch.autograd.graph.saved_tensors_hooks(lambda value: saved.append(value) or value, lambda value: value):
        x, residual, weight = draw(2, 6, 4), draw(2, 6, 4), draw(6, dtype=torch.float32)
        with cuda_autocast():
            y = normops.group_norm(x, 3, weight, activation="silu", residual=residual)
            theirs = F.group_norm(x.detach(), 3, weight.detach())
        assert y.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert dtype == torch.float64 or y.dtype == theirs.dtype
        assert seen == [dtype], "no cast: x reaches the kernel as it came"
        if training:
            assert {value.dtype for value in saved if value.shape == x.shape} == {dtype}, "x is saved as it came"
            gradients = torch.autograd.grad(y.sum(), (x, weight, residual))
            assert [gradient.dtype for gradient in gradients] == [dtype, torch.float32, dtype]
        assert normops.group_norm(x, 3).dtype == dtype, "outside of autocast"
        if dtype in (torch.float16, torch.bfloat16):
            with cuda_autocast():
                mixed = normops.group_norm(x, 3, residual=draw(2, 6, 4, dtype=torch.float32))
            assert mixed.dtype == torch.float32, "a float32 residual, from another op that autocast runs in float32"


# ---- checkpointing, inference, subclasses, modes ----


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(use_reentrant, backend, device):
    values = tensors(device=device)
    dy = torch.randn_like(values[0])
    got = with_gradients_by_backward(lambda *args: checkpoint(fused, *args, use_reentrant=use_reentrant), values, dy)
    want = with_gradients_by_backward(fused, values, dy)
    for mine, other in zip(got, want, strict=True):
        assert torch.equal(mine, other)


def with_gradients_by_backward(f, values, dy):
    """As with_gradients, by .backward(): reentrant checkpointing knows no autograd.grad."""
    leaves = [value.detach().requires_grad_() for value in values]
    y = f(*leaves)
    y.backward(dy)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def test_selective_checkpoint():
    """A policy sees group_norm_fwd and may keep its outputs."""
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    seen = []

    def policy(ctx, op, *args, **kwargs):
        seen.append(op)
        return CheckpointPolicy.MUST_SAVE if op == FWD else CheckpointPolicy.PREFER_RECOMPUTE

    values = tensors()
    dy = torch.randn_like(values[0])
    call = lambda *args: checkpoint(fused, *args, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy))  # noqa: E731
    compare(with_gradients_by_backward(call, values, dy), with_gradients_by_backward(fused, values, dy))
    assert FWD in seen


def test_inference_mode(backend, device):
    x, weight, bias, residual, scale, shift = tensors(device=device, requires_grad=False)
    want = fused(x, weight, bias, residual, scale, shift)
    with torch.inference_mode():
        y = fused(x, weight, bias, residual, scale, shift)
        assert y.is_inference() and torch.equal(y, want)
        made_inside = x.clone()
    with torch.no_grad():
        assert torch.equal(fused(made_inside, weight, bias, residual, scale, shift), want)


class Logged(torch.Tensor):
    """A subclass that wraps a tensor and writes down the ops that reach it."""

    seen: list = []

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device,
                                                   requires_grad=inner.requires_grad)  # fmt: skip

    def __init__(self, inner):
        self.inner = inner.detach()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        args, kwargs = torch.utils._pytree.tree_map_only(cls, lambda value: value.inner, (args, kwargs or {}))
        return torch.utils._pytree.tree_map_only(torch.Tensor, cls, func(*args, **kwargs))


def test_subclass(backend, device):
    """Both ops reach __torch_dispatch__, and the result is wrapped."""
    x, weight = torch.randn(2, 6, 4, device=device), torch.randn(6, device=device)
    wrapped = Logged(x.clone().requires_grad_())
    Logged.seen.clear()
    y = normops.group_norm(wrapped, 3, weight, activation="silu")
    assert isinstance(y, Logged) and torch.equal(y.inner, normops.group_norm(x, 3, weight, activation="silu"))
    (dx,) = torch.autograd.grad(y, wrapped, Logged(torch.ones_like(x)))
    assert FWD in Logged.seen and BWD in Logged.seen
    plain = x.clone().requires_grad_()
    want = torch.autograd.grad(normops.group_norm(plain, 3, weight, activation="silu").sum(), plain)[0]
    assert torch.equal(dx.inner, want)


def test_parameter_and_plain_subclass(device):
    """nn.Parameter, nn.Buffer and a subclass without behaviour compute as plain tensors do."""

    class Named(torch.Tensor):
        pass

    x = torch.randn(2, 6, 4, device=device)
    want = normops.group_norm(x, 3)
    assert torch.equal(normops.group_norm(torch.nn.Parameter(x), 3), want)
    y = normops.group_norm(x.as_subclass(Named), 3)
    assert isinstance(y, Named) and torch.equal(y.as_subclass(torch.Tensor), want)


def test_dispatch_mode_sees_the_ops(backend, device):
    """A TorchDispatchMode sees group_norm_fwd and group_norm_bwd, as profilers and flop counters need."""
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.randn(2, 6, 4, device=device, requires_grad=True)
    with Mode():
        normops.group_norm(x, 3, activation="silu").sum().backward()
    assert FWD in seen and BWD in seen


def test_tracing():
    """torch.jit.trace records the op (deprecated, still used for deployment)."""
    x = torch.randn(2, 6, 4)
    traced = torch.jit.trace(lambda x: normops.group_norm(x, 3, activation="silu"), x)
    other = torch.randn(3, 6, 7)
    torch.testing.assert_close(traced(other), normops.group_norm(other, 3, activation="silu"))


def test_make_fx():
    from torch.fx.experimental.proxy_tensor import make_fx

    x, weight = torch.randn(2, 6, 4), torch.randn(6)
    graph = make_fx(lambda x, w: normops.group_norm(x, 3, w, activation="silu"))(x, weight)
    assert any("normops" in str(node.target) for node in graph.graph.nodes)
    torch.testing.assert_close(graph(x, weight), normops.group_norm(x, 3, weight, activation="silu"))


def test_threads(backend, device):
    """Calls from several threads at once."""
    from concurrent.futures import ThreadPoolExecutor

    x = torch.randn(2, 6, 40, device=device)
    want = normops.group_norm(x, 3, activation="silu")
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(y, want) for y in pool.map(lambda _: normops.group_norm(x, 3, activation="silu"), range(16)))
