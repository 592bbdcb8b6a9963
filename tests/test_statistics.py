"""Moments of activations against quadrature of the functions themselves, and the weights that they normalize."""

import math

import mpmath
import numpy as np
import pytest
import torch
from torch.nn import functional as F

import normops
from normops import backends, maps, statistics, weights

FUNCTIONS = {  # with their kinks
    "none": (lambda x: x, ()),
    "relu": (F.relu, (0.0,)),
    "leaky_relu": (F.leaky_relu, (0.0,)),
    "abs": (torch.abs, (0.0,)),
    "hardtanh": (F.hardtanh, (-1.0, 1.0)),
    "relu6": (F.relu6, (0.0, 6.0)),
    "hardsigmoid": (lambda x: (x / 6 + 0.5).clamp(0, 1), (-3.0, 3.0)),  # torch's has a derivative of float(1/6)
    "hardswish": (F.hardswish, (-3.0, 3.0)),
    "step": (lambda x: (x > 0).to(x.dtype) + 0 * x, (0.0,)),
    "sign": (torch.sign, (0.0,)),
    "square": (torch.square, ()),
    "exp": (torch.exp, ()),
    "sin": (torch.sin, ()),
    "elu": (F.elu, (0.0,)),
    "selu": (F.selu, (0.0,)),
    "sigmoid": (torch.sigmoid, ()),
    "tanh": (torch.tanh, ()),
    "silu": (F.silu, ()),
    "softplus": (lambda x: F.softplus(x, threshold=40), ()),
    "mish": (F.mish, ()),
    "gelu": (F.gelu, ()),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), ()),
    "erf": (torch.erf, ()),
}
CALLS = [(name, ()) for name in maps.MAPS]
CALLS += [
    ("leaky_relu", (0.3,)),
    ("leaky_relu", (-1.0,)),
    ("leaky_relu", (1.5,)),
    ("hardtanh", (0.5, 0.7)),
    ("elu", (0.5, 2.0)),
    ("elu", (-1.0, 1.0)),
]
IDS = ["-".join(map(str, (name, *parameters))) for name, parameters in CALLS]


