"""Named cases of every norm, each with its reason, and what the tests share: see ``oracle.py``."""

import math
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from oracle import ACTIVATIONS, COMPOSED, FLOOR, HALF, IN_PLACE, LAYOUTS, Case, Inputs, assert_layout, channels_last, check, composed, roundoff

__all__ = [
    "ACTIVATIONS", "ADAPTIVE", "BATCH", "CASES", "COMPOSED", "FLOOR", "HALF", "IN_PLACE", "KINDS", "LAYOUTS", "NORM_CASES", "Case", "Inputs",
    "assert_layout", "case_of", "channels_last", "check", "composed", "grid", "roundoff",
]  # fmt: skip

_f16, _bf16, _f32, _f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

CASES = {
    # ranks and sizes
    "rank2": Case("no spatial dimension", (5, 12), 3),
    "rank3": Case("one spatial dimension", (3, 6, 11), 2),
    "rank4": Case("images", (2, 8, 5, 7), 4),
    "rank5": Case("volumes", (2, 6, 3, 4, 5), 3),
    "primes": Case("no size divides a vector or a block", (3, 35, 13), 5),
    "primes_2d": Case("odd rows, odd groups", (2, 33, 7, 11), 3),
    "one_group": Case("G = 1: layer norm over C and S", (3, 10, 4, 4), 1),
    "C_groups": Case("G = C: instance norm", (3, 10, 6, 6), 10),
    "C_groups_odd_S": Case("G = C, rows of odd length", (2, 7, 9, 13), 7),
    "one_channel": Case("C = 1: contiguous and channels last at once", (4, 1, 9, 9), 1),
    "S1": Case("S = 1 with spatial dimensions", (4, 32, 1, 1), 8),
    "S2": Case("two positions", (4, 32, 2), 8),
    "S3": Case("three positions", (4, 24, 3), 8),
    "S9": Case("nine positions", (2, 24, 3, 3), 4),
    "S49": Case("the last stage of a ResNet", (2, 64, 7, 7), 32),
    "one_element": Case("groups of one element: y = bias, dx = 0", (4, 6, 1), 6),
    "two_elements": Case("groups of two: x_hat = +-1", (8, 6), 3),
    "N1": Case("one sample: dweight is not summed over samples", (1, 12, 5, 5), 3),
    "thin_spatial": Case("a spatial dimension of size 1", (2, 8, 1, 17), 2),
    # the paths of the kernels
    "long_group": Case("a group above 64K elements, few groups: split over programs", (1, 2, 301, 300), 1, activation="silu"),
    "long_groups_residual": Case("the same with everything fused", (2, 6, 150, 151), 2, residual="contiguous", scale=True, activation="silu"),
    "long_row": Case("one long row: many chunks in a row", (1, 1, 70001), 1),
    "many_small_groups": Case("thousands of groups of a few elements", (67, 96, 5), 48),
    "many_samples": Case("more samples than sums are kept apart for", (300, 8, 3), 2),
    "held_16": Case("a diffusion model's inner stage", (2, 320, 8, 8), 32, activation="silu"),
    "chunk_edge": Case("a row of one chunk and one element", (2, 2, 4097), 2),
    "cl_C3": Case("channels last, three channels", (2, 3, 31, 17), 3, "channels_last"),
    "cl_C5": Case("channels last, odd channels", (2, 5, 40, 41), 1, "channels_last"),
    "cl_C16": Case("channels last, one vector of channels", (2, 16, 12, 12), 4, "channels_last", activation="silu"),
    "cl_C20": Case("channels last, channels no power of two", (3, 20, 9, 11), 5, "channels_last"),
    "cl_C33": Case("channels last, odd channels, odd groups", (2, 33, 15, 14), 11, "channels_last", activation="silu", residual="channels_last"),
    "cl_C320": Case("channels last, groups of ten channels", (2, 320, 9, 9), 32, "channels_last", activation="silu"),
    "cl_long": Case("channels last, a group above 64K elements", (1, 16, 96, 97), 2, "channels_last", activation="silu"),
    "cl_one_group": Case("channels last, one group", (2, 20, 10, 10), 1, "channels_last"),
    "cl_C_groups": Case("channels last, one channel a group", (2, 20, 33, 5), 20, "channels_last"),
    "cl_N1": Case("channels last, one sample", (1, 24, 14, 14), 6, "channels_last"),
    "cl_S1": Case("channels last, one position", (4, 32, 1, 1), 8, "channels_last"),
    "cl_1d": Case("(N, L, C) transposed: what an attention block has", (3, 24, 13), 4, "channels_last"),
    "cl_3d": Case("channels_last_3d", (2, 12, 3, 4, 5), 3, "channels_last", residual="channels_last", activation="gelu"),
    "cl_many_positions": Case("channels last, many blocks of pixels", (2, 4, 200, 65), 2, "channels_last"),
    # layouts
    **{f"layout_{layout}": Case(f"x {layout}", (4, 6, 5, 8), 3, layout, activation="silu") for layout in LAYOUTS
       if layout not in ("contiguous", "channels_last", "expanded_positions", "scalar")},
    "layout_offset_bf16": Case("misaligned 16-bit x", (2, 8, 16, 16), 2, "offset", dtype=_bf16),
    "layout_channels_last_offset_f16": Case("misaligned 16-bit x", (2, 16, 8, 8), 2, "channels_last_offset", dtype=_f16),
    "layout_permuted_3d": Case("x spatial_permuted, rank 5", (2, 6, 3, 4, 5), 3, "spatial_permuted", residual="contiguous", activation="silu"),
    "layout_sliced_N1": Case("a slice of channels of one sample is dense", (1, 6, 5, 5), 3, "sliced_channels"),
    "dy_scalar": Case("y.sum().backward(): stride 0", (2, 6, 5, 5), 3, dy="scalar", activation="silu"),
    "dy_scalar_cl": Case("the same, channels last", (2, 6, 5, 5), 3, "channels_last", dy="scalar", activation="silu"),
    "dy_expanded": Case("y.mean(-1) and the like: dy partly expanded", (2, 6, 5, 5), 3, dy="expanded_positions"),
    "dy_channels_last": Case("dy in another layout than x", (2, 6, 5, 4), 3, dy="channels_last", activation="silu"),
    "dy_contiguous": Case("dy in another layout than x", (2, 6, 5, 4), 3, "channels_last", dy="contiguous", activation="silu"),
    "dy_sliced": Case("dy a slice", (2, 6, 5, 4), 3, dy="sliced"),
    "dy_permuted": Case("dy's spatial dimensions permuted", (2, 6, 5, 4), 3, dy="spatial_permuted"),
    "residual_channels_last": Case("residual in another layout", (2, 6, 5, 4), 3, residual="channels_last", activation="silu"),
    "residual_contiguous": Case("residual in another layout", (2, 6, 5, 4), 3, "channels_last", residual="contiguous", activation="silu"),
    "residual_expanded": Case("residual with stride 0", (2, 6, 5, 4), 3, residual="expanded_samples", activation="silu"),
    "residual_sliced": Case("residual a slice", (2, 6, 5, 4), 3, residual="sliced", activation="silu"),
    # dtypes
    **{f"{str(dtype)[6:]}{suffix}": Case("dtype", (3, 12, 7, 5), 3, layout, dtype=dtype, residual=layout, scale=True, shift=True, activation="silu")
       for dtype in (_f16, _bf16, _f64) for suffix, layout in (("", "contiguous"), ("_cl", "channels_last"))},
    "bf16_weight_f32": Case("parameters kept in float32", (2, 12, 6, 6), 3, dtype=_bf16, affine_dtype=_f32, activation="silu"),
    "f16_weight_f32_cl": Case("the same, channels last", (2, 12, 6, 6), 3, "channels_last", dtype=_f16, affine_dtype=_f32, activation="silu"),
    "f32_weight_bf16": Case("narrow parameters", (2, 12, 6, 6), 3, affine_dtype=_bf16),
    "f32_weight_f64": Case("wide parameters", (2, 12, 6, 6), 3, affine_dtype=_f64),
    "bf16_weight_f16": Case("both 16-bit, not the same", (2, 12, 6, 6), 3, dtype=_bf16, affine_dtype=_f16),
    "f64_weight_f16": Case("float64 x, 16-bit parameters", (2, 12, 6, 6), 3, dtype=_f64, affine_dtype=_f16),
    "bf16_out_f32": Case("16-bit x, float32 y: autocast", (2, 12, 6, 6), 3, dtype=_bf16, out_dtype=_f32, activation="silu", residual="contiguous"),
    "f16_out_f32_cl": Case("the same, channels last", (2, 12, 6, 6), 3, "channels_last", dtype=_f16, affine_dtype=_f32, out_dtype=_f32),
    "bf16_out_f32_residual": Case("dresidual is dy, rounded", (2, 12, 6, 6), 3, dtype=_bf16, out_dtype=_f32, residual="channels_last"),
    "bf16_long": Case("16-bit sums over many elements", (1, 4, 128, 129), 1, dtype=_bf16, activation="silu"),
    "f64_long": Case("float64 sums over many elements", (1, 4, 128, 129), 1, dtype=_f64, activation="silu"),
    "bf16_S1": Case("16-bit, one position", (6, 40), 4, dtype=_bf16),
    # affine
    "no_weight": Case("weight absent", (3, 6, 7), 3, weight=None, activation="silu"),
    "no_bias": Case("bias absent", (3, 6, 7), 3, bias=None, activation="silu"),
    "no_affine": Case("both absent", (3, 6, 7), 3, weight=None, bias=None, activation="silu"),
    "no_affine_cl": Case("both absent, channels last", (3, 6, 7, 2), 3, "channels_last", weight=None, bias=None, activation="silu"),
    "weight_NC": Case("weight and bias per sample", (3, 6, 7), 3, weight="NC", bias="NC", activation="silu"),
    "weight_NC_cl": Case("the same, channels last", (3, 6, 7, 2), 3, "channels_last", weight="NC", bias="NC", activation="silu"),
    "weight_NC_bias_C": Case("only weight per sample", (3, 6, 7), 3, weight="NC", activation="silu"),
    "weight_C_bias_NC": Case("only bias per sample", (3, 6, 7), 3, bias="NC", activation="silu"),
    "weight_NC_no_bias": Case("weight per sample, no bias", (3, 6, 7), 3, weight="NC", bias=None),
    "weight_NC_N1": Case("per sample, one sample: shapes (1, C)", (1, 6, 7), 3, weight="NC", bias="NC"),
    "modulation": Case("scale and shift on an affine norm", (3, 6, 4, 4), 3, scale=True, shift=True, activation="silu"),
    "modulation_cl": Case("the same, channels last", (3, 6, 4, 4), 3, "channels_last", scale=True, shift=True, activation="silu"),
    "modulation_no_affine": Case("scale and shift alone: AdaIN", (3, 6, 4, 4), 3, weight=None, bias=None, scale=True, shift=True),
    "scale_only": Case("scale without shift", (3, 6, 4, 4), 3, scale=True),
    "scale_only_no_bias": Case("scale without bias", (3, 6, 4, 4), 3, bias=None, scale=True),
    "scale_only_no_weight": Case("scale without weight", (3, 6, 4, 4), 3, weight=None, scale=True),
    "shift_only": Case("shift without scale", (3, 6, 4, 4), 3, shift=True),
    "shift_only_no_bias": Case("shift without bias", (3, 6, 4, 4), 3, bias=None, shift=True),
    "residual": Case("residual without activation: dresidual is dy", (3, 6, 4, 4), 3, residual="contiguous"),
    "everything": Case("all of it", (3, 10, 5, 7), 5, weight="NC", residual="contiguous", scale=True, shift=True, activation="gelu"),
    "large_eps": Case("eps counts", (3, 6, 4, 4), 3, eps=0.7, activation="silu"),
    "eps_zero": Case("eps = 0", (3, 6, 4, 4), 3, eps=0.0),
    "small_values": Case("variance below eps", (3, 6, 4, 4), 3, mean=0.0, std=1e-4),
    "mean_10": Case("off centre, where torch still has digits", (3, 6, 9, 9), 3, mean=20.0),
    # activations
    **{f"{name}{suffix}": Case("activation", (3, 6, 5, 5), 3, layout, residual=layout, activation=name)
       for name in ACTIVATIONS for suffix, layout in (("", "contiguous"), ("_cl", "channels_last"))},
    **{f"{name}_bf16": Case("activation of 16-bit values", (3, 6, 5, 5), 3, dtype=_bf16, activation=name) for name in ACTIVATIONS if name != "none"},
    **{f"{name}_f64": Case("activation of float64 values", (3, 6, 5, 5), 3, dtype=_f64, activation=name) for name in ACTIVATIONS if name != "none"},
}  # fmt: skip

