"""Statistics of a channel of all samples, and what is built from them: batch norm, synchronized and renormalized, and batch-instance norm."""

from typing import Any

import torch
from torch import Tensor

from normops import checks, distributed, launch, operators, ops, reference
from normops.autograd import BatchInstanceNorm, plain, recomputing
from normops.layout import dense

_INPUT = "Tensor input, Tensor(a!)? running_mean, Tensor(b!)? {second}, {rho}Tensor? weight=None, Tensor? bias=None, bool training=False"
_OPTIONS = f"{ops.ACTIVATION}, Tensor? residual=None, {ops.MODULATION}) -> Tensor"
_BATCH = _INPUT.format(second="running_var", rho="") + ", float momentum=0.1, float eps=1e-05, *, "


@operators.public(f"{_BATCH}str on_single_value='raise', {_OPTIONS}", autocast=False)
def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    on_single_value: str = "raise",
    activation: str = "none",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Normalize each channel by mean and variance of all samples and positions, or (`training` False) by the running ones.

    In training, running statistics that are given are updated in place by ``running += momentum * (value - running)``, the variance by the
    unbiased one; not again where a backward pass calls for the result again (``torch.utils.checkpoint``).

    Same as ``torch.nn.functional.batch_norm`` of the same arguments except: the keyword arguments (see :mod:`normops.functional`); running
    statistics come as a pair; the result keeps input's memory format.

    Shapes: input, residual ``(N, C, *spatial)`` with any number of spatial dimensions, also none; running_mean, running_var ``(C,)``; weight,
    bias ``(C,)``, or ``(N, C)`` for another one per sample (conditional batch norm); scale, shift ``(N, C)``. A single value per channel in
    training raises ``ValueError`` as in torch, or is normalized by the running statistics, which stay as they are, with
    ``on_single_value="running"``.

    Source: Ioffe & Szegedy 2015, Batch Normalization (arXiv 1502.03167).
    """
    return _batch_norm(
        "batch_norm", None, on_single_value, input, running_mean, running_var, weight, bias, training, momentum, eps, activation, negative_slope,
        residual, scale, shift, out_dtype,
    )  # fmt: skip


@operators.public(f"{_BATCH}str process_group='', str on_single_value='raise', {_OPTIONS}", autocast=False)
def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    process_group: str = "",
    on_single_value: str = "raise",
    activation: str = "none",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`batch_norm` over the batches of all workers of a ``torch.distributed`` process group: the same as if one process had them all.

    Every worker sends mean, sum of squared deviations and number of its values in one collective forward, and two sums in one backward, on any
    backend and device. Batches may differ in size, and be empty. The gradients of weight and bias are the worker's own, as
    ``DistributedDataParallel`` expects them. Without ``torch.distributed``, or with one worker, it is `batch_norm`.

    Arguments as for `batch_norm`, on_single_value where the group has one worker; process_group: the name of a group (``group.group_name``), ""
    for the default group. Every worker of the group must call it, forward and backward. Second derivatives are synchronized too; ``torch.func``
    transforms raise ``NotImplementedError``.
    """
    group = process_group if training and distributed.workers(process_group) > 1 else None
    return _batch_norm(
        "sync_batch_norm", group, on_single_value, input, running_mean, running_var, weight, bias, training, momentum, eps, activation,
        negative_slope, residual, scale, shift, out_dtype,
    )  # fmt: skip


def _batch_norm(
    op, group, on_single_value, x, running_mean, running_var, weight, bias, training, momentum, eps, activation, negative_slope, residual, scale,
    shift, out_dtype,
):  # fmt: skip
    if on_single_value not in ("raise", "running"):
        raise ValueError(f"{op}: expected on_single_value out of raise, running, got {on_single_value!r}")
    checks.check_channels(op, x)
    channels = x.shape[1]
    checks.check_group(op, x, channels, weight, bias, residual, eps, activation, out_dtype)
    checks.check_running(op, x, training, "training", running_mean=running_mean, running_var=running_var)
    weight, bias = checks.modulate(op, x, (channels,), weight, bias, scale, shift)
    direct = plain(x, weight, bias, residual, running_mean, running_var)
    options = eps, activation, negative_slope, out_dtype
    size = x.numel()
    if training and group is None and size == channels and size:
        if on_single_value == "raise":
            raise ValueError(f"{op}: expected more than 1 value per channel in training, got input of shape {tuple(x.shape)}")
        checks.check_running(op, x, False, "training with a single value per channel", running_mean=running_mean, running_var=running_var)
        training = False
    if not training:
        return operators.frozen(direct, x, weight, bias, residual, running_mean, running_var, channels, *options)
    updated = running_mean is not None and (size or group is not None) and not recomputing()
    running = (running_mean, running_var, momentum) if updated else None
    if direct:
        y, stats = operators.batch(True, x, weight, bias, residual, None, group, *options, running=running)
    else:
        y, stats = torch.ops.normops.batch_norm_and_stats.default(x, weight, bias, residual, None, group, *options)
    if updated and direct and group is None:
        _written(running_mean, running_var)
    elif updated:
        launch.update_batch_statistics(running_mean, running_var, momentum, stats)
    return y


