"""The operators of propagated statistics under torch's dispatcher, compiler and transforms: same result, same gradients."""

import io
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from analytic_models import rectified
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils._pytree import tree_leaves

import normops
from normops import maps

OPS = torch.ops.normops


def random(*shape, dtype=torch.float64, least=None, grad=True):
    """Normal values, or uniform ones from `least` on."""
    value = torch.randn(shape, dtype=torch.float64) if least is None else torch.rand(shape, dtype=torch.float64) + least
    return value.to(dtype).requires_grad_(grad)


def vector(size, least=None, grad=True):
    """That does not lie in one piece."""
    return random(size, 2, least=least).detach()[:, 0].requires_grad_(grad)


LAYOUTS = {
    "contiguous": lambda weight: weight,
    "channels_last": lambda weight: weight.movedim(1, -1).contiguous().movedim(-1, 1),
    "transposed": lambda weight: weight.movedim(0, 1).contiguous().movedim(1, 0),
    "expanded": lambda weight: weight[:, :1].expand_as(weight),
}


def layer(dtype=torch.float64, layout="contiguous", grad=True):
    """weight, mean, var, scale and bias of a grouped convolution."""
    weight = LAYOUTS[layout](random(6, 2, 3, 2, dtype=dtype, grad=False)).requires_grad_(grad)
    return [weight, vector(4, grad=grad), vector(4, 0.3, grad), vector(6, 0.3, grad), vector(6, grad=grad)]


def of_weight(weight, mean, var, scale=None, bias=None):
    return normops.analytic_norm_weight(weight, mean, var, scale, bias, 2)


def of_constant_patches(weight, mean, var, scale, bias):
    """By torch's convolution of a patch of means and one of variances."""
    given = ((mean, weight), (var, weight.square()))
    m, q = (F.conv2d(value.view(1, 4, 1, 1).expand(1, 4, *k.shape[2:]), k, groups=2).flatten() for value, k in given)
    r = scale / (q + 1e-10).sqrt()
    return weight * r.view(-1, 1, 1, 1), bias - m * r, m, q


def transposed(dtype=torch.float64, grad=True):
    """weight, mean, var, scale and bias of a grouped transposed convolution."""
    return [random(4, 3, 4, 3, dtype=dtype, grad=grad), vector(4, grad=grad), vector(4, 0.3, grad), vector(6, 0.3, grad), vector(6, grad=grad)]


def of_transposed(weight, mean, var, scale, bias):
    return normops.analytic_norm_weight(weight, mean, var, scale, bias, 2, stride=(2, 3), dilation=(3, 1))


def of_constant_images(weight, mean, var, scale, bias):
    """By torch's transposed convolution of images of means and of variances: one period of the strides, far from the border."""
    given = ((mean, weight), (var, weight.square()))
    maps = [F.conv_transpose2d(value.view(1, 4, 1, 1).expand(1, 4, 9, 5), k, None, (2, 3), groups=2, dilation=(3, 1))[0] for value, k in given]
    means, variances = (value[:, 10:12, 6:9].flatten(1) for value in maps)
    m, q = means.mean(1), variances.mean(1) + means.var(1, correction=0)
    r = scale / (q + 1e-10).sqrt()
    return (weight.view(2, 2, 3, 4, 3) * r.view(2, 1, 3, 1, 1)).view_as(weight), bias - m * r, m, q


def image(dtype=torch.float64, grad=True):
    """input, mean, var, weight, bias and residual."""
    vectors = [random(4, grad=grad), random(4, least=0.3, grad=grad), random(4, grad=grad), random(4, grad=grad)]
    return [random(2, 4, 3, dtype=dtype, grad=grad), *vectors, random(2, 4, 3, dtype=dtype, grad=grad)]


def of_image(x, mean, var, weight, bias, residual):
    return normops.analytic_norm(x, mean, var, weight, bias, residual=residual, activation="silu")


def written_out(x, mean, var, weight, bias, residual):
    mean, std, weight, bias = (value.unsqueeze(-1) for value in (mean, (var + 1e-5).sqrt(), weight, bias))
    return F.silu((x - mean) / std * weight + bias + residual)


def moments_of(name):
    return lambda mean, var: normops.activation_moments(mean, var, name)