_DTYPES = {str(dtype)[6:]: dtype for dtype in (_f16, _bf16, _f64)}

# instance norm; every case runs contiguous and channels last, by statistics of its own and by running ones
_CHANNELS = {
    "1d": Case("(N, C, L)", (3, 6, 11)),
    "2d": Case("images", (2, 6, 5, 7), residual="contiguous", activation="silu"),
    "3d": Case("volumes", (2, 12, 3, 4, 5), activation="leaky_relu"),
    "S2": Case("two positions: x_hat = +-1", (4, 24, 2)),
    "C1": Case("one channel", (3, 1, 9, 9)),
    "C3": Case("an RGB image", (2, 3, 31, 17), activation="relu"),
    "C20": Case("channels no power of two", (3, 20, 9, 11)),
    "C33": Case("odd channels", (2, 33, 15, 14), activation="silu", residual="contiguous"),
    "C64": Case("a style transfer network", (2, 64, 24, 24), activation="relu"),
    "C320": Case("many channels, short rows", (2, 320, 7, 5)),
    "C1030": Case("more channels than a block", (1, 1030, 3, 3), bias=None),
    "N1": Case("one sample", (1, 12, 13, 14), weight=None),
    "no_affine": Case("torch's default", (3, 7, 6, 6), weight=None, bias=None),
    "many_samples": Case("many samples", (130, 8, 3), activation="silu"),
    "long": Case("planes above 64K elements, few of them", (1, 2, 301, 300), activation="silu"),
    "large_S": Case("large planes, odd", (1, 5, 131, 127), residual="contiguous"),
    "NC": Case("weight and bias per sample", (3, 6, 7, 5), weight="NC", bias="NC", activation="silu"),
    "modulation": Case("scale and shift", (3, 6, 4, 4), scale=True, shift=True, residual="contiguous", activation="gelu"),
    "mixed": Case("parameters in another dtype", (2, 12, 6, 6), dtype=_bf16, affine_dtype=_f32, activation="silu"),
    "narrow": Case("narrow parameters", (2, 12, 6, 6), affine_dtype=_bf16),
    "out_f32": Case("16-bit x, float32 y", (2, 12, 6, 6), dtype=_f16, out_dtype=_f32, residual="contiguous", activation="silu"),
    "dy_scalar": Case("y.sum().backward()", (2, 6, 5, 5), dy="scalar", activation="silu"),
    "offset": Case("misaligned", (2, 8, 8, 8), "offset", activation="silu"),
    "eps_zero": Case("eps = 0", (3, 6, 4, 4), eps=0.0),
    **{name: Case("dtype", (3, 12, 7, 5), dtype=dtype, residual="contiguous", activation="silu") for name, dtype in _DTYPES.items()},
}  # fmt: skip

