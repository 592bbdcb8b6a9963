"""The modules of ``normops.nn`` in place of those of ``torch.nn``."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from norms import compare
from torch import nn

import normops
import normops.nn as ours
from normops.nn.norms import Fused

TRACKED = {"affine": True, "track_running_stats": True}
NO_BIAS = [{"bias": False}] * ("bias" in inspect.signature(nn.BatchNorm1d).parameters)
BATCH_OPTIONS = [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}, {"momentum": 0.3, "eps": 1e-3}]
KINDS = {  # torch's class, positional arguments, the shape of an input, keywords to construct with
    "GroupNorm": (nn.GroupNorm, (4, 12), (2, 12, 5), [{}, {"affine": False}]),
    "InstanceNorm1d": (nn.InstanceNorm1d, (12,), (2, 12, 5), [{}, {"affine": True}, {"track_running_stats": True}, {"momentum": None} | TRACKED]),
    "InstanceNorm2d": (nn.InstanceNorm2d, (12,), (2, 12, 5, 4), [{}, {"momentum": 0.3} | TRACKED]),
    "InstanceNorm3d": (nn.InstanceNorm3d, (12,), (2, 12, 2, 5, 4), [{}, {"eps": 1e-3} | TRACKED]),
    "BatchNorm1d": (nn.BatchNorm1d, (12,), (3, 12, 5), BATCH_OPTIONS + NO_BIAS),
    "BatchNorm2d": (nn.BatchNorm2d, (12,), (2, 12, 5, 4), [*NO_BIAS, {"momentum": None}]),
    "BatchNorm3d": (nn.BatchNorm3d, (12,), (2, 12, 2, 5, 4), [{}]),
    "LayerNorm": (nn.LayerNorm, ((5, 12),), (2, 3, 5, 12), [{}, {"elementwise_affine": False}, {"bias": False}, {"eps": 1e-3}]),
    "RMSNorm": (nn.RMSNorm, (12,), (2, 5, 12), [{}, {"elementwise_affine": False}, {"eps": 1e-3}]),
    "LayerNorm2d": (nn.LayerNorm, (12,), (2, 12, 5, 4), [{}, {"bias": False}]),
    "RMSNorm2d": (nn.RMSNorm, (12,), (2, 12, 5), [{}, {"elementwise_affine": False}]),
}
over_kinds = pytest.mark.parametrize("kind", KINDS)
over_options = pytest.mark.parametrize(
    "kind, options", [(kind, options) for kind, entry in KINDS.items() for options in entry[3]], ids=lambda value: str(value)
)
INSTANCE = [kind for kind in KINDS if kind.startswith("Instance")]
over_instance = pytest.mark.parametrize("kind", INSTANCE)
over_batch = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("Batch")])


def make(kind, **options):
    """Ours, with options of our own or torch's."""
    return getattr(ours, kind)(*KINDS[kind][1], **options)


def make_theirs(kind, **options):
    return KINDS[kind][0](*KINDS[kind][1], **options)


def over_last(kind, module, x):
    """torch's module, over the channels of an image where ours is."""
    return module(x) if KINDS[kind][0].__name__ == kind else module(x.movedim(1, -1)).movedim(-1, 1)


def draw(kind, device="cpu", dtype=torch.float64):
    return torch.randn(KINDS[kind][2], device=device, dtype=dtype)


def randomized(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def same_state(one, two):
    assert list(one) == list(two)
    for name in one:
        assert torch.equal(one[name], two[name]) and one[name].dtype == two[name].dtype and one[name].device == two[name].device


# ---- construction ----


@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16], ids=str)
@over_options
def test_constructor(kind, options, dtype, device):
    options = {"device": device, "dtype": dtype} | options
    mine, theirs = make(kind, **options), make_theirs(kind, **options)
    assert isinstance(mine, type(theirs))
    assert repr(mine) == repr(theirs).replace(type(theirs).__name__, kind)
    for name, value in vars(theirs).items():
        if isinstance(value, int | float | tuple | None):
            assert getattr(mine, name) == value, name
    same_state(mine.state_dict(), theirs.state_dict())


def test_constructor_raises_as_torch_does():
    with pytest.raises(ValueError, match="must be divisible by num_groups"):
        ours.GroupNorm(5, 12)
    for kind in KINDS:
        with pytest.raises(TypeError):
            getattr(ours, kind)()
        with pytest.raises(TypeError):
            make(kind, nonsense=1)


