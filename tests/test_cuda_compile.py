"""The CUDA backend without a GPU: its sources, compiled as C++, compute the norms.

``cuda_emulation.h`` says what this can see and what it cannot.
"""

import ctypes
import inspect
import math
from dataclasses import dataclass
from functools import cache
from itertools import combinations

import pytest
import test_norms as norms
import test_numerics as numerics
import torch
from cases import FLOOR, KINDS, Inputs, check, roundoff
from cuda_build import build
from test_norms import ALL
from torch import Tensor

from normops import backends, reference
from normops.reference import accumulator

# some kernels and loops need large tensors; here they run on all sizes, with tiles and chunks of several steps
VARIANTS = {
    "as_built": {},
    "split": {
        "kGroupBytes = 64 << 10": "kGroupBytes = 0",
        "kBlocks = 2048": "kBlocks = 1",
        "kMaxSteps = 64": "kMaxSteps = 4",
        "kWaveBytes = 24 << 20": "kWaveBytes = 0",
        "kRowBytes = 64 << 10": "kRowBytes = 4 << 10",
        "kPieceBytes = 32 << 10": "kPieceBytes = 2 << 10",
        "kSumBytes = 128": "kSumBytes = 16",
        "kFewRows = 64": "kFewRows = 2",
        "kLongBytes = 256 << 10": "kLongBytes = 0",
        "kRowBlocks = 512": "kRowBlocks = 1",
        "kMaxRows = 256": "kMaxRows = 4",
    },
}


@pytest.fixture(scope="session")
def builds(tmp_path_factory: pytest.TempPathFactory):
    return cache(lambda variant: build(variant, tmp_path_factory.mktemp(variant), ("group_norm", "row_norm"), VARIANTS[variant]))


@pytest.fixture(params=VARIANTS)
def emulated(request: pytest.FixtureRequest, builds):
    return builds(request.param)


@dataclass(frozen=True)
class Call:
    """The arguments of a pair of functions. The first field says why it is here."""

    why: str
    op: str  # group_norm, batch_norm or row_norm
    N: int
    C: int
    S: int = 1
    G: int = 1
    dtype: torch.dtype = torch.float32
    y_dtype: torch.dtype | None = None  # dtype, unless given
    vector_dtype: torch.dtype | None = None
    weight: int | None = 1  # rows of C
    bias: int | None = 1
    residual: bool = False
    activation: str = "silu"
    mean: float = 0.5
    std: float = 2.0
    aligned: bool = True  # tensors begin where vector loads may
    channels_last: bool = False
    frozen: int = 0  # samples of the given statistics
    means: bool = False  # given too
    running: torch.dtype | None = None
    centered: bool = True
    weight_offset: float = 0.0
    adds: bool = False

    @property
    def options(self) -> tuple:
        """What stands between C and eps or momentum."""
        return {
            "group_norm": (self.G, self.channels_last, bool(self.frozen)),
            "batch_norm": (self.channels_last,),
            "row_norm": (self.G, self.centered, self.weight_offset),
        }[self.op]

    def inputs(self) -> dict[str, Tensor]:
        """Flat tensors: their shapes mean nothing."""
        numel, own = self.N * self.C * self.S, accumulator(self.dtype)

        def random(size: int, dtype: torch.dtype, mean: float = 0.0, std: float = 1.0) -> Tensor:
            behind = 0 if self.aligned else 1
            return torch.zeros(size + behind, dtype=dtype)[behind:].copy_(torch.randn(size, dtype=torch.float64) * std + mean)

        made = {"x": random(numel, self.dtype, self.mean, self.std), "dy": random(numel, self.y_dtype or self.dtype)}
        for name, rows in (("weight", self.weight), ("bias", self.bias)):
            if rows is not None:
                made[name] = random(rows * self.C, self.vector_dtype or self.dtype, 0.5)
        names = ("residual",) * self.residual + ("addend", "dtotal") * self.adds
        made |= {name: random(numel, self.dtype) for name in names}
        if self.frozen:
            mean = torch.randn(self.frozen * self.G, dtype=own)
            made["stats"] = torch.stack((mean, mean * 1e-3, torch.rand_like(mean) + 0.5))
        if self.means:
            made["means"] = torch.randn(2, self.frozen * self.G, dtype=own)
        if self.running is not None:
            made |= {"running_mean": random(self.C, self.running), "running_var": random(self.C, self.running, 9.0)}
        return made


