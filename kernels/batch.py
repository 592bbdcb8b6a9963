"""Batch norm by tiles of several samples: where one program holds channels of all samples, and where samples are small.

A tile is [ROWS samples, BLOCK_C channels, BLOCK_S >= S positions]. Channels last, every position is a sample of its own: S = 1.
    forward     hi, lo, rstd over a channel of all samples        t = x_hat weight + bias (+ residual)        y = act(t)
    backward    dt = dy act'(t)     dweight, dbias = sum_dt_xhat, sum_dt over a channel of all samples     dresidual = dt
                means = weight/(N S) sum_dt_xhat, weight/(N S) sum_dt     c2, c3 = -rstd means     dx = rstd weight dt + c2 x_hat + c3
    stats (4, C) = hi, lo, rstd, unbiased variance    running_mean, running_var (C,) += momentum (value - running)
WHOLE: a program holds all samples of its channels. PARTS: partials (3, T, C) = hi, lo, root_M2 or (2, T, C) = sum_dt_xhat, sum_dt of ROWS
samples each, T = ceil(N / ROWS), which kernels of split.py fold. MEET, FOLD: each program merges all partials of its channels itself, otherwise
they share the channels and meet again.
"""

import triton
import triton.language as tl

from .algebra import load, load_affine, load_stats, merge_moments, moments, narrow, store_batch, store_stats, total, whole
from .elementwise import backward_of, forward_of, load_coefficients, store_gradients
from .exchange import APPLY, MEET, PARTS, SPACING, WHOLE, meet, number, number_tiles


