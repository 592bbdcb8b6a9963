"""vmap, torch.func, forward mode, autocast, checkpointing, subclasses, modes: same result, same gradients."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from norms import NORMS, compare, cotangents, leaves, over_layouts, over_norms, with_gradients
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import normops
from normops import nn

# ---- vmap ----

MAPPED = 5
PATTERNS = {  # the mapped dimension of x and of all others
    "x": (0, None),
    "x_within": (1, None),
    "x_last": (-1, None),
    "all": (0, 0),
    "all_last": (-1, -1),
    "others": (None, 0),
    "others_last": (None, -1),
}


def each(call, values, dims):
    """What vmap means: calls one by one, stacked."""
    pairs = list(zip(values, dims, strict=True))
    results = [leaves(call(*(value if dim is None else value.select(dim, i) for value, dim in pairs))) for i in range(MAPPED)]
    return [torch.stack(result) for result in zip(*results, strict=True)]


def mapped(norm, dims, device):
    values = norm.tensors(device=device, requires_grad=False)
    return [value if dim is None else torch.randn(MAPPED, *value.shape, dtype=value.dtype, device=device).movedim(0, dim)
            for value, dim in zip(values, dims, strict=True)]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
@over_norms()
def test_vmap(norm, pattern, backend, device):
    """The mapped dimension folds into the samples; mapped vectors become per-sample ones."""
    of_x, of_others = PATTERNS[pattern]
    dims = (of_x, *[of_others] * len(norm.others))
    values = mapped(norm, dims, device)
    want = each(norm.theirs, values, dims)
    compare(leaves(torch.vmap(norm, dims)(*values)), want)
    compare([result.movedim(1, 0) for result in leaves(torch.vmap(norm, dims, out_dims=1)(*values))], want)


@over_norms()
def test_vmap_of_some(norm, backend, device):
    """Each tensor mapped alone, and all but one."""
    count = 1 + len(norm.others)
    for chosen in range(count):
        for dims in (tuple(0 if i == chosen else None for i in range(count)), tuple(None if i == chosen else 0 for i in range(count))):
            values = mapped(norm, dims, device)
            compare(leaves(torch.vmap(norm, dims)(*values)), each(norm.theirs, values, dims))


@over_norms()
def test_vmap_nested(norm, backend, device):
    """Two vmaps at once, the vectors mapped by the outer one only; and weights per sample where they are allowed."""
    x, *others = norm.tensors(device=device, requires_grad=False)
    x = torch.randn(3, MAPPED, *x.shape, dtype=x.dtype, device=device)
    others = [torch.randn(3, *value.shape, dtype=x.dtype, device=device) for value in others]
    got = torch.vmap(torch.vmap(norm, (0, *[None] * len(others))))(x, *others)
    for i in range(3):
        values = [x[i], *(value[i] for value in others)]
        compare([result[i] for result in leaves(got)], each(norm.theirs, values, (0, *[None] * len(others))))


def test_vmap_of_weights_per_sample(backend, device):
    """(N, C) vectors, mapped or not."""
    x = torch.randn(MAPPED, 2, 6, 4, dtype=torch.float64, device=device)
    for weight, dim in ((torch.randn(MAPPED, 2, 6).to(x), 0), (torch.randn(2, 6).to(x), None)):
        for function in (
            lambda x, w: normops.group_norm(x, 3, w),
            lambda x, w: normops.instance_norm(x, weight=w),
            lambda x, w: normops.batch_norm(x, None, None, w, training=True),
        ):
            plain = [function(x[i], None) * (weight if dim is None else weight[i])[..., None] for i in range(MAPPED)]
            torch.testing.assert_close(torch.vmap(function, (0, dim))(x, weight), torch.stack(plain))


@over_norms()
def test_vmap_gradient(norm, backend, device):
    """Gradients flow back through a vmapped call, into what was mapped and what was shared."""
    dims = (0, *[None] * len(norm.others))
    values = [value.requires_grad_() for value in mapped(norm, dims, device)]
    dys = cotangents(norm, values)
    _, got = with_gradients(torch.vmap(norm, dims), values, dys)
    _, want = with_gradients(lambda *values: tuple(each(norm.theirs, values, dims)), values, dys)
    compare(got, want)


@over_norms("instance_norm_tracked", "batch_norm", "batch_renorm", "batch_instance_norm")
def test_vmap_of_running_statistics(norm, backend, device):
    """Running statistics of their own for each mapped index are updated in place; shared ones cannot be, and say so."""
    x, *others = norm.tensors(device=device, requires_grad=False)
    x = torch.randn(MAPPED, *x.shape).to(x)
    kept = [name for name in norm.settings(x[0]) if name.startswith("running")]
    ours, theirs = ([torch.stack([norm.settings(x[0])[name]] * MAPPED) for name in kept] for _ in range(2))

    def call(x, *statistics):
        return norm(x, *others, **dict(zip(kept, statistics, strict=True)))

    y = torch.vmap(call)(x, *ours)
    compare(y, [call(x[i], *(value[i] for value in theirs)) for i in range(MAPPED)])
    compare(ours, theirs)
    assert not torch.equal(ours[0][0], ours[0][1])
    shared = [value[0] for value in theirs]
    with pytest.raises((RuntimeError, ValueError), match="vmap"):
        torch.vmap(lambda x: call(x, *shared))(x)


@over_norms("group_norm", "instance_norm_frozen", "layer_norm", "rms_norm_dim1", "add_rms_norm")
def test_vmap_shape_errors(norm, backend, device):
    x, *others = mapped(norm, (0, *[None] * len(norm.others)), device)
    others[norm.others.index("weight")] = torch.randn(5, device=device)
    with pytest.raises(ValueError, match="expected weight of shape"):
        torch.vmap(lambda x: norm(x, *others))(x)


# ---- torch.func and forward mode ----


def loss(call):
    return lambda *values: sum(result.sin().sum() for result in leaves(call(*values)))


FUNC = {  # of x and the first of the others
    "grad": lambda f: torch.func.grad(loss(f), (0, 1)),
    "vmap_grad": lambda f: torch.vmap(torch.func.grad(loss(lambda x, *others: f(x[None], *others)), (0, 1)), (0, 0)),
    "jacrev": lambda f: torch.func.jacrev(f, (0, 1)),
    "jacfwd": lambda f: torch.func.jacfwd(f, (0, 1)),
    "hessian": lambda f: torch.func.hessian(loss(f), (0, 1)),
    "jacrev_jacrev": lambda f: torch.func.jacrev(torch.func.jacrev(loss(f))),
    "vjp": lambda f: lambda *values: torch.func.vjp(loss(f), *values)[1](torch.ones((), dtype=torch.float64)),
    "jvp": lambda f: lambda *values: torch.func.jvp(f, values, tuple(torch.ones_like(value) for value in values)),
}


@pytest.mark.parametrize("transform", FUNC)
@over_norms()
def test_func(norm, transform):
    """torch.func transforms equal those of torch's ops."""
    sizes = (2, 4) if norm.op == "group" or norm.row is None else (2, 1)
    x, other = norm.tensors(sizes, requires_grad=False)[:2]
    if transform == "vmap_grad":  # one sample at a time
        other = torch.stack([other] * 2) if other.dim() == 1 or norm.row == other.shape else other[:, None]
    got, want = (tree_leaves(FUNC[transform](f)(x, other)) for f in (norm, norm.theirs))
    compare(got, want)


