"""What the families of kernels have in common for their derivatives: each call as ``(N, C, S)``, and the sums it needs."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from normops import distributed, launch, reference
from normops.layout import like


@dataclass
class Groups:
    """A call of ``group_norm_fwd``: one statistic for all positions of ``C/num_groups`` channels; `frozen`: it does not depend on x."""

    num_groups: int
    eps: float
    activation: str
    negative_slope: float
    out_dtype: torch.dtype | None
    frozen: bool

    weight_offset: ClassVar[float] = 0.0

    @property
    def sets(self) -> reference.Sets:
        return reference.Sets(self.num_groups)

    def backward(self, direct, dy, dtotal, x, stats, weight, bias, residual, mask):
        bwd = launch.group_norm_bwd if direct else torch.ops.normops.group_norm_bwd.default
        return bwd(dy, x, stats, weight, bias, residual, self.num_groups, self.frozen, self.activation, self.negative_slope, mask)

    def differentiable(self, x, stats, weight, bias, residual, out_dtype):
        given = stats if self.frozen else None
        return reference.group_norm(x, self.num_groups, weight, bias, self.eps, self.activation, self.negative_slope, residual, out_dtype, given)

    def view(self, x: Tensor) -> Tensor:
        return reference.positions(x)

    def spread(self, values: Tensor, channels: int) -> Tensor:
        """A value per group, to broadcast against ``(N, C, S)``."""
        return values.repeat_interleave(channels // self.num_groups, 1)

    def project(self, direct, value, x, x_hat, stats, want_dx=True):
        """``rstd*P(value)``, and the cells of ``value*x_hat`` and of ``value``."""
        ones = x.new_ones(x.shape[:2])
        linear = replace(self, activation="none")
        dx, first, second, _ = linear.backward(direct, value, None, x, stats, ones, ones, None, [want_dx, True, True, False])
        return dx, first.unsqueeze(2), second.unsqueeze(2)

    def cells(self, value: Tensor) -> Tensor:
        """Sums over what neither a statistic nor a parameter distinguishes: of each channel."""
        return value.sum(2, keepdim=True)

    def mean(self, cells: Tensor, x: Tensor) -> Tensor:
        """The means over each set, from cells."""
        samples, channels, positions = x.shape
        groups = cells.reshape(samples, self.num_groups, -1).sum(2, keepdim=True)
        return self.spread(groups / (channels // self.num_groups * positions), channels)


@dataclass
class Batch(Groups):
    """A call of ``batch_norm_fwd``: a statistic for each channel of all samples, of all workers of the process group of this name;
    the gradients of weight and bias are this worker's own."""

    group: str | None = None

    @property
    def sets(self) -> reference.Sets:
        return reference.Sets(self.num_groups, batch=True)

    def backward(self, direct, dy, dtotal, x, stats, weight, bias, residual, mask):
        options = self.activation, self.negative_slope
        if self.group is None or not mask[0]:
            bwd = launch.batch_norm_bwd if direct else torch.ops.normops.batch_norm_bwd.default
            return bwd(dy, x, stats, weight, bias, residual, *options, mask)
        of_group = launch.group_norm_bwd if direct else torch.ops.normops.group_norm_bwd.default
        call = like(dy, x), x, stats[:3], weight, bias, residual, self.num_groups
        dweight, dbias = launch.norm_sums(of_group, *call, *options)
        sums = torch.stack([value if weight is None else value * weight.to(value.dtype).view(-1, self.num_groups) for value in (dweight, dbias)])
        means = (distributed.summed(sums.sum(1), self.group) / stats[4].double().clamp_min(1)).to(stats.dtype).unsqueeze(1)
        dx, _, _, dresidual = of_group(*call, True, *options, (True, False, False, mask[3]), means)
        dweight, dbias = (
            reference.folded(value, vector).to(vector.dtype) if wanted and vector is not None else None
            for value, vector, wanted in ((dweight, weight, mask[1]), (dbias, bias, mask[2]))
        )
        return dx, dweight, dbias, dresidual

    def differentiable(self, x, stats, weight, bias, residual, out_dtype):
        if self.group is not None:
            raise NotImplementedError("sync_batch_norm: expected at most second derivatives, got a third")
        return reference.batch_norm(x, weight, bias, self.eps, self.activation, self.negative_slope, residual, out_dtype)

    def mean(self, cells: Tensor, x: Tensor) -> Tensor:
        samples, channels, positions = x.shape
        sums, count = cells.sum((0, 2)), samples * positions
        if self.group is not None:
            total = distributed.summed(torch.cat((sums, sums.new_full((1,), count))), self.group).to(cells.dtype)
            sums, count = total.split((channels, 1))
        return (sums / count).view(1, channels, 1)


@dataclass
class Rows:
    """A call of ``row_norm_fwd``: a statistic for the last `ndim` dimensions, or with 0 for dimension 1 of ``(N, C, *spatial)``."""

    ndim: int
    centered: bool
    weight_offset: float
    eps: float
    activation: str
    negative_slope: float
    out_dtype: torch.dtype | None

    frozen: ClassVar[bool] = False

    @property
    def sets(self) -> reference.Sets:
        return reference.Sets(1, True, self.centered)

    def backward(self, direct, dy, dtotal, x, stats, weight, bias, residual, mask):
        bwd = launch.row_norm_bwd if direct else torch.ops.normops.row_norm_bwd.default
        options = self.ndim, self.centered, self.weight_offset, self.activation, self.negative_slope, mask
        return bwd(dy, dtotal, x, stats, weight, bias, residual, *options)

    def differentiable(self, x, stats, weight, bias, residual, out_dtype):
        options = self.ndim, self.centered, self.weight_offset, self.eps, self.activation, self.negative_slope, out_dtype
        return reference.row_norm(x, weight, bias, residual, *options)

    def view(self, x: Tensor) -> Tensor:
        return x.reshape(-1, math.prod(x.shape[-self.ndim :]), 1) if self.ndim else x.reshape(*x.shape[:2], -1)

    def spread(self, values: Tensor, channels: int) -> Tensor:
        return values.transpose(2, 3).squeeze(1)

    def project(self, direct, value, x, x_hat, stats, want_dx=True):
        bare = replace(self, ndim=2 if self.ndim else 0, activation="none", weight_offset=0.0)  # of (N, C, 1) or (N, C, S)
        dx = bare.backward(direct, value, None, x, stats, None, None, None, [True, False, False, False])[0] if want_dx else None
        return dx, value * x_hat, value

    def cells(self, value: Tensor) -> Tensor:
        return value

    def mean(self, cells: Tensor, x: Tensor) -> Tensor:
        return cells.mean(1, keepdim=True)


Family = Groups | Batch | Rows
