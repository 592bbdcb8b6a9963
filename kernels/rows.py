"""Layer norm, RMS norm and group norm of single positions: what shares a statistic are the D channels of one group of one position.

Memory: `segments` of `planes` planes of L rows each, C = G D channels a row; all rows of a segment share weight and bias. A statistic
belongs to (row, group). Rows are one position each: a plane is the rows of a segment, element (i, column) at i C + column. ACROSS: a
plane is one sample whose L positions are contiguous (channels first), element (i, column) at column L + i.
A tile is [ROWS, GROUPS, BLOCK] lanes: rows of one plane, neighbouring groups, channels of them; FULL: BLOCK = D. Chunks of ROWS
rows are numbered through the planes of a segment; T = ceil(L / ROWS) in a plane.
    forward     x = total = addend + x        t = x_hat (weight + weight_offset) + bias (+ residual)        y = act(t)
    backward    dt = dy act'(t)     g = weight dt     c2 = -rstd/D sum g x_hat     c3 = -rstd/D sum g (RMS: 0)     dresidual = dt
                dx = rstd g + c2 x_hat + c3 (+ dtotal)
    stats (3, rows, G) = hi, lo, rstd, or (1, rows, G) = rstd
    sums (2, segments P, C) = sum_dt_xhat, sum_dt of what each of the P programs of a segment met: chunk p, p + P, ... in this order
Where a program does not hold all D channels of its rows but `blocks` = ceil(D / BLOCK) of them are left to a loop or to others:
    forward     WHOLE    the program loops over the blocks twice: moments, then y; the second reading comes from cache
                PARTS    moments of one block: partials (3, rows, blocks, G), which _fold_moments_kernel merges
                APPLY    y of one block, stats given
    backward    PARTS    of one block sums as above, and partials (2, rows, G, blocks) = sum g x_hat, sum g
                APPLY    dx and dresidual of one block from all partials of the row
"""

import triton
import triton.language as tl

from .algebra import HUGE, inverse_std, load, load_affine, load_stats, moments, store_stats, two_sum, whole
from .elementwise import backward_of, forward_of, store_gradients
from .exchange import APPLY, PARTS, WHOLE, number