# layer and RMS norm over the last dimensions; every case runs for both, alone and after an addition
_ROWS = {
    "rank1": Case("one row, no other dimension", (19,)),
    "one_row": Case("one row", (1, 77)),
    "rank3": Case("(B, T, C)", (3, 5, 24), activation="silu"),
    "rank5": Case("many leading dimensions", (2, 3, 1, 2, 20)),
    "last_2": Case("two dimensions", (3, 4, 5, 6), ndim=2, activation="silu"),
    "last_3": Case("three dimensions", (3, 4, 5, 6), ndim=3),
    "all": Case("all dimensions: one row", (4, 5, 6), ndim=3),
    **{f"D{length}": Case("lengths around vectors and blocks", (5, length), activation="silu" if length % 8 in (0, 3) else "none")
       for length in (1, 2, 3, 4, 7, 8, 15, 17, 31, 33, 64, 65, 129, 257, 1000, 1023, 4097)},
    "tiny_rows": Case("thousands of rows of a few elements", (3001, 5), activation="silu"),
    "qk_norm": Case("heads of 128", (2, 6, 70, 128), weight_offset=1.0),
    "many_rows": Case("more rows than sums are kept apart for", (1111, 24)),
    "transformer": Case("a small language model", (2, 33, 768), activation="silu"),
    "long_row": Case("one row above 64K elements", (1, 70001), activation="silu"),
    "long_rows": Case("several of them", (9, 65539)),
    "no_affine": Case("weight and bias absent", (6, 40), weight=None, bias=None, activation="silu"),
    "no_weight": Case("bias alone", (6, 40), weight=None),
    "no_bias": Case("weight alone", (6, 40), bias=None),
    "no_weight_offset": Case("an offset without weight is ignored", (6, 40), weight=None, bias=None, weight_offset=1.0),
    "offset_1": Case("weight stored around zero", (4, 6, 40), weight_offset=1.0, activation="silu"),
    "offset_modulation": Case("the same under a modulation", (4, 6, 40), weight_offset=1.0, scale=True, shift=True),
    "offset_bf16": Case("the same in 16 bits: the sum is not rounded", (4, 6, 40), weight_offset=1.0, dtype=_bf16),
    "adaLN": Case("scale and shift without affine", (3, 7, 24), weight=None, bias=None, scale=True, shift=True),
    "adaLN_affine": Case("scale and shift of an affine norm", (3, 7, 24), scale=True, shift=True, activation="gelu"),
    "adaLN_last_2": Case("the same over two dimensions", (3, 7, 4, 6), ndim=2, scale=True, shift=True),
    "adaLN_N1": Case("one sample", (1, 7, 24), scale=True, shift=True),
    "adaLN_rank2": Case("one row for each sample", (5, 24), scale=True, shift=True),
    "scale_only": Case("no shift", (3, 7, 24), bias=None, scale=True),
    "shift_only": Case("no scale", (3, 7, 24), shift=True),
    "mixed": Case("parameters kept in float32", (5, 4, 48), dtype=_bf16, affine_dtype=_f32, activation="silu"),
    "mixed_adaLN": Case("16-bit modulation in float32", (5, 4, 48), dtype=_f16, affine_dtype=_f32, scale=True, shift=True),
    "narrow": Case("narrow parameters", (5, 48), affine_dtype=_bf16),
    "wide": Case("wide parameters", (5, 48), affine_dtype=_f64),
    "f64_narrow": Case("float64 x, 16-bit parameters", (5, 48), dtype=_f64, affine_dtype=_f16),
    "out_f32": Case("16-bit x, float32 y", (5, 4, 48), dtype=_bf16, out_dtype=_f32, activation="silu"),
    "out_f32_residual": Case("the same with residual", (5, 4, 48), dtype=_f16, out_dtype=_f32, residual="contiguous", activation="silu"),
    "residual": Case("residual without activation", (5, 4, 24), residual="contiguous"),
    "residual_silu": Case("residual and activation", (5, 4, 24), residual="contiguous", activation="silu"),
    "residual_transposed": Case("residual in another layout", (5, 4, 24), residual="transposed", activation="silu"),
    "dy_scalar": Case("y.sum().backward()", (5, 4, 24), dy="scalar", activation="silu"),
    "dy_transposed": Case("dy in another layout than x", (5, 4, 24), dy="transposed"),
    "large_eps": Case("eps counts", (5, 24), eps=0.7),
    "eps_zero": Case("eps = 0", (5, 24), eps=0.0),
    "small_values": Case("squares below eps", (5, 24), mean=0.0, std=1e-4),
    "bf16_long": Case("16-bit sums over many elements", (3, 16641), dtype=_bf16, activation="silu"),
    "bf16_offset": Case("misaligned 16-bit rows", (9, 64), "offset", dtype=_bf16, activation="silu"),
    **{layout: Case("layout", (4, 6, 5, 8), 1, layout, activation="silu") for layout in LAYOUTS if layout not in ("contiguous", "scalar")},
    **{name: Case("dtype", (3, 7, 33), dtype=dtype, scale=True, shift=True, activation="silu") for name, dtype in _DTYPES.items()},
    **{name: Case("activation", (3, 7, 20), residual="contiguous", activation=name) for name in ACTIVATIONS},
}  # fmt: skip

