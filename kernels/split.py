"""Group norm in steps over tiles of 16 to 32 KB, for groups that do not fit one program and for given statistics: moments, fold, apply.

The grid is all tiles [BLOCK_C channels, BLOCK_S positions] of all samples, however few groups there are; T = ceil(S / BLOCK_S).
    forward     moments  partials (3, N, T, C) = hi, lo, root_M2 of each channel's BLOCK_S positions
                fold     stats (3, N, G) = hi, lo, rstd of each group: its T D partials merged (skipped if FOLD in apply)
                apply    y = act(x_hat weight + bias (+ residual))
    backward    sums     partials (2, N, T, C) = sum_dt_xhat, sum_dt
                fold     sums (2, N, C): over t; means (2, N, G) = 1/(D S) sum_c weight sum_dt_xhat, 1/(D S) sum_c weight sum_dt
                apply    dx = rstd weight dt + c2 x_hat + c3     c2, c3 = -rstd means     dresidual = dt
Frozen statistics, given as (3, STATS_N, G) with STATS_N = 1 or N, leave one reading each: forward apply, backward sums and apply in one
pass, where c2 = c3 = 0 unless means are given too. Sums and apply of backward are one kernel.
The second reading of a tensor runs in the reverse order of the first, so that what the cache still holds is met first.
LARGE (it does not all fit the cache): keep what is read first, let go of what is read last and of the outputs.
"""

import triton
import triton.language as tl

from .algebra import inverse_std, load, load_affine, load_stats, merge_moments, moments, narrow, place, store_batch, store_stats, total, whole
from .elementwise import backward_of, forward_of, load_coefficients, store_gradients


