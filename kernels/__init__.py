"""Triton kernels for normalization on CUDA. This package knows torch, triton and itself, nothing of normops.

Offered: `unavailable()`, and once that returns None, `group_norm.group_norm_fwd` and `group_norm.group_norm_bwd` (a statistic for all
positions of a group), `batch_norm.batch_norm_fwd` and `batch_norm.batch_norm_bwd` (for a channel of all samples), `row_norm.row_norm_fwd` and
`row_norm.row_norm_bwd` (for each position of a group), `activation_moments.activation_moments_fwd`, `analytic_norm_weight.analytic_norm_weight_fwd`
and `analytic_norm_weight.analytic_norm_weight_bwd` (statistics that are propagated).
Nothing is imported before it is asked for, so that this package imports where Triton is not installed.
"""

import importlib.util
import os

import torch


def unavailable():
    """Why the kernels cannot run here, or None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if not torch.cuda.is_available():
        return "no CUDA device is available"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (7, 0):
        return "triton needs a GPU of compute capability 7.0 or later"
    return None
