"""Statistics of groups of channels of each sample, and of what only adds to them: group, instance and adaptive instance norm."""

import torch
from torch import Tensor

from normops import checks, operators, ops
from normops.autograd import plain, recomputing
from normops.reference import update_running


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Normalize each sample over groups of channels: mean and variance of ``C/num_groups`` channels and all positions.

    Same as ``torch.nn.functional.group_norm(input, num_groups, weight, bias, eps)`` except: the keyword arguments (see
    :mod:`normops.functional`); a group of one element gives ``bias`` where torch raises; a channels-last result in every layout whose input was
    channels last.

    Shapes: input, residual ``(N, C, *spatial)`` with any number of spatial dimensions, also none; weight, bias ``(C,)``, or ``(N, C)`` for
    another one per sample; scale, shift ``(N, C)``. Contiguous and channels-last tensors are read in place; others are packed once.

    Source: Wu & He 2018, Group Normalization (arXiv 1803.08494).
    """
    if not plain(input, weight, bias, residual, scale, shift):
        return torch.ops.normops.group_norm.default(
            input, num_groups, weight, bias, eps,
            activation=activation, negative_slope=negative_slope, residual=residual, scale=scale, shift=shift, out_dtype=out_dtype,
        )  # fmt: skip
    if scale is not None or shift is not None:
        checks.check_group("group_norm", input, num_groups, weight, bias, residual, eps, activation, out_dtype)
        weight, bias = checks.modulate("group_norm", input, input.shape[1:2], weight, bias, scale, shift)
    return operators.group(True, input, weight, bias, residual, None, num_groups, eps, activation, negative_slope, out_dtype)


@operators.public(
    "Tensor input, Tensor(a!)? running_mean=None, Tensor(b!)? running_var=None, Tensor? weight=None, Tensor? bias=None, "
    f"bool use_input_stats=True, float momentum=0.1, float eps=1e-05, *, {ops.ACTIVATION}, Tensor? residual=None, {ops.MODULATION}) -> Tensor",
    autocast=False,
)
def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Normalize each channel of each sample: mean and variance of its positions.

    With `use_input_stats`, running statistics that are given are updated in place, from the averages over samples of mean and unbiased
    variance: ``running = (1 - momentum) * running + momentum * average``; not again where a backward pass calls for the result again
    (``torch.utils.checkpoint``). Without, they normalize, the same for all samples.

    Same as ``torch.nn.functional.instance_norm`` of the same arguments except: the keyword arguments (see :mod:`normops.functional`); the result
    is channels last where the input was, and nothing is copied to another layout.

    Shapes: input, residual ``(N, C, *spatial)``; running_mean, running_var ``(C,)``; weight, bias ``(C,)``, or ``(N, C)`` for another one per
    sample; scale, shift ``(N, C)``. Raises ``ValueError`` where statistics of a single position are asked for, as torch does.

    Source: Ulyanov et al. 2016, Instance Normalization (arXiv 1607.08022).
    """
    op = "instance_norm"
    checks.check_channels(op, input)
    channels = input.shape[1]
    checks.check_group(op, input, channels, weight, bias, residual, eps, activation, out_dtype)
    checks.check_running(op, input, use_input_stats, "use_input_stats", running_mean=running_mean, running_var=running_var)
    weight, bias = checks.modulate(op, input, (channels,), weight, bias, scale, shift)
    direct = plain(input, weight, bias, residual, running_mean, running_var)
    options = channels, eps, activation, negative_slope, out_dtype
    if running_mean is not None and running_var is not None and not use_input_stats:
        return operators.frozen(direct, input, weight, bias, residual, running_mean, running_var, *options)
    size = input.numel()
    if size and size == input.shape[0] * channels:
        raise ValueError(f"{op}: expected more than 1 position to compute statistics from, got input of shape {tuple(input.shape)}")
    if running_mean is None or running_var is None:
        if direct:
            return operators.group(True, input, weight, bias, residual, None, *options)
        return torch.ops.normops.group_norm.default(
            input, channels, weight, bias, eps,
            activation=activation, negative_slope=negative_slope, residual=residual, out_dtype=out_dtype or input.dtype,
        )  # fmt: skip
    if direct:
        y, stats = operators.group_and_stats(True, input, weight, bias, residual, *options)
    else:
        y, stats = torch.ops.normops.group_norm_and_stats.default(input, weight, bias, residual, None, *options)
    if size and not recomputing():
        positions = size // (input.shape[0] * channels)
        mean, mean_lo, rstd = stats
        var = (rstd.double().square().reciprocal() - eps).clamp_min(0).mean(0) * (positions / (positions - 1))
        update_running(running_mean, running_var, (mean + mean_lo).mean(0), var.to(mean.dtype), momentum)
    return y


@operators.public(
    f"Tensor content, Tensor style, float eps=1e-05, *, {ops.ACTIVATION}, Tensor? residual=None, ScalarType? out_dtype=None) -> Tensor",
    autocast=False,
)
def adaptive_instance_norm(
    content: Tensor,
    style: Tensor,
    eps: float = 1e-5,
    *,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Give each channel of `content` the mean and the standard deviation of that channel of `style`; gradients flow into both::

        y = act(std(style) * (content - mean(content)) / std(content) + mean(style) + residual)        std = sqrt(var + eps)

    Same as ``F.instance_norm(content, eps=eps) * (var + eps).sqrt() + mean`` with ``var, mean = torch.var_mean(style.flatten(2), 2,
    correction=0)``, except for the keyword arguments (see :mod:`normops.functional`). For a mean and a scale that come from elsewhere, call
    `instance_norm` with ``(N, C)`` weight and bias, or with scale and shift.

    Shapes: content, residual ``(N, C, *spatial)``; style ``(N, C, *)`` with positions of its own. Dtypes may differ.

    Source: Huang & Belongie 2017, Arbitrary Style Transfer in Real-time with Adaptive Instance Normalization (arXiv 1703.06868).
    """
    op = "adaptive_instance_norm"
    checks.check_channels(op, content)
    checks.check_channels(op, style)
    if style.shape[:2] != content.shape[:2]:
        raise ValueError(f"{op}: expected style of shape ({content.shape[0]}, {content.shape[1]}, *), got {tuple(style.shape)}")
    if style.device != content.device:
        raise ValueError(f"{op}: expected style on content's device {content.device}, got {style.device}")
    channels = content.shape[1]
    checks.check_group(op, content, channels, None, None, residual, eps, activation, out_dtype)
    checks.check_group(op, style, channels, None, None, None, eps, activation, None)
    if plain(style):
        mean, std = operators.moments(style, channels, eps)
    else:
        mean, std = torch.ops.normops.group_moments.default(style, channels, eps)
    return group_norm(
        content, channels, std, mean, eps,
        activation=activation, negative_slope=negative_slope, residual=residual, out_dtype=out_dtype or content.dtype,
    )  # fmt: skip
