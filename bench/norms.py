"""The norms that are measured, one entry of ``NORMS`` each, and the calls of a case.

``ours`` is the library, ``eager`` the same result from torch's own ops one after the other (plain ``F.group_norm`` where nothing is fused),
``manual`` what models write out instead, ``truth`` a formula that is exact enough in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import normops
from bench import formulas
from bench.formulas import Call
from bench.shapes import DTYPES, OF_PARAMETERS, Case, lay_out

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
    `eager` and `manual` do; they give None for cases that nobody writes out. `results` names what a call returns.
    """

    torch: str
    ours: Callable[[Case], Call]
    eager: Callable[[Case], Call | None]
    exact: Callable[[Case, bool], Call]
    manual: Callable[[Case], Call | None] = lambda case: None
    written: str = ""
    vectors: tuple[str, ...] = ("weight", "bias")
    others: tuple[str, ...] = ()
    results: tuple[str, ...] = ("y",)
    forward: int = 2
    backward: int = 3


def inputs(case: Case, device: str) -> dict[str, Tensor]:
    """The tensors of a case by name, in the order in which its calls take them. rho is in [0, 1]; mean and var are about those of x."""
    generator = torch.Generator(device).manual_seed(0)
    dtype, norm = DTYPES[case.dtype], NORMS[case.norm]

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.promote_types(dtype, torch.float32))

    tensors = {"x": lay_out((random(*case.shape) * case.std + case.mean).to(dtype), case.layout)}
    if case.norm == "analytic_norm_weight":
        outputs, channels = case.shape[0], case.shape[1] * (case.groups or 1)
        tensors |= {name: random(outputs if name in ("scale", "bias") else channels) for name in norm.vectors}
    else:
        tensors |= {name: random(case.shape[1]).to(dtype) for name in norm.vectors if case.affine}
    tensors |= {name: lay_out(random(*case.shape).to(dtype), case.layout) for name in (*norm.others, *["residual"] * case.residual)}
    if "rho" in tensors:
        tensors["rho"].clamp_(0, 1)
    if "mean" in tensors:
        tensors["mean"] += case.mean
    if "var" in tensors:
        tensors["var"].square_().add_(case.std**2)
    return tensors


def ours(case: Case) -> Call:
    norm = NORMS[case.norm].ours(case)
    options: dict[str, Any] = {} if following(case) == "none" else {"activation": case.act}
    if case.residual:
        return lambda *tensors: norm(*tensors[:-1], residual=tensors[-1], **options)
    return partial(norm, **options) if options else norm


def eager(case: Case) -> Call | None:
    norm = NORMS[case.norm].eager(case)
    return norm and composed(case, norm)


def manual(case: Case) -> Call | None:
    norm = NORMS[case.norm].manual(case)
    return norm and composed(case, norm)


def following(case: Case) -> str:
    """The activation after the norm."""
    return "none" if case.norm in OF_PARAMETERS else case.act


def truth(case: Case, frozen: bool) -> Call:
    return composed(case, NORMS[case.norm].exact(case, frozen))


def composed(case: Case, norm: Call) -> Call:
    """`norm`, then the residual and the activation of the case."""
    act = ACTIVATIONS.get(following(case))

    def call(*tensors: Tensor) -> Tensor:
        t = norm(*tensors[:-1]) + tensors[-1] if case.residual else norm(*tensors)
        return t if act is None else act(t)

    return call if act or case.residual else norm


def minimum_bytes(case: Case, direction: str) -> int:
    """The fewest bytes that `direction` moves: every tensor of x's size once; vectors and statistics are left out.

    A residual is read once more in forward; in backward it is read and its gradient written only if an activation follows.
    """
    norm = NORMS[case.norm]
    forward = norm.forward + case.residual
    backward = norm.backward + (2 if case.residual and case.act != "none" else 0)
    tensors = {"backward": backward, "fwd+bwd": forward + backward, "penalty": forward + backward}.get(direction, forward)
    return tensors * case.nbytes


def _add_norm(name: str, ours: Call, eager: Call, centered: bool, vectors: tuple[str, ...]) -> Norm:
    return Norm(
        f"x + residual, {name}",
        partial(formulas.add_ours, ours),
        lambda case: formulas.add_composed(formulas.row_eager(eager, case)),
        lambda case, frozen: formulas.add_composed(formulas.row_exact(centered, case, frozen)),
        vectors=vectors,
        others=("addend",),
        results=("y", "sum"),
        forward=4,
        backward=4,  # the gradients of x and of the addend are one tensor
    )