def integrated(mean, var):
    """Of SiLU, by the trapezoid rule."""
    t = torch.linspace(-9, 9, 401, dtype=torch.float64, device=mean.device)
    weight = torch.exp(-t * t / 2) / torch.exp(-t * t / 2).sum()
    y = F.silu(mean.unsqueeze(-1) + var.sqrt().unsqueeze(-1) * t)
    first = (y * weight).sum(-1)
    return first, ((y - first.unsqueeze(-1)).square() * weight).sum(-1)


CALLS = {  # arguments; ours and torch's way
    "relu": (lambda: [random(5), random(5, least=0.3)], moments_of("relu"), rectified),
    "silu": (lambda: [random(5), random(5, least=0.3)], moments_of("silu"), integrated),
    "hardswish": (lambda: [random(5), random(5, least=0.3)], moments_of("hardswish"), lambda *given: maps.moments("hardswish", *given)[:2]),
    "analytic_norm_weight": (layer, of_weight, of_constant_patches),
    "transposed": (transposed, of_transposed, of_constant_images),
    "analytic_norm": (image, of_image, written_out),
}
over_calls = pytest.mark.parametrize("call", CALLS)


def values(results):
    return list(results) if isinstance(results, tuple) else [results]


def loss(function):
    return lambda *given: sum(result.sin().sum() for result in values(function(*given)))


def network(x, mean, var, weight, scale, bias):
    """All three, one after the other."""
    weight, shift, m, q = normops.analytic_norm_weight(weight, mean, var, scale, bias, 2)
    m, q = normops.activation_moments(m, q, "silu")
    return normops.analytic_norm(F.conv2d(x, weight, shift, groups=2), m, q, scale, bias, activation="relu")


def network_inputs(dtype=torch.float64, samples=2, grad=True):
    weight, *vectors, scale, bias = layer(dtype, grad=grad)
    return [random(samples, 4, 5, 5, dtype=dtype, grad=grad), *vectors, weight, scale, bias]


# ---- operators ----


MOMENTS = {  # mean, var, activation and its parameters
    "element": lambda: (random(), random(least=0.3), "silu", ()),
    "broadcast": lambda: (random(3, 1, dtype=torch.float32), random(5, least=0.3), "leaky_relu", (0.2,)),
    "empty": lambda: (random(0), random(0), "hardtanh", (-1.0, 2.0)),
    "sliced": lambda: (vector(4), vector(4, 0.3), "relu", ()),
    "bfloat16": lambda: (random(5, dtype=torch.bfloat16), random(5, least=0.3, dtype=torch.bfloat16), "elu", (1.0, 1.0)),
}
over_dtypes = pytest.mark.parametrize(("layout", "dtype"), [
    ("contiguous", torch.float64), ("channels_last", torch.bfloat16), ("transposed", torch.float32), ("expanded", torch.float64)
], ids=str)  # fmt: skip


@pytest.mark.parametrize("case", MOMENTS)
def test_opcheck_activation_moments(backend, device, case):
    mean, var, *options = MOMENTS[case]()
    mean, var = (value.detach().to(device).requires_grad_() for value in (mean, var))
    opcheck(OPS.activation_moments.default, (mean, var, *options))
    opcheck(OPS.activation_moments_fwd.default, (mean.detach(), var.detach(), *options))


@over_dtypes
def test_opcheck_analytic_norm_weight(backend, device, layout, dtype):
    weight, mean, var, *affine = (value.detach().to(device) for value in layer(dtype, layout))
    scale, bias = (None, None) if layout == "expanded" else affine
    opcheck(OPS.analytic_norm_weight_fwd.default, (weight, mean, var, scale, bias, 2, 1e-10))
    new, shift, stats = OPS.analytic_norm_weight_fwd(weight, mean, var, scale, bias, 2, 1e-10)
    upstream = [torch.randn_like(value) for value in (new, shift, stats)]
    opcheck(OPS.analytic_norm_weight_bwd.default, (*upstream, weight, mean, var, scale, stats, 2, 1e-10))
    leaves = [value if value is None else value.clone().requires_grad_() for value in (weight, mean, var, scale, bias)]
    opcheck(OPS.analytic_norm_weight.default, (*leaves, 2, 1e-10))


def test_opcheck_transposed():
    opcheck(OPS.analytic_norm_weight.default, (*transposed(), 2, 1e-10), {"stride": (2, 3), "dilation": (3, 1)})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_opcheck_analytic_norm(backend, device, dtype):
    x, *vectors, residual = (value.detach().to(device).requires_grad_() for value in image(dtype))
    opcheck(OPS.analytic_norm.default, (x, *vectors), {"activation": "silu", "residual": residual})
    opcheck(OPS.analytic_norm.default, (x[:0].detach().requires_grad_(), *vectors))


