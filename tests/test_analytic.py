"""Models normalized, folded and initialized by propagated statistics: what they compute, and their gradients."""

import copy

import pytest
import torch
import torch.nn.functional as F
from analytic_models import LINEAR, MODELS, Recurrent, data, error, gradients, layers, make, moments, over_models, passing, rectified
from torch import nn
from torch.func import functional_call

from normops import analytic
from normops.analytic import Moments

EPS = 1e-10  # normalize's, relative to variances near 1: what is exact but for it


# ---- what normalized models compute ----

PATCHES = ("cnn", "depthwise", "unet", "conv1d")  # models whose first layer is a convolution without groups
KINDS = [(name, kind, padding) for name in MODELS for kind in ("channel", "position", "patch") for padding in ("ignore", "coverage")
         if kind != "patch" or name in PATCHES]  # fmt: skip


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["float64", "float32"])
@pytest.mark.parametrize(("name", "kind", "padding"), KINDS, ids=["-".join(each) for each in KINDS])
def test_wrapped_and_folded_it_is_the_same_function(name, kind, padding, dtype, tolerance):
    model, x = make(name, dtype, bias=False), data(name, dtype)
    types, keys, want = [type(module) for module in model.modules()], set(model.state_dict()), model(x)
    assert analytic.normalize(model, moments(name, kind), padding=padding, pooling=0.3, residual=0.2) is model
    keys |= {f"{name}.bias" for name in layers(model)}
    assert len(layers(model)) > 1 and error(model(x), want) < tolerance
    assert analytic.fold(model) is model
    assert error(model(x), want) < tolerance
    assert [type(module) for module in model.modules()] == types and set(model.state_dict()) == keys
    assert not any(module._forward_pre_hooks for module in model.modules()) and not any("analytic" in key for key in vars(model))


@pytest.mark.parametrize("place", [None, 0, 1], ids=["model", "layer", "activation"])
def test_hooks_of_others(place):
    """That change what goes in or out: moments and tensors alike."""
    model, x = make("mlp"), data("mlp")
    for module in (model,) if place is None else (model[place],):
        module.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        module.register_forward_hook(lambda module, args, output: output * 3 + 1)
    want = model(x)
    assert error(analytic.normalize(model, moments("mlp"))(x), want) < 1e-12
    assert error(analytic.fold(model)(x), want) < 1e-12


