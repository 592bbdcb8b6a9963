"""The public functions: signatures of ``torch.nn.functional`` plus what the kernels fuse.

Each is also an operator, ``torch.ops.normops.<name>``. All of them compute, in this order::

    x_hat = (input - mean) / sqrt(var + eps)               what shares mean and var is what tells the norms apart
    t     = (x_hat * weight + bias) * (1 + scale) + shift   affine, then modulation (AdaGN, FiLM, adaLN)
    y     = act(t + residual)

``act`` is the `activation`: ``none``, ``relu``, ``leaky_relu`` (with `negative_slope`), ``silu``, ``gelu`` (erf), ``gelu_tanh``, ``tanh``,
``sigmoid`` or ``hardswish``, each equal to the torch function of that name (``F.gelu(approximate="tanh")`` for ``gelu_tanh``). ``var`` is biased,
`eps` in units of variance (input squared).

Dtypes: float16, bfloat16, float32, float64; residual has input's; weight, bias, scale and shift may have any of them. Statistics are computed in
float32 (float64 for float64). The result has input's dtype, or `out_dtype` (float32 with a 16-bit input), and input's shape and memory format.

Differentiable twice by kernels, further by the reference. Arguments that do not fit together raise ``ValueError`` or ``TypeError`` before anything
is computed or written.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import TypeVar, cast

import torch
from torch import Tensor

from normops import checks, operators, ops
from normops.autograd import eager, plain
from normops.reference import accumulator

_MODULATION = "Tensor? scale=None, Tensor? shift=None, ScalarType? out_dtype=None"
_ROWS = f"float weight_offset=0., {ops.ACTIVATION}"
Function = TypeVar("Function", bound=Callable)


def _operator(schema: str, autocast: bool = True) -> Callable[[Function], Function]:
    """Make a composition of differentiable operators an operator too, which stands for it wherever calls are traced."""

    def decorate(body: Function) -> Function:
        name = body.__name__
        ops.define(f"{name}({schema}")
        for key in ("CompositeImplicitAutograd", "FuncTorchBatched"):
            ops.lib.impl(name, body, key)
        if autocast:
            ops.lib.impl(name, operators.autocast_cuda(name), "AutocastCUDA")
        names = [key for key, value in inspect.signature(body).parameters.items() if value.kind == value.POSITIONAL_OR_KEYWORD]

        @wraps(body)
        def function(*args, **kwargs):
            if eager():
                return body(*args, **kwargs)
            kwargs |= dict(zip(names, args, strict=False))
            if isinstance(kwargs.get("normalized_shape"), int):
                kwargs["normalized_shape"] = [kwargs["normalized_shape"]]  # operators take no single number
            return getattr(torch.ops.normops, name).default(*args[len(names) :], **kwargs)

        return cast(Function, function)

    return decorate


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


@_operator(
    "Tensor input, Tensor(a!)? running_mean=None, Tensor(b!)? running_var=None, Tensor? weight=None, Tensor? bias=None, "
    f"bool use_input_stats=True, float momentum=0.1, float eps=1e-05, *, {ops.ACTIVATION}, Tensor? residual=None, {_MODULATION}) -> Tensor",
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
    variance: ``running = (1 - momentum) * running + momentum * average``. Without, they normalize, the same for all samples.

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
    for name, value in (("running_mean", running_mean), ("running_var", running_var)):
        if value is not None:
            checks.check_vector(op, name, value, input, (channels,))
            if use_input_stats and value.requires_grad:
                raise ValueError(f"{op}: expected {name} without gradient, since it is updated in place, got one that requires grad")
        elif not use_input_stats:
            raise ValueError(f"{op}: expected {name} when use_input_stats is False, got None")
    if (running_mean is None) != (running_var is None):
        raise ValueError(
            f"{op}: expected running_mean and running_var or neither, got {'running_mean' if running_var is None else 'running_var'} alone"
        )
    weight, bias = checks.modulate(op, input, (channels,), weight, bias, scale, shift)
    direct = plain(input, weight, bias, residual, running_mean, running_var)
    options = channels, eps, activation, negative_slope, out_dtype
    if running_mean is not None and running_var is not None and not use_input_stats:
        dtype = accumulator(input.dtype)
        mean, var = running_mean.detach().to(dtype), running_var.detach().to(dtype)
        given = torch.stack((mean, torch.zeros_like(mean), torch.rsqrt(var + eps))).unsqueeze(1)
        if direct:
            return operators.group(True, input, weight, bias, residual, given, *options)
        return torch.ops.normops.group_norm_and_stats.default(input, weight, bias, residual, given, *options)[0]
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
    if size:
        positions = size // (input.shape[0] * channels)
        mean, mean_lo, rstd = stats
        var = (rstd.double().square().reciprocal() - eps).clamp_min(0).mean(0) * (positions / (positions - 1))
        running_mean.lerp_((mean + mean_lo).mean(0).to(running_mean.dtype), momentum)
        running_var.lerp_(var.to(running_var.dtype), momentum)
    return y


@_operator(
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


@_operator(
    "Tensor input, SymInt[] normalized_shape, Tensor? weight=None, Tensor? bias=None, float eps=1e-05, *, int? dim=None, "
    f"{_ROWS}, Tensor? residual=None, {_MODULATION}) -> Tensor"
)
def layer_norm(
    input: Tensor,
    normalized_shape: int | list[int] | tuple[int, ...] | torch.Size,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dim: int | None = None,
    weight_offset: float = 0.0,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Normalize over the last dimensions, or with ``dim=1`` over the channels of each position of ``(N, C, *spatial)``.

    Same as ``torch.nn.functional.layer_norm(input, normalized_shape, weight, bias, eps)`` except for the keyword arguments: those of
    :mod:`normops.functional`, and `weight_offset`, which is added to weight (1 where weight is stored around zero). ``dim=1`` is
    ``F.layer_norm(input.movedim(1, -1), (C,), weight, bias, eps).movedim(-1, 1)`` without the two copies: channels-first and channels-last images
    are read in place.

    Shapes: the last dimensions of input are normalized_shape (with ``dim=1``: normalized_shape is ``C``); weight, bias normalized_shape; scale,
    shift ``(N, *normalized_shape)`` with N the size of input's first dimension: another one per sample.

    Source: Ba et al. 2016, Layer Normalization (arXiv 1607.06450).
    """
    return _rows(
        "layer_norm", True, input, None, normalized_shape, weight, bias, eps, dim, weight_offset, activation, negative_slope, residual, scale,
        shift, out_dtype,
    )  # fmt: skip


