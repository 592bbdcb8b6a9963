"""Drop-in modules: torch.nn's constructors, state_dicts and representations, plus what the kernels fuse."""

import torch
from torch import Tensor

from normops import functional


class GroupNorm(torch.nn.GroupNorm):
    """``torch.nn.GroupNorm`` with the activation, residual and modulation fused; see :func:`normops.group_norm`.

    Same constructor, parameters and state_dict as ``torch.nn.GroupNorm``, plus keywords `activation` and `negative_slope`. The call takes
    ``residual`` of the input's shape, and ``scale``, ``shift`` of shape (N, C)::

        GroupNorm(32, C, activation="silu")(x)  ==  F.silu(torch.nn.GroupNorm(32, C)(x))
    """

    def __init__(self, *args, activation: str = "none", negative_slope: float = 0.01, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.activation = activation
        self.negative_slope = negative_slope

    def forward(self, input: Tensor, *, residual: Tensor | None = None, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        return functional.group_norm(
            input, self.num_groups, self.weight, self.bias, self.eps,
            activation=self.activation, negative_slope=self.negative_slope, residual=residual, scale=scale, shift=shift,
        )  # fmt: skip

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.activation != "none":
            text += f", activation={self.activation!r}"
        if self.activation == "leaky_relu":
            text += f", negative_slope={self.negative_slope}"
        return text
