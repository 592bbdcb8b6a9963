"""The cases: norm calls of real models from ``shapes.json``, scaled down where a CPU runs them, in both layouts.

A row of ``shapes.json`` is one call as its model makes it: tag (model), norm, shape, dtype, layout, act, eps, count (calls per forward pass of
the model), src (where the row comes from), and where they matter groups, residual, affine.
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
OF_PARAMETERS = ("analytic_norm_weight", "activation_moments")  # x is a weight, or means of channels: measured in its own size

# one call of every kind; what --quick runs
REPRESENTATIVE = (
    "sd15_unet/2x320x64x64/silu",
    "sd15_unet/2x1280x16x16/none",
    "bit_r50_b2/2x2048x7x7/relu",
    "rwkv6_lnx/32768x2048/none",
    "wav2vec2_gn/8x512x3199/gelu",
    "nnunet3d_b2/2x128x32x32x32/leaky_relu",
    "nnunet3d_resenc_b2/2x128x32x32x32/leaky_relu",
    "cyclegan_gen_b1/1x256x64x64/relu",
    "adain_b8/8x512x64x64/none",
    "vit_b16_b128/25216x768/none",
    "convnext_t_b128/128x192x28x28/none",
    "llm_rms/8192x4096/none",
    "qk_norm/262144x128/none",
    "kb1_36/112x64x512x512/none",
    "bert_base_b32/16384x768/none",
    "llm_fused_add_rms/8192x4096/none",
    "resnet50_add_b32/32x256x56x56/relu",
    "resnet50_b32/32x512x7x7/relu",
    "efficientnet_b0_b128/128x240x28x28/silu",
    "pointnet/32x256/relu",
    "resnet50_eval_b32/32x128x28x28/relu",
    "resnet50_renorm_b4/4x1024x14x14/relu",
    "resnet50_bin_b32/32x1024x14x14/relu",
    "resnet50_analytic_b32/32x128x28x28/relu",
    "resnet50_weights/64x64x3x3/none",
    "channels/1x64/relu",
    "channels/1x64/gelu",
)
LARGE = (  # on a CPU measured once more, out of its caches
    "sdxl_unet/2x320x128x128/silu",
    "kb1_35/112x64x512x512/none",
    "nnunet3d_b2/2x32x128x128x128/leaky_relu",
    "liger_ln/4096x4096/none",
    "llm_rms/8192x4096/none",
    "kb1_36/112x64x512x512/none",
    "llm_fused_add_rms/8192x4096/none",
    "resnet50_b32/32x64x112x112/relu",
)
COMPILED = (  # torch.compile takes seconds a case, so it gets these only
    "sd15_unet/2x320x64x64/silu",
    "sd15_unet/2x640x32x32/none",
    "bit_r50_b2/2x256x56x56/relu",
    "nnunet3d_b2/2x128x32x32x32/leaky_relu",
    "vit_b16_b128/25216x768/none",
    "convnext_t_b128/128x192x28x28/none",
    "llm_rms/8192x4096/none",
    "llm_fused_add_rms/8192x4096/none",
    "resnet50_add_b32/32x256x56x56/relu",
    "resnet50_renorm_b4/4x1024x14x14/relu",
    "resnet50_bin_b32/32x1024x14x14/relu",
    "resnet50_analytic_add_b32/32x256x56x56/relu",
    "resnet50_weights/512x512x3x3/none",
    "resnet50_weights/64x64x3x3/none",
    "channels/1x512/relu",
)

COMPILED_ON_GPU = (  # these too: the largest, where a GPU has goals
    "hunyuan_vae/1x128x20x256x256/silu",
    "kb1_33/64x64x512x512/none",
    "kb1_34/112x64x512x512/none",
    "kb1_35/112x64x512x512/none",
    "kb1_36/112x64x512x512/none",
    "kb1_40/16x4194304/none",
)


@dataclass(frozen=True)
class Case:
    """One call to measure. `name` says the shape in the model, `shape` the one that is measured."""

    norm: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    layout: str  # NCHW: channels before the positions in memory; NHWC: after them; NC: there are no positions; row: (rows, normalized elements)
    act: str
    eps: float
    count: int
    src: str
    groups: int = 0
    residual: bool = False
    affine: bool = True
    mean: float = 0.5  # of x, and of running statistics
    std: float = 1.5

    @property
    def over_samples(self) -> bool:
        """Whether samples share statistics: then channels are what can be computed apart."""
        return self.norm.startswith("batch_")

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of x."""
        return self.numel * DTYPES[self.dtype].itemsize


