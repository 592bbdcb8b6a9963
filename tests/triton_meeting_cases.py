"""Programs that wait for each other, in Triton's interpreter; `test_triton_interpret.py` runs this file in a process of its own.

First the meeting of `kernels/exchange.py` alone, also that what is wrong with one is seen; then the norms whose programs meet, by the measure of
`triton_cases.py` and its like.
"""

import math
import random
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
import triton_batch_cases
import triton_cases
from concurrency import concurrently
from normops.kernels import batch_norm, group_norm
from normops.kernels.config import Config, Device
from normops.kernels.exchange import meet
from triton_cases import poisoned

__all__ = ["poisoned"]  # a fixture


@triton.jit
def exchange(counter_ptr, work_ptr, total_ptr, P, ROUNDS, PLACES, MEET: tl.constexpr, BLOCK: tl.constexpr):
    """Teams of P programs: in each round each one stores a number, meets the others, and adds up what all of them stored."""
    team, member, p = tl.program_id(0) // P, tl.program_id(0) % P, tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    for i in range(ROUNDS):
        work = work_ptr + (team * PLACES + i % PLACES) * P
        tl.store(work + member, (i + 1) * (member + 1))
        MEET(counter_ptr + team, member, P)
        total += tl.load(work + p, p < P, 0)
    tl.store(total_ptr + tl.program_id(0) * BLOCK + p, total)


def run(seed, P, meeting=meet, teams=2, rounds=3, places=3, programs=None, counters=None):
    """The counters after one launch; what each program read is compared to what was stored."""
    counters = torch.zeros(teams, dtype=torch.int32) if counters is None else counters
    total, work = torch.full((teams * P, 16), -1, dtype=torch.int32), torch.full((teams, places, P), -1, dtype=torch.int32)
    with concurrently(seed):
        exchange[(programs or teams * P,)](counters, work, total, P, rounds, places, meeting, 16)
    expected = rounds * (rounds + 1) // 2 * torch.arange(1, P + 1, dtype=torch.int32)
    assert torch.equal(total[:, :P], expected.expand(teams * P, P))
    return counters


@pytest.mark.parametrize("seed", range(3))
def test_programs_see_what_others_stored_before_the_meeting(seed):
    """Launches with one team size after the other use the same counters, of which only the top bits keep anything."""
    counters, flips = torch.zeros(2, dtype=torch.int32), 0
    for P in random.Random(seed).sample(range(1, 10), 9):
        rounds = 1 + P % 3
        run(seed, P, rounds=rounds, counters=counters)
        flips += rounds
        assert counters.tolist() == [-(2**31) * (flips % 2)] * 2


def test_a_few_programs_in_many_orders():
    for seed in range(40):
        run(seed, 2 + seed % 2, teams=1)


def test_a_program_that_does_not_come():
    """The first team is complete, the second one waits for its fourth."""
    with pytest.raises(Exception, match="deadlock in exchange: 3 of 7 programs wait"):
        run(0, 4, programs=7)


# ---- what is wrong is seen ----


@triton.jit
def no_meeting(counter_ptr, member, P):
    pass


@triton.jit
def unordered(counter_ptr, member, P):
    """`meet` without release and acquire."""
    before = tl.atomic_add(counter_ptr, tl.where(member == 0, 2147483647 - (P - 2), 1), sem="relaxed")
    now = before
    while (before ^ now) >= 0:
        now = tl.atomic_add(counter_ptr, 0, sem="relaxed")


@triton.jit
def counted_once(counter_ptr, member, P):
    """Enough for one meeting: nobody waits in the second."""
    now = tl.atomic_add(counter_ptr, 1, sem="acq_rel") + 1
    while now < P:
        now = tl.atomic_add(counter_ptr, 0, sem="acquire")


@triton.jit
def counted_and_reset(counter_ptr, member, P):
    """The last one resets the counter, maybe before the others have seen that all are there."""
    now = tl.atomic_add(counter_ptr, 1, sem="acq_rel") + 1
    if now == P:
        tl.atomic_add(counter_ptr, -P, sem="release")
    while (now > 0) & (now < P):
        now = tl.atomic_add(counter_ptr, 0, sem="acquire")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("meeting", [no_meeting, unordered, counted_once], ids=lambda meeting: meeting.__name__)
def test_a_meeting_that_orders_nothing(meeting, seed):
    with pytest.raises(Exception, match="race in exchange"):
        run(seed, 4, meeting)


def test_what_a_slower_program_still_reads_is_overwritten():
    with pytest.raises(Exception, match=r"race in exchange: program \d+ writes what program \d+ reads"):
        run(0, 4, places=1)
    run(0, 4, places=2)  # the meeting between comes after the reading


