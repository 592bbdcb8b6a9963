"""The steps of a norm whose statistics belong to more than one program, and how programs wait for each other.

    WHOLE    a program has all it needs: one launch
    PARTS    statistics, or in backward sums, of tiles: partials, which are folded
    APPLY    the results of tiles, from what was folded
    MEET     PARTS, fold and APPLY in one launch: programs keep their tiles while they meet

All programs of a launch in which some wait must be resident, so it is cooperative, and they are few enough. A team's counter is one int32, 0 or
-2^31 between meetings: P - 1 programs add 1 and the first adds 2^31 - (P - 1), which flips the top bit as the last one arrives and leaves the
others 0. So nobody has to reset it, whatever P the next launch has. Why nothing is read too early or too late:
    written before a meeting, read after it    every thread's stores come before the barrier of its program, that before the addition with release
            semantics, that before the poll with acquire semantics which sees the last of them, that before the second barrier, that before loads
    met twice in a row    a program that is early in the next meeting adds to the low bits alone: without the one that still waits in this one the
            top bit cannot flip back, however many others are early
    partials    each set of tiles has its own place in the workspace, so that nobody overwrites what a slower program still reads
    other launches    a stream runs one launch after the other, and the counters of a workspace belong to one stream or to one graph
"""

import triton
import triton.language as tl

WHOLE, PARTS, APPLY, MEET = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
SPACING = tl.constexpr(32)  # counters are 128 bytes apart, so that teams do not wait for each other's additions


@triton.jit
def meet(counter_ptr, member, P):
    """Return once all P programs of the team have called this; what they stored before, all of them see after it. `member` is this one's number."""
    tl.debug_barrier()
    before = tl.atomic_add(counter_ptr, tl.where(member == 0, 2147483647 - (P - 2), 1), sem="release", scope="gpu")
    now = before
    while (before ^ now) >= 0:
        now = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@triton.jit
def number_tiles(tiles, STEP: tl.constexpr):
    """Begin, end and step of a program's loop over tiles: one, or where programs meet, one of each set that its team works on."""
    if STEP == MEET:
        return tl.program_id(0), tiles, tl.num_programs(0)
    else:
        return 0, 1, 1


@triton.jit
def number(i, tiles, STEP: tl.constexpr):
    """The number of the tile in round i of that loop."""
    if STEP == MEET:
        return i
    else:
        return tiles - 1 - tl.program_id(0) if STEP == APPLY else tl.program_id(0)