@over_options
def test_state_dict_both_ways(kind, options):
    theirs, mine = randomized(make_theirs(kind, **options)), make(kind, activation="silu", **options)
    if getattr(theirs, "running_mean", None) is not None:
        theirs(draw(kind, dtype=torch.float32))
    assert not any(mine.load_state_dict(theirs.state_dict()))
    same_state(mine.state_dict(), theirs.state_dict())
    assert not any(theirs.load_state_dict(randomized(mine).state_dict()))
    same_state(mine.state_dict(), theirs.state_dict())


@over_kinds
def test_repr_names_what_is_fused(kind):
    assert "activation='silu'" in repr(make(kind, activation="silu"))
    assert "negative_slope=0.3" in repr(make(kind, activation="leaky_relu", negative_slope=0.3))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"])
@over_options
def test_copies(kind, options, copied, device):
    module = randomized(make(kind, activation="leaky_relu", negative_slope=0.3, device=device, dtype=torch.float64, **options))
    x = draw(kind, device)
    other = copied(module)
    assert repr(other) == repr(module) and torch.equal(other(x), module(x))
    same_state(other.state_dict(), module.state_dict())
    assert all(one.data_ptr() != two.data_ptr() for one, two in zip(other.parameters(), module.parameters(), strict=True))


@over_kinds
def test_dtype_and_device_moves(kind, device):
    options = KINDS[kind][3][-1]
    module = randomized(make(kind, **options))
    assert {value.dtype for value in module.to(torch.bfloat16).parameters()} <= {torch.bfloat16}
    assert all(value.is_meta for value in module.to("meta").state_dict().values())
    empty = make(kind, device="meta", **options).to_empty(device=device)
    empty.reset_parameters()
    same_state(empty.state_dict(), make(kind, device=device, **options).state_dict())


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm", "LayerNorm2d", "RMSNorm2d"])
def test_weight_offset(kind, backend, device):
    """Where weight is stored around zero, a new module is the identity on x_hat as ever, and reset_parameters makes it so again."""
    shifted, usual = make(kind, weight_offset=1.0, device=device, dtype=torch.float64), make(kind, device=device, dtype=torch.float64)
    assert "weight_offset=1.0" in repr(shifted) and not shifted.weight.any()
    x = draw(kind, device)
    torch.testing.assert_close(shifted(x), usual(x))
    randomized(shifted).reset_parameters()
    assert not shifted.weight.any()
    with torch.no_grad():
        randomized(usual)
        shifted.weight.copy_(usual.weight - 1)
        if "Layer" in kind:
            shifted.bias.copy_(usual.bias)
    torch.testing.assert_close(shifted(x), usual(x))


# ---- calls ----


@over_options
def test_as_torch(kind, options, backend, device):
    """Outputs, gradients of inputs and parameters, running statistics; in training, then in evaluation."""
    theirs = randomized(make_theirs(kind, device=device, dtype=torch.float64, **options))
    mine = make(kind, activation="silu", device=device, dtype=torch.float64, **options)
    mine.load_state_dict(theirs.state_dict())
    for training in (True, True, False):
        for module in (mine, theirs):
            module.train(training)
        x = draw(kind, device).requires_grad_()
        y, want = mine(x), F.silu(over_last(kind, theirs, x))
        torch.testing.assert_close(y, want)
        dy = torch.randn_like(y)
        got, expected = (torch.autograd.grad(result, [x, *module.parameters()], dy) for result, module in ((y, mine), (want, theirs)))
        compare(got, expected)
        compare(mine.state_dict().values(), theirs.state_dict().values())


@over_kinds
def test_narrow_input(kind, backend, device):
    """16-bit x in a module that keeps parameters and statistics in float32, as under autocast."""
    options = KINDS[kind][3][-1] | {"device": device}
    module = randomized(make(kind, **options))
    x = draw(kind, device, torch.bfloat16)
    other = copy.deepcopy(module)
    y, want = module(x), other(x.float())
    torch.testing.assert_close(y, want.to(torch.bfloat16))
    for name, value in module.named_buffers():
        torch.testing.assert_close(value, getattr(other, name))


