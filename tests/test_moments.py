"""Moments: the type, maxima and softmax of normal variables, those of inputs, reports of how well they propagate, errors."""

import copy
import math

import mpmath
import pytest
import torch
from torch import Tensor, nn

import normops
from normops import analytic
from normops.analytic import Moments, propagate


def test_the_type():
    given = Moments(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.0]), (2, 3, 4))
    assert given.mean.dtype == given.var.dtype == torch.float64
    assert given.mean.shape == (2, 1, 1) and given.uniform and given.check() is given
    assert given.dense().mean.shape == (2, 3, 4) and not given.dense().uniform
    assert (given.shape, given.size(1), given.dim(), given.ndim, given.numel()) == ((1, 2, 3, 4), 2, 4, 4, 24)
    assert repr(given) == "Moments(mean=1..2, var=0..0.5, sample=(2, 3, 4))"
    with pytest.raises(AttributeError):
        given.mean = torch.zeros(2)
    whole = Moments(torch.randn(2, 3, 4).double(), torch.rand(2, 3, 4).double())
    own = whole.channels()
    values = torch.stack([whole.mean + whole.std, whole.mean - whole.std])  # two samples with these moments
    var, mean = torch.var_mean(values, (0, 2, 3), correction=0)
    torch.testing.assert_close((own.mean.flatten(), own.var.flatten()), (mean, var), rtol=1e-14, atol=1e-14)
    assert own.sample == whole.sample


# ---- the larger of two, the largest of several ----

PAIRS = [  # mean, variance, mean, variance, correlation
    (0.3, 1.2, -0.5, 0.7, 0.0),
    (0.3, 1.2, -0.5, 0.7, 0.6),
    (-1.0, 2.0, 1.0, 0.1, -0.9),
    (0.2, 1.0, 0.2, 1.0, -1.0),
    (0.2, 4.0, 0.5, 1.0, 1.0),
    (30.0, 1.0, 0.0, 2.0, 0.3),
    (0.5, 1.5, 0.25, 0.0, 0.7),
    (-0.1, 1e-6, 0.1, 1e-6, 0.0),
]


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_clark(pair):
    """max(X, Y) = (S + |D|)/2 with the normal sum S and difference D: E S|D| and E |D| by quadrature in D."""
    mean, var, other_mean, other_var, correlation = map(mpmath.mpf, pair)
    with mpmath.workdps(30):
        covariance = correlation * mpmath.sqrt(var * other_var)
        d, s = mean - other_mean, mean + other_mean
        d_var, s_var = var + other_var - 2 * covariance, var + other_var + 2 * covariance
        slope, std = (var - other_var) / d_var, mpmath.sqrt(d_var)
        inside = sorted({mpmath.mpf(-12), min(max(-d / std, -12), 12), mpmath.mpf(0), mpmath.mpf(12)})
        size, cross = (
            mpmath.quad(lambda t, f=f: mpmath.npdf(t) * abs(d + std * t) * f(t), inside) for f in (lambda t: 1, lambda t: s + slope * std * t)
        )
        m = (s + size) / 2
        variance = (s**2 + s_var + 2 * cross + d**2 + d_var) / 4 - m**2
    found = normops.max_moments(*torch.tensor(pair[:4], dtype=torch.float64), pair[4])
    assert abs(float(found[0]) - m) < 1e-14 * max(1, abs(m))
    assert abs(float(found[1]) - variance) < 1e-14 * max(var, other_var)


def test_larger_of_two_that_differ_by_a_constant():
    """Then the larger mean's."""
    found = normops.max_moments(*torch.tensor([[0.3, 0.1], [2.0, 0.0], [0.1, 0.4], [2.0, 0.0]]), torch.tensor([1.0, 0.5]))
    assert torch.equal(torch.stack(found), torch.tensor([[0.3, 0.4], [2.0, 0.0]]))


