"""What only layer norm, RMS norm and their additions have: epsilon by dtype, offsets of the weight, the sum, one norm in two layouts."""

import pytest
import torch
import torch.nn.functional as F
from cases import COMPOSED, HALF, LAYOUTS, Case, Inputs, channels_last, check, roundoff

import normops


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=lambda dtype: str(dtype)[6:])
def test_rms_eps_is_torchs(dtype, backend, device):
    """eps=None where it decides: float32's for 16 bits and float32, float64's for float64. eps=0 and a given one are taken as they are."""
    x = (torch.randn(5, 24, dtype=torch.float64) * 1e-4).to(dtype).to(device)
    for eps in (None, 0.0, 1e-8):
        got, want = normops.rms_norm(x, 24, eps=eps), F.rms_norm(x, (24,), eps=eps)
        torch.testing.assert_close(got, want, rtol=4 * roundoff(dtype), atol=0)
        torch.testing.assert_close(normops.add_rms_norm(x, torch.zeros_like(x), 24, eps=eps)[0], want, rtol=4 * roundoff(dtype), atol=0)


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=lambda dtype: str(dtype)[6:])
def test_weight_offset(dtype, norm, backend, device):
    """The offset is added in the accumulation dtype, so that a small weight is not lost in it; its gradient does not change."""
    x, dy = torch.randn(2, 7, 40, dtype=dtype, device=device)
    small = (torch.randn(40, device=device) * 1e-3).to(dtype).requires_grad_()
    whole = (small.detach().float() + 1).requires_grad_()
    call = getattr(normops, norm)
    y, same = call(x, 40, small, weight_offset=1.0), call(x, 40, whole)
    torch.testing.assert_close(y, same, rtol=2 * roundoff(dtype), atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(y, small, dy)[0], torch.autograd.grad(same, whole, dy)[0].to(dtype), rtol=1e-6, atol=1e-6)
    assert torch.equal(call(x, 40, weight_offset=3.0), call(x, 40)), "without weight there is nothing to offset"


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 4, 6)], ids=str)
def test_normalized_shape(shape, norm, backend, device):
    """An int, a tuple, a list and a torch.Size say the same; several dimensions are one longer one."""
    x, weight = torch.randn(shape, device=device), torch.randn(shape[-1], device=device)
    call = getattr(normops, norm)
    y = call(x, shape[-1], weight)
    for normalized in ((shape[-1],), [shape[-1]], torch.Size(shape[-1:])):
        assert torch.equal(call(x, normalized, weight), y)
    if len(shape) > 2:
        weight = torch.randn(shape[-2:], device=device)
        assert torch.equal(call(x, shape[-2:], weight), call(x.flatten(-2), weight.numel(), weight.flatten()).reshape(shape))


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("shape", [(2, 24, 5, 7), (3, 7, 11), (1, 96, 2, 3, 2)], ids=str)
def test_dimension_1_in_both_orders(shape, norm, backend, device):
    """dim=1 is the norm of the moved dimension; channels last gives bitwise what the rows alone give, channels first the same within rounding."""
    x = torch.randn(shape, device=device)
    weight = torch.randn(shape[1], device=device)
    call = getattr(normops, norm)
    rows = call(x.movedim(1, -1).contiguous(), shape[1], weight).movedim(-1, 1)
    assert torch.equal(call(channels_last(x), shape[1], weight, dim=1), rows)
    torch.testing.assert_close(call(x, shape[1], weight, dim=1), rows, rtol=1e-6, atol=1e-6)
    assert torch.equal(call(x.flatten(2), shape[1], weight, dim=1), call(x, shape[1], weight, dim=1).flatten(2)), "spatial dimensions are one"


