"""Every norm as one kind of call: ``y = norm(x, *others)``, by normops and as torch spells it. What all norms keep is tested over `NORMS`.

`composed` of ``cases.py`` has group norm's options; here is one call of each norm with everything fused, small enough for compilers.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS
from torch import Tensor

import normops

IMAGE_LAYOUTS = ("contiguous", "channels_last")


@dataclass(frozen=True)
class Norm:
    function: Callable
    op: str  # the pair that graphs hold: group, batch or row
    normalized: Callable[[Tensor], Tensor]  # torch's x_hat
    settings: Callable[[Tensor], dict] = lambda x: {}
    row: tuple[int, ...] | None = None  # normalized_shape of (N, S, *row); None: 6 channels of (N, 6, H, W)
    others: tuple[str, ...] = ("weight", "bias", "residual", "scale", "shift")
    adds: bool = False  # residual is added before the norm, and the sum returned
    stats: str | None = None  # the operator that gives statistics before: group_norm_stats, differentiated by fwd, or batch_norm_stats

    @property
    def fwd(self):
        return getattr(torch.ops.normops, f"{self.op}_norm_fwd").default

    @property
    def bwd(self):
        return getattr(torch.ops.normops, f"{self.op}_norm_bwd").default

    @property
    def forward_ops(self) -> list:
        """What the forward graph holds."""
        return [getattr(torch.ops.normops, self.stats).default, self.fwd] if self.stats else [self.fwd]

    @property
    def backward_ops(self) -> list:
        return [self.bwd, self.fwd] if self.stats == "group_norm_stats" else [self.bwd]

    @property
    def layouts(self) -> tuple[str, ...]:
        return IMAGE_LAYOUTS if self.row is None else ("contiguous",)

    @property
    def operator(self):
        return getattr(torch.ops.normops, self.function.__name__).default

    def sizes(self, samples: int, *spatial: int) -> list[tuple[int, ...]]:
        """The shapes of x and the others."""
        vector = self.row or (6,)
        x = (samples, 6, *spatial) if self.row is None else (samples, *spatial[:1], *vector)
        shapes = {"residual": x, "scale": (samples, *vector), "shift": (samples, *vector), "style": (samples, 6, 7)}
        return [x, *(shapes.get(name, vector) for name in self.others)]

    def tensors(self, sizes=(2, 5, 4), layout: str = "contiguous", dtype=torch.float64, device="cpu", requires_grad: bool = True) -> list[Tensor]:
        shapes, values = self.sizes(*sizes), []
        for shape in shapes:
            value = torch.randn(shape, dtype=torch.float64).to(dtype).to(device)
            values.append((LAYOUTS[layout](value) if shape == shapes[0] else value).requires_grad_(requires_grad))
        return values

    def options(self, x: Tensor, *others: Tensor | None, **changes) -> dict:
        """The call's keywords."""
        return {"activation": "silu"} | self.settings(x) | dict(zip(self.others, others, strict=False)) | changes

    def __call__(self, x: Tensor, *others: Tensor | None, **changes):
        return self.function(x, **self.options(x, *others, **changes))

    def theirs(self, x: Tensor, *others: Tensor | None):
        """torch's ops; trailing `others` may be absent."""
        given = self.options(x, *others)
        samples = x.shape[0]

        def over(vector):  # (C,), (N, C), or (*row), (N, *row)
            if self.row is None:
                return vector[(...,) + (None,) * (x.dim() - 2)]
            return vector if vector.shape == self.row else vector.reshape(samples, *(1,) * (x.dim() - 1 - len(self.row)), *self.row)

        residual = given.get("residual")
        total = x + residual if self.adds else x
        if "style" in given:
            var, mean = torch.var_mean(given["style"].flatten(2), 2, correction=0)
            t = self.normalized(x) * over((var + 1e-5).sqrt()) + over(mean)
        else:
            t = self.normalized(total)
        if "rho" in given:
            t = over(given["rho"]) * t + (1 - over(given["rho"])) * F.instance_norm(x)
        for name, combine in (
            ("weight", lambda t, weight: t * (weight + given.get("weight_offset", 0))),
            ("bias", torch.add),
            ("scale", lambda t, scale: t * (1 + scale)),
            ("shift", torch.add),
        ):
            if given.get(name) is not None:
                t = combine(t, over(given[name]))
        if residual is not None and not self.adds:
            t = t + residual
        return (F.silu(t), total) if self.adds else F.silu(t)


def running(x: Tensor) -> dict:
    """Running statistics of 6 channels, mapped where x is."""
    channels = x.new_zeros(6) + torch.arange(6, dtype=x.dtype, device=x.device)
    return {"running_mean": channels / 3 - 1, "running_var": channels / 2 + 0.5}


def frozen(x: Tensor) -> dict:
    return running(x) | {"use_input_stats": False}


