"""Programs of one launch that wait for each other: all of them must be resident, so they are launched cooperatively and are few enough.

A team's counter is one int32, 0 or -2^31 between meetings: P - 1 programs add 1 and the first adds 2^31 - (P - 1), which flips the top bit as
the last one arrives and leaves the others 0. So nobody has to reset it, whatever P the next launch has.

Why nothing is read too early or too late:
    written before a meeting, read after it    every thread's stores come before the barrier of its program, that before the addition with release
            semantics, that before the poll with acquire semantics which sees the last of them, that before the second barrier, that before loads
    met twice in a row    a program that is early in the next meeting adds to the low bits alone: without the one that still waits in this one the
            top bit cannot flip back, however many others are early
    partials    each set of tiles has its own place in the workspace, so that nobody overwrites what a slower program still reads
    other launches    a stream runs one launch after the other, and the counters of a workspace belong to one stream and not to a graph's
"""

import triton
import triton.language as tl


@triton.jit
def meet(counter_ptr, member, P):
    """Return once all P programs of the team have called this; what they stored before, all of them see after it. `member` is this one's number."""
    tl.debug_barrier()
    before = tl.atomic_add(counter_ptr, tl.where(member == 0, 2147483647 - (P - 2), 1), sem="release", scope="gpu")
    now = before
    while (before ^ now) >= 0:
        now = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()
