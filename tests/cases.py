"""Named cases of group norm, their inputs, the float64 oracle and the tolerance that follows from it.

Tolerance: the error against float64 is at most twice the error of torch's own composition of ops, on the same inputs and in the dtype in which
normops computes (float32 for 16-bit inputs, rounded once at the end), plus a rounding floor of ``FLOOR`` roundoffs of the tensor's own dtype
times its magnitude. The magnitude of a gradient is that of the terms that it sums: they cancel, their roundings do not.
For float64 the oracle is itself torch in float64. Its own error is taken to be torch's error in float32, times the ratio of the two roundoffs.
"""

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {  # the torch functions that the names promise
    "none": lambda t, slope: t,
    "relu": lambda t, slope: F.relu(t),
    "leaky_relu": lambda t, slope: F.leaky_relu(t, slope),
    "silu": lambda t, slope: F.silu(t),
    "gelu": lambda t, slope: F.gelu(t),
    "gelu_tanh": lambda t, slope: F.gelu(t, approximate="tanh"),
    "tanh": lambda t, slope: torch.tanh(t),
    "sigmoid": lambda t, slope: torch.sigmoid(t),
    "hardswish": lambda t, slope: F.hardswish(t),
}
FLOOR = 4
TENSORS = ("x", "weight", "bias", "residual", "scale", "shift")  # what has a gradient
HALF = (torch.float16, torch.bfloat16)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def channels_last(x: Tensor) -> Tensor:
    """`x` with memory order (N, spatial, C), for any rank."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _within(x: Tensor, dim: int) -> Tensor:
    """`x` as a slice of a tensor that is larger along `dim` on both sides."""
    shape = list(x.shape)
    shape[dim] += 3
    return torch.zeros(shape, dtype=x.dtype, device=x.device).narrow(dim, 1, x.shape[dim]).copy_(x)


def _order(x: Tensor, *dims: int) -> Tensor:
    """`x` with the memory order `dims`."""
    return x.permute(dims).contiguous().permute([dims.index(i) for i in range(x.dim())])


def _offset(x: Tensor) -> Tensor:
    """Dense `x` one element behind an aligned address, where no vector load may begin."""
    return torch.zeros(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].as_strided(x.shape, x.stride()).copy_(x)


# name -> a tensor of the given values (expanded: of some of them) in another layout
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": channels_last,
    "offset": lambda x: _offset(x.contiguous()),
    "channels_last_offset": lambda x: _offset(channels_last(x)),
    "sliced": lambda x: _within(x, -1),
    "sliced_channels": lambda x: _within(x, 1),
    "channels_last_sliced": lambda x: _within(channels_last(x).movedim(1, -1), -1).movedim(-1, 1),
    "every_other_sample": lambda x: torch.stack((x, x), 1).flatten(0, 1)[::2],
    "transposed": lambda x: _order(x, 1, 0, *range(2, x.dim())),
    "spatial_permuted": lambda x: _order(x, 0, 1, *range(x.dim() - 1, 1, -1)),
    "channels_last_permuted": lambda x: _order(x, 0, *range(x.dim() - 1, 1, -1), 1),
    "channels_between": lambda x: _order(x, 0, 2, 1, *range(3, x.dim())),
    "expanded_samples": lambda x: x[:1].expand_as(x),
    "expanded_channels": lambda x: x[:, :1].expand_as(x),
    "expanded_positions": lambda x: x[..., :1].expand_as(x),
    "scalar": lambda x: x.flatten()[0].expand_as(x),  # what y.sum().backward() hands to backward
}
IN_PLACE = ("contiguous", "channels_last", "offset", "channels_last_offset", "spatial_permuted", "channels_last_permuted")


@dataclass(frozen=True)
class Case:
    """One call. The first field says why it is here."""

    why: str
    shape: tuple[int, ...]
    groups: int
    layout: str = "contiguous"
    dtype: torch.dtype = torch.float32
    weight: str | None = "C"  # "C", "NC" or None
    bias: str | None = "C"
    affine_dtype: torch.dtype | None = None  # x's, unless given
    residual: str | None = None  # its layout
    scale: bool = False
    shift: bool = False
    dy: str | None = None  # its layout; y's, unless given
    activation: str = "none"
    negative_slope: float = 0.2
    eps: float = 1e-5
    out_dtype: torch.dtype | None = None
    mean: float = 0.5
    std: float = 2.0

    def options(self) -> dict:
        return {"activation": self.activation, "negative_slope": self.negative_slope, "out_dtype": self.out_dtype}


@dataclass
class Result:
    y: Tensor
    gradients: dict[str, Tensor]


@dataclass
class Inputs:
    case: Case
    tensors: dict[str, Tensor]
    dy: Tensor
    magnitude: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, case: Case, device: str) -> "Inputs":
        def random(shape, dtype, layout="contiguous", mean=0.0, std=1.0):
            values = torch.randn(shape, dtype=torch.float64) * std + mean
            return LAYOUTS[layout](values.to(dtype).to(device)).detach()

        samples, channels = case.shape[:2]
        vector = {"C": (channels,), "NC": (samples, channels)}
        affine_dtype = case.affine_dtype or case.dtype
        tensors = {"x": random(case.shape, case.dtype, case.layout, case.mean, case.std)}
        if case.weight:
            tensors["weight"] = random(vector[case.weight], affine_dtype, mean=0.5)
        if case.bias:
            tensors["bias"] = random(vector[case.bias], affine_dtype)
        if case.residual:
            tensors["residual"] = random(case.shape, case.dtype, case.residual)
        if case.scale:
            tensors["scale"] = random((samples, channels), affine_dtype)
        if case.shift:
            tensors["shift"] = random((samples, channels), affine_dtype)
        x = tensors["x"]
        dense = x if case.layout in IN_PLACE else channels_last(x) if x.stride(1) == 1 else x.contiguous()
        dy = random(case.shape, case.out_dtype or case.dtype, case.dy or "contiguous")
        if case.dy is None:
            dy = torch.empty_like(dense, dtype=dy.dtype).copy_(dy)
        return cls(case, tensors, dy)

    def run(self, function, wanted: tuple[str, ...] | None = None) -> Result:
        """y and the gradients of `function`, called as ``normops.group_norm``."""
        leaves = {name: value.detach().requires_grad_(wanted is None or name in wanted) for name, value in self.tensors.items()}
        arguments = dict(leaves)
        y = function(arguments.pop("x"), self.case.groups, arguments.pop("weight", None), arguments.pop("bias", None), self.case.eps,
                     **arguments, **self.case.options())  # fmt: skip
        names = [name for name, leaf in leaves.items() if leaf.requires_grad]
        gradients = torch.autograd.grad(y, [leaves[name] for name in names], self.dy)
        return Result(y.detach(), dict(zip(names, gradients, strict=True)))

    def torch(self, dtype: torch.dtype) -> Result:
        """torch's own ops in `dtype`, on contiguous copies: the oracle in float64, the measure of the tolerance in float32."""
        wide = replace(self.case, out_dtype=None)
        tensors = {name: value.to(dtype).contiguous() for name, value in self.tensors.items()}
        return Inputs(wide, tensors, self.dy.to(dtype).contiguous()).run(composed)