def test_gradients_of_maxima():
    given = [torch.randn(4, dtype=torch.float64, requires_grad=True), torch.rand(4, dtype=torch.float64).add(0.3).requires_grad_()]
    given += [torch.randn(4, dtype=torch.float64, requires_grad=True), torch.rand(4, dtype=torch.float64).add(0.3).requires_grad_()]
    correlation = torch.linspace(-0.8, 0.8, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(normops.max_moments, (*given, correlation))
    assert torch.autograd.gradgradcheck(normops.max_moments, (*given, correlation))
    assert torch.autograd.gradcheck(lambda mean, var: normops.max_pool_moments(mean, var, 9, 0.3), given[:2])
    assert torch.autograd.gradcheck(normops.softmax_mean, given[:2])
    assert torch.autograd.gradgradcheck(normops.argmax_probabilities, given[:2])
    certain = [value.detach().clone().zero_().requires_grad_() for value in given]
    for results in (normops.max_moments(*certain), normops.max_pool_moments(*certain[:2], 4), [normops.argmax_probabilities(*certain[:2])]):
        gradients = torch.autograd.grad([value.sum() for value in results], certain, allow_unused=True)
        assert all(value.isfinite().all() for value in (*results, *(g for g in gradients if g is not None)))


@pytest.mark.parametrize("count", [1, 2, 3, 9, 49, 784])
def test_largest_of_several(count):
    """Order statistics by quadrature: density n*phi*Phi^(n-1)."""
    with mpmath.workdps(20):
        first, second = (
            mpmath.quad(lambda t, k=k: t**k * count * mpmath.npdf(t) * mpmath.ncdf(t) ** (count - 1), [-12, -4, 0, 1, 2, 3, 4, 6, 12]) for k in (1, 2)
        )
    mean, var = torch.tensor([0.3, -2.0, 1.0]).double(), torch.tensor([1.0, 0.04, 0.0]).double()
    for correlation in (0.0, 0.3, 1.0):
        found = normops.max_pool_moments(mean, var, count, correlation)
        torch.testing.assert_close(found[0], mean + var.sqrt() * math.sqrt(1 - correlation) * float(first), rtol=0, atol=1e-13)
        share = correlation + (1 - correlation) * float(second - first**2)
        torch.testing.assert_close(found[1], var * share, rtol=1e-13, atol=1e-13)


def test_largest_of_correlated_samples():
    """5 standard errors; the fourth moment of a maximum is below 5 of its squared variance."""
    noise = torch.randn(200000, 7, dtype=torch.float64)
    x = 0.5 + 2 * (math.sqrt(0.4) * noise[:, :1] + math.sqrt(0.6) * noise[:, 1:])
    var, mean = torch.var_mean(x.amax(1))
    found = normops.max_pool_moments(torch.tensor(0.5).double(), torch.tensor(4.0).double(), 6, 0.4)
    assert abs(found[0] - mean) < 5 * (var / len(x)).sqrt()
    assert abs(found[1] / var - 1) < 5 * math.sqrt(4 / len(x))


def problems(n: int, count: int) -> tuple[Tensor, Tensor]:
    """Those of softmax_mean's documentation."""
    return 2 * torch.randn(count, n, dtype=torch.float64), torch.exp(4 * torch.rand(count, n, dtype=torch.float64) - 2)


@pytest.mark.parametrize(("ratio", "error"), [(1, 1e-6), (100, 1e-6), (1000, 2e-3), (1e6, 2e-2)])
def test_argmax_of_two(ratio, error):
    """Phi of the difference; errors as documented."""
    mean = torch.randn(500, 2, dtype=torch.float64)
    var = torch.tensor([0.5, 0.5 * ratio], dtype=torch.float64)
    expected = torch.special.ndtr((mean[:, 0] - mean[:, 1]) / var.sum().sqrt())
    found = normops.argmax_probabilities(mean, var)
    torch.testing.assert_close(found, torch.stack([expected, 1 - expected], 1), rtol=0, atol=error)


@pytest.mark.parametrize("n", [3, 10])
def test_argmax_probabilities(n):
    """Against samples: 5 standard errors."""
    mean, var = problems(n, 4)
    samples = 100000
    winner = (mean + var.sqrt() * torch.randn(samples, 4, n, dtype=torch.float64)).argmax(-1)
    expected = nn.functional.one_hot(winner, n).double().mean(0)
    found = normops.argmax_probabilities(mean, var)
    assert ((found - expected).abs() < 5 * (found * (1 - found) / samples).sqrt() + 1e-6).all()
    torch.testing.assert_close(found.sum(-1), torch.ones(4).double(), rtol=0, atol=1e-14)
    torch.testing.assert_close(normops.argmax_probabilities(mean.T, var.T, dim=0).T, found)


@pytest.mark.parametrize(("n", "typical", "largest"), [(2, 0.005, 0.02), (3, 0.005, 0.02), (10, 0.006, 0.05), (100, 0.003, 0.12)])
def test_softmax_mean(n, typical, largest):
    """Errors as documented, and those of the samples: a probability's deviation is at most 0.5 and typically much less."""
    mean, var = problems(n, 1000 // n)
    samples = 4000
    sampled = sum(torch.softmax(mean + var.sqrt() * torch.randn_like(mean), -1) for _ in range(samples)) / samples
    error = (normops.softmax_mean(mean, var) - sampled).abs()
    assert error.mean() < typical + 0.25 / samples**0.5
    assert error.max() < largest + 4 * 0.5 / samples**0.5


def test_softmax_of_equals():
    mean, var = torch.full((2, 5), 0.7), torch.full((5,), 2.0)
    for function in (normops.softmax_mean, normops.argmax_probabilities):
        torch.testing.assert_close(function(mean, var), torch.full((2, 5), 0.2))
        certain = function(torch.tensor([0.0, 30.0, 1.0]), torch.zeros(3))
        torch.testing.assert_close(certain, torch.tensor([0.0, 1.0, 0.0]), rtol=0, atol=1e-5)


# ---- moments of inputs ----


def batches(x: Tensor, *sizes: int) -> list[Tensor]:
    return list(x.split(sizes))


def images(count: int = 40, size: int = 7) -> Tensor:
    """Three channels whose positions and neighbours are correlated."""
    noise = torch.randn(count, 3, size + 3, size + 3, dtype=torch.float64)
    mixed = torch.einsum("oc,nchw->nohw", torch.randn(3, 3, dtype=torch.float64), noise)
    return nn.functional.avg_pool2d(mixed, 4, stride=1) * torch.rand(3, size, size, dtype=torch.float64) + torch.randn(3, 1, 1, dtype=torch.float64)


def assert_statistics(mean: Tensor, var: Tensor, expected_mean: Tensor, expected_var: Tensor, rtol: float = 1e-12) -> None:
    torch.testing.assert_close(mean, expected_mean, rtol=rtol, atol=1e-12)
    torch.testing.assert_close(var, expected_var, rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("sizes", [(40,), (1, 30, 9), (7, 0, 33), (0, 40)], ids=str)
@pytest.mark.parametrize("as_tuples", [False, True])
def test_input_moments(sizes, as_tuples):
    """The statistics of all samples at once, in any batches, also empty ones, with labels or without."""
    x = images()
    loader = [(batch, torch.zeros(len(batch))) if as_tuples else batch for batch in batches(x, *sizes)]
    found = analytic.input_moments(iter(loader), progress=False)
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
    assert found.sample == (3, 7, 7) and found.patch is None
    assert_statistics(found.mean, found.var, mean[0], var[0])
    found = analytic.input_moments(loader, "position", progress=False)
    var, mean = torch.var_mean(x, 0, correction=0)
    assert_statistics(found.mean, found.var, mean, var)


@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(3, 1, 1), ((2, 3), (2, 1), (1, 2)), (2, 3, 2), (7, 1, 1), (1, 1, 1)])
def test_patches(kernel, stride, dilation):
    x = images()
    found = analytic.input_moments(batches(x, 1, 30, 9), "patch", kernel_size=kernel, stride=stride, dilation=dilation, progress=False)
    rows = nn.functional.unfold(x, kernel, stride=stride, dilation=dilation).transpose(1, 2).flatten(0, 1)
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
    assert_statistics(found.mean, found.var, mean[0], var[0])
    assert_statistics(*found.patch, rows.mean(0), torch.cov(rows.T, correction=0))


@pytest.mark.parametrize("layer", [nn.Conv1d(3, 8, 5, stride=2), nn.Conv2d(3, 8, 3, dilation=2), nn.Conv3d(2, 4, 2)], ids=str)
def test_the_first_convolution_is_exact(layer):
    """From the covariance of patches; from variances alone it is far off where neighbours are correlated."""
    layer = layer.double()
    inputs = layer.in_channels
    x = torch.randn(50, inputs, *(9,) * (layer.weight.dim() - 2), dtype=torch.float64).cumsum(-1).cumsum(-2)
    options = {"kernel_size": layer.kernel_size, "stride": layer.stride, "dilation": layer.dilation}
    with torch.no_grad():
        y = layer(x).transpose(0, 1).flatten(1)
        var, mean = torch.var_mean(y, 1, correction=0)
        found = propagate(layer, analytic.input_moments(batches(x, 20, 30), "patch", **options, progress=False))
        plain = propagate(layer, analytic.input_moments(batches(x, 20, 30), progress=False))
    assert_statistics(found.mean.flatten(), found.var.flatten(), mean, var, 1e-11)
    assert (plain.var.flatten() / var - 1).abs().max() > 0.3


def test_far_from_zero():
    """With a mean of 10^6 standard deviations: a mean is off by some of its roundings (1.2e-10), a variance by as much."""
    noise = torch.randn(1000, 4, 5, dtype=torch.float64)
    x = noise + 1e6
    found = analytic.input_moments(batches(x, 1, 400, 599), "position", progress=False)
    var, mean = torch.var_mean(x - 1e6, 0, correction=0)
    torch.testing.assert_close(found.mean - 1e6, mean, rtol=0, atol=5e-10)
    torch.testing.assert_close(found.var, var, rtol=1e-10, atol=0)
    found = analytic.input_moments(batches(x, 1, 400, 599), "patch", kernel_size=2, progress=False)
    rows = (x - 1e6).unfold(2, 2, 1).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    torch.testing.assert_close(found.patch[1], torch.cov(rows.T, correction=0), rtol=0, atol=1e-10)


def test_inputs_of_other_types():
    """Integers, float32, vectors: in float64."""
    x = torch.randint(0, 255, (30, 3, 4, 4), dtype=torch.uint8)
    found = analytic.input_moments([x], progress=False)
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    assert_statistics(found.mean.flatten(), found.var.flatten(), mean, var)
    x = torch.randn(30, 5)
    for kind in ("channel", "position"):
        found = analytic.input_moments([x[:10], x[10:]], kind, progress=False)
        assert_statistics(found.mean, found.var, x.double().mean(0), x.double().var(0, correction=0))


def test_progress(capsys):
    pytest.importorskip("tqdm")
    analytic.input_moments([torch.randn(4, 3)] * 2)
    assert "input moments" in capsys.readouterr().err
    analytic.input_moments([torch.randn(4, 3)] * 2, progress=False)
    assert capsys.readouterr().err == ""


# ---- reports ----


class Model(nn.Module):
    """With a layer that is called twice, one that is not called, and a constant."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()
        self.unused, self.drop, self.head = nn.Linear(2, 2), nn.Dropout(), nn.Linear(6, 4)
        self.nothing = nn.ReLU()

    def forward(self, x):
        x = self.act(self.norm(self.conv(x)))
        x = self.head(self.drop(self.act(x).mean((2, 3)) if isinstance(x, Tensor) else torch.mean(self.act(x), (2, 3))))
        return x + self.nothing(0 * x - 1e3)


def test_report():
    """Its figures are those of the outputs of each module's first call, in evaluation, over all samples."""
    model, x = Model(), images(60).float()
    model.norm.eval()
    before = copy.deepcopy(model.state_dict()), [(module.training, dict(module._forward_hooks)) for module in model.modules()]
    found = analytic.report(model, [(batch, 0) for batch in batches(x, 1, 40, 19)], progress=False)
    assert found.samples == 60 * 49
    assert [row.name for row in found.rows] == ["conv", "norm", "act", "drop", "head", "nothing"]
    assert [(module.training, dict(module._forward_hooks)) for module in model.modules()] == before[1]
    assert all(torch.equal(value, before[0][name]) for name, value in model.state_dict().items())

    given, model = analytic.input_moments([x], progress=False), model.eval()
    with torch.no_grad():
        outputs = {"conv": model.conv(x)}
        outputs["norm"] = model.norm(outputs["conv"])
        outputs["act"] = model.act(outputs["norm"])
        outputs["head"] = model.head(outputs["act"].mean((2, 3)))
        expected = {"conv": propagate(model.conv, given)}
        expected["norm"] = propagate(model.norm, expected["conv"])
        expected["act"] = propagate(model.act, expected["norm"])
        expected["head"] = propagate(nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.head), expected["act"])
    for row in found.rows:
        if row.name in outputs:
            var, mean = torch.var_mean(outputs[row.name].double().transpose(0, 1).flatten(1), 1, correction=0)
            error = (expected[row.name].mean.flatten() - mean) / var.sqrt()
            ratio = expected[row.name].std.flatten() / var.sqrt()
            figures = error.square().mean().sqrt(), error.abs().max(), ratio.log().mean().exp(), ratio.quantile(0.05), ratio.quantile(0.95)
            assert row.units == len(mean) and row.kind == type(getattr(model, row.name)).__name__
            for value, figure in zip((row.mean, row.mean_worst, row.std, row.std_low, row.std_high), figures, strict=True):
                assert value == pytest.approx(float(figure), rel=1e-4, abs=1e-4)  # of float32 outputs
    assert math.isnan(found.rows[-1].mean), "nothing varies there"


