"""Gradients of weight and bias from the sums that programs left behind, added in index order: the same bits from run to run.

sums (2, rows, C) = sum_dt_xhat, sum_dt. A parameter of R rows of C channels takes rows / R consecutive rows of them for each of its own.
"""

import math

import triton
import triton.language as tl

from .algebra import load, narrow
from .config import divide, power_above
from .launch import launch


@triton.jit(do_not_specialize=["rows", "C", "K", "LENGTH"])
def _fold_kernel(sums_ptr, dweight_ptr, dbias_ptr, rows, C, K, LENGTH, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows r of dweight, dbias (rows / K * parts, C), rounded once: each the sum of LENGTH rows of sums, the last part of K rows may be less."""
    ACC: tl.constexpr = sums_ptr.dtype.element_ty
    blocks, parts = tl.cdiv(C, BLOCK_C), tl.cdiv(K, LENGTH)
    r = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    k_first = r % parts * LENGTH
    k_last = tl.minimum(k_first + LENGTH, K)
    dweight = tl.zeros((1, BLOCK_C), ACC)
    dbias = tl.zeros((1, BLOCK_C), ACC)
    for k_0 in range(k_first, k_last, BLOCK_K):
        k = k_0 + tl.arange(0, BLOCK_K)[:, None]
        offset = (r // parts * K + k) * C + c
        mask = (k < k_last) & (c < C)
        if dweight_ptr is not None:
            dweight += tl.sum(load(sums_ptr, offset, mask, ACC), axis=0, keep_dims=True)
        if dbias_ptr is not None:
            dbias += tl.sum(load(sums_ptr + rows.to(tl.int64) * C, offset, mask, ACC), axis=0, keep_dims=True)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + r * C + c, narrow(dweight, dweight_ptr.dtype.element_ty), c < C)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + r * C + c, narrow(dbias, dbias_ptr.dtype.element_ty), c < C)


def shorten(sums, R):
    """sums (2, R parts, C) where more than 512 rows would meet in each of R: one program alone would take long over them."""
    _, rows, C = sums.shape
    if rows // R <= 512:
        return sums
    LENGTH = power_above(math.isqrt(rows // R))
    shorter = sums.new_empty((2, R * divide(rows // R, LENGTH), C))
    _fold(sums, shorter[0], shorter[1], R, LENGTH)
    return shorter


def fold(sums, dweight, dbias):
    """Write those of dweight, dbias that are not None."""
    C = sums.shape[2]
    if dweight is not None and dbias is not None and dweight.numel() != dbias.numel():
        fold(sums, dweight, None)
        dweight = None
    R = (dbias if dweight is None else dweight).numel() // C
    sums = shorten(sums, R)
    _fold(sums, dweight, dbias, R, sums.shape[1] // R)


def _fold(sums, dweight, dbias, R, LENGTH):
    _, rows, C = sums.shape
    K = rows // R
    # 32 columns are one line of memory: many small programs, since there is little to do and much to wait for.
    block_k = min(64, power_above(LENGTH))
    block_c = 32 if C < 1 << 14 else max(32, 1024 // block_k)  # with more columns than programs, fewer of these
    launch(
        _fold_kernel, R * divide(K, LENGTH) * divide(C, block_c), max(1, block_k * block_c // 512), sums, dweight, dbias,
        rows, C, K, LENGTH, block_k, block_c,
    )  # fmt: skip