@over_kinds
def test_keywords(kind, backend, device):
    """activation, residual, scale and shift, in the documented order."""
    module = randomized(make(kind, activation="silu", device=device, dtype=torch.float64))
    theirs = make_theirs(kind, device=device, dtype=torch.float64)
    theirs.load_state_dict(module.state_dict())
    x, residual = draw(kind, device), draw(kind, device)
    vector = getattr(module, "normalized_shape", (12,))
    samples, over = x.shape[0], vector if x.shape[-len(vector) :] == vector else (*vector, *[1] * (x.dim() - 2))
    scale, shift = torch.randn(2, samples, *vector, device=device, dtype=torch.float64)
    scales, shifts = (value.reshape(samples, *[1] * (x.dim() - 1 - len(over)), *over) for value in (scale, shift))
    t = over_last(kind, theirs, x)
    torch.testing.assert_close(module(x), F.silu(t))
    torch.testing.assert_close(module(x, residual=residual), F.silu(t + residual))
    torch.testing.assert_close(module(x, scale=scale), F.silu(t * (1 + scales)))
    torch.testing.assert_close(module(x, residual=residual, scale=scale, shift=shift), F.silu(t * (1 + scales) + shifts + residual))


@over_kinds
def test_does_not_touch_parameters_that_do_not_train(kind, backend, device):
    module = make(kind, device=device, **({"affine": True} if kind in INSTANCE else {}))
    frozen, *others = reversed(list(module.parameters()))
    frozen.requires_grad_(False)
    module(draw(kind, device, torch.float32).requires_grad_()).square().sum().backward()
    assert frozen.grad is None and all(parameter.grad is not None for parameter in others)


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_addend(kind, backend, device):
    """The pre-norm step: the norm of a sum, and the sum."""
    module = randomized(make(kind, device=device, dtype=torch.float64))
    x, addend = draw(kind, device), draw(kind, device)
    scale = torch.randn(2, *module.normalized_shape, device=device, dtype=torch.float64)
    y, total = module(x, addend=addend, scale=scale)
    assert torch.equal(total, x + addend)
    torch.testing.assert_close(y, module(total, scale=scale))
    for wrong in ({"addend": addend, "residual": addend}, {"addend": addend[:1]}):
        with pytest.raises(ValueError, match="expected (addend|residual)"):
            module(x, **wrong)
    with pytest.raises(ValueError, match=f"^{kind}2d: expected addend"):
        make(f"{kind}2d")(draw(f"{kind}2d", dtype=torch.float32), addend=draw(f"{kind}2d", dtype=torch.float32))


def test_adaptive_instance_norm(backend, device):
    module = ours.AdaptiveInstanceNorm(1e-3, activation="relu")
    assert repr(module) == "AdaptiveInstanceNorm(eps=0.001, activation='relu')" and not module.state_dict()
    x, style = torch.randn(2, 6, 5, 4, device=device), torch.randn(2, 6, 3, device=device)
    want = normops.adaptive_instance_norm(x, style, 1e-3, activation="relu", residual=x)
    assert torch.equal(module(x, style, residual=x), want)


# ---- instance norm's own ----


@pytest.mark.parametrize("training", [True, False])
@over_instance
def test_without_a_batch(kind, training, backend, device):
    """(C, *spatial) is one sample, also for residual, scale and shift; running statistics follow."""
    module = randomized(make(kind, device=device, dtype=torch.float64, **TRACKED)).train(training)
    other, theirs = copy.deepcopy(module), make_theirs(kind, device=device, dtype=torch.float64, **TRACKED).train(training)
    theirs.load_state_dict(module.state_dict())
    x, scale = draw(kind, device)[0], torch.randn(12, device=device, dtype=torch.float64)
    y = module(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y, theirs(x))
    compare(module.state_dict().values(), theirs.state_dict().values())
    other(x)
    want = other(x[None], residual=x[None], scale=scale[None], shift=scale[None])[0]
    assert torch.equal(module(x, residual=x, scale=scale, shift=scale), want)


@over_instance
def test_rank_is_checked_as_torch_does(kind):
    module, theirs = make(kind), make_theirs(kind)
    rank = len(KINDS[kind][2])
    for wrong in range(1, 7):
        if wrong in (rank, rank - 1):
            continue
        messages = []
        for each in (module, theirs):
            with pytest.raises(ValueError) as caught:
                each(torch.randn((2, 12, 3, 3, 3, 3)[:wrong]))
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


@over_instance
def test_number_of_channels(kind):
    """Where it is used another one raises; where it is not, it warns: both as torch does."""
    x = draw(kind, dtype=torch.float32)[:, :10]
    with pytest.raises(ValueError, match=f"^{kind}: expected input of 12 channels, got"):
        make(kind, affine=True)(x)
    with pytest.warns(UserWarning) as told:
        torch.testing.assert_close(make(kind)(x), make_theirs(kind)(x))
    assert len(told) == 2