def renorm(x: Tensor) -> dict:
    """Running statistics and bounds by which some channels are clipped and others are not."""
    mean, std = running(x).values()
    return {"running_mean": mean, "running_std": std, "training": True, "r_max": x.new_full((), 1.5), "d_max": x.new_full((), 0.5)}


def renormalized(x: Tensor) -> Tensor:
    given = {name: value[(...,) + (None,) * (x.dim() - 2)] if value.dim() else value for name, value in renorm(x).items() if name != "training"}
    var, mean = torch.var_mean(x.detach(), (0, *range(2, x.dim())), correction=0, keepdim=True)
    std = (var + 1e-3).sqrt()
    r = (std / given["running_std"]).clamp(1 / given["r_max"], given["r_max"])
    d = ((mean - given["running_mean"]) / given["running_std"]).clamp(-given["d_max"], given["d_max"])
    return F.batch_norm(x, None, None, training=True, eps=1e-3) * r + d


def batch(x: Tensor) -> dict:
    return running(x) | {"training": True}


def by_batch(x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, training=True)


_NO_BIAS = ("weight", "residual", "scale", "shift")
NORMS = {
    "group_norm": Norm(normops.group_norm, "group", lambda x: F.group_norm(x, 3), lambda x: {"num_groups": 3}),
    "instance_norm": Norm(normops.instance_norm, "group", F.instance_norm),
    "instance_norm_tracked": Norm(normops.instance_norm, "group", F.instance_norm, running),
    "instance_norm_frozen": Norm(normops.instance_norm, "group", lambda x: F.instance_norm(x, **frozen(x)), frozen),
    "adaptive_instance_norm": Norm(normops.adaptive_instance_norm, "group", F.instance_norm, others=("style", "residual"), stats="group_norm_stats"),
    "batch_norm": Norm(normops.batch_norm, "batch", by_batch, batch),
    "batch_norm_eval": Norm(normops.batch_norm, "group", lambda x: F.batch_norm(x, *running(x).values()), running),
    "sync_batch_norm": Norm(normops.sync_batch_norm, "batch", by_batch, batch),  # of one worker
    "batch_renorm": Norm(normops.batch_renorm, "batch", renormalized, renorm, stats="batch_norm_stats"),
    "batch_instance_norm": Norm(
        normops.batch_instance_norm, "group", by_batch, batch, None, ("rho", "weight", "bias", "residual", "scale", "shift"), stats="group_norm_stats"
    ),
    "layer_norm": Norm(normops.layer_norm, "row", lambda x: F.layer_norm(x, (3, 4)), lambda x: {"normalized_shape": (3, 4)}, (3, 4)),
    "layer_norm_dim1": Norm(
        normops.layer_norm, "row", lambda x: F.layer_norm(x.movedim(1, -1), (6,)).movedim(-1, 1), lambda x: {"normalized_shape": [6], "dim": 1}
    ),
    "rms_norm": Norm(
        normops.rms_norm, "row", lambda x: F.rms_norm(x, (6,)), lambda x: {"normalized_shape": [6], "weight_offset": 1.0}, (6,), _NO_BIAS
    ),
    "rms_norm_dim1": Norm(
        normops.rms_norm, "row", lambda x: F.rms_norm(x.movedim(1, -1), (6,)).movedim(-1, 1), lambda x: {"normalized_shape": [6], "dim": 1},
        others=_NO_BIAS,
    ),
    "add_layer_norm": Norm(
        normops.add_layer_norm, "row", lambda x: F.layer_norm(x, (6,)), lambda x: {"normalized_shape": [6]}, (6,),
        ("residual", "weight", "bias", "scale", "shift"), adds=True,
    ),
    "add_rms_norm": Norm(
        normops.add_rms_norm, "row", lambda x: F.rms_norm(x, (6,)), lambda x: {"normalized_shape": [6]}, (6,),
        ("residual", "weight", "scale", "shift"), adds=True,
    ),
}  # fmt: skip


def over_norms(*names: str):
    """Run a test for each of these norms, or for all."""
    chosen = names or tuple(NORMS)
    return pytest.mark.parametrize("norm", [NORMS[name] for name in chosen], ids=chosen)


def over_layouts():
    """Run a test for each norm in each layout that it has."""
    pairs = {f"{name}-{layout}": (norm, layout) for name, norm in NORMS.items() for layout in norm.layouts}
    return pytest.mark.parametrize("norm, layout", pairs.values(), ids=pairs)


def leaves(result) -> tuple[Tensor, ...]:
    """The tensors of one result or of several."""
    return result if isinstance(result, tuple) else (result,)


def compare(got, want, **tolerance) -> None:
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other, **tolerance)


def with_gradients(call: Callable, values: list[Tensor], dys: list[Tensor]) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    results = leaves(call(*values))
    return [result.detach() for result in results], torch.autograd.grad(results, values, dys)


def cotangents(norm: Norm, values: list[Tensor], layout: str = "contiguous") -> list[Tensor]:
    return [LAYOUTS[layout](torch.randn_like(values[0]).detach()) for _ in range(1 + norm.adds)]
