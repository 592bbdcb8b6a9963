"""What only instance norm has: running statistics, and the statistics of a style."""

import pytest
import torch
import torch.nn.functional as F
from cases import FLOOR, LAYOUTS, Case, Inputs, channels_last, roundoff

import normops

LAYOUT_IDS = ["contiguous", "channels_last"]


def running(channels, device, dtype=torch.float32):
    return torch.randn(channels, dtype=dtype, device=device), torch.rand(channels, dtype=dtype, device=device) + 0.5


@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", [(3, 6, 11), (2, 5, 7, 9), (1, 33, 2), (2, 4, 3, 4, 5), (1, 2, 200, 170)], ids=str)
@pytest.mark.parametrize("layout", LAYOUT_IDS)
@pytest.mark.parametrize("mean", [0.5, 1e4])
def test_running_statistics(mean, layout, shape, momentum, backend, device, poison):
    """torch's, in float64: averages over samples of mean and unbiased variance. The result and its gradients are those without them."""
    inputs = Inputs.of(Case("tracked", shape, layout=layout, norm="instance_norm", mean=mean, std=2.0, activation="silu"), device)
    ours, theirs = running(shape[1], device), None
    theirs = [value.double() for value in ours]
    inputs.running = ours
    versions = [value._version for value in ours]
    F.instance_norm(inputs.tensors["x"].double(), *theirs, use_input_stats=True, momentum=momentum)
    inputs.run(lambda *args, **options: normops.instance_norm(*args, momentum=momentum, **options))
    for mine, exact, version in zip(ours, theirs, versions, strict=True):
        assert mine._version > version, "autograd sees the change"
        assert (mine.double() - exact).abs().max() <= 2 * FLOOR * roundoff(torch.float32) * exact.abs().max()
    tracked = inputs.run()
    inputs.running = ()
    plain = inputs.run()
    assert torch.equal(tracked.y, plain.y)
    assert all(torch.equal(tracked.gradients[name], plain.gradients[name]) for name in plain.gradients)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16, torch.float64], ids=lambda dtype: str(dtype)[6:])
def test_running_statistics_of_other_dtypes(own, dtype, backend, device):
    """Running statistics keep their dtype and are computed in the accumulation dtype."""
    x = (torch.randn(4, 5, 30, dtype=torch.float64) * 3 + 7).to(dtype).to(device)
    ours = running(5, device, own)
    theirs = [value.double() for value in ours]
    normops.instance_norm(x, *ours, momentum=0.25)
    F.instance_norm(x.double(), *theirs, use_input_stats=True, momentum=0.25)
    for mine, exact in zip(ours, theirs, strict=True):
        assert mine.dtype == own
        unit = max(roundoff(own), roundoff(torch.float64 if dtype == torch.float64 else torch.float32))
        assert (mine.double() - exact).abs().max() <= 2 * FLOOR * unit * exact.abs().max()


@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_running_variance_of_constant_and_tiny_rows(eps, backend, device):
    """Variances far below eps, or zero: right to a rounding of var + eps, which is all that normalizes."""
    x = torch.randn(2, 3, 500, device=device, dtype=torch.float64)
    x[:, 0] = 3.0
    x[:, 1] *= (1e-3 * eps) ** 0.5
    x = x.float()
    mean, variance = torch.zeros(3, device=device), torch.ones(3, device=device)
    normops.instance_norm(x, mean, variance, momentum=1.0, eps=eps)
    exact = x.double().var(2).mean(0)
    assert (variance >= 0).all()
    assert ((variance.double() - exact).abs() <= 2 * FLOOR * roundoff(torch.float32) * (exact + eps)).all()


