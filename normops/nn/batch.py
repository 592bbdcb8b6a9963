"""Modules with statistics over batches: batch norm, synchronized, renormalized, and batch-instance norm."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from normops import functional
from normops.autograd import recomputing
from normops.nn.norms import Fused


class _BatchNorm(Fused, torch.nn.modules.batchnorm._BatchNorm):
    """What torch's class does around the function; `frozen` (see `freeze_batch_norm`): the running statistics normalize in training too."""

    frozen = False
    on_single_value = "raise"

    def __init__(self, *args, on_single_value: str = "raise", **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.on_single_value = on_single_value

    def forward(self, input: Tensor, *, residual: Tensor | None = None, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        self._check_input_dim(input)
        training = self._uses_batch()
        single = self.on_single_value == "running" and input.numel() == input.shape[1]
        if self.training and self.track_running_stats and not (self.frozen or single or self.num_batches_tracked is None or recomputing()):
            self.num_batches_tracked.add_(1)
        tracked = not training or self.track_running_stats
        statistics = (self.running_mean, self.running_var) if tracked else (None, None)
        return self._call(input, *statistics, training, self._momentum() if training else 0.0, residual, scale, shift)

    def _uses_batch(self) -> bool:
        return (self.training and not self.frozen) or (self.running_mean is None and self.running_var is None)

    def _momentum(self) -> float:
        if self.momentum is not None:
            return self.momentum
        return 0.0 if self.num_batches_tracked is None else 1.0 / max(1.0, float(self.num_batches_tracked))  # the average of all batches

    def _call(self, input, running_mean, running_var, training, momentum, *conditions):
        return functional.batch_norm(
            input, running_mean, running_var, self.weight, self.bias, training, momentum, self.eps,
            on_single_value=self.on_single_value, **self._options(*conditions),
        )  # fmt: skip

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.on_single_value != "raise":
            text += f", on_single_value={self.on_single_value!r}"
        return text + (", frozen=True" if self.frozen else "")


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` of ``(N, C)`` or ``(N, C, L)`` by :func:`normops.batch_norm`."""


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` of ``(N, C, H, W)`` by :func:`normops.batch_norm`."""


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d`` of ``(N, C, D, H, W)`` by :func:`normops.batch_norm`."""


class SyncBatchNorm(_BatchNorm):
    """``torch.nn.SyncBatchNorm`` by :func:`normops.sync_batch_norm`: on CPUs too, on any ``torch.distributed`` backend, compiled in one graph.

    It is no subclass of torch's, which ``DistributedDataParallel`` refuses on CPUs.
    """

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True, track_running_stats: bool = True,
        process_group: Any = None, **kwargs,
    ) -> None:  # fmt: skip
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **kwargs)
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"SyncBatchNorm: expected input of shape (N, C, *spatial), got {tuple(input.shape)}")

    def _call(self, input, running_mean, running_var, training, momentum, *conditions):
        return functional.sync_batch_norm(
            input, running_mean, running_var, self.weight, self.bias, training, momentum, self.eps,
            process_group="" if self.process_group is None else self.process_group.group_name, on_single_value=self.on_single_value,
            **self._options(*conditions),
        )  # fmt: skip

    @classmethod
    def convert_sync_batchnorm(cls, module: torch.nn.Module, process_group: Any = None) -> torch.nn.Module:
        """Synchronize every batch norm of a model, torch's and ours: see :func:`normops.nn.convert_sync_batchnorm`."""
        from normops.nn.models import convert_sync_batchnorm

        return convert_sync_batchnorm(module, process_group)


class RenormSchedule:
    """The bounds r_max and d_max of batch renormalization by step: 1 and 0 (plain batch norm) up to step `start`, then straight up to `r_max` at
    step `r_end` and to `d_max` at step `d_end`. The defaults are the paper's. Any function of the step, a tensor, that returns two numbers or
    tensors of one element can stand in its place."""

    def __init__(self, start: int = 5000, r_max: float = 3.0, r_end: int = 40000, d_max: float = 5.0, d_end: int = 25000) -> None:
        if not (r_max >= 1 and d_max >= 0 and r_end > start and d_end > start):
            raise ValueError(f"RenormSchedule: expected r_max >= 1, d_max >= 0 and ends after {start}, got {r_max}, {d_max}, {r_end}, {d_end}")
        self.start, self.r_max, self.r_end, self.d_max, self.d_end = start, r_max, r_end, d_max, d_end

    def __call__(self, step: Tensor) -> tuple[Tensor, Tensor]:
        along = (step - self.start).double().clamp_min(0)
        r = 1 + (self.r_max - 1) * (along / (self.r_end - self.start)).clamp_max(1)
        return r, self.d_max * (along / (self.d_end - self.start)).clamp_max(1)

    def __repr__(self) -> str:
        return f"RenormSchedule(start={self.start}, r_max={self.r_max}, r_end={self.r_end}, d_max={self.d_max}, d_end={self.d_end})"