@triton.jit
def tile(pid, C, T, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sample, chunk of positions and first channel of a program. Neighbours in the grid are neighbours in memory."""
    blocks = tl.cdiv(C, BLOCK_C)
    if CHANNELS_LAST:
        block, t = pid % blocks, pid // blocks % T
    else:
        t, block = pid % T, pid // T % blocks
    return (pid // (T * blocks)).to(tl.int64), t, block * BLOCK_C


@triton.jit
def place_tile(
    n, t, c_0, C, S, CHANNELS_LAST: tl.constexpr, V: tl.constexpr, SIDE: tl.constexpr,
    OUTER: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Channels and which of them exist, offsets and masks of main and side lanes, positions, offset of each channel's first."""
    stride_c, stride_s = (1, C) if CHANNELS_LAST else (S, 1)
    s_0 = t.to(tl.int64) * (OUTER * BLOCK_S)
    length = tl.minimum(S - s_0, OUTER * BLOCK_S).to(tl.int32)
    base = n * C * S + c_0.to(tl.int64) * stride_c + s_0 * stride_s
    i = tl.arange(0, BLOCK_C)[None, :, None]
    live = c_0 + i < C
    offset, mask, offset_side, mask_side = place(base, i, length, stride_c, stride_s, OUTER, BLOCK_S, V, SIDE)
    return c_0 + i, live, offset, mask & live, offset_side, mask_side & live, length, base + i * stride_c


@triton.jit(do_not_specialize=["N", "C", "S", "T"])
def _moments_kernel(
    x_ptr, partials_ptr, N, C, S, T,
    CHANNELS_LAST: tl.constexpr, V: tl.constexpr, SIDE: tl.constexpr, LARGE: tl.constexpr,
    OUTER: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = partials_ptr.dtype.element_ty
    POLICY: tl.constexpr = "evict_last" if LARGE else ""
    C = whole(C, V, CHANNELS_LAST)
    S = whole(S, V, not CHANNELS_LAST and not SIDE)
    n, t, c_0 = tile(tl.program_id(0), C, T, CHANNELS_LAST, BLOCK_C)
    c, live, offset, mask, offset_side, mask_side, length, first = place_tile(n, t, c_0, C, S, CHANNELS_LAST, V, SIDE, OUTER, BLOCK_C, BLOCK_S)
    x = load(x_ptr, offset, mask, ACC, POLICY)
    x_side = load(x_ptr, offset_side, mask_side, ACC, POLICY) if SIDE else x
    some = load(x_ptr, first, live, ACC)
    d, d_side, hi, lo, M2, scale = moments(x, mask, x_side, mask_side, some, length.to(ACC), True, False, SIDE, OUTER)
    out = partials_ptr + ((n * T + t) * C + c)
    stride_k = N.to(tl.int64) * T * C
    tl.store(out, hi, live)
    tl.store(out + stride_k, lo, live)
    tl.store(out + 2 * stride_k, tl.sqrt(M2) / scale, live)


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


@triton.jit(do_not_specialize=["weight_rows", "bias_rows", "STATS_N", "N", "C", "D", "S", "T"])
def _apply_kernel(
    x_ptr, partials_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr, stats_ptr,
    weight_rows, bias_rows, STATS_N, N, C, D, S, T, eps: "fp64", slope: "fp64",
    ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, V: tl.constexpr, SIDE: tl.constexpr, LARGE: tl.constexpr,
    OUTER: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, FOLD: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """FOLD: a tile lies in one group, and each program merges that group's few partials itself."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    POLICY: tl.constexpr = "evict_first" if LARGE else ""
    C = whole(C, V, CHANNELS_LAST)
    S = whole(S, V, not CHANNELS_LAST and not SIDE)
    n, t, c_0 = tile(tl.num_programs(0) - 1 - tl.program_id(0), C, T, CHANNELS_LAST, BLOCK_C)
    c, live, offset, mask, offset_side, mask_side, length, first = place_tile(n, t, c_0, C, S, CHANNELS_LAST, V, SIDE, OUTER, BLOCK_C, BLOCK_S)
    weight = load_affine(weight_ptr, n * weight_rows * C + c, live, 1.0, ACC)
    bias = load_affine(bias_ptr, n * bias_rows * C + c, live, 0.0, ACC)
    x = load(x_ptr, offset, mask, ACC, POLICY)
    x_side = load(x_ptr, offset_side, mask_side, ACC, POLICY) if SIDE else x
    G = C // D
    if FOLD:
        g = c_0 // D + tl.zeros((1, 1), tl.int32)
        live_g = tl.full((1, 1), True, tl.int1)
        start, stride_k = n * T * C + g * D, N.to(tl.int64) * T * C
        hi, lo, M2, scale, count = merge_moments(partials_ptr, start, live_g, stride_k, T, None, C, D, S, OUTER * BLOCK_S, BLOCK_P)
        rstd = inverse_std(M2, scale, count, tl.full((), eps, ACC))
        if stats_ptr is not None:
            store_stats(stats_ptr, n * G + g, N * G, hi, lo, rstd, g * D == c_0 + t * C, True)
        hi, lo, rstd = hi[:, :, None], lo[:, :, None], rstd[:, :, None]
    else:
        hi, lo, rstd = load_stats(stats_ptr, tl.minimum(n, STATS_N - 1) * G + c // D, STATS_N * G, live, True)
    slope = tl.full((), slope, ACC)
    forward_of(x - hi, offset, mask, residual_ptr, y_ptr, lo, rstd, weight, bias, slope, ACTIVATION, ACC, POLICY)
    if SIDE:
        forward_of(x_side - hi, offset_side, mask_side, residual_ptr, y_ptr, lo, rstd, weight, bias, slope, ACTIVATION, ACC, POLICY)


@triton.jit(do_not_specialize=["weight_rows", "bias_rows", "STATS_N", "N", "C", "D", "S", "T"])
def _backward_kernel(
    dy_ptr, x_ptr, stats_ptr, means_ptr, weight_ptr, bias_ptr, residual_ptr, partials_ptr, dx_ptr, dresidual_ptr,
    weight_rows, bias_rows, STATS_N, N, C, D, S, T, slope: "fp64",
    ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, V: tl.constexpr, SIDE: tl.constexpr, LARGE: tl.constexpr,
    OUTER: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Partials, dx and dresidual, each unless None. LAST: x is not read again."""
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    POLICY: tl.constexpr = ("evict_first" if LAST else "evict_last") if LARGE else ""
    C = whole(C, V, CHANNELS_LAST)
    S = whole(S, V, not CHANNELS_LAST and not SIDE)
    pid = tl.num_programs(0) - 1 - tl.program_id(0) if LAST else tl.program_id(0)
    n, t, c_0 = tile(pid, C, T, CHANNELS_LAST, BLOCK_C)
    c, live, offset, mask, offset_side, mask_side, length, first = place_tile(n, t, c_0, C, S, CHANNELS_LAST, V, SIDE, OUTER, BLOCK_C, BLOCK_S)
    weight = load_affine(weight_ptr, n * weight_rows * C + c, live, 1.0, ACC)
    bias = load_affine(bias_ptr, n * bias_rows * C + c, live, 0.0, ACC)
    row, rows = tl.minimum(n, STATS_N - 1) * (C // D) + c // D, STATS_N * (C // D)
    hi, lo, rstd = load_stats(stats_ptr, row, rows, live, True)
    c2, c3 = None, None
    if means_ptr is not None:
        c2, c3 = load_coefficients(means_ptr, row, rows, live, rstd)
    slope = tl.full((), slope, ACC)
    x_hat, dt = backward_of(dy_ptr, x_ptr, offset, mask, residual_ptr, hi, lo, rstd, weight, bias, slope, ACTIVATION, ACC, POLICY)
    store_gradients(x_hat, dt, dt, offset, mask, None, dx_ptr, dresidual_ptr, rstd * weight, c2, c3, POLICY)
    sum_dt, sum_dt_xhat = total(dt, False, OUTER), total(dt * x_hat, False, OUTER)
    if SIDE:
        x_hat, dt = backward_of(dy_ptr, x_ptr, offset_side, mask_side, residual_ptr, hi, lo, rstd, weight, bias, slope, ACTIVATION, ACC, POLICY)
        store_gradients(x_hat, dt, dt, offset_side, mask_side, None, dx_ptr, dresidual_ptr, rstd * weight, c2, c3, POLICY)
        sum_dt += total(dt, False, 1)
        sum_dt_xhat += total(dt * x_hat, False, 1)
    if partials_ptr is not None:
        out = partials_ptr + ((n * T + t) * C + c)
        tl.store(out, sum_dt_xhat, live)
        tl.store(out + N.to(tl.int64) * T * C, sum_dt, live)


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
