"""Real processes of a ``torch.distributed`` group (gloo, on this machine) that stay alive and run one test body after the other.

A test made by `on_workers` runs its body in every process; it fails where one of them fails, dies or takes too long. The processes are then
replaced, since the others may be waiting inside of a collective.
"""

import importlib
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from functools import wraps
from multiprocessing import connection

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

import normops

SIZE = 3
TIMEOUT = 120  # seconds that a collective waits: others may still compile
LIMIT = 600  # seconds that a test may take


def _serve(rank: int, size: int, store: str, pipe: connection.Connection) -> None:
    """Run what comes through the pipe; answer None, or how it failed."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT))
    while True:
        try:
            module, name, arguments = pipe.recv()
        except EOFError:
            os._exit(0)  # without waiting for the others
        torch.manual_seed(20240607)
        try:
            with normops.backend(arguments["backend"]) if "backend" in arguments else nullcontext():
                getattr(importlib.import_module(module), name).__wrapped__(**arguments)
            pipe.send(None)
        except BaseException:
            pipe.send(traceback.format_exc())


class Workers:
    def __init__(self, size: int = SIZE) -> None:
        self.folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(size):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, os.path.join(self.folder.name, "store"), theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)

    def run(self, test: Callable, arguments: dict) -> list[str | None]:
        """What every worker answers: None, how it failed, that it died, or that it did not answer."""
        for pipe in self.pipes:
            pipe.send((test.__module__, test.__name__, arguments))
        answers: list[str | None] = ["no answer"] * len(self.pipes)
        waiting, end = dict(zip(self.pipes, range(len(self.pipes)), strict=True)), time.monotonic() + LIMIT
        while waiting and (ready := connection.wait(list(waiting), max(0.0, end - time.monotonic()))):
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    answers[rank] = pipe.recv()
                except EOFError:
                    answers[rank] = "died"
        return answers

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self.folder.cleanup()


_workers: Workers | None = None


def close() -> None:
    global _workers
    if _workers is not None:
        _workers.close()
    _workers = None


def on_workers(test: Callable) -> Callable:
    """The test, whose body runs in every process of a group of `SIZE`."""

    @wraps(test)
    def run(**arguments):
        global _workers
        _workers = _workers or Workers()
        failures = [f"worker {rank}: {answer}" for rank, answer in enumerate(_workers.run(test, arguments)) if answer is not None]
        if failures:
            close()
            raise AssertionError("\n".join(failures))

    return run
