"""The norms that are measured, one entry of ``NORMS`` each, and the calls of a case.

``ours`` is the library, ``eager`` the same result from torch's own ops one after the other (plain ``F.group_norm`` where nothing is fused),
``manual`` what models write out instead, ``truth`` a formula that is exact enough in float64.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import normops
from bench.shapes import DTYPES, Case, lay_out

Call = Callable[..., Any]  # of the tensors of a case; gives y, or (y, sum)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "hardswish": F.hardswish,
}
KINKS = {"relu": (0.0,), "leaky_relu": (0.0,), "hardswish": (-3.0, 3.0)}  # where the derivative jumps


@dataclass(frozen=True)
class Norm:
    """A norm: who computes it, from which tensors, and how many of x's size a computation moves at least.

    `ours`, `eager`, `manual` and `exact` make the call of a case, without activation and residual: of x, of `vectors` of C elements (none where
    the case is not affine) and of `others` of x's size. `ours` also takes the keywords of the library. `exact` with True takes the statistics for
    constants, which leaves of dx the first of the terms that cancel, and so the size of its rounding. `torch` and `written` say in words what
    `eager` and `manual` do; `manual` gives None for cases that nobody writes out. `results` names what a call returns.
    """

    torch: str
    ours: Callable[[Case], Call]
    eager: Callable[[Case], Call]
    exact: Callable[[Case, bool], Call]
    manual: Callable[[Case], Call | None] = lambda case: None
    written: str = ""
    vectors: tuple[str, ...] = ("weight", "bias")
    others: tuple[str, ...] = ()
    results: tuple[str, ...] = ("y",)
    forward: int = 2
    backward: int = 3


def inputs(case: Case, device: str) -> dict[str, Tensor]:
    """The tensors of a case by name, in the order in which its calls take them. rho is in [0, 1]."""
    generator = torch.Generator(device).manual_seed(0)
    dtype, norm = DTYPES[case.dtype], NORMS[case.norm]

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.promote_types(dtype, torch.float32))

    tensors = {"x": lay_out((random(*case.shape) * case.std + case.mean).to(dtype), case.layout)}
    tensors |= {name: random(case.shape[1]).to(dtype) for name in norm.vectors if case.affine}
    if "rho" in tensors:
        tensors["rho"].clamp_(0, 1)
    return tensors | {name: lay_out(random(*case.shape).to(dtype), case.layout) for name in (*norm.others, *["residual"] * case.residual)}


def ours(case: Case) -> Call:
    norm = NORMS[case.norm].ours(case)
    options: dict[str, Any] = {} if case.act == "none" else {"activation": case.act}
    if case.residual:
        return lambda *tensors: norm(*tensors[:-1], residual=tensors[-1], **options)
    return partial(norm, **options) if options else norm


def eager(case: Case) -> Call:
    return _composed(case, NORMS[case.norm].eager(case))


def manual(case: Case) -> Call | None:
    norm = NORMS[case.norm].manual(case)
    return norm and _composed(case, norm)


def truth(case: Case, frozen: bool) -> Call:
    return _composed(case, NORMS[case.norm].exact(case, frozen))


def _composed(case: Case, norm: Call) -> Call:
    """`norm`, then the residual and the activation of the case."""
    act = ACTIVATIONS.get(case.act)

    def composed(*tensors: Tensor) -> Tensor:
        t = norm(*tensors[:-1]) + tensors[-1] if case.residual else norm(*tensors)
        return t if act is None else act(t)

    return composed if act or case.residual else norm


def minimum_bytes(case: Case, direction: str) -> int:
    """The fewest bytes that `direction` moves: every tensor of x's size once; vectors and statistics are left out.

    A residual is read once more in forward; in backward it is read and its gradient written only if an activation follows.
    """
    norm = NORMS[case.norm]
    forward = norm.forward + case.residual
    backward = norm.backward + (2 if case.residual and case.act != "none" else 0)
    tensors = {"backward": backward, "fwd+bwd": forward + backward, "penalty": forward + backward}.get(direction, forward)
    return tensors * case.nbytes


def _x_hat(x: Tensor, dims: int | tuple[int, ...], eps: float, frozen: bool = False, centered: bool = True) -> Tensor:
    mean = x.mean(dims, keepdim=True) if centered else x.new_zeros(())
    rstd = torch.rsqrt((x - mean).square().mean(dims, keepdim=True) + eps)
    if frozen:
        mean, rstd = mean.detach(), rstd.detach()
    return (x - mean) * rstd


def _affine(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    if weight is not None:
        x = x * _column(weight, x)
    return x if bias is None else x + _column(bias, x)


def _column(vector: Tensor, x: Tensor) -> Tensor:
    """A number per channel of x, to be combined with x."""
    return vector.view(-1, *(1,) * (x.dim() - 2))


def _positions(case: Case) -> tuple[int, ...]:
    return tuple(range(2, len(case.shape)))


def _group_exact(case: Case, frozen: bool) -> Call:
    def call(x: Tensor, *vectors: Tensor) -> Tensor:
        return _affine(_x_hat(x.reshape(x.shape[0], case.groups, -1), 2, case.eps, frozen).reshape(x.shape), *vectors)

    return call


def _instance_exact(case: Case, frozen: bool) -> Call:
    return lambda x, *vectors: _affine(_x_hat(x, _positions(case), case.eps, frozen), *vectors)


def _styled(case: Case, x_hat: Call) -> Call:
    """x_hat of the content with the mean and the standard deviation of the style."""

    def call(x: Tensor, style: Tensor) -> Tensor:
        var, mean = torch.var_mean(style, _positions(case), correction=0, keepdim=True)
        return x_hat(x) * (var + case.eps).sqrt() + mean

    return call


def _adaptive_exact(case: Case, frozen: bool) -> Call:
    return _styled(case, partial(_x_hat, dims=_positions(case), eps=case.eps, frozen=frozen))


def _row_ours(norm: Call, case: Case) -> Call:
    shape, dim = case.shape[1:2], None if case.layout == "row" else 1
    return lambda x, *vectors, **options: norm(x, shape, *vectors, eps=case.eps, dim=dim, **options)


def _row_eager(norm: Call, case: Case) -> Call:
    shape = case.shape[1:2]
    if case.layout == "row":
        return lambda x, *vectors: norm(x, shape, *vectors, eps=case.eps)
    return lambda x, *vectors: norm(x.movedim(1, -1), shape, *vectors, eps=case.eps).movedim(-1, 1)


def _row_exact(centered: bool, case: Case, frozen: bool = False) -> Call:
    return lambda x, *vectors: _affine(_x_hat(x, 1, case.eps, frozen, centered), *vectors)


def _rms_manual(case: Case) -> Call:
    exact = _row_exact(False, case)
    return lambda x, *vectors: exact(x.float(), *vectors).to(x.dtype)


def _add_ours(norm: Call, case: Case) -> Call:
    return lambda x, *rest, **options: norm(x, rest[-1], case.shape[1:2], *rest[:-1], eps=case.eps, **options)


def _add_composed(norm: Call) -> Call:
    def call(x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        total = x + rest[-1]
        return norm(total, *rest[:-1]), total

    return call


def _add_norm(name: str, ours: Call, eager: Call, centered: bool, vectors: tuple[str, ...]) -> Norm:
    return Norm(
        f"x + residual, {name}",
        partial(_add_ours, ours),
        lambda case: _add_composed(_row_eager(eager, case)),
        lambda case, frozen: _add_composed(_row_exact(centered, case, frozen)),
        vectors=vectors,
        others=("addend",),
        results=("y", "sum"),
        forward=4,
        backward=4,  # the gradients of x and of the addend are one tensor
    )


def _tracked(case: Case, spread: float, norm: Call) -> Call:
    """`norm` of x, running mean and variance (or deviation), and the rest. The running statistics are those that x is drawn by."""
    running: list[Tensor] = []

    def call(x: Tensor, *rest: Tensor, **options: Any) -> Tensor:
        if not running:
            running.extend(x.detach().new_full(case.shape[1:2], value) for value in (case.mean, spread))
        return norm(x, *running, *rest, **options)

    return call


def _samples(case: Case) -> tuple[int, ...]:
    return 0, *_positions(case)


def _batch(norm: Call, training: bool, case: Case) -> Call:
    return _tracked(case, case.std**2, partial(norm, training=training, eps=case.eps))


def _batch_exact(case: Case, frozen: bool) -> Call:
    return lambda x, *vectors: _affine(_x_hat(x, _samples(case), case.eps, frozen), *vectors)


def _eval_exact(case: Case, frozen: bool) -> Call:
    return lambda x, *vectors: _affine((x - case.mean) / math.sqrt(case.std**2 + case.eps), *vectors)


R_MAX, D_MAX = 3.0, 5.0  # where the published schedule ends


def _moments(case: Case, x: Tensor) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x, _samples(case), correction=0)
    return mean, (var + case.eps).sqrt()


def _corrections(mean: Tensor, std: Tensor, running_mean: Tensor | float, running_std: Tensor | float) -> tuple[Tensor, Tensor]:
    """r and d of batch renormalization."""
    r = (std.detach() / running_std).clamp(1 / R_MAX, R_MAX)
    return r, ((mean.detach() - running_mean) / running_std).clamp(-D_MAX, D_MAX)


def _update(running: Tensor, value: Tensor) -> None:
    running += 0.0 * (value.detach() - running)  # momentum 0, that every call gives the same


def _renorm_ours(case: Case) -> Call:
    norm = partial(normops.batch_renorm, training=True, momentum=0.0, eps=case.eps, r_max=R_MAX, d_max=D_MAX)
    return _tracked(case, case.std, norm)


def _renorm_eager(case: Case) -> Call:
    def norm(x: Tensor, running_mean: Tensor, running_std: Tensor, *vectors: Tensor) -> Tensor:
        mean, std = _moments(case, x)
        corrections = _corrections(mean, std, running_mean, running_std)
        _update(running_mean, mean)
        _update(running_std, std)
        return _affine(_affine((x - _column(mean, x)) / _column(std, x), *corrections), *vectors)

    return _tracked(case, case.std, norm)


def _renorm_manual(case: Case) -> Call:
    def norm(x: Tensor, running_mean: Tensor, running_std: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with torch.no_grad():
            mean, std = _moments(case, x)
            r, d = _corrections(mean, std, running_mean, running_std)
            _update(running_mean, mean)
            _update(running_std, std)
        return F.batch_norm(x, None, None, weight * r, torch.addcmul(bias, weight, d), training=True, eps=case.eps)

    return _tracked(case, case.std, norm)


def _renorm_exact(case: Case, frozen: bool) -> Call:
    def call(x: Tensor, *vectors: Tensor) -> Tensor:
        corrections = _corrections(*_moments(case, x), case.mean, case.std)
        return _affine(_affine(_x_hat(x, _samples(case), case.eps, frozen), *corrections), *vectors)

    return call


def _blend_ours(case: Case) -> Call:
    def norm(x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor, bias: Tensor, rho: Tensor, **options: Any) -> Tensor:
        return normops.batch_instance_norm(x, running_mean, running_var, rho, weight, bias, training=True, eps=case.eps, **options)

    return _tracked(case, case.std**2, norm)


def _blend_eager(case: Case) -> Call:
    def norm(x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor, bias: Tensor, rho: Tensor) -> Tensor:
        by_batch = F.batch_norm(x, running_mean, running_var, training=True, eps=case.eps)
        return _affine(_affine(by_batch, rho) + _affine(F.instance_norm(x, eps=case.eps), 1 - rho), weight, bias)

    return _tracked(case, case.std**2, norm)


def _blend_manual(case: Case) -> Call:
    def norm(x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor, bias: Tensor, rho: Tensor) -> Tensor:
        by_batch = F.batch_norm(x, running_mean, running_var, weight * rho, bias, training=True, eps=case.eps)
        return by_batch + F.instance_norm(x, weight=weight * (1 - rho), eps=case.eps)

    return _tracked(case, case.std**2, norm)


def _blend_exact(case: Case, frozen: bool) -> Call:
    def call(x: Tensor, weight: Tensor, bias: Tensor, rho: Tensor) -> Tensor:
        by_batch, by_instance = (_x_hat(x, dims, case.eps, frozen) for dims in (_samples(case), _positions(case)))
        return _affine(_affine(by_batch, rho) + _affine(by_instance, 1 - rho), weight, bias)

    return call


NORMS: dict[str, Norm] = {
    "group_norm": Norm(
        "F.group_norm",
        lambda case: lambda x, weight, bias, **options: normops.group_norm(x, case.groups, weight, bias, case.eps, **options),
        lambda case: lambda x, weight, bias: F.group_norm(x, case.groups, weight, bias, case.eps),
        _group_exact,
    ),
    "instance_norm": Norm(
        "F.instance_norm",
        lambda case: lambda x, *vectors, **options: normops.instance_norm(x, None, None, *vectors, eps=case.eps, **options),
        lambda case: lambda x, *vectors: F.instance_norm(x, None, None, *vectors, eps=case.eps),
        _instance_exact,
    ),
    "adaptive_instance_norm": Norm(
        "F.instance_norm(x) * std(style) + mean(style)",
        lambda case: lambda x, style, **options: normops.adaptive_instance_norm(x, style, case.eps, **options),
        lambda case: _styled(case, partial(F.instance_norm, eps=case.eps)),
        _adaptive_exact,
        lambda case: _adaptive_exact(case, False),
        "(x - mean) / std * std(style) + mean(style) written out",
        vectors=(),
        others=("style",),
        forward=3,
        backward=5,
    ),
    "layer_norm": Norm(
        "F.layer_norm (images: between two movedim)",
        partial(_row_ours, normops.layer_norm),
        partial(_row_eager, F.layer_norm),
        partial(_row_exact, True),
        lambda case: None if case.layout == "row" else _row_exact(True, case),
        "the formula over dim 1 written out",
    ),
    "rms_norm": Norm(
        "F.rms_norm (images: between two movedim)",
        partial(_row_ours, normops.rms_norm),
        partial(_row_eager, F.rms_norm),
        partial(_row_exact, False),
        _rms_manual,
        "the formula written out, in float32",
        vectors=("weight",),
    ),
    "add_layer_norm": _add_norm("F.layer_norm", normops.add_layer_norm, F.layer_norm, True, ("weight", "bias")),
    "add_rms_norm": _add_norm("F.rms_norm", normops.add_rms_norm, F.rms_norm, False, ("weight",)),
    "batch_norm": Norm("F.batch_norm", partial(_batch, normops.batch_norm, True), partial(_batch, F.batch_norm, True), _batch_exact),
    "batch_norm_eval": Norm(
        "F.batch_norm in evaluation", partial(_batch, normops.batch_norm, False), partial(_batch, F.batch_norm, False), _eval_exact
    ),
    "batch_renorm": Norm(
        "the formula by torch ops",
        _renorm_ours,
        _renorm_eager,
        _renorm_exact,
        _renorm_manual,
        "torch.var_mean and F.batch_norm, r and d in its weight and bias",
    ),
    "batch_instance_norm": Norm(
        "(rho * F.batch_norm + (1 - rho) * F.instance_norm) * weight + bias",
        _blend_ours,
        _blend_eager,
        _blend_exact,
        _blend_manual,
        "F.batch_norm + F.instance_norm, rho in their weights",
        vectors=("weight", "bias", "rho"),
    ),
}