@over_layouts()
def test_forward_mode(norm, layout, backend, device):
    """Tangents are carried, never dropped; forward over reverse too."""
    values = norm.tensors(layout=layout, device=device, requires_grad=False)
    tangents = [torch.randn_like(value) for value in values]
    found = []
    for f, lay in ((norm, lambda value: value), (norm.theirs, torch.Tensor.contiguous)):  # torch's has no tangents for channels last
        with forward_ad.dual_level():
            results = leaves(f(*(forward_ad.make_dual(*map(lay, pair)) for pair in zip(values, tangents, strict=True))))
            found.append([part.clone() for result in results for part in forward_ad.unpack_dual(result)])
    compare(*found)
    if norm.function is normops.batch_renorm:  # r and d are constants for the gradient, not for a difference
        return
    x, *others = norm.tensors((1, 2, 2), device=device, requires_grad=False)
    assert torch.autograd.gradcheck(lambda x: norm(x, *others), x.requires_grad_(), check_forward_ad=True, check_backward_ad=False)


@over_norms("instance_norm_tracked", "batch_norm", "batch_renorm", "batch_instance_norm")
def test_running_statistics_have_no_derivative(norm, backend, device):
    """Those that a transform captures are updated as ever, and neither tangents nor graphs stay in them."""
    x, *others = norm.tensors(device=device, requires_grad=False)
    names = [name for name in norm.settings(x) if name.startswith("running")]

    def updated(transform):
        statistics = {name: norm.settings(x)[name] for name in names}
        transform(lambda x: norm(x, *others, **statistics))
        return list(statistics.values())

    want = updated(lambda call: call(x))
    with forward_ad.dual_level():
        got = updated(lambda call: call(forward_ad.make_dual(x, torch.ones_like(x))))
        assert all(forward_ad.unpack_dual(value).tangent is None for value in got)
        compare(got, want)
    for transform in (
        lambda call: torch.func.jvp(call, (x,), (x,)),
        lambda call: torch.func.grad(lambda x: call(x).sin().sum())(x),
        lambda call: call(x.clone().requires_grad_()),
    ):
        got = updated(transform)
        assert not any(value.requires_grad for value in got)
        compare(got, want)


