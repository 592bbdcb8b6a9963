"""The public functions: signatures of ``torch.nn.functional`` plus what the kernels fuse."""

import torch
from torch import Tensor

from normops import autograd


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
    """Normalize each sample over groups of channels, then affine, modulation, residual and activation, fused.

    In this order, with mean and biased variance over the ``C/num_groups`` channels and all positions of one group of one sample::

        x_hat = (input - mean) / sqrt(var + eps)
        t     = (x_hat * weight + bias) * (1 + scale) + shift      (modulation: AdaGN, FiLM)
        y     = act(t + residual)

    Same as ``torch.nn.functional.group_norm(input, num_groups, weight, bias, eps)`` except: the keyword arguments; a group of one
    element gives ``bias`` where torch raises; a channels-last result in every layout whose input was channels last.
    ``act`` is one of ``none``, ``relu``, ``leaky_relu`` (with `negative_slope`), ``silu``, ``gelu`` (erf), ``gelu_tanh``, ``tanh``,
    ``sigmoid``, ``hardswish``, each equal to the torch function of that name (``F.gelu(approximate="tanh")`` for ``gelu_tanh``).

    Shapes: input, residual ``(N, C, *spatial)`` with any number of spatial dimensions, also none; weight, bias ``(C,)``, or ``(N, C)`` for
    another one per sample; scale, shift ``(N, C)``. The result has input's shape and memory format. Contiguous and channels-last tensors are
    read in place; others are packed once.

    Dtypes: float16, bfloat16, float32, float64; residual has input's; weight, bias, scale and shift may have any of them. Statistics are
    computed in float32 (float64 for float64). The result has input's dtype, or `out_dtype` (float32 with a 16-bit input).

    eps is in units of variance (input squared). Differentiable twice by kernels, further by the reference.

    Raises ``ValueError`` or ``TypeError`` for arguments that do not fit together, before anything is computed.

    Source: Wu & He 2018, Group Normalization (arXiv 1803.08494).
    """
    if autograd.plain(input, weight, bias, residual, scale, shift):
        return autograd.group_norm_eager(input, num_groups, weight, bias, eps, activation, negative_slope, residual, scale, shift, out_dtype)
    return torch.ops.normops.group_norm.default(
        input, num_groups, weight, bias, eps,
        activation=activation, negative_slope=negative_slope, residual=residual, scale=scale, shift=shift, out_dtype=out_dtype,
    )  # fmt: skip
