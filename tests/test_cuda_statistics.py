"""The CUDA kernels of analytic normalization without a GPU, by the emulation of ``cuda_emulation.h``."""

import inspect
import re
from dataclasses import dataclass

import pytest
import test_statistics as statistics
import torch
from cuda_build import ROOT, build
from test_cuda_compile import GUARD, emulation  # noqa: F401 (a fixture)
from torch import Tensor

from normops import backends, maps, reference


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory):
    return build("statistics", tmp_path_factory.mktemp("statistics"), ("statistics",), {})


def test_every_function_is_an_operator() -> None:
    """``backends`` registers something for each of them when it loads the extension."""
    text = "".join(path.read_text() for path in (ROOT / "csrc/cuda").glob("*.cu"))
    assert sorted(re.findall(r'm\.def\(\s*"(\w+)\(', text)) == sorted(re.findall(r'm\.impl\("(\w+)"', text)) == sorted(backends.OPS)


# ---- the tests that run on every backend ----

NAMES = list(maps.MAPS)
BODIES = {
    statistics.test_six_values_are_the_maps: [{"name": name, "parameters": parameters} for name, parameters in statistics.CALLS],
    statistics.test_no_variance: [{"name": name, "parameters": parameters} for name, parameters in statistics.CALLS],
    statistics.test_element_by_element: [{}],
    statistics.test_tails_keep_their_digits: [{"name": name} for name in ("relu", "leaky_relu", "abs")],
    statistics.test_huge_and_nan: [{"name": name} for name in NAMES if name not in ("exp", "square")],
    statistics.test_activation_dtypes_and_shapes: [{}],
    statistics.test_weight: [{"key": key, "dtype": torch.float32} for key in statistics.WEIGHTS],
    statistics.test_weight_norm: [{}],
    statistics.test_outputs_have_scale_and_bias: [{}],
    statistics.test_sizes_beyond_float_squares: [{}],
}
SHARED = [(body, options) for body, every in BODIES.items() for options in every]


@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize("body, options", SHARED, ids=["-".join(map(str, (body.__name__[5:], *options.values()))) for body, options in SHARED])
def test_shared(poison, body, options: dict) -> None:
    fixtures = {"backend": "cuda", "device": "cpu", "poison": poison}
    body(**options, **{key: value for key, value in fixtures.items() if key in inspect.signature(body).parameters})


# ---- weights: what is written, and nothing beside it ----

_f16, _bf16, _f32, _f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@dataclass(frozen=True)
class Weight:
    """The arguments of both functions. The first field says why it is here."""

    why: str
    outputs: int
    inputs: int  # of a group
    taps: int = 1
    groups: int = 1
    last: bool = False
    dtype: torch.dtype = _f32
    scale: torch.dtype | None = _f32
    bias: torch.dtype | None = _f32
    aligned: bool = True  # tensors begin where vector loads may


WEIGHTS = [
    Weight("convolution", 8, 16, 9),
    Weight("convolution, channels last", 8, 16, 9, last=True, scale=None),
    Weight("at odd addresses", 8, 16, 9, aligned=False, bias=None),
    Weight("odd rows", 40, 3, 49, dtype=_f16, scale=_f64, bias=_f16),
    Weight("odd rows, channels last", 40, 3, 49, last=True, dtype=_bf16, scale=_f16, bias=_bf16),
    Weight("vectors across inputs", 70, 40, 3, dtype=_bf16, scale=_bf16, bias=_f64),
    Weight("vectors across taps, channels last", 70, 12, 6, last=True, dtype=_f16),
    Weight("one tap", 300, 64, dtype=_f16),
    Weight("one tap of double", 33, 70, dtype=_f64, scale=_f16, bias=_f64),
    Weight("a block for each row", 5, 100, 9, groups=5),
    Weight("several blocks of columns", 20, 200, 7, dtype=_f64, last=True),
    Weight("held in shared memory to the last byte", 3, 8192),
    Weight("longer than shared memory", 20, 2048, 5, last=True),
    Weight("longer than shared memory, in 16 bits", 3, 16392, dtype=_bf16),
    Weight("odd and longer than shared memory", 2, 911, 9),
    Weight("groups", 12, 4, 5, groups=4),
    Weight("groups, channels last", 68, 5, 4, groups=2, last=True, dtype=_f16),
    Weight("depthwise", 300, 1, 9, groups=300),
    Weight("depthwise with two outputs of an input, in 16 bits", 512, 1, 8, groups=256, dtype=_bf16, last=True),
    Weight("depthwise, one tap", 70, 1, groups=70),
    Weight("rows of one, more than a thread has at least", 9000, 1),
    Weight("one element", 1, 1, dtype=_f64),
]


