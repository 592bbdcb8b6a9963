"""Means and variances of a training set's inputs, in one pass over a data loader."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from normops.analytic.moments import Moments

KINDS = ("channel", "position", "patch")


class Stream:
    """Mean and (co)variance of rows that come in batches, by the formulas of Chan et al. 1983."""

    def __init__(self, covariance: bool) -> None:
        self.covariance, self.count = covariance, 0
        self.mean: Any = 0.0
        self.squares: Any = 0.0

    def add(self, rows: Tensor) -> None:
        count = len(rows)
        center = rows.mean(0)
        rows = rows - center
        squares = rows.T @ rows if self.covariance else rows.square().sum(0)
        delta, total = center - self.mean, self.count + count
        between = torch.outer(delta, delta) if self.covariance else delta.square()
        self.squares = self.squares + squares + between * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total

    def variance(self) -> Tensor:
        return self.squares / self.count


def input_moments(
    loader: Iterable, kind: str = "channel", *, kernel_size: int | tuple[int, ...] | None = None, stride: int | tuple[int, ...] = 1,
    dilation: int | tuple[int, ...] = 1, progress: bool = True,
) -> Moments:  # fmt: skip
    """Mean and variance of the inputs that a data loader gives, batches ``(N, C, *spatial)`` or the first of each tuple; in float64.

    kind: "channel" of all positions together, "position" of every unit, or "patch": of channels, and beside them mean and covariance of what a
    kernel of the first convolution sees (`kernel_size`, `stride`, `dilation` as of that layer, which then knows its variance exactly but for
    the border; its groups must be 1). progress: a bar, where tqdm is installed.
    """
    if kind not in KINDS:
        raise ValueError(f"input_moments: expected kind out of {', '.join(KINDS)}, got {kind!r}")
    if kind == "patch" and kernel_size is None:
        raise ValueError("input_moments: expected kernel_size for patches, got None")
    units, patches = Stream(False), Stream(True)
    shape = None
    for batch in shown(loader, progress):
        x = first(batch).detach().double()
        if x.dim() < 2:
            raise ValueError(f"input_moments: expected batches of shape (N, C, *spatial), got {tuple(x.shape)}")
        if shape is not None and x.shape[1:] != shape:
            raise ValueError(f"input_moments: expected batches of samples of shape {tuple(shape)}, got {tuple(x.shape[1:])}")
        shape = x.shape[1:]
        if not len(x):
            continue
        units.add(x.flatten(1) if kind == "position" or x.dim() == 2 else x.movedim(1, -1).flatten(0, -2))
        if kind == "patch":
            patches.add(_patches(x, kernel_size, stride, dilation))
    if shape is None or not units.count:
        raise ValueError("input_moments: expected at least one sample, got none")
    mean, var = units.mean, units.variance()
    if kind == "position":
        mean, var = mean.view(shape), var.view(shape)
    patch = (patches.mean, patches.variance()) if kind == "patch" else None
    return Moments(mean, var, shape, patch=patch).check()


def first(batch: Any) -> Tensor:
    """The input of a model, in what a data loader gives."""
    x = batch[0] if isinstance(batch, list | tuple) else batch
    if not isinstance(x, Tensor):
        raise TypeError(f"input_moments: expected batches that are tensors, or tuples of which the first is one, got {type(x).__name__}")
    return x


def shown(loader: Iterable, progress: bool) -> Iterable:
    """With a bar, if it is wanted and tqdm is installed."""
    if progress:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            return loader
        return tqdm(loader, desc="input moments", leave=False)
    return loader


def _patches(x: Tensor, kernel_size: Any, stride: Any, dilation: Any) -> Tensor:
    """Rows of what a kernel sees, inside the border."""
    spatial = x.dim() - 2
    sizes, steps, gaps = ((value,) * spatial if isinstance(value, int) else tuple(value) for value in (kernel_size, stride, dilation))
    if {len(sizes), len(steps), len(gaps)} != {spatial} or any((k - 1) * gap >= n for k, gap, n in zip(sizes, gaps, x.shape[2:], strict=True)):
        raise ValueError(f"input_moments: expected a kernel that fits samples of shape {tuple(x.shape[1:])}, got {kernel_size}, dilation {dilation}")
    for dim, (size, step, gap) in enumerate(zip(sizes, steps, gaps, strict=True), 2):
        x = x.unfold(dim, (size - 1) * gap + 1, step)[..., ::gap]
    order = (0, *range(2, 2 + spatial), 1, *range(2 + spatial, 2 + 2 * spatial))
    return x.permute(order).reshape(-1, x.shape[1] * math.prod(sizes))