MODULES = {  # module, torch's, the shape of one sample
    "group_norm": (lambda: nn.GroupNorm(3, 6, activation="silu"), lambda: torch.nn.GroupNorm(3, 6), (6, 4)),
    "instance_norm": (lambda: nn.InstanceNorm1d(6, affine=True, activation="silu"), lambda: torch.nn.InstanceNorm1d(6, affine=True), (6, 4)),
    "batch_norm": (
        lambda: nn.BatchNorm1d(6, track_running_stats=False, activation="silu"),
        lambda: torch.nn.BatchNorm1d(6, track_running_stats=False),
        (6, 4),
    ),
    "layer_norm": (lambda: nn.LayerNorm((3, 2), activation="silu"), lambda: torch.nn.LayerNorm((3, 2)), (4, 3, 2)),
    "rms_norm": (lambda: nn.RMSNorm(6, activation="silu"), lambda: torch.nn.RMSNorm(6), (4, 6)),
}
over_modules = pytest.mark.parametrize("make, make_theirs, shape", MODULES.values(), ids=MODULES)


@over_modules
def test_functional_call(make, make_theirs, shape):
    """Per-sample gradients of a module's parameters, the usual recipe."""
    x = torch.randn(5, *shape, dtype=torch.float64)

    def per_sample(model, act):
        def loss(parameters, x):
            return act(torch.func.functional_call(model, parameters, (x[None],))).square().sum()

        return torch.vmap(torch.func.grad(loss), (None, 0))(dict(model.named_parameters()), x)

    got, want = per_sample(make().double(), lambda y: y), per_sample(make_theirs().double(), F.silu)
    assert got.keys() == want.keys()
    compare(got.values(), want.values())


ENSEMBLES = {name: (make, shape) for name, (make, _, shape) in MODULES.items()} | {
    "instance_norm_training": (lambda: nn.InstanceNorm1d(6, affine=True, track_running_stats=True), (6, 4)),
    "instance_norm_eval": (lambda: nn.InstanceNorm1d(6, track_running_stats=True).eval(), (6, 4)),
    "batch_norm_training": (lambda: nn.BatchNorm1d(6), (6, 4)),
    "batch_norm_eval": (lambda: nn.BatchNorm1d(6).eval(), (6, 4)),
    "batch_renorm": (lambda: nn.BatchRenorm1d(6, schedule=lambda step: (1.5, 0.5)), (6, 4)),
    "batch_instance_norm": (lambda: nn.BatchInstanceNorm1d(6), (6, 4)),
    "layer_norm_2d": (lambda: nn.LayerNorm2d(6), (6, 4)),
    "rms_norm_2d": (lambda: nn.RMSNorm2d(6), (6, 4)),
}


