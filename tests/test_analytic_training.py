"""Normalized models in training, and with the rest of torch: modes, checkpoints, workers, copies, precisions, compilers, transforms."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import workers
from analytic_models import Checkpointed, Recurrent, data, error, gradients, layers, make, moments
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from workers import on_workers

import normops
from normops import analytic
from normops.analytic import Moments


@pytest.fixture(scope="module", autouse=True)
def stop_workers():
    yield
    workers.close()


# ---- training ----


def test_batches_and_modes_do_not_matter():
    model, x = make("mlp"), data("mlp")
    analytic.normalize(model, moments("mlp"))
    want, buffers = model.eval()(x), [value.clone() for value in model.buffers()]
    assert torch.equal(model.train()(x), want)
    torch.testing.assert_close(torch.cat([model(sample) for sample in x.split(1)]), want)
    model(x).sum().backward()
    assert all(map(torch.equal, model.buffers(), buffers))


def test_noise_of_dropout_always_counts():
    def model(p):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(p), nn.Linear(8, 4), nn.Tanh()).double()

    given, x = moments("mlp"), data("mlp")
    noisy, calm = (analytic.normalize(model(p), given, preserve=False) for p in (0.5, 0.0))
    weights = [analytic.fold(copy.deepcopy(each.train(training)))[3].weight for each in (noisy, calm) for training in (True, False)]
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[2], weights[3]) and weights[0].norm() < 0.9 * weights[2].norm()
    torch.testing.assert_close(analytic.normalize(model(0.5).eval(), given)(x), model(0.5).eval()(x))


def test_the_sweep_leaves_no_trace():
    """Neither in running statistics of other norms nor in the random numbers of dropout."""
    model, x = make("cnn").train(), data("cnn")
    plain, normalized = copy.deepcopy(model), analytic.normalize(model, moments("cnn"))
    outputs = []
    for each in (plain, normalized):
        torch.manual_seed(0)
        outputs.append(each(x))
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(list(normalized[1].buffers()), list(plain[1].buffers()), rtol=0, atol=0)
    assert normalized[1].num_batches_tracked == 1


def test_one_sweep_for_each_call():
    model, x, sweeps = make("mlp"), data("mlp"), []
    analytic.normalize(model, moments("mlp"))
    model[0].register_forward_hook(lambda module, args, output: sweeps.append(isinstance(output, Moments)))
    model(x).sum().backward()
    assert sweeps == [True, False]
    with torch.no_grad():
        model(x)
    assert sweeps == [True, False] * 2


def test_statistics_at_every_place_of_a_layer():
    """By hand, place by place; and what has one weight at several places is no plain model."""
    model, given, x = Recurrent().double(), Moments(torch.randn(6), torch.rand(6) + 0.5), torch.randn(4, 6, dtype=torch.float64)
    analytic.normalize(model, given, preserve=False)
    y = model(x)
    mean, var, layer = *normops.activation_moments(model.enter.bias, model.enter.scale.square(), "tanh"), model.again
    want = torch.tanh(F.linear(x, *normops.analytic_norm_weight(model.enter.weight, given.mean, given.var, model.enter.scale, model.enter.bias)[:2]))
    for _ in range(3):
        want = torch.relu(F.linear(want, *normops.analytic_norm_weight(layer.weight, mean, var, layer.scale, layer.bias)[:2]))
        mean, var = normops.activation_moments(layer.bias, layer.scale.square(), "relu")
    torch.testing.assert_close(y, model.leave(want))
    both = gradients(model, x, lambda x: model(x) + model(2 * x))
    torch.testing.assert_close(both[0], model(x) + model(2 * x))
    with pytest.raises(ValueError, match=r"^analytic.fold: expected layers that are called at one place, got a Linear at 3$"):
        analytic.fold(model)
    model.again = Checkpointed(model.again)
    with pytest.raises(NotImplementedError, match="^Linear: expected one call of a checkpointed layer, got 3$"):
        model(x).sum().backward()


def test_several_calls_before_one_backward():
    model, x = make("cnn"), data("cnn")
    analytic.normalize(model, moments("cnn"))
    want = [sum(pair) for pair in zip(*(gradients(model, value) for value in (x, 2 * x)), strict=True)]
    model.zero_grad()
    outputs = [model(x), model(2 * x)]
    with torch.no_grad():
        assert torch.equal(model(x), outputs[0])
    with torch.inference_mode():
        assert torch.equal(model(x), outputs[0])
    sum(output.square().sum() for output in outputs).backward(retain_graph=True)
    torch.testing.assert_close([sum(outputs), *(parameter.grad for parameter in model.parameters())], want)
    outputs[0].sum().backward()  # the graph of the sweep was retained too
    outputs[1].sum().backward()


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("place", ["inside", "outside", "nested"])
def test_checkpoint(place, calls):
    inside = [nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Tanh()]
    inside = nn.Sequential(*inside) if place == "outside" else Checkpointed(nn.Sequential(*inside))
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), inside, nn.Flatten(), nn.Linear(36, 3)).double()
    model = analytic.normalize(model, Moments(torch.randn(2), torch.rand(2) + 0.5, (2, 5, 5)))
    outer = model if place == "inside" else Checkpointed(model)
    x = torch.randn(3, 2, 5, 5, dtype=torch.float64)

    def call(x):
        return sum(outer(value * x) for value in range(1, 1 + calls))

    found = gradients(model, x, call)
    for module in (outer, *model):
        module.active = False
    torch.testing.assert_close(found, gradients(model, x, call))


@on_workers
@pytest.mark.parametrize("sizes", [(5, 3, 2), (4, 0, 6)], ids=str)
def test_data_parallel(sizes):
    """Steps on uneven shards give one process's weights, without a word about statistics."""
    one = analytic.normalize(make("depthwise"), moments("depthwise"))
    ours = DistributedDataParallel(copy.deepcopy(one), broadcast_buffers=False)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in (one, ours)]
    for _ in range(3):
        x, target = data("depthwise", samples=10), torch.randn(10, 2, dtype=torch.float64)
        mine = [value.split(sizes)[dist.get_rank()] for value in (x, target)]
        for optimizer, loss in zip(optimizers, (F.mse_loss(one(x), target), (ours(mine[0]) - mine[1]).square().sum() * 3 / 20), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for mine, other in zip(ours.module.state_dict().values(), one.state_dict().values(), strict=True):
        everywhere = [torch.empty_like(mine) for _ in sizes]
        dist.all_gather(everywhere, mine.contiguous())
        assert all(torch.equal(value, mine) for value in everywhere)
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-11)


