"""Rules of propagation: against exact linear algebra, enumeration, quadrature and sampling; whole networks against Monte Carlo."""

import math
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normops
from normops.analytic import Moments, propagate


def moments(*sample: int) -> Moments:
    """Of units that all differ."""
    return Moments(torch.randn(sample, dtype=torch.float64), torch.rand(sample, dtype=torch.float64) + 0.1)


def channels(*sample: int) -> Moments:
    """Of channels, whose positions are alike."""
    given = moments(sample[0])
    return Moments(given.mean, given.var, sample)


def assert_same(found: Moments, mean: Tensor, var: Tensor, tolerance: float = 1e-12) -> None:
    found = found.dense()
    assert found.sample == mean.shape
    torch.testing.assert_close(found.mean, mean, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.var, var, rtol=tolerance, atol=tolerance)


def assert_channels(found: Moments, mean: Tensor, var: Tensor) -> None:
    """Those of all positions together: the variance within them and between them."""
    mean, var = mean.flatten(1), var.flatten(1)
    assert found.uniform
    assert_same(Moments(found.mean.flatten(), found.var.flatten()), mean.mean(1), var.mean(1) + mean.var(1, unbiased=False))


# ---- linear functions of independent units: mean A*m, variance (A*A)*v, with A from autograd ----


def exactly(function, given: Moments) -> tuple[Tensor, Tensor]:
    start = given.dense()
    mean = function(start.mean[None])[0]
    rows = torch.autograd.functional.jacobian(lambda x: function(x)[0], start.mean[None]).reshape(mean.numel(), -1)
    return mean, (rows.square() @ start.var.flatten()).view(mean.shape)


def frozen(norm: nn.Module) -> nn.Module:
    """In evaluation, with statistics and parameters of its own."""
    for value in (norm.running_mean, norm.weight.data, norm.bias.data):
        value.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm.double().eval()