@pytest.mark.parametrize("make, shape", ENSEMBLES.values(), ids=ENSEMBLES)
def test_ensemble(make, shape):
    """stack_module_state: vmap over parameters, buffers and inputs."""
    modules = [make().double() for _ in range(4)]
    for module in modules:
        for value in (*module.parameters(), *module.buffers()):
            if value.is_floating_point():
                torch.nn.init.uniform_(value, 0.5, 2)
    parameters, buffers = torch.func.stack_module_state(modules)
    base = copy.deepcopy(modules[0]).to("meta")
    x = torch.randn(4, 2, *shape, dtype=torch.float64)
    got = torch.vmap(lambda p, b, x: torch.func.functional_call(base, (p, b), (x,)))(parameters, buffers, x)
    torch.testing.assert_close(got, torch.stack([module(value) for module, value in zip(modules, x, strict=True)]))
    for name, value in buffers.items():
        torch.testing.assert_close(value, torch.stack([getattr(module, name) for module in modules]))
    copy.deepcopy(base)  # nothing of the transform stays in the module


# ---- autocast ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@over_norms()
def test_cpu_autocast(norm, dtype):
    """CPU autocast lists no norm: the input's dtype is the output's, also beside wider vectors."""
    x, *others = norm.tensors(dtype=dtype)
    narrow = [value if value.shape == x.shape else value.to(dtype) for value in others]
    wide = [value if value.shape == x.shape else value.float() for value in others]
    with torch.autocast("cpu", torch.bfloat16):
        results = leaves(norm(x, *narrow)) + leaves(norm(x, *wide))
    assert {result.dtype for result in results} == {dtype}
    assert torch.autograd.grad(results[0].float().sum(), x)[0].dtype == dtype


@contextlib.contextmanager
def cuda_autocast():
    """torch.autocast("cuda"), which disables itself where no CUDA device is seen."""
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


def fused_inputs(norm, x, draw):
    """weight, residual and what the norm cannot do without, as autocast leaves them: 16-bit activations beside float32 parameters."""
    shapes = dict(zip(("x", *norm.others), norm.sizes(2, 5, 4), strict=True))
    wanted = [name for name in norm.others if name in ("weight", "residual", "style", "rho")]
    return {name: draw(shapes[name], torch.float32 if name in ("weight", "rho") else x.dtype) for name in wanted}


def settings_of_fake(norm, x):
    """Without the statistics that a call would update: a torch without CUDA cannot index fake CUDA tensors."""
    settings = norm.settings(x)
    if torch.cuda.is_available() or not (
        settings.get("training") or norm.function is normops.instance_norm and settings.get("use_input_stats", True)
    ):
        return settings
    return settings | dict.fromkeys(("running_mean", "running_var") if "running_mean" in settings else ())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@over_norms(*(name for name in NORMS if name != "batch_renorm" or torch.cuda.is_available()))
def test_cuda_autocast(norm, dtype):
    """CUDA autocast makes the output of torch's group, layer and RMS norm float32, not that of batch and instance norm; here too, but 16-bit x is
    what is saved. Fake tensors where CUDA is missing."""
    training = torch.cuda.is_available()  # autograd of fake CUDA tensors needs a device
    seen, saved = [], []

    def draw(size, dtype=dtype):
        return torch.randn(size, dtype=dtype, device="cuda", requires_grad=training)

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.extend(args[0].dtype for _ in range(func == norm.fwd))
            return func(*args, **(kwargs or {}))

    context = contextlib.nullcontext() if torch.cuda.is_available() else torch._subclasses.FakeTensorMode()
    with context, Mode(), torch.autograd.graph.saved_tensors_hooks(lambda value: saved.append(value) or value, lambda value: value):
        x = draw(norm.sizes(2, 5, 4)[0])
        options = settings_of_fake(norm, x) | fused_inputs(norm, x, draw)
        with cuda_autocast():
            y, *total = leaves(norm.function(x, activation="silu", **options))
            theirs = norm.normalized(x.detach())
        assert dtype == torch.float64 or y.dtype == theirs.dtype
        own = any(name in norm.function.__name__ for name in ("instance", "batch"))
        assert y.dtype == (torch.float32 if not own and dtype != torch.float64 else dtype)
        assert all(value.dtype == dtype for value in total), "the residual stream keeps its dtype"
        assert seen == [dtype], "no cast: x reaches the kernel as it came"
        if training:
            wanted = [x, *(value for value in options.values() if isinstance(value, torch.Tensor) and value.requires_grad)]
            assert {value.dtype for value in saved if value.shape == x.shape} == {dtype}, "x is saved as it came"
            assert [gradient.dtype for gradient in torch.autograd.grad(y.sum(), wanted)] == [value.dtype for value in wanted]
        assert leaves(norm.function(x, **options))[0].dtype == dtype, "outside of autocast"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@over_norms("group_norm", "layer_norm", "layer_norm_dim1", "rms_norm", "add_layer_norm", "add_rms_norm")