# ---- with the rest of torch ----


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def loaded(model):
    other = analytic.normalize(make("cnn"), moments("cnn"))
    assert not any(other.load_state_dict(model.state_dict()))
    return other


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved, loaded],
                         ids=["deepcopy", "pickle", "save", "state_dict"])  # fmt: skip
def test_copies(copied):
    """In the middle of training: same outputs and gradients, nothing in common."""
    model, x = analytic.normalize(make("cnn"), moments("cnn")), data("cnn")
    y = model(x)
    other = copied(model)
    assert repr(other) == repr(model) and not {id(value) for value in model.parameters()} & {id(value) for value in other.parameters()}
    torch.testing.assert_close(gradients(other, x), gradients(model, x), rtol=0, atol=0)
    with torch.no_grad():
        model[0].weight += 1
        layers(model)["3.body.0"].scale *= 2
    assert torch.equal(other(x), y) and not torch.equal(model(x), y)
    assert torch.equal(analytic.fold(other)(x), y)


def test_state():
    """What a normalized model has beside the plain one, and where it is not the same."""
    model = make("mlp", bias=False)
    plain = copy.deepcopy(model.state_dict())
    analytic.normalize(model, moments("mlp"))
    more = {"analytic_mean", "analytic_var", "0.scale", "0.bias", "2.scale"}
    assert set(model.state_dict()) == set(plain) | more
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(plain)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        make("mlp").load_state_dict(model.state_dict())
    model = analytic.normalize(make("conv1d"), moments("conv1d", "patch"))
    assert {"analytic_patch_mean", "analytic_patch_covariance"} <= set(model.state_dict())


