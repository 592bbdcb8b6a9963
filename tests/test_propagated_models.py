"""Moments through whole networks: against Monte Carlo and exact linear algebra; what becomes of the model; gradients."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normops
from normops import analytic
from normops.analytic import Moments, moments, propagate

# ---- random networks of 8 layers, against 20000 samples ----

GAINS = {  # of a normal weight, about what keeps the variance
    nn.ReLU: 1.4, nn.LeakyReLU: 1.4, nn.Tanh: 1.0, nn.Sigmoid: 3.0, nn.GELU: 1.5, nn.SiLU: 1.4, nn.ELU: 1.2, nn.Softplus: 1.0,
}  # fmt: skip


def network(activation: type, layer, inputs: int, width: int) -> nn.Sequential:
    layers = [layer(size, width) for size in (inputs, *[width] * 7)]
    for linear in layers:
        nn.init.normal_(linear.weight, std=GAINS[activation] / linear.weight[0].numel() ** 0.5)
        nn.init.zeros_(linear.bias)
    return nn.Sequential(*(module for linear in layers for module in (linear, activation())))


def errors(found: Moments, x: Tensor) -> Tensor:
    """Averages over channels: |error of the mean| in sampled standard deviations, logarithm of the ratio of standard deviations."""
    var, mean = torch.var_mean(x.transpose(0, 1).flatten(1).double(), 1)
    own = found.channels()
    return torch.stack([((own.mean.flatten() - mean).abs() / var.sqrt()).mean(), (own.var.flatten() / var).log().mean() / 2])


def assert_close_to_samples(errors: Tensor) -> None:
    """Typical errors of (*, 2): 0.1 standard deviations, and a ratio of 0.9 to 1.1."""
    mean, ratio = errors.T
    assert mean.max() < 0.1
    assert 0.9 < ratio.exp().min() and ratio.exp().max() < 1.1


@torch.no_grad()
def of_layers(net: nn.Sequential, given: Moments, samples: int) -> Tensor:
    """Errors of every pre-activation."""
    x, moments, found = given.std.float() * torch.randn(samples, *given.sample) + given.mean.float(), given, []
    for module in net:
        x, moments = module(x), propagate(module, moments)
        if list(module.parameters()):
            found.append(errors(moments, x))
    assert torch.equal(propagate(net, given).var, moments.var)
    return torch.stack(found)


@pytest.mark.parametrize("activation", GAINS, ids=lambda kind: kind.__name__)
def test_deep_networks(activation):
    """At every depth on average over three networks: a single one may be off by more (silu: a ratio of 0.89)."""
    given = Moments(torch.zeros(128), torch.ones(128))
    assert_close_to_samples(sum(of_layers(network(activation, nn.Linear, 128, 128), given, 20000) for _ in range(3)) / 3)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.GELU], ids=lambda kind: kind.__name__)
def test_deep_convolutions(activation):
    """20000 positions, each with an input of its own."""

    def layer(inputs, outputs):
        return nn.Conv2d(inputs, outputs, 3, padding=1, padding_mode="circular")

    given = Moments(torch.zeros(3), torch.ones(3), (3, 8, 8))
    assert_close_to_samples(sum(of_layers(network(activation, layer, 3, 32), given, 320) for _ in range(3)) / 3)


def test_linear_networks():
    """Any: the mean is that of the network, which is linear. Where layers keep their inputs apart, here by rotations, variances are exact too."""
    given = Moments(torch.randn(16, dtype=torch.float64), torch.rand(16, dtype=torch.float64) + 0.1)
    whiten = nn.Linear(16, 16).double()
    whiten.weight.data = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))[0] / given.std
    layers = [nn.utils.parametrizations.orthogonal(nn.Linear(16, 16).double()) for _ in range(7)]
    with torch.no_grad():
        matrix = torch.eye(16, dtype=torch.float64)
        for layer in (whiten, *layers):
            matrix = layer.weight @ matrix
        net = nn.Sequential(whiten, *layers)
        found = propagate(net, given)
        torch.testing.assert_close(found.mean, net(given.mean), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.var, matrix.square() @ given.var, rtol=1e-12, atol=1e-12)
        nn.init.normal_(whiten.weight)
        torch.testing.assert_close(propagate(net, given).mean, net(given.mean), rtol=1e-12, atol=1e-12)
        random = nn.Sequential(*(nn.Linear(16, 16).double() for _ in range(8)))
        torch.testing.assert_close(propagate(random, given).mean, random(given.mean), rtol=1e-12, atol=1e-12)


# ---- models with code of their own ----


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, norm):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), norm(outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), norm(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 or inputs != outputs else nn.Identity()

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = self.norm2(self.conv2(y))
        y += self.shortcut(x)
        return y.relu_()


class ResNet(nn.Module):
    """Without a head: behind a global average errors of the mean count several times, since the standard deviation is a fraction."""

    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), norm(16), nn.ReLU())
        self.blocks = nn.ModuleList([Block(16, 16, 1, norm), Block(16, 32, 2, norm), Block(32, 32, 1, norm)])

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU())
        self.deep = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(16, 32, 3, padding=1), normops.nn.GroupNorm(4, 32, activation="silu"))
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.out = nn.Sequential(nn.Conv2d(32, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 2, 1))

    def forward(self, x):
        skip = self.down(x)
        b, _, height, width = skip.shape
        y = self.up(self.deep(skip))
        assert y.shape[-2:] == (height, width) and y.size(0) == b
        return self.out(torch.cat((y, skip), dim=1))


IMAGE = Moments(torch.zeros(3), torch.ones(3), (3, 16, 16))


@pytest.mark.parametrize("make", [ResNet, UNet, lambda: ResNet(lambda c: nn.GroupNorm(4, c)), lambda: ResNet(normops.nn.BatchNorm2d)],
                         ids=["ResNet", "UNet", "ResNet with group norm", "ResNet with our batch norm"])  # fmt: skip
def test_models_against_samples(make):
    """As random networks; the zeros of the border count."""
    model = make()
    found = propagate(model, IMAGE, padding="coverage")
    with torch.no_grad():
        y = model(torch.randn(500, 3, 16, 16))
        assert found.sample == y.shape[1:]
        assert_close_to_samples(errors(found, y)[None])


def test_heads():
    """A model is its parts, one after the other."""
    parts = ResNet(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
    expected = IMAGE
    for part in parts:
        expected = propagate(part, expected, pooling=0.2)
    found = propagate(nn.Sequential(*parts), IMAGE, pooling=0.2)
    assert found.sample == (10,)
    assert torch.equal(found.mean, expected.mean) and torch.equal(found.var, expected.var)


class Spelled(nn.Module):
    """A model's layers as functions, methods and operators."""

    def __init__(self, layers: nn.Sequential):
        super().__init__()
        self.layers = layers

    def forward(self, x, shift=0.0):
        conv, norm, _, _, _, _, _, linear = self.layers
        x = torch.conv2d(x, conv.weight, bias=conv.bias, stride=conv.stride, padding=1)
        x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=self.training)
        x = torch.nn.functional.leaky_relu(x, negative_slope=0.1)
        x = F.max_pool2d(x, kernel_size=2)
        x = F.dropout(x, training=self.training)
        x = x.tanh().view(x.shape[0], -1)
        return F.linear(x, linear.weight) + linear.bias[None] + shift * 0.5


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.LeakyReLU(0.1), nn.MaxPool2d(2), nn.Dropout(), nn.Tanh(), nn.Flatten(),
                         nn.Linear(512, 10))  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
