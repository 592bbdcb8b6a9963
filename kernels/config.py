"""Which kernels with which block sizes: a pure function of the shape and the device, no tuning on the way.

Sizes as in the kernels: N samples, C = G D channels, S positions. A group is D S elements, backward holds it twice (x and dy).
    held   a program holds whole groups: 2 memory passes forward, 3 backward
    split  tiles of all groups, statistics through memory. The second reading comes from cache: where not everything fits it, one set of samples
           or channels that share no statistics with others is worked on after the other
    samples (batch norm) split with tiles of several samples
    long   (rows forward) a program loops over its rows twice: the second reading comes from cache as long as the rows at work fit it
    meet   split or samples in one launch: programs keep their tile while they meet, and read once (device.cooperative)
Nothing here was measured yet: the reasons are occupancy and register counts of compiled kernels.
"""

import functools
import math
import os
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Device:
    """What the choice depends on. The defaults are an H200's, for compiling and testing without a device."""

    processors: int = 132
    cache: int = 60 << 20
    cooperative: bool = False  # whether programs may wait for each other

    @property
    def cache_budget(self):
        return self.cache * 65 // 100  # above two thirds of L2 a second reading begins to miss

    @property
    def wave(self):
        return self.cache_budget * 3 // 4  # what is read twice: some of the budget is for what is written meanwhile

    @property
    def resident(self):
        return 2 * self.processors  # programs of 8 warps with 128 registers a thread, as those that meet are compiled


@dataclass(frozen=True)
class Config:
    regime: str
    V: int  # elements in one vector access; the contiguous length is a multiple of it unless SIDE
    SIDE: bool  # odd S, channels first: aligned interior plus side lanes
    ROWS: int  # held: groups in a program; batch norm: samples
    OUTER: int  # a tile holds OUTER * BLOCK_S positions
    BLOCK_C: int
    BLOCK_S: int
    num_warps: int
    SLOTS: int = 0  # held backward: samples whose sums are kept apart, the others are added to them
    FOLD: bool = False  # apply merges the partials itself
    LARGE: bool = False  # not everything fits the cache
    SET_N: int = 0  # samples and blocks of BLOCK_C channels that are worked on at a time (0: all): a wave, or those of a team that meets
    SET_C: int = 0
    STEPS: int = 1  # split: tiles that a program goes through

    @property
    def chunk(self):
        return self.STEPS * self.OUTER * self.BLOCK_S  # positions


@dataclass(frozen=True)
class RowConfig:
    regime: str
    V: int  # elements in one vector access: along the channels, or along the positions if those are contiguous
    ROWS: int
    GROUPS: int  # held only
    BLOCK: int  # channels
    num_warps: int
    P: int = 0  # backward: programs that share the rows of a segment
    STAGES: int = 1  # backward: tiles on their way while one is worked on, and that one


@functools.lru_cache
def device_of(index):
    """The device of that number; below 0 (the interpreter's CPU tensors) the default."""
    if index < 0:
        return Device()
    properties = torch.cuda.get_device_properties(index)
    return Device(properties.multi_processor_count, properties.L2_cache_size, os.environ.get("NORMOPS_COOPERATIVE") == "1")


def power_above(x):
    return 1 << (x - 1).bit_length()


def power_dividing(x):
    return x & -x


def power_below(x):
    return 1 << (x.bit_length() - 1)


