"""The pieces that every kernel of the family shares: where a tile lies, and its moments.

Memory: element (n, c, s) of x lies at n C S + c stride_c + s stride_s, with (stride_c, stride_s) = (S, 1) channels first
and (1, C) channels last. A tile of a group norm is [ROWS, BLOCK_C, BLOCK_S] lanes: rows (groups), channels, positions; or, of
one row, [OUTER, BLOCK_C, BLOCK_S] with OUTER * BLOCK_S positions. Those of batch norm and of row norms are described in
batch.py and rows.py.

Vectors: a load is V elements wide if Triton can prove that V divides offsets and masks. So the host passes the length of
the contiguous axis divided by V and the kernel multiplies it back (`whole`). An odd S cannot be divided: with SIDE = True
the main lanes cover the aligned interior of each channel's segment, and 2 V side lanes cover its head and its tail.

Moments of the n values that share a statistic, centred twice:
    K = any one of them        hi = K + mean(x - K)        d = x - hi        lo = mean(d)        M2 = sum d^2 - n lo^2
    mean = hi + lo             rstd = 1 / sqrt(M2 / n + eps)
x - hi is exact near the mean, and lo holds what rounding took from hi, so nothing cancels however far x is from zero, and
constant x gives x - hi = 0 exactly. |x| up to 1e38: where the fp32 sum of squares overflows it is taken again over
d HUGE, HUGE = 2^-100. Partials keep root_M2 = sqrt(M2), which fits.
RMS (CENTERED = False) is the same with hi = lo = 0; of its statistics only rstd is kept.
"""

import triton
import triton.language as tl

HUGE = tl.constexpr(2.0**-100)
NO_POLICY = tl.constexpr("")  # Triton 3.6 takes no plain default for a constexpr


@triton.jit
def whole(length, V: tl.constexpr, DIVIDED: tl.constexpr):
    """The length that the host passed divided by V (if DIVIDED); Triton now knows that V divides it."""
    return length * V if DIVIDED else length


@triton.jit
def place(base, c, length, stride_c, stride_s, OUTER: tl.constexpr, BLOCK_S: tl.constexpr, V: tl.constexpr, SIDE: tl.constexpr):
    """Offsets and masks of the main lanes and of the side lanes (the same again without SIDE) of a tile.

    base (int64, scalar or per row) is the offset of its first element, c the channel within the tile, length <= BLOCK_S
    the number of positions it covers. Within the tile int32 is enough.
    """
    s = tl.arange(0, OUTER)[:, None, None] * BLOCK_S + tl.arange(0, BLOCK_S)[None, None, :]
    if SIDE:
        u = tl.arange(0, 2 * V)[None, None, :]
        origin = base // V * V
        start = (base - origin).to(tl.int32) + c * stride_c
        stop = start + length
        first = (start + V - 1) // V * V
        last = stop // V * V
        main = first + s
        side = tl.where(u < V, start + u, last + (u - V))
        outside = tl.where(u < V, side < tl.minimum(first, stop), (side >= first) & (side < stop))
        return origin + main, main < last, origin + side, outside
    else:
        offset = base + (c * stride_c + s * stride_s)
        return offset, s < length, offset, s < length


@triton.jit
def load(ptr, offset, mask, ACC: tl.constexpr, POLICY: tl.constexpr = NO_POLICY):
    return tl.load(ptr + offset, mask=mask, other=0.0, eviction_policy=POLICY).to(ACC)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    return x.to(DTYPE) if DTYPE == tl.float64 else x.to(tl.float32).to(DTYPE)


@triton.jit
def load_affine(ptr, offset, mask, NEUTRAL: tl.constexpr, ACC: tl.constexpr):
    """Weight or bias of the channels at `offset`; NEUTRAL (1 or 0) where there is none."""
    if ptr is None:
        return tl.full(mask.shape, NEUTRAL, ACC)
    else:
        return load(ptr, offset, mask, ACC)


@triton.jit
def load_stats(ptr, row, rows, mask, CENTERED: tl.constexpr):
    """hi, lo, rstd of the rows `row` of all `rows`."""
    ACC: tl.constexpr = ptr.dtype.element_ty
    if CENTERED:
        return load(ptr, row, mask, ACC), load(ptr + rows, row, mask, ACC), load(ptr + rows + rows, row, mask, ACC)
    else:
        return tl.zeros((), ACC), tl.zeros((), ACC), load(ptr, row, mask, ACC)


