"""Whole models and what outlives a call: conversion, freezing, checkpoints of activations, renormalization's schedule, rho and its optimizer."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from norms import compare
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint

import normops
import normops.nn as ours

over_checkpoints = pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non_reentrant"])


def wide(step):
    """A schedule that lets some channels through and clips others, and changes by the step."""
    return 1.2 + 0.1 * step, 0.2 * step


KINDS = {
    "batch_norm": lambda **options: ours.BatchNorm2d(6, **options),
    "cumulative": lambda **options: ours.BatchNorm2d(6, momentum=None, **options),
    "sync_batch_norm": lambda **options: ours.SyncBatchNorm(6, **options),
    "batch_renorm": lambda **options: ours.BatchRenorm2d(6, schedule=wide, momentum=0.1, **options),
    "batch_instance_norm": lambda **options: ours.BatchInstanceNorm2d(6, **options),
}
over_kinds = pytest.mark.parametrize("kind", KINDS)


def make(kind, **options):
    """With parameters and statistics of their own."""
    module = KINDS[kind](**options)
    for value in (*module.parameters(), *module.buffers()):
        if value.is_floating_point():
            nn.init.uniform_(value, 0.5, 1.5)
    return module


def images(samples=3, **options):
    return torch.randn(samples, 6, 5, 4, **options)


def state(module):
    return [value.clone() for value in module.buffers()]


def unchanged(module, before):
    return all(map(torch.equal, module.buffers(), before))


# ---- modules without a counterpart in torch ----


def test_batch_renorm_by_hand(backend, device):
    """Three steps by the formula of the paper, and evaluation; the schedule sees the number of the batch."""
    module = ours.BatchRenorm2d(6, schedule=wide, momentum=0.1, activation="relu", device=device, dtype=torch.float64)
    mean, std = torch.zeros(6, 1, 1, device=device, dtype=torch.float64), torch.ones(6, 1, 1, device=device, dtype=torch.float64)
    offsets = torch.linspace(-2, 2, 6, device=device, dtype=torch.float64)[:, None, None]
    for step in (1, 2, 3):
        x = (images(device=device, dtype=torch.float64) * (1 + offsets.abs()) + offsets).requires_grad_()
        r_max, d_max = wide(step)
        batch_std, batch_mean = (value.detach() for value in ((x.var((0, 2, 3), correction=0) + 1e-3).sqrt(), x.mean((0, 2, 3))))
        batch_std, batch_mean = batch_std[:, None, None], batch_mean[:, None, None]
        r = (batch_std / std).clamp(1 / r_max, r_max)
        d = ((batch_mean - mean) / std).clamp(-d_max, d_max)
        want = F.relu(F.batch_norm(x, None, None, training=True, eps=1e-3) * r + d)
        y, dy = module(x), torch.randn_like(x)
        torch.testing.assert_close(y, want)
        compare(torch.autograd.grad(y, x, dy), torch.autograd.grad(want, x, dy))
        mean, std = mean + 0.1 * (batch_mean - mean), std + 0.1 * (batch_std - std)
        compare([module.running_mean, module.running_std], [mean.flatten(), std.flatten()])
        assert module.num_batches_tracked == step
    before = state(module)
    torch.testing.assert_close(module.eval()(x), F.relu((x - mean) / std))
    assert unchanged(module, before)


def test_batch_renorm_at_its_limits(backend, device):
    """Unclipped, training gives what evaluation gives; with r_max = 1 and d_max = 0, the beginning of the schedule, batch norm."""
    x = images(device=device, dtype=torch.float64) * 3 + 1
    loose = ours.BatchRenorm2d(6, schedule=lambda step: (1e9, 1e9), device=device, dtype=torch.float64)
    nn.init.uniform_(loose.running_std, 0.5, 2)
    want = copy.deepcopy(loose).eval()(x)
    torch.testing.assert_close(loose(x), want)
    plain = ours.BatchRenorm2d(6, device=device, dtype=torch.float64)
    torch.testing.assert_close(plain(x), F.batch_norm(x, None, None, training=True, eps=1e-3))


def test_renorm_schedule():
    """The paper's: r_max 1 to step 5000, then up to 3 at 40000; d_max 0 to step 5000, then up to 5 at 25000."""
    schedule = ours.RenormSchedule()
    for step, r_max, d_max in ((0, 1, 0), (5000, 1, 0), (15000, 1 + 4 / 7, 2.5), (25000, 1 + 8 / 7, 5), (40000, 3, 5), (10**6, 3, 5)):
        got = schedule(torch.tensor(step))
        compare(got, [torch.tensor(value, dtype=torch.float64) for value in (r_max, d_max)])
    own = ours.RenormSchedule(start=10, r_max=2.0, r_end=20, d_max=1.0, d_end=30)
    compare(own(torch.tensor(15)), [torch.tensor(value, dtype=torch.float64) for value in (1.5, 0.25)])
    assert repr(own) == "RenormSchedule(start=10, r_max=2.0, r_end=20, d_max=1.0, d_end=30)"
    for wrong in ({"r_max": 0.5}, {"d_max": -1.0}, {"r_end": 5000}, {"d_end": 10}):
        with pytest.raises(ValueError, match="^RenormSchedule: expected r_max >= 1, d_max >= 0 and ends after 5000, got"):
            ours.RenormSchedule(**wrong)


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 6])
def test_ranks(rank):
    """Renorm's and batch-instance norm's are those of torch's batch norms of the name; synchronized batch norm takes any."""
    x = torch.randn((3, 6, 2, 2, 2, 2)[:rank])
    for dims in (1, 2, 3):
        theirs = getattr(nn, f"BatchNorm{dims}d")(6)
        for kind in ("BatchRenorm", "BatchInstanceNorm"):
            module = getattr(ours, f"{kind}{dims}d")(6)
            try:
                theirs._check_input_dim(x)
            except ValueError as error:
                with pytest.raises(ValueError) as caught:
                    module(x)
                assert str(caught.value) == str(error)
            else:
                if rank > 2 or kind == "BatchRenorm":
                    assert module(x).shape == x.shape
    if rank > 1:
        torch.testing.assert_close(ours.SyncBatchNorm(6)(x), F.batch_norm(x, None, None, training=True))
    else:
        with pytest.raises(ValueError, match=r"^SyncBatchNorm: expected input of shape \(N, C, \*spatial\), got \(3,\)"):
            ours.SyncBatchNorm(6)(x)