def divide(x, y):
    return -(-x // y)


def vector(length, itemsize):
    """Widest access, at most 16 bytes, that divides the contiguous length."""
    return min(16 // itemsize, power_dividing(length))


@functools.lru_cache(maxsize=4096)
def choose(N, C, S, G, itemsize, channels_last, backward, device=Device(), frozen=False):
    """The Config for one group norm; `frozen`: its statistics are given."""
    D = C // G
    V, SIDE = (vector(D, itemsize), False) if channels_last else _contiguous(S, itemsize)
    held = None if frozen else _held(N, S, G, D, itemsize, channels_last, backward, device, V, SIDE)
    # Channels last, a held group is D contiguous elements here and there: under a 32-byte sector, only where it all is in cache.
    pieces_ok = not channels_last or D * itemsize >= 32 or N * C * S * itemsize <= 1 << 20
    if held and pieces_ok and C * S < 1 << 31:
        return held
    if channels_last:
        V = vector(C, itemsize)
    sizes = (N, C, S, D, itemsize, channels_last, backward, device, V, SIDE)
    return (None if frozen else _meet(*sizes)) or _split(*sizes)


def _contiguous(S, itemsize):
    """V, SIDE of S contiguous positions."""
    V = vector(S, itemsize)
    # Under 8 bytes an access, long rows are worth an aligned interior with a head and a tail.
    return (16 // itemsize, True) if V * itemsize < 8 and S >= 256 else (V, False)


def _held(N, S, G, D, itemsize, channels_last, backward, device, V, SIDE):
    BLOCK_C, BLOCK_S = power_above(D), power_above(S)
    tile = BLOCK_C * BLOCK_S
    # 64 KB a group is one program's registers at 16 warps; a longer one is streamed faster by several.
    if tile * itemsize * (2 if backward else 1) > 64 << 10:
        return None
    # 4096 elements a program while that leaves every processor 4 programs; groups over 4 KB stay alone.
    groups = N * G
    ROWS = 1
    if tile <= 2048:
        ROWS = min(4096 // tile, power_below(max(1, groups // (4 * device.processors))))
    # 32 elements a thread (64 registers: two programs of 16 warps a processor). Half of that where weight and bias are as many as
    # x, in fp64, where accesses are narrow and each needs an address, or where there are too few programs to fill the device anyway.
    few = divide(groups, ROWS) < 2 * device.processors
    per_thread = 8 if V == 1 else 16 if BLOCK_S < 8 or few or V * itemsize < 8 or itemsize == 8 else 32
    num_warps = min(16, max(1, ROWS * tile // (32 * per_thread)))
    # Sums cost 16 bytes a channel and sample: more than x itself beside few positions, and somebody has to add them up. So walk over
    # samples, as far as 8 programs a processor remain.
    SLOTS = min(N, divide(8 * device.processors * ROWS, G))
    OUTER, BLOCK_S = _outer(ROWS, BLOCK_C, BLOCK_S, V, num_warps, channels_last)
    return Config("held", V, SIDE, ROWS, OUTER, BLOCK_C, BLOCK_S, num_warps, SLOTS=SLOTS)


def _split(N, C, S, D, itemsize, channels_last, backward, device, V, SIDE):
    # 32 elements a thread at 8 warps: 64 registers, 4 programs a processor, at least 64 KB in flight there. At 4 warps where there
    # is x and dy, or where each thread has sums of V channels to bring together with the other warps'.
    elements = min(4096 if backward or channels_last else 8192, (32 << 10) // itemsize)
    while elements > 2048 and N * C * S < elements * 2 * device.processors:
        elements //= 2
    size = itemsize * (2 if backward else 1)
    STEPS = _steps(N, C, S, itemsize, channels_last, backward, device) if itemsize < 8 and not SIDE else 1
    if STEPS > 1:
        BLOCK_C, BLOCK_S, width = _tile(C, S, D, itemsize, channels_last, backward, 2048 if backward else 4096, V)
        STEPS, per_thread = min(STEPS, power_below(divide(S, BLOCK_S))), 16
    if STEPS < 4:  # too few to make up for smaller tiles
        STEPS = 1
        BLOCK_C, BLOCK_S, width = _tile(C, S, D, itemsize, channels_last, backward, elements, V)
        per_thread = 16 if itemsize == 8 or (SIDE and backward) else 32
    if (BLOCK_S * C if channels_last else BLOCK_C * S) >= 1 << 31:
        raise NotImplementedError("group_norm: a tile of the Triton kernels spans more than 2^31 elements of this shape")
    V, num_warps = width, max(1, BLOCK_C * BLOCK_S // (32 * (16 if BLOCK_S < 8 else per_thread)))
    LARGE = N * C * S * size > device.wave
    # Programs merge up to 128 partials of their group (1.5 KB beside a tile of 16) sooner than a fold kernel is launched, again and again for waves.
    FOLD = D % BLOCK_C == 0 and divide(S, STEPS * BLOCK_S) * D <= (256 if LARGE else 128)
    wave = _wave(N, C, S, D, size, BLOCK_C, device) if LARGE and FOLD and itemsize >= 4 else (0, 0)
    OUTER, BLOCK_S = _outer(1, BLOCK_C, BLOCK_S, V, num_warps, channels_last)
    return Config("split", V, SIDE, 1, OUTER, BLOCK_C, BLOCK_S, num_warps, 0, FOLD, LARGE, *wave, STEPS)


def _steps(N, C, S, itemsize, channels_last, backward, device):
    """Tiles that a program goes through, so that it brings sums together once: as many as leave 3 programs a processor. For forward in 16 bits,
    which computes for longer than it reads, and channels last, where a tile's few positions would leave many partials."""
    if not channels_last and (backward or itemsize > 2):
        return 1
    at_once = N * C * S // (3 * device.processors)
    return min(16, power_below(max(1, at_once // (2048 if backward else 4096))))


def _wave(N, C, S, D, size, BLOCK_C, device):
    """SET_N, SET_C: as many samples, or groups of samples that are too long, as are read twice from cache. 0 where that is so little that reading it
    again takes no longer than one launch more. (In 16 bits that does not pay: programs compute for as long as they read.)"""
    sample, block, unit = C * S * size, BLOCK_C * S * size, _unit(C, D, BLOCK_C)
    if sample <= device.wave:
        SET_N, SET_C, part = _even(N, device.wave // sample), 0, sample
    elif unit * block <= device.wave:
        SET_N, SET_C, part = 1, _even(divide(C, unit * BLOCK_C), device.wave // (unit * block)) * unit, block
    else:
        return 0, 0
    return (SET_N, SET_C) if 4 * (SET_C or SET_N) * part >= 3 * device.wave else (0, 0)


def _unit(C, D, BLOCK_C):
    """The fewest blocks of BLOCK_C channels that are whole groups."""
    if BLOCK_C % D == 0:
        return 1
    channels = math.lcm(D, BLOCK_C)
    return divide(channels if C % channels == 0 else C, BLOCK_C)


def _even(total, most):
    return divide(total, divide(total, most))  # the size of as few parts of at most `most` as `total` has, all about equal


def _tile(C, S, D, itemsize, channels_last, backward, elements, V):
    """BLOCK_C, BLOCK_S, V of a tile of so many elements."""
    if channels_last:
        # Stores want 128 contiguous bytes, and sums prefer that a warp lies along the channels (512 bytes): up to a quarter of idle lanes
        # costs less than the shuffles of narrow tiles (320 channels: 3 x 128 is 22 instructions an element, 5 x 64 is 28).
        BLOCK_C = _best(C, 64 // itemsize, 512 // itemsize, 1.25)
        BLOCK_S = min(elements // BLOCK_C, power_above(S))
        BLOCK_C = min(elements // BLOCK_S, power_above(C))
        # 8 threads along few channels: more would be left along the positions, to be shuffled together.
        return BLOCK_C, BLOCK_S, min(V, max(1, BLOCK_C // 8))
    BLOCK_S = _best(S, 64, elements, 1.1)
    BLOCK_C = min(elements // BLOCK_S, power_above(C))
    if not backward and power_dividing(D) < BLOCK_C and power_dividing(D) * BLOCK_S >= 2048:
        BLOCK_C = power_dividing(D)
    return BLOCK_C, BLOCK_S, V


def _meet(N, C, S, D, itemsize, channels_last, backward, device, V, SIDE):
    """Tiles that their programs keep, together with the addresses, without spilling, where those of a set are all there at once."""
    if not device.cooperative or SIDE or V * itemsize < 16:
        return None
    most = min(8192 if channels_last else 16384, (64 << 10) // max(itemsize, 4) // (2 if backward else 1))
    for elements in (most, most // 2):
        BLOCK_C, BLOCK_S, width = _tile(C, S, D, itemsize, channels_last, backward, elements, V)
        T, unit = divide(S, BLOCK_S), _unit(C, D, BLOCK_C)
        if BLOCK_C * BLOCK_S == elements and T * D <= 4096 and _fills(unit * T, N * divide(C, unit * BLOCK_C), device):
            OUTER, BLOCK_S = _outer(1, BLOCK_C, BLOCK_S, width, 8, channels_last)
            FOLD = D % BLOCK_C == 0 and T * D <= 1024
            return Config("meet", width, SIDE, 1, OUTER, BLOCK_C, BLOCK_S, 8, 0, FOLD, True, 1, unit)
    return None


def _fills(team, sets, device):
    """Whether programs that wait for each other in teams are all there at once, and few processors idle."""
    teams = min(device.resident // team, sets)
    return team > 1 and teams > 0 and 4 * teams * team >= 3 * min(device.resident, sets * team)


@functools.lru_cache(maxsize=4096)
def choose_rows(N, C, S, G, itemsize, segments, backward, parameters, device=Device()):
    """The RowConfig for one layer, RMS or single-position group norm; `segments` sets of samples have a weight and a bias of their own."""
    D, across = C // G, S > 1
    if C * (S if across else 1) >= 1 << 31:
        raise NotImplementedError("row_norm: a row of the Triton kernels spans more than 2^31 elements of this shape")
    V = min(vector(S, itemsize), 4) if across else vector(D, itemsize)  # eight positions a thread take twice the shuffles of four
    planes, L = (N // segments, S) if across else (1, N // segments)
    config = (_across if across else _along)(D, G, L, segments * planes, itemsize, V, backward, parameters, device)
    if not backward:
        return config
    # 16 warps of about 128 registers fill a processor. All programs of a segment walk over about as many chunks.
    chunks = planes * divide(L, config.ROWS)
    columns = divide(G, config.GROUPS) * divide(D, config.BLOCK)
    P = min(chunks, max(1, device.processors * (16 // config.num_warps) // (segments * columns)))
    return replace(config, P=divide(chunks, divide(chunks, P)))


def _along(D, G, L, planes, itemsize, V, backward, parameters, device):
    """Rows whose channels are contiguous."""
    BLOCK = power_above(D)
    rows = planes * L * G
    # 16 warps of 32 elements a thread: more would spill. Backward holds x and dy, and sums for dweight and dbias.
    most = 16384 // ((2 if parameters else 1) if backward else 1) // (2 if itemsize == 8 else 1)
    if BLOCK > most:
        if backward:
            return RowConfig("split", V, 1, 1, 4096, 8 if itemsize < 8 else 16, STAGES=2)
        # Fewer rows than half the processors would leave half the device idle: blocks of a row go to programs of their own, where that
        # saves more than the two launches it costs.
        if rows * 2 < device.processors and D * itemsize >= 256 << 10:
            return RowConfig("split", V, 1, 1, 8192, 8 if itemsize < 8 else 16)
        # 32 warps of 64 registers fill a processor: as few rows at work, with as many warps, as it takes for them to stay in the cache.
        num_warps = 8
        while num_warps < 32 and D * itemsize * device.processors * (32 // num_warps) > device.cache_budget:
            num_warps *= 2
        return RowConfig("long", V, 1, 1, min(1024 * num_warps, 16384) // (2 if itemsize == 8 else 1), num_warps)
    per_thread = 8 if backward and itemsize == 8 else 16 if backward or itemsize == 8 else 32
    if rows <= 2 * device.processors:
        per_thread = 8  # more warps for each of few rows
    # Up to 256 channels 4 warps share 16 to 64 rows, weight and bias among them; longer rows have warps of their own, which do not wait.
    num_warps = 4 if BLOCK <= 256 else max(1, min(16, BLOCK // (32 * per_thread)))
    tile = max(1, num_warps * 32 * per_thread // BLOCK)
    while tile > 1 and rows < tile * 4 * device.processors:
        tile //= 2
    # Neighbouring groups until 128 bytes lie together, the rest rows, which share what is loaded for them.
    GROUPS = min(tile, power_above(G), power_above(divide(128, D * itemsize)))
    ROWS = min(tile // GROUPS, power_above(L), power_below(max(1, (1 << 30) // (G * D))))  # offsets in a tile are int32
    GROUPS = min(tile // ROWS, power_above(G))
    num_warps = max(1, min(num_warps, ROWS * GROUPS * BLOCK // (32 * 8)))
    # Several rows in a tile would come through shared memory in a layout that needs ten times the shuffles.
    return RowConfig("held", V, ROWS, GROUPS, BLOCK, num_warps, STAGES=2 if backward and ROWS * GROUPS == 1 else 1)


def _across(D, G, L, planes, itemsize, V, backward, parameters, device):
    """Rows whose neighbours are contiguous."""
    BLOCK = power_above(D)
    # 16 warps of 32 elements a thread, backward 16.
    most = (8192 if backward else 16384) // (2 if itemsize == 8 else 1)
    # Memory wants 64 contiguous bytes. Backward, a sector of 32 costs less than reading x and dy twice.
    least = (32 if backward else 64) // itemsize
    if BLOCK * min(least, power_above(L)) > most:
        ROWS = min(128 // itemsize, power_above(L))
        BLOCK = min(BLOCK, 4096 // ROWS)
        return RowConfig("split" if backward else "long", V, ROWS, 1, BLOCK, max(1, ROWS * BLOCK // 512))
    ROWS = max(least, min(most // 2 // BLOCK, 256 // itemsize))
    while ROWS > least and planes * divide(L, ROWS) < 4 * device.processors:
        ROWS //= 2
    ROWS = min(ROWS, power_above(L))
    return RowConfig("held", V, ROWS, 1, BLOCK, max(1, min(16, ROWS * BLOCK // (32 * (16 if backward else 32)))))


@functools.lru_cache(maxsize=4096)
def choose_batch(N, C, S, itemsize, channels_last, backward, device=Device()):
    """The Config for one batch norm; ROWS are samples, or channels last positions, except of "split", which has the tiles of a group norm."""
    samples, positions = (N * S, 1) if channels_last else (N, S)
    V = vector(C if channels_last else S, itemsize)
    BLOCK_S, ROWS = power_above(positions), power_above(samples)
    # Channels beside each other, until the 64 bytes that loads want lie together, better the 128 that stores want.
    least, enough = (min(power_above(C), power_above(divide(together, positions * itemsize))) for together in (64, 128))
    # 64 KB are one program's registers at 16 warps, as for groups; narrow accesses, each with an address, leave fewer.
    size = itemsize * (2 if backward else 1)
    most = min((64 << 10) // size, 16384 if V * itemsize < 8 else 32768)
    held = ROWS * least * BLOCK_S <= most
    spans = C * positions * ROWS >= 1 << 31  # offsets in a tile are int32
    if device.cooperative and not held and not spans and V * itemsize >= 8:
        for elements in (8192, 4096):
            ROWS = min(elements // (enough * BLOCK_S * (2 if itemsize == 8 else 1)), power_above(samples))
            if ROWS and _fills(divide(samples, ROWS), divide(C, enough), device):
                return Config("meet", min(V, max(1, enough // 8)) if channels_last else V, False, ROWS, 1, enough, BLOCK_S, 8, LARGE=True)
        ROWS = power_above(samples)
    if spans or not held and (channels_last or S > 256):
        if channels_last:
            return _split(1, C, N * S, 1, itemsize, True, backward, device, V, False)
        config = _split(N, C, S, 1, itemsize, False, backward, device, *_contiguous(S, itemsize))
        return replace(config, FOLD=False, SET_N=0, SET_C=0)  # of one sample a program has not all partials
    if held:
        BLOCK_C = min(enough, most // (ROWS * BLOCK_S))
        while ROWS * BLOCK_C * BLOCK_S < 4096 and C >= 8 * BLOCK_C * device.processors:
            BLOCK_C *= 2
    else:
        BLOCK_C, elements = enough, min(4096 if backward else 8192, (32 << 10) // itemsize)
        ROWS = elements // (BLOCK_C * BLOCK_S)
    if channels_last:
        V = min(V, max(1, BLOCK_C // 8))  # as in `_tile`
    few = divide(C, BLOCK_C) * divide(samples, ROWS) < 2 * device.processors
    num_warps = min(16, max(1, ROWS * BLOCK_C * BLOCK_S // (32 * (16 if few or itemsize == 8 else 32))))
    LARGE = not held and N * C * S * size > device.wave
    return Config("held" if held else "samples", V, False, ROWS, 1, BLOCK_C, BLOCK_S, num_warps, LARGE=LARGE)


@functools.lru_cache(maxsize=4096)
def choose_weight(outputs, n, groups, itemsize, backward, device=Device()):
    """The RowConfig for the weight of an analytic norm: `outputs` rows of n elements, BLOCK of which are a tile's."""
    if n >= 1 << 30:
        raise NotImplementedError("analytic_norm_weight: a row of the Triton kernels spans more than 2^30 elements of this weight")
    # The statistics of eight elements a thread fill 32 registers, since they are float64, as everything is in backward.
    per_thread = 8 if backward or itemsize == 8 else 16
    most, BLOCK = 16 * 32 * per_thread, power_above(n)
    if BLOCK > most:
        regime, ROWS, BLOCK, num_warps = "split" if backward else "long", 1, most // 2, 8
    else:
        # A warp for each row; of short rows several, with two elements a thread, since each has its own statistics, root and quotient.
        per_thread = min(per_thread, max(2, BLOCK // 32))
        regime, ROWS = "held", max(1, 4 * 32 * per_thread // BLOCK)
        while ROWS > 1 and outputs < ROWS * device.processors:
            ROWS //= 2
        num_warps = max(1, ROWS * BLOCK // (32 * per_thread))
    config = RowConfig(regime, min(vector(n, itemsize), per_thread), ROWS, 1, BLOCK, num_warps)
    if not backward:
        return config
    # 16 warps of about 128 registers fill a processor. All programs of a group walk over about as many chunks.
    chunks = divide(outputs // groups, ROWS)
    P = min(chunks, max(1, device.processors * (16 // num_warps) // (groups * divide(n, BLOCK))))
    return replace(config, P=divide(chunks, divide(chunks, P)))


def _outer(ROWS, BLOCK_C, BLOCK_S, V, num_warps, channels_last):
    """OUTER, BLOCK_S of a tile of BLOCK_S positions. Triton spreads warps along the last axes first; a last axis no longer than one
    warp's access gives each warp channels of its own: a third of the shuffles, and each thread loads few weights."""
    inner = 32 * V
    if channels_last or ROWS > 1 or BLOCK_S <= inner or BLOCK_C < num_warps:
        return 1, BLOCK_S
    return BLOCK_S // inner, inner


def _best(length, least, most, slack):
    """The largest power of two in [least, most] whose tiles over `length` take at most `slack` times the lanes of the best one's."""
    most = min(most, power_above(length))
    sizes = [1 << k for k in range(min(least, most).bit_length() - 1, most.bit_length())]
    lanes = [divide(length, size) * size for size in sizes]
    return max(size for size, used in zip(sizes, lanes, strict=True) if used <= slack * min(lanes))