# layer and RMS norm over dimension 1; every case runs for both, contiguous and channels last
_ACROSS = {
    "1d": Case("(N, C, L)", (3, 6, 11), activation="silu"),
    "2d": Case("images", (2, 8, 5, 7), residual="contiguous", activation="gelu"),
    "3d": Case("volumes", (2, 10, 3, 4, 5)),
    "rank2": Case("no spatial dimension: over the last one", (7, 24)),
    "S1": Case("one position", (4, 32, 1, 1), activation="silu"),
    "S2": Case("two positions", (4, 24, 2)),
    "C1": Case("rows of one element: y = bias", (3, 1, 5, 5)),
    "C3": Case("three channels, odd positions", (2, 3, 31, 17)),
    "C5": Case("odd channels", (2, 5, 13, 13), activation="silu"),
    "C33": Case("odd channels, many positions", (2, 33, 19, 23), residual="contiguous", activation="silu"),
    "C96": Case("the first stage of ConvNeXt", (2, 96, 14, 14)),
    "C770": Case("its last stage, odd", (2, 770, 7, 7), activation="silu"),
    "C4099": Case("more channels than a block holds", (2, 4099, 3)),
    "C70001": Case("statistics over more than 64K elements", (1, 70001, 2)),
    "large_S": Case("few channels, many positions", (1, 4, 257, 255), activation="silu"),
    "N1": Case("one sample", (1, 24, 9, 9)),
    "many_samples": Case("many samples of few positions", (131, 12, 3)),
    "no_affine": Case("weight and bias absent", (2, 12, 6, 5), weight=None, bias=None, activation="silu"),
    "no_weight": Case("bias alone", (2, 12, 6, 5), weight=None),
    "no_bias": Case("weight alone, stored around zero", (2, 12, 6, 5), bias=None, weight_offset=1.0),
    "modulation": Case("scale and shift", (3, 12, 6, 5), scale=True, shift=True, residual="contiguous", activation="silu"),
    "modulation_N1": Case("the same for one sample", (1, 12, 6, 5), weight=None, bias=None, scale=True, shift=True),
    "mixed": Case("parameters kept in float32", (2, 12, 6, 5), dtype=_bf16, affine_dtype=_f32, activation="silu"),
    "narrow": Case("narrow parameters", (2, 12, 6, 5), affine_dtype=_f16),
    "out_f32": Case("16-bit x, float32 y", (2, 12, 6, 5), dtype=_bf16, out_dtype=_f32, residual="contiguous"),
    "dy_scalar": Case("y.sum().backward()", (2, 6, 5, 5), dy="scalar", activation="silu"),
    "dy_other": Case("dy in the other layout", (2, 6, 5, 4), dy="channels_last"),
    "offset": Case("misaligned", (2, 16, 8, 8), 1, "offset", dtype=_bf16, activation="silu"),
    "eps_zero": Case("eps = 0", (2, 12, 6, 5), eps=0.0),
    **{name: Case("dtype", (3, 20, 7, 5), dtype=dtype, residual="contiguous", activation="silu") for name, dtype in _DTYPES.items()},
}  # fmt: skip


