"""What the workers of synchronized batch norm tell each other: one collective forward, one backward, on any ``torch.distributed`` backend.

A process group goes by its name, an operator's argument; "" is the default group. Every worker calls both collectives, also one whose batch is
empty: it has nothing to add.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def workers(name: str) -> int:
    """How many processes a group has: 1 without ``torch.distributed``."""
    return dist.get_world_size(_group(name)) if dist.is_available() and dist.is_initialized() else 1


def _group(name: str) -> Any:
    resolve: Any = dist.distributed_c10d._resolve_process_group
    return resolve(name) if name else dist.group.WORLD


def _collective(op: str, value: Tensor, *args: Any, name: str) -> Tensor:
    """One of torch's functional collectives: where a graph holds them, compilers keep their order, which all workers must share."""
    functional: Any = torch.ops._c10d_functional
    return functional.wait_tensor(getattr(functional, op)(value, *args, _group(name).group_name))


def merged_statistics(stats: Tensor, count: int, eps: float, name: str) -> Tensor:
    """The statistics of all workers' values from this one's, computed with eps = 0, of `count` values per channel::

        total = sum count_i     mean = sum count_i*mean_i / total     var = (sum M2_i + count_i*(mean_i - mean)^2) / total

    (5, 1, C): mean, mean_lo, 1/sqrt(var + eps), unbiased variance, total. What is sent is float64: mean, M2 = var*count, and the count.
    """
    channels = stats.shape[-1]
    if count:
        mean, mean_lo, rstd = stats[:3].double().flatten(1)
        own = torch.cat((mean + mean_lo, count / rstd.square(), mean.new_full((1,), count)))
    else:
        own = stats.new_zeros(2 * channels + 1, dtype=torch.float64)
    every = _collective("all_gather_into_tensor", own, workers(name), name=name)
    means, m2, counts = every.view(-1, 2 * channels + 1).split((channels, channels, 1), 1)
    total = counts.sum()
    size = total.clamp_min(1)
    mean = (counts * means).sum(0) / size
    m2 = (m2 + counts * (means - mean).square()).sum(0)
    high = mean.to(stats.dtype)
    values = (high, mean - high, torch.rsqrt(m2 / size + eps), m2 / (size - 1).clamp_min(1), total.expand_as(mean))
    return torch.stack([value.to(stats.dtype) for value in values]).unsqueeze(1)


def summed(sums: Tensor, name: str) -> Tensor:
    """The sums over all workers, in float64."""
    return _collective("all_reduce", sums.double(), "sum", name=name)