class BatchRenorm(Fused):
    """:func:`normops.batch_renorm` with r_max and d_max from a `schedule` of the number of batches seen.

    Buffers: running_mean, running_std (sqrt(var + eps)), num_batches_tracked.
    """

    frozen = False
    track_running_stats = True
    _check_input_dim: Callable[..., None]
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_std: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self, num_features: int, eps: float = 1e-3, momentum: float = 0.01, affine: bool = True, *,
        schedule: Callable[[Tensor], tuple[float | Tensor, float | Tensor]] | None = None, device=None, dtype=None, **kwargs,
    ) -> None:  # fmt: skip
        super().__init__(**kwargs)
        self.num_features, self.eps, self.momentum, self.affine = num_features, eps, momentum, affine
        self.schedule = RenormSchedule() if schedule is None else schedule
        for name, fill in (("weight", torch.ones), ("bias", torch.zeros)):
            self.register_parameter(name, torch.nn.Parameter(fill(num_features, device=device, dtype=dtype)) if affine else None)
        self.register_buffer("running_mean", torch.zeros(num_features, device=device, dtype=dtype))
        self.register_buffer("running_std", torch.ones(num_features, device=device, dtype=dtype))
        self.register_buffer("num_batches_tracked", torch.tensor(0, device=device))

    def forward(self, input: Tensor, *, residual: Tensor | None = None, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        self._check_input_dim(input)
        training = self.training and not self.frozen
        if training and not recomputing():
            self.num_batches_tracked.add_(1)
        r_max, d_max = self.schedule(self.num_batches_tracked) if training else (1.0, 0.0)
        return functional.batch_renorm(
            input, self.running_mean, self.running_std, self.weight, self.bias, training, self.momentum, self.eps,
            r_max=r_max, d_max=d_max, **self._options(residual, scale, shift),
        )  # fmt: skip

    def extra_repr(self) -> str:
        text = f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, schedule={self.schedule}"
        return text + super().extra_repr() + (", frozen=True" if self.frozen else "")


class BatchRenorm1d(BatchRenorm):
    """Batch renormalization of ``(N, C)`` or ``(N, C, L)``."""

    _check_input_dim = torch.nn.BatchNorm1d._check_input_dim


class BatchRenorm2d(BatchRenorm):
    """Batch renormalization of ``(N, C, H, W)``."""

    _check_input_dim = torch.nn.BatchNorm2d._check_input_dim


class BatchRenorm3d(BatchRenorm):
    """Batch renormalization of ``(N, C, D, H, W)``."""

    _check_input_dim = torch.nn.BatchNorm3d._check_input_dim


class BatchInstanceNorm(_BatchNorm):
    """:func:`normops.batch_instance_norm` with a parameter `rho` (C,) of ones, to be kept in [0, 1] by `clamp_rho_` after each step (see
    `clamp_after_step`) and trained ten times as fast, without weight decay (see `parameter_groups`)."""

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True, track_running_stats: bool = True,
        device=None, dtype=None, **kwargs,
    ) -> None:  # fmt: skip
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype, **kwargs)
        self.rho = torch.nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "rho"):  # not yet when torch's constructor calls this
            torch.nn.init.ones_(self.rho)

    @torch.no_grad()
    def clamp_rho_(self) -> None:
        """Project rho onto [0, 1], in place."""
        self.rho.clamp_(0, 1)

    def _call(self, input, running_mean, running_var, training, momentum, *conditions):
        return functional.batch_instance_norm(
            input, running_mean, running_var, self.rho, self.weight, self.bias, training, momentum, self.eps, **self._options(*conditions)
        )


class BatchInstanceNorm1d(BatchInstanceNorm, torch.nn.BatchNorm1d):
    """Batch-instance normalization of ``(N, C, L)``."""


class BatchInstanceNorm2d(BatchInstanceNorm, torch.nn.BatchNorm2d):
    """Batch-instance normalization of ``(N, C, H, W)``."""


class BatchInstanceNorm3d(BatchInstanceNorm, torch.nn.BatchNorm3d):
    """Batch-instance normalization of ``(N, C, D, H, W)``."""
