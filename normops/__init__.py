"""Normalization for PyTorch: fused, exact, differentiable twice. ``normops.layer_norm``, ``normops.nn``, ``torch.ops.normops``."""

import importlib.util
import pathlib

if importlib.util.find_spec("normops.kernels") is None:  # a checkout that is not installed: kernels/ lies beside normops/
    __path__.append(str(pathlib.Path(__file__).parent.parent))

from normops import analytic, functional, nn
from normops.backends import backend
from normops.functional import (
    activation_moments,
    adaptive_instance_norm,
    add_layer_norm,
    add_rms_norm,
    analytic_norm,
    analytic_norm_weight,
    argmax_probabilities,
    batch_instance_norm,
    batch_norm,
    batch_renorm,
    group_norm,
    instance_norm,
    layer_norm,
    max_moments,
    max_pool_moments,
    rms_norm,
    softmax_mean,
    sync_batch_norm,
)

__all__ = [
    "activation_moments",
    "adaptive_instance_norm",
    "add_layer_norm",
    "add_rms_norm",
    "analytic",
    "analytic_norm",
    "analytic_norm_weight",
    "argmax_probabilities",
    "batch_instance_norm",
    "batch_norm",
    "batch_renorm",
    "backend",
    "functional",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "max_moments",
    "max_pool_moments",
    "nn",
    "rms_norm",
    "softmax_mean",
    "sync_batch_norm",
]
__version__ = "0.2.0"