def test_parameters_are_those_of_before():
    """For optimizers that know them already, and frozen ones stay frozen; scale is a parameter like others."""
    model = make("mlp", bias=False)
    model[2].requires_grad_(False)
    before = dict(model.named_parameters())
    analytic.normalize(model, moments("mlp"))
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert {name: parameter.requires_grad for name, parameter in after.items()} == {
        "0.weight": True, "0.bias": True, "0.scale": True, "2.weight": False, "2.bias": False, "2.scale": True, "4.weight": True, "4.bias": True
    }  # fmt: skip
    groups = normops.nn.parameter_groups(model, lr=0.1)
    assert {id(value) for group in groups for value in group["params"]} == {id(value) for value in after.values()}
    model(data("mlp")).sum().backward()
    assert {name for name, parameter in after.items() if parameter.grad is None} == {"2.weight", "2.bias"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bits(dtype):
    """Made so, or moved there, with the buffers: no further from float64 than twice the plain model with the rounded weights of float64."""
    exact, x = analytic.normalize(make("cnn"), moments("cnn"), preserve=False), data("cnn")
    model = copy.deepcopy(exact).to(dtype)
    assert {value.dtype for value in model.state_dict().values() if value.is_floating_point()} == {dtype}
    exact.load_state_dict(model.state_dict())
    want, y = exact(x.to(dtype).double()), model(x.to(dtype))
    plain = analytic.fold(copy.deepcopy(exact)).to(dtype)(x.to(dtype))
    assert error(y.double(), want) <= 2 * error(plain.double(), want) + torch.finfo(dtype).eps
    y.float().square().sum().backward()
    assert all(parameter.grad.dtype == dtype and parameter.grad.isfinite().all() for parameter in model.parameters())
    assert analytic.normalize(make("cnn", dtype), moments("cnn"))(x.to(dtype)).dtype == dtype
    assert all(value.is_meta for value in model.to("meta").state_dict().values())


def test_moved(device):
    """To a GPU and back, with the statistics."""
    if device == "cpu":
        pytest.skip("there is no other device")
    model, x = analytic.normalize(make("cnn"), moments("cnn"), preserve=False), data("cnn")
    want = gradients(model, x)
    found = gradients(model.to(device), x.to(device))
    torch.testing.assert_close([value.cpu() for value in found], want)
    torch.testing.assert_close(gradients(model.cpu(), x), want)


def test_autocast():
    """The sweep goes on in the parameters' own precision: the same bits as the plain model."""
    model, x = analytic.normalize(make("cnn", torch.float32), moments("cnn"), preserve=False), data("cnn", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        want = analytic.fold(copy.deepcopy(model))(x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, want)
    found = gradients_under(model, x, True)
    for mine, exact in zip(found, gradients_under(model, x, False), strict=True):
        assert mine.dtype == torch.float32 and (mine - exact).norm() <= 0.1 * exact.norm()  # several roundings of 2^-8


def gradients_under(model, x, autocast):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    y.float().square().sum().backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile(compiler):
    """In place: eager's outputs and gradients in every step, compiled at the first; by torch 2.13 and later as one graph."""
    torch._dynamo.reset()
    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        counter, name = CompileCounterWithBackend(compiler), "cnn" if compiler == "aot_eager" else "mlp"
        model = analytic.normalize(make(name), moments(name), preserve=False)
        eager, optimizer = copy.deepcopy(model), torch.optim.SGD(model.parameters(), lr=0.01)
        model.compile(backend=counter)
        counts = []
        for _ in range(3):
            x = data(name)
            torch.testing.assert_close(gradients(model, x), gradients(eager, x))
            optimizer.step()
            eager.load_state_dict(model.state_dict())
            counts.append(counter.frame_count)
        assert counts[0] == counts[1] == counts[2] >= 1
        assert counts[0] == 1 or torch.__version__ < "2.13"
    torch._dynamo.reset()


def test_func():
    """Derivatives by torch.func, and an ensemble under vmap with weights, scales and statistics of its own."""
    models, x = [analytic.normalize(make("cnn"), moments("cnn"), preserve=False) for _ in range(3)], data("cnn")
    model = models[0]
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    directions = {name: torch.randn_like(value) for name, value in parameters.items()}

    def call(parameters):
        return functional_call(model, parameters, (x,)).square().sum()

    found = torch.func.grad(call)(parameters)
    torch.testing.assert_close(list(found.values()), gradients(model, x)[1:])
    along = sum((found[name] * direction).sum() for name, direction in directions.items())
    torch.testing.assert_close(torch.func.jvp(call, (parameters,), (directions,))[1], along)
    y = torch.vmap(lambda *state: functional_call(model, state, (x,)))(*torch.func.stack_module_state(models))
    torch.testing.assert_close(y, torch.stack([each(x) for each in models]))


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x, rectify=True):
        x = self.first(x)
        return torch.tanh(self.last(torch.relu(x) if rectify else torch.sigmoid(x)))


def test_arguments_of_the_model_reach_the_sweep():
    model, x = analytic.normalize(Branches().double(), moments("mlp"), preserve=False), data("mlp")
    folded = {flag: analytic.fold(copy.deepcopy(model), flag) for flag in (True, False)}
    assert not torch.equal(folded[True].last.weight, folded[False].last.weight)
    for flag in (True, False):
        assert torch.equal(model(x, flag), folded[flag](x, flag)) and torch.equal(model(x, rectify=flag), folded[flag](x, rectify=flag))