@over_kinds
def test_wrong_inputs(kind):
    """One sentence, of the function that would have computed; the statistics stay."""
    module = make(kind)
    means = module.running_mean.clone()
    for x, options, text in (
        (torch.randn(3, 5, 2, 2), {}, r"expected weight of shape \(5,\) or \(3, 5\), got \(6,\)"),
        (images(), {"residual": images(2)}, r"expected residual of x's shape \(3, 6, 5, 4\), got \(2, 6, 5, 4\)"),
        (images(), {"scale": torch.randn(6)}, r"expected scale of shape \(3, 6\), got \(6,\)"),
    ):
        with pytest.raises(ValueError, match=f"^{'batch_norm' if kind == 'cumulative' else kind}: {text}$"):
            module(x, **options)
    assert torch.equal(module.running_mean, means)


def test_construction():
    """Parameters, buffers and representations of what torch does not have."""
    renorm, blend = ours.BatchRenorm2d(6, activation="relu"), ours.BatchInstanceNorm2d(6, activation="relu")
    assert list(renorm.state_dict()) == ["weight", "bias", "running_mean", "running_std", "num_batches_tracked"]
    assert repr(renorm) == f"BatchRenorm2d(6, eps=0.001, momentum=0.01, affine=True, schedule={ours.RenormSchedule()!r}, activation='relu')"
    assert list(blend.state_dict()) == ["weight", "bias", "rho", "running_mean", "running_var", "num_batches_tracked"]
    assert blend.rho.eq(1).all() and isinstance(blend.rho, nn.Parameter)
    nn.init.zeros_(blend.rho)
    blend.reset_parameters()
    assert blend.rho.eq(1).all()
    assert "activation='relu'" in repr(blend)
    bare = ours.BatchRenorm2d(6, affine=False)
    assert bare.weight is None and bare.bias is None and not list(bare.parameters())
    for module in (renorm, blend, ours.SyncBatchNorm(6)):
        assert all(value.is_meta for value in copy.deepcopy(module).to("meta").state_dict().values())
        assert {value.dtype for value in copy.deepcopy(module).bfloat16().state_dict().values()} == {torch.bfloat16, torch.int64}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"])
