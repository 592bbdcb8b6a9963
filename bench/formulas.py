"""What the norms compute, by normops, by torch's ops and as formulas that are exact enough in float64: calls of a case, without activation and
residual, of which ``bench/norms.py`` makes its entries.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import normops
from bench.shapes import Case
from normops import maps

Call = Callable[..., Any]  # of the tensors of a case; gives y, or several results
Pair = tuple[Tensor, Tensor]


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


def group_exact(case: Case, frozen: bool) -> Call:
    def call(x: Tensor, *vectors: Tensor) -> Tensor:
        return _affine(_x_hat(x.reshape(x.shape[0], case.groups, -1), 2, case.eps, frozen).reshape(x.shape), *vectors)

    return call


def instance_exact(case: Case, frozen: bool) -> Call:
    return lambda x, *vectors: _affine(_x_hat(x, _positions(case), case.eps, frozen), *vectors)


def styled(case: Case, x_hat: Call) -> Call:
    """x_hat of the content with the mean and the standard deviation of the style."""

    def call(x: Tensor, style: Tensor) -> Tensor:
        var, mean = torch.var_mean(style, _positions(case), correction=0, keepdim=True)
        return x_hat(x) * (var + case.eps).sqrt() + mean

    return call


def adaptive_exact(case: Case, frozen: bool) -> Call:
    return styled(case, partial(_x_hat, dims=_positions(case), eps=case.eps, frozen=frozen))


def row_ours(norm: Call, case: Case) -> Call:
    shape, dim = case.shape[1:2], None if case.layout == "row" else 1
    return lambda x, *vectors, **options: norm(x, shape, *vectors, eps=case.eps, dim=dim, **options)


def row_eager(norm: Call, case: Case) -> Call:
    shape = case.shape[1:2]
    if case.layout == "row":
        return lambda x, *vectors: norm(x, shape, *vectors, eps=case.eps)
    return lambda x, *vectors: norm(x.movedim(1, -1), shape, *vectors, eps=case.eps).movedim(-1, 1)


def row_exact(centered: bool, case: Case, frozen: bool = False) -> Call:
    return lambda x, *vectors: _affine(_x_hat(x, 1, case.eps, frozen, centered), *vectors)


def rms_manual(case: Case) -> Call:
    exact = row_exact(False, case)
    return lambda x, *vectors: exact(x.float(), *vectors).to(x.dtype)


def add_ours(norm: Call, case: Case) -> Call:
    return lambda x, *rest, **options: norm(x, rest[-1], case.shape[1:2], *rest[:-1], eps=case.eps, **options)


def add_composed(norm: Call) -> Call:
    def call(x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        total = x + rest[-1]
        return norm(total, *rest[:-1]), total

    return call


def tracked(case: Case, spread: float, norm: Call) -> Call:
    """`norm` of x, running mean and variance (or deviation), and the rest. The running statistics are those that x is drawn by, like the vectors."""
    running: list[Tensor] = []

    def call(x: Tensor, *rest: Tensor, **options: Any) -> Tensor:
        if not running:
            running.extend((x, *rest)[-1].detach().new_full(case.shape[1:2], value) for value in (case.mean, spread))
        return norm(x, *running, *rest, **options)

    return call


def _samples(case: Case) -> tuple[int, ...]:
    return 0, *_positions(case)


def batch(norm: Call, training: bool, case: Case) -> Call:
    return tracked(case, case.std**2, partial(norm, training=training, eps=case.eps))


def batch_exact(case: Case, frozen: bool) -> Call:
    return lambda x, *vectors: _affine(_x_hat(x, _samples(case), case.eps, frozen), *vectors)


def eval_exact(case: Case, frozen: bool) -> Call:
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


def renorm_ours(case: Case) -> Call:
    norm = partial(normops.batch_renorm, training=True, momentum=0.0, eps=case.eps, r_max=R_MAX, d_max=D_MAX)
    return tracked(case, case.std, norm)


def renorm_eager(case: Case) -> Call:
    def norm(x: Tensor, running_mean: Tensor, running_std: Tensor, *vectors: Tensor) -> Tensor:
        mean, std = _moments(case, x)
        corrections = _corrections(mean, std, running_mean, running_std)
        _update(running_mean, mean)
        _update(running_std, std)
        return _affine(_affine((x - _column(mean, x)) / _column(std, x), *corrections), *vectors)

    return tracked(case, case.std, norm)


def renorm_manual(case: Case) -> Call:
    def norm(x: Tensor, running_mean: Tensor, running_std: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with torch.no_grad():
            mean, std = _moments(case, x)
            r, d = _corrections(mean, std, running_mean, running_std)
            _update(running_mean, mean)
            _update(running_std, std)
        return F.batch_norm(x, None, None, weight * r, torch.addcmul(bias, weight, d), training=True, eps=case.eps)

    return tracked(case, case.std, norm)


def renorm_exact(case: Case, frozen: bool) -> Call:
    def call(x: Tensor, *vectors: Tensor) -> Tensor:
        corrections = _corrections(*_moments(case, x), case.mean, case.std)
        return _affine(_affine(_x_hat(x, _samples(case), case.eps, frozen), *corrections), *vectors)

    return call


def blend_ours(case: Case) -> Call:
    def norm(x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor, bias: Tensor, rho: Tensor, **options: Any) -> Tensor:
        return normops.batch_instance_norm(x, running_mean, running_var, rho, weight, bias, training=True, eps=case.eps, **options)

    return tracked(case, case.std**2, norm)


def blend_eager(case: Case) -> Call:
    def norm(x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor, bias: Tensor, rho: Tensor) -> Tensor:
        by_batch = F.batch_norm(x, running_mean, running_var, training=True, eps=case.eps)
        return _affine(_affine(by_batch, rho) + _affine(F.instance_norm(x, eps=case.eps), 1 - rho), weight, bias)

    return tracked(case, case.std**2, norm)


def blend_manual(case: Case) -> Call:
    def norm(x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor, bias: Tensor, rho: Tensor) -> Tensor:
        by_batch = F.batch_norm(x, running_mean, running_var, weight * rho, bias, training=True, eps=case.eps)
        return by_batch + F.instance_norm(x, weight=weight * (1 - rho), eps=case.eps)

    return tracked(case, case.std**2, norm)


def blend_exact(case: Case, frozen: bool) -> Call:
    def call(x: Tensor, weight: Tensor, bias: Tensor, rho: Tensor) -> Tensor:
        by_batch, by_instance = (_x_hat(x, dims, case.eps, frozen) for dims in (_samples(case), _positions(case)))
        return _affine(_affine(by_batch, rho) + _affine(by_instance, 1 - rho), weight, bias)

    return call


def analytic_ours(case: Case) -> Call:
    return lambda x, *vectors, **options: normops.analytic_norm(x, *vectors, eps=case.eps, **options)


def analytic_eager(case: Case, frozen: bool = False) -> Call:
    def call(x: Tensor, mean: Tensor, var: Tensor, *vectors: Tensor) -> Tensor:
        return _affine((x - _column(mean, x)) * _column(torch.rsqrt(var + case.eps), x), *vectors)

    return call


def analytic_manual(case: Case) -> Call:
    def call(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        scale = weight * torch.rsqrt(var + case.eps)
        return _affine(x, scale, bias - mean * scale)

    return call


def weight_ours(case: Case) -> Call:
    """What layers use of the four results."""
    return lambda weight, *vectors: normops.analytic_norm_weight(weight, *vectors, groups=case.groups or 1, eps=case.eps)[:2]


def weight_eager(case: Case, frozen: bool = False) -> Call:
    groups = case.groups or 1

    def call(weight: Tensor, mean: Tensor, var: Tensor, scale: Tensor, bias: Tensor) -> Pair:
        rows = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        mean, var = (value.to(weight.dtype).view(groups, -1) for value in (mean, var))
        m, q = torch.einsum("goik,gi->go", rows, mean).flatten(), torch.einsum("goik,gi->go", rows.square(), var).flatten()
        factor = scale * torch.rsqrt(q + case.eps)
        return (weight * factor.view(-1, *(1,) * (weight.dim() - 1))).to(weight.dtype), (bias - m * factor).to(weight.dtype)

    return call


def moments_ours(case: Case) -> Call:
    return lambda mean, var: normops.activation_moments(mean, var, case.act)


def moments_eager(case: Case) -> Call | None:
    """The rectifier's, as it is found in papers; nothing for what has no closed form."""

    def rectified(mean: Tensor, var: Tensor) -> Pair:
        std = var.sqrt()
        a = mean / std
        density, distribution = torch.exp(-0.5 * a * a) / math.sqrt(2 * math.pi), torch.special.ndtr(a)
        m = mean * distribution + std * density
        return m, (mean.square() + var) * distribution + mean * std * density - m.square()

    return rectified if case.act == "relu" else None


def moments_exact(case: Case, frozen: bool) -> Call:
    return lambda mean, var: maps.moments(case.act, mean, var)[:2]