def _images(case: Case, **fields) -> dict[str, Case]:
    """In both memory orders, the residual like x."""
    first = replace(case, **fields)
    last = "channels_last" if case.layout == "contiguous" else f"channels_last_{case.layout}"
    dy = "contiguous" if case.dy == "channels_last" else case.dy
    return {"cf": first, "cl": replace(first, layout=last, residual=case.residual and "channels_last", dy=dy)}


def _any_layout(shape: tuple[int, ...], **fields) -> dict[str, Case]:
    """What is read in place and what is packed."""
    skipped = ("contiguous", "channels_last", "scalar", "expanded_positions" if fields["norm"] == "instance_norm" else "expanded_channels")
    return {layout: Case("layout", shape, 1, layout, activation="silu", **fields) for layout in LAYOUTS if layout not in skipped}


# batch norm and batch renormalization; every case runs contiguous and channels last
_BATCHES = {name: _CHANNELS[name] for name in ("1d", "2d", "3d", "S2", "C1", "C3", "C20", "C33", "C64", "C320", "C1030", "N1", "no_affine",
            "long", "large_S", "NC", "modulation", "mixed", "narrow", "out_f32", "dy_scalar", "offset", "eps_zero", *_DTYPES)} | {
    "resnet": Case("the last stage of a ResNet", (3, 128, 7, 7), residual="contiguous", activation="relu"),
    "mobilenet": Case("an activation with two kinks", (2, 40, 12, 12), activation="hardswish"),
    "two_values": Case("one sample of two positions: x_hat = +-1", (1, 24, 2)),
    "many_samples": Case("many samples", (130, 24, 3), activation="silu"),
    "large_planes": Case("large planes of odd length", (2, 21, 71, 67), residual="contiguous"),
    "many_large_samples": Case("sums over samples and over long rows", (5, 2, 91, 190), activation="silu"),
    "untracked": Case("no running statistics", (3, 6, 7, 5), tracked=False, activation="silu"),
    "narrow_statistics": Case("running statistics in 16 bits", (4, 6, 5, 5), affine_dtype=_f16),
    "wide_statistics": Case("running statistics in float64", (4, 6, 5, 5), affine_dtype=_f64),
    "weight_NC_bias_C": Case("only weight per sample", (3, 6, 7, 4), weight="NC", activation="silu"),
    "weight_C_bias_NC": Case("only bias per sample", (3, 6, 7, 4), bias="NC", residual="contiguous"),
    "NC_alone": Case("weight per sample, no bias", (3, 33, 7, 4), weight="NC", bias=None, residual="contiguous", activation="relu"),
    "NC_long": Case("vectors per sample over large planes", (2, 3, 131, 127), weight="NC", bias="NC", activation="silu"),
    "NC_wide": Case("many vectors per sample", (5, 320, 3, 3), weight="NC", bias="NC", activation="silu"),
    "small_values": Case("variance below eps", (3, 6, 4, 4), mean=0.0, std=1e-4),
    "mean_10": Case("off centre, where torch still has digits", (3, 6, 9, 9), mean=20.0),
}  # fmt: skip

