"""The cases: norm calls of real models from ``shapes.json``, scaled down where a CPU runs them, in both layouts.

A row of ``shapes.json`` is one call as its model makes it: tag (model), norm, shape, dtype, layout, groups, act, eps, count (calls per
forward pass of the model) and src (where the row comes from).
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
MIB = 2**20
LIMIT, LARGE_LIMIT, QUICK_LIMIT = 8 * MIB, 64 * MIB, MIB  # bytes of x as float32, on a CPU
CPU_DTYPES = ("fp32", "bf16")

# one call of every kind; what --quick runs
REPRESENTATIVE = (
    "sd15_unet/2x320x64x64/silu",
    "sd15_unet/2x1280x16x16/none",
    "bit_r50_b2/2x2048x7x7/relu",
    "rwkv6_lnx/32768x2048/none",
    "wav2vec2_gn/8x512x3199/gelu",
)
LARGE = ("sdxl_unet/2x320x128x128/silu", "kb1_35/112x64x512x512/none")  # on a CPU measured once more, out of its caches
# torch.compile takes seconds a case, so it gets these only
COMPILED = ("sd15_unet/2x320x64x64/silu", "sd15_unet/2x640x32x32/none", "bit_r50_b2/2x256x56x56/relu")


@dataclass(frozen=True)
class Case:
    """One call to measure. `name` says the shape in the model, `shape` the one that is measured."""

    norm: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    layout: str  # NCHW: channels before the positions in memory; NHWC: after them; NC: there are no positions
    groups: int
    act: str
    eps: float
    count: int
    src: str
    residual: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of x."""
        return self.numel * DTYPES[self.dtype].itemsize


def lay_out(x: Tensor, layout: str) -> Tensor:
    """`x` in the memory order that `layout` names."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "NHWC" else x.contiguous()


def load(norm: str) -> list[Case]:
    """The rows of ``shapes.json`` for `norm`."""
    rows = json.loads(Path(__file__).with_name("shapes.json").read_text())
    cases = []
    for row in rows:
        if row.pop("norm") == norm:
            shape = tuple(row.pop("shape"))
            name = f"{row.pop('tag')}/{'x'.join(map(str, shape))}/{row['act']}"
            cases.append(Case(norm, name, shape, **row))
    return cases


def scale(shape: tuple[int, ...], limit: int) -> tuple[int, ...]:
    """`shape` made small: batch at most 2, then the longest spatial size halved (batch, without any) until x as float32 has `limit` bytes."""
    batch, channels, *spatial = shape
    if spatial:
        batch = min(batch, 2)
    while 4 * math.prod((batch, channels, *spatial)) > limit:
        if max(spatial, default=1) > 1:
            longest = spatial.index(max(spatial))
            spatial[longest] //= 2
        elif batch > 1:
            batch //= 2
        else:
            break
    return (batch, channels, *spatial)


def rule(device: str, quick: bool) -> str:
    """One sentence on how `grid` derives what is measured from ``shapes.json``."""
    if device != "cpu":
        return "shapes and dtypes as in the models; rank 4 and 5 in both layouts"
    text = f"batch <= 2, longest spatial size halved (batch, without any) until x <= {(QUICK_LIMIT if quick else LIMIT) // MIB} MiB as float32"
    large = "" if quick else f"; {', '.join(LARGE)} also with x <= {LARGE_LIMIT // MIB} MiB"
    return f"{text}{large}; as {' and '.join(CPU_DTYPES)}; rank 4 and 5 in both layouts"


def grid(norm: str, device: str, pattern: str | None = None, quick: bool = False) -> list[Case]:
    """The cases to measure, each once. `pattern` is a name, the tag of a model, or a glob over names."""
    chosen = [case for case in load(norm) if _selected(case, pattern, quick)]
    if device == "cpu":
        limits = [(case, QUICK_LIMIT if quick else LIMIT) for case in chosen]
        limits += [(case, LARGE_LIMIT) for case in chosen if case.name in LARGE and not quick]
        chosen = [replace(case, shape=scale(case.shape, limit), dtype=dtype) for case, limit in limits for dtype in CPU_DTYPES]
    return _unique(replace(case, layout=layout) for case in chosen for layout in _layouts(case))


def _selected(case: Case, pattern: str | None, quick: bool) -> bool:
    if pattern is None:
        return not quick or case.name in REPRESENTATIVE
    return fnmatch(case.name, pattern) or case.name.split("/")[0] == pattern


def _layouts(case: Case) -> tuple[str, ...]:
    return ("NCHW", "NHWC") if len(case.shape) >= 4 and math.prod(case.shape[2:]) > 1 else (case.layout,)


def _unique(cases: Iterable[Case]) -> list[Case]:
    """Cases that take the same time are one case, under the name of the first."""
    found: dict[tuple, Case] = {}
    for case in cases:
        found.setdefault((case.shape, case.dtype, case.layout, case.groups, case.act, case.residual), case)
    return list(found.values())