def lay_out(x: Tensor, layout: str) -> Tensor:
    """`x` in the memory order that `layout` names."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "NHWC" and x.dim() > 1 else x.contiguous()


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


def scale(shape: tuple[int, ...], limit: int, keep_batch: bool = False) -> tuple[int, ...]:
    """`shape` made small: batch at most 2, then the longest spatial size halved (batch, without any) until x as float32 has `limit` bytes.

    `keep_batch`: the batch too is halved only as long as that is needed.
    """
    batch, channels, *spatial = shape
    if spatial and not keep_batch:
        batch = min(batch, 2)
    while 4 * math.prod((batch, channels, *spatial)) > limit:
        if batch > 2 and keep_batch:
            batch //= 2
        elif max(spatial, default=1) > 1:
            longest = spatial.index(max(spatial))
            spatial[longest] //= 2
        elif batch > 1:
            batch //= 2
        else:
            break
    return (batch, channels, *spatial)


def names(norm: str, chosen: Iterable[str]) -> list[str]:
    """Those of the names `chosen` that are calls of `norm`."""
    known = {case.name for case in load(norm)}
    return [name for name in chosen if name in known]


def compiled(device: str) -> tuple[str, ...]:
    """The names of the cases for torch.compile."""
    return COMPILED if device == "cpu" else COMPILED + COMPILED_ON_GPU


def rule(norm: str, device: str, quick: bool) -> str:
    """One sentence on how `grid` derives what is measured from ``shapes.json``."""
    if device != "cpu":
        return "shapes and dtypes as in the models; rank 4 and 5 in both layouts"
    if norm in OF_PARAMETERS:
        dtypes = sorted({dtype for case in load(norm) for dtype in _dtypes(case)}, reverse=True)
        return f"sizes as in the models; as {' and '.join(dtypes)}; rank 4 and 5 in both layouts"
    halved = "batch <= 2, longest spatial size halved (batch, without any)"
    if norm.startswith("batch_"):
        halved = "batch halved, from 2 on the longest spatial size,"
    text = f"{halved} until x <= {(QUICK_LIMIT if quick else LIMIT) // MIB} MiB as float32"
    large = ", ".join(names(norm, LARGE))
    also = f"; {large} also with x <= {LARGE_LIMIT // MIB} MiB" if large and not quick else ""
    return f"{text}{also}; as {' and '.join(CPU_DTYPES)}; rank 4 and 5 in both layouts"


def grid(norm: str, device: str, pattern: str | None = None, quick: bool = False) -> list[Case]:
    """The cases to measure, each once. `pattern` is a name, the tag of a model, or a glob over names."""
    chosen = [case for case in load(norm) if _selected(case, pattern, quick)]
    if device == "cpu":
        limits = [(case, QUICK_LIMIT if quick else LIMIT) for case in chosen]
        limits += [(case, LARGE_LIMIT) for case in chosen if case.name in LARGE and not quick]
        chosen = [replace(case, shape=_shape(case, limit), dtype=dtype) for case, limit in limits for dtype in _dtypes(case)]
    return _unique(replace(case, layout=layout) for case in chosen for layout in _layouts(case))


def _shape(case: Case, limit: int) -> tuple[int, ...]:
    return case.shape if case.norm in OF_PARAMETERS else scale(case.shape, limit, case.over_samples)


def _dtypes(case: Case) -> tuple[str, ...]:
    return ("fp64",) if case.dtype == "fp64" else CPU_DTYPES


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
        found.setdefault((case.shape, case.dtype, case.layout, case.groups, case.act, case.residual, case.affine), case)
    return list(found.values())