# the same without positions, where both orders are one
_VECTORS = {
    "rank2": Case("no spatial dimension", (9, 12), activation="silu"),
    "S1": Case("one position", (6, 24, 1, 1), residual="contiguous", activation="relu"),
    "two_samples": Case("two values: x_hat = +-1", (2, 40)),
    "classifier": Case("after a linear layer", (128, 300), activation="relu"),
    "tall": Case("more samples than a block", (5003, 6), activation="silu"),
    "wide": Case("more channels than a block", (6, 4099)),
    "odd": Case("odd channels", (33, 33), residual="contiguous", activation="gelu"),
    "mixed": Case("parameters in another dtype", (40, 24), dtype=_bf16, affine_dtype=_f32, activation="silu"),
    "out_f32": Case("16-bit x, float32 y", (40, 24), dtype=_f16, out_dtype=_f32),
    "offset": Case("misaligned", (9, 64), "offset", dtype=_bf16),
    "no_affine": Case("weight and bias absent", (9, 12), weight=None, bias=None),
    "NC": Case("vectors per sample", (9, 12), weight="NC", bias="NC", activation="silu"),
    "modulation": Case("scale and shift", (9, 12), scale=True, shift=True),
    "f64": Case("float64", (40, 24), dtype=_f64, activation="silu"),
    **{name: Case("layout", (9, 12), 1, name) for name in ("sliced", "transposed", "every_other_sample", "expanded_channels")},
}

