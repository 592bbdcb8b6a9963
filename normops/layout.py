"""How tensors lie in memory: what the kernels read in place, and what is packed for them."""

from typing import Any

import torch
from torch import Tensor


def dense(x: Tensor) -> Tensor:
    """`x` itself when the kernels can read it in place, else packed once, channels last if its channels are contiguous."""
    if x.is_contiguous() or _order(x) is not None:
        return x
    if x.stride(1) != 1 or x.shape[1] == 1:
        return x.contiguous()
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _order(x: Tensor) -> bool | None:
    """True for (N, spatial, C) in memory, False for (N, C, spatial), None for neither; spatial dims in any order among themselves."""
    channels = x.shape[1]
    spatial = sorted(zip(x.stride()[2:], x.shape[2:], strict=True))
    for channels_last in (False, True):
        step = channels if channels_last else 1
        size = 1
        for stride, length in spatial:
            if length != 1 and stride != step * size:
                break
            size = size * length
        else:
            if (channels == 1 or x.stride(1) == (1 if channels_last else size)) and (x.shape[0] == 1 or x.stride(0) == channels * size):
                return channels_last
    return None


def dense_rows(x: Tensor, ndim: int) -> Tensor:
    """`dense` for rows over the last `ndim` dimensions, or over dimension 1."""
    return x.contiguous() if ndim else dense(x)


def like(value: Any, x: Tensor) -> Any:
    """`value` in x's memory order."""
    return value if value is None or value.stride() == x.stride() else torch.empty_like(x, dtype=value.dtype).copy_(value)


def packed(vectors: Tensor | None) -> Tensor | None:
    """`vectors` contiguous."""
    return vectors if vectors is None or vectors.is_contiguous() else vectors.contiguous()


def is_last(x: Tensor) -> bool:
    """Whether dense x is channels last and not contiguous too."""
    return not x.is_contiguous() and bool(_order(x))
