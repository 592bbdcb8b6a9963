"""Modules with statistics of a sample or of a position: group, instance, layer and RMS norm."""

import warnings
from typing import Any

import torch
from torch import Tensor

from normops import functional


class Fused(torch.nn.Module):
    """The fused activation of a module whose torch class follows in its bases."""

    activation = "none"  # of the class too, for modules that `convert` makes ours
    negative_slope = 0.01

    def __init__(self, *args, activation: str = "none", negative_slope: float = 0.01, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.activation = activation
        self.negative_slope = negative_slope

    def _options(self, residual: Tensor | None, scale: Tensor | None, shift: Tensor | None) -> dict:
        return {
            "activation": self.activation, "negative_slope": self.negative_slope, "residual": residual, "scale": scale, "shift": shift,
        }  # fmt: skip

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.activation != "none":
            text += f", activation={self.activation!r}"
        if self.activation == "leaky_relu":
            text += f", negative_slope={self.negative_slope}"
        return text


class GroupNorm(Fused, torch.nn.GroupNorm):
    """``torch.nn.GroupNorm`` by :func:`normops.group_norm`."""

    def forward(self, input: Tensor, *, residual: Tensor | None = None, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        options = self._options(residual, scale, shift)
        return functional.group_norm(input, self.num_groups, self.weight, self.bias, self.eps, **options)


class _InstanceNorm(Fused, torch.nn.modules.instancenorm._InstanceNorm):
    def forward(self, input: Tensor, *, residual: Tensor | None = None, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        self._check_input_dim(input)
        single = input.dim() == self._get_no_batch_dim()  # (C, *spatial)
        if single:
            input = input.unsqueeze(0)
            residual, scale, shift = (value if value is None else value.unsqueeze(0) for value in (residual, scale, shift))
        if input.shape[1] != self.num_features:
            message = f"{type(self).__name__}: expected input of {self.num_features} channels, got {tuple(input.shape)}"
            if self.affine or self.track_running_stats:
                raise ValueError(message)
            warnings.warn(message, stacklevel=2)  # as torch, where the number is not used
        y = functional.instance_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.training or not self.track_running_stats,
            0.0 if self.momentum is None else self.momentum, self.eps, **self._options(residual, scale, shift),
        )  # fmt: skip
        return y.squeeze(0) if single else y


class InstanceNorm1d(_InstanceNorm, torch.nn.InstanceNorm1d):
    """``torch.nn.InstanceNorm1d`` of ``(N, C, L)`` or ``(C, L)`` by :func:`normops.instance_norm`."""


class InstanceNorm2d(_InstanceNorm, torch.nn.InstanceNorm2d):
    """``torch.nn.InstanceNorm2d`` of ``(N, C, H, W)`` or ``(C, H, W)`` by :func:`normops.instance_norm`."""


class InstanceNorm3d(_InstanceNorm, torch.nn.InstanceNorm3d):
    """``torch.nn.InstanceNorm3d`` of ``(N, C, D, H, W)`` or ``(C, D, H, W)`` by :func:`normops.instance_norm`."""


class AdaptiveInstanceNorm(Fused):
    """:func:`normops.adaptive_instance_norm` of content and style."""

    def __init__(self, eps: float = 1e-5, **kwargs) -> None:
        super().__init__(**kwargs)
        self.eps = eps

    def forward(self, content: Tensor, style: Tensor, *, residual: Tensor | None = None) -> Tensor:
        return functional.adaptive_instance_norm(
            content, style, self.eps, activation=self.activation, negative_slope=self.negative_slope, residual=residual
        )

    def extra_repr(self) -> str:
        return f"eps={self.eps}" + super().extra_repr()


class _RowNorm(Fused):
    """What layer norm and RMS norm add: `weight_offset`, the dimension, and the sum with an `addend` before it."""

    dim: int | None = None
    weight_offset = 0.0

    def __init__(self, *args, weight_offset: float = 0.0, **kwargs) -> None:
        self.weight_offset = weight_offset  # reset_parameters, called by the next line, needs it
        super().__init__(*args, **kwargs)

    def reset_parameters(self) -> None:
        super().reset_parameters()  # type: ignore[misc]  # torch's, next in the bases
        if isinstance(self.weight, Tensor):
            torch.nn.init.constant_(self.weight, 1 - self.weight_offset)

    def _call(self, norm, add_norm, parameters, input, addend, residual, scale, shift):
        options = self._options(residual, scale, shift) | {"weight_offset": self.weight_offset}
        if addend is None:
            return norm(input, self.normalized_shape, *parameters, dim=self.dim, **options)
        if self.dim is not None or options.pop("residual") is not None:
            raise ValueError(f"{type(self).__name__}: expected addend beside neither residual nor dim=1")
        return add_norm(input, addend, self.normalized_shape, *parameters, **options)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", weight_offset={self.weight_offset}" if self.weight_offset else "")


class LayerNorm(_RowNorm, torch.nn.LayerNorm):
    """``torch.nn.LayerNorm`` by :func:`normops.layer_norm`; called with an `addend`, by :func:`normops.add_layer_norm`: it returns a pair."""

    def forward(
        self, input: Tensor, *, addend: Tensor | None = None, residual: Tensor | None = None, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Any:
        parameters = self.weight, self.bias, self.eps
        return self._call(functional.layer_norm, functional.add_layer_norm, parameters, input, addend, residual, scale, shift)


class RMSNorm(_RowNorm, torch.nn.RMSNorm):
    """``torch.nn.RMSNorm`` by :func:`normops.rms_norm`; called with an `addend`, by :func:`normops.add_rms_norm`: it returns a pair."""

    def forward(
        self, input: Tensor, *, addend: Tensor | None = None, residual: Tensor | None = None, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Any:
        parameters = self.weight, self.eps
        return self._call(functional.rms_norm, functional.add_rms_norm, parameters, input, addend, residual, scale, shift)


class LayerNorm2d(LayerNorm):
    """`LayerNorm` over the channels of ``(N, C, *spatial)``, channels first or last: ConvNeXt's, of any rank."""

    dim = 1


class RMSNorm2d(RMSNorm):
    """`RMSNorm` over the channels of ``(N, C, *spatial)``, channels first or last."""

    dim = 1
