"""Who computes what: the backends, which of them can run here and why not, their order, and the override.

A backend is a pair of functions with the same signature everywhere (``kernels/group_norm.py``, ``csrc``, ``reference.py``). They write into
tensors that the launchers of ``ops.py`` have allocated and checked. A backend that cannot run a configuration raises ``NotImplementedError``
with the reason, and the next one in the order is tried; a forced backend (``with normops.backend(name)`` or the environment variable ``NORMOPS_BACKEND``) never falls back.
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
OPS = ("group_norm_fwd", "group_norm_bwd")
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
        return getattr(importlib.import_module("normops.kernels.group_norm"), op)
    if backend == "reference":
        return getattr(importlib.import_module("normops.reference"), op)
    if backend == "cuda":
        return getattr(torch.ops.normops_CUDA, op).default
    return _cpu_fwd if op == "group_norm_fwd" else _cpu_bwd


# ---- the C++ CPU kernels: addresses, dtypes as codes; one dtype for x, y, dy and dx, so that another is met by a cast, as torch does ----

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}


def _cpu_fwd(y, stats, x, weight, bias, residual, num_groups, channels_last, eps, activation, negative_slope) -> None:
    if y.dtype != x.dtype:
        x = x.to(y.dtype)
        residual = None if residual is None else residual.to(y.dtype)
    shape = x.shape
    _cpu_kernels().group_norm_fwd(
        y.data_ptr(), eps,
        x.data_ptr(), _address(residual), _address(stats), DTYPES[x.dtype], *_parameters(weight, bias),
        shape[0], shape[1], x.numel(), num_groups, channels_last, activation, negative_slope,
    )  # fmt: skip


def _cpu_bwd(dx, dweight, dbias, dresidual, dy, x, stats, weight, bias, residual, num_groups, channels_last, activation, negative_slope) -> None:
    if dy.dtype != x.dtype:
        wide_dx, wide_dresidual = (None if out is None else torch.empty_like(dy) for out in (dx, dresidual))
        residual = None if residual is None else residual.to(dy.dtype)
        _cpu_bwd(
            wide_dx, dweight, dbias, wide_dresidual, dy, x.to(dy.dtype), stats, weight, bias, residual,
            num_groups, channels_last, activation, negative_slope,
        )  # fmt: skip
        for out, wide in ((dx, wide_dx), (dresidual, wide_dresidual)):
            if out is not None:
                out.copy_(wide)
        return
    shape = x.shape
    _cpu_kernels().group_norm_bwd(
        _address(dx), _address(dresidual), dy.data_ptr(), *_parameters(dweight, dbias),
        x.data_ptr(), _address(residual), stats.data_ptr(), DTYPES[x.dtype], *_parameters(weight, bias),
        shape[0], shape[1], x.numel(), num_groups, channels_last, activation, negative_slope,
    )  # fmt: skip


def cpu_fwd_at_once(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int, eps: float, activation: int | None, negative_slope: float, save_stats: bool
) -> tuple[Tensor, Tensor | None] | None:
    """The everyday call in as few steps as Python allows: contiguous x on the CPU, vectors of C. None when anything is out of the ordinary.

    On small tensors the checks, the choice of a backend and the calls between them cost more than the arithmetic.
    """
    shape, dtype = x.shape, DTYPES.get(x.dtype)
    if dtype is None or activation is None or len(shape) < 2 or not x.is_contiguous() or not eps >= 0 or _forced not in (None, "cpu"):
        return None
    channels, numel = shape[1], x.numel()
    if not numel or num_groups <= 0 or channels % num_groups or _extension("_C") is not None:
        return None
    weight_at = weight_dtype = bias_at = bias_dtype = 0
    if weight is not None:
        weight_dtype = DTYPES.get(weight.dtype)
        if weight_dtype is None or weight.dim() != 1 or weight.numel() != channels or not weight.is_cpu or not weight.is_contiguous():
            return None
        weight_at = weight.data_ptr()
    if bias is not None:
        bias_dtype = DTYPES.get(bias.dtype)
        if bias_dtype is None or bias.dim() != 1 or bias.numel() != channels or not bias.is_cpu or not bias.is_contiguous():
            return None
        bias_at = bias.data_ptr()
    y = torch.empty_like(x)
    stats = None
    if save_stats:
        stats = x.new_empty((3, shape[0], num_groups)) if dtype in (0, 3) else x.new_empty((3, shape[0], num_groups), dtype=torch.float32)
    _cpu_kernels().group_norm_fwd(
        y.data_ptr(), eps, x.data_ptr(), 0, 0 if stats is None else stats.data_ptr(), dtype, weight_at, weight_dtype, 1, bias_at, bias_dtype, 1,
        shape[0], channels, numel, num_groups, False, activation, negative_slope,
    )  # fmt: skip
    return y, stats


def cpu_bwd_at_once(
    dy: Tensor, x: Tensor, stats: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int, activation: int, negative_slope: float, mask
) -> tuple[Tensor | None, ...] | None:
    """The backward of :func:`cpu_fwd_at_once`: dx, dweight, dbias, dresidual; None when anything is out of the ordinary."""
    dtype = DTYPES[x.dtype]
    if mask[3] or not x.is_contiguous() or not dy.is_contiguous() or dy.dtype is not x.dtype or _forced not in (None, "cpu") or not x.numel():
        return None
    if _extension("_C") is not None:
        return None
    dx = torch.empty_like(x) if mask[0] else None
    dweight = dbias = None
    weight_at = weight_dtype = bias_at = bias_dtype = dweight_at = dbias_at = 0
    if weight is not None:
        if weight.dim() != 1 or not weight.is_contiguous():
            return None
        weight_at, weight_dtype = weight.data_ptr(), DTYPES[weight.dtype]
        if mask[1]:
            dweight = torch.empty_like(weight)
            dweight_at = dweight.data_ptr()
    if bias is not None:
        if bias.dim() != 1 or not bias.is_contiguous():
            return None
        bias_at, bias_dtype = bias.data_ptr(), DTYPES[bias.dtype]
        if mask[2]:
            dbias = torch.empty_like(bias)
            dbias_at = dbias.data_ptr()
    shape = x.shape
    _cpu_kernels().group_norm_bwd(
        0 if dx is None else dx.data_ptr(), 0, dy.data_ptr(), dweight_at, weight_dtype, 1, dbias_at, bias_dtype, 1,
        x.data_ptr(), 0, stats.data_ptr(), dtype, weight_at, weight_dtype, 1, bias_at, bias_dtype, 1,
        shape[0], shape[1], x.numel(), num_groups, False, activation, negative_slope,
    )  # fmt: skip
    return dx, dweight, dbias, None


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _parameters(weight: Tensor | None, bias: Tensor | None) -> tuple[int, ...]:
    """Address, dtype and number of dimensions of both."""
    if weight is not None and bias is not None:
        return weight.data_ptr(), DTYPES[weight.dtype], weight.dim(), bias.data_ptr(), DTYPES[bias.dtype], bias.dim()
    if weight is not None:
        return weight.data_ptr(), DTYPES[weight.dtype], weight.dim(), 0, 0, 0
    if bias is not None:
        return 0, 0, 0, bias.data_ptr(), DTYPES[bias.dtype], bias.dim()
    return 0, 0, 0, 0, 0, 0


@cache
def _cpu_kernels():
    return importlib.import_module("normops._C")


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


def force(name: str | None) -> None:
    """Use only this backend from now on, in every thread (None: the usual order again)."""
    global _forced
    if name is not None and name not in {backend for names in ORDER.values() for backend in names}:
        raise ValueError(f"normops: expected a backend out of triton, cuda, cpu, reference, got {name!r}")
    _forced = name


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """``with normops.backend("cuda"): ...``: only this backend runs, in every thread; where it cannot, ``NotImplementedError`` says why."""
    before = _forced
    force(name)
    try:
        yield
    finally:
        force(before)