@over_instance
def test_single_position(kind):
    """Raises in training as torch's, and leaves the statistics alone; in evaluation they normalize it."""
    module = make(kind, **TRACKED)
    x = torch.randn(2, 12, *[1] * (len(KINDS[kind][2]) - 2))
    before = copy.deepcopy(module.state_dict())
    for each in (module, make_theirs(kind, **TRACKED)):
        with pytest.raises(ValueError, match="[Ee]xpected more than 1 "):
            each(x)
    same_state(module.state_dict(), before)
    torch.testing.assert_close(module.eval()(x), make_theirs(kind, **TRACKED).eval()(x))


@over_instance
def test_old_checkpoints(kind):
    """State before torch 0.4 has running statistics of every instance norm: refused as torch refuses it, or taken where they are tracked."""
    old = make_theirs(kind, **TRACKED).state_dict()
    old = {name: old[name] for name in ("weight", "bias", "running_mean", "running_var")}
    messages = []
    for each in (make(kind, affine=True), make_theirs(kind, affine=True)):
        with pytest.raises(RuntimeError, match="Unexpected running stats buffer") as caught:
            each.load_state_dict(dict(old))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    strict = make(kind, **TRACKED), make_theirs(kind, **TRACKED)
    outcomes = [each.load_state_dict(dict(old), strict=False) for each in strict]
    assert outcomes[0] == outcomes[1]


@over_instance
def test_running_statistics_far_from_zero(kind, backend, device):
    """The running variance of data far from zero, where a difference of squares would lose it, against float64."""
    module, exact = make(kind, device=device, **TRACKED), make_theirs(kind, device=device, dtype=torch.float64, **TRACKED)
    x = draw(kind, device) + 1000
    module(x.float()), exact(x.float().double())
    torch.testing.assert_close(module.running_var.double(), exact.running_var, rtol=1e-6, atol=0)
    torch.testing.assert_close(module.running_mean.double(), exact.running_mean, rtol=1e-6, atol=0)


# ---- batch norm's own ----


@over_batch
def test_ranks_are_checked_as_torch_does(kind):
    """What torch takes is taken, what it refuses is refused in the same words."""
    module, theirs = make(kind), make_theirs(kind)
    for rank in range(1, 7):
        x = torch.randn((3, 12, 2, 2, 2, 2)[:rank])
        try:
            want = theirs(x)
        except ValueError as error:
            with pytest.raises(ValueError) as caught:
                module(x)
            assert str(caught.value) == str(error)
        else:
            torch.testing.assert_close(module(x), want)
    compare(module.state_dict().values(), theirs.state_dict().values())


@over_batch
def test_batch_norm_without_its_buffers(kind):
    """Statistics taken away later: each batch normalizes itself, in evaluation too. And buffers that are set but not tracked are used in
    evaluation only."""
    x = draw(kind, dtype=torch.float32)
    for tracked in (True, False):
        modules = make(kind), make_theirs(kind)
        for module in modules:
            if tracked:
                module.running_mean = module.running_var = module.num_batches_tracked = None
            else:
                module.track_running_stats = False
        for training in (True, False):
            compare(*([module.train(training)(x)] for module in modules))
            compare(*(module.state_dict().values() for module in modules))


@over_batch
def test_single_value_per_channel(kind, backend, device):
    """Raises in training as torch's and changes nothing but torch's count; by the running statistics where that is asked for, which stay."""
    x = torch.randn(1, 12, *[1] * (len(KINDS[kind][2]) - 2), device=device, requires_grad=True)
    module, theirs = make(kind, device=device), make_theirs(kind, device=device)
    for each in (module, theirs):
        with pytest.raises(ValueError, match="[Ee]xpected more than 1 value per channel"):
            each(x)
    compare([module.running_mean, module.running_var], [theirs.running_mean, theirs.running_var], rtol=0, atol=0)
    lenient = make(kind, on_single_value="running", device=device)
    assert "on_single_value='running'" in repr(lenient)
    lenient(draw(kind, device, torch.float32))
    before = copy.deepcopy(lenient.state_dict())
    y = lenient(x)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    same_state(lenient.state_dict(), before)
    want = lenient.eval()(x)
    assert torch.equal(y, want) and torch.equal(dx, torch.autograd.grad(want.square().sum(), x)[0])
    with pytest.raises(ValueError, match="^batch_norm: expected on_single_value out of raise, running, got 'skip'"):
        make(kind, on_single_value="skip", device=device)(x)