def test_cuda_autocast_of_a_wide_residual(norm, dtype):
    """A float32 residual, from another op that autocast runs in float32."""
    with contextlib.nullcontext() if torch.cuda.is_available() else torch._subclasses.FakeTensorMode():
        x = torch.randn(norm.sizes(2, 5, 4)[0], dtype=dtype, device="cuda")
        with cuda_autocast():
            results = leaves(norm.function(x, residual=torch.randn_like(x, dtype=torch.float32), **norm.settings(x)))
        assert {result.dtype for result in results} == {torch.float32}


# ---- checkpointing, inference, subclasses, modes ----


def with_gradients_by_backward(f, values, dys):
    """As with_gradients, by .backward(): reentrant checkpointing knows no autograd.grad."""
    inputs = [value.detach().requires_grad_() for value in values]
    results = leaves(f(*inputs))
    torch.autograd.backward(results, dys)
    return [*(result.detach() for result in results), *(value.grad for value in inputs)]


def with_settings(norm, x):
    """The call with one set of running statistics, made once."""
    settings = norm.settings(x.detach())
    return lambda *values: norm(*values, **settings)


@pytest.mark.parametrize("use_reentrant", [True, False])
@over_norms()
def test_checkpoint(norm, use_reentrant, backend, device):
    values = norm.tensors(device=device)
    dys = cotangents(norm, values)
    region = with_settings(norm, values[0])
    got = with_gradients_by_backward(lambda *args: checkpoint(region, *args, use_reentrant=use_reentrant), values, dys)
    exact = {} if norm.function is normops.batch_renorm else {"rtol": 0, "atol": 0}  # undoes an update
    compare(got, with_gradients_by_backward(norm, values, dys), **exact)


@pytest.mark.parametrize("use_reentrant", [True, False])
@over_norms("instance_norm_tracked", "batch_norm", "batch_renorm", "batch_instance_norm")
def test_checkpoint_of_running_statistics(norm, use_reentrant, backend, device):
    """Computed twice, they are updated once; also in a backward pass that asks for second derivatives, and after it again."""
    values = norm.tensors(device=device)
    settings = norm.settings(values[0].detach())
    kept = [value for name, value in settings.items() if name.startswith("running")]
    start = [value.clone() for value in kept]
    y = checkpoint(lambda *values: norm(*values, **settings), *values, use_reentrant=use_reentrant)
    once = [value.clone() for value in kept]
    assert not any(map(torch.equal, once, start))
    y.sum().backward(create_graph=not use_reentrant)
    assert all(map(torch.equal, kept, once))
    norm(*values, **settings)
    assert not any(map(torch.equal, kept, once)), "the pass is over"


@over_norms()
def test_selective_checkpoint(norm):
    """A policy sees the kernel and may keep its outputs."""
    seen = []

    def policy(ctx, op, *args, **kwargs):
        seen.append(op)
        return CheckpointPolicy.MUST_SAVE if op == norm.fwd else CheckpointPolicy.PREFER_RECOMPUTE

    values = norm.tensors()
    dys = cotangents(norm, values)
    region = with_settings(norm, values[0])
    call = lambda *args: checkpoint(region, *args, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy))  # noqa: E731
    compare(with_gradients_by_backward(call, values, dys), with_gradients_by_backward(norm, values, dys))
    assert norm.fwd in seen


@over_norms()
def test_inference_mode(norm, backend, device):
    values = norm.tensors(device=device, requires_grad=False)
    want = leaves(norm(*values))
    with torch.inference_mode():
        results = leaves(norm(*values))
        assert all(y.is_inference() for y in results) and all(map(torch.equal, results, want))
        made_inside = values[0].clone()
    with torch.no_grad():
        assert all(map(torch.equal, leaves(norm(made_inside, *values[1:])), want))