MATRIX = torch.linspace(-1, 1, 15, dtype=torch.float64).view(5, 3)
VECTOR = torch.arange(1.0, 5.0, dtype=torch.float64).view(4, 1, 1)
LINEAR = {
    "linear": (lambda: nn.Linear(6, 4), (6,)),
    "linear of a sequence": (lambda: nn.Linear(6, 4, bias=False), (5, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2), (4, 11)),
    "conv2d": (lambda: nn.Conv2d(3, 4, (3, 2), stride=(1, 2), padding=(1, 0)), (3, 6, 5)),
    "conv2d same": (lambda: nn.Conv2d(3, 4, 3, padding="same", dilation=2, bias=False), (3, 6, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 3, padding=1), (2, 4, 3, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4), (4, 5, 5)),
    "circular": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (3, 5, 6)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 4, 3, padding=1, output_padding=1, groups=2, dilation=2), (4, 7)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(3, 4, (3, 2), stride=2, padding=(1, 0)), (3, 4, 5)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 3, 2, stride=2), (2, 3, 2, 3)),
    "average pooling 1d": (lambda: nn.AvgPool1d(3), (4, 9)),
    "average pooling": (lambda: nn.AvgPool2d(3, stride=2, padding=1), (4, 6, 7)),
    "average pooling 3d": (lambda: nn.AvgPool3d((2, 1, 2)), (2, 4, 3, 4)),
    "adaptive pooling": (lambda: nn.AdaptiveAvgPool2d((2, 3)), (4, 6, 6)),
    "uneven windows": (lambda: nn.AdaptiveAvgPool2d(3), (4, 8, 7)),
    "mean over positions": (lambda: lambda x: x.mean((2, 3)), (4, 5, 6)),
    "mean over one dimension": (lambda: lambda x: torch.mean(x, -1, keepdim=True), (4, 5, 6)),
    "mean over channels": (lambda: lambda x: x.mean(dim=1), (4, 5)),
    "mean of all": (lambda: lambda x: torch.mean(x, (1, 2, 3)), (4, 5, 6)),
    "flatten": (nn.Flatten, (4, 5, 6)),
    "reshape": (lambda: lambda x: x.reshape(x.shape[0], 8, -1), (4, 5, 6)),
    "view": (lambda: lambda x: x.view(x.size(0), -1), (4, 5, 6)),
    "unflatten": (lambda: nn.Unflatten(1, (2, 3)), (6, 2)),
    "permute": (lambda: lambda x: x.permute(0, 2, 3, 1), (4, 5, 6)),
    "transpose and movedim": (lambda: lambda x: x.transpose(1, 2).movedim(-1, 1), (4, 5, 6)),
    "squeeze and unsqueeze": (lambda: lambda x: x.unsqueeze(2).squeeze(-1), (4, 1)),
    "slices": (lambda: lambda x: x[:, 1:3, ::2], (4, 5, 6)),
    "chunks": (lambda: lambda x: x.chunk(2, 1)[1] - torch.chunk(x, 2, dim=1)[0], (4, 5)),
    "parts": (lambda: lambda x: torch.cat(x.split([1, 3], dim=1)[::-1], 1), (4, 5)),
    "unbind and stack": (lambda: lambda x: torch.stack(x.unbind(2), 1), (4, 5)),
    "flip and roll": (lambda: lambda x: torch.roll(x.flip(-1), 2, 1), (4, 5)),
    "sum over positions": (lambda: lambda x: x.sum((2, 3)), (4, 5, 6)),
    "sum over channels": (lambda: lambda x: torch.sum(x, 1, keepdim=True), (4, 5)),
    "sum of all": (lambda: lambda x: x.sum((1, 2)), (4, 5)),
    "matrix": (lambda: lambda x: x @ MATRIX, (4, 5)),
    "torch.matmul": (lambda: lambda x: torch.matmul(x, MATRIX), (5,)),
    "pixel shuffle": (lambda: nn.PixelShuffle(2), (8, 3, 2)),
    "pixel unshuffle": (lambda: nn.PixelUnshuffle(2), (2, 4, 6)),
    "concatenation": (lambda: lambda x: torch.cat([x[:, 2:], x[:, :2] * 3], 1), (4, 5, 6)),
    "concatenation of positions": (lambda: lambda x: torch.cat((x, -x[:, :, :2]), dim=-2), (4, 5, 6)),
    "sum": (lambda: lambda x: x[:, :2] + x[:, 2:], (4, 5)),
    "weighted sum": (lambda: lambda x: torch.add(x[:, :2], x[:, 2:], alpha=-3), (4, 5)),
    "difference": (lambda: lambda x: x[:, :2] - x[:, 2:], (4, 5)),
    "scale": (lambda: lambda x: 2 * x / 4 * VECTOR, (4, 3, 2)),
    "bias": (lambda: lambda x: VECTOR + (1 - x) - 0.5 + VECTOR[None], (4, 3, 2)),
    "constants of each unit": (lambda: lambda x: torch.add(VECTOR, x, alpha=2) - 3.0, (4, 3, 2)),
    "tensor minus": (lambda: lambda x: VECTOR - x, (4, 3, 2)),
    "constant padding": (lambda: lambda x: F.pad(x, (1, 2, 0, 1), value=0.7), (4, 3, 2)),
    "replicate padding": (lambda: nn.ReplicationPad2d(1), (4, 3, 2)),
    "nearest": (lambda: nn.Upsample(scale_factor=2), (4, 3, 2)),
    "bilinear": (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), (4, 3, 5)),
    "bilinear with corners": (lambda: lambda x: F.interpolate(x, size=(5, 7), mode="bilinear", align_corners=True), (4, 3, 5)),
    "batch norm": (lambda: frozen(nn.BatchNorm2d(4)), (4, 3, 5)),
    "batch norm of vectors": (lambda: frozen(nn.BatchNorm1d(6)), (6,)),
    "instance norm": (lambda: frozen(nn.InstanceNorm1d(4, affine=True, track_running_stats=True)), (4, 7)),
    "our batch norm": (lambda: frozen(normops.nn.BatchNorm2d(4)), (4, 3, 5)),
    "analytic norm": (lambda: lambda x: normops.analytic_norm(x, VECTOR.flatten(), VECTOR.flatten() + 1, VECTOR.flatten()), (4, 3, 5)),
    "no dropout": (lambda: nn.Dropout(0.3).eval(), (5,)),
    "casts": (lambda: lambda x: x.contiguous().to(torch.float64).clone().double(), (5,)),
    # units that no two paths reach from one input: exact at any depth
    "deep": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 2, stride=2), nn.AvgPool2d(2), nn.Conv2d(6, 6, (3, 1), groups=6), nn.Flatten(), nn.Unflatten(1, (6, 1)),
                              nn.AvgPool1d(1), nn.Conv1d(6, 12, 1, groups=6)),  # fmt: skip
        (3, 12, 4),
    ),
}  # fmt: skip