@pytest.mark.parametrize("norm", ["add_layer_norm", "add_rms_norm"])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", [(5, 4, 48), (3, 1001), (700, 3), (2, 20011)], ids=str)
def test_addition(shape, dtype, norm, backend, device, poison):
    """The sum is input + residual to the bit, y is the norm of that rounded sum, input's and residual's gradients are one."""
    inputs = Inputs.of(Case("sum", shape, norm=norm, dtype=dtype, residual="contiguous", activation="silu", mean=3.0), device)
    inputs.dtotal = LAYOUTS["transposed"](inputs.dtotal)
    got = inputs.run()
    x, residual = inputs.tensors["x"], inputs.tensors["residual"]
    assert torch.equal(got.total, x + residual) and got.total.dtype == dtype
    alone = Case("the norm of the sum", shape, norm=norm[4:], dtype=dtype, activation="silu")
    of_sum = {name: value for name, value in inputs.tensors.items() if name != "residual"} | {"x": got.total}
    one = Inputs(alone, of_sum, inputs.dy).run()
    unit = max(roundoff(dtype), 2 * roundoff(torch.float32 if dtype != torch.float64 else dtype))
    torch.testing.assert_close(got.y, one.y, rtol=4 * unit, atol=4 * unit)
    assert torch.equal(got.gradients["x"], got.gradients["residual"])
    of_weight = one.gradients["weight"]
    torch.testing.assert_close(got.gradients["weight"], of_weight, rtol=4 * unit, atol=4 * unit * of_weight.abs().max().item())
    exact = one.gradients["x"].double() + inputs.dtotal.double()  # rounded once more than the fused gradient
    limit = roundoff(dtype) * (exact.abs() + 2 * one.gradients["x"].double().abs()) + torch.finfo(dtype).smallest_normal
    limit = limit + 8 * roundoff(torch.float64 if dtype == torch.float64 else torch.float32) * exact.abs().max()
    assert ((got.gradients["x"].double() - exact).abs() <= limit).all()


@pytest.mark.parametrize("norm", ["add_layer_norm", "add_rms_norm"])
def test_sum_without_gradients(norm, backend, device):
    """What depends on nothing that requires grad does not require it: of a frozen stream, y for the weight's sake, the sum not."""
    x, residual, weight = torch.randn(4, 8, device=device), torch.randn(4, 8, device=device), torch.randn(8, device=device, requires_grad=True)
    y, total = getattr(normops, norm)(x, residual, 8, weight)
    assert y.requires_grad and not total.requires_grad
    y, total = getattr(normops, norm)(x, residual.requires_grad_(), 8, weight.detach())
    assert y.requires_grad and total.requires_grad
    assert torch.equal(torch.autograd.grad(total.sum(), residual)[0], torch.ones_like(residual))


def test_stream_of_blocks(backend, device):
    """The residual stream of a transformer: each sum goes into the next addition, and into its gradient twice."""
    torch.manual_seed(1)
    weights = [torch.randn(16, dtype=torch.float64, device=device, requires_grad=True) for _ in range(4)]
    x = torch.randn(3, 5, 16, dtype=torch.float64, device=device, requires_grad=True)
    found = []
    for call in (normops.add_rms_norm, COMPOSED["add_rms_norm"]):
        stream, y = x, x.sin()
        for weight in weights:
            y, stream = call(y, stream, normalized_shape=(16,), weight=weight, eps=1e-6, activation="silu")
        out = (y * stream).sum()
        found.append((out, *torch.autograd.grad(out, (x, *weights))))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm", "add_rms_norm"])
def test_modulation_is_one_for_all_rows_of_a_sample(norm, backend, device, poison):
    """adaLN: equal to the affine norm of each sample by itself; gradients of scale and shift are sums over its rows."""
    shape = (3, 2, 5, 12)
    case = Case("adaLN", shape, norm=norm, ndim=1, scale=True, shift=True, residual="contiguous" if "add" in norm else None)
    inputs = Inputs.of(case, device)
    result = inputs.run()
    check(result, inputs)
    assert result.gradients["scale"].shape == (3, 12)