# what is made of the kernels of batch and instance norm: renormalization, running statistics, batch-instance norm
_MADE = {name: _BATCHES[name] for name in ("1d", "2d", "3d", "C20", "C33", "N1", "no_affine", "large_planes", "many_samples", "NC", "modulation",
         "mixed", "out_f32", "dy_scalar", "offset", "narrow_statistics", *_DTYPES)}  # fmt: skip

_IMAGES = {  # prefix -> cases, fields
    "instance": (_CHANNELS, {"norm": "instance_norm"}),
    "frozen": (_CHANNELS, {"norm": "instance_norm", "frozen": True}),
    "layer": (_ACROSS, {"norm": "layer_norm", "ndim": 0}),
    "rms": (_ACROSS, {"norm": "rms_norm", "ndim": 0}),
    "batch": (_BATCHES, {"norm": "batch_norm"}),
    "batch_eval": (_MADE, {"norm": "batch_norm", "frozen": True}),
    "renorm": (_MADE, {"norm": "batch_renorm"}),
    "renorm_eval": (_MADE, {"norm": "batch_renorm", "frozen": True}),
    "blend": (_MADE, {"norm": "batch_instance_norm"}),
    "blend_eval": (_MADE, {"norm": "batch_instance_norm", "frozen": True}),
}
_LAST = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")

NORM_CASES = {
    **{f"{prefix}_{name}_{order}": case for prefix, (cases, fields) in _IMAGES.items() for name, one in cases.items()
       for order, case in _images(one, **fields).items()},
    **{f"{prefix}_layout_{name}": case for prefix, (_, fields) in _IMAGES.items() for name, case in _any_layout((4, 6, 5, 8), **fields).items()},
    **{f"{prefix}_{name}": replace(case, norm=norm) for prefix, norm in (("batch", "batch_norm"), ("renorm", "batch_renorm"))
       for name, case in _VECTORS.items()},
    **{f"{norm}_{name}": replace(case, norm=norm, residual=case.residual or ("contiguous" if "add" in norm else None))
       for norm in _LAST for name, case in _ROWS.items()},
    "frozen_S1": Case("one position", (4, 24, 1, 1), norm="instance_norm", frozen=True, activation="silu"),
    "frozen_S1_NC": Case("one position, vectors per sample", (4, 24, 1), norm="instance_norm", frozen=True, weight="NC", bias="NC"),
    "batch_eval_rank2": Case("no spatial dimension", (9, 12), norm="batch_norm", frozen=True, residual="contiguous", activation="relu"),
    "blend_untracked": Case("no running statistics", (3, 6, 7, 5), norm="batch_instance_norm", tracked=False, activation="silu"),
    "blend_positions": Case("two positions, one sample", (1, 24, 2), norm="batch_instance_norm"),
    "frozen_rank2": Case("no spatial dimension", (4, 24), norm="instance_norm", frozen=True, residual="contiguous", activation="silu"),
    "rms_eps_None": Case("float32's epsilon", (5, 24), norm="rms_norm", eps=None, mean=0.0, std=1e-4),
    "rms_eps_None_bf16": Case("float32's epsilon in 16 bits", (5, 24), norm="rms_norm", eps=None, mean=0.0, std=1e-4, dtype=_bf16),
    "rms_eps_None_f64": Case("float64's epsilon", (5, 24), norm="rms_norm", eps=None, mean=0.0, std=1e-8, dtype=_f64),
    "add_rms_eps_None": Case("float32's epsilon", (5, 24), norm="add_rms_norm", residual="contiguous", eps=None, mean=0.0, std=1e-4),
    **{f"adain_{name}_{order}": case for name, one in {
        "2d": Case("other positions in the style", (2, 6, 5, 7), style=(4, 9)),
        "1d": Case("a style of another rank", (2, 6, 11), style=(4, 3)),
        "fused": Case("residual and activation", (2, 20, 9, 8), style=(8, 8), residual="contiguous", activation="relu"),
        "style_f32": Case("a style in another dtype", (2, 12, 6, 6), style=(7, 5), dtype=_bf16, affine_dtype=_f32),
        "style_f16": Case("the other way round", (2, 12, 6, 6), style=(7, 5), affine_dtype=_f16, activation="silu"),
        "long": Case("large planes", (1, 3, 131, 127), style=(260, 255)),
        "bf16": Case("16 bits", (2, 12, 6, 6), style=(6, 6), dtype=_bf16),
        "f64": Case("float64", (2, 12, 6, 6), style=(6, 6), dtype=_f64, activation="gelu"),
    }.items() for order, case in _images(one, norm="adaptive_instance_norm").items()},
}  # fmt: skip