def test_spellings(training):
    plain = layers().train(training)
    found, expected = propagate(Spelled(plain).train(training), IMAGE, shift=4.0), propagate(plain, IMAGE)
    torch.testing.assert_close(found.mean, expected.mean + 2, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.var, expected.var, rtol=1e-12, atol=1e-12)


def augmented(x):
    x = F.relu(x, inplace=True)
    x *= 2
    x -= 0.5
    return x


POOL = nn.MaxPool2d(2)
IN_PLACE = {  # what a model does, and the same without changing anything
    "statements": (lambda x: (x.mul_(2), x.add_(1), F.silu(x, inplace=True), x.clamp_(0, 2), x)[-1], lambda x: F.silu(2 * x + 1).clamp(0, 2)),
    "of a residual": (lambda x: x.relu_() + x, lambda x: x.relu() + x.relu()),
    "of a copy": (lambda x: (x.clone().add_(5), x)[-1], lambda x: x * 1),
    "behind a monotone function": (lambda x: POOL((torch.sigmoid(x), x.add_(50))[0]), lambda x: POOL(torch.sigmoid(x))),
    "of an argument": (augmented, lambda x: 2 * x.relu() - 0.5),
}


@pytest.mark.parametrize("key", IN_PLACE)
def test_in_place(key):
    """As torch does; but the moments that were given stay."""
    inplace, expected = IN_PLACE[key]
    given = Moments(torch.randn(3), torch.rand(3), (3, 4, 4))
    before = copy.deepcopy(given)
    found, expected = (propagate(function, given) for function in (inplace, expected))
    torch.testing.assert_close((found.mean, found.var), (expected.mean, expected.var), rtol=1e-12, atol=1e-12)
    assert torch.equal(given.mean, before.mean) and torch.equal(given.var, before.var)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        for _ in range(3):
            x = F.silu(self.linear(x))
        return x