GUARD = 32
GRADIENTS = ("dx", "dweight", "dbias", "dresidual")


def compute(functions, call: Call, given: dict[str, Tensor], wanted=GRADIENTS, forward_wanted=("y", "stats")) -> dict[str, Tensor]:
    """What both functions write, which is NaN before; nothing is written beside it. No backward without both results of forward."""
    guards, x, own = [], given["x"], accumulator(given["x"].dtype)

    def output(size: int, dtype: torch.dtype) -> Tensor:
        behind = GUARD if call.aligned else GUARD - 1
        guards.append((torch.full((size + 2 * GUARD,), 12345.0, dtype=dtype), behind, size))
        return guards[-1][0][behind : behind + size].fill_(torch.nan)

    def like(name: str) -> Tensor | None:
        return output(given[name].numel(), given[name].dtype) if name in given else None

    stats = given.get("stats")
    if stats is None and "stats" in forward_wanted:
        rows, each = {
            "group_norm": (3, call.N * call.G),
            "batch_norm": (4, call.C),
            "row_norm": (3 if call.centered else 1, call.N * call.G * call.S),
        }[call.op]
        stats = output(rows * each, own).view(rows, each)
    out = {"y": like("dy") if "y" in forward_wanted else None, "stats": stats}
    parameters, code = (given.get("weight"), given.get("bias"), given.get("residual")), reference.CODES[call.activation]
    shape = (call.N, call.C, *call.options)
    forward, backward = getattr(functions, f"{call.op}_fwd"), getattr(functions, f"{call.op}_bwd")
    means = ()
    if call.op == "group_norm":
        means = (given.get("means"),)
        forward(out["y"], stats, x, *parameters, *shape, 1e-5, code, 0.2)
    elif call.op == "batch_norm":
        out |= {name: like(name) if name not in given else like(name).copy_(given[name]) for name in ("running_mean", "running_var")}
        forward(out["y"], stats, out["running_mean"], out["running_var"], x, *parameters, *shape, 0.3, 1e-5, code, 0.2)
    else:
        out["total"] = like("addend")
        forward(out["y"], out["total"], stats, x, given.get("addend"), *parameters, *shape, 1e-5, code, 0.2)
        x = x if out["total"] is None else out["total"]
    if "y" in forward_wanted and "stats" in forward_wanted:
        gradients = {f"d{name}": like(name) for name in ("x", "weight", "bias", "residual") if f"d{name}" in wanted}
        upstream = (given["dy"], given.get("dtotal")) if call.op == "row_norm" else (given["dy"],)
        backward(*(gradients.get(name) for name in GRADIENTS), *upstream, x, stats, *parameters, *means, *shape, code, 0.2)
        out |= gradients
    for whole, behind, size in guards:
        assert (whole[:behind] == 12345).all() and (whole[behind + size :] == 12345).all(), "written outside"
    return {name: value.clone() for name, value in out.items() if value is not None}