@over_calls
@pytest.mark.parametrize("like", ["meta", "fake"])
def test_meta_and_fake(call, like):
    """What they promise is what comes: shapes, strides, dtypes; of gradients too."""
    make, ours, _ = CALLS[call]
    given = make()
    want = values(ours(*given))
    of_given = torch.autograd.grad(loss(ours)(*given), given)
    with FakeTensorMode() if like == "fake" else nullcontext() as mode:
        promised = [mode.from_tensor(value) if mode else value.detach().to("meta").as_strided(value.shape, value.stride()) for value in given]
        promised = [value.detach().requires_grad_() for value in promised]
        found = values(ours(*promised))
        gradients = torch.autograd.grad(loss(ours)(*promised), promised)
    for mine, real in zip((*found, *gradients), (*want, *of_given), strict=True):
        assert (mine.shape, mine.dtype) == (real.shape, real.dtype) and mine.stride() == real.stride()
        assert mine.device.type == ("meta" if like == "meta" else "cpu")


# ---- compilers ----


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile(compiler, fresh_compiler):
    """One graph of everything, forward and backward; one more for other numbers of samples, none for other values. inductor takes seconds each."""
    counter, sizes = CompileCounterWithBackend(compiler), (2, 2, 3, 4) if compiler == "aot_eager" else (2, 2)
    compiled = torch.compile(network, fullgraph=True, backend=counter)
    for samples in sizes:
        given = network_inputs(samples=samples)
        found, want = (function(*given) for function in (compiled, network))
        torch.testing.assert_close(found, want)
        dy = torch.randn_like(want)
        torch.testing.assert_close(torch.autograd.grad(found, given, dy), torch.autograd.grad(want, given, dy))
    assert counter.frame_count == min(2, len(set(sizes)))


def test_compiled_graph_holds_the_operators(fresh_compiler):
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func

    graphs = []

    def keep(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes if getattr(node.target, "namespace", "") == "normops"])
        return make_boxed_func(graph.forward)

    given = network_inputs()
    y = torch.compile(network, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))(*given)
    torch.autograd.grad(y.sum(), given)
    forward, backward = graphs
    assert forward == [f"normops.{name}_fwd.default" for name in ("analytic_norm_weight", "activation_moments", "group_norm")]
    assert backward == [f"normops.{name}_bwd.default" for name in ("group_norm", "analytic_norm_weight")]


def test_export():
    """As three operators, also after it was stored; decomposed for other runtimes with the same result."""

    class Network(torch.nn.Module):
        def forward(self, *given):
            return network(*given)

    given = network_inputs(grad=False)
    program = torch.export.export(Network(), tuple(given))
    held = [str(node.target) for node in program.graph.nodes if getattr(node.target, "namespace", "") == "normops"]
    assert held == [f"normops.{name}.default" for name in ("analytic_norm_weight", "activation_moments", "analytic_norm")]
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for each in (torch.export.load(file), program.run_decompositions()):
        torch.testing.assert_close(each.module()(*given), network(*given))


# ---- transforms and derivatives ----

FUNC = {
    "grad": lambda f, given: torch.func.grad(loss(f), tuple(range(len(given))))(*given),
    "vjp": lambda f, given: torch.func.vjp(loss(f), *given)[1](torch.ones((), dtype=torch.float64)),
    "jvp": lambda f, given: torch.func.jvp(f, tuple(given), tuple(value.cos() for value in given)),
    "jacrev": lambda f, given: torch.func.jacrev(f, tuple(range(len(given))))(*given),
    "jacfwd": lambda f, given: torch.func.jacfwd(f, tuple(range(len(given))))(*given),
    "hessian": lambda f, given: torch.func.hessian(loss(f), (0, 1, 2)[: len(given)])(*given),
    "vmap": lambda f, given: torch.vmap(f)(*(torch.stack((value, value + 0.5, 2 * value)) for value in given)),
    "vmap_last": lambda f, given: torch.vmap(f, (-1,) * len(given), out_dims=-1)(*(torch.stack((value, value + 0.5), -1) for value in given)),
    "vmap_first": lambda f, given: torch.vmap(f, (0, *[None] * (len(given) - 1)))(torch.stack((given[0], given[0] + 1)), *given[1:]),
    "vmap_second": lambda f, given: torch.vmap(f, (None, 0, *[None] * (len(given) - 2)))(given[0], torch.stack((given[1], given[1] + 1)), *given[2:]),
    "vmap_grad": lambda f, given: torch.vmap(torch.func.grad(loss(f), (0, 1)))(*(torch.stack((value, value + 0.5)) for value in given)),
    "grad_vmap": lambda f, given: torch.func.grad(loss(lambda *given: FUNC["vmap"](f, given)), (0, 1))(*given),
}