def test_a_layer_at_several_places():
    shared, given = Shared(), Moments(torch.randn(6), torch.rand(6))
    found = propagate(shared, given)
    expected = propagate(nn.Sequential(*(nn.Sequential(shared.linear, nn.SiLU()) for _ in range(3))), given)
    assert torch.equal(found.mean, expected.mean) and torch.equal(found.var, expected.var)
    assert not torch.equal(found.var, propagate(nn.Sequential(shared.linear, nn.SiLU()), given).var)


def test_normalized_layers():
    """Outputs have the mean `bias` and the standard deviation `scale`, and the plain model has the same moments."""
    given = Moments(torch.randn(3), torch.rand(3), (3, 8, 8))
    model = analytic.normalize(nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.ConvTranspose2d(5, 4, 3, stride=2), nn.Tanh()), given, preserve=False)
    for layer in (model[0], model[2]):
        nn.init.uniform_(layer.scale, 0.5, 2)
        nn.init.normal_(layer.bias)
    first = propagate(model[0], given)
    torch.testing.assert_close(first.mean.flatten(), model[0].bias.double())
    torch.testing.assert_close(first.std.flatten(), model[0].scale.double())
    found = propagate(model, given)
    expected = propagate(analytic.fold(model), given)
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-5, atol=1e-5)  # of weights that were rounded to float32
    torch.testing.assert_close(found.var, expected.var, rtol=1e-5, atol=1e-5)


def test_backends_agree(backend, device):
    model, given = UNet().to(device), Moments(IMAGE.mean.to(device), IMAGE.var.to(device), IMAGE.sample)
    found = propagate(model, given)
    with normops.backend("reference"):
        expected = propagate(model, given)
    assert found.mean.device.type == device
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found.var, expected.var, rtol=1e-11, atol=1e-11)


# ---- the model afterwards ----


class Counting(nn.BatchNorm2d):
    """A batch norm that somebody derived."""


class Failing(nn.Module):
    def forward(self, x):
        raise RuntimeError("on purpose")


NORMS = [nn.BatchNorm2d, Counting, normops.nn.BatchNorm2d, nn.SyncBatchNorm, normops.nn.SyncBatchNorm, normops.nn.BatchRenorm2d,
         lambda c: nn.InstanceNorm2d(c, track_running_stats=True)]  # fmt: skip


def everything(model: nn.Module) -> list:
    return [(name, set(vars(module)), module.training) for name, module in model.named_modules()]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("fails", [True, False])
def test_models_are_left_alone(norm, fails):
    model = nn.Sequential(ResNet(norm), nn.Dropout(), *[Failing()] * fails)
    model[0].blocks[1].eval()
    state, before, buffers = copy.deepcopy(model.state_dict()), everything(model), list(model.buffers())
    if fails:
        with pytest.raises(RuntimeError, match="on purpose"):
            propagate(model, IMAGE)
    else:
        first, second = propagate(model, IMAGE), propagate(copy.deepcopy(model), copy.deepcopy(IMAGE))
        assert torch.equal(first.mean, second.mean) and torch.equal(first.var, second.var)
    assert everything(model) == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(value is was for value, was in zip(model.buffers(), buffers, strict=True))
    assert model[0](torch.randn(2, 3, 16, 16)).shape == (2, 32, 8, 8)


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = ResNet()

    def forward(self, x):
        assumed = propagate(self.inner, x, padding="coverage")
        return self.inner(x) - propagate(lambda y: self.inner(y), x, padding="coverage") + assumed


