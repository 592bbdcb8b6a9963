"""Group norm in steps over tiles of 16 to 32 KB, for groups that do not fit one program and for given statistics: moments, fold, apply.

Where sums are brought together a program goes through STEPS tiles [BLOCK_C channels, BLOCK_S positions], a chunk of positions, of which there are
T; elsewhere it has one tile. A launch works on all of them, or on those of SET_N samples and SET_C blocks of channels (a wave), so that the second
reading of a tensor larger than the cache comes from there too.
    forward     PARTS    partials (3, N, T, C) = hi, lo, root_M2 of each channel's chunks
                fold     stats (3, N, G) = hi, lo, rstd of each group: its T D partials merged (FOLD: APPLY does it)
                APPLY    y = act(x_hat weight + bias (+ residual))
    backward    PARTS    partials (2, N, T, C) = sum_dt_xhat, sum_dt
                fold     sums (2, N, C): over t; means (2, N, G) = 1/(D S) sum_c weight sum_dt_xhat, 1/(D S) sum_c weight sum_dt (FOLD: APPLY does it)
                APPLY    dx = rstd weight dt + c2 x_hat + c3     c2, c3 = -rstd means     dresidual = dt
    MEET        all of it in one launch: the programs of a set keep their tiles while they meet
Frozen statistics, given as (3, STATS_N, G) with STATS_N = 1 or N, leave one reading each: forward APPLY, backward WHOLE, partials and dx in one
pass, where c2 = c3 = 0 unless means are given too.
APPLY runs in the reverse order of PARTS, so that what the cache still holds is met first.
LARGE (it does not all fit the cache): keep what is read first, let go of what is read last and of the outputs.
"""

import triton
import triton.language as tl

from .algebra import HUGE, inverse_std, load, load_affine, load_stats, merge_moments, moments, narrow, place, store_batch, store_stats, total, whole
from .elementwise import backward_of, forward_of, load_coefficients, store_gradients
from .exchange import APPLY, MEET, PARTS, SPACING, WHOLE, meet, number, number_tiles


