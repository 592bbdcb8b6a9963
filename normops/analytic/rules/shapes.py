"""What rules are declared with, and the shapes that torch functions make of others."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normops.analytic.moments import RULES, Moments


def rule(*names: str) -> Callable[[Callable], Callable]:
    """Declare the rule of torch functions and methods of these names."""

    def decorate(function: Callable) -> Callable:
        for name in names:
            RULES[name] = function
        return function

    return decorate


def along(vector: Tensor, rank: int, dim: int = 0) -> Tensor:
    """A vector as it lies along a dimension of tensors of this rank."""
    shape = [1] * rank
    shape[dim] = -1
    return vector.view(shape)


def expect_channels(name: str, x: Moments, channels: int, dim: int = 0) -> None:
    """Refuse samples that a layer does not fit."""
    if not x.sample or x.sample[dim] != channels:
        kind = "channels" if dim == 0 else "features"
        raise ValueError(f"propagate: expected {channels} {kind} in {name}, got a sample of shape {tuple(x.sample)}")


def shape_after(function: Callable, x: Moments, *args: Any, **kwargs: Any) -> torch.Size:
    """The shape of a sample after a torch function of x; tensors among the arguments count by their shape."""
    return _shape_after(function, x.sample, tuple(map(_hashable, args)), tuple((name, _hashable(value)) for name, value in kwargs.items()))


def _hashable(value: Any) -> Any:
    return _OfShape(value.shape) if isinstance(value, Tensor) else tuple(value) if isinstance(value, list) else value


class _OfShape(NamedTuple):
    shape: torch.Size


@lru_cache(maxsize=4096)
def _shape_after(function: Callable, shape: torch.Size, args: tuple, kwargs: tuple) -> torch.Size:
    tensors = [torch.empty(value.shape, device="meta") if isinstance(value, _OfShape) else value for value in args]
    try:
        return function(torch.empty((1, *shape), device="meta"), *tensors, **dict(kwargs)).shape[1:]
    except RuntimeError as error:
        name = getattr(function, "__name__", str(function))
        raise ValueError(f"propagate: expected a sample that {name} takes, got one of shape {tuple(shape)} ({str(error).splitlines()[0]})") from None