def test_report_as_text_and_picture(tmp_path):
    model = nn.Sequential(nn.Linear(5, 7), nn.Sigmoid(), nn.Linear(7, 3))
    found = analytic.report(model, [torch.randn(200, 5)], progress=False)
    head, *lines = str(found).splitlines()
    assert "200 samples" in head and "mean error" in head and len(lines) == 3
    for row, line in zip(found.rows, lines, strict=True):
        name, kind, units, *figures = line.replace("..", " ").split()
        assert (name, kind, int(units)) == (row.name, row.kind, row.units)
        assert [float(value) for value in figures] == pytest.approx([row.mean, row.mean_worst, row.std, row.std_low, row.std_high], abs=6e-4)
    pytest.importorskip("matplotlib")
    found.plot(str(tmp_path / "report.png"))
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_report_of_a_normalized_model():
    """Its assumptions are those of the normalization, and it computes afterwards what it did before."""
    x = images(200).float()
    given = analytic.input_moments([x], "patch", kernel_size=3, progress=False)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
    analytic.normalize(model, given, preserve=False)
    before = copy.deepcopy(model.state_dict()), model(x)
    found = analytic.report(model, [x], given, progress=False)
    assert [row.kind for row in found.rows] == ["Conv2d", "ReLU", "Conv2d", "ReLU"]
    assert found.rows[0].mean < 1e-5 and found.rows[0].std == pytest.approx(1, abs=1e-5), "patches make the first layer exact"
    assert torch.equal(model(x), before[1])
    assert all(torch.equal(value, before[0][name]) for name, value in model.state_dict().items())
    y = model(x)
    y.sum().backward()
    assert model[0].scale.grad is not None