def wide(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same in float64, on the sum that is normalized."""
    given = dict(given)
    if "addend" in given:
        given["x"] = given["x"] + given.pop("addend")
    return {name: value.double() for name, value in given.items()}


def compare(got: dict[str, Tensor], call: Call, given: dict[str, Tensor]) -> None:
    """The tolerance of ``cases.py``, with the reference for torch."""
    exact, unit, ratio = compute(reference, call, wide(given)), roundoff(accumulator(call.dtype)), 1.0
    theirs, oracle = compute(reference, call, given), exact
    if call.dtype == torch.float64:
        narrow = {name: value.float() for name, value in given.items()}
        theirs, oracle, ratio = compute(reference, call, narrow), compute(reference, call, wide(narrow)), unit / roundoff(torch.float32)
    dy = given["dy"].abs().max().item()
    slope = 1.0 if call.weight is None else (given["weight"].double() + call.weight_offset).abs().max().item()
    terms = {"dx": exact["stats"][-1 if call.op == "row_norm" else 2].max().item() * slope * dy, "dweight": dy, "dbias": dy}  # what is summed up
    for name, mine in got.items():
        assert not mine.isnan().any(), f"{name}: not written"
        if name == "total":
            assert torch.equal(mine, given["x"] + given["addend"])
            continue
        want, rounding = exact[name].flatten(), max(unit, roundoff(mine.dtype))
        loss = (theirs[name].double() - oracle[name]).abs().max().item() * ratio
        limit = 2 * loss + FLOOR * rounding * max(want.abs().max().item(), terms.get(name, 0.0))
        error = (mine.flatten().double() - want).abs().max().item()
        assert error <= limit, f"{call.why}: {name}: error {error:.3g} > {limit:.3g}"


_f16, _bf16, _f32, _f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
CALLS = [
    Call("given statistics", "group_norm", 3, 6, 32, 6, frozen=1),
    Call("given statistics, odd rows", "group_norm", 2, 6, 35, 3, frozen=2, weight=None, residual=True),
    Call("given statistics, channels last", "group_norm", 3, 16, 20, 4, channels_last=True, frozen=1, residual=True),
    Call("given for each sample, vectors too", "group_norm", 3, 12, 20, 4, channels_last=True, frozen=3, weight=3),
    Call("given statistics, long rows", "group_norm", 2, 3, 5001, 3, frozen=1, weight=2, bias=None),
    Call("one position: samples are positions", "group_norm", 300, 16, 1, 16, frozen=1, dtype=_bf16, y_dtype=_f32),
    Call("one position, vectors for each sample", "group_norm", 5, 12, 1, 3, frozen=1, weight=5),
    Call("one position, statistics for each sample", "group_norm", 5, 12, 1, 3, frozen=5, dtype=_f64),
    Call("given means", "group_norm", 3, 6, 32, 6, frozen=1, means=True),
    Call("given means for each sample, odd rows", "group_norm", 2, 6, 35, 3, frozen=2, means=True, residual=True, bias=None),
    Call("given means, channels last", "group_norm", 3, 16, 20, 4, channels_last=True, frozen=1, means=True, weight=3),
    Call("given means, long rows in 16 bits", "group_norm", 2, 3, 5000, 3, frozen=1, means=True, dtype=_bf16, y_dtype=_f32),
    Call("given means, one position: samples are positions", "group_norm", 300, 16, 1, 16, frozen=1, means=True, dtype=_f64, residual=True),
    Call("groups whose vectors lie across channels", "group_norm", 3, 16, 49, 2, weight=3),
    Call("the same in 16 bits", "group_norm", 2, 32, 25, 2, dtype=_bf16, residual=True),
    Call("several groups in a block", "group_norm", 40, 32, 4, 16, residual=True),
    Call("the largest group that a block holds backward", "group_norm", 1, 8, 1024, 1),
    Call("a group that a block holds forward alone", "group_norm", 1, 4, 4096, 1, weight=None),
    Call("channels", "batch_norm", 5, 6, 40, running=_f32),
    Call("channels, all bare", "batch_norm", 5, 6, 40, weight=None, bias=None, activation="none"),
    Call("channels of odd planes", "batch_norm", 9, 8, 49, running=_f64, residual=True, bias=None),
    Call("channels of short planes", "batch_norm", 30, 12, 4, dtype=_bf16, vector_dtype=_f32, running=_bf16),
    Call("channels of short planes, more than a block each", "batch_norm", 70, 2056, 3, running=_f32, residual=True),
    Call("columns, far from zero", "batch_norm", 190, 8, 49, mean=1e4, std=1.0, running=_f32),
    Call("columns of odd planes in 16 bits", "batch_norm", 130, 3, 147, dtype=_f16, y_dtype=_f32, running=_f16, residual=True),
    Call("columns of double", "batch_norm", 70, 5, 100, dtype=_f64, running=_f32, weight=None),
    Call("planes", "batch_norm", 7, 3, 2100, running=_f32, residual=True),
    Call("odd planes in 16 bits, at odd addresses", "batch_norm", 5, 3, 5001, dtype=_bf16, running=_f32, aligned=False),
    Call("one sample", "batch_norm", 1, 6, 300, running=_f32),
    Call("one sample of long planes", "batch_norm", 1, 3, 20001, running=_f64, residual=True),
    Call("one value", "batch_norm", 1, 20, 1, channels_last=True, running=_f32),
    Call("one position", "batch_norm", 300, 40, 1, channels_last=True, running=_f32, dtype=_bf16),
    Call("channels last", "batch_norm", 5, 24, 49, channels_last=True, running=_f32, residual=True),
    Call("channels last, odd and more than a block each", "batch_norm", 300, 33, 30, channels_last=True, dtype=_f16, y_dtype=_f32, running=_f16),
    Call("channels with vectors for each sample", "batch_norm", 5, 6, 40, weight=5, bias=5, running=_f32),
    Call("channels with biases for each sample", "batch_norm", 7, 6, 30, weight=1, bias=7, vector_dtype=_f64, residual=True),
    Call("planes with vectors for each sample", "batch_norm", 7, 3, 2100, weight=7, bias=1, running=_f32),
    Call("channels last with vectors for each sample", "batch_norm", 6, 16, 21, channels_last=True, weight=6, bias=6, residual=True, running=_f32),
    Call("one position with vectors for each sample", "batch_norm", 40, 16, 1, channels_last=True, weight=40, bias=None, dtype=_bf16),
    Call("rows", "row_norm", 7, 64),
    Call("rows, all bare", "row_norm", 7, 64, weight=None, bias=None, activation="none"),
    Call("rows of one element", "row_norm", 5, 1),
    Call("short odd rows", "row_norm", 301, 13, dtype=_f16, vector_dtype=_f32),
    Call("rows at odd addresses", "row_norm", 9, 64, aligned=False, residual=True),
    Call("a warp for each row", "row_norm", 11, 512, dtype=_bf16, residual=True, activation="gelu"),
    Call("a block for each row", "row_norm", 3, 1500, dtype=_f64),
    Call("rows longer than shared memory", "row_norm", 3, 9000, residual=True),
    Call("odd rows longer than shared memory", "row_norm", 2, 8195, adds=True),
    Call("few long rows", "row_norm", 2, 70000, adds=True),
    Call("few long rows in 16 bits, RMS", "row_norm", 1, 132000, dtype=_bf16, centered=False, bias=None, weight_offset=1.0),
    Call("long rows of double", "row_norm", 2, 4500, dtype=_f64, centered=False),
    Call("groups of channels", "row_norm", 9, 40, 1, 5),
    Call("groups of odd channels, vectors for each sample", "row_norm", 6, 36, 1, 4, weight=6, bias=6, residual=True),
    Call("vectors for some samples", "row_norm", 12, 24, weight=4, bias=6, weight_offset=1.0),
    Call("vectors for some samples, one for all", "row_norm", 12, 256, weight=3, bias=1, dtype=_bf16, vector_dtype=_f64),
    Call("RMS", "row_norm", 9, 96, centered=False, weight_offset=1.0, bias=None),
    Call("RMS of odd rows", "row_norm", 9, 33, centered=False, weight_offset=0.5, residual=True),
    Call("addend and dtotal", "row_norm", 6, 128, adds=True),
    Call("addend in 16 bits, y wider", "row_norm", 6, 128, adds=True, dtype=_bf16, y_dtype=_f32, centered=False, residual=True),
    Call("many rows", "row_norm", 2100, 4, activation="relu"),
    Call("across", "row_norm", 2, 6, 64),
    Call("across odd positions", "row_norm", 2, 35, 49, residual=True),
    Call("across few odd positions in 16 bits", "row_norm", 3, 20, 3, dtype=_f16, vector_dtype=_f32),
    Call("across, RMS", "row_norm", 2, 24, 72, dtype=_bf16, centered=False, weight_offset=1.0, bias=None),
    Call("across, y wider", "row_norm", 2, 33, 40, dtype=_bf16, y_dtype=_f32, residual=True, activation="hardswish"),
    Call("across, vectors for some samples", "row_norm", 6, 10, 24, weight=2, bias=3),
    Call("across, at odd addresses", "row_norm", 2, 10, 24, aligned=False),
    Call("across in double", "row_norm", 2, 40, 20, dtype=_f64, residual=True),
    Call("across more than shared memory", "row_norm", 1, 700, 24),
    Call("across more sums than shared memory", "row_norm", 1, 4100, 3),
    Call("across one channel", "row_norm", 2, 1, 64),
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.why)
def test_emulated_calls(emulated, call: Call) -> None:
    """All that both functions write, against the reference in float64."""
    given = call.inputs()
    compare(compute(emulated, call, given), call, given)


@pytest.mark.parametrize("call", [call for call in CALLS if call.residual or call.weight != call.bias], ids=lambda call: call.why)
def test_emulated_outputs_alone(emulated, call: Call) -> None:
    """What is not wanted changes no bit of what is."""
    given = call.inputs()
    full = compute(emulated, call, given)
    names = [name for name in GRADIENTS if name in full]
    for wanted in (*((name,) for name in names), *combinations(names, 2)):
        for name, value in compute(emulated, call, given, wanted).items():
            assert torch.equal(value, full[name]), f"{name}, when {wanted} are wanted"
    for name in {"group_norm": ("y", "stats"), "batch_norm": ("stats",), "row_norm": ("y",)}[call.op] if not call.frozen else ():
        for result, value in compute(emulated, call, given, forward_wanted=(name,)).items():
            assert torch.equal(value, full[result]), f"{result}, when {name} is wanted"


WAVES = [
    Call("samples", "group_norm", 6, 8, 300, 4, residual=True),
    Call("groups", "group_norm", 1, 12, 500, 6, dtype=_bf16),
    Call("channels", "group_norm", 2, 6, 301, 6, weight=2),
    Call("given means", "group_norm", 6, 3, 200, 3, frozen=1, means=True),
    Call("samples, channels last", "group_norm", 6, 16, 40, 4, channels_last=True),
    Call("groups, channels last", "group_norm", 1, 1536, 10, 384, channels_last=True),
    Call("planes", "batch_norm", 5, 6, 300, running=_f32),
    Call("planes with vectors for each sample", "batch_norm", 5, 6, 300, weight=5, bias=1, running=_f32),
    Call("columns", "batch_norm", 3, 390, 49, running=_f32, residual=True),
    Call("channels of positions", "batch_norm", 30, 400, 7, channels_last=True, running=_f32),
]


@pytest.mark.parametrize("call", WAVES, ids=lambda call: call.why)
def test_emulated_waves(builds, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where L2 is smaller than x, sets of samples or channels follow each other. No bit changes."""
    functions, given = builds("split"), call.inputs()
    library = ctypes.CDLL(next(path for path in torch.ops.loaded_libraries if "split" in path))
    launches = ctypes.c_int.in_dll(library, "emulated_launches")

    def run(size: int) -> tuple[dict[str, Tensor], int]:
        monkeypatch.setenv("EMULATED_L2", str(size))
        before = launches.value
        return compute(functions, call, given), launches.value - before

    one = given["x"].numel() * given["x"].element_size()
    at_once, fewest = run(10 * one)
    for budget in (int(0.8 * one), int(0.3 * one)):  # backward, x and dy are twice as much
        results, count = run(budget)
        assert count > fewest
        for name, value in results.items():
            assert torch.equal(value, at_once[name]), name


@pytest.fixture
def emulation(emulated, monkeypatch: pytest.MonkeyPatch, poison):
    """normops runs on the emulated kernels, and on nothing else."""
    launched = []

    def launch(op: str, x: torch.Tensor, *args) -> None:
        launched.append(op)
        with torch._C._AutoDispatchBelowAutograd():
            getattr(emulated, op)(*args)

    monkeypatch.setattr(backends, "everyday", False)
    monkeypatch.setattr(backends, "run", launch)
    yield
    assert launched, "the test has not reached the emulated kernels"


# what is larger reaches all kernels as built
SIZED = [(variant, name) for variant in VARIANTS for name, case in ALL.items() if variant == "as_built" or math.prod(case.shape) <= 1 << 13]


@pytest.mark.parametrize("emulated, name", SIZED, indirect=["emulated"], ids=map("-".join, SIZED))
def test_emulated_cases(emulation, name: str) -> None:
    inputs = Inputs.of(ALL[name], "cpu")
    check(inputs.run(), inputs)


# tests that run on every backend: those on what is most at risk in these kernels, and one value of each parameter
LONG = (2, 18, 31, 33)  # groups and rows that are more than a block holds
PROPERTIES = {
    numerics.test_far_from_zero: {"kind": KINDS, "shape": LONG, "ratio": 1e4},
    numerics.test_constant_input_gives_bias: {"kind": numerics.CENTERED, "shape": (2, 6, 37, 40), "dtype": torch.float32},
    numerics.test_huge_and_tiny: {"kind": numerics.OWN, "shape": LONG, "magnitude": 1e30},
    numerics.test_one_outlier: {"kind": numerics.OWN, "shape": (1, 8, 40, 41), "where": 0},
    numerics.test_not_finite: {"kind": KINDS, "value": torch.nan, "where": (1, 5)},
    norms.test_statistics: {
        "sets": ["group", "moments", "batch", "batch_moments", "layer", "rms", "last"],
        "dtype": torch.float64,
        "layout": "channels_last",
    },
    norms.test_nothing_is_written_outside: {"kind": KINDS, "shape": (3, 35, 7, 3), "residual": True},
    norms.test_channels_do_not_meet: {"kind": [kind for kind in KINDS if "batch" in kind], "shape": (2, 6, 9, 11)},
    norms.test_backward_mask: {"op": ["group", "frozen", "batch", "conditional", "last", "across", "added"], "activation": "silu"},
    norms.test_each_gradient_alone: {
        "case": [ALL[name] for name in ("everything", "frozen_modulation_cl", "batch_odd", "batch_modulation_cl", "layer_modulation_cf")]
    },
    norms.test_same_result_without_gradients: {
        "case": [ALL[name] for name in ("cl_C33", "batch_NC_cl", "batch_2d_cf", "rms_modulation_cf", "add_layer_norm_mixed")]
    },
}
VARIED = [(body, {**options, name: value}) for body, options in PROPERTIES.items() for name, values in options.items()
          if isinstance(values, list | dict) for value in values]  # fmt: skip


@pytest.mark.parametrize("body, options", VARIED, ids=[f"{body.__name__[5:]}-{next(iter(options.values()))}" for body, options in VARIED])
def test_emulated_properties(emulation, poison, monkeypatch: pytest.MonkeyPatch, body, options: dict) -> None:
    fixtures = {"backend": "cuda", "device": "cpu", "poison": poison, "monkeypatch": monkeypatch}
    body(**options, **{key: value for key, value in fixtures.items() if key in inspect.signature(body).parameters})