def grid(means: int, stds: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """mean in [-10, 10], std in [1e-3, 10]."""
    mean, std = torch.meshgrid(torch.linspace(-10, 10, means).double(), torch.logspace(-3, 1, stds).double(), indexing="ij")
    return mean.flatten().to(device), std.flatten().square().to(device)


def six(name: str, mean: torch.Tensor, var: torch.Tensor, parameters=()) -> torch.Tensor:
    return statistics.activation_moments_fwd(mean, var, name, (*parameters, *maps.PARAMETERS.get(name, ())[len(parameters) :]))


def quadrature(name: str, mean: torch.Tensor, var: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of the torch function by Gauss-Legendre on 48 panels and between kinks."""
    function, kinks = FUNCTIONS[name]
    nodes, weights = (torch.tensor(values, device=mean.device) for values in np.polynomial.legendre.leggauss(64))
    std = var.sqrt().unsqueeze(-1)
    edges = torch.linspace(-9, 9, 49, dtype=torch.float64, device=mean.device).expand(len(mean), -1)
    edges = torch.cat((edges, *(((kink - mean.unsqueeze(-1)) / std).clamp(-9, 9) for kink in kinks)), -1).sort(-1).values.unsqueeze(-1)
    half = edges.diff(dim=1) / 2
    t = edges[:, :-1] + half + half * nodes
    w = half * weights * maps.density(t)
    d = function(mean.view(-1, 1, 1) + std.unsqueeze(-1) * t) - function(mean).view(-1, 1, 1)
    m = (w * d).sum((1, 2), keepdim=True)
    return function(mean) + m.flatten(), (w * (d - m).square()).sum((1, 2))


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found - expected).abs() / expected.abs().clamp_min(1)).max())


@pytest.mark.parametrize("name", maps.MAPS)
def test_moments_are_those_of_the_function(backend, device, name):
    mean, var = grid(21, 17, device)
    m, variance = six(name, mean, var)[:2]
    expected_m, expected_variance = quadrature(name, mean, var)
    if name == "exp":  # beyond, the panels miss the peak of exp(2*x)
        inside = var < 0.25
        mean, var, m, variance, expected_m, expected_variance = (value[inside] for value in (mean, var, m, variance, expected_m, expected_variance))
    assert error(m, expected_m) < 1e-13
    assert float(((variance - expected_variance).abs() / torch.maximum(var, expected_variance)).max()) < 2e-12
    kept = expected_variance > 1e-6 * var
    assert float(((variance - expected_variance).abs() / expected_variance)[kept].max()) < 2e-9


@pytest.mark.parametrize(("name", "parameters"), CALLS, ids=IDS)
def test_six_values_are_the_maps(backend, device, name, parameters):
    mean, var = grid(41, 33, device)
    for found, expected in zip(six(name, mean, var, parameters), maps.moments(name, mean, var, parameters), strict=True):
        assert error(found, expected) < (1e-12 if name in maps.SMOOTH else 1e-13)


def test_element_by_element(backend, device):
    """The step of the quadrature is that of each element."""
    var = torch.tensor([1e-6, 0.5, 100.0, 1e4], dtype=torch.float64, device=device)
    mean = torch.tensor([-0.5, 0.3, 2.0, -30.0], dtype=torch.float64, device=device)
    for name in maps.MAPS:
        if name not in ("exp", "square"):
            together = six(name, mean, var)
            alone = torch.cat([six(name, mean[i : i + 1], var[i : i + 1]) for i in range(4)], 1)
            assert error(together, alone) < 2e-13, name


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "abs"])
def test_tails_keep_their_digits(backend, device, name):
    """Against mpmath with 60 digits, relative to each value: the naive E f^2 - m^2 has none in the tail."""
    a = torch.linspace(-36, 8, 45, dtype=torch.float64)
    found = six(name, a.to(device), torch.ones_like(a).to(device)).cpu()
    tolerance = 1e-9 if backend == "reference" else 4e-13
    slope = {"relu": 0, "leaky_relu": mpmath.mpf(0.01), "abs": -1}[name]
    with mpmath.workdps(60):
        for i, mean in enumerate(map(mpmath.mpf, a.tolist())):
            phi, cdf = mpmath.npdf(mean), mpmath.erfc(-mean / mpmath.sqrt(2)) / 2
            g = phi + mean * cdf
            first = slope * mean + (1 - slope) * g
            second = slope**2 * (mean**2 + 1) + (1 - slope**2) * ((mean**2 + 1) * cdf + mean * phi)
            for value, expected in zip(found[:2, i].tolist(), (first, second - first**2), strict=True):
                assert abs(value / expected - 1) < tolerance, float(mean)


@pytest.mark.parametrize(("name", "parameters"), CALLS, ids=IDS)
def test_no_variance(backend, device, name, parameters):
    mean = torch.tensor([-4.0, -0.7, 0.25, 0.6, 9.0], dtype=torch.float64, device=device, requires_grad=True)
    f = maps.MAPS[name](mean, torch.full_like(mean, 1e-300), *parameters)[0] if parameters else FUNCTIONS[name][0](mean)
    (slope,) = torch.autograd.grad(f.sum(), mean, allow_unused=True)
    slope = torch.zeros_like(mean) if slope is None else slope
    for var in (0.0, 1e-310, 1e-41):
        m, variance, m_mu, m_v, v_mu, v_v = six(name, mean.detach(), torch.full_like(mean, var), parameters)
        assert error(m, f.detach()) < 4e-15
        assert error(m_mu, slope) < 4e-15
        assert error(v_v, slope.square()) < 4e-15
        assert not variance.any() and not m_v.any() and not v_mu.any()
    nothing = torch.zeros(1, dtype=torch.float64, device=device)
    assert six(name, nothing, nothing, parameters).float().isfinite().all()


@pytest.mark.parametrize("name", [name for name in maps.MAPS if name not in ("exp", "square")])
def test_huge_and_nan(backend, device, name):
    """Finite where the result is; nan spoils its own element only."""
    if backend == "reference" and name in ("gelu", "gelu_tanh"):
        pytest.skip("squares of 1e200 overflow in the second derivative")
    mean, var = (value.flatten().to(device) for value in torch.meshgrid(
        torch.tensor([-1e200, -1e20, -300.0, 0.0, 1e-200, 300.0, 1e200], dtype=torch.float64),
        torch.tensor([1.1e-40, 1e-20, 1.0, 1e6, 1e20, 1e200], dtype=torch.float64), indexing="ij"))  # fmt: skip
    found = six(name, mean, var)
    assert found.isfinite().all()
    assert (found[1] >= 0).all()
    nan = math.nan
    mean, var = torch.tensor([[nan, 1.0, 0.5], [1.0, nan, 90.0]], dtype=torch.float64, device=device)
    found = six(name, mean, var)
    assert found[0, 0].isnan() and found[1, 1].isnan()
    assert error(found[:, 2], six(name, mean[2:], var[2:])[:, 0]) < 1e-13


@pytest.mark.parametrize("name", ["relu", "hardtanh", "hardswish", "elu", "gelu", "tanh"])
def test_activation_gradients(backend, device, name):
    mean, var = torch.randn(5, dtype=torch.float64), torch.rand(5, dtype=torch.float64).add_(0.3)
    mean, var = mean.to(device).requires_grad_(), var.to(device).requires_grad_()
    assert torch.autograd.gradcheck(lambda *given: normops.activation_moments(*given, name), (mean, var))
    assert torch.autograd.gradgradcheck(lambda *given: normops.activation_moments(*given, name), (mean, var))


def test_activation_dtypes_and_shapes(backend, device):
    mean, var = torch.randn(3, 1, 4, device=device), torch.rand(2, 4, dtype=torch.float16, device=device)
    m, variance = normops.activation_moments(mean, var, "silu")
    assert (m.dtype, variance.dtype, m.shape) == (torch.float32, torch.float16, (3, 2, 4))
    expected = maps.moments("silu", *torch.broadcast_tensors(mean.double(), var.double()))
    torch.testing.assert_close(m, expected[0].float())
    torch.testing.assert_close(variance, expected[1].half())
    assert normops.activation_moments(mean[:0], var[:1], "relu")[0].shape == (0, 1, 4)


# ---- weights ----

WEIGHTS = {  # shape, groups, channels last
    "conv": ((8, 3, 3, 3), 1, False),
    "conv channels last": ((8, 5, 3, 3), 1, True),
    "several blocks": ((75, 40, 3), 1, False),
    "linear": ((37, 65), 1, False),
    "long rows": ((6, 20000), 1, False),
    "longer than a chunk": ((5, 1030, 3, 3), 1, True),
    "groups": ((12, 5, 2, 2), 4, False),
    "groups channels last": ((70, 6, 3), 2, True),
    "large groups": ((96, 4, 3), 2, False),
    "depthwise": ((70, 1, 3, 3), 70, False),
    "depthwise one tap": ((9, 1), 9, False),
    "rows of one": ((300, 1), 1, False),
    "one": ((1, 1, 1), 1, False),
}


def given(key: str, dtype: torch.dtype, device: str, requires_grad: bool = False):
    shape, groups, last = WEIGHTS[key]
    weight = torch.randn(shape, dtype=torch.float64).to(dtype)
    if last:
        weight = weight.movedim(1, -1).contiguous().movedim(-1, 1)
    mean, var = torch.randn(shape[1] * groups, dtype=torch.float64), torch.rand(shape[1] * groups, dtype=torch.float64)
    scale, bias = torch.rand(shape[0]).half().add_(0.5), torch.randn(shape[0], dtype=torch.float64)
    return [value.to(device).requires_grad_(requires_grad) for value in (weight, mean, var, scale, bias)], groups


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("key", WEIGHTS)
def test_weight(backend, device, poison, key, dtype):
    """Values and gradients against the formulas in float64 under autograd."""
    leaves, groups = given(key, dtype, device, requires_grad=True)
    results = normops.analytic_norm_weight(*leaves, groups=groups)
    assert results[0].stride() == leaves[0].stride() and results[0].dtype == results[1].dtype == dtype
    upstream = [torch.randn_like(result) for result in results]
    gradients = torch.autograd.grad(results, leaves, upstream)

    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = weights.analytic_norm_weight(*wide, groups, 1e-10)
    expected_gradients = torch.autograd.grad(expected, wide, [value.double() for value in upstream])
    rounding = torch.finfo(dtype).eps
    for found, value in zip((*results, *gradients), (*expected, *expected_gradients), strict=True):
        sums = 1e-12 if dtype == torch.float64 else 1e-5  # of the largest: float sums of terms that cancel
        largest = float(value.detach().abs().max())
        torch.testing.assert_close(found.double(), value, rtol=4 * max(rounding, torch.finfo(found.dtype).eps), atol=sums * largest)


def test_weight_gradients(backend, device):
    leaves, groups = given("groups", torch.float64, device, requires_grad=True)
    leaves[3] = leaves[3].detach().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda *leaves: normops.analytic_norm_weight(*leaves, groups=groups), leaves)
    assert torch.autograd.gradgradcheck(lambda *leaves: normops.analytic_norm_weight(*leaves, groups=groups), leaves)


def test_weight_norm(backend, device):
    """With mean 0 and variance 1 it is torch's weight norm, and the gradient is orthogonal to the weight."""
    weight = torch.randn(16, 8, 3, device=device, requires_grad=True)
    scale = torch.rand(16, device=device)
    found, shift, m, q = normops.analytic_norm_weight(weight, torch.zeros(8, device=device), torch.ones(8, device=device), scale)
    torch.testing.assert_close(found, torch._weight_norm(weight, scale.view(-1, 1, 1), 0))
    assert not shift.any() and not m.any()
    torch.testing.assert_close(q, weight.double().square().sum((1, 2)))
    (gradient,) = torch.autograd.grad(found.pow(3).sum(), weight)
    along = (weight * gradient).sum((1, 2)) / (weight.norm(dim=(1, 2)) * gradient.norm(dim=(1, 2)))
    assert float(along.detach().abs().max()) < 1e-6


def test_outputs_have_scale_and_bias(backend, device):
    (weight, mean, var, scale, bias), groups = given("groups", torch.float64, device)
    new, shift, _, _ = normops.analytic_norm_weight(weight, mean, var, scale, bias, groups, eps=0.0)
    _, _, m, q = normops.analytic_norm_weight(new, mean, var, groups=groups)
    torch.testing.assert_close(m + shift, bias)
    torch.testing.assert_close(q, scale.double().square())


def test_sizes_beyond_float_squares(backend, device):
    mean, var = torch.tensor([[1e-3, 2.0, 0.5], [0.5, 1.0, 2.0]], device=device)
    for size in (1e-25, 1e25):
        weight = torch.randn(20, 3, 6, device=device) * size
        new, shift, m, q = normops.analytic_norm_weight(weight, mean, var, eps=0.0)
        expected = weights.analytic_norm_weight(weight, mean, var, None, None, 1, 0.0)
        for found, value in zip((new, shift, m, q), expected, strict=True):
            torch.testing.assert_close(found, value, atol=0, rtol=1e-4)
    weight[3, 1, 2] = math.nan
    new, shift, m, q = normops.analytic_norm_weight(weight, mean, var)
    for result in (new.flatten(1), shift.view(-1, 1), m.view(-1, 1), q.view(-1, 1)):
        assert result[3].isnan().all() and result[:3].isfinite().all() and result[4:].isfinite().all()


@pytest.mark.parametrize("key", ["several blocks", "long rows", "depthwise", "groups channels last"])
def test_thread_count_changes_nothing(key):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            leaves, groups = given(key, torch.float32, "cpu", requires_grad=True)
            found = normops.analytic_norm_weight(*leaves, groups=groups)
            moments = normops.activation_moments(torch.randn(300), torch.rand(300), "silu")
            results.append([*found, *torch.autograd.grad([value.square().sum() for value in found], leaves), *moments])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for others in results[1:] for a, b in zip(results[0], others, strict=True))


ERRORS = {
    "negative variance": (lambda: normops.activation_moments(torch.zeros(2), torch.tensor([1.0, -1.0]), "relu"), ValueError, "var >= 0, got -1"),
    "activation": (lambda: normops.activation_moments(torch.zeros(2), torch.ones(2), "swish"), ValueError, "relu.*got 'swish'"),
    "parameters": (
        lambda: normops.activation_moments(torch.zeros(2), torch.ones(2), "relu", (1.0,)),
        ValueError,
        "at most 0 parameters of relu, got 1",
    ),
    "dtype": (lambda: normops.activation_moments(torch.zeros(2, dtype=torch.int64), torch.ones(2), "relu"), TypeError, "mean.*int64"),
    "broadcast": (lambda: normops.activation_moments(torch.zeros(2), torch.ones(3), "relu"), ValueError, r"\(2,\) and \(3,\)"),
    "weight rank": (lambda: normops.analytic_norm_weight(torch.ones(3), torch.ones(3), torch.ones(3)), ValueError, r"\(3,\)"),
    "weight groups": (lambda: normops.analytic_norm_weight(torch.ones(3, 2), torch.ones(4), torch.ones(4), groups=2), ValueError, "2 groups"),
    "weight dtype": (lambda: normops.analytic_norm_weight(torch.ones(3, 2).int(), torch.ones(2), torch.ones(2)), TypeError, "int32"),
    "mean shape": (lambda: normops.analytic_norm_weight(torch.ones(3, 2), torch.ones(3), torch.ones(2)), ValueError, r"mean of shape \(2,\)"),
    "scale shape": (lambda: normops.analytic_norm_weight(torch.ones(3, 2), torch.ones(2), torch.ones(2), torch.ones(2)), ValueError, "scale"),
    "eps": (lambda: normops.analytic_norm_weight(torch.ones(3, 2), torch.ones(2), torch.ones(2), eps=-1.0), ValueError, "eps >= 0"),
    "empty": (lambda: normops.analytic_norm_weight(torch.ones(0, 2), torch.ones(2), torch.ones(2)), ValueError, "with elements"),
    "max count": (lambda: normops.max_pool_moments(torch.zeros(2), torch.ones(2), 0), ValueError, "count >= 1"),
}


@pytest.mark.parametrize("key", ERRORS)
def test_errors(key):
    call, kind, message = ERRORS[key]
    with pytest.raises(kind, match=message):
        call()


def test_the_kernels_run():
    """Not the backend that the others fall back to."""
    if backends.unavailable("cpu") is None:
        assert backends._candidates("activation_moments_fwd", "cpu", None)[0].__module__ == "normops.cpu"