def composed(x, num_groups, weight=None, bias=None, eps=1e-5, *, activation="none", negative_slope=0.01, residual=None, scale=None, shift=None,
             out_dtype=None):  # fmt: skip
    """The call as torch spells it, from ``torch.group_norm`` and elementwise ops."""

    def over(vector):
        return vector[(...,) + (None,) * (x.dim() - 2)]

    # torch.group_norm takes no vectors per sample, and its backward fails with a bias but no weight
    plain = weight is not None and weight.dim() == 1 and (bias is None or bias.dim() == 1)
    t = torch.group_norm(x, num_groups, weight if plain else None, bias if plain else None, eps)
    if not plain:
        t = t if weight is None else t * over(weight)
        t = t if bias is None else t + over(bias)
    t = t if scale is None else t * (1 + over(scale))
    t = t if shift is None else t + over(shift)
    t = t if residual is None else t + residual
    return ACTIVATIONS[activation](t, negative_slope)


def roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def magnitudes(inputs: Inputs) -> dict[str, float]:
    """The largest of the terms of which each tensor is the sum, where that is not the tensor's own largest element."""
    case, t = inputs.case, {name: value.double() for name, value in inputs.tensors.items()}
    x = t["x"].reshape(case.shape[0], case.groups, -1)
    rstd = (x.var(2, unbiased=False) + case.eps).rsqrt().repeat_interleave(case.shape[1] // case.groups, 1)
    slope = t["weight"] if "weight" in t else torch.ones_like(rstd)
    slope = slope * (1 + t["scale"]) if "scale" in t else slope
    over = (...,) + (None,) * (len(case.shape) - 2)
    found = {"x": ((rstd * slope)[over] * inputs.dy.double()).abs().max().item()}
    # x_hat and dt*x_hat are sums too where they vanish: a group of equal values
    largest = inputs.dy.abs().max().item()
    return found | dict.fromkeys(("weight", "bias", "scale", "shift"), largest)


def check(got: Result, inputs: Inputs, factor: float = 2) -> None:
    """Hold `got` to the tolerance above, and to the shape and dtype of what it is the gradient of."""
    case = inputs.case
    want = inputs.torch(torch.float64)
    own = accumulator(case.dtype)
    if own == torch.float64:  # torch in float32, against torch in float64 on the inputs so rounded, says what rounding costs
        narrow = Inputs(case, {name: value.float() for name, value in inputs.tensors.items()}, inputs.dy.float())
        theirs, exact = narrow.torch(torch.float32), narrow.torch(torch.float64)
        ratio = roundoff(torch.float64) / roundoff(torch.float32)
    else:
        theirs, exact, ratio = inputs.torch(own), want, 1.0
    largest = magnitudes(inputs)
    y_dtype = case.out_dtype or case.dtype
    tensors = [("y", got.y, want.y, theirs.y, exact.y, y_dtype)]
    for name, gradient in got.gradients.items():
        assert gradient.shape == inputs.tensors[name].shape, f"d{name}: shape {tuple(gradient.shape)}"
        dtype = inputs.tensors[name].dtype
        tensors.append((f"d{name}", gradient, want.gradients[name], theirs.gradients[name], exact.gradients[name], dtype))
    failures = []
    for name, mine, oracle, other, other_oracle, dtype in tensors:
        assert mine.dtype == dtype, f"{name}: dtype {mine.dtype}"
        error = (mine.double() - oracle).abs().max().item()
        loss = (other.to(dtype if own != torch.float64 else other.dtype).double() - other_oracle).abs().max().item() * ratio
        magnitude = max(oracle.abs().max().item(), largest.get(name[1:], 0.0) if name != "y" else 0.0)
        # an output wider than what it was computed in is no better than that
        unit = max(roundoff(dtype), roundoff(own))
        tiny = torch.finfo(dtype).smallest_normal * unit
        limit = factor * loss + FLOOR * unit * magnitude + tiny
        if not error <= limit:  # NaN fails too
            failures.append(f"{name}: error {error:.3g} > {limit:.3g} (torch loses {loss:.3g}, largest {magnitude:.3g})")
    assert not failures, f"{case.why}: " + "; ".join(failures)


def assert_layout(y: Tensor, x: Tensor, layout: str) -> None:
    """y lies in memory as x does; where x is not dense, contiguous, or channels last if x's channels are adjacent."""
    if layout in IN_PLACE:
        like = x
    else:
        like = channels_last(x) if x.stride(1) == 1 and x.shape[1] > 1 else x.contiguous()
    sizes = [i for i, size in enumerate(y.shape) if size > 1]
    assert [y.stride(i) for i in sizes] == [like.stride(i) for i in sizes], f"{layout}: strides {y.stride()}, expected {like.stride()}"


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