NORMS: dict[str, Norm] = {
    "group_norm": Norm(
        "F.group_norm",
        lambda case: lambda x, weight, bias, **options: normops.group_norm(x, case.groups, weight, bias, case.eps, **options),
        lambda case: lambda x, weight, bias: F.group_norm(x, case.groups, weight, bias, case.eps),
        formulas.group_exact,
    ),
    "instance_norm": Norm(
        "F.instance_norm",
        lambda case: lambda x, *vectors, **options: normops.instance_norm(x, None, None, *vectors, eps=case.eps, **options),
        lambda case: lambda x, *vectors: F.instance_norm(x, None, None, *vectors, eps=case.eps),
        formulas.instance_exact,
    ),
    "adaptive_instance_norm": Norm(
        "F.instance_norm(x) * std(style) + mean(style)",
        lambda case: lambda x, style, **options: normops.adaptive_instance_norm(x, style, case.eps, **options),
        lambda case: formulas.styled(case, partial(F.instance_norm, eps=case.eps)),
        formulas.adaptive_exact,
        lambda case: formulas.adaptive_exact(case, False),
        "(x - mean) / std * std(style) + mean(style) written out",
        vectors=(),
        others=("style",),
        forward=3,
        backward=5,
    ),
    "layer_norm": Norm(
        "F.layer_norm (images: between two movedim)",
        partial(formulas.row_ours, normops.layer_norm),
        partial(formulas.row_eager, F.layer_norm),
        partial(formulas.row_exact, True),
        lambda case: None if case.layout == "row" else formulas.row_exact(True, case),
        "the formula over dim 1 written out",
    ),
    "rms_norm": Norm(
        "F.rms_norm (images: between two movedim)",
        partial(formulas.row_ours, normops.rms_norm),
        partial(formulas.row_eager, F.rms_norm),
        partial(formulas.row_exact, False),
        formulas.rms_manual,
        "the formula written out, in float32",
        vectors=("weight",),
    ),
    "add_layer_norm": _add_norm("F.layer_norm", normops.add_layer_norm, F.layer_norm, True, ("weight", "bias")),
    "add_rms_norm": _add_norm("F.rms_norm", normops.add_rms_norm, F.rms_norm, False, ("weight",)),
    "batch_norm": Norm(
        "F.batch_norm", partial(formulas.batch, normops.batch_norm, True), partial(formulas.batch, F.batch_norm, True), formulas.batch_exact
    ),
    "batch_norm_eval": Norm(
        "F.batch_norm in evaluation",
        partial(formulas.batch, normops.batch_norm, False),
        partial(formulas.batch, F.batch_norm, False),
        formulas.eval_exact,
    ),
    "batch_renorm": Norm(
        "the formula by torch ops",
        formulas.renorm_ours,
        formulas.renorm_eager,
        formulas.renorm_exact,
        formulas.renorm_manual,
        "torch.var_mean and F.batch_norm, r and d in its weight and bias",
    ),
    "batch_instance_norm": Norm(
        "(rho * F.batch_norm + (1 - rho) * F.instance_norm) * weight + bias",
        formulas.blend_ours,
        formulas.blend_eager,
        formulas.blend_exact,
        formulas.blend_manual,
        "F.batch_norm + F.instance_norm, rho in their weights",
        vectors=("weight", "bias", "rho"),
    ),
    "analytic_norm": Norm(
        "(x - mean) * rsqrt(var + eps) * weight + bias",
        formulas.analytic_ours,
        formulas.analytic_eager,
        formulas.analytic_eager,
        formulas.analytic_manual,
        "x * scale + shift, mean and var in them",
        vectors=("mean", "var", "weight", "bias"),
    ),
    "analytic_norm_weight": Norm(
        "two torch.einsum, weight * factor and bias - m * factor",
        formulas.weight_ours,
        formulas.weight_eager,
        formulas.weight_eager,
        vectors=("mean", "var", "scale", "bias"),
        results=("weight", "bias"),
    ),
    "activation_moments": Norm(
        "the rectifier's closed form",
        formulas.moments_ours,
        formulas.moments_eager,
        formulas.moments_exact,
        vectors=(),
        others=("var",),
        results=("m", "v"),
        forward=4,
        backward=6,
    ),
}