@triton.jit
def tile(pid, n_0, block_0, C, T, SET_C, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, STEP: tl.constexpr):
    """Sample, number along the positions (of T) and first channel of tile `pid` of the set that begins at sample n_0 and block block_0 of channels,
    or, where programs meet, of all sets; its set's first channel. Neighbours in a set are neighbours in memory."""
    if STEP == MEET:
        tiles, across = SET_C * T, tl.cdiv(tl.cdiv(C, BLOCK_C), SET_C)
        n_0, block_0, pid = pid // tiles // across, pid // tiles % across * SET_C, pid % tiles
    if CHANNELS_LAST:
        block, t = pid % SET_C, pid // SET_C % T
    else:
        t, block = pid % T, pid // T % SET_C
    return (n_0 + pid // (T * SET_C)).to(tl.int64), t, (block_0 + block) * BLOCK_C, block_0 * BLOCK_C


@triton.jit
def place_tile(
    n, t, j, c_0, C, S, STEPS: tl.constexpr, CHANNELS_LAST: tl.constexpr, V: tl.constexpr, SIDE: tl.constexpr,
    OUTER: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Tile j of a chunk: channels and which of them exist, offsets and masks of main and side lanes, positions, offset of each channel's first."""
    stride_c, stride_s = (1, C) if CHANNELS_LAST else (S, 1)
    s_0 = (t.to(tl.int64) * STEPS + j) * (OUTER * BLOCK_S)
    length = tl.minimum(S - s_0, OUTER * BLOCK_S).to(tl.int32)
    base = n * C * S + c_0.to(tl.int64) * stride_c + s_0 * stride_s
    i = tl.arange(0, BLOCK_C)[None, :, None]
    live = c_0 + i < C
    offset, mask, offset_side, mask_side = place(base, i, length, stride_c, stride_s, OUTER, BLOCK_S, V, SIDE)
    return c_0 + i, live, offset, mask & live, offset_side, mask_side & live, length, base + i * stride_c


@triton.jit
def count_tiles(t, S, STEPS: tl.constexpr, SIZE: tl.constexpr):
    """Tiles of SIZE positions in chunk t; no constant where there are several, since their loop is not to be unrolled."""
    if STEPS == 1:
        return 1
    else:
        return tl.minimum(tl.cdiv(S - t.to(tl.int64) * (STEPS * SIZE), SIZE), STEPS).to(tl.int32)


@triton.jit
def chunk_moments(
    x_ptr, n, t, c_0, C, S, STEPS: tl.constexpr, CHANNELS_LAST: tl.constexpr, V: tl.constexpr, SIDE: tl.constexpr,
    OUTER: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr, POLICY: tl.constexpr,
):  # fmt: skip
    """d of the first tile and of its side, and hi, lo, M2, scale of the chunk. hi is the mean of the first tile: no further from that of the
    chunk than sqrt(STEPS) standard deviations, so that at most log2(STEPS) bits of M2 cancel."""
    c, live, offset, mask, offset_side, mask_side, length, some = place_tile(
        n, t, 0, c_0, C, S, STEPS, CHANNELS_LAST, V, SIDE, OUTER, BLOCK_C, BLOCK_S
    )
    x = load(x_ptr, offset, mask, ACC, POLICY)
    x_side = load(x_ptr, offset_side, mask_side, ACC, POLICY) if SIDE else x
    x_some = load(x_ptr, some, live, ACC)
    if STEPS == 1:
        return moments(x, mask, x_side, mask_side, x_some, length.to(ACC), True, False, SIDE, OUTER)
    else:
        hi = x_some + total(tl.where(mask, x - x_some, 0.0), False, OUTER) / length.to(ACC)
        count = tl.minimum(S - t.to(tl.int64) * (STEPS * OUTER * BLOCK_S), STEPS * OUTER * BLOCK_S).to(ACC)
        d = tl.where(mask, x - hi, 0.0)
        sum_d, sum_dd = d, d * d
        last = count_tiles(t, S, STEPS, OUTER * BLOCK_S)
        for j in tl.range(1, last, num_stages=3):
            _, _, offset, mask, _, _, _, _ = place_tile(n, t, j, c_0, C, S, STEPS, CHANNELS_LAST, V, SIDE, OUTER, BLOCK_C, BLOCK_S)
            e = tl.where(mask, load(x_ptr, offset, mask, ACC, POLICY) - hi, 0.0)
            sum_d += e
            sum_dd += e * e
        lo, M2 = total(sum_d, False, OUTER) / count, total(sum_dd, False, OUTER)
        scale = tl.full(M2.shape, 1.0, ACC)
        if tl.max(tl.ravel(M2)) == float("inf"):
            scale = tl.where(M2 == float("inf"), HUGE, scale)
            sum_dd = tl.zeros_like(d)
            for j in range(0, last):
                _, _, offset, mask, _, _, _, _ = place_tile(n, t, j, c_0, C, S, STEPS, CHANNELS_LAST, V, SIDE, OUTER, BLOCK_C, BLOCK_S)
                e = tl.where(mask, load(x_ptr, offset, mask, ACC) - hi, 0.0) * scale
                sum_dd += e * e
            M2 = total(sum_dd, False, OUTER)
        return d, d, hi, lo, tl.maximum(M2 - count * (lo * scale) * (lo * scale), 0.0), scale


@triton.jit(do_not_specialize=["N", "C", "D", "S", "T", "LENGTH", "PERIOD", "CHUNK"])
def _fold_moments_kernel(
    partials_ptr, out_ptr, running_mean_ptr, running_var_ptr, N, C, D, S, T, LENGTH, PERIOD, CHUNK, eps: "fp64", momentum: "fp64",
    BLOCK_P: tl.constexpr, GROUPS: tl.constexpr, FINAL: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """FINAL: stats (ROWS, N, G) of GROUPS groups from all their T = LENGTH partials a channel. Else (D = 1) every LENGTH partials become one."""
    G = C // D
    blocks, U = tl.cdiv(G, GROUPS), tl.cdiv(T, LENGTH)
    n, u = (tl.program_id(0) // (blocks * U)).to(tl.int64), tl.program_id(0) // blocks % U
    g = tl.program_id(0) % blocks * GROUPS + tl.arange(0, GROUPS)[None, :]
    t, s = u * LENGTH, u.to(tl.int64) * LENGTH * CHUNK
    start = (n * T + t) * C + g * D
    T_here, S_here = tl.minimum(T - t, LENGTH), tl.minimum(S - s, LENGTH.to(tl.int64) * CHUNK)
    hi, lo, M2, scale, count = merge_moments(partials_ptr, start, g < G, N.to(tl.int64) * T * C, T_here, PERIOD, C, D, S_here, CHUNK, BLOCK_P)
    row, rows = (n * U + u) * G + g, N.to(tl.int64) * U * G
    if not FINAL:
        store_stats(out_ptr, row, rows, hi, lo, tl.sqrt(M2) / scale, g < G, True)
    elif ROWS == 4:
        store_batch(out_ptr, running_mean_ptr, running_var_ptr, row, rows, hi, lo, M2, scale, count, eps, momentum, g < G)
    else:
        store_stats(out_ptr, row, rows, hi, lo, inverse_std(M2, scale, count, tl.full((), eps, hi.dtype)), g < G, ROWS == 3)


@triton.jit(do_not_specialize=["weight_rows", "bias_rows", "STATS_N", "n_0", "block_0", "tiles", "SET_C", "U", "N", "C", "D", "S", "T", "CHUNK"])
def _split_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr, stats_ptr, partials_ptr, counters_ptr,
    weight_rows, bias_rows, STATS_N, n_0, block_0, tiles, SET_C, U, N, C, D, S, T, CHUNK, eps: "fp64", slope: "fp64",
    ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, V: tl.constexpr, SIDE: tl.constexpr, LARGE: tl.constexpr,
    STEPS: tl.constexpr, OUTER: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    FOLD: tl.constexpr, BLOCK_P: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """FOLD: a tile lies in one group, and each program merges that group's few partials itself."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    POLICY: tl.constexpr = ("evict_last" if STEP == PARTS else "evict_first") if LARGE else ""
    C = whole(C, V, CHANNELS_LAST)
    S = whole(S, V, not CHANNELS_LAST and not SIDE)
    G, stride_k = C // D, N.to(tl.int64) * T * C
    team, member = SET_C * U, tl.program_id(0) % (SET_C * U)
    slope = tl.full((), slope, ACC)
    begin, end, step = number_tiles(tiles, STEP)
    for i in range(begin, end, step):
        n, t, c_0, c_set = tile(number(i, tiles, STEP), n_0, block_0, C, U, SET_C, CHANNELS_LAST, BLOCK_C, STEP)
        c, live, offset, mask, offset_side, mask_side, _, _ = place_tile(n, t, 0, c_0, C, S, STEPS, CHANNELS_LAST, V, SIDE, OUTER, BLOCK_C, BLOCK_S)
        if STEP != PARTS:
            weight = load_affine(weight_ptr, n * weight_rows * C + c, live, 1.0, ACC)
            bias = load_affine(bias_ptr, n * bias_rows * C + c, live, 0.0, ACC)
        if STEP == APPLY:
            d, own = load(x_ptr, offset, mask, ACC, POLICY), 0.0
            d_side = load(x_ptr, offset_side, mask_side, ACC, POLICY) if SIDE else d
        else:
            d, d_side, own, lo, M2, scale = chunk_moments(x_ptr, n, t, c_0, C, S, STEPS, CHANNELS_LAST, V, SIDE, OUTER, BLOCK_C, BLOCK_S, ACC, POLICY)
            store_stats(partials_ptr, (n * T + t) * C + c, stride_k, own, lo, tl.sqrt(M2) / scale, live, True)
        if STEP == MEET:
            meet(counters_ptr + tl.program_id(0) // team * SPACING, member, team)
            if not FOLD:
                for k in range(member, SET_C * BLOCK_C // D, team):
                    g = c_set // D + k + tl.zeros((1, 1), tl.int32)
                    merge_group(stats_ptr, partials_ptr, n, g, g < G, N, T, C, D, S, eps, CHUNK, BLOCK_P)
                meet(counters_ptr + tl.program_id(0) // team * SPACING, member, team)
        if STEP != PARTS:
            if FOLD:
                g = c_0 // D + tl.zeros((1, 1), tl.int32)
                mine = (g < G) & (g * D == c_0 + t * C)  # one of the group's programs
                hi, lo, rstd = merge_group(stats_ptr, partials_ptr, n, g, mine, N, T, C, D, S, eps, CHUNK, BLOCK_P)
                hi, lo, rstd = hi[:, :, None], lo[:, :, None], rstd[:, :, None]
            else:
                hi, lo, rstd = load_stats(stats_ptr, tl.minimum(n, STATS_N - 1) * G + c // D, STATS_N * G, live, True)
            forward_of(d - (hi - own), offset, mask, residual_ptr, y_ptr, lo, rstd, weight, bias, slope, ACTIVATION, ACC, POLICY)
            if SIDE:
                forward_of(d_side - (hi - own), offset_side, mask_side, residual_ptr, y_ptr, lo, rstd, weight, bias, slope, ACTIVATION, ACC, POLICY)


@triton.jit
def merge_group(stats_ptr, partials_ptr, n, g, mask, N, T, C, D, S, eps, CHUNK, BLOCK_P: tl.constexpr):
    """hi, lo, rstd of group g [1, 1], also stored where `mask`, if there is somewhere to."""
    G = C // D
    stride_k = N.to(tl.int64) * T * C
    hi, lo, M2, scale, count = merge_moments(partials_ptr, n * T * C + g * D, g < G, stride_k, T, None, C, D, S, CHUNK, BLOCK_P)
    rstd = inverse_std(M2, scale, count, tl.full((), eps, hi.dtype))
    if stats_ptr is not None:
        store_stats(stats_ptr, n * G + g, N * G, hi, lo, rstd, mask, True)
    return hi, lo, rstd


@triton.jit(do_not_specialize=["weight_rows", "bias_rows", "STATS_N", "n_0", "block_0", "tiles", "SET_C", "U", "N", "C", "D", "S", "T", "CHUNK"])
def _split_bwd_kernel(
    dy_ptr, x_ptr, stats_ptr, means_ptr, weight_ptr, bias_ptr, residual_ptr, partials_ptr, dx_ptr, dresidual_ptr, counters_ptr,
    weight_rows, bias_rows, STATS_N, n_0, block_0, tiles, SET_C, U, N, C, D, S, T, CHUNK, slope: "fp64",
    ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, V: tl.constexpr, SIDE: tl.constexpr, LARGE: tl.constexpr,
    STEPS: tl.constexpr, OUTER: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    FOLD: tl.constexpr, BLOCK_P: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """partials, dx and dresidual, each unless None."""
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    POLICY: tl.constexpr = ("evict_last" if STEP == PARTS else "evict_first") if LARGE else ""
    C = whole(C, V, CHANNELS_LAST)
    S = whole(S, V, not CHANNELS_LAST and not SIDE)
    G, count = C // D, (D.to(tl.int64) * S).to(ACC)
    team, member = SET_C * U, tl.program_id(0) % (SET_C * U)
    slope = tl.full((), slope, ACC)
    begin, end, step = number_tiles(tiles, STEP)
    for i in range(begin, end, step):
        n, t, c_0, c_set = tile(number(i, tiles, STEP), n_0, block_0, C, U, SET_C, CHANNELS_LAST, BLOCK_C, STEP)
        c, live, offset, mask, offset_side, mask_side, _, _ = place_tile(n, t, 0, c_0, C, S, STEPS, CHANNELS_LAST, V, SIDE, OUTER, BLOCK_C, BLOCK_S)
        weight = load_affine(weight_ptr, n * weight_rows * C + c, live, 1.0, ACC)
        bias = load_affine(bias_ptr, n * bias_rows * C + c, live, 0.0, ACC)
        row, rows = tl.minimum(n, STATS_N - 1) * G + c // D, STATS_N * G
        hi, lo, rstd = load_stats(stats_ptr, row, rows, live, True)
        c2, c3 = None, None
        if STEP != MEET and FOLD:
            c2, c3 = merge_coefficients(partials_ptr, weight_ptr, n, c_0, rstd, count, weight_rows, N, T, C, D, ACC, BLOCK_P)
        elif STEP != MEET and means_ptr is not None:
            c2, c3 = load_coefficients(means_ptr, row, rows, live, rstd)
        factor = rstd * weight
        all_dt = tl.zeros((OUTER, BLOCK_C, BLOCK_S), ACC)
        all_dt_xhat = tl.zeros((OUTER, BLOCK_C, BLOCK_S), ACC)
        x_hat, dt = all_dt, all_dt
        dt_side = tl.zeros((1, BLOCK_C, 2 * V), ACC)
        x_hat_side = dt_side
        last = count_tiles(t, S, STEPS, OUTER * BLOCK_S)
        for j in tl.range(0, last, num_stages=3 if STEPS > 1 and STEP == PARTS else 1):
            _, _, at, inside, at_side, inside_side, _, _ = place_tile(n, t, j, c_0, C, S, STEPS, CHANNELS_LAST, V, SIDE, OUTER, BLOCK_C, BLOCK_S)
            x_hat, dt = backward_of(dy_ptr, x_ptr, at, inside, residual_ptr, hi, lo, rstd, weight, bias, slope, ACTIVATION, ACC, POLICY)
            all_dt += dt
            all_dt_xhat += dt * x_hat
            if SIDE:
                x_hat_side, dt_side = backward_of(
                    dy_ptr, x_ptr, at_side, inside_side, residual_ptr, hi, lo, rstd, weight, bias, slope, ACTIVATION, ACC, POLICY
                )
            if STEP == APPLY or STEP == WHOLE:
                store_gradients(x_hat, dt, dt, at, inside, None, dx_ptr, dresidual_ptr, factor, c2, c3, POLICY)
                if SIDE:
                    store_gradients(x_hat_side, dt_side, dt_side, at_side, inside_side, None, dx_ptr, dresidual_ptr, factor, c2, c3, POLICY)
        if partials_ptr is not None and STEP != APPLY:
            sum_dt, sum_dt_xhat = total(all_dt, False, OUTER), total(all_dt_xhat, False, OUTER)
            if SIDE:
                sum_dt += total(dt_side, False, 1)
                sum_dt_xhat += total(dt_side * x_hat_side, False, 1)
            out = partials_ptr + ((n * T + t) * C + c)
            tl.store(out, sum_dt_xhat, live)
            tl.store(out + N.to(tl.int64) * T * C, sum_dt, live)
        if STEP == MEET:
            meet(counters_ptr + tl.program_id(0) // team * SPACING, member, team)
            if FOLD:
                c2, c3 = merge_coefficients(partials_ptr, weight_ptr, n, c_0, rstd, count, weight_rows, N, T, C, D, ACC, BLOCK_P)
            else:
                for k in range(member, SET_C * BLOCK_C // D, team):
                    g = c_set // D + k
                    if g < G:
                        Q, P = merge_sums(partials_ptr, weight_ptr, n, g, weight_rows, N, T, C, D, ACC, BLOCK_P)
                        tl.store(means_ptr + n * G + g, Q / count)
                        tl.store(means_ptr + N * G + n * G + g, P / count)
                meet(counters_ptr + tl.program_id(0) // team * SPACING, member, team)
                c2, c3 = load_coefficients(means_ptr, row, rows, live, rstd)
            store_gradients(x_hat, dt, dt, offset, mask, None, dx_ptr, dresidual_ptr, factor, c2, c3, POLICY)
            if SIDE:
                store_gradients(x_hat_side, dt_side, dt_side, offset_side, mask_side, None, dx_ptr, dresidual_ptr, factor, c2, c3, POLICY)


@triton.jit
def merge_coefficients(partials_ptr, weight_ptr, n, c_0, rstd, count, weight_rows, N, T, C, D, ACC: tl.constexpr, BLOCK_P: tl.constexpr):
    """c2, c3 of the group of channel c_0 from all its partials."""
    g = tl.minimum(c_0, C - 1) // D
    Q, P = merge_sums(partials_ptr, weight_ptr, n, g, weight_rows, N, T, C, D, ACC, BLOCK_P)
    return -rstd * (Q / count), -rstd * (P / count)


@triton.jit
def merge_sums(partials_ptr, weight_ptr, n, g, weight_rows, N, T, C, D, ACC: tl.constexpr, BLOCK_P: tl.constexpr):
    """sum weight sum_dt_xhat and sum weight sum_dt over the T D partials of group g."""
    Q = tl.zeros((), ACC)
    P = tl.zeros((), ACC)
    for p in range(0, T * D, BLOCK_P):
        i = p + tl.arange(0, BLOCK_P)
        c = g * D + i % D
        offset, mask = (n * T + i // D) * C + c, i < T * D
        weight = load_affine(weight_ptr, n * weight_rows * C + c, mask, 1.0, ACC)
        Q += tl.sum(weight * load(partials_ptr, offset, mask, ACC), axis=0)
        P += tl.sum(weight * load(partials_ptr + N.to(tl.int64) * T * C, offset, mask, ACC), axis=0)
    return Q, P


@triton.jit(do_not_specialize=["weight_rows", "N", "C", "D", "S", "T"])
def _fold_sums_kernel(
    partials_ptr, weight_ptr, sum_dt_xhat_ptr, sum_dt_ptr, means_ptr, weight_rows, N, C, D, S, T,
    BLOCK_T: tl.constexpr, GROUPS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = partials_ptr.dtype.element_ty
    G = C // D
    blocks = tl.cdiv(G, GROUPS)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    g = tl.program_id(0) % blocks * GROUPS + tl.arange(0, GROUPS)[None, :, None]
    stride_k = N.to(tl.int64) * T * C
    Q = tl.zeros((1, GROUPS, BLOCK_D), ACC)
    P = tl.zeros((1, GROUPS, BLOCK_D), ACC)
    for d_0 in range(0, D, BLOCK_D):
        d = d_0 + tl.arange(0, BLOCK_D)[None, None, :]
        c, live = g * D + d, (g < G) & (d < D)
        sum_dt = tl.zeros((1, GROUPS, BLOCK_D), ACC)
        sum_dt_xhat = tl.zeros((1, GROUPS, BLOCK_D), ACC)
        for t_0 in range(0, T, BLOCK_T):
            t = t_0 + tl.arange(0, BLOCK_T)[:, None, None]
            offset, mask = (n * T + t) * C + c, (t < T) & live
            sum_dt_xhat += tl.sum(load(partials_ptr, offset, mask, ACC), axis=0, keep_dims=True)
            sum_dt += tl.sum(load(partials_ptr + stride_k, offset, mask, ACC), axis=0, keep_dims=True)
        if sum_dt_xhat_ptr is not None:
            tl.store(sum_dt_xhat_ptr + (n * C + c), narrow(sum_dt_xhat, sum_dt_xhat_ptr.dtype.element_ty), live)
        if sum_dt_ptr is not None:
            tl.store(sum_dt_ptr + (n * C + c), narrow(sum_dt, sum_dt_ptr.dtype.element_ty), live)
        weight = load_affine(weight_ptr, n * weight_rows * C + c, live, 1.0, ACC)
        Q += weight * sum_dt_xhat
        P += weight * sum_dt
    row = n * G + g
    count = (D.to(tl.int64) * S).to(ACC)
    tl.store(means_ptr + row, tl.sum(Q, axis=2, keep_dims=True) / count, g < G)
    tl.store(means_ptr + N * G + row, tl.sum(P, axis=2, keep_dims=True) / count, g < G)