@over_kinds
def test_copies_and_state(kind, copied):
    """After a step, so that statistics differ from those of a new module; and through a state_dict."""
    module = make(kind, activation="leaky_relu", negative_slope=0.3)
    module(images())
    other, third = copied(module), KINDS[kind](activation="leaky_relu", negative_slope=0.3)
    assert not any(third.load_state_dict(module.state_dict())) and repr(other) == repr(module)
    x = images()
    for training in (True, False):
        want = module.train(training)(x)
        assert all(torch.equal(each.train(training)(x), want) for each in (other, third))
    assert unchanged(other, state(module)) and unchanged(third, state(module))


@over_kinds
def test_functional_call(kind):
    """Buffers handed in are those that are updated; the module's own stay."""
    module = make(kind)
    eager = copy.deepcopy(module)
    before, buffers = state(module), {name: value.clone() for name, value in module.named_buffers()}
    x = images()
    y = torch.func.functional_call(module, (dict(module.named_parameters()), buffers), (x,))
    assert torch.equal(y, eager(x)) and unchanged(module, before) and unchanged(eager, buffers.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@over_kinds
def test_autocast(kind, dtype):
    """A training step under autocast, far from zero: finite, close to float32's, parameters and statistics in float32."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 6, 1), make(kind, activation="relu"), nn.Conv2d(6, 6, 1))
    exact = copy.deepcopy(model)
    x = images(8) * 20 + 100
    with torch.autocast("cpu", dtype):
        y = model(x)
    assert y.dtype == dtype
    y.float().square().mean().backward()
    exact(x).square().mean().backward()
    for one, two in zip(model.parameters(), exact.parameters(), strict=True):
        assert one.grad.isfinite().all() and one.grad.dtype == torch.float32
        assert (one.grad - two.grad).norm() <= 0.1 * two.grad.norm() + 0.1
    for one, two in zip(model.buffers(), exact.buffers(), strict=True):
        assert one.dtype == two.dtype
        torch.testing.assert_close(one, two, rtol=0.02, atol=0.5)


# ---- checkpoints of activations, and several calls before one backward ----


class Region(nn.Module):
    """What a checkpoint surrounds."""

    def __init__(self, kind):
        super().__init__()
        self.enter, self.norm, self.leave = nn.Conv2d(6, 6, 1), make(kind, activation="relu"), nn.Conv2d(6, 6, 1)

    def forward(self, x):
        return self.leave(self.norm(self.enter(x)))


def gradients(model, call, x):
    x = x.detach().requires_grad_()
    y = call(x)
    y.square().sum().backward()
    found = [y.detach(), x.grad, *(parameter.grad.clone() for parameter in model.parameters())]
    model.zero_grad()
    return found


@over_checkpoints
@over_kinds
def test_checkpoint(kind, use_reentrant, backend, device):
    """Computed twice, counted and averaged once; the gradients are those without, step after step: renorm's r and d are what they were, to a
    rounding."""
    model = Region(kind).to(device)
    plain = copy.deepcopy(model)
    for _ in range(3):
        x = images(device=device) * 2 + 1
        got = gradients(model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant), x)
        want = gradients(plain, plain, x)
        compare(got, want, **({"rtol": 1e-5, "atol": 1e-5} if kind == "batch_renorm" else {"rtol": 0, "atol": 0}))
        assert unchanged(model, state(plain))
    x = images(device=device)
    assert torch.equal(checkpoint(model.eval(), x, use_reentrant=False), plain.eval()(x))


@over_checkpoints
def test_checkpointed_single_value_and_frozen(use_reentrant):
    """A batch that the running statistics normalize changes nothing, recomputed or not; nor do frozen norms."""
    lenient = make("batch_norm", on_single_value="running")
    frozen = ours.freeze_batch_norm(make("batch_norm"))
    for module, x in ((lenient, torch.randn(1, 6, 1, 1)), (frozen, images())):
        plain, before = copy.deepcopy(module), state(module)
        got, want = gradients(module, lambda x, module=module: checkpoint(module, x, use_reentrant=use_reentrant), x), gradients(plain, plain, x)
        assert all(map(torch.equal, got, want)) and unchanged(module, before)


@over_checkpoints
def test_update_bn_after_checkpointed_training(use_reentrant):
    """Stochastic weight averaging: update_bn resets the statistics of the averaged model and averages them over all batches."""
    model = nn.Sequential(make("batch_norm"), nn.Conv2d(6, 6, 1), make("batch_instance_norm"))
    averaged = AveragedModel(model)
    for _ in range(2):
        gradients(model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant), images())
        averaged.update_parameters(model)
    theirs = copy.deepcopy(averaged)
    theirs.module[0] = nn.BatchNorm2d(6)
    theirs.module[0].load_state_dict(averaged.module[0].state_dict())
    loader = [images() for _ in range(3)]
    update_bn(loader, averaged)
    update_bn(loader, theirs)
    assert averaged.module[0].num_batches_tracked == 3 and averaged.module[0].momentum == 0.1
    compare(averaged.module[0].buffers(), theirs.module[0].buffers())
    means = [averaged.train().module[:2](x).mean((0, 2, 3)).detach() for x in loader]
    torch.testing.assert_close(averaged.module[2].running_mean, torch.stack(means).mean(0))
    assert averaged.module[2].num_batches_tracked == 3


@over_kinds
def test_two_forwards_before_one_backward(kind, backend, device):
    """Nothing that backward needs is overwritten by the second call: each gradient is what it would be alone, in evaluation too."""
    module = make(kind, device=device)
    plain = copy.deepcopy(module)
    xs = [images(device=device, requires_grad=True) for _ in range(3)]
    ys, wants = [], []
    for x, training in zip(xs, (False, True, True), strict=True):
        ys.append(module.train(training)(x).square().sum())
        wants.append(torch.autograd.grad(plain.train(training)(x).square().sum(), [x, *plain.parameters()]))
    got = torch.autograd.grad(sum(ys), [*xs, *module.parameters()])
    compare(got[:3], [want[0] for want in wants])
    compare(got[3:], [sum(parts) for parts in zip(*(want[1:] for want in wants), strict=True)])
    assert unchanged(module, state(plain))


@over_kinds
def test_buffers_may_not_be_changed_behind_autograd(kind):
    """The kernels' writes are seen: a graph that holds a buffer refuses to run backward after it was updated."""
    module = make(kind)
    x = images(requires_grad=True)
    loss = (module.running_mean * x.mean((0, 2, 3))).sum()
    versions = [value._version for value in module.buffers()]
    module(x)
    assert all(value._version > version for value, version in zip(module.buffers(), versions, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- conversion ----


class Special(nn.BatchNorm2d):
    """A subclass of torch's norm, whose additions nobody knows."""


def mixed():
    return nn.Sequential(
        nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Sequential(nn.GroupNorm(3, 6), nn.InstanceNorm2d(6, affine=True)), nn.LayerNorm(4),
        Special(6), nn.BatchNorm2d(6, momentum=None), nn.RMSNorm(4),
    )  # fmt: skip


def test_convert():
    """In place: the same objects, parameters and hooks; an optimizer goes on where it was; the results are torch's."""
    model = mixed().double()
    theirs = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(each.parameters(), 0.1, momentum=0.9) for each in (model, theirs)]

    def step(x):
        for each, optimizer in zip((model, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            each(x).square().mean().backward()
            optimizer.step()

    step(images(dtype=torch.float64))
    modules, parameters, called = list(model.modules()), list(model.parameters()), []
    hook = model[1].register_forward_hook(lambda *_: called.append(1))
    assert ours.convert(model) is model
    assert all(one is two for one, two in zip(model.modules(), modules, strict=True))
    assert all(one is two for one, two in zip(model.parameters(), parameters, strict=True))
    kinds = [type(module) for module in model]
    assert kinds == [nn.Conv2d, ours.BatchNorm2d, nn.ReLU, nn.Sequential, ours.LayerNorm, Special, ours.BatchNorm2d, ours.RMSNorm]
    assert [type(module) for module in model[3]] == [ours.GroupNorm, ours.InstanceNorm2d]
    for _ in range(3):
        step(images(dtype=torch.float64))
    assert len(called) == 3
    hook.remove()
    compare(model.state_dict().values(), theirs.state_dict().values())
    x = images(dtype=torch.float64)
    torch.testing.assert_close(model.eval()(x), theirs.eval()(x))
    again = ours.convert(model)
    assert [type(module) for module in again] == kinds, "a second time it changes nothing"
    assert "BatchNorm2d(6, eps=1e-05, momentum=0.1" in repr(model) and type(pickle.loads(pickle.dumps(model))[1]) is ours.BatchNorm2d


@pytest.mark.parametrize("make_theirs, kind", [
    (lambda: nn.BatchNorm1d(6), "BatchNorm1d"), (lambda: nn.BatchNorm3d(6), "BatchNorm3d"), (lambda: nn.InstanceNorm1d(6), "InstanceNorm1d"),
    (lambda: nn.InstanceNorm3d(6), "InstanceNorm3d"), (lambda: nn.SyncBatchNorm(6), "SyncBatchNorm"),
])  # fmt: skip
def test_convert_one(make_theirs, kind):
    """Also where the model is the norm, and what needs arguments of its own works afterwards."""
    module = ours.convert(make_theirs())
    assert type(module) is getattr(ours, kind)
    x = torch.randn((3, 6, 2, 3, 4) if "3d" in kind else (3, 6, 4))
    assert module(x, residual=x).shape == x.shape and copy.deepcopy(module)(x).shape == x.shape and repr(module)


def test_convert_sync_batchnorm():
    """Every batch norm, torch's and ours; with one worker it is batch norm."""
    model = mixed().double()
    theirs = copy.deepcopy(model)
    del model[5], theirs[5]
    model.append(ours.BatchNorm2d(6, activation="relu"))
    for converted in (ours.convert_sync_batchnorm(copy.deepcopy(model)), ours.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))):
        assert [type(converted[i]) for i in (1, 5, 7)] == [ours.SyncBatchNorm] * 3
        x = images(dtype=torch.float64)
        plain = copy.deepcopy(theirs)
        torch.testing.assert_close(converted[:-1](x), plain(x))
        compare(converted[:-1].buffers(), plain.buffers())
        assert converted[7].activation == "relu"


# ---- freezing ----


@pytest.mark.parametrize("affine", [True, False])
@over_kinds
def test_freeze(kind, affine):
    """Under train() too the running statistics normalize and stay; the gradients are those of evaluation, fused activation included."""
    module = make(kind, activation="silu")
    plain = copy.deepcopy(module).eval()
    assert ours.freeze_batch_norm(module, affine=affine) is module
    before = state(module)
    module.train()
    x = images(requires_grad=True)
    y, want = module(x), plain(x)
    assert torch.equal(y, want) and unchanged(module, before) and "frozen=True" in repr(module)
    assert [module.weight.requires_grad, module.bias.requires_grad] == [affine] * 2
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, [x, *([module.weight, module.bias] if affine else [])], dy, create_graph=True)
    expected = torch.autograd.grad(want, [x, *([plain.weight, plain.bias] if affine else [])], dy, create_graph=True)
    assert all(map(torch.equal, got, expected))
    compare(*(torch.autograd.grad(each[0].square().sum(), x) for each in (got, expected)))
    ours.unfreeze_batch_norm(module)
    module(x)
    assert not unchanged(module, before) and module.weight.requires_grad and "frozen" not in repr(module)


def test_freeze_a_model():
    """torch's modules too, which become ours; the rest of the model trains on."""
    model = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.Sequential(nn.ReLU(), make("batch_renorm")), nn.GroupNorm(3, 6))
    model(images())
    ours.freeze_batch_norm(model)
    plain = copy.deepcopy(model).eval()
    before, other = state(model), images(1)
    for each in (model.train(), plain):
        each(other).square().sum().backward()
    assert unchanged(model, before)
    compare([value.grad for value in model.parameters()], [value.grad for value in plain.parameters()], rtol=0, atol=0)
    loaded = copy.deepcopy(model)
    assert unchanged(loaded.train(), before) and loaded[1].frozen
    ours.freeze_batch_norm(model, affine=False)
    assert [value.requires_grad for value in model.parameters()] == [True, True, False, False, False, False, True, True]
    ours.unfreeze_batch_norm(model)
    assert all(value.requires_grad for value in model.parameters())
    model(other)
    assert not unchanged(model, before)


