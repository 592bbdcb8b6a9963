"""The weight of an analytic norm: each row is given the gain and the bias with which its output has the mean bias and the variance scale^2.

Memory: `outputs` rows of n = inputs taps elements, L of them (SHARED: a group's) after each other in a segment, of which a program takes chunks of
ROWS. The statistics of element e of a row of group g are those of channel g inputs + e // taps, or with LAST g inputs + e % inputs.
    forward     m = sum W mean      q = sum W^2 var      r = scale / sqrt(q + eps)      new = r W      new_bias = bias - m r
    backward    c = dnew_bias       dr = sum dnew W - c m       dm -= c r       dq -= r / (2 (q + eps)) dr
                of_weight = r dnew + mean dm + 2 var W dq       of_scale = dr / sqrt(q + eps)
                of_mean, of_var = sum W dm, sum W^2 dq over the rows of a group and over the taps
    stats (2, outputs) = m, q
    sums (2, groups P taps, inputs) = sum W dm, sum W^2 dq of what each of the P programs of a group met: chunk p, p + P, ... in this order;
    of tiles with rows of several groups, each row on its own
Forward sums products of 16-bit and float32 weights in float32, of a block, the rest in float64. Backward is float64 throughout.
STEPs of backward: WHOLE, or where a program does not hold a row but one of its blocks = ceil(n / BLOCK):
    PARTS    partials (outputs, blocks) = sum dnew W of one block
    APPLY    what is left to do of one block, from all partials of the row
"""

import triton
import triton.language as tl

from .algebra import load, load_affine, narrow, whole
from .config import choose_weight, device_of, divide, power_above
from .exchange import APPLY, PARTS, WHOLE
from .fold import fold
from .launch import INTERPRET, launch


@triton.jit
def place_chunk(chunk, L, per_group, n, SHARED: tl.constexpr, ROWS: tl.constexpr):
    """The numbers of a chunk's rows, [ROWS, 1], which of them exist, where they begin, and their groups."""
    T = tl.cdiv(L, ROWS)
    i = chunk % T * ROWS + tl.arange(0, ROWS)[:, None]
    row = chunk // T * L + i
    return row, i < L, row.to(tl.int64) * n, chunk // T if SHARED else row // per_group