@over_norms()
def test_saved_tensors_hooks(norm, backend, device):
    """What is saved may be packed elsewhere, and comes back the same."""
    values = norm.tensors(device=device)
    dys = cotangents(norm, values)
    with torch.autograd.graph.saved_tensors_hooks(lambda value: value.numpy(force=True).copy(), lambda value: torch.from_numpy(value).to(device)):
        got = with_gradients(norm, values, dys)
    compare(got[1], with_gradients(norm, values, dys)[1], rtol=0, atol=0)


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
        args, kwargs = tree_map_only(cls, lambda value: value.inner, (args, kwargs or {}))
        return tree_map_only(torch.Tensor, cls, func(*args, **kwargs))


@over_norms()
def test_subclass(norm, backend, device):
    """Both ops reach __torch_dispatch__, and the results are wrapped."""
    values = norm.tensors(dtype=torch.float32, device=device)
    wrapped = Logged(values[0].detach().clone().requires_grad_())
    Logged.seen.clear()
    results, want = leaves(norm(wrapped, *values[1:])), leaves(norm(*values))
    assert all(isinstance(mine, Logged) and torch.equal(mine.inner, plain) for mine, plain in zip(results, want, strict=True))
    dys = [torch.randn_like(y) for y in want]
    (dx,) = torch.autograd.grad(results, wrapped, [Logged(dy) for dy in dys])
    assert norm.fwd in Logged.seen and norm.bwd in Logged.seen
    exact = {} if norm.function is normops.batch_instance_norm else {"rtol": 0, "atol": 0}  # in eager calls one backward, elsewhere two that meet
    compare([dx.inner], torch.autograd.grad(want, values[0], dys), **exact)


@over_norms()
def test_parameter_and_plain_subclass(norm, device):
    """nn.Parameter, nn.Buffer and a subclass without behaviour compute as plain tensors do."""

    class Named(torch.Tensor):
        pass

    x, *others = norm.tensors(device=device, requires_grad=False)
    want = leaves(norm(x, *others))
    for wrap in (torch.nn.Parameter, torch.nn.Buffer):
        assert all(map(torch.equal, leaves(norm(wrap(x), *others)), want))
    results = leaves(norm(x.as_subclass(Named), *others))
    assert all(isinstance(y, Named) and torch.equal(y.as_subclass(torch.Tensor), plain) for y, plain in zip(results, want, strict=True))


@over_norms()
def test_dispatch_mode_sees_the_ops(norm, backend, device):
    """A TorchDispatchMode sees the kernels, as profilers and flop counters need."""
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    values = norm.tensors(device=device)
    with Mode():
        loss(norm)(*values).backward()
    assert norm.fwd in seen and norm.bwd in seen


@over_norms()
def test_tracing(norm):
    """torch.jit.trace records the op (deprecated, still used for deployment); what it recorded has gradients."""
    values = norm.tensors(requires_grad=False)
    traced = torch.jit.trace(lambda *values: norm(*values), tuple(values))
    values = norm.tensors((3, 7, 9))
    dys = cotangents(norm, values)
    for got, want in zip(with_gradients(traced, values, dys), with_gradients(norm, values, dys), strict=True):
        compare(got, want)


@over_norms()
def test_make_fx(norm):
    from torch.fx.experimental.proxy_tensor import make_fx

    values = norm.tensors(requires_grad=False)
    graph = make_fx(norm)(*values)
    assert any("normops" in str(node.target) for node in graph.graph.nodes)
    compare(leaves(graph(*values)), leaves(norm(*values)))


@over_norms("group_norm", "instance_norm", "batch_norm", "layer_norm", "rms_norm_dim1")
def test_threads(norm, backend, device):
    """Calls from several threads at once."""
    from concurrent.futures import ThreadPoolExecutor

    values = norm.tensors((2, 40, 3), dtype=torch.float32, device=device, requires_grad=False)
    want = norm(*values)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(y, want) for y in pool.map(lambda _: norm(*values), range(16)))
