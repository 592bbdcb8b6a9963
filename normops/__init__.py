"""Normalization for PyTorch: fused, exact, differentiable twice. ``normops.group_norm``, ``normops.nn``, ``torch.ops.normops``."""

import importlib.util
import pathlib

if importlib.util.find_spec("normops.kernels") is None:  # a checkout that is not installed: kernels/ lies beside normops/
    __path__.append(str(pathlib.Path(__file__).parent.parent))

from normops import functional, nn
from normops.backends import backend
from normops.functional import group_norm

__all__ = ["backend", "functional", "group_norm", "nn"]
__version__ = "0.1.0"
