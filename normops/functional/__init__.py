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

from normops.functional.analytic import (
    activation_moments,
    analytic_norm,
    analytic_norm_weight,
    argmax_probabilities,
    max_moments,
    max_pool_moments,
    softmax_mean,
)
from normops.functional.batch import batch_instance_norm, batch_norm, batch_renorm, sync_batch_norm
from normops.functional.group import adaptive_instance_norm, group_norm, instance_norm
from normops.functional.row import add_layer_norm, add_rms_norm, layer_norm, rms_norm

__all__ = [
    "activation_moments",
    "adaptive_instance_norm",
    "add_layer_norm",
    "add_rms_norm",
    "analytic_norm",
    "analytic_norm_weight",
    "argmax_probabilities",
    "batch_instance_norm",
    "batch_norm",
    "batch_renorm",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "max_moments",
    "max_pool_moments",
    "rms_norm",
    "softmax_mean",
    "sync_batch_norm",
]