def made(make):
    function = make()
    return function.double() if isinstance(function, nn.Module) else function


@pytest.mark.parametrize("key", LINEAR)
def test_linear_functions_are_exact(key):
    function, given = made(LINEAR[key][0]), moments(*LINEAR[key][1])
    assert_same(propagate(function, given), *exactly(function, given))


@pytest.mark.parametrize("key", [key for key in LINEAR if key.startswith(("conv", "depthwise", "circular", "transposed"))])
def test_coverage_is_exact(key):
    """From channels to a map of every position, with the zeros of the border; `channels` makes of it total mean and variance."""
    function, given = made(LINEAR[key][0]), channels(*LINEAR[key][1])
    found = propagate(function, given, padding="coverage")
    mean, var = exactly(function, given)
    assert_same(found, mean, var)
    assert_channels(found.channels(), mean, var)


INSIDE = {  # and how long a period of positions is
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2), (4, 15), 1),
    "conv2d": (lambda: nn.Conv2d(3, 4, (3, 2), padding=(1, 1)), (3, 9, 9), 1),
    "conv3d": (lambda: nn.Conv3d(2, 3, 3, padding=1), (2, 6, 6, 6), 1),
    "padding modes": (lambda: nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(3, 4, 3, padding=1, padding_mode="replicate")), (3, 9, 9), 1),
    "circular": (lambda: nn.Conv1d(4, 4, 3, padding="same", padding_mode="circular"), (4, 9), 1),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 4, 3, padding=1, output_padding=1, groups=2, dilation=2), (4, 9), 3),
    "transposed 2d": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1), (3, 7, 7), 2),
    "transposed with gaps": (lambda: nn.ConvTranspose2d(3, 4, 1, stride=2), (3, 7, 7), 2),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 3, 3, stride=2), (2, 5, 5, 5), 2),
    "average pooling": (lambda: nn.AvgPool2d(3, stride=2, padding=1), (4, 9, 9), 1),
}  # fmt: skip