@over_models
def test_outputs_have_mean_bias_and_deviation_scale(name):
    """Of every layer that is normalized, by the moments that go through the folded model; and whatever the weight."""
    model, given = make(name), moments(name)
    analytic.normalize(model, given, eps=EPS, preserve=False)
    for parameter in model.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    for module in model.modules():
        module.train(isinstance(module, nn.Dropout))  # whose noise counts
    wanted = {model.get_submodule(name): (layer.bias.clone(), layer.scale.clone()) for name, layer in layers(model).items()}
    for module, found in passing(analytic.fold(model), given):
        if module in wanted:
            bias, scale = wanted.pop(module)
            torch.testing.assert_close(found.mean.flatten(), bias, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(found.var.flatten(), scale.square(), rtol=1e-8, atol=0)  # EPS relative to variances from 0.01 on
    assert not wanted


def of_outputs(layer, value):
    """The sum of what is like its weight, for each output."""
    groups = getattr(layer, "groups", 1)
    if getattr(layer, "transposed", False):
        return value.view(groups, len(value) // groups, value.shape[1], -1).sum((1, 3))
    return value.flatten(1).sum(1)


@over_models
def test_size_of_a_weight_does_not_matter(name):
    """Nor does the gradient change it: <W, dW> = 0 for every output."""
    model, x = make(name), data(name)
    analytic.normalize(model, moments(name), eps=0.0)
    want = model(x)
    want.square().sum().backward()
    for layer in layers(model).values():
        along, size = of_outputs(layer, layer.weight * layer.weight.grad), layer.weight.norm() * layer.weight.grad.norm()
        assert along.abs().max() <= 1e-14 * size
        with torch.no_grad():
            layer.weight *= 3.7
    torch.testing.assert_close(model(x), want)


@pytest.mark.parametrize("layer", [lambda: nn.Linear(4, 5), lambda: nn.Conv2d(4, 5, 3), lambda: nn.Conv2d(4, 6, 3, groups=2)])
def test_weight_norm(layer):
    """It is that, for mean 0 and variance 1: in value and gradient."""
    ours = nn.Sequential(layer(), nn.Tanh()).double()
    shape = (4,) if isinstance(ours[0], nn.Linear) else (4, 5, 5)
    theirs = copy.deepcopy(ours)
    theirs[0] = nn.utils.parametrizations.weight_norm(theirs[0])
    analytic.normalize(ours, Moments(torch.zeros(4), torch.ones(4), shape), eps=0.0)
    x, norm = torch.randn(3, *shape, dtype=torch.float64), theirs[0].parametrizations.weight
    torch.testing.assert_close(ours[0].scale, norm.original0.flatten())
    for model in (ours, theirs):
        model(x).square().sum().backward()
    torch.testing.assert_close(ours(x), theirs(x))
    for mine, other in ((ours[0].weight, norm.original1), (ours[0].bias, theirs[0].bias), (ours[0].scale, norm.original0)):
        torch.testing.assert_close(mine.grad, other.grad.view_as(mine))


def test_selu_keeps_mean_0_and_variance_1():
    model = nn.Sequential(*(part for _ in range(4) for part in (nn.Linear(8, 8), nn.SELU()))).double()
    given = Moments(torch.randn(8), torch.rand(8) + 0.5)
    found = passing(analytic.normalize(model, given, preserve=False, eps=0.0), given, nn.SELU)
    assert len(found) == 4
    for _, output in found:
        torch.testing.assert_close(output.mean, torch.zeros_like(output.mean), rtol=0, atol=1e-14)
        torch.testing.assert_close(output.var, torch.ones_like(output.var), rtol=0, atol=1e-14)


def test_gradients_by_hand():
    """The definition under torch's autograd: convolution, rectifier, grouped convolution, rectifier, flatten, linear layer."""
    parts = nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, (2, 1), groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3), nn.Tanh()
    model = nn.Sequential(*parts).double()
    x, mean, var = torch.randn(5, 2, 5, 4, dtype=torch.float64), torch.randn(2, dtype=torch.float64), torch.rand(2, dtype=torch.float64) + 0.5
    analytic.normalize(model, Moments(mean, var, (2, 5, 4)), preserve=False, eps=EPS)
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.5, 1)

    def by_hand(x, mean=mean, var=var):
        for place, layer in ((0, F.conv2d), (2, F.conv2d), (5, F.linear)):
            module, groups = model[place], {"groups": 2} if place == 2 else {}
            weight, inputs = module.weight, [value.view(groups.get("groups", 1), -1) for value in (mean, var)]
            inputs = [value.repeat_interleave(len(weight) // len(value), 0).view(*weight.shape[:2], *(1,) * (weight.dim() - 2)) for value in inputs]
            m, q = (weight * inputs[0]).flatten(1).sum(1), (weight.square() * inputs[1]).flatten(1).sum(1)
            r = module.scale / (q + EPS).sqrt()
            x = layer(x, weight * r.view(-1, *(1,) * (weight.dim() - 1)), module.bias - m * r, **groups)
            if place == 5:
                return torch.tanh(x)
            x, (mean, var) = F.relu(x), rectified(module.bias, module.scale.square())
            if place == 2:
                x, mean, var = x.flatten(1), mean.repeat_interleave(4), var.repeat_interleave(4)

    torch.testing.assert_close(gradients(model, x), gradients(model, x, by_hand), rtol=1e-10, atol=1e-12)


CHECKED = {name: lambda name=name: (make(name), moments(name, "channel")) for name in MODELS} | {
    "recurrent": lambda: (Recurrent().double(), Moments(torch.randn(6), torch.rand(6) + 0.5)),
}


@pytest.mark.parametrize("padding", ["ignore", "coverage"])
@pytest.mark.parametrize("name", CHECKED)
def test_gradients_by_differences(name, padding):
    """Of all parameters through all statistics, and of the gradients; nothing is detached."""
    model, given = CHECKED[name]()
    analytic.normalize(model, given, padding=padding, pooling=0.2, residual=0.3)
    x, names = torch.randn(2, *given.sample, dtype=torch.float64), [name for name, _ in model.named_parameters()]
    values = [parameter.detach().clone().requires_grad_() for parameter in model.parameters()]

    def call(*values):
        return functional_call(model, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(call, values, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, values, fast_mode=True)


@over_models
def test_fold_after_training(name):
    """The same bits; and scale, weight and bias of every layer have moved."""
    model, x = make(name), data(name)
    fresh, before = make(name), copy.deepcopy(analytic.normalize(model, moments(name), preserve=False).state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    parameters = {name for name, _ in model.named_parameters()}
    assert all(torch.equal(value, before[key]) != (key in parameters) for key, value in model.state_dict().items())
    want = model(x)
    fresh.load_state_dict(analytic.fold(model).state_dict())
    assert torch.equal(model(x), want) and torch.equal(fresh(x), want)


def test_layers_that_share_a_weight():
    """It trains as one; folded it is two."""
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)).double(), data("mlp")
    model[2].weight = model[0].weight
    assert error(analytic.normalize(copy.deepcopy(model), moments("mlp"))(x), model(x)) < 1e-12
    want = analytic.normalize(model, moments("mlp"), preserve=False)(x)
    assert model[2].weight is model[0].weight and len(list(model.parameters())) == 7
    assert torch.equal(analytic.fold(model)(x), want) and not torch.equal(model[0].weight, model[2].weight)


# ---- initialization ----


@pytest.mark.parametrize("padding", ["ignore", "coverage"])
@pytest.mark.parametrize("kind", ["channel", "position"])
@over_models
def test_initialize(name, kind, padding):
    """Every output of every linear layer gets mean 0 and variance 1; deterministic, in place, the same in evaluation."""
    model, given, options = make(name), moments(name, kind), {"padding": padding, "pooling": 0.3, "residual": 0.2}
    for module in model.modules():
        module.train(isinstance(module, nn.Dropout))  # whose noise counts
    other, parameters = copy.deepcopy(model).eval(), list(model.parameters())
    assert analytic.initialize_(model, given, **options) is model
    assert all(map(torch.equal, model.parameters(), analytic.initialize_(other, given, **options).parameters()))
    assert all(new is old and new.requires_grad for new, old in zip(model.parameters(), parameters, strict=True))
    found = passing(model, given, **options)
    assert len(found) == sum(isinstance(module, LINEAR) for module in model.modules())
    for _, output in found:
        torch.testing.assert_close(output.mean, torch.zeros_like(output.mean), rtol=0, atol=1e-12)
        torch.testing.assert_close(output.var, torch.ones_like(output.var), rtol=0, atol=1e-7)  # EPS relative to variances from 1e-3 on


def test_initialize_at_several_places():
    """At the first."""
    model, given = Recurrent().double(), Moments(torch.randn(6), torch.rand(6) + 0.5)
    found = passing(analytic.initialize_(model, given), given)
    assert [module for module, _ in found] == [model.enter, *[model.again] * 3, model.leave]
    for i in (0, 1, 4):
        torch.testing.assert_close(found[i][1].var, torch.ones_like(found[i][1].var))
    assert (found[2][1].var - 1).abs().min() > 1e-3


def test_a_model_of_one_layer():
    model, given, x = nn.Linear(6, 3).double(), moments("mlp"), data("mlp")
    ((_, output),) = passing(analytic.initialize_(model, given), given)
    torch.testing.assert_close(output.var, torch.ones_like(output.var))
    want = model(x)
    assert not layers(analytic.normalize(copy.deepcopy(model), given)), "no function follows that is not linear"
    assert torch.equal(analytic.normalize(model, given, layers=[""])(x), model(x)) and error(model(x), want) < 1e-12
    assert error(analytic.fold(model)(x), want) < 1e-12 and type(model) is nn.Linear


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Sigmoid, nn.SiLU])
def test_initialized_units_on_data(activation):
    """20000 Gaussian samples through 8 layers: the bounds that propagation is held to, of which sampling itself takes 0.007 and 0.5 %."""
    model = nn.Sequential(nn.Linear(128, 128), *(part for _ in range(7) for part in (activation(), nn.Linear(128, 128))))
    given = Moments(torch.randn(128), torch.rand(128) + 0.5)
    analytic.initialize_(model, given)
    x = given.mean.float() + given.std.float() * torch.randn(20000, 128)
    with torch.no_grad():
        for part in model:
            x = part(x)
            if isinstance(part, nn.Linear):
                assert x.mean(0).square().mean().sqrt() < 0.1
                assert 0.9 < x.std(0).log().mean().exp() < 1.1


def test_statistics_follow_the_model():
    """To its device, here the one without memory; the moments that were given stay where they are."""
    given = analytic.Moments(torch.randn(3), torch.rand(3), (3, 8, 8))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).to("meta")
    assert analytic.propagate(model, given).device.type == "meta"
    assert analytic.normalize(model, given, preserve=False).analytic_mean.device.type == "meta"
    assert model(torch.empty(2, 3, 8, 8, device="meta")).shape == (2, 3)
    assert given.device.type == "cpu"
    moved = analytic.propagate(lambda x: x.cpu().to(torch.float16).to("cpu"), given)
    assert torch.equal(moved.mean, given.mean) and torch.equal(moved.var, given.var)