def test_running_statistics_are_left_alone(backend, device):
    """By evaluation, by an empty batch, and by a call that is refused."""
    x, ours = torch.randn(3, 5, 12, device=device), running(5, device)
    before = [value.clone() for value in ours]
    normops.instance_norm(x, *ours, use_input_stats=False)
    normops.instance_norm(x[:0], *ours)
    normops.instance_norm(x[:, :, :0], *ours)
    for wrong in (
        {"weight": x[0]},
        {"bias": x[0, 0]},
        {"eps": -1.0},
        {"activation": "swish"},
        {"residual": x[0]},
        {"scale": x},
        {"out_dtype": torch.float16},
    ):
        with pytest.raises((ValueError, TypeError)):
            normops.instance_norm(x, *ours, **wrong)
    with pytest.raises(ValueError, match="position"):
        normops.instance_norm(x[:, :, :1], *ours)
    with pytest.raises(ValueError):
        normops.instance_norm(x, ours[0], ours[1][:3])
    assert all(torch.equal(value, old) for value, old in zip(ours, before, strict=True))


@pytest.mark.parametrize("layout", LAYOUT_IDS)
def test_evaluation_is_batch_norm(layout, backend, device):
    """By running statistics all samples are alike, as in an eval-mode batch norm; a sample gives the same bits alone."""
    x = LAYOUTS[layout](torch.randn(4, 6, 5, 3, dtype=torch.float64, device=device))
    weight, bias = torch.randn(2, 6, dtype=torch.float64, device=device)
    ours = running(6, device, torch.float64)
    y = normops.instance_norm(x, *ours, weight, bias, False)
    torch.testing.assert_close(y, F.batch_norm(x, *ours, weight, bias))
    torch.testing.assert_close(y, F.instance_norm(x, *ours, weight, bias, False))
    assert torch.equal(y[1:2], normops.instance_norm(x[1:2], *ours, weight, bias, False))


def test_running_statistics_have_no_gradient(backend, device):
    """As in torch: they are buffers, also where they require grad by mistake of a caller who trains all tensors."""
    x, ours = torch.randn(3, 5, 12, device=device, requires_grad=True), running(5, device)
    y = normops.instance_norm(x, *ours)
    assert y.requires_grad and not any(value.requires_grad for value in ours)
    y.sum().backward()
    normops.instance_norm(x, *ours, use_input_stats=False).sum().backward()


def moments(x):
    return x.double().flatten(2).mean(2), x.double().flatten(2).std(2, correction=0)


@pytest.mark.parametrize("positions", [(4, 4), (9,), (3, 40, 2), (1, 1)], ids=str)
@pytest.mark.parametrize("layout", LAYOUT_IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_adain_has_the_statistics_of_the_style(dtype, layout, positions, backend, device, poison):
    """Mean and deviation of each channel of the result are the style's, whatever its positions and layout; one position: the constant."""
    content = LAYOUTS[layout](torch.randn(2, 6, 11, 10, device=device) * 5 - 2).to(dtype)
    style = channels_last(torch.randn(2, 6, *positions, device=device) * 0.5 + torch.randn(2, 6, *(1,) * len(positions), device=device))
    mean, std = moments(normops.adaptive_instance_norm(content, style, eps=1e-12))  # 1e-6 remains of a deviation of zero
    tolerance = {"rtol": 8 * roundoff(dtype), "atol": 8 * roundoff(dtype)}
    torch.testing.assert_close(mean, moments(style)[0], **tolerance)
    torch.testing.assert_close(std, moments(style)[1].clamp_min(1e-6), **tolerance)


@pytest.mark.parametrize("layout", LAYOUT_IDS)
def test_adain_far_from_zero_and_huge(layout, backend, device):
    """A style at 1e4 or of magnitude 1e30: mean, deviation and the style's gradient stay right."""
    for mean, std in ((1e4, 1.0), (0.0, 1e30)):
        case = Case("style", (2, 5, 9, 7), layout=layout, norm="adaptive_instance_norm", style=(8, 9))
        inputs = Inputs.of(case, device)
        inputs.tensors["style"] = LAYOUTS[layout](torch.randn(2, 5, 8, 9, device=device) * std + mean)
        got, want = inputs.run(), inputs.torch(torch.float64)
        for name, mine, exact in (("y", got.y, want.y), *((key, value, want.gradients[key]) for key, value in got.gradients.items())):
            assert (mine.to(exact) - exact).abs().max() <= 2e-6 * exact.abs().max(), (mean, std, name)
