"""Batch norm by tiles of several samples: where one program holds channels of all samples, and where samples are small.

A tile is [ROWS samples, BLOCK_C channels, BLOCK_S >= S positions]. Channels last, every position is a sample of its own: S = 1.
    forward     hi, lo, rstd over a channel of all samples        t = x_hat weight + bias (+ residual)        y = act(t)
    backward    dt = dy act'(t)     dweight, dbias = sum_dt_xhat, sum_dt over a channel of all samples     dresidual = dt
                means = weight/(N S) sum_dt_xhat, weight/(N S) sum_dt     c2, c3 = -rstd means     dx = rstd weight dt + c2 x_hat + c3
    stats (4, C) = hi, lo, rstd, unbiased variance    running_mean, running_var (C,) += momentum (value - running)
STEPs:
    WHOLE    a program holds all samples of its channels: one reading
    PARTS    moments or sums of ROWS samples: partials (3, T, C) = hi, lo, root_M2 or (2, T, C) = sum_dt_xhat, sum_dt, T = ceil(N / ROWS),
             which kernels of split.py fold
    APPLY    y with given stats, dx and dresidual with given means
"""

import triton
import triton.language as tl

from .algebra import load, load_affine, load_stats, moments, narrow, store_batch, store_stats, total, whole
from .elementwise import backward_of, forward_of, load_coefficients, store_gradients
from .rows import APPLY, PARTS


@triton.jit
def place_samples(
    N, C, S, CHANNELS_LAST: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, FULL: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Where a tile begins, offsets in it and their mask; its channels, which of them exist, where their first values are; chunk and number
    of samples; C, S. FULL: ROWS divides N."""
    pid = tl.num_programs(0) - 1 - tl.program_id(0) if STEP == APPLY else tl.program_id(0)
    C, S = whole(C, V, CHANNELS_LAST), whole(S, V, not CHANNELS_LAST)
    blocks = tl.cdiv(C, BLOCK_C)
    t, c_0 = pid // blocks, pid % blocks * BLOCK_C
    i, c, s = tl.arange(0, ROWS)[:, None, None], tl.arange(0, BLOCK_C)[None, :, None], tl.arange(0, BLOCK_S)[None, None, :]
    stride_c = 1 if CHANNELS_LAST else S
    start = t.to(tl.int64) * ROWS * C * S + c_0.to(tl.int64) * stride_c
    mask = (c_0 + c < C) & (s < S)
    if not FULL:
        mask = mask & (i < N - t * ROWS)
    # Within the tile int32 is enough.
    return start, i * (C * S) + c * stride_c + s, mask, c_0 + c, c_0 + c < C, c * stride_c, t, tl.minimum(N - t * ROWS, ROWS), C, S


@triton.jit(do_not_specialize=["N", "C", "S"])
def _batch_norm_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr, stats_ptr, running_mean_ptr, running_var_ptr, partials_ptr,
    N, C, S, eps: "fp64", momentum: "fp64", slope: "fp64",
    ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, V: tl.constexpr, LARGE: tl.constexpr,
    ROWS: tl.constexpr, FULL: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    POLICY: tl.constexpr = ("evict_first" if STEP == APPLY else "evict_last") if LARGE else ""
    start, offset, mask, c, live, first, t, rows, C, S = place_samples(N, C, S, CHANNELS_LAST, V, ROWS, FULL, BLOCK_C, BLOCK_S, STEP)
    x_ptr += start
    if residual_ptr is not None:
        residual_ptr += start
    if y_ptr is not None:
        y_ptr += start
    x = load(x_ptr, offset, mask, ACC, POLICY)
    if STEP != PARTS:
        weight = load_affine(weight_ptr, c, live, 1.0, ACC)
        bias = load_affine(bias_ptr, c, live, 0.0, ACC)
    if STEP == APPLY:
        hi, lo, rstd = load_stats(stats_ptr, c, C, live, True)
        d = x - hi
    else:
        some = load(x_ptr, first, live, ACC)
        count = (rows * S).to(ACC)
        d, d_side, hi, lo, M2, scale = moments(x, mask, x, mask, some, count, True, False, False, ROWS)
        if STEP == PARTS:
            store_stats(partials_ptr, t.to(tl.int64) * C + c, tl.cdiv(N, ROWS).to(tl.int64) * C, hi, lo, tl.sqrt(M2) / scale, live, True)
        else:
            rstd = store_batch(stats_ptr, running_mean_ptr, running_var_ptr, c, C, hi, lo, M2, scale, count, eps, momentum, live)
    if STEP != PARTS and y_ptr is not None:
        forward_of(d, offset, mask, residual_ptr, y_ptr, lo, rstd, weight, bias, tl.full((), slope, ACC), ACTIVATION, ACC, POLICY)


@triton.jit(do_not_specialize=["N", "C", "S"])
def _batch_norm_bwd_kernel(
    dy_ptr, x_ptr, stats_ptr, weight_ptr, bias_ptr, residual_ptr, means_ptr, dx_ptr, dweight_ptr, dbias_ptr, dresidual_ptr, partials_ptr,
    N, C, S, slope: "fp64",
    ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, V: tl.constexpr, LARGE: tl.constexpr,
    ROWS: tl.constexpr, FULL: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    POLICY: tl.constexpr = ("evict_first" if STEP == APPLY else "evict_last") if LARGE else ""
    start, offset, mask, c, live, first, t, rows, C, S = place_samples(N, C, S, CHANNELS_LAST, V, ROWS, FULL, BLOCK_C, BLOCK_S, STEP)
    dy_ptr += start
    x_ptr += start
    if residual_ptr is not None:
        residual_ptr += start
    if dx_ptr is not None:
        dx_ptr += start
    if dresidual_ptr is not None:
        dresidual_ptr += start
    weight = load_affine(weight_ptr, c, live, 1.0, ACC)
    bias = load_affine(bias_ptr, c, live, 0.0, ACC)
    hi, lo, rstd = load_stats(stats_ptr, c, C, live, True)
    slope = tl.full((), slope, ACC)
    x_hat, dt = backward_of(dy_ptr, x_ptr, offset, mask, residual_ptr, hi, lo, rstd, weight, bias, slope, ACTIVATION, ACC, POLICY)
    if STEP == APPLY:
        c2, c3 = load_coefficients(means_ptr, c, C, live, rstd)
    else:
        sum_dt_xhat = total(dt * x_hat, False, ROWS)
        sum_dt = total(dt, False, ROWS)
        if STEP == PARTS:
            out = partials_ptr + (t.to(tl.int64) * C + c)
            tl.store(out, sum_dt_xhat, live)
            tl.store(out + tl.cdiv(N, ROWS).to(tl.int64) * C, sum_dt, live)
        else:
            if dweight_ptr is not None:
                tl.store(dweight_ptr + c, narrow(sum_dt_xhat, dweight_ptr.dtype.element_ty), live)
            if dbias_ptr is not None:
                tl.store(dbias_ptr + c, narrow(sum_dt, dbias_ptr.dtype.element_ty), live)
            factor = -rstd * weight / (rows * S).to(ACC)
            c2, c3 = factor * sum_dt_xhat, factor * sum_dt
    if STEP != PARTS:
        store_gradients(x_hat, dt, dt, offset, mask, None, dx_ptr, dresidual_ptr, rstd * weight, c2, c3, POLICY)