class Memory:
    """Tensors with a margin on both sides, which stays as it is."""

    def __init__(self, aligned: bool) -> None:
        self.behind, self.made = GUARD if aligned else GUARD - 1, []

    def tensor(self, value: Tensor) -> Tensor:
        whole = torch.full((value.numel() + 2 * GUARD,), 12345.0, dtype=value.dtype)
        self.made.append((whole, value.numel()))
        return whole[self.behind : self.behind + value.numel()].view(value.shape).copy_(value)

    def empty(self, *shape: int, dtype: torch.dtype = _f64) -> Tensor:
        return self.tensor(torch.full(shape, torch.nan, dtype=dtype))

    def check(self) -> None:
        for whole, size in self.made:
            assert (whole[: self.behind] == 12345).all() and (whole[self.behind + size :] == 12345).all(), "written outside"


def compute(functions, call: Weight, given: dict[str, Tensor | None], dtype: torch.dtype) -> dict[str, Tensor]:
    """What both functions write, which is NaN before; `dtype` is the weight's."""
    memory = Memory(call.aligned)
    shape = (call.outputs, call.taps, call.inputs) if call.last else (call.outputs, call.inputs, call.taps)

    def shaped(value: Tensor) -> Tensor:
        return value.view(shape).movedim(-1, 1) if call.last else value.view(shape)

    given = {name: value if value is None else memory.tensor(value) for name, value in given.items()}
    weight, dnew, mean, var, scale = (given[name] for name in ("weight", "dnew", "mean", "var", "scale"))
    layout = (call.outputs, call.taps, call.groups, call.last, 1e-3)
    new, new_bias, stats = memory.empty(weight.numel(), dtype=dtype), memory.empty(call.outputs, dtype=dtype), memory.empty(2, call.outputs)
    functions.analytic_norm_weight_fwd(shaped(new), new_bias, stats, shaped(weight), mean, var, scale, given["bias"], *layout)
    of_weight, of_mean, of_var = memory.empty(weight.numel(), dtype=dtype), memory.empty(mean.numel()), memory.empty(mean.numel())
    of_scale = memory.empty(call.outputs)
    upstream = shaped(dnew), given["dnew_bias"], given["dstats"]
    functions.analytic_norm_weight_bwd(shaped(of_weight), of_mean, of_var, of_scale, *upstream, shaped(weight), mean, var, scale, stats, *layout)
    memory.check()
    results = {"new": new, "new_bias": new_bias, "stats": stats, "of_weight": of_weight, "of_mean": of_mean, "of_var": of_var, "of_scale": of_scale}
    return {name: value.clone() for name, value in results.items()}


@pytest.mark.parametrize("call", WEIGHTS, ids=lambda call: call.why)
def test_weights(emulated, call: Weight) -> None:
    """Sums are in double, so that what is left is the rounding of the factor of a row, of the product with it, and of what is stored."""
    size, channels = call.outputs * call.inputs * call.taps, call.groups * call.inputs
    given = {
        "weight": torch.randn(size).to(call.dtype),
        "mean": torch.randn(channels, dtype=_f64) + 0.5,
        "var": torch.rand(channels, dtype=_f64),
        "scale": None if call.scale is None else torch.rand(call.outputs).add(0.5).to(call.scale),
        "bias": None if call.bias is None else torch.randn(call.outputs).to(call.bias),
        "dnew": torch.randn(size).to(call.dtype),
        "dnew_bias": torch.randn(call.outputs, dtype=_f64),
        "dstats": torch.randn(2, call.outputs, dtype=_f64),
    }
    found = compute(emulated, call, given, call.dtype)
    exact = compute(reference, call, {name: value if value is None else value.double() for name, value in given.items()}, _f64)
    stored, computed = torch.finfo(call.dtype).eps, torch.finfo(reference.accumulator(call.dtype)).eps
    for name, value in found.items():
        rounding = 2 * computed + stored / 2 if value.dtype == call.dtype else 0
        limit = rounding * exact[name].abs().clamp_min(torch.finfo(value.dtype).tiny) + 1e-13 * exact[name].abs().max()
        assert ((value.double() - exact[name]).abs() <= limit).all(), name
