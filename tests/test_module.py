"""``normops.nn.GroupNorm`` in place of ``torch.nn.GroupNorm``."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normops
from normops.nn import GroupNorm


def randomized(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16], ids=str)
def test_constructor(affine, dtype, device):
    options = {"affine": affine, "device": device, "dtype": dtype}
    ours, theirs = GroupNorm(4, 12, 1e-3, **options), nn.GroupNorm(4, 12, 1e-3, **options)
    assert isinstance(ours, nn.GroupNorm)
    assert repr(ours) == repr(theirs)
    assert (ours.num_groups, ours.num_channels, ours.eps, ours.affine) == (4, 12, 1e-3, affine)
    one, two = ours.state_dict(), theirs.state_dict()
    assert list(one) == list(two)
    for name in one:
        assert torch.equal(one[name], two[name]) and one[name].dtype == two[name].dtype and one[name].device == two[name].device


def test_constructor_raises_as_torch_does():
    with pytest.raises(ValueError, match="must be divisible by num_groups"):
        GroupNorm(5, 12)
    with pytest.raises(TypeError):
        GroupNorm(5)


def test_state_dict_both_ways():
    theirs = randomized(nn.GroupNorm(4, 12))
    ours = GroupNorm(4, 12, activation="silu")
    assert not any(ours.load_state_dict(theirs.state_dict()))
    assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.bias, theirs.bias)
    randomized(ours)
    assert not any(theirs.load_state_dict(ours.state_dict()))
    assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.bias, theirs.bias)


def test_repr_names_what_is_fused():
    assert repr(GroupNorm(2, 4)) == "GroupNorm(2, 4, eps=1e-05, affine=True)" or repr(GroupNorm(2, 4)) == repr(nn.GroupNorm(2, 4))
    assert "activation='silu'" in repr(GroupNorm(2, 4, activation="silu"))
    assert "negative_slope=0.3" in repr(GroupNorm(2, 4, activation="leaky_relu", negative_slope=0.3))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"])
def test_copies(copied, backend, device):
    module = randomized(GroupNorm(4, 12, activation="leaky_relu", negative_slope=0.3, device=device))
    x = torch.randn(2, 12, 5, device=device)
    other = copied(module)
    assert repr(other) == repr(module) and torch.equal(other(x), module(x))
    assert other.weight.data_ptr() != module.weight.data_ptr()


def test_keywords(backend, device):
    """activation, residual, scale and shift, in the documented order."""
    module = randomized(GroupNorm(4, 12, activation="silu", device=device, dtype=torch.float64))
    x, residual = torch.randn(2, 2, 12, 5, 5, device=device, dtype=torch.float64)
    scale, shift = torch.randn(2, 2, 12, device=device, dtype=torch.float64)
    t = F.group_norm(x, 4, module.weight, module.bias, module.eps)
    torch.testing.assert_close(module(x), F.silu(t))
    torch.testing.assert_close(module(x, residual=residual), F.silu(t + residual))
    t = t * (1 + scale[..., None, None]) + shift[..., None, None]
    torch.testing.assert_close(module(x, residual=residual, scale=scale, shift=shift), F.silu(t + residual))
    torch.testing.assert_close(normops.group_norm(x, 4, module.weight, module.bias, module.eps, scale=scale, shift=shift), t)


def test_does_not_touch_parameters_that_do_not_train(backend, device):
    module = GroupNorm(4, 12, device=device)
    module.bias.requires_grad_(False)
    module(torch.randn(2, 12, 5, device=device)).square().sum().backward()
    assert module.bias.grad is None and module.weight.grad is not None


class Block(nn.Module):
    """A residual block of a diffusion UNet: norm, act, conv, with the time embedding as scale and shift."""

    def __init__(self, channels, fused):
        super().__init__()
        kind = (lambda: GroupNorm(4, channels, activation="silu")) if fused else (lambda: nn.GroupNorm(4, channels))
        self.fused = fused
        self.norm1, self.norm2 = kind(), kind()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.embed = nn.Linear(6, 2 * channels)

    def forward(self, x, time):
        scale, shift = self.embed(time).chunk(2, 1)
        if self.fused:
            h = self.conv1(self.norm1(x))
            return x + self.conv2(self.norm2(h, scale=scale, shift=shift))
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.norm2(h) * (1 + scale[..., None, None]) + shift[..., None, None]
        return x + self.conv2(F.silu(h))


class UNet(nn.Module):
    """Down, middle, up, with a skip connection that is concatenated: norms see channels_last, odd sizes and joined channels."""

    def __init__(self, fused):
        super().__init__()
        self.enter = nn.Conv2d(3, 8, 3, padding=1)
        self.down, self.middle, self.up = (Block(channels, fused) for channels in (8, 16, 24))
        self.shrink = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.leave = nn.Conv2d(24, 3, 1)

    def forward(self, x, time):
        skip = self.down(self.enter(x), time)
        h = self.middle(self.shrink(skip), time)
        h = F.interpolate(h, size=skip.shape[2:], mode="nearest")
        return self.leave(self.up(torch.cat((h, skip), 1), time))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_unet(memory_format, backend, device):
    """A small UNet of these modules has the outputs and the parameter gradients of the same UNet of torch's."""
    ours, theirs = (UNet(fused).double().to(device).to(memory_format=memory_format) for fused in (True, False))
    assert not any(theirs.load_state_dict(randomized(ours).state_dict()))
    x = torch.randn(2, 3, 11, 9, dtype=torch.float64, device=device).to(memory_format=memory_format)
    time, seen = torch.randn(2, 6, dtype=torch.float64, device=device), []
    for module in ours.modules():
        if isinstance(module, GroupNorm):
            module.register_forward_hook(lambda _, args, y: seen.append((args[0], y)))
    y, want = ours(x, time), theirs(x, time)
    torch.testing.assert_close(y, want)
    assert len(seen) == 6
    for before, after in seen:
        assert after.stride() == before.stride()
        assert before.is_contiguous(memory_format=memory_format)
    dy = torch.randn_like(y)
    y.backward(dy)
    want.backward(dy)
    for (name, one), two in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_training_step(backend, device):
    """Ten steps of SGD with torch's module and with this one end at the same weights."""
    models = []
    for kind in (GroupNorm, nn.GroupNorm):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 12), kind(3, 12), nn.ReLU(), nn.Linear(12, 2)).double().to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(10):
            optimizer.zero_grad()
            model(torch.randn(16, 5, dtype=torch.float64).to(device)).square().mean().backward()
            optimizer.step()
        models.append(model)
    for one, two in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, two)


def test_dtype_and_device_moves(device):
    module = randomized(GroupNorm(4, 12))
    assert module.to(torch.bfloat16).weight.dtype == torch.bfloat16
    assert module.to("meta").weight.is_meta
    assert GroupNorm(4, 12, device="meta").to_empty(device=device).weight.device.type == torch.device(device).type
