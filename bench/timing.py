"""Timers. All times are seconds per call.

``timer.sampler(run)`` warms ``run`` up and gives a function that takes one sample. ``interleave`` draws one sample of every
method per round, in another order each round, so that a machine that slows down slows all of them.
"""

import gc
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat

import torch

SAMPLE = 5e-4  # seconds: quick calls are repeated until one sample takes that long
MIN_ROUNDS, MAX_ROUNDS = 5, 100
MIN_ROUNDS_SLOW, SLOW = 3, 0.5  # rounds that take more than SLOW seconds are few


@dataclass(frozen=True)
class Times:
    """Median and the 20 % and 80 % quantiles, in seconds."""

    median: float
    low: float
    high: float


class Wall:
    """The host's clock: for CPU tensors (warm caches, every call allocates its result) and for what a GPU's launches cost the host."""

    name = "wall"

    def sampler(self, run: Callable[[], object]) -> Callable[[], float]:
        run()
        start = time.perf_counter()
        run()
        repetitions = min(max(1, math.ceil(SAMPLE / (time.perf_counter() - start))), 1000)

        def sample() -> float:
            start = time.perf_counter()
            for _ in repeat(None, repetitions):
                run()
            return (time.perf_counter() - start) / repetitions

        return sample


class Events:
    """CUDA events around one call; the L2 cache holds none of its data. Includes what the host cannot launch ahead."""

    name = "events"

    def __init__(self) -> None:
        size = torch.cuda.get_device_properties().L2_cache_size
        self.flush = torch.zeros(max(2 * size, 2**26) // 4, dtype=torch.int32, device="cuda")

    def sampler(self, run: Callable[[], object]) -> Callable[[], float]:
        for _ in range(3):
            run()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def sample() -> float:
            self.flush.sum()  # reading leaves clean lines; zeroing would leave dirty ones, whose write-back the call pays for
            start.record()
            run()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3

        return sample


class Graph(Events):
    """As Events, but around the replay of a CUDA graph of the call: the device's time alone. Nobody reads what replays leave, so that all graphs
    of one timer share their memory, which would add up to more than a GPU has."""

    name = "graph"

    def __init__(self) -> None:
        super().__init__()
        self.pool = torch.cuda.graph_pool_handle()

    def sampler(self, run: Callable[[], object]) -> Callable[[], float]:
        for _ in range(3):
            run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self.pool, torch.cuda.current_stream()):  # autograd runs a backward on the stream of its forward
            run()
        return super().sampler(graph.replay)


def timers(device: str) -> list[Wall | Events]:
    return [Wall()] if device == "cpu" else [Events(), Graph()]


def interleave(samplers: dict[str, Callable[[], float]], budget: float) -> dict[str, Times]:
    """Times of every method, from as many rounds as fit into `budget` seconds."""
    start = time.perf_counter()
    for sample in samplers.values():
        sample()
    cost = time.perf_counter() - start
    rounds = min(max(int(budget / cost), MIN_ROUNDS if cost < SLOW else MIN_ROUNDS_SLOW), MAX_ROUNDS)
    names, shuffle = list(samplers), random.Random(0).shuffle
    samples: dict[str, list[float]] = {name: [] for name in names}
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle(names)  # nobody always follows the same neighbour
            for name in names:
                samples[name].append(samplers[name]())
    finally:
        gc.enable()
    return {name: summary(values) for name, values in samples.items()}


def summary(values: list[float]) -> Times:
    low, median, high = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return Times(median, low, high)