# one of each way to compute: what the properties of every norm run on
KINDS = {
    "group_norm": {},
    "group_norm_cl": {"layout": "channels_last"},
    "instance_norm": {"norm": "instance_norm"},
    "instance_norm_cl": {"norm": "instance_norm", "layout": "channels_last"},
    "frozen": {"norm": "instance_norm", "frozen": True},
    "frozen_cl": {"norm": "instance_norm", "frozen": True, "layout": "channels_last"},
    "batch_norm": {"norm": "batch_norm"},
    "batch_norm_cl": {"norm": "batch_norm", "layout": "channels_last"},
    "batch_norm_nc": {"norm": "batch_norm"},
    "batch_norm_conditional": {"norm": "batch_norm", "weight": "NC", "bias": "NC"},
    "batch_norm_conditional_cl": {"norm": "batch_norm", "weight": "NC", "bias": "NC", "layout": "channels_last"},
    "batch_norm_eval": {"norm": "batch_norm", "frozen": True},
    "batch_renorm": {"norm": "batch_renorm"},
    "batch_renorm_cl": {"norm": "batch_renorm", "layout": "channels_last"},
    "batch_instance_norm": {"norm": "batch_instance_norm"},
    "batch_instance_norm_cl": {"norm": "batch_instance_norm", "layout": "channels_last"},
    "batch_instance_norm_eval": {"norm": "batch_instance_norm", "frozen": True},
    "layer_norm": {"norm": "layer_norm"},
    "layer_norm_cf": {"norm": "layer_norm", "ndim": 0},
    "layer_norm_cl": {"norm": "layer_norm", "ndim": 0, "layout": "channels_last"},
    "rms_norm": {"norm": "rms_norm"},
    "rms_norm_cf": {"norm": "rms_norm", "ndim": 0},
    "rms_norm_cl": {"norm": "rms_norm", "ndim": 0, "layout": "channels_last"},
    "add_layer_norm": {"norm": "add_layer_norm"},
    "add_rms_norm": {"norm": "add_rms_norm"},
}
BATCH = [kind for kind, fields in KINDS.items() if kind.startswith("batch") and not fields.get("frozen")]  # samples share statistics
ADAPTIVE = {  # which has no parameters
    "adaptive_instance_norm": {"norm": "adaptive_instance_norm", "style": (3,)},
    "adaptive_instance_norm_cl": {"norm": "adaptive_instance_norm", "style": (3,), "layout": "channels_last"},
}


def case_of(kind: str, why: str, shape: tuple[int, ...], groups: int = 2, residual: bool = False, **fields) -> Case:
    """The call of this kind nearest to a group norm of `shape`: rows over the last dimension have as many elements as its groups, and of (N, C)
    there are as many."""
    case = Case(why, shape, groups, residual="", **(KINDS | ADAPTIVE)[kind] | fields)
    if case.trailing:
        case = replace(case, shape=(shape[0], groups, math.prod(shape[1:]) // groups))
    if kind.endswith("_nc"):
        case = replace(case, shape=(shape[0] * math.prod(shape[2:]), shape[1]))
    return replace(case, residual=case.layout if residual or "add" in case.norm else None)


def grid(kinds: Iterable[str], **shapes: tuple[int, ...]) -> pytest.MarkDecorator:
    """Every kind with every shape in which it has a result; instance norm by statistics of one position has none."""
    pairs = {
        f"{kind}-{name}": (kind, shape) for kind in kinds for name, shape in shapes.items() if "instance" not in kind or math.prod(shape[2:]) != 1
    }
    return pytest.mark.parametrize("kind, shape", pairs.values(), ids=pairs)
