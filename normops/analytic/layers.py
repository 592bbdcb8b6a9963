"""Layers that normalize by propagated statistics; `analytic.normalize` makes them of torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normops import statistics, weights
from normops.analytic.moments import Moments, apply, closure
from normops.analytic.rules import linear
from normops.analytic.rules.shapes import along, expect_channels, shape_after
from normops.autograd import plain, recomputing

_apply = torch.compiler.disable(apply)  # where a layer is compiled by itself


class Analytic(torch.nn.Module):
    """What an analytic-normalized layer adds to torch's: `scale` (O,), the standard deviation of its output, as `bias` is its mean::

        weight' = weight * scale/sqrt(q + eps)        bias' = bias - m * scale/sqrt(q + eps)

    m and q are mean and variance of the output without bias, as the sweep before each call of the model finds them from the statistics that reach
    the layer; at every place where it is called, in the order of calls. It hands on mean `bias` and variance ``scale^2``.
    """

    weight: Any
    bias: Any
    scale: torch.nn.Parameter
    eps: float
    _layer: Callable[..., Tensor]
    _normalize: Callable[[Moments], tuple[Tensor, Tensor, torch.Size]]  # weight', bias', the shape of an output

    def forward(self, input: Any, *args: Any) -> Any:
        """Of a tensor: the layer with the weight of the last sweep. Of `Moments`: a step of the sweep."""
        if isinstance(input, Moments):
            return (_apply if torch.compiler.is_compiling() else apply)(self.sweep, input)
        return self._layer(input, *self._effective(), *args)

    def _effective(self) -> tuple[Tensor, Tensor]:
        found: list[tuple[Tensor, Tensor]] = self.__dict__.get("effective", [])
        if not found:
            raise RuntimeError(f"{type(self).__name__}: expected to be called inside the model that analytic.normalize was given")
        if len(found) == 1:
            return found[0]
        if recomputing():
            raise NotImplementedError(f"{type(self).__name__}: expected one call of a checkpointed layer, got {len(found)}")
        site = self.__dict__.get("site", 0)
        self.__dict__["site"] = (site + 1) % len(found)
        return found[site]

    def sweep(self, x: Moments) -> Moments:
        """Find the weight and bias of the next call; the moments of its output."""
        weight, bias, shape = self._normalize(x)
        self.__dict__.setdefault("effective", []).append((weight, bias))
        mean, std = (along(value.double(), len(shape), output_dim(self)) for value in (self.bias, self.scale))
        return Moments(mean, std.square(), shape)

    def _fused(self, x: Moments, groups: int) -> tuple[Tensor, Tensor]:
        """From one mean and variance for each input."""
        direct = plain(self.weight, x.mu, x.var, self.scale, self.bias)
        weight, bias, _ = statistics.norm_weight(direct, self.weight, x.mu, x.var, self.scale, self.bias, groups, self.eps)
        return weight, bias

    def _by_output(self, output: Moments, groups: int, transposed: bool) -> tuple[Tensor, Tensor]:
        """From the moments of the layer's output without bias, however they came about."""
        own = output.channels(output_dim(self))
        m, q = own.mu.flatten(), own.var.flatten()
        return weights.normalized(self.weight, m, q, self.scale, self.bias, groups, self.eps, transposed)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name not in ("effective", "site")}  # graphs cannot be copied

    def extra_repr(self) -> str:
        return super().extra_repr() + ", analytic norm"


def output_dim(layer: torch.nn.Module) -> int:
    """Where the outputs of a layer lie in a sample."""
    return -1 if isinstance(layer, torch.nn.Linear) else 0


class Linear(Analytic, torch.nn.Linear):
    """``torch.nn.Linear``, of inputs ``(*, I)``; the statistics of several positions are taken together."""

    def _layer(self, input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(input, weight, bias)

    def _normalize(self, x: Moments):
        expect_channels("linear", x, self.in_features, -1)
        shape = torch.Size((*x.sample[:-1], self.out_features))
        if all(size == 1 for size in (*x.mu.shape[:-1], *x.var.shape[:-1])):
            return *self._fused(x.channels(-1), 1), shape
        mean, var = linear.mapped(x, self.weight.double())
        return *self._by_output(Moments(mean, var, shape), 1, False), shape


class _Convolution(Analytic):
    _function: Callable[..., Tensor]

    def _layer(self: Any, input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self._conv_forward(input, weight, bias)

    def _normalize(self: Any, x: Any):
        padding = self.padding
        expect_channels("convolution", x, self.in_channels)
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        options = self.stride, padding, self.dilation, self.groups
        shape = shape_after(self._function, x, self.weight, None, *options)
        if x.patch is None and x.uniform and closure().padding == "ignore":
            return *self._fused(x.channels(), self.groups), shape
        mean, var = linear.convolved(self._function, x, self.weight.double(), *options)
        return *self._by_output(Moments(mean, var, mean.shape), self.groups, False), shape


class Conv1d(_Convolution, torch.nn.Conv1d):
    """``torch.nn.Conv1d``."""

    _function = staticmethod(F.conv1d)


class Conv2d(_Convolution, torch.nn.Conv2d):
    """``torch.nn.Conv2d``."""

    _function = staticmethod(F.conv2d)


class Conv3d(_Convolution, torch.nn.Conv3d):
    """``torch.nn.Conv3d``."""

    _function = staticmethod(F.conv3d)


class _Transposed(Analytic):
    _function: Callable[..., Tensor]

    def _layer(self: Any, input: Tensor, weight: Tensor, bias: Tensor, output_size: Any = None) -> Tensor:
        spatial = weight.dim() - 2
        output_padding = self._output_padding(input, output_size, self.stride, self.padding, self.kernel_size, spatial, self.dilation)
        return self._function(input, weight, bias, self.stride, self.padding, output_padding, self.groups, self.dilation)

    def _normalize(self: Any, x: Moments):
        expect_channels("transposed convolution", x, self.in_channels)
        options = self.stride, self.padding, self.output_padding, self.groups, self.dilation
        shape = shape_after(self._function, x, self.weight, None, *options)
        mean, var = linear.transposed(self._function, x, self.weight.double(), *options)
        return *self._by_output(Moments(mean, var, mean.shape), self.groups, True), shape


class ConvTranspose1d(_Transposed, torch.nn.ConvTranspose1d):
    """``torch.nn.ConvTranspose1d``."""

    _function = staticmethod(F.conv_transpose1d)


class ConvTranspose2d(_Transposed, torch.nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d``."""

    _function = staticmethod(F.conv_transpose2d)


class ConvTranspose3d(_Transposed, torch.nn.ConvTranspose3d):
    """``torch.nn.ConvTranspose3d``."""

    _function = staticmethod(F.conv_transpose3d)


ANALYTIC: dict[type, type] = {
    getattr(torch.nn, ours.__name__): ours for ours in (Linear, Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d)
}