@over_batch
def test_old_batch_norm_checkpoints(kind):
    """State without num_batches_tracked, from before torch 0.4.1."""
    old = make_theirs(kind).state_dict()
    del old["num_batches_tracked"]
    old._metadata[""]["version"] = 1
    module = make(kind)
    assert not any(module.load_state_dict(old)) and module.num_batches_tracked == 0


@over_batch
def test_channels_last_and_16_bit_modules(kind, backend, device):
    """A module in half precision, buffers too, on channels-last input: float64's results to a few roundoffs, the layout kept."""
    shape = KINDS[kind][2]
    for dtype in (torch.float16, torch.bfloat16):
        module = randomized(make(kind, device=device)).to(dtype)
        exact = make_theirs(kind, device=device, dtype=torch.float64)
        exact.load_state_dict(module.state_dict())
        x = torch.randn(shape, device=device, dtype=dtype)
        if len(shape) > 3:
            x = x.to(memory_format={4: torch.channels_last, 5: torch.channels_last_3d}[len(shape)])
        unit = torch.finfo(dtype).eps
        for training in (True, False):
            y = module.train(training)(x)
            assert y.dtype == dtype and y.stride() == x.stride()
            torch.testing.assert_close(y.double(), exact.train(training)(x.double()), rtol=unit, atol=2 * unit)
            for name, value in module.named_buffers():
                torch.testing.assert_close(value.double(), getattr(exact, name).double(), rtol=unit, atol=unit)


# ---- models ----


class Block(nn.Module):
    """A residual block of a diffusion UNet: norm, act, conv, with the time embedding as scale and shift."""

    def __init__(self, channels, fused):
        super().__init__()
        kind = (lambda: ours.GroupNorm(4, channels, activation="silu")) if fused else (lambda: nn.GroupNorm(4, channels))
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

    inputs = ((2, 3, 11, 9), (2, 6))

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


class Volume(nn.Module):
    """A residual block of nnU-Net, in 3-D: conv, instance norm, leaky ReLU, and the skip added before the last of them."""

    inputs = ((2, 3, 5, 6, 7),)
    dtype = torch.float32  # torch's Conv3d keeps channels_last_3d in no other

    def __init__(self, fused):
        super().__init__()
        options = {"activation": "leaky_relu", "negative_slope": 0.01} if fused else {}
        kind = ours.InstanceNorm3d if fused else nn.InstanceNorm3d
        self.fused = fused
        self.enter, self.conv1, self.conv2 = nn.Conv3d(3, 8, 3, padding=1), nn.Conv3d(8, 8, 3, padding=1), nn.Conv3d(8, 8, 3, padding=1)
        self.norm1, self.norm2 = (kind(8, affine=True, **options) for _ in range(2))

    def forward(self, x):
        x = self.enter(x)
        if self.fused:
            return self.norm2(self.conv2(self.norm1(self.conv1(x))), residual=x)
        h = F.leaky_relu(self.norm1(self.conv1(x)))
        return F.leaky_relu(self.norm2(self.conv2(h)) + x)


class ResNet(nn.Module):
    """A bottleneck with batch norm: conv, norm, relu, and the skip added before the last of them."""

    inputs = ((3, 3, 9, 7),)

    def __init__(self, fused):
        super().__init__()
        kind = (lambda: ours.BatchNorm2d(8, activation="relu")) if fused else (lambda: nn.BatchNorm2d(8))
        self.fused = fused
        self.enter, self.conv1, self.conv2 = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1, bias=False)
        self.norm1, self.norm2 = kind(), kind()

    def forward(self, x):
        x = self.enter(x)
        if self.fused:
            return self.norm2(self.conv2(self.norm1(self.conv1(x))), residual=x)
        return F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))) + x)


class ConvNeXt(nn.Module):
    """Depthwise conv, layer norm over channels, two pointwise convs."""

    inputs = ((2, 6, 7, 5),)

    def __init__(self, fused):
        super().__init__()
        self.fused = fused
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.norm = ours.LayerNorm2d(6, eps=1e-6) if fused else nn.LayerNorm(6, eps=1e-6)
        self.wide, self.narrow = nn.Conv2d(6, 24, 1), nn.Conv2d(24, 6, 1)

    def forward(self, x):
        h = self.depthwise(x)
        h = self.norm(h) if self.fused else self.norm(h.movedim(1, -1)).movedim(-1, 1)
        return x + self.narrow(F.gelu(self.wide(h)))