# ---- errors, of one sentence each ----

VECTOR, MAP = Moments(torch.zeros(6), torch.ones(6)), Moments(torch.zeros(4), torch.ones(4), (4, 8, 8))
ERRORS = {
    "negative variance": (lambda: propagate(torch.relu, Moments(torch.zeros(2), torch.tensor([1.0, -0.5]))), ValueError, "var >= 0, got -0.5"),
    "mean not finite": (lambda: propagate(torch.relu, Moments(torch.tensor([0.0, torch.nan]), torch.ones(2))), ValueError, "finite mean, got nan"),
    "var not finite": (lambda: propagate(torch.relu, Moments(torch.zeros(1), torch.tensor([torch.inf]))), ValueError, "finite var, got inf"),
    "mean and var": (lambda: Moments(torch.zeros(3), torch.zeros(4)), ValueError, r"broadcast.*\(3,\) and \(4,\)"),
    "sample": (lambda: Moments(torch.zeros(3), torch.zeros(3), (4, 2, 2)), ValueError, r"mean.*\(4, 2, 2\).*got \(3, 1, 1\)"),
    "a tensor": (lambda: propagate(torch.relu, torch.zeros(3)), TypeError, "expected Moments, got Tensor"),
    "padding": (lambda: propagate(torch.relu, VECTOR, padding="zeros"), ValueError, "ignore, coverage, got 'zeros'"),
    "pooling": (lambda: propagate(torch.relu, VECTOR, pooling=-0.1), ValueError, r"pooling in \[0, 1\], got -0.1"),
    "residual": (lambda: propagate(torch.relu, VECTOR, residual=1.5), ValueError, r"residual in \[-1, 1\], got 1.5"),
    "unknown layer": (lambda: propagate(nn.Softmax(1), VECTOR), NotImplementedError, r"no rule for softmax.*@propagate\.register"),
    "unknown function": (lambda: propagate(lambda x: x.cumsum(1), VECTOR), NotImplementedError, r"no rule for cumsum.*@propagate\.register"),
    "unknown attribute": (lambda: propagate(lambda x: x.T, VECTOR), AttributeError, "no T"),
    "linear": (lambda: propagate(nn.Linear(8, 3), VECTOR), ValueError, r"8 features in linear.*\(6,\)"),
    "linear of one": (lambda: propagate(nn.Linear(8, 3), Moments(torch.zeros(1), torch.ones(1), (6,))), ValueError, r"8 features in linear.*\(6,\)"),
    "conv": (lambda: propagate(nn.Conv2d(3, 3, 3), MAP), ValueError, r"3 channels in conv2d.*\(4, 8, 8\)"),
    "kernel": (lambda: propagate(nn.Conv2d(4, 3, 9), MAP), ValueError, r"conv2d.*\(4, 8, 8\)"),
    "transposed": (lambda: propagate(nn.ConvTranspose2d(3, 3, 3), MAP), ValueError, r"3 channels in conv_transpose2d.*\(4, 8, 8\)"),
    "batch norm": (lambda: propagate(nn.BatchNorm2d(3), MAP), ValueError, r"3 channels in batch_norm.*\(4, 8, 8\)"),
    "group norm": (lambda: propagate(lambda x: nn.functional.group_norm(x, 3), MAP), ValueError, r"3 groups.*\(4, 8, 8\)"),
    "layer norm": (lambda: propagate(nn.LayerNorm(5), MAP), ValueError, r"ends in \(5,\).*\(4, 8, 8\)"),
    "modulation": (lambda: propagate(lambda x: normops.group_norm(x, 2, scale=torch.ones(1, 4)), MAP), NotImplementedError, "neither scale"),
    "sum": (lambda: propagate(lambda x: x + torch.ones(5), VECTOR), ValueError, r"broadcast.*\(6,\) and \(5,\)"),
    "sum of two": (lambda: propagate(lambda x: x[:, 1:] * x[:, :4], VECTOR), ValueError, r"broadcast.*\(5,\) and \(4,\)"),
    "samples that differ": (lambda: propagate(lambda x: x + torch.ones(2, 6), VECTOR), ValueError, r"same for every sample.*\(2, 6\)"),
    "random divisor": (lambda: propagate(lambda x: x / x, VECTOR), NotImplementedError, "divisor that is not random"),
    "power": (lambda: propagate(lambda x: x**3, VECTOR), NotImplementedError, "exponent 2, got 3"),
    "divisor": (lambda: propagate(nn.AvgPool2d(2, divisor_override=3), MAP), NotImplementedError, "divisor_override"),
    "slopes": (lambda: propagate(nn.PReLU(5), MAP), ValueError, r"5 channels in prelu.*\(4, 8, 8\)"),
    "comparison": (lambda: propagate(lambda x: x > 0, VECTOR), NotImplementedError, "no rule for"),
    "equality": (lambda: propagate(lambda x: x == x, VECTOR), NotImplementedError, "no rule for"),
    "indices": (lambda: propagate(nn.MaxPool2d(2, return_indices=True), MAP), NotImplementedError, "no indices of max_pool2d"),
    "maximum over a dimension": (lambda: propagate(lambda x: x.max(1), VECTOR), NotImplementedError, "maximum of two"),
    "mean over samples": (lambda: propagate(lambda x: torch.mean(x, 0), VECTOR), ValueError, "over the batch"),
    "concatenated samples": (lambda: propagate(lambda x: torch.cat([x, x]), VECTOR), ValueError, "of the batch"),
    "flattened samples": (lambda: propagate(lambda x: x.flatten(), MAP), ValueError, "leave the batch alone"),
    "kind": (lambda: analytic.input_moments([], "pixel"), ValueError, "channel, position, patch, got 'pixel'"),
    "no kernel": (lambda: analytic.input_moments([], "patch"), ValueError, "kernel_size"),
    "no batches": (lambda: analytic.input_moments([], progress=False), ValueError, "at least one sample"),
    "no samples": (lambda: analytic.input_moments([torch.zeros(0, 3)], progress=False), ValueError, "at least one sample"),
    "shapes": (
        lambda: analytic.input_moments([torch.zeros(2, 3), torch.zeros(2, 4)], progress=False), ValueError, r"shape \(3,\), got \(4,\)",
    ),
    "rank": (lambda: analytic.input_moments([torch.zeros(2)], progress=False), ValueError, r"\(N, C, \*spatial\), got \(2,\)"),
    "no tensor": (lambda: analytic.input_moments([{"x": torch.zeros(2, 3)}], progress=False), TypeError, "tensors.*got dict"),
    "nan": (lambda: analytic.input_moments([torch.full((2, 3), math.nan)], progress=False), ValueError, "finite mean, got nan"),
    "kernel too large": (
        lambda: analytic.input_moments([torch.zeros(2, 3, 4, 4)], "patch", kernel_size=5, progress=False), ValueError, r"fits.*\(3, 4, 4\)",
    ),
    "kernel of another rank": (
        lambda: analytic.input_moments([torch.zeros(2, 3, 4, 4)], "patch", kernel_size=(2,), progress=False), ValueError, r"fits.*\(3, 4, 4\)",
    ),
    "another first layer": (
        lambda: propagate(nn.Conv2d(3, 4, 5), analytic.input_moments([images()], "patch", kernel_size=3, progress=False)), ValueError, "27 .* got 75",
    ),
    "a sample that it does not fit": (
        lambda: Moments(torch.zeros(5, 2).double(), torch.ones(5, 2).double(), torch.Size((1, 2))), ValueError, r"of shape \(1, 2\), got \(5, 2\)",
    ),
    "report without data": (lambda: analytic.report(nn.ReLU(), [], progress=False), ValueError, "at least one sample"),
    "report of what is read once": (
        lambda: analytic.report(nn.Linear(3, 3), iter([torch.randn(5, 3)]), progress=False), ValueError, "read again",
    ),
}  # fmt: skip


@pytest.mark.parametrize("key", ERRORS)
def test_errors(key):
    call, kind, message = ERRORS[key]
    with pytest.raises(kind, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)
