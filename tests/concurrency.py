"""Triton's interpreter runs the programs of a launch one after the other: one that waits for another waits forever. Here they run at the same time.

    with concurrently(seed):
        group_norm.forward(...)  # all launches in here, whether or not their programs wait for each other; the innermost seed counts

Each program is a thread, of which one runs at a time. Before every load, store and atomic operation it hands over to one that is drawn at random;
the seed fixes the order, and makes some programs up to 32 times slower than others. A launch ends with an error that names it upon
    deadlock    since memory changed, each program that is not done has looked PATIENCE times at one place, by atomic operations or volatile loads
    race        a program touches what another one touched, one of them wrote (or was atomic, the other not), and no release and acquire order them:
                vector clocks tell, so it need not go wrong to be seen
    exception   of a program; the others end too
Not seen: the threads of a program, which are one here, and their barriers; how many programs are resident, which are all here; whether the compiler
keeps the order of the operations, which `test_triton_meeting.py` reads in the machine code.
"""

import collections
import contextlib
import functools
import inspect
import random
import threading
from unittest import mock

import numpy as np
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor

PATIENCE = 5
CONFLICTS = {"reads": ("writes", "updates"), "writes": ("reads", "writes", "updates"), "updates": ("reads", "writes")}
MEMORY = ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas")
builder = interpreter.interpreter_builder


@contextlib.contextmanager
def concurrently(seed=0):
    chance = random.Random(seed)
    with mock.patch.object(interpreter, "GridExecutor", lambda kernel, *rest: GridExecutor(_Launch(kernel, chance), *rest)):
        yield


class _Ended(BaseException):
    """Ends the other programs of a launch that fails. Not an Exception: the interpreter wraps those."""


class _Launch:
    """Stands in for the kernel: Triton calls it once for each program, and the last call runs them all."""

    def __init__(self, kernel, chance):
        functools.update_wrapper(self, kernel)
        self.__globals__, self.__signature__ = kernel.__globals__, inspect.signature(kernel)
        self.kernel, self.chance = kernel, chance
        self.indices, self.alive, self.error = [], [], None
        self.looks, self.waiting = collections.Counter(), set()
        self.touched, self.released = {}, {}
        self.real = {name: getattr(builder, name) for name in MEMORY}

    def __call__(self, **arguments):
        self.indices.append(builder.grid_idx)
        P = len(self.indices)
        if P < np.prod(builder.grid_dim):
            return
        self.alive = list(range(P))
        self.speeds = [2.0 ** -self.chance.randrange(6) for _ in range(P)]
        self.clocks = np.eye(P, dtype=int)
        self.gates = [threading.Semaphore(0) for _ in range(P)]
        threads = [threading.Thread(target=self._program, args=(program, arguments), daemon=True) for program in range(P)]
        with mock.patch.multiple(builder, **{name: getattr(self, name) for name in MEMORY}):
            for thread in threads:
                thread.start()
            self._hand_over()
            for thread in threads:
                thread.join()
        if self.error is not None:
            raise self.error

    def _program(self, program, arguments):
        self.gates[program].acquire()
        try:
            if self.error is None:
                self.kernel(**arguments)
        except _Ended:
            pass
        except BaseException as error:
            self.error = error
        self.alive.remove(program)
        if self.alive:
            self._hand_over()

    def _hand_over(self):
        ready = [program for program in self.alive if program not in self.waiting]
        if not ready and self.error is None:
            self.error = RuntimeError(f"deadlock in {self.__name__}: {len(self.alive)} of {len(self.indices)} programs wait, the others are done")
        ready = ready or self.alive
        self.running = self.chance.choices(ready, [self.speeds[program] for program in ready])[0]
        builder.grid_idx = self.indices[self.running]
        self.gates[self.running].release()

    def _touch(self, way, pointers, mask):
        """The others' turn, then this program reads, writes or updates."""
        program = self.running
        self._hand_over()
        self.gates[program].acquire()
        if self.error is not None:
            raise _Ended
        clock = self.clocks[program]
        for place in pointers[mask.astype(bool)].tolist():  # 3.6 has masks of int32
            for conflict in CONFLICTS[way]:
                for other, time in self.touched.get((place, conflict), {}).items():
                    if clock[other] < time:
                        raise RuntimeError(f"race in {self.__name__}: program {program} {way} what program {other} {conflict} in no order")
            self.touched.setdefault((place, way), {})[program] = clock[program]

    def _note(self, place, changed):
        if changed:
            self.looks.clear()
            self.waiting.clear()
        else:
            self.looks[self.running, place] += 1
            if self.looks[self.running, place] == PATIENCE:
                self.waiting.add(self.running)

    def create_masked_load(self, pointers, mask, *rest):
        self._touch("reads", pointers.data, mask.data)
        if rest[-1]:
            self._note(pointers.data.tobytes(), False)
        return self.real["create_masked_load"](pointers, mask, *rest)

    def create_masked_store(self, pointers, value, mask, *rest):
        self._touch("writes", pointers.data, mask.data)
        self._note(None, True)
        return self.real["create_masked_store"](pointers, value, mask, *rest)

    def create_atomic_rmw(self, operation, pointers, value, mask, sem, scope):
        return self._update("create_atomic_rmw", (operation, pointers, value, mask, sem, scope), pointers.data, mask.data, value.data.dtype, sem.name)

    def create_atomic_cas(self, pointers, compared, value, sem, scope):
        everywhere = np.ones_like(pointers.data, bool)
        return self._update("create_atomic_cas", (pointers, compared, value, sem, scope), pointers.data, everywhere, value.data.dtype, sem.name)

    def _update(self, name, arguments, pointers, mask, dtype, sem):
        self._touch("updates", pointers, mask)
        before, result, after = self._load(pointers, mask, dtype), self.real[name](*arguments), self._load(pointers, mask, dtype)
        self._note(pointers.tobytes(), (before != after).any())
        clock = self.clocks[self.running]
        for place in pointers[mask.astype(bool)].tolist():
            released = self.released.setdefault(place, np.zeros_like(clock))
            if "ACQUIRE" in sem:
                np.maximum(clock, released, out=clock)
            if "RELEASE" in sem:
                np.maximum(clock, released, out=released)
        clock[self.running] += 1
        return result

    @staticmethod
    def _load(pointers, mask, dtype):
        return interpreter._interpreter.load(pointers, mask, np.zeros_like(pointers, dtype), dtype)
