"""Small models of every kind of linear layer, moments of their inputs, and what tests of analytic normalization ask of them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from normops import analytic
from normops.analytic import Moments

LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Residual(nn.Module):
    def __init__(self, *body):
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x):
        return F.relu(x + self.body(x))


class Joined(Residual):
    """As the halves of a U-Net."""

    def forward(self, x):
        return torch.cat((x, self.body(x)), 1)


class Gated(Residual):
    def forward(self, x):
        return x * torch.sigmoid(self.body(x))


class Recurrent(nn.Module):
    """One layer at three places."""

    def __init__(self):
        super().__init__()
        self.enter, self.again, self.leave = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x):
        x = torch.tanh(self.enter(x))
        for _ in range(3):
            x = torch.relu(self.again(x))
        return self.leave(x)


class Checkpointed(nn.Module):
    """Computed again in backward, while it is active."""

    def __init__(self, body):
        super().__init__()
        self.body, self.active = body, True

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=False) if self.active else self.body(x)


MODELS = {  # and the shape of a sample
    "mlp": (lambda: [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3)], (6,)),
    "sequence": (lambda: [nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 7), nn.SiLU(), nn.Linear(7, 3)], (5, 6)),
    "cnn": (lambda: [
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), Residual(nn.Conv2d(6, 6, 3, padding=1), nn.ELU(), nn.Conv2d(6, 6, 1)),
        nn.MaxPool2d(2), nn.Dropout(0.2), nn.Conv2d(6, 8, 3, 2, 1), nn.SiLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(32, 8), nn.Mish(),
        nn.Linear(8, 4),
    ], (3, 16, 16)),
    "depthwise": (lambda: [
        nn.Conv2d(3, 6, 3, padding=2, dilation=2), nn.ReLU(True), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Hardswish(),
        nn.Conv2d(6, 8, 3, groups=2), nn.LeakyReLU(0.2, inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2),
    ], (3, 8, 8)),
    "unet": (lambda: [
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), Joined(nn.Conv2d(4, 4, 2, 2), nn.ReLU(), nn.ConvTranspose2d(4, 3, 2, 2)), nn.GELU(),
        Gated(nn.Conv2d(7, 7, 1)), nn.Conv2d(7, 2, 1), nn.Tanh(),
    ], (3, 6, 6)),
    "conv1d": (lambda: [nn.Conv1d(3, 5, 3, padding="same"), nn.Softplus(), nn.Conv1d(5, 4, 2, 2), nn.Sigmoid(), nn.Conv1d(4, 2, 1)], (3, 10)),
    "conv3d": (lambda: [nn.Conv3d(2, 4, 3, padding=1, padding_mode="circular"), nn.ReLU(), nn.Conv3d(4, 4, (1, 2, 3)), nn.Tanh()], (2, 5, 5, 5)),
    "transposed1d": (lambda: [nn.ConvTranspose1d(2, 4, 3, 2, 1, 1), nn.ReLU(), nn.ConvTranspose1d(4, 6, 4, 2, groups=2), nn.Tanh()], (2, 6)),
    "transposed2d": (lambda: [nn.ConvTranspose2d(2, 4, 3, (2, 1)), nn.ReLU(), nn.ConvTranspose2d(4, 3, 2, dilation=2), nn.SELU()], (2, 5, 6)),
    "transposed3d": (lambda: [nn.Conv3d(2, 4, 3), nn.ReLU(), nn.ConvTranspose3d(4, 2, 2, 2), nn.ReLU(), nn.Conv3d(2, 1, 1)], (2, 4, 4, 4)),
}  # fmt: skip
over_models = pytest.mark.parametrize("name", MODELS)


def make(name, dtype=torch.float64, bias=True):
    """With a first layer without a bias, if so wanted."""
    model = nn.Sequential(*MODELS[name][0]()).to(dtype)
    if not bias:
        model[0].bias = None
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def data(name, dtype=torch.float64, samples=4):
    return torch.randn(samples, *MODELS[name][1], dtype=dtype)


def moments(name, kind="channel"):
    shape = MODELS[name][1]
    if kind == "patch":
        first = make(name)[0]
        sizes = {"kernel_size": first.kernel_size, "stride": first.stride, "dilation": first.dilation}
        return analytic.input_moments([data(name) + 0.3], kind, progress=False, **sizes)
    if kind == "position":
        return Moments(torch.randn(shape), torch.rand(shape) + 0.5)
    units = shape[-1 if name == "sequence" else 0]
    mean, var = torch.randn(units), torch.rand(units) + 0.5
    return Moments(mean, var, shape) if name != "sequence" else Moments(mean.expand(shape), var.expand(shape))


def error(found, expected):
    """Relative to the largest."""
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


def layers(model):
    """Its layers with a scale, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "scale")}


def passing(model, given, kinds=LINEAR, **options):
    """The moments that come out of modules of some kinds, in the order of calls."""
    found = []
    hooks = [
        module.register_forward_hook(lambda module, _, output: found.append((module, output.channels(-1 if isinstance(module, nn.Linear) else 0))))
        for module in model.modules()
        if isinstance(module, kinds)
    ]
    analytic.propagate(model, given, **options)
    for hook in hooks:
        hook.remove()
    return found


def gradients(model, x, call=None):
    """The output, and the gradients of all parameters."""
    model.zero_grad()
    y = (call or model)(x)
    y.square().sum().backward()
    return [y.detach().clone(), *(parameter.grad.clone() for parameter in model.parameters())]


def rectified(mean, var):
    """Mean and variance of the rectifier of a normal variable: E max(0, X)^2 minus the square of the mean, good near 0."""
    std = var.sqrt()
    density, distribution = torch.exp(-(mean**2) / var / 2) / (2 * torch.pi) ** 0.5, torch.special.ndtr(mean / std)
    first = std * density + mean * distribution
    return first, (mean**2 + var) * distribution + mean * std * density - first**2