def _written(*tensors: Tensor) -> None:
    """Kernels wrote into these: autograd must know."""
    torch.autograd.graph.increment_version([tensor for tensor in tensors if not tensor.is_inference()])


@operators.public(
    _INPUT.format(second="running_std", rho="") + f", float momentum=0.01, float eps=1e-03, *, Tensor? r_max=None, Tensor? d_max=None, {_OPTIONS}",
    autocast=False,
)
def batch_renorm(
    input: Tensor,
    running_mean: Tensor | None,
    running_std: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.01,
    eps: float = 1e-3,
    *,
    r_max: float | Tensor | None = None,
    d_max: float | Tensor | None = None,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Batch norm whose result in training is drawn to what the running statistics would give::

        x_hat = (input - mean) / std * r + d         std = sqrt(var + eps) of the batch, biased
        r     = clip(std / running_std, 1/r_max, r_max)        d = clip((mean - running_mean) / running_std, -d_max, d_max)

    r and d are constants for the gradient. Then running_mean and running_std are updated in place, by ``running += momentum * (value - running)``
    with mean and std; the standard deviation is what is averaged. Without `training`, ``x_hat = (input - running_mean) / running_std``.

    Where a backward pass calls for the result again (``torch.utils.checkpoint``), nothing is updated, and r and d follow from the running statistics
    before their last update, so that the result is the same. Not so for a checkpoint inside of a compiled graph, which torch computes from the
    buffers as they are then: leave checkpoints outside of ``torch.compile``.

    With r_max = 1 and d_max = 0, the defaults, it is `batch_norm`; unclipped, training gives what evaluation gives. No torch function equals it.

    Shapes: as for `batch_norm`; running_mean, running_std ``(C,)``, running_std positive; r_max >= 1 and d_max >= 0 numbers or tensors of one
    element. Raises ``ValueError`` for a single value per channel in training.

    Source: Ioffe 2017, Batch Renormalization (arXiv 1702.03275).
    """
    op = "batch_renorm"
    checks.check_channels(op, input)
    channels = input.shape[1]
    checks.check_group(op, input, channels, weight, bias, residual, eps, activation, out_dtype)
    checks.check_running(op, input, training, "training", running_mean=running_mean, running_std=running_std)
    if running_mean is None or running_std is None:
        raise ValueError(f"{op}: expected running_mean and running_std, got None")
    r_max, d_max = 1.0 if r_max is None else r_max, 0.0 if d_max is None else d_max
    for name, value, least in (("r_max", r_max, 1.0), ("d_max", d_max, 0.0)):
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"{op}: expected {name} of one element, got shape {tuple(value.shape)}")
        if not isinstance(value, Tensor) and not value >= least:
            raise ValueError(f"{op}: expected {name} >= {least:g}, got {value}")
    weight, bias = checks.modulate(op, input, (channels,), weight, bias, scale, shift)
    direct = plain(input, weight, bias, residual, running_mean, running_std)
    options = activation, negative_slope, out_dtype
    size = input.numel()
    if not training or not size:
        return operators.frozen(direct, input, weight, bias, residual, running_mean.double(), running_std.double().square(), channels, 0.0, *options)
    if size == channels:
        raise ValueError(f"{op}: expected more than 1 value per channel in training, got input of shape {tuple(input.shape)}")
    input = dense(input)
    with torch.no_grad():
        x = input.detach()  # also of forward-mode tangents
        stats = launch.batch_norm_stats(x, eps) if direct else torch.ops.normops.batch_norm_stats.default(x, eps)
        mean, mean_lo, rstd = stats[:3, 0]
        mean, std = mean + mean_lo, 1 / rstd
        bounds: Any = [value.to(std).reshape(()) if isinstance(value, Tensor) else value for value in (r_max, d_max)]
        r_bound, d_bound = bounds
        undo = -momentum / (1 - momentum) if recomputing() and momentum < 1 else 0.0  # to what they were at the first call
        before_mean, before_std = (torch.lerp(now.to(std), value, undo) for now, value in ((running_mean, mean), (running_std, std)))
        r = torch.clamp(std / before_std, 1 / r_bound, r_bound)
        d = torch.clamp((stats[0, 0] - before_mean + mean_lo) / before_std, -d_bound, d_bound)
        if not recomputing():
            reference.update_running(running_mean, running_std, mean, std, momentum)
    weight, shift = (r, d) if weight is None else (weight * r, weight * d)
    bias = shift if bias is None else bias + shift
    if direct:
        return operators.batch(True, input, weight, bias, residual, stats, None, eps, *options)[0]
    return torch.ops.normops.batch_norm_and_stats.default(input, weight, bias, residual, stats, None, eps, *options)[0]


@operators.public(_INPUT.format(second="running_var", rho="Tensor rho, ") + f", float momentum=0.1, float eps=1e-05, *, {_OPTIONS}", autocast=False)
def batch_instance_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    rho: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
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
    """A blend of batch norm and instance norm, learned for each channel: ``x_hat = rho * x_B + (1 - rho) * x_I``.

    x_B is normalized as by `batch_norm`, x_I as by `instance_norm` without running statistics, in evaluation too. Both statistics come from one
    pass: ``mean_B = mean(mean_I)``, ``var_B = mean(var_I) + var(mean_I)`` over samples.

    Same as ``rho * F.batch_norm(input, running_mean, running_var, None, None, training, momentum, eps) + (1 - rho) * F.instance_norm(input,
    eps=eps)`` times weight plus bias, with rho, weight, bias of shape ``(C, 1, 1)``.

    Shapes: as for `batch_norm`; rho ``(C,)``, meant to lie in [0, 1]: nothing clips it here. Raises ``ValueError`` for inputs of a single
    position.

    Source: Nam & Kim 2018, Batch-Instance Normalization (arXiv 1805.07925).
    """
    op = "batch_instance_norm"
    checks.check_channels(op, input)
    channels = input.shape[1]
    checks.check_group(op, input, channels, weight, bias, residual, eps, activation, out_dtype)
    checks.check_running(op, input, training, "training", running_mean=running_mean, running_var=running_var)
    checks.check_vector(op, "rho", rho, input, (channels,))
    weight, bias = checks.modulate(op, input, (channels,), weight, bias, scale, shift)
    size = input.numel()
    if size and size == input.shape[0] * channels:
        raise ValueError(f"{op}: expected more than 1 position to compute statistics from, got input of shape {tuple(input.shape)}")
    options = eps, activation, negative_slope, out_dtype
    if not size:
        bias = rho * 0 if bias is None else bias + rho * 0  # no value depends on rho; its gradient is 0
        return operators.group(False, input, weight, bias, residual, None, channels, *options)
    given = None
    if not training and running_mean is not None and running_var is not None:
        given = torch.stack((running_mean.detach().double(), (running_var.detach().double() + eps).sqrt()))
    if plain(input, rho, weight, bias, residual, running_mean, running_var):
        y, mean, std = BatchInstanceNorm.apply(dense(input), rho, weight, bias, residual, given, *options)
    else:
        mean, std = torch.ops.normops.group_moments.default(input, channels, eps)
        scale, shift = reference.blend(mean, std, rho, weight, bias, given)
        y = torch.ops.normops.group_norm.default(
            input, channels, scale, shift, eps,
            activation=activation, negative_slope=negative_slope, residual=residual, out_dtype=out_dtype or input.dtype,
        )  # fmt: skip
    if training and running_mean is not None and running_var is not None and not recomputing():
        mean, std = reference.batch_moments(mean.detach(), std.detach(), None)
        count = size // channels
        reference.update_running(running_mean, running_var, mean, (std.square() - eps).clamp_min(0) * (count / (count - 1)), momentum)
    return y