@_operator(
    "Tensor input, SymInt[] normalized_shape, Tensor? weight=None, float? eps=None, *, int? dim=None, "
    f"{_ROWS}, Tensor? residual=None, {_MODULATION}) -> Tensor"
)
def rms_norm(
    input: Tensor,
    normalized_shape: int | list[int] | tuple[int, ...] | torch.Size,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    dim: int | None = None,
    weight_offset: float = 0.0,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Divide by the root mean square of the last dimensions: ``x_hat = input / sqrt(mean(input**2) + eps)``.

    Same as ``torch.nn.functional.rms_norm(input, normalized_shape, weight, eps)`` except for the keyword arguments, which are those of `layer_norm`.
    eps=None is torch's rule: the machine epsilon of the dtype it is computed in, float32's for 16-bit and float32 input, float64's for float64.
    Zero-centred weights as in Gemma: ``weight_offset=1``.

    Source: Zhang & Sennrich 2019, Root Mean Square Layer Normalization (arXiv 1910.07467).
    """
    return _rows(
        "rms_norm", False, input, None, normalized_shape, weight, None, eps, dim, weight_offset, activation, negative_slope, residual, scale,
        shift, out_dtype,
    )  # fmt: skip


@_operator(
    "Tensor input, Tensor residual, SymInt[] normalized_shape, Tensor? weight=None, Tensor? bias=None, float eps=1e-05, *, "
    f"{_ROWS}, {_MODULATION}) -> (Tensor y, Tensor sum)"
)
def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: int | list[int] | tuple[int, ...] | torch.Size,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    weight_offset: float = 0.0,
    activation: str = "none",
    negative_slope: float = 0.01,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`layer_norm` of ``input + residual``, and that sum: input and residual are read once, both results written once.

    Same as ``sum = input + residual; return layer_norm(sum, ...), sum``. residual has input's shape and dtype; the sum is rounded to it.
    """
    return _rows(
        "add_layer_norm", True, input, residual, normalized_shape, weight, bias, eps, None, weight_offset, activation, negative_slope, None, scale,
        shift, out_dtype,
    )  # fmt: skip


@_operator(
    "Tensor input, Tensor residual, SymInt[] normalized_shape, Tensor? weight=None, float? eps=None, *, "
    f"{_ROWS}, {_MODULATION}) -> (Tensor y, Tensor sum)"
)
def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: int | list[int] | tuple[int, ...] | torch.Size,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    activation: str = "none",
    negative_slope: float = 0.01,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`rms_norm` of ``input + residual``, and that sum; see `add_layer_norm`."""
    return _rows(
        "add_rms_norm", False, input, residual, normalized_shape, weight, None, eps, None, weight_offset, activation, negative_slope, None, scale,
        shift, out_dtype,
    )  # fmt: skip


def _rows(
    op, centered, x, addend, normalized_shape, weight, bias, eps, dim, weight_offset, activation, negative_slope, residual, scale, shift, out_dtype
):
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if dim is None:
        ndim = len(shape)
        if not ndim or x.dim() < ndim or x.shape[-ndim:] != shape:
            raise ValueError(f"{op}: expected input whose last dimensions are normalized_shape {shape}, got {tuple(x.shape)}")
    else:
        ndim = 0
        checks.check_channels(op, x)
        if dim != 1 or shape != x.shape[1:2]:
            raise ValueError(f"{op}: expected dim=1 with normalized_shape {tuple(x.shape[1:2])} or dim=None, got dim={dim} with {shape}")
    if eps is None:
        eps = torch.finfo(accumulator(x.dtype)).eps
    checks.check(op, x, shape, weight, bias, residual, eps, activation, out_dtype)
    if addend is not None:
        checks.check_like(op, "residual", addend, x)
    if scale is not None or shift is not None:
        if ndim == x.dim():
            raise ValueError(f"{op}: expected input of shape (N, ..., *normalized_shape) beside scale and shift, got {tuple(x.shape)}")
        weight, bias = checks.modulate(op, x, shape, weight, bias, scale, shift, weight_offset)
        weight_offset = 0.0
    options = ndim, centered, weight_offset, eps, activation, negative_slope, out_dtype
    direct = plain(x, addend, weight, bias, residual)
    if direct:
        if addend is None:
            return operators.row(True, x, weight, bias, residual, *options)
        return operators.add_row(True, x, addend, weight, bias, *options)
    names = dict(zip(("ndim", "centered", "weight_offset", "eps", "activation", "negative_slope", "out_dtype"), options, strict=True))
    if addend is None:
        return torch.ops.normops.row_norm.default(x, weight, bias, residual=residual, **names)
    return torch.ops.normops.add_row_norm.default(x, addend, weight, bias, **names)