@triton.jit
def place_samples(
    pid, N, C, S, CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, FULL: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Where tile `pid` begins, offsets in it and their mask; its first channel, its channels, which of them
    exist, where their first values are; chunk and number of samples. FULL: ROWS divides N."""
    T, blocks = tl.cdiv(N, ROWS), tl.cdiv(C, BLOCK_C)
    t, block = pid // blocks, pid % blocks
    if STEP == MEET:  # a team's tiles follow each other
        t, block = pid % T, pid // T
    c_0 = block * BLOCK_C
    i, c, s = tl.arange(0, ROWS)[:, None, None], tl.arange(0, BLOCK_C)[None, :, None], tl.arange(0, BLOCK_S)[None, None, :]
    stride_c = 1 if CHANNELS_LAST else S
    start = t.to(tl.int64) * ROWS * C * S + c_0.to(tl.int64) * stride_c
    mask = (c_0 + c < C) & (s < S)
    if not FULL:
        mask = mask & (i < N - t * ROWS)
    # Within the tile int32 is enough.
    return start, i * (C * S) + c * stride_c + s, mask, c_0, c_0 + c, c_0 + c < C, c * stride_c, t, tl.minimum(N - t * ROWS, ROWS)


@triton.jit
def merge_channels(
    partials_ptr, stats_ptr, running_mean_ptr, running_var_ptr, c, mask, N, C, S, eps, momentum, ROWS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """hi, lo, rstd of the channels c [1, .] from all their partials, stored where `mask`."""
    T = tl.cdiv(N, ROWS)
    one = tl.full((), 1, tl.int32)
    stride_k, S_all = T.to(tl.int64) * C, N.to(tl.int64) * S
    hi, lo, M2, scale, count = merge_moments(partials_ptr, c, c < C, stride_k, T, None, C, one, S_all, ROWS * S, BLOCK_P)
    return hi, lo, store_batch(stats_ptr, running_mean_ptr, running_var_ptr, c, C, hi, lo, M2, scale, count, eps, momentum, mask)


@triton.jit
def merge_sums(partials_ptr, c, mask, T, C, BLOCK_P: tl.constexpr):
    """sum_dt_xhat, sum_dt of the channels c [1, .] from all their partials."""
    ACC: tl.constexpr = partials_ptr.dtype.element_ty
    sum_dt_xhat, sum_dt = tl.zeros(c.shape, ACC), tl.zeros(c.shape, ACC)
    for p in range(0, T, BLOCK_P):
        t = p + tl.arange(0, BLOCK_P)[:, None]
        offset = t.to(tl.int64) * C + c
        sum_dt_xhat += tl.sum(load(partials_ptr, offset, (t < T) & mask, ACC), axis=0, keep_dims=True)
        sum_dt += tl.sum(load(partials_ptr + T.to(tl.int64) * C, offset, (t < T) & mask, ACC), axis=0, keep_dims=True)
    return sum_dt_xhat, sum_dt


@triton.jit(do_not_specialize=["tiles", "N", "C", "S"])
def _batch_norm_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr, stats_ptr, running_mean_ptr, running_var_ptr, partials_ptr, counters_ptr,
    tiles, N, C, S, eps: "fp64", momentum: "fp64", slope: "fp64",
    ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, V: tl.constexpr, LARGE: tl.constexpr,
    ROWS: tl.constexpr, FULL: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, FOLD: tl.constexpr, BLOCK_P: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    POLICY: tl.constexpr = ("evict_last" if STEP == PARTS else "evict_first") if LARGE else ""
    C, S = whole(C, V, CHANNELS_LAST), whole(S, V, not CHANNELS_LAST)
    T = tl.cdiv(N, ROWS)
    counter, member = counters_ptr + tl.program_id(0) // T * SPACING if STEP == MEET else None, tl.program_id(0) % T
    slope = tl.full((), slope, ACC)
    begin, end, step = number_tiles(tiles, STEP)
    for i in range(begin, end, step):
        pid = number(i, tiles, STEP)
        start, offset, mask, c_0, c, live, some, t, rows = place_samples(pid, N, C, S, CHANNELS_LAST, ROWS, FULL, BLOCK_C, BLOCK_S, STEP)
        x = load(x_ptr + start, offset, mask, ACC, POLICY)
        if STEP != PARTS:
            weight = load_affine(weight_ptr, c, live, 1.0, ACC)
            bias = load_affine(bias_ptr, c, live, 0.0, ACC)
        if STEP != APPLY:
            count = (rows * S).to(ACC)
            d, d_side, own, lo, M2, scale = moments(x, mask, x, mask, load(x_ptr + start, some, live, ACC), count, True, False, False, ROWS)
            if STEP == WHOLE:
                hi = own
                rstd = store_batch(stats_ptr, running_mean_ptr, running_var_ptr, c, C, hi, lo, M2, scale, count, eps, momentum, live)
            else:
                store_stats(partials_ptr, t.to(tl.int64) * C + c, T.to(tl.int64) * C, own, lo, tl.sqrt(M2) / scale, live, True)
        if STEP == MEET:
            running = (running_mean_ptr, running_var_ptr)
            meet(counter, member, T)
            if FOLD:
                k = c_0 + tl.arange(0, BLOCK_C)[None, :]
                mine = k < tl.where(member == 0, C, 0)
                hi, lo, rstd = merge_channels(partials_ptr, stats_ptr, *running, k, mine, N, C, S, eps, momentum, ROWS, BLOCK_P)
                hi, lo, rstd = hi[:, :, None], lo[:, :, None], rstd[:, :, None]
            else:
                for channel in range(c_0 + member, tl.minimum(c_0 + BLOCK_C, C), T):
                    k = channel + tl.zeros((1, 1), tl.int32)
                    merge_channels(partials_ptr, stats_ptr, *running, k, k < C, N, C, S, eps, momentum, ROWS, BLOCK_P)
                meet(counter, member, T)
        if STEP == APPLY or STEP == MEET and not FOLD:
            hi, lo, rstd = load_stats(stats_ptr, c, C, live, True)
        if STEP != PARTS and y_ptr is not None:
            d = x - hi if STEP == APPLY else d + (own - hi) if STEP == MEET else d
            forward_of(
                d, offset, mask, None if residual_ptr is None else residual_ptr + start, y_ptr + start, lo, rstd, weight, bias, slope, ACTIVATION,
                ACC, POLICY,
            )  # fmt: skip


@triton.jit(do_not_specialize=["tiles", "N", "C", "S"])
def _batch_norm_bwd_kernel(
    dy_ptr, x_ptr, stats_ptr, weight_ptr, bias_ptr, residual_ptr, means_ptr, dx_ptr, dweight_ptr, dbias_ptr, dresidual_ptr, partials_ptr,
    counters_ptr, tiles, N, C, S, slope: "fp64",
    ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, V: tl.constexpr, LARGE: tl.constexpr,
    ROWS: tl.constexpr, FULL: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, FOLD: tl.constexpr, BLOCK_P: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    POLICY: tl.constexpr = ("evict_last" if STEP == PARTS else "evict_first") if LARGE else ""
    C, S = whole(C, V, CHANNELS_LAST), whole(S, V, not CHANNELS_LAST)
    T, n = tl.cdiv(N, ROWS), (N.to(tl.int64) * S).to(ACC)
    counter, member = counters_ptr + tl.program_id(0) // T * SPACING if STEP == MEET else None, tl.program_id(0) % T
    slope = tl.full((), slope, ACC)
    begin, end, step = number_tiles(tiles, STEP)
    for i in range(begin, end, step):
        pid = number(i, tiles, STEP)
        start, offset, mask, c_0, c, live, some, t, rows = place_samples(pid, N, C, S, CHANNELS_LAST, ROWS, FULL, BLOCK_C, BLOCK_S, STEP)
        weight = load_affine(weight_ptr, c, live, 1.0, ACC)
        bias = load_affine(bias_ptr, c, live, 0.0, ACC)
        hi, lo, rstd = load_stats(stats_ptr, c, C, live, True)
        x_hat, dt = backward_of(
            dy_ptr + start, x_ptr + start, offset, mask, None if residual_ptr is None else residual_ptr + start, hi, lo, rstd, weight, bias, slope,
            ACTIVATION, ACC, POLICY,
        )  # fmt: skip
        if STEP != APPLY:
            sum_dt_xhat, sum_dt = total(dt * x_hat, False, ROWS), total(dt, False, ROWS)
            if STEP == WHOLE:
                store_parameters(dweight_ptr, dbias_ptr, c, sum_dt_xhat, sum_dt, live)
            else:
                out = partials_ptr + (t.to(tl.int64) * C + c)
                tl.store(out, sum_dt_xhat, live)
                tl.store(out + T.to(tl.int64) * C, sum_dt, live)
        if STEP == MEET:
            meet(counter, member, T)
            if FOLD:
                k = c_0 + tl.arange(0, BLOCK_C)[None, :]
                sum_dt_xhat, sum_dt = merge_sums(partials_ptr, k, k < C, T, C, BLOCK_P)
                store_parameters(dweight_ptr, dbias_ptr, k, sum_dt_xhat, sum_dt, k < tl.where(member == 0, C, 0))
                sum_dt_xhat, sum_dt = sum_dt_xhat[:, :, None], sum_dt[:, :, None]
            else:
                for channel in range(c_0 + member, tl.minimum(c_0 + BLOCK_C, C), T):
                    k = channel + tl.zeros((1, 1), tl.int32)
                    Q, P = merge_sums(partials_ptr, k, k < C, T, C, BLOCK_P)
                    store_parameters(dweight_ptr, dbias_ptr, k, Q, P, k < C)
                    share = load_affine(weight_ptr, k, k < C, 1.0, ACC) / n
                    tl.store(means_ptr + k, share * Q, k < C)
                    tl.store(means_ptr + C + k, share * P, k < C)
                meet(counter, member, T)
        if STEP != PARTS:
            if STEP == APPLY or STEP == MEET and not FOLD:
                c2, c3 = load_coefficients(means_ptr, c, C, live, rstd)
            else:
                factor = -rstd * weight / n
                c2, c3 = factor * sum_dt_xhat, factor * sum_dt
            store_gradients(
                x_hat, dt, dt, offset, mask, None, None if dx_ptr is None else dx_ptr + start,
                None if dresidual_ptr is None else dresidual_ptr + start, rstd * weight, c2, c3, POLICY,
            )  # fmt: skip


@triton.jit
def store_parameters(dweight_ptr, dbias_ptr, c, sum_dt_xhat, sum_dt, mask):
    if dweight_ptr is not None:
        tl.store(dweight_ptr + c, narrow(sum_dt_xhat, dweight_ptr.dtype.element_ty), mask)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + c, narrow(sum_dt, dbias_ptr.dtype.element_ty), mask)