@triton.jit
def place_block(e_0, n, inputs, group, live, TAPS: tl.constexpr, LAST: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr):
    """Elements of a row, [1, BLOCK], the mask of the tile, the channels of its elements and their mask."""
    e = e_0 + tl.arange(0, BLOCK)[None, :]
    channel = group * (n if TAPS == 1 else inputs) + (e % inputs if LAST else e // TAPS)  # n: what is known to divide it
    mask = live & (e < n)
    return e, mask, channel, (e < n) if SHARED else mask


@triton.jit
def sums_of(w, mean_ptr, var_ptr, channel, live_c, ACC: tl.constexpr):
    """sum w mean, sum w^2 var of a block."""
    mean, var = load(mean_ptr, channel, live_c, ACC), load(var_ptr, channel, live_c, ACC)
    m, q = tl.sum(w * mean, axis=1, keep_dims=True), tl.sum(w * var * w, axis=1, keep_dims=True)
    return m.to(tl.float64), q.to(tl.float64)


@triton.jit
def sums_of_rows(
    weight_ptr, mean_ptr, var_ptr, start, live, group, n, inputs,
    TAPS: tl.constexpr, LAST: tl.constexpr, SHARED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """m and q, block by block."""
    m, q = tl.zeros((ROWS, 1), tl.float64), tl.zeros((ROWS, 1), tl.float64)
    for e_0 in range(0, n, BLOCK):
        e, mask, channel, live_c = place_block(e_0, n, inputs, group, live, TAPS, LAST, SHARED, BLOCK)
        m_block, q_block = sums_of(load(weight_ptr, start + e, mask, ACC), mean_ptr, var_ptr, channel, live_c, ACC)
        m += m_block
        q += q_block
    return m, q


@triton.jit(do_not_specialize=["L", "per_group", "n", "inputs", "outputs"])
def _analytic_norm_weight_fwd_kernel(
    new_ptr, new_bias_ptr, stats_ptr, weight_ptr, mean_ptr, var_ptr, scale_ptr, bias_ptr, L, per_group, n, inputs, outputs, eps: "fp64",
    TAPS: tl.constexpr, LAST: tl.constexpr, SHARED: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = weight_ptr.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    n = whole(n, V, True)
    row, live, start, group = place_chunk(tl.program_id(0), L, per_group, n, SHARED, ROWS)
    if HELD:
        e, mask, channel, live_c = place_block(0, n, inputs, group, live, TAPS, LAST, SHARED, BLOCK)
        w = load(weight_ptr, start + e, mask, ACC)
        m, q = sums_of(w, mean_ptr, var_ptr, channel, live_c, ACC)
    else:
        m, q = sums_of_rows(weight_ptr, mean_ptr, var_ptr, start, live, group, n, inputs, TAPS, LAST, SHARED, ROWS, BLOCK, ACC)
    if ACC != tl.float64:
        kept = (q > 1e-30) & (q + tl.abs(m) < 1e38)  # else float32 squares underflowed or overflowed, or there is a NaN
        if tl.min(tl.ravel((kept | (live == 0)).to(tl.int32)), axis=0) == 0:
            m_wide, q_wide = sums_of_rows(weight_ptr, mean_ptr, var_ptr, start, live, group, n, inputs, TAPS, LAST, SHARED, ROWS, BLOCK, tl.float64)
            m, q = tl.where(kept, m, m_wide), tl.where(kept, q, q_wide)
    r = load_affine(scale_ptr, row, live, 1.0, tl.float64) / tl.sqrt(q + tl.full((), eps, tl.float64))
    bias = load_affine(bias_ptr, row, live, 0.0, tl.float64)
    tl.store(stats_ptr + row, m, live)
    tl.store(stats_ptr + outputs + row, q, live)
    tl.store(new_bias_ptr + row, narrow(bias - m * r, DTYPE), live)
    r = r.to(ACC)
    if HELD:
        tl.store(new_ptr + (start + e), narrow(w * r, DTYPE), mask)
    else:
        for e_0 in range(0, n, BLOCK):
            e, mask, channel, live_c = place_block(e_0, n, inputs, group, live, TAPS, LAST, SHARED, BLOCK)
            tl.store(new_ptr + (start + e), narrow(load(weight_ptr, start + e, mask, ACC) * r, DTYPE), mask)


@triton.jit(do_not_specialize=["L", "per_group", "n", "inputs", "outputs", "P"])
def _analytic_norm_weight_bwd_kernel(
    of_weight_ptr, sums_ptr, of_scale_ptr, partials_ptr, dnew_ptr, dnew_bias_ptr, dstats_ptr, weight_ptr, mean_ptr, var_ptr, scale_ptr, stats_ptr,
    L, per_group, n, inputs, outputs, P, eps: "fp64",
    TAPS: tl.constexpr, LAST: tl.constexpr, SHARED: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STEP: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64
    n = whole(n, V, True)
    blocks, T = tl.cdiv(n, BLOCK), tl.cdiv(L, ROWS)
    block, segment, p = tl.program_id(0) % blocks, tl.program_id(0) // blocks // P, tl.program_id(0) // blocks % P
    of_mean = tl.zeros((ROWS, BLOCK), ACC)
    of_var = tl.zeros((ROWS, BLOCK), ACC)
    for chunk in range(p, T, P):
        row, live, start, group = place_chunk(segment * T + chunk, L, per_group, n, SHARED, ROWS)
        e, mask, channel, live_c = place_block(block * BLOCK, n, inputs, group, live, TAPS, LAST, SHARED, BLOCK)
        w, dnew = load(weight_ptr, start + e, mask, ACC), load(dnew_ptr, start + e, mask, ACC)
        part = row.to(tl.int64) * blocks
        if STEP == APPLY:
            dot = tl.zeros((ROWS, 1), ACC)
            for b_0 in range(0, blocks, BLOCK_P):
                b = b_0 + tl.arange(0, BLOCK_P)[None, :]
                dot += tl.sum(load(partials_ptr, part + b, live & (b < blocks), ACC), axis=1, keep_dims=True)
        else:
            dot = tl.sum(w * dnew, axis=1, keep_dims=True)
        if STEP == PARTS:
            tl.store(partials_ptr + part + block, dot, live)
        else:
            m, q = tl.load(stats_ptr + row, live, 0.0), tl.load(stats_ptr + outputs + row, live, 1.0)
            c = tl.load(dnew_bias_ptr + row, live, 0.0)
            rstd = 1.0 / tl.sqrt(q + tl.full((), eps, ACC))
            r = rstd * load_affine(scale_ptr, row, live, 1.0, ACC)
            dr = dot - c * m
            dm = tl.load(dstats_ptr + row, live, 0.0) - c * r
            dq = tl.load(dstats_ptr + outputs + row, live, 0.0) - 0.5 * r * rstd * rstd * dr
            if block == 0:
                tl.store(of_scale_ptr + row, dr * rstd, live)
            mean, var = load(mean_ptr, channel, live_c, ACC), load(var_ptr, channel, live_c, ACC)
            along = w * dq
            tl.store(of_weight_ptr + (start + e), narrow(r * dnew + mean * dm + 2.0 * var * along, of_weight_ptr.dtype.element_ty), mask)
            of_mean += w * dm
            of_var += w * along
    if STEP != PARTS:
        e = block * BLOCK + tl.arange(0, BLOCK)[None, :]
        column = e if LAST else e % TAPS * inputs + e // TAPS
        if SHARED:
            place, count = sums_ptr + ((segment * P + p).to(tl.int64) * n + column), tl.num_programs(0) // blocks
            tl.store(place, tl.sum(of_mean, axis=0, keep_dims=True), e < n)
            tl.store(place + count.to(tl.int64) * n, tl.sum(of_var, axis=0, keep_dims=True), e < n)
        else:
            i = p * ROWS + tl.arange(0, ROWS)[:, None]
            place, mask = sums_ptr + (i.to(tl.int64) * n + column), (i < outputs) & (e < n)
            tl.store(place, of_mean, mask)
            tl.store(place + outputs.to(tl.int64) * n, of_var, mask)


def analytic_norm_weight_fwd(new, new_bias, stats, weight, mean, var, scale, bias, outputs, taps, groups, channels_last, eps):
    """Write new, new_bias and stats = (m, q)."""
    config = _configuration(weight, outputs, groups, False)
    forward(config, new, new_bias, stats, weight, mean, var, scale, bias, outputs, taps, groups, channels_last, eps)


def analytic_norm_weight_bwd(
    of_weight, of_mean, of_var, of_scale, dnew, dnew_bias, dstats, weight, mean, var, scale, stats, outputs, taps, groups, channels_last, eps,
):  # fmt: skip
    """Write of_weight, of_mean, of_var and of_scale."""
    config = _configuration(weight, outputs, groups, True)
    backward(
        config, of_weight, of_mean, of_var, of_scale, dnew, dnew_bias, dstats, weight, mean, var, scale, stats, outputs, taps, groups,
        channels_last, eps,
    )  # fmt: skip


def forward(config, new, new_bias, stats, weight, mean, var, scale, bias, outputs, taps, groups, channels_last, eps):
    chunks, sizes, tile = _tiles(config, weight, outputs, taps, groups, channels_last)
    launch(
        _analytic_norm_weight_fwd_kernel, chunks, config.num_warps, new, new_bias, stats, weight, mean, var, scale, bias,
        *sizes, eps, *tile, config.regime == "held",
    )  # fmt: skip


def backward(
    config, of_weight, of_mean, of_var, of_scale, dnew, dnew_bias, dstats, weight, mean, var, scale, stats, outputs, taps, groups, channels_last, eps,
):  # fmt: skip
    chunks, sizes, tile = _tiles(config, weight, outputs, taps, groups, channels_last)
    n, shared = weight.numel() // outputs, tile[2]
    blocks, P = divide(n, config.BLOCK), config.P if shared else chunks
    steps, partials = [WHOLE.value], None
    if config.regime != "held":
        steps, partials = [PARTS.value, APPLY.value], stats.new_empty((outputs, blocks))
    sums = stats.new_empty((2, (groups * P if shared else outputs) * taps, n // taps))
    for step in steps:
        launch(
            _analytic_norm_weight_bwd_kernel, (groups if shared else 1) * P * blocks, config.num_warps,
            of_weight, sums, of_scale, partials, dnew, dnew_bias, dstats, weight, mean, var, scale, stats,
            *sizes, P, eps, *tile, step, min(1024, power_above(blocks)),
        )  # fmt: skip
    fold(sums, of_mean, of_var)


def _tiles(config, weight, outputs, taps, groups, channels_last):
    """Chunks of rows; L, per_group, n, inputs, outputs as the kernels take them; TAPS, LAST, SHARED, V, ROWS, BLOCK."""
    n, per_group = weight.numel() // outputs, outputs // groups
    shared = per_group >= config.ROWS  # shorter groups share tiles, whose rows load the statistics of their own
    L, segments = (per_group, groups) if shared else (outputs, 1)
    last = channels_last and 1 < taps < n
    sizes = (L, per_group, n // config.V, n // taps, outputs)
    return segments * divide(L, config.ROWS), sizes, (taps, last, shared, config.V, config.ROWS, config.BLOCK)


def _configuration(weight, outputs, groups, backward):
    if not (weight.is_cuda or INTERPRET):
        raise NotImplementedError(f"analytic_norm_weight: Triton kernels run on CUDA tensors, not on {weight.device.type}")
    return choose_weight(outputs, weight.numel() // outputs, groups, weight.element_size(), backward, device_of(weight.get_device()))