@triton.jit
def store_stats(ptr, row, rows, hi, lo, rstd, mask, CENTERED: tl.constexpr):
    if CENTERED:
        tl.store(ptr + row, hi, mask)
        tl.store(ptr + rows + row, lo, mask)
        ptr = ptr + rows + rows
    tl.store(ptr + row, rstd, mask)


@triton.jit
def store_batch(stats_ptr, running_mean_ptr, running_var_ptr, c, C, hi, lo, M2, scale, count, eps, momentum, mask):
    """Batch norm: stats (4, C), the last the unbiased variance, and running += momentum (value - running); rstd."""
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    rstd = inverse_std(M2, scale, count, tl.full((), eps, ACC))
    variance = M2 / tl.maximum(count - 1, 1) / scale / scale
    store_stats(stats_ptr, c, C, hi, lo, rstd, mask, True)
    tl.store(stats_ptr + 3 * C + c, variance, mask)
    if running_mean_ptr is not None:
        WIDE: tl.constexpr = tl.float64 if running_mean_ptr.dtype.element_ty == tl.float64 else ACC
        update_running(running_mean_ptr, c, hi.to(WIDE) + lo.to(WIDE), momentum, mask)
        update_running(running_var_ptr, c, variance.to(WIDE), momentum, mask)
    return rstd


@triton.jit
def update_running(ptr, c, value, momentum, mask):
    before = load(ptr, c, mask, value.dtype)
    after = before + tl.full((), momentum, value.dtype) * (value - before)
    tl.store(ptr + c, narrow(after, ptr.dtype.element_ty), mask)


@triton.jit
def total(x, OVER_CHANNELS: tl.constexpr, OUTER: tl.constexpr):
    """Sum over positions, and over channels too if asked."""
    if OVER_CHANNELS:
        if OUTER > 1:
            return tl.sum(tl.ravel(x), axis=0)[None, None, None]
        else:
            flat = tl.reshape(x, (x.shape[0], x.shape[1] * x.shape[2]))
            return tl.sum(flat, axis=1)[:, None, None]
    elif OUTER > 1:
        flat = tl.reshape(tl.permute(x, (1, 0, 2)), (x.shape[1], x.shape[0] * x.shape[2]))
        return tl.sum(flat, axis=1)[None, :, None]
    else:
        return tl.sum(x, axis=2, keep_dims=True)


@triton.jit
def moments(
    x, mask, x_side, mask_side, some, count,
    CENTERED: tl.constexpr, OVER_CHANNELS: tl.constexpr, SIDE: tl.constexpr, OUTER: tl.constexpr,
):  # fmt: skip
    """d, d of the side, hi, lo, M2, scale, with M2 = scale^2 sum (x - mean)^2. `some` is any one of the values."""
    hi = some
    if CENTERED:
        shift = total(tl.where(mask, x - some, 0.0), OVER_CHANNELS, OUTER)
        if SIDE:
            shift += total(tl.where(mask_side, x_side - some, 0.0), OVER_CHANNELS, 1)
        hi = some + shift / count
    d = tl.where(mask, x - hi, 0.0)
    sum_dd = total(d * d, OVER_CHANNELS, OUTER)
    d_side = d
    if SIDE:
        d_side = tl.where(mask_side, x_side - hi, 0.0)
        sum_dd += total(d_side * d_side, OVER_CHANNELS, 1)
    lo = tl.zeros((), sum_dd.dtype)
    if CENTERED:
        sum_d = total(d, OVER_CHANNELS, OUTER)
        if SIDE:
            sum_d += total(d_side, OVER_CHANNELS, 1)
        lo = sum_d / count
    scale = tl.full(sum_dd.shape, 1.0, sum_dd.dtype)
    if tl.max(tl.ravel(sum_dd)) == float("inf"):
        scale = tl.where(sum_dd == float("inf"), HUGE, scale)
        sum_dd = total(d * scale * (d * scale), OVER_CHANNELS, OUTER)
        if SIDE:
            sum_dd += total(d_side * scale * (d_side * scale), OVER_CHANNELS, 1)
    lo_scaled = lo * scale
    return d, d_side, hi, lo, tl.maximum(sum_dd - count * (lo_scaled * lo_scaled), 0.0), scale