def test_orders_differ():
    """A meeting that goes wrong in some orders: the others' are all right, and the same seed tells the same."""
    outcomes = [[], []]
    for outcome in outcomes:
        for seed in range(10):
            try:
                run(seed, 3, counted_and_reset, teams=1)
                outcome.append(None)
            except Exception as error:
                outcome.append(str(error))
    assert outcomes[0] == outcomes[1] and len(set(outcomes[0])) > 1


@triton.jit
def one_fails(counter_ptr, P):
    if tl.program_id(0) == 1:
        tl.static_assert(False, "a mistake")
    meet(counter_ptr, tl.program_id(0), P)


def test_an_exception_ends_the_launch():
    """Also while others wait."""
    with pytest.raises(Exception, match="a mistake"), concurrently():
        one_fails[(3,)](torch.zeros(1, dtype=torch.int32), 3)


# ---- norms ----


def group(V, OUTER, BLOCK_C, BLOCK_S, SET_C, SIDE=False, FOLD=False):
    return Config("meet", V, SIDE, 1, OUTER, BLOCK_C, BLOCK_S, 4, FOLD=FOLD, LARGE=True, SET_N=1, SET_C=SET_C)


# name: shape, groups, channels_last, config, teams. A team of SET_C T programs works on the fewest channels of a sample that are whole groups, on one
# such set after the other where there are fewer teams.
GROUP = {
    "a group, merged by each": ((3, 6, 6, 8), 1, False, group(4, 1, 2, 32, 3, FOLD=True), 2),
    "a group": ((2, 6, 6, 8), 1, False, group(4, 1, 2, 32, 3), 1),
    "groups in a tile": ((2, 6, 6, 8), 3, False, group(4, 2, 4, 16, 1), 3),
    "groups across tiles": ((2, 12, 6, 8), 2, False, group(4, 1, 4, 32, 3), 1),
    "tiles beyond the channels": ((2, 18, 4, 12), 3, False, group(4, 1, 4, 32, 5), 1),
    "odd": ((2, 6, 67), 2, False, group(4, 1, 2, 32, 3, SIDE=True), 2),
    "odd, merged by each": ((2, 4, 97), 2, False, group(8, 2, 2, 32, 1, SIDE=True, FOLD=True), 1),
    "channels last": ((2, 12, 7, 5), 4, True, group(4, 1, 8, 16, 2), 1),
    "channels last, merged by each": ((2, 8, 7, 5), 2, True, group(4, 1, 4, 16, 1, FOLD=True), 3),
    "channels last, instance": ((2, 12, 7, 5), 12, True, group(4, 1, 8, 16, 1), 1),
}


def batch(V, ROWS, BLOCK_C, BLOCK_S):
    return Config("meet", V, False, ROWS, 1, BLOCK_C, BLOCK_S, 4, LARGE=True, SET_C=1)


# name: shape, channels_last, config, teams. A team of ceil(N / ROWS) programs works on BLOCK_C channels.
BATCH = {
    "samples": ((7, 6, 7, 7), False, batch(1, 2, 4, 64), 1),
    "samples full": ((8, 2, 14, 14), False, batch(4, 4, 1, 256), 2),
    "many partials": ((17, 3), True, batch(1, 1, 64, 1), 1),
    "channels last": ((3, 12, 5, 3), True, batch(4, 16, 8, 1), 1),
}


def there(programs):
    """In place of `device_of`, which is asked where programs are to meet: so many are there at once."""
    return mock.Mock(return_value=Device(processors=-(-programs // 2)))


@pytest.mark.parametrize("place", GROUP)
def test_group(place, monkeypatch):
    *place, teams = GROUP[place]
    shape, _, _, config = place
    team = config.SET_C * -(-math.prod(shape[2:]) // (config.OUTER * config.BLOCK_S))
    monkeypatch.setattr(group_norm, "device_of", there(teams * team))
    with concurrently(teams):
        triton_cases.check(place)
    assert group_norm.device_of.call_count == 2  # forward and backward met


@pytest.mark.parametrize("place", BATCH)
def test_batch(place, monkeypatch):
    *place, teams = BATCH[place]
    shape, channels_last, config = place
    team = -(-shape[0] * (math.prod(shape[2:]) if channels_last else 1) // config.ROWS)
    monkeypatch.setattr(batch_norm, "device_of", there(teams * team))
    with concurrently(teams):
        triton_batch_cases.check(place)
    assert batch_norm.device_of.call_count == 2
