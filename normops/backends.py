"""Who computes what: the backends, which of them can run here and why not, their order, and the override.

A backend is the functions `OPS`, with the same signatures everywhere (``kernels``, ``cpu.py``, ``csrc/cuda``, ``reference.py``). They write into
tensors that the launchers of ``ops.py`` have allocated and checked. A backend that cannot run a configuration raises ``NotImplementedError``
with the reason, and the next one in the order is tried; a forced backend (``with normops.backend(name)`` or the environment variable
``NORMOPS_BACKEND``) never falls back.
"""

import contextlib
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor

BUILD_HINT = "install with `pip install --no-build-isolation .` in an environment that has torch and a C++ compiler"
ORDER = {"cuda": ("triton", "cuda", "reference"), "cpu": ("cpu", "reference")}
OPS = (
    "group_norm_fwd", "group_norm_bwd", "row_norm_fwd", "row_norm_bwd", "batch_norm_fwd", "batch_norm_bwd",
    "activation_moments_fwd", "analytic_norm_weight_fwd", "analytic_norm_weight_bwd",
)  # fmt: skip
_forced: str | None = os.environ.get("NORMOPS_BACKEND") or None


@cache
def _extension(name: str) -> str | None:
    """Load the C++ extension ``normops._C`` or ``normops._CUDA``; the reason why it cannot be loaded, or None."""
    spec = importlib.util.find_spec(f"normops.{name}")
    if spec is None or spec.origin is None:
        return f"normops.{name} was not built: {BUILD_HINT}"
    try:
        if name == "_C":
            importlib.import_module("normops._C")
        else:
            torch.ops.load_library(spec.origin)
            for op in OPS:  # inputs may require grad: the gradient is the business of normops::*, these ops only compute
                _fragment.impl(op, torch.library.fallthrough_kernel, "Autograd")
    except (ImportError, OSError, RuntimeError) as error:
        return f"normops.{name} does not load with torch {torch.__version__} ({str(error).splitlines()[0]}): {BUILD_HINT}"
    return None


_fragment = torch.library.Library("normops_CUDA", "FRAGMENT")  # its registrations last as long as the object


def _no_device(device: str) -> str | None:
    if device != "cuda" or torch.cuda.is_available():
        return None
    return "torch sees no CUDA device" if torch.version.cuda else f"torch {torch.__version__} was built without CUDA"


def unavailable(backend: str) -> str | None:
    """One sentence on why `backend` cannot run on this machine, or None when it can."""
    if backend == "triton":
        return importlib.import_module("normops.kernels").unavailable()
    if backend == "cuda":
        return _no_device("cuda") or _extension("_CUDA")
    if backend == "cpu":
        return _extension("_C")
    if backend == "reference":
        return None
    raise ValueError(f"normops: expected a backend out of triton, cuda, cpu, reference, got {backend!r}")


def _load(backend: str, op: str) -> Callable[..., None]:
    if backend == "triton":
        return getattr(importlib.import_module(f"normops.kernels.{op[:-4]}"), op)
    if backend == "reference":
        return getattr(importlib.import_module("normops.reference"), op)
    if backend == "cuda":
        return getattr(torch.ops.normops_CUDA, op).default
    return getattr(importlib.import_module("normops.cpu"), op)


@cache
def _candidates(op: str, device: str, forced: str | None) -> tuple[Callable[..., None], ...]:
    """The functions to try for `op` on `device`, in order. A forced backend is the only one, or an error that says why."""
    if forced is not None:
        if forced not in ORDER.get(device, ("reference",)):
            raise NotImplementedError(f"{op}: backend {forced!r} does not run on {device} tensors")
        if reason := unavailable(forced):
            raise NotImplementedError(f"{op}: backend {forced!r} cannot run here: {reason}")
        return (_load(forced, op),)
    names = ORDER.get(device, ("reference",))
    reasons = {name: unavailable(name) for name in names}
    able = [name for name in names if reasons[name] is None]
    if able == ["reference"] and len(names) > 1:
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
        warnings.warn(f"normops runs on its slow reference backend on {device} ({why})", stacklevel=2)
    return tuple(_load(name, op) for name in able)


def run(op: str, x: Tensor, *args) -> None:
    """Call the first backend that can run `op` on `x`'s device."""
    candidates = _candidates(op, "cpu" if x.is_cpu else x.device.type, _forced)
    try:
        return candidates[0](*args)
    except NotImplementedError as refusal:
        refusals = [str(refusal)]
    for function in candidates[1:]:
        try:
            return function(*args)
        except NotImplementedError as refusal:
            refusals.append(str(refusal))
    raise NotImplementedError(f"{op}: no backend can run this: " + "; ".join(refusals))


everyday = False  # whether CPU tensors go to the C++ kernels, so that normops.cpu may take its short cut


def _choose() -> None:
    global everyday
    everyday = _forced in (None, "cpu") and _extension("_C") is None


def force(name: str | None) -> None:
    """Use only this backend from now on, in every thread (None: the usual order again)."""
    global _forced
    if name is not None and name not in {backend for names in ORDER.values() for backend in names}:
        raise ValueError(f"normops: expected a backend out of triton, cuda, cpu, reference, got {name!r}")
    _forced = name
    _choose()


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """``with normops.backend("cuda"): ...``: only this backend runs, in every thread; where it cannot, ``NotImplementedError`` says why."""
    before = _forced
    force(name)
    try:
        yield
    finally:
        force(before)


_choose()