@pytest.mark.parametrize("transform", FUNC)
@over_calls
def test_func(call, transform):
    """torch.func transforms equal those of torch's own functions; twice, since what the first one leaves behind must not disturb."""
    make, ours, theirs = CALLS[call]
    given = [value.detach() for value in make()]
    if transform.startswith("hessian") and call == "analytic_norm_weight":
        given = [given[0][:, :, :1, :1], *given[1:]]
    for _ in range(2):
        found, want = (tree_leaves(FUNC[transform](function, given)) for function in (ours, theirs))
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours(*given), theirs(*given))


@over_calls
def test_forward_mode(call):
    """Tangents of every argument are carried, never dropped."""
    make, ours, theirs = CALLS[call]
    given = [value.detach() for value in make()]
    found = []
    for function in (ours, theirs):
        with forward_ad.dual_level():
            results = values(function(*(forward_ad.make_dual(value, value.cos()) for value in given)))
            found.append([part.clone() for result in results for part in forward_ad.unpack_dual(result)])
    torch.testing.assert_close(*found)


@over_calls
def test_second_derivatives(call, backend, device):
    """Of every argument: mean and var too."""
    make, ours, theirs = CALLS[call]
    given = [value.detach().to(device).requires_grad_() for value in make()]
    torch.testing.assert_close(ours(*given), theirs(*given))
    assert torch.autograd.gradcheck(ours, given)
    assert torch.autograd.gradgradcheck(ours, given, fast_mode=True)


@over_calls
def test_some_gradients(call, backend, device):
    """Each argument alone has the gradient that it has among all."""
    make, ours, _ = CALLS[call]
    given = [value.detach().to(device).requires_grad_() for value in make()]
    want = torch.autograd.grad(loss(ours)(*given), given)
    for i, value in enumerate(want):
        alone = [other.detach().requires_grad_(i == j) for j, other in enumerate(given)]
        torch.testing.assert_close(torch.autograd.grad(loss(ours)(*alone), alone[i])[0], value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@over_calls
def test_autocast_leaves_dtypes(call, dtype):
    """Statistics and weights keep their precision; who casts them is the layer."""
    make, ours, _ = CALLS[call]
    given = [value.detach().float().requires_grad_() for value in make()]
    want = values(ours(*given))
    with torch.autocast("cpu", dtype):
        found = values(ours(*given))
        gradients = torch.autograd.grad(loss(ours)(*given), given)
    torch.testing.assert_close(found, want, rtol=0, atol=0)
    assert all(value.dtype == torch.float32 for value in gradients)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, backend, device):
    """Same values and gradients however weight and vectors lie; the new weight lies as the old one, if that is dense and in order."""
    given = [value.detach().to(device).requires_grad_() for value in layer(layout=layout)]
    packed = [value.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for value in given]
    found, want = of_weight(*given), of_weight(*packed)
    torch.testing.assert_close(found, want)
    dys = [torch.ones((), dtype=value.dtype, device=device).expand_as(value) for value in want]  # as a sum's gradient
    torch.testing.assert_close(torch.autograd.grad(found, given, dys), torch.autograd.grad(want, packed, dys))
    assert found[0].stride() == (given[0] if layout == "channels_last" else packed[0]).stride()


def test_no_elements(backend, device):
    mean, var = torch.ones(0, 3, device=device, requires_grad=True), torch.ones(3, device=device, requires_grad=True)
    for name in maps.MAPS:
        m, variance = normops.activation_moments(mean, var, name)
        assert m.shape == variance.shape == (0, 3)
        assert [value.shape for value in torch.autograd.grad((m + variance).sum(), (mean, var))] == [(0, 3), (3,)]


def test_operators_know_the_defaults():
    """Of an activation's parameters, as the function."""
    mean, var = random(5, grad=False), random(5, least=0.3, grad=False)
    for name in maps.PARAMETERS:
        torch.testing.assert_close(OPS.activation_moments(mean, var, name), normops.activation_moments(mean, var, name))