def test_freeze_refuses():
    """What has no statistics to normalize by, and what nobody knows how to freeze: by name, and nothing else is frozen."""
    for wrong, exception, text in (
        (nn.BatchNorm2d(6, track_running_stats=False), ValueError, "freeze_batch_norm: expected running statistics in 1, got a norm without"),
        (Special(6), TypeError, "freeze_batch_norm: expected batch norms of torch.nn or normops.nn, got Special in 1"),
    ):
        model = nn.Sequential(nn.BatchNorm2d(6), wrong)
        with pytest.raises(exception, match=f"^{text}"):
            ours.freeze_batch_norm(model)
        assert not getattr(model[0], "frozen", False)
    with pytest.raises(ValueError, match="expected running statistics in the model, got a norm without"):
        ours.freeze_batch_norm(nn.BatchNorm2d(6, track_running_stats=False))


# ---- rho ----


def blended():
    return nn.Sequential(nn.Conv2d(6, 6, 1), ours.BatchInstanceNorm2d(6), nn.ReLU(), nn.Sequential(ours.BatchInstanceNorm2d(6)))


def test_parameter_groups():
    """rho learns ten times as fast without decay; every parameter is in one group once."""
    model = blended()
    others, rhos = ours.parameter_groups(model, lr=0.01, weight_decay=0.1)
    assert [id(rho) for rho in rhos["params"]] == [id(model[1].rho), id(model[3][0].rho)]
    assert (rhos["lr"], rhos["weight_decay"], others["lr"], others["weight_decay"]) == (pytest.approx(0.1), 0.0, 0.01, 0.1)
    assert sorted(map(id, others["params"] + rhos["params"])) == sorted(map(id, model.parameters()))
    assert ours.parameter_groups(model, 0.01, factor=2.0)[1]["lr"] == 0.02
    optimizer = torch.optim.SGD([others, rhos])
    model(images()).square().sum().backward()
    start = [rho.clone() for rho in rhos["params"]]
    optimizer.step()
    compare([rho.detach() for rho in rhos["params"]], [value - 0.1 * rho.grad for value, rho in zip(start, rhos["params"], strict=True)])