@pytest.mark.parametrize("key", INSIDE)
def test_the_border_is_ignored(key):
    """From channels to channels: the average over one period of positions far from the border."""
    make, sample, period = INSIDE[key]
    function, given = made(make), channels(*sample)
    shape = function(given.dense().mean[None]).shape[1:]
    middle = (..., *(slice(size // 2, size // 2 + period) for size in shape[1:]))
    found = propagate(function, given)
    assert found.sample == shape
    assert_channels(found, *exactly(lambda x: function(x)[middle], given))


def test_concatenated_channels_stay_alike():
    """The halves are taken as independent."""
    given, conv = channels(3, 9, 9), nn.Conv2d(6, 4, 3, padding=1).double()
    both = Moments(torch.cat([given.mean, 0.5 * given.mean]), torch.cat([given.var, 0.25 * given.var]), (6, 9, 9))
    found = propagate(lambda x: conv(torch.cat([x, 0.5 * x], 1)), given)
    assert_channels(found, *exactly(lambda x: conv(x)[..., 4:5, 4:5], both))


def test_upsampled_positions_stay_alike():
    given, conv = channels(4, 5, 5), nn.Conv2d(4, 3, 3, padding=1).double()
    found, expected = propagate(nn.Sequential(nn.Upsample(scale_factor=2), conv), given), propagate(conv, given)
    assert found.sample == (3, 10, 10)
    assert_same(found, *(value.expand(3, 10, 10) for value in (expected.mean, expected.var)))


# ---- non-linear functions, unit by unit: quadrature ----

SLOPES = torch.tensor([-0.5, 0.1, 0.25, 1.0, 2.0, 0.0], dtype=torch.float64)


def with_slopes() -> nn.PReLU:
    prelu = nn.PReLU(6)
    prelu.weight.data = SLOPES
    return prelu


UNITS = {
    **{name: getattr(torch, name) for name in ("relu", "sigmoid", "tanh", "abs", "square", "exp", "sin", "erf", "selu")},
    **{f"F.{name}": getattr(F, name) for name in ("relu", "relu6", "silu", "mish", "hardswish", "hardsigmoid", "softplus", "gelu", "elu")},
    "F.hardtanh": F.hardtanh,
    **{f"x.{name}": lambda x, name=name: getattr(x, name)() for name in ("relu", "sigmoid", "tanh_", "abs", "square", "exp", "sin", "erf")},
    "F.leaky_relu": F.leaky_relu,
    "ReLU": nn.ReLU(inplace=True),
    "LeakyReLU": nn.LeakyReLU(0.3),
    "ELU": nn.ELU(0.5),
    "GELU tanh": nn.GELU("tanh"),
    "Softplus": nn.Softplus(beta=3.0),
    "Hardtanh": nn.Hardtanh(-0.3, 0.8),
    "PReLU": nn.PReLU().double(),
    "PReLU of channels": with_slopes(),
    "F.prelu": lambda x: F.prelu(x, SLOPES),
    "power": lambda x: x**2,
    "torch.pow": lambda x: torch.pow(x, 2),
    "clamp": lambda x: x.clamp(-0.2, 0.9),
    "clamp from below": lambda x: torch.clamp(x, min=-0.2),
    "clamp from above": lambda x: x.clamp(max=0.4),
    "clamp_min": lambda x: x.clamp_min(0.1),
    "Dropout in evaluation": nn.Sequential(nn.Tanh(), nn.Dropout().eval()),
    "sign": torch.sign,
}  # fmt: skip


@pytest.mark.parametrize("key", UNITS)
def test_activations(key):
    given, function = moments(6), UNITS[key]
    t = torch.linspace(-9, 9, 100001, dtype=torch.float64).view(-1, 1)
    weight = torch.exp(-t * t / 2)
    weight /= weight.sum()
    values = function(given.mean + given.std * t)
    mean = (weight * values).sum(0)
    var = (weight * (values - mean).square()).sum(0)
    step = 18 / 100000  # between nodes: at a kink the rule is off by its square, at a jump by itself
    assert_same(propagate(function, given), mean, var, step if key == "sign" else step**2)


def signs(count: int) -> Tensor:
    """All (2**count, count) of them: independent variables with mean 0 and variance 1."""
    return torch.tensor(list(product((-1.0, 1.0), repeat=count)), dtype=torch.float64)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layer", [nn.Dropout, nn.Dropout2d])
def test_dropout(layer, training):
    given = moments(5, 2, 2)
    low, high = given.mean - given.std, given.mean + given.std
    values, chances = torch.stack([0 * low, low / 0.7, high / 0.7]), torch.tensor([0.3, 0.35, 0.35], dtype=torch.float64)
    if not training:
        values, chances = values[1:] * 0.7, chances[1:] / 0.7
    mean = torch.einsum("v,vchw->chw", chances, values)
    assert_same(propagate(layer(0.3).train(training), given), mean, torch.einsum("v,vchw->chw", chances, (values - mean).square()))


def test_everything_dropped():
    assert_same(propagate(nn.Dropout(1.0), moments(3)), torch.zeros(3).double(), torch.zeros(3).double())


@pytest.mark.parametrize("correlation", [-0.6, 0.0, 0.8, 1.0])
@pytest.mark.parametrize("alpha", [1, -0.5])
def test_sum_of_two_correlated(correlation, alpha):
    given = moments(6)
    u, w = signs(2).split(1, dim=1)
    noise = torch.cat([u.expand(-1, 3), (correlation * u + math.sqrt(1 - correlation**2) * w).expand(-1, 3)], 1)
    values = given.mean + given.std * noise
    values = torch.add(values[:, :3], values[:, 3:], alpha=alpha)
    found = propagate(lambda x: torch.add(x[:, :3], x[:, 3:], alpha=alpha), given, residual=correlation)
    assert_same(found, values.mean(0), values.var(0, unbiased=False))


def test_product_of_two():
    given = moments(6)
    noise = signs(2)
    values = (given.mean[:3] + given.std[:3] * noise[:, :1]) * (given.mean[3:] + given.std[3:] * noise[:, 1:])
    assert_same(propagate(lambda x: x[:, :3] * x[:, 3:], given), values.mean(0), values.var(0, unbiased=False))


def halves(x):
    return torch.mean(x.reshape(1, 3, 2, 2, 2, 2), (3, 5))


def sums(x):
    return x.reshape(1, 3, 2, 2, 2, 2).sum((3, 5)) / 4


@pytest.mark.parametrize("correlation", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("pool", [nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2), halves, sums], ids=["window", "adaptive", "mean", "sum"])
def test_average_of_correlated_positions(pool, correlation):
    given = channels(3, 4, 4)
    noise = signs(5)
    positions = math.sqrt(correlation) * noise[:, :1] + math.sqrt(1 - correlation) * noise[:, 1:]
    values = given.mean.flatten() + given.std.flatten() * positions.mean(1, keepdim=True)
    mean, var = (value.view(3, 1, 1).expand(3, 2, 2) for value in (values.mean(0), values.var(0, unbiased=False)))
    assert_same(propagate(pool, given, pooling=correlation), mean, var)


# ---- maxima ----


@pytest.mark.parametrize(("pool", "count"), [(nn.MaxPool2d(2), 4), (nn.MaxPool2d(3, stride=1, padding=1), 9), (nn.AdaptiveMaxPool2d(2), 9)])
def test_max_pooling_against_samples(pool, count):
    """Of an independent normal variable at every position; 5 standard errors (the fourth moment is below 5 of its squared variance)."""
    given = channels(3, 6, 6)
    x = given.mean + given.std * torch.randn(20000, 3, 6, 6, dtype=torch.float64)
    y = pool(x)[..., 1, 1]
    found = propagate(pool, given)
    assert found.sample == pool(x)[0].shape
    var, mean = torch.var_mean(y, 0)
    assert ((found.mean.flatten() - mean).abs() < 5 * (var / len(x)).sqrt()).all()
    assert ((found.var.flatten() / var - 1).abs() < 5 * math.sqrt(4 / len(x))).all()
    correlated = normops.max_pool_moments(given.mean.flatten(), given.var.flatten(), count, 0.3)
    found = propagate(pool, given, pooling=0.3)
    assert torch.equal(found.mean.flatten(), correlated[0]) and torch.equal(found.var.flatten(), correlated[1])


MONOTONE = [
    nn.ReLU(), nn.Sigmoid(), nn.Tanh(), nn.Softplus(), nn.Softplus(2.0), nn.LeakyReLU(0.1), nn.ELU(), nn.SELU(), nn.ReLU6(), nn.Hardtanh(-0.5, 0.7),
]  # fmt: skip


@pytest.mark.parametrize("activation", MONOTONE, ids=str)
def test_maximum_behind_a_monotone_function(activation):
    """Is that function of the maximum, whose argument is nearer to normal."""
    given, pool = channels(3, 6, 6), nn.MaxPool2d(2)
    found, expected = propagate(nn.Sequential(activation, pool), given, pooling=0.3), propagate(nn.Sequential(pool, activation), given, pooling=0.3)
    assert_same(found, expected.dense().mean, expected.dense().var, 0)


def test_maximum_behind_another():
    """Of what comes out of it: |x| and slopes below 0 are not monotone."""
    given, pool = channels(3, 6, 6), nn.MaxPool2d(2)
    for activation in (torch.abs, nn.LeakyReLU(-0.5), nn.SiLU()):
        middle = propagate(activation, given)
        expected = propagate(pool, Moments(middle.mean, middle.var, middle.sample)).dense()
        assert_same(propagate(lambda x, f=activation: pool(f(x)), given), expected.mean, expected.var, 0)


@pytest.mark.parametrize("function", [torch.maximum, torch.max, lambda x, y: x.maximum(y)], ids=["maximum", "max", "method"])
def test_maximum_of_two(function):
    given = moments(6)
    expected = normops.max_moments(given.mean[:3], given.var[:3], given.mean[3:], given.var[3:])
    assert_same(propagate(lambda x: function(x[:, :3], x[:, 3:]), given), *expected, 0)


def test_maximum_with_a_constant():
    """Is a shifted rectifier."""
    given = moments(3)
    expected = propagate(torch.relu, given - VECTOR.flatten()[:3])
    assert_same(propagate(lambda x: torch.maximum(VECTOR.flatten()[:3], x), given), expected.mean + VECTOR.flatten()[:3], expected.var)


# ---- norms: sampling ----


def affine(norm: nn.Module) -> nn.Module:
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.3, 1)
    return norm


def with_shortcut(norm, x):
    """The same residual for every sample."""
    return norm(x, residual=torch.linspace(-1, 1, 2400).view(1, 6, 20, 20).expand(x.shape))


def renormalized() -> nn.Module:
    norm = affine(normops.nn.BatchRenorm2d(6))
    norm.running_mean.normal_()
    norm.running_std.uniform_(0.5, 2)
    return norm.eval()


NORMS = {
    "BatchNorm2d": lambda: affine(nn.BatchNorm2d(6)),
    "BatchNorm2d without statistics": lambda: nn.BatchNorm2d(6, track_running_stats=False).eval(),
    "F.batch_norm": lambda: lambda x: F.batch_norm(x, None, None, torch.arange(6.0), torch.arange(6.0), True, eps=0.3),
    "GroupNorm": lambda: affine(nn.GroupNorm(2, 6)),
    "F.group_norm": lambda: lambda x: F.group_norm(x, 3, eps=0.3),
    "InstanceNorm2d": lambda: affine(nn.InstanceNorm2d(6, affine=True)),
    "LayerNorm": lambda: affine(nn.LayerNorm((6, 20, 20))),
    "LayerNorm of positions": lambda: affine(nn.LayerNorm((20, 20), bias=False)),
    "F.layer_norm": lambda: lambda x: F.layer_norm(x, (20, 20), eps=0.3),
    "RMSNorm": lambda: affine(nn.RMSNorm((6, 20, 20))),
    "F.rms_norm": lambda: lambda x: F.rms_norm(x, (6, 20, 20), eps=0.5),
    "ours: BatchNorm2d": lambda: affine(normops.nn.BatchNorm2d(6, activation="relu")),
    "ours: BatchNorm2d with residual": lambda: partial(with_shortcut, affine(normops.nn.BatchNorm2d(6))),
    "ours: BatchRenorm2d": lambda: affine(normops.nn.BatchRenorm2d(6)),
    "ours: BatchRenorm2d, frozen": renormalized,
    "ours: BatchInstanceNorm2d": lambda: affine(normops.nn.BatchInstanceNorm2d(6)),
    "ours: SyncBatchNorm": lambda: affine(normops.nn.SyncBatchNorm(6)),
    "ours: GroupNorm": lambda: affine(normops.nn.GroupNorm(2, 6, activation="leaky_relu", negative_slope=0.3)),
    "ours: InstanceNorm2d": lambda: normops.nn.InstanceNorm2d(6, activation="silu"),
    "ours: LayerNorm": lambda: normops.nn.LayerNorm((6, 20, 20), activation="gelu"),
    "ours: RMSNorm": lambda: normops.nn.RMSNorm((6, 20, 20)),
    "ours: group_norm": lambda: partial(with_shortcut, partial(normops.group_norm, num_groups=3, activation="tanh")),
    "ours: batch_norm": lambda: lambda x: normops.batch_norm(x, None, None, training=True, activation="sigmoid"),
}  # fmt: skip


@pytest.mark.parametrize("key", NORMS)
def test_norms(key):
    """Of 400 independent units or more: a sample's own mean and variance, for which the rules take their expectations, differ from them by 1/400
    of the variance. Beside that the standard errors of 1000 samples: 0.032 of a mean, and 0.022/sqrt(2400) of the typical deviation."""
    norm, given = NORMS[key](), moments(6, 20, 20)
    found = propagate(norm, given).dense()
    with torch.no_grad():
        y = norm((given.mean + given.std * torch.randn(1000, 6, 20, 20)).float())
    var, mean = torch.var_mean(y.double(), 0)
    alive = var > 0.01  # a rectifier's tail is a few samples
    error, ratio = ((found.mean - mean) / var.sqrt())[alive], (found.var / var)[alive].sqrt()
    assert found.sample == y.shape[1:] and alive.double().mean() > 0.5
    assert error.square().mean().sqrt() < 0.04
    assert abs(ratio.log().mean()) < 0.005
    assert (found.var[~alive] < 0.02).all()