def test_propagation_inside_of_a_propagation():
    """Has assumptions of its own, and leaves those and the rules around it."""
    model = Nested()
    before = copy.deepcopy(model.state_dict()), everything(model)
    found, inside = propagate(model, IMAGE), propagate(model.inner, IMAGE, padding="coverage")
    outside = propagate(model.inner, IMAGE)
    torch.testing.assert_close(found.dense().mean, outside.dense().mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.dense().var, (outside.var + 2 * inside.var).expand(found.sample), rtol=1e-12, atol=1e-12)
    assert everything(model) == before[1]
    assert all(torch.equal(value, before[0][name]) for name, value in model.state_dict().items())


# ---- rules of one's own ----


@pytest.fixture
def rules(monkeypatch):
    monkeypatch.setattr(moments, "RULES", dict(moments.RULES))


def test_register(rules):
    given = Moments(torch.randn(6), torch.rand(6))
    with pytest.raises(NotImplementedError, match=r"no rule for cumsum.*@propagate\.register"):
        propagate(lambda x: x.cumsum(1), given)

    @propagate.register(torch.cumsum)
    def of_torch(input, dim):
        return Moments(input.mean.cumsum(dim - 1), input.var.cumsum(dim - 1))

    propagate.register(Tensor.cumsum)(of_torch)
    for function in (lambda x: x.cumsum(1), lambda x: torch.cumsum(x, dim=1)):
        assert torch.equal(propagate(function, given).var, given.var.cumsum(0))

    @propagate.register(nn.Softmax)
    def of_module(module, input):
        assert module.dim == 1
        mean = normops.softmax_mean(input.mean, input.var)
        return Moments(mean, mean * (1 - mean))

    softmax = nn.Softmax(1)
    found = propagate(nn.Sequential(nn.Linear(6, 3), softmax), given)
    assert float(found.mean.detach().sum()) == pytest.approx(1)
    assert "forward" not in vars(softmax)
    with pytest.raises(NotImplementedError, match="no rule for softmax"):
        propagate(lambda x: torch.softmax(x, 1), given)


# ---- gradients ----


def leaves(*shapes) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64).mul_(0.5).requires_grad_() for shape in shapes]


def test_gradients_of_a_smooth_network():
    def of(mean, log_var, w1, b1, w2):
        x = Moments(mean, log_var.exp(), (2, 5))
        y = propagate(lambda x: F.conv1d(torch.tanh(F.conv1d(x, w1, b1)), w2) * F.gelu(x[:, :1, 2:4]), x, padding="coverage")
        return y.dense().mean, y.dense().var

    given = leaves((2,), (2,), (3, 2, 3), (3,), (1, 3, 2))
    assert torch.autograd.gradcheck(of, given)
    assert torch.autograd.gradgradcheck(of, given)


def test_gradients_of_every_kind_of_layer():
    def of(mean, log_var, w1, w2, weight, bias, slope, w3):
        def model(x):
            x = F.prelu(F.group_norm(F.conv2d(x, w1), 2, weight, bias), slope)
            x = F.conv_transpose2d(F.max_pool2d(F.leaky_relu(x), 2), w2, stride=2, groups=2)
            x = F.layer_norm(torch.maximum(x[:, :1], x[:, 1:]), x.shape[2:])
            x = torch.cat([F.interpolate(x, scale_factor=2), F.pad(F.dropout(x, 0.2), (2, 2, 2, 2)) + 1], 1)
            x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
            return F.linear(F.batch_norm(x, None, None, training=True), w3)

        y = propagate(model, Moments(mean, log_var.exp(), (1, 4, 4)), pooling=0.2, residual=0.1)
        return y.mean, y.var

    assert torch.autograd.gradcheck(of, leaves((1,), (1,), (2, 1, 1, 1), (2, 1, 2, 2), (2,), (2,), (2,), (2, 2)))


def test_gradients_reach_all_parameters():
    """Those of biases before a group norm too: it takes away only the mean of a group."""
    model, mean, var = UNet(), torch.zeros(3, requires_grad=True), torch.ones(3, requires_grad=True)
    found = propagate(model, Moments(mean, var, (3, 16, 16)))
    (found.mean.square().sum() + found.var.sum()).backward()
    for name, value in (*model.named_parameters(), ("mean", mean), ("var", var)):
        assert value.grad is not None and value.grad.isfinite().all() and value.grad.any(), name
