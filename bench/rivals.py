"""The same norms by other libraries, where they are installed, and by the backend of torch that it does not choose itself. On a GPU only.

Called as liger-kernel 0.8.5 and quack-kernels 0.6.5 want it.
"""

import importlib
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from bench.formulas import Call, tracked
from bench.norms import NORMS, composed
from bench.shapes import Case

LIGER = "liger_kernel.transformers.functional.liger_"
QUACK = "quack.rmsnorm."


@cache
def _function(path: str) -> Call:
    """Imported at the first call, where a failure is this method's result."""
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def _is_rows(case: Case) -> bool:
    return case.layout == "row" and case.affine


def _is_image(case: Case) -> bool:
    return len(case.shape) in (4, 5) and case.affine


def _liger_layer_norm(case: Case) -> Call:
    return lambda x, weight, bias: _function(LIGER + "layer_norm")(x, weight, bias, case.eps)


# without in_place=False, backward overwrites dy
def _liger_rms_norm(case: Case) -> Call:
    return lambda x, weight: _function(LIGER + "rms_norm")(x, weight, case.eps, in_place=False)


def _liger_add_rms_norm(case: Case) -> Call:
    return lambda x, weight, addend: _function(LIGER + "fused_add_rms_norm")(x, addend, weight, case.eps, in_place=False)


def _liger_group_norm(case: Case) -> Call:
    return lambda x, weight, bias: _function(LIGER + "group_norm")(x, weight, bias, case.shape[1], case.groups, case.eps)


class _QuackLayerNorm(torch.autograd.Function):
    """quack has both directions, but nothing that autograd knows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, rstd, mean = _function(QUACK + "layernorm_fwd")(x, weight, bias, eps, return_rstd=True, return_mean=True)
        ctx.save_for_backward(x, weight, rstd, mean)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd, mean = ctx.saved_tensors
        return *_function(QUACK + "layernorm_bwd")(x, weight, dy, rstd, mean), None


def _quack_layer_norm(case: Case) -> Call:
    return lambda x, weight, bias: _QuackLayerNorm.apply(x, weight, bias, case.eps)


def _quack_rms_norm(case: Case) -> Call:
    return lambda x, weight: _function(QUACK + "rmsnorm")(x, weight, eps=case.eps)


def _quack_add_rms_norm(case: Case) -> Call:
    return lambda x, weight, addend: _function(QUACK + "rmsnorm")(x, weight, residual=addend, eps=case.eps, prenorm=True)


def _batch_norm(norm: Call, case: Case) -> Call:
    def call(x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return norm(x, weight, bias, running_mean, running_var, True, 0.1, case.eps)

    return tracked(case, case.std**2, call)


def _cudnn(*arguments: Any) -> Tensor:
    return torch.cudnn_batch_norm(*arguments)[0]


# norm, method -> package, which cases, the call of a case
RIVALS: dict[tuple[str, str], tuple[str, Callable[[Case], bool], Callable[[Case], Call]]] = {
    ("layer_norm", "liger"): ("liger_kernel", _is_rows, _liger_layer_norm),
    ("rms_norm", "liger"): ("liger_kernel", _is_rows, _liger_rms_norm),
    ("add_rms_norm", "liger"): ("liger_kernel", _is_rows, _liger_add_rms_norm),
    ("group_norm", "liger"): ("liger_kernel", lambda case: case.affine, _liger_group_norm),
    ("layer_norm", "quack"): ("quack", _is_rows, _quack_layer_norm),
    ("rms_norm", "quack"): ("quack", _is_rows, _quack_rms_norm),
    ("add_rms_norm", "quack"): ("quack", _is_rows, _quack_add_rms_norm),
    ("batch_norm", "cudnn"): ("torch", _is_image, partial(_batch_norm, _cudnn)),
    ("batch_norm", "native"): ("torch", _is_image, partial(_batch_norm, lambda *arguments: torch.batch_norm(*arguments, False))),
}
FLOAT32 = {("layer_norm", "quack"), ("batch_norm", "cudnn")}  # their weight and bias are float32, whatever x is


def rivals(case: Case) -> dict[str, Call]:
    """Method -> call of what is installed and can run `case`."""
    return {
        method: composed(case, make(case))
        for (norm, method), (package, suits, make) in RIVALS.items()
        if norm == case.norm and suits(case) and find_spec(package)
    }


def inputs_of(case: Case, method: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a case as `method` wants them, of the same values."""
    if (case.norm, method) not in FLOAT32:
        return inputs
    vectors = NORMS[case.norm].vectors
    return {name: value.detach().float().requires_grad_() if name in vectors else value for name, value in inputs.items()}
