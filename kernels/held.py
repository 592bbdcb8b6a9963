"""Group norm where one program holds whole groups on chip: x is read once and y written once; backward likewise.

A tile is [ROWS groups, BLOCK_C >= D channels, BLOCK_S >= S positions]; row r = n G + g.
    forward     t = x_hat weight + bias (+ residual)    y = act(t)
    backward    dt = dy act'(t)          sum_dt, sum_dt_xhat = sums over s of dt, dt x_hat, per channel
                c2 = -rstd/(D S) sum_c weight sum_dt_xhat     c3 = -rstd/(D S) sum_c weight sum_dt
                dx = rstd weight dt + c2 x_hat + c3           dresidual = dt
    x, y, dy, dx, residual, dresidual (N, C, S)    stats (3, N, G) = hi, lo, rstd    weight, bias (C,) or (N, C)
    sums (2, SLOTS, C) = sum_dt_xhat, sum_dt over samples slot, slot + SLOTS, slot + 2 SLOTS, ... in this order
Backward walks over samples so that many small samples do not leave a buffer of sums as large as x.
"""

import triton
import triton.language as tl

from .algebra import inverse_std, load, load_affine, load_stats, moments, place, store_stats, total, whole
from .elementwise import backward_of, forward_of, store_gradients


@triton.jit(do_not_specialize=["weight_rows", "bias_rows", "N", "G", "D", "S"])
def _group_norm_fwd_held_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr, stats_ptr,
    weight_rows, bias_rows, N, G, D, S, eps: "fp64", slope: "fp64",
    ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, V: tl.constexpr, SIDE: tl.constexpr,
    ROWS: tl.constexpr, OUTER: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    D = whole(D, V, CHANNELS_LAST)
    S = whole(S, V, not CHANNELS_LAST and not SIDE)
    stride_c, stride_s = (1, G * D) if CHANNELS_LAST else (S, 1)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None, None]
    n, g = (r // G).to(tl.int64), r % G
    c = tl.arange(0, BLOCK_C)[None, :, None]
    live = (r < N * G) & (c < D)
    base = n * (G * D) * S + g.to(tl.int64) * D * stride_c
    offset, mask, offset_side, mask_side = place(base, c, S, stride_c, stride_s, OUTER, BLOCK_S, V, SIDE)
    mask, mask_side = mask & live, mask_side & live

    x = load(x_ptr, offset, mask, ACC)
    x_side = load(x_ptr, offset_side, mask_side, ACC) if SIDE else x
    weight = load_affine(weight_ptr, (n * weight_rows * G + g) * D + c, live, 1.0, ACC)
    bias = load_affine(bias_ptr, (n * bias_rows * G + g) * D + c, live, 0.0, ACC)
    some = load(x_ptr, base, r < N * G, ACC)
    count = (D * S).to(ACC)
    d, d_side, hi, lo, M2, scale = moments(x, mask, x_side, mask_side, some, count, True, True, SIDE, OUTER)
    rstd = inverse_std(M2, scale, count, tl.full((), eps, ACC))
    if stats_ptr is not None:
        store_stats(stats_ptr, r, N * G, hi, lo, rstd, r < N * G, True)
    if y_ptr is not None:
        slope = tl.full((), slope, ACC)
        forward_of(d, offset, mask, residual_ptr, y_ptr, lo, rstd, weight, bias, slope, ACTIVATION, ACC, "")
        if SIDE:
            forward_of(d_side, offset_side, mask_side, residual_ptr, y_ptr, lo, rstd, weight, bias, slope, ACTIVATION, ACC, "")


@triton.jit(do_not_specialize=["weight_rows", "bias_rows", "N", "SLOTS", "G", "D", "S"])
def _group_norm_bwd_held_kernel(
    dy_ptr, x_ptr, stats_ptr, weight_ptr, bias_ptr, residual_ptr, dx_ptr, dresidual_ptr, sums_ptr,
    weight_rows, bias_rows, N, SLOTS, G, D, S, slope: "fp64",
    ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, V: tl.constexpr, SIDE: tl.constexpr,
    ROWS: tl.constexpr, OUTER: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    D = whole(D, V, CHANNELS_LAST)
    S = whole(S, V, not CHANNELS_LAST and not SIDE)
    stride_c, stride_s = (1, G * D) if CHANNELS_LAST else (S, 1)
    first_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None, None]
    slot, g = (first_r // G).to(tl.int64), first_r % G
    c = tl.arange(0, BLOCK_C)[None, :, None]
    in_slot = (first_r < SLOTS * G) & (c < D)
    weight = load_affine(weight_ptr, (slot * weight_rows * G + g) * D + c, in_slot, 1.0, ACC)
    bias = load_affine(bias_ptr, (slot * bias_rows * G + g) * D + c, in_slot, 0.0, ACC)
    count = (D * S).to(ACC)
    slope = tl.full((), slope, ACC)

    all_dt = tl.zeros((ROWS, BLOCK_C, 1), ACC)
    all_dt_xhat = tl.zeros((ROWS, BLOCK_C, 1), ACC)
    for n0 in range(0, N, SLOTS):
        n = slot + n0
        live = in_slot & (n < N)
        base = n * (G * D) * S + g.to(tl.int64) * D * stride_c
        offset, mask, offset_side, mask_side = place(base, c, S, stride_c, stride_s, OUTER, BLOCK_S, V, SIDE)
        mask, mask_side = mask & live, mask_side & live
        row = n * G + g
        row_mask = (first_r < SLOTS * G) & (n < N)
        hi, lo, rstd = load_stats(stats_ptr, row, N * G, row_mask, True)
        x_hat, dt = backward_of(dy_ptr, x_ptr, offset, mask, residual_ptr, hi, lo, rstd, weight, bias, slope, ACTIVATION, ACC, "")
        sum_dt, sum_dt_xhat = total(dt, False, OUTER), total(dt * x_hat, False, OUTER)
        if SIDE:
            x_hat_side, dt_side = backward_of(
                dy_ptr, x_ptr, offset_side, mask_side, residual_ptr, hi, lo, rstd, weight, bias, slope, ACTIVATION, ACC, ""
            )
            sum_dt += total(dt_side, False, 1)
            sum_dt_xhat += total(dt_side * x_hat_side, False, 1)
        all_dt += sum_dt
        all_dt_xhat += sum_dt_xhat
        c2 = -rstd / count * total(weight * sum_dt_xhat, True, OUTER)
        c3 = -rstd / count * total(weight * sum_dt, True, OUTER)
        store_gradients(x_hat, dt, dt, offset, mask, None, dx_ptr, dresidual_ptr, rstd * weight, c2, c3, "")
        if SIDE:
            store_gradients(x_hat_side, dt_side, dt_side, offset_side, mask_side, None, dx_ptr, dresidual_ptr, rstd * weight, c2, c3, "")
    if sums_ptr is not None:
        offset_c = first_r.to(tl.int64) * D + c
        tl.store(sums_ptr + offset_c, all_dt_xhat, in_slot)
        tl.store(sums_ptr + SLOTS.to(tl.int64) * G * D + offset_c, all_dt, in_slot)