def test_clamp_after_step():
    """rho stays in [0, 1] after each step of this optimizer, until the handle is removed."""
    model = blended()
    optimizer = torch.optim.SGD(ours.parameter_groups(model, 1.0))
    handle = ours.clamp_after_step(optimizer, model)
    rhos = [model[1].rho, model[3][0].rho]

    def step(gradient):
        for rho in rhos:
            rho.grad = gradient.clone()
        optimizer.step()

    step(torch.tensor([-1.0, 0.0, 0.05, 0.1, 0.2, 1.0]))  # times 10, from 1
    for rho in rhos:
        torch.testing.assert_close(rho.detach(), torch.tensor([1.0, 1.0, 0.5, 0.0, 0.0, 0.0]))
    handle.remove()
    step(torch.full((6,), -1.0))
    assert all(rho.max() > 1 for rho in rhos)
    model[1].clamp_rho_()
    assert model[1].rho.max() == 1 and model[3][0].rho.max() > 1 and model[1].rho.requires_grad


def test_rho_blends(backend, device):
    """1 is batch norm, 0 instance norm, in training and evaluation."""
    x = images(device=device, dtype=torch.float64)
    for rho, plain in ((1.0, nn.BatchNorm2d(6)), (0.0, nn.InstanceNorm2d(6))):
        module, plain = ours.BatchInstanceNorm2d(6, device=device, dtype=torch.float64), plain.to(device, torch.float64)
        nn.init.constant_(module.rho, rho)
        for training in (True, False):
            torch.testing.assert_close(module.train(training)(x), plain.train(training)(x))
    batch = nn.BatchNorm2d(6).to(device, torch.float64)
    batch(x)
    compare(module.buffers(), batch.buffers())


def test_public_names():
    """What is documented is exported."""
    for name in ours.__all__:
        assert getattr(ours, name).__doc__, name
    assert {"batch_norm", "sync_batch_norm", "batch_renorm", "batch_instance_norm"} <= set(normops.__all__)