@triton.jit
def inverse_std(M2, scale, count, eps):
    """rstd, to the last digit but without the calls that a correctly rounded root or quotient would make."""
    variance = M2 / count + eps * scale * scale
    r = tl.rsqrt(variance)
    return scale * (r + 0.5 * r * (1.0 - variance * r * r))


@triton.jit
def merge_moments(partials_ptr, start, live, stride_k, T, PERIOD, C, D, S, CHUNK, BLOCK_P: tl.constexpr):
    """Moments of the groups at `start` [1, GROUPS], each from T * D partials (hi, lo, root_M2 of CHUNK positions of one channel), Chan's rule.
    PERIOD (D = 1): of several samples, each of so many chunks and S positions.

    Everything is taken relative to the first hi: delta_i = (hi_i - hi_0) + lo_i. Two sweeps over partials that are in
    cache give mean(delta) and then sum root_M2_i^2 + n_i (delta_i - mean)^2 without cancellation. Always in the same order.
    """
    ACC: tl.constexpr = partials_ptr.dtype.element_ty
    samples = 1 if PERIOD is None else T // PERIOD
    count = (D.to(tl.int64) * S * samples).to(ACC)
    hi_0 = load(partials_ptr, start, live, ACC)
    mean = tl.zeros_like(hi_0)
    for p in range(0, T * D, BLOCK_P):
        offset, mask, n = partial(p, start, live, T, PERIOD, C, D, S, CHUNK, BLOCK_P, ACC)
        hi = load(partials_ptr, offset, mask, ACC)
        lo = load(partials_ptr + stride_k, offset, mask, ACC)
        mean += tl.sum(tl.where(mask, (hi - hi_0) + lo, 0.0) * (n / count), axis=0, keep_dims=True)
    scale = tl.full(hi_0.shape, 1.0, ACC)
    M2 = spread(partials_ptr, start, live, stride_k, T, PERIOD, C, D, S, hi_0, mean, scale, CHUNK, BLOCK_P)
    if tl.max(tl.ravel(M2)) == float("inf"):
        scale = tl.where(M2 == float("inf"), HUGE, scale)
        M2 = spread(partials_ptr, start, live, stride_k, T, PERIOD, C, D, S, hi_0, mean, scale, CHUNK, BLOCK_P)
    hi, lo = two_sum(hi_0, mean)
    return hi, lo, M2, scale, count


@triton.jit
def two_sum(x, y):
    """x + y = hi + lo: lo is exactly what the rounding of hi lost."""
    hi = x + y
    part = hi - x
    return hi, (x - (hi - part)) + (y - part)


@triton.jit
def partial(p, start, live, T, PERIOD, C, D, S, CHUNK, BLOCK_P: tl.constexpr, ACC: tl.constexpr):
    """Offset, mask and count of the partials p .. p + BLOCK_P of each group; chunk-major, as they lie in memory."""
    i = p + tl.arange(0, BLOCK_P)[:, None]
    if PERIOD is None:
        t = i // D
        t_last = T - 1
        offset = start + (t.to(tl.int64) * C + i % D)
    else:
        t = i % PERIOD
        t_last = PERIOD - 1
        offset = start + i.to(tl.int64) * C
    last = (S - t_last.to(tl.int64) * CHUNK).to(ACC)
    return offset, (i < T * D) & live, tl.where(t < t_last, CHUNK, last)


@triton.jit
def spread(partials_ptr, start, live, stride_k, T, PERIOD, C, D, S, hi_0, mean, scale, CHUNK, BLOCK_P: tl.constexpr):
    ACC: tl.constexpr = partials_ptr.dtype.element_ty
    M2 = tl.zeros_like(hi_0)
    for p in range(0, T * D, BLOCK_P):
        offset, mask, n = partial(p, start, live, T, PERIOD, C, D, S, CHUNK, BLOCK_P, ACC)
        hi = load(partials_ptr, offset, mask, ACC)
        lo = load(partials_ptr + stride_k, offset, mask, ACC)
        root_M2 = load(partials_ptr + 2 * stride_k, offset, mask, ACC) * scale
        e = (((hi - hi_0) + lo) - mean) * scale
        M2 += tl.sum(tl.where(mask, root_M2 * root_M2 + n * (e * e), 0.0), axis=0, keep_dims=True)
    return M2