@triton.jit
def number_rows(plane, i_0, g_0, L, G, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """The numbers of a tile's statistics, [ROWS, GROUPS, 1], and which of them exist."""
    i = i_0 + tl.arange(0, ROWS)[:, None, None]
    g = g_0 + tl.arange(0, GROUPS)[None, :, None]
    live = tl.full((ROWS, GROUPS, 1), True, tl.int1)  # a tile of one row has no others that might not exist: stores without a branch
    if ROWS > 1:
        live = live & (i < L)
    if GROUPS > 1:
        live = live & (g < G)
    return (plane.to(tl.int64) * L + i) * G + g, live


@triton.jit
def place_rows(
    plane, i_0, g_0, c_0, live, L, G, D, ACROSS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Offsets and mask of a tile; the offset of each statistic's first value."""
    i = tl.arange(0, ROWS)[:, None, None]
    g = tl.arange(0, GROUPS)[None, :, None]
    c = tl.arange(0, BLOCK)[None, None, :]
    stride_i, stride_c = (1, L) if ACROSS else (G * D, 1)
    # Within the tile int32 is enough.
    base = plane.to(tl.int64) * L * G * D + i_0.to(tl.int64) * stride_i + (g_0.to(tl.int64) * D + c_0) * stride_c
    return base + (i * stride_i + (g * D + c) * stride_c), live & (c_0 + c < D), base + (i * stride_i + g * D * stride_c)


@triton.jit
def load_sum(x_ptr, addend_ptr, offset, mask, ACC: tl.constexpr):
    """x + addend as the dtype of x holds it."""
    x = load(x_ptr, offset, mask, ACC)
    if addend_ptr is not None:
        x = (x + load(addend_ptr, offset, mask, ACC)).to(x_ptr.dtype.element_ty).to(ACC)
    return x


@triton.jit
def load_vectors(
    weight_ptr, bias_ptr, segment, weight_share, bias_share, weight_offset, g_0, c_0, G, D, ACC: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """weight + weight_offset and bias of a tile's channels, [1, GROUPS, BLOCK]; and which of these exist."""
    g = g_0 + tl.arange(0, GROUPS)[None, :, None]
    c = c_0 + tl.arange(0, BLOCK)[None, None, :]
    mask = (g < G) & (c < D)
    column = g * D + c
    weight = load_affine(weight_ptr, (segment // weight_share).to(tl.int64) * G * D + column, mask, 1.0, ACC)
    if weight_ptr is not None and weight_offset is not None:
        weight += tl.full((), weight_offset, ACC)
    return weight, load_affine(bias_ptr, (segment // bias_share).to(tl.int64) * G * D + column, mask, 0.0, ACC), column, mask


@triton.jit(do_not_specialize=["L", "D", "rows"])
def _row_norm_fwd_kernel(
    x_ptr, addend_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr, total_ptr, stats_ptr,
    weight_share, bias_share, planes, L, G, D, rows, weight_offset: "fp64", eps: "fp64", slope: "fp64",
    ACTIVATION: tl.constexpr, CENTERED: tl.constexpr, ACROSS: tl.constexpr, V: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    D, L = BLOCK if FULL else whole(D, V, not ACROSS), whole(L, V, ACROSS)
    blocks, T = tl.cdiv(G, GROUPS), tl.cdiv(L, ROWS)
    chunk, g_0 = tl.program_id(0) // blocks, tl.program_id(0) % blocks * GROUPS
    plane = chunk // T
    weight, bias, column, live_c = load_vectors(
        weight_ptr, bias_ptr, plane // planes, weight_share, bias_share, weight_offset, g_0, 0, G, D, ACC, GROUPS, BLOCK
    )
    row, live = number_rows(plane, chunk % T * ROWS, g_0, L, G, ROWS, GROUPS)
    offset, mask, first = place_rows(plane, chunk % T * ROWS, g_0, 0, live, L, G, D, ACROSS, ROWS, GROUPS, BLOCK)
    x = load_sum(x_ptr, addend_ptr, offset, mask, ACC)
    some = load_sum(x_ptr, addend_ptr, first, live, ACC) if CENTERED else tl.zeros((), ACC)
    if total_ptr is not None:
        tl.store(total_ptr + offset, x.to(total_ptr.dtype.element_ty), mask)
    count = tl.full((), D, ACC)
    d, d_side, hi, lo, M2, scale = moments(x, live_c, x, live_c, some, count, CENTERED, False, False, 1)
    rstd = inverse_std(M2, scale, count, tl.full((), eps, ACC))
    if stats_ptr is not None:
        store_stats(stats_ptr, row, rows, hi, lo, rstd, live, CENTERED)
    forward_of(d, offset, mask, residual_ptr, y_ptr, lo, rstd, weight, bias, tl.full((), slope, ACC), ACTIVATION, ACC, "")


@triton.jit(do_not_specialize=["L", "D", "rows"])
def _row_norm_fwd_long_kernel(
    x_ptr, addend_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr, total_ptr, stats_ptr, partials_ptr,
    weight_share, bias_share, planes, L, G, D, rows, weight_offset: "fp64", eps: "fp64", slope: "fp64",
    ACTIVATION: tl.constexpr, CENTERED: tl.constexpr, ACROSS: tl.constexpr, V: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    D, L = whole(D, V, not ACROSS), whole(L, V, ACROSS)
    blocks, T = tl.cdiv(D, BLOCK), tl.cdiv(L, ROWS)
    pid, begin, end = tl.program_id(0), 0, D
    if STEP != WHOLE:
        # Rows with the same block follow each other, since they share weight and bias; APPLY in reverse, as what was read last is still cached.
        chunks = tl.num_programs(0) // blocks
        pid = number(0, tl.num_programs(0), STEP)
        begin = pid // chunks * BLOCK
        end = tl.minimum(begin + BLOCK, D)
        pid = pid % chunks
    chunk, g_0 = pid // G, pid % G
    plane, i_0 = chunk // T, chunk % T * ROWS
    row, live = number_rows(plane, i_0, g_0, L, G, ROWS, 1)

    if STEP == APPLY:
        hi, lo, rstd = load_stats(stats_ptr, row, rows, live, CENTERED)
    else:
        # Chan's rule, block by block, relative to the first block's hi; M2 a second time times HUGE^2 in case it overflows.
        origin = tl.zeros((ROWS, 1, 1), ACC)
        mean = tl.zeros((ROWS, 1, 1), ACC)
        M2 = tl.zeros((ROWS, 1, 1), ACC)
        M2_huge = tl.zeros((ROWS, 1, 1), ACC)
        before = tl.zeros((), ACC)
        for c_0 in range(begin, end, BLOCK):
            offset, mask, first = place_rows(plane, i_0, g_0, c_0, live, L, G, D, ACROSS, ROWS, 1, BLOCK)
            x = load_sum(x_ptr, addend_ptr, offset, mask, ACC)
            if total_ptr is not None:
                tl.store(total_ptr + offset, x.to(total_ptr.dtype.element_ty), mask)
            some = load_sum(x_ptr, addend_ptr, first, live, ACC) if CENTERED else tl.zeros((), ACC)
            count = tl.minimum(D - c_0, BLOCK).to(ACC)
            d, d_side, hi, lo, M2_here, scale = moments(x, mask, x, mask, some, count, CENTERED, False, False, 1)
            if CENTERED:
                origin = tl.where(c_0 == begin, hi, origin)
                e = ((hi - origin) + lo) - mean
                mean += e * (count / (before + count))
                weight = before * count / (before + count)
                M2 += e * (e * weight)
                M2_huge += e * HUGE * (e * HUGE * weight)
            M2 += tl.where(scale == 1.0, M2_here, float("inf"))
            before += count
            root_M2 = tl.sqrt(M2_here) * (HUGE / scale)
            M2_huge += root_M2 * root_M2
        hi, lo = two_sum(origin, mean)
        scale = tl.where(M2 == float("inf"), HUGE, tl.full(M2.shape, 1.0, ACC))
        M2 = tl.where(M2 == float("inf"), M2_huge, M2)
        if STEP == PARTS:
            part = (row // G * blocks + begin // BLOCK) * G + g_0
            store_stats(partials_ptr, part, rows.to(tl.int64) * blocks, hi, lo, tl.sqrt(M2) / scale, live, True)
        else:
            rstd = inverse_std(M2, scale, tl.full((), D, ACC), tl.full((), eps, ACC))
            if stats_ptr is not None:
                store_stats(stats_ptr, row, rows, hi, lo, rstd, live, CENTERED)

    if STEP != PARTS:
        for c_0 in range(begin, end, BLOCK):
            weight, bias, column, live_c = load_vectors(
                weight_ptr, bias_ptr, plane // planes, weight_share, bias_share, weight_offset, g_0, c_0, G, D, ACC, 1, BLOCK
            )
            offset, mask, first = place_rows(plane, i_0, g_0, c_0, live, L, G, D, ACROSS, ROWS, 1, BLOCK)
            d = load_sum(x_ptr, addend_ptr, offset, mask, ACC) - hi
            forward_of(d, offset, mask, residual_ptr, y_ptr, lo, rstd, weight, bias, tl.full((), slope, ACC), ACTIVATION, ACC, "")


@triton.jit(do_not_specialize=["L", "D", "rows", "P"])
def _row_norm_bwd_kernel(
    dy_ptr, x_ptr, stats_ptr, weight_ptr, bias_ptr, residual_ptr, dtotal_ptr, dx_ptr, dresidual_ptr, sums_ptr, partials_ptr,
    weight_share, bias_share, planes, L, G, D, rows, P, weight_offset: "fp64", slope: "fp64",
    ACTIVATION: tl.constexpr, CENTERED: tl.constexpr, ACROSS: tl.constexpr, V: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
    STEP: tl.constexpr, BLOCK_P: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    D, L = BLOCK if FULL else whole(D, V, not ACROSS), whole(L, V, ACROSS)
    blocks, T = tl.cdiv(D, BLOCK), tl.cdiv(L, ROWS)
    group_blocks = tl.cdiv(G, GROUPS)
    pid = tl.program_id(0)
    block, pid = pid % blocks, pid // blocks
    g_0, pid = pid % group_blocks * GROUPS, pid // group_blocks
    segment, p = pid // P, pid % P
    weight, bias, column, live_c = load_vectors(
        weight_ptr, bias_ptr, segment, weight_share, bias_share, weight_offset, g_0, block * BLOCK, G, D, ACC, GROUPS, BLOCK
    )
    slope = tl.full((), slope, ACC)
    all_dt = tl.zeros((ROWS, GROUPS, BLOCK), ACC)
    all_dt_xhat = tl.zeros((ROWS, GROUPS, BLOCK), ACC)
    for chunk in tl.range(p, planes * T, P, num_stages=STAGES):
        plane = segment * planes + chunk // T
        row, live = number_rows(plane, chunk % T * ROWS, g_0, L, G, ROWS, GROUPS)
        offset, mask, first = place_rows(plane, chunk % T * ROWS, g_0, block * BLOCK, live, L, G, D, ACROSS, ROWS, GROUPS, BLOCK)
        hi, lo, rstd = load_stats(stats_ptr, row, rows, live, CENTERED)
        x_hat, dt = backward_of(dy_ptr, x_ptr, offset, mask, residual_ptr, hi, lo, rstd, weight, bias, slope, ACTIVATION, ACC, "")
        if sums_ptr is not None:
            all_dt += dt
            all_dt_xhat += dt * x_hat
        g = weight * dt
        part, stride_k = row * blocks, rows.to(tl.int64) * blocks
        if STEP == APPLY:
            sum_g = tl.zeros((ROWS, GROUPS, 1), ACC)
            sum_g_xhat = tl.zeros((ROWS, GROUPS, 1), ACC)
            for b_0 in range(0, blocks, BLOCK_P):
                b = b_0 + tl.arange(0, BLOCK_P)[None, None, :]
                sum_g_xhat += tl.sum(load(partials_ptr, part + b, live & (b < blocks), ACC), axis=2, keep_dims=True)
                sum_g += tl.sum(load(partials_ptr + stride_k, part + b, live & (b < blocks), ACC), axis=2, keep_dims=True)
        else:
            sum_g_xhat = tl.sum(g * x_hat, axis=2, keep_dims=True)
            sum_g = tl.sum(g, axis=2, keep_dims=True)
        if STEP == PARTS:
            tl.store(partials_ptr + part + block, sum_g_xhat, live)
            tl.store(partials_ptr + stride_k + part + block, sum_g, live)
        else:
            factor = -rstd / tl.full((), D, ACC)
            c3 = factor * sum_g if CENTERED else tl.zeros((), ACC)
            store_gradients(x_hat, dt, g, offset, mask, dtotal_ptr, dx_ptr, dresidual_ptr, rstd, factor * sum_g_xhat, c3, "")
    if sums_ptr is not None:
        out = sums_ptr + (pid.to(tl.int64) * G * D + column)
        tl.store(out, tl.sum(all_dt_xhat, axis=0, keep_dims=True), live_c)
        segments = tl.num_programs(0).to(tl.int64) // (blocks * group_blocks)
        tl.store(out + segments * G * D, tl.sum(all_dt, axis=0, keep_dims=True), live_c)
