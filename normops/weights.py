"""Weights that are normalized by the statistics of the inputs they meet, in plain PyTorch; sums in float64."""

from collections.abc import Sequence

import torch
from torch import Tensor


def per_output(values: Tensor, weight: Tensor, groups: int, transposed: bool) -> Tensor:
    """A value for each output as it meets a weight (O, I/groups, *kernel), or transposed (I, O/groups, *kernel)."""
    taps = (1,) * (weight.dim() - 2)
    if not transposed:
        return values.view(-1, 1, *taps)
    return values.view(groups, 1, -1).expand(groups, weight.shape[0] // groups, -1).reshape(*weight.shape[:2], *taps)


def normalized(weight, m, q, scale, bias, groups, eps, transposed=False) -> tuple[Tensor, Tensor]:
    """The weight and bias whose outputs have standard deviation scale and mean bias, where m and q are mean and variance without them."""
    r = (q + eps).rsqrt() if scale is None else scale.double() * (q + eps).rsqrt()
    shift = -m * r if bias is None else bias.double() - m * r
    factor = per_output(r, weight, groups, transposed).to(torch.promote_types(weight.dtype, torch.float32))
    return (weight * factor).to(weight.dtype), shift.to(weight.dtype)


def moments(weight: Tensor, mean: Tensor, var: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of the outputs of a weight (O, I/groups, *kernel), from those of its independent inputs."""
    rows = _rows(weight, groups)
    return _outputs(rows, mean, "goik,gi->go"), _outputs(rows.square(), var, "goik,gi->go")


def transposed_moments(weight: Tensor, mean: Tensor, var: Tensor, groups: int, stride: Sequence[int], dilation: Sequence[int]):
    """Mean and variance of the outputs of a transposed convolution, of weight (I, O/groups, *kernel).

    Which taps meet at a position depends on its phase in a stride: within phases their average, and the variance of the mean between them.
    """
    means, variances = weight.double(), weight.double().square()
    for size, step, gap in zip(weight.shape[2:], stride, dilation, strict=True):
        phases = torch.nn.functional.one_hot(torch.arange(size, device=weight.device) * gap % step, step).double()
        means, variances = (torch.tensordot(value, phases, ([2], [0])) for value in (means, variances))
    sizes = groups, weight.shape[0] // groups, weight.shape[1], -1
    m = _outputs(means.reshape(sizes), mean, "giop,gi->gop").view(groups * weight.shape[1], -1)
    q = _outputs(variances.reshape(sizes), var, "giop,gi->gop").view_as(m)
    return m.mean(1), q.mean(1) + m.var(1, correction=0)


def _rows(weight: Tensor, groups: int) -> Tensor:
    """(groups, O/groups, I/groups, taps), in float64."""
    return weight.double().reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)


def _outputs(rows: Tensor, inputs: Tensor, equation: str) -> Tensor:
    return torch.einsum(equation, rows, inputs.double().view(len(rows), -1)).flatten()


def analytic_norm_weight(weight, mean, var, scale, bias, groups, eps):
    """The normalized weight, its bias, m and q; differentiable any number of times."""
    m, q = moments(weight, mean, var, groups)
    return *normalized(weight, m, q, scale, bias, groups, eps), m, q


# ---- the backend: memory, sizes and layout are those of the tensors ----


@torch.no_grad()
def analytic_norm_weight_fwd(new, new_bias, stats, weight, mean, var, scale, bias, outputs, taps, groups, channels_last, eps) -> None:
    values = analytic_norm_weight(weight.double(), mean, var, scale, bias, groups, eps)
    for place, value in zip((new, new_bias, *stats), values, strict=True):
        place.copy_(value)


@torch.no_grad()
def analytic_norm_weight_bwd(
    of_weight, of_mean, of_var, of_scale, dnew, dnew_bias, dstats, weight, mean, var, scale, stats, outputs, taps, groups, channels_last, eps
) -> None:
    rows, upstream = _rows(weight, groups), _rows(dnew, groups)
    m, q, c, dm, dq = (value.view(groups, -1, 1, 1) for value in (*stats, dnew_bias, *dstats))
    mean, var = mean.view(groups, 1, -1, 1), var.view(groups, 1, -1, 1)
    rstd = (q + eps).rsqrt()
    r = rstd if scale is None else rstd * scale.double().view(groups, -1, 1, 1)
    dr = (upstream * rows).sum((2, 3), keepdim=True) - c * m
    dm = dm - c * r
    dq = dq - r * rstd * rstd / 2 * dr
    of_weight.copy_((r * upstream + mean * dm + 2 * var * rows * dq).view(weight.shape))
    of_mean.copy_((rows * dm).sum((1, 3)).flatten())
    of_var.copy_((rows.square() * dq).sum((1, 3)).flatten())
    of_scale.copy_((dr * rstd).flatten())