class Transformer(nn.Module):
    """Two pre-norm steps of a language model: each adds the last branch to the stream and normalizes it."""

    inputs = ((2, 7, 12),)

    def __init__(self, fused):
        super().__init__()
        self.fused = fused
        self.norms = nn.ModuleList((ours if fused else nn).RMSNorm(12, eps=1e-6) for _ in range(3))
        self.branches = nn.ModuleList(nn.Sequential(nn.Linear(12, 24), nn.SiLU(), nn.Linear(24, 12)) for _ in range(2))

    def forward(self, x):
        first, *others = self.norms
        h = first(x)
        for branch, norm in zip(self.branches, others, strict=True):
            if self.fused:
                h, x = norm(branch(h), addend=x)
            else:
                x = x + branch(h)
                h = norm(x)
        return h + x


class DiT(nn.Module):
    """A block of a diffusion transformer: layer norms without affine, modulated by the embedding (adaLN)."""

    inputs = ((2, 7, 12), (2, 6))

    def __init__(self, fused):
        super().__init__()
        self.fused = fused
        self.norm1, self.norm2 = ((ours if fused else nn).LayerNorm(12, elementwise_affine=False) for _ in range(2))
        self.mix, self.mlp, self.embed = nn.Linear(7, 7), nn.Linear(12, 12), nn.Linear(6, 48)

    def forward(self, x, time):
        scale1, shift1, scale2, shift2 = self.embed(F.silu(time)).chunk(4, 1)
        if self.fused:
            x = x + self.mix(self.norm1(x, scale=scale1, shift=shift1).mT).mT
            return x + self.mlp(self.norm2(x, scale=scale2, shift=shift2))
        x = x + self.mix((self.norm1(x) * (1 + scale1[:, None]) + shift1[:, None]).mT).mT
        return x + self.mlp(self.norm2(x) * (1 + scale2[:, None]) + shift2[:, None])


MODELS = [(model, layout) for model in (UNet, Volume, ResNet, ConvNeXt) for layout in ("contiguous", "channels_last")]
MODELS += [(model, "contiguous") for model in (Transformer, DiT)]


@pytest.mark.parametrize("kind, layout", MODELS, ids=[f"{model.__name__}-{layout}" for model, layout in MODELS])
def test_model(kind, layout, backend, device):
    """A small model of these modules has the outputs and the parameter gradients of the same model of torch's, and norms keep the layout."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    memory_format = formats[len(kind.inputs[0])] if layout == "channels_last" else torch.contiguous_format
    dtype = getattr(kind, "dtype", torch.float64)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {}
    mine, theirs = (kind(fused).to(device, dtype).to(memory_format=memory_format) for fused in (True, False))
    assert not any(theirs.load_state_dict(randomized(mine).state_dict()))
    x, *others = (torch.randn(shape, dtype=dtype, device=device) for shape in kind.inputs)
    x, seen = x.to(memory_format=memory_format), []
    for module in mine.modules():
        if isinstance(module, Fused):
            module.register_forward_hook(lambda _, args, y: seen.append((args[0], y)))
    y, want = mine(x, *others), theirs(x, *others)
    torch.testing.assert_close(y, want, **tolerance)
    assert seen
    for before, after in seen:
        after = after[0] if isinstance(after, tuple) else after
        assert after.stride() == before.stride()
        assert before.is_contiguous(memory_format=memory_format) or before.is_cuda and dtype == torch.float64  # as cuDNN's convolutions leave it
    dy = torch.randn_like(y)
    y.backward(dy)
    want.backward(dy)
    for (name, one), two in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@over_kinds
def test_training_steps(kind, backend, device):
    """Ten steps of SGD with torch's module and with this one end at the same weights and statistics."""
    options = KINDS[kind][3][-1] | {"device": device, "dtype": torch.float64}
    ends = []
    for module, call in ((make(kind, **options), lambda module, x: module(x)), (make_theirs(kind, **options), lambda *args: over_last(kind, *args))):
        torch.manual_seed(0)
        start = nn.Parameter(draw(kind, device))
        optimizer = torch.optim.SGD([start, *module.parameters()], lr=0.1)
        for _ in range(10):
            optimizer.zero_grad()
            (call(module, start) - draw(kind, device)).square().mean().backward()
            optimizer.step()
        ends.append([start, *module.state_dict().values()])
    compare(*ends)
