"""A call of a norm, its inputs, the float64 oracle and the tolerance that follows from it.

Tolerance: the error against float64 is at most twice the error of torch's own composition of ops, on the same inputs and in the dtype in which
normops computes (float32 for 16-bit inputs, rounded once at the end), plus a rounding floor of ``FLOOR`` roundoffs of the tensor's own dtype
times its magnitude. The magnitude of a gradient is that of the terms that it sums: they cancel, their roundings do not.
For float64 the oracle is itself torch in float64. Its own error is taken to be torch's error in float32, times the ratio of the two roundoffs.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import normops

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
HALF = (torch.float16, torch.bfloat16)
LARGE = 1 << 24  # elements: below it values are drawn, and the oracle runs, on the CPU, so that they and the tolerance are the same on every device


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
    groups: int = 1  # of group norm
    layout: str = "contiguous"
    norm: str = "group_norm"
    ndim: int = 1  # how many dimensions layer and RMS norm normalize; 0: dimension 1
    weight_offset: float = 0.0
    frozen: bool = False  # instance and batch norms by running statistics
    tracked: bool = True  # batch norms: with running statistics
    style: tuple[int, ...] | None = None  # positions of the style
    dtype: torch.dtype = torch.float32
    weight: str | None = "C"  # "C": as the norm has it; "NC": another one per sample; None
    bias: str | None = "C"
    affine_dtype: torch.dtype | None = None  # x's, unless given; also of running statistics and style
    residual: str | None = None  # its layout
    scale: bool = False
    shift: bool = False
    dy: str | None = None  # its layout; y's, unless given
    activation: str = "none"
    negative_slope: float = 0.2
    eps: float | None = 1e-5
    out_dtype: torch.dtype | None = None
    mean: float = 0.5
    std: float = 2.0

    @property
    def rows(self) -> bool:
        """Whether each position has its own statistic."""
        return self.norm.endswith(("layer_norm", "rms_norm"))

    @property
    def batch(self) -> bool:
        """Whether samples share statistics."""
        return self.norm.startswith("batch") and not self.frozen

    @property
    def trailing(self) -> int:
        """How many trailing dimensions are normalized; 0: weights belong to dimension 1."""
        return self.ndim if self.rows else 0

    @property
    def vector(self) -> tuple[int, ...]:
        """The shape of weight and bias."""
        return self.shape[-self.trailing :] if self.trailing else self.shape[1:2]

    def options(self) -> dict:
        """The arguments that are no tensors."""
        found = {"eps": self.eps, "activation": self.activation, "negative_slope": self.negative_slope, "out_dtype": self.out_dtype}
        if self.norm == "group_norm":
            found["num_groups"] = self.groups
        if self.norm == "instance_norm":
            found["use_input_stats"] = not self.frozen
        if self.norm.startswith("batch"):
            found["training"] = not self.frozen
        if self.norm == "batch_renorm":
            found |= {"r_max": torch.tensor(1.2, dtype=torch.float64), "d_max": torch.tensor(0.2, dtype=torch.float64)}  # some channels reach them
        if self.rows:
            found |= {"normalized_shape": self.vector, "weight_offset": self.weight_offset}
            found |= {} if self.ndim else {"dim": 1}
        return found

    def statistics(self) -> int:
        """How many numbers are saved of them."""
        if self.rows:
            return math.prod(self.shape) // math.prod(self.vector) * (1 if "rms" in self.norm else 3)
        if self.batch and self.norm != "batch_instance_norm":
            return 4 * self.shape[1]
        alike = self.frozen and self.norm != "batch_instance_norm"
        return 3 * (1 if alike else self.shape[0]) * (self.groups if self.norm == "group_norm" else self.shape[1])

    def dense(self, x: Tensor) -> Tensor:
        """x in the memory order in which the kernels read it; where x is not dense, contiguous, or channels last if x's channels are adjacent."""
        if self.trailing or self.layout not in IN_PLACE:
            return x.contiguous() if self.trailing or x.stride(1) != 1 or x.shape[1] == 1 else channels_last(x)
        return x

    def square(self, x: Tensor) -> Tensor:
        """The square by whose root x is divided, without eps, to broadcast against x."""
        if self.rows:
            dims = tuple(range(-self.ndim, 0)) or 1
            return x.square().mean(dims, keepdim=True) if "rms" in self.norm else x.var(dims, correction=0, keepdim=True)
        if self.norm.startswith("batch"):
            return x.var((0, *range(2, x.dim())), correction=0, keepdim=True)
        groups = self.groups if self.norm == "group_norm" else self.shape[1]
        grouped = x.reshape(self.shape[0], groups, -1).var(2, correction=0).repeat_interleave(self.shape[1] // groups, 1)
        return grouped[(...,) + (None,) * (x.dim() - 2)]


@dataclass
class Result:
    y: Tensor
    gradients: dict[str, Tensor]
    total: Tensor | None = None  # input + residual, of add_layer_norm and add_rms_norm
    running: dict[str, Tensor] = field(default_factory=dict)  # running statistics after the call


@dataclass
class Inputs:
    case: Case
    tensors: dict[str, Tensor]  # what has a gradient; x first
    dy: Tensor
    dtotal: Tensor | None = None
    running: tuple[Tensor, ...] = ()  # mean and variance

    @classmethod
    def of(cls, case: Case, device: str) -> "Inputs":
        def random(shape, dtype, layout="contiguous", mean=0.0, std=1.0):
            small = math.prod(shape) < LARGE
            values = torch.randn(shape, dtype=torch.float64 if small else dtype, device="cpu" if small else device) * std + mean
            return LAYOUTS[layout](values.to(dtype).to(device)).detach()

        vector = {"C": case.vector, "NC": (case.shape[0], *case.vector)}
        affine_dtype = case.affine_dtype or case.dtype
        tensors = {"x": random(case.shape, case.dtype, case.layout, case.mean, case.std)}
        if case.norm == "batch_instance_norm":
            tensors["rho"] = torch.rand(case.vector, dtype=torch.float64).to(affine_dtype).to(device)
        if case.norm == "adaptive_instance_norm":
            tensors["style"] = random((*case.shape[:2], *case.style), affine_dtype, mean=-1.0)
        elif case.weight:
            tensors["weight"] = random(vector[case.weight], affine_dtype, mean=0.5 - case.weight_offset)
        if case.bias and "bias" in inspect.signature(getattr(normops, case.norm)).parameters:
            tensors["bias"] = random(vector[case.bias], affine_dtype)
        if case.residual:
            tensors["residual"] = random(case.shape, case.dtype, case.residual)
        if case.scale:
            tensors["scale"] = random(vector["NC"], affine_dtype)
        if case.shift:
            tensors["shift"] = random(vector["NC"], affine_dtype)
        dense = case.dense(tensors["x"])
        dy = random(case.shape, case.out_dtype or case.dtype, case.dy or "contiguous")
        if case.dy is None:
            dy = torch.empty_like(dense, dtype=dy.dtype).copy_(dy)
        dtotal = torch.empty_like(dense).copy_(random(case.shape, case.dtype)) if case.norm.startswith("add") else None
        running = ()
        if case.frozen or case.norm.startswith("batch") and case.tracked:
            spread = case.std**2 * (0.5 + torch.rand(case.vector, dtype=torch.float64))
            spread = spread.sqrt() if case.norm == "batch_renorm" else spread
            running = random(case.vector, affine_dtype, "contiguous", case.mean, case.std / 4), spread.to(affine_dtype).to(device)
        return cls(case, tensors, dy, dtotal, running)

    def buffers(self) -> dict[str, Tensor]:
        """Running statistics by name; those that a batch norm updates are copies."""
        names = "running_mean", "running_std" if self.case.norm == "batch_renorm" else "running_var"
        none = dict.fromkeys(names) if self.case.norm.startswith("batch") else {}
        values = (torch.empty_like(value).copy_(value) for value in self.running) if self.case.batch else self.running
        return none | dict(zip(names, values, strict=False))

    def call(self, function: Callable | None = None, **changed: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """What `function` gives, called as the norm, whose signature it has; the norm itself unless given."""
        tensors = self.tensors | self.buffers() | changed
        x = tensors.pop("x")
        return (function or getattr(normops, self.case.norm))(x, **tensors, **self.case.options())

    def run(self, function: Callable | None = None, wanted: tuple[str, ...] | None = None) -> Result:
        """The results of `call` and the gradients."""
        leaves = {name: value.detach().requires_grad_(wanted is None or name in wanted) for name, value in self.tensors.items()}
        running = self.buffers()
        result = self.call(function, **leaves, **running)
        y, total = result if isinstance(result, tuple) else (result, None)
        names = [name for name, leaf in leaves.items() if leaf.requires_grad]
        if total is None or not total.requires_grad:
            results, gradients = [y], [self.dy]
        else:
            results, gradients = [y, total], [self.dy, self.dtotal]
        found = torch.autograd.grad(results, [leaves[name] for name in names], gradients)
        running = {name: value for name, value in running.items() if value is not None}
        return Result(y.detach(), dict(zip(names, found, strict=True)), None if total is None else total.detach(), running)

    def to(self, dtype: torch.dtype, device: str | None = None) -> "Inputs":
        """Contiguous copies."""

        def copied(value):
            return None if value is None else value.to(device or value.device, dtype).contiguous()

        tensors = {name: copied(value) for name, value in self.tensors.items()}
        return Inputs(self.case, tensors, copied(self.dy), copied(self.dtotal), tuple(copied(value) for value in self.running))

    def composition(self) -> Callable:
        """The norm as torch spells it; sums are rounded to the case's dtype."""
        function = COMPOSED[self.case.norm]
        return partial(function, rounded=self.case.dtype) if self.dtotal is not None else function

    def torch(self, dtype: torch.dtype) -> Result:
        """torch's own ops in `dtype`, on the CPU: the oracle in float64, the measure of the tolerance in float32."""
        eps = torch.finfo(accumulator(self.case.dtype)).eps if self.case.eps is None else self.case.eps
        wide = self.to(dtype, "cpu" if self.dy.numel() < LARGE else None)
        wide.case = replace(self.case, out_dtype=None, eps=eps)
        return wide.run(self.composition())


def over(vectors: Tensor, x: Tensor, trailing: int) -> Tensor:
    """A vector, or one for each sample, to broadcast against x; `trailing` as in `Case`."""
    ones = (1,) * (x.dim() - vectors.dim())
    return vectors.reshape(*vectors.shape[:-trailing], *ones, *vectors.shape[-trailing:]) if trailing else vectors[(..., *(None,) * (x.dim() - 2))]


def _fused(x, trailing, norm, weight, bias, activation="none", negative_slope=0.01, residual=None, scale=None, shift=None, out_dtype=None):
    """What follows the `norm`, which is x_hat or a function of weight and bias, as elementwise ops."""
    # torch takes no vectors per sample, and the backward of torch.group_norm fails with a bias but no weight
    plain = callable(norm) and weight is not None and weight.dim() == max(1, trailing) and (bias is None or bias.dim() == max(1, trailing))
    t = norm(weight if plain else None, bias if plain else None) if callable(norm) else norm
    if not plain:
        t = t if weight is None else t * over(weight, x, trailing)
        t = t if bias is None else t + over(bias, x, trailing)
    t = t if scale is None else t * (1 + over(scale, x, trailing))
    t = t if shift is None else t + over(shift, x, trailing)
    t = t if residual is None else t + residual
    return ACTIVATIONS[activation](t, negative_slope)


def composed(x, num_groups, weight=None, bias=None, eps=1e-5, **fused):
    """The call as torch spells it, from ``torch.group_norm`` and elementwise ops."""
    return _fused(x, 0, lambda w, b: torch.group_norm(x, num_groups, w, b, eps), weight, bias, **fused)


def _instance_norm(x, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5, **fused):
    # not F.instance_norm: on the CPU it sums in float64, and is no measure for float32
    if use_input_stats:
        x_hat = torch.group_norm(x, x.shape[1], eps=eps)
    else:
        x_hat = (x - over(running_mean, x, 0)) * over((running_var + eps).rsqrt(), x, 0)
    return _fused(x, 0, x_hat, weight, bias, **fused)


def _adaptive_instance_norm(x, style, eps=1e-5, **fused):
    var, mean = torch.var_mean(style.flatten(2), 2, correction=0)
    return _instance_norm(x, weight=(var + eps).sqrt(), bias=mean, eps=eps, **fused)


def _batch_norm(x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5, **fused):
    # not F.batch_norm, for the reason that is given above
    if training:
        _update(x, running_mean, running_var, momentum, lambda var: var)
        x_hat = _over_batch(x, eps)
    else:
        x_hat = _instance_norm(x, running_mean, running_var, use_input_stats=False, eps=eps)
    return _fused(x, 0, x_hat, weight, bias, **fused)


def _over_batch(x, eps):
    channels = x.transpose(0, 1)
    return torch.group_norm(channels.flatten(1).unsqueeze(0), len(channels), eps=eps).view(channels.shape).transpose(0, 1)


@torch.no_grad()
def _update(x, running_mean, running, momentum, of_var, correction=1):
    if running_mean is not None:
        var, mean = torch.var_mean(x.transpose(0, 1).flatten(1), 1, correction=correction)
        running_mean.lerp_(mean, momentum)
        running.lerp_(of_var(var), momentum)


def _batch_renorm(x, running_mean, running_std, weight=None, bias=None, training=False, momentum=0.01, eps=1e-3, *, r_max=1.0, d_max=0.0, **fused):
    if not training:
        return _batch_norm(x, running_mean, running_std.square(), weight, bias, eps=0.0, **fused)
    r_max, d_max = (torch.as_tensor(bound, dtype=torch.float64, device=x.device) for bound in (r_max, d_max))
    var, mean = torch.var_mean(x.detach().transpose(0, 1).flatten(1), 1, correction=0)
    r = ((var + eps).sqrt() / running_std).clamp(1 / r_max, r_max)
    d = ((mean - running_mean) / running_std).clamp(-d_max, d_max)
    _update(x, running_mean, running_std, momentum, lambda var: (var + eps).sqrt(), correction=0)
    return _fused(x, 0, _over_batch(x, eps) * over(r, x, 0) + over(d, x, 0), weight, bias, **fused)


def _batch_instance_norm(x, running_mean, running_var, rho, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5, **fused):
    by_batch = _batch_norm(x, running_mean, running_var, training=training, momentum=momentum, eps=eps)
    rho = over(rho, x, 0)
    return _fused(x, 0, rho * by_batch + (1 - rho) * _instance_norm(x, eps=eps), weight, bias, **fused)


def _layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-5, *, dim=None, weight_offset=0.0, norm=F.layer_norm, **fused):
    def along(w, b):
        given = (w,) if norm is F.rms_norm else (w, b)
        return norm(x, normalized_shape, *given, eps) if dim is None else norm(x.movedim(1, -1), normalized_shape, *given, eps).movedim(-1, 1)

    weight = weight if weight is None else weight + weight_offset
    return _fused(x, 0 if dim else len(normalized_shape), along, weight, bias, **fused)


def _added(x, residual, *args, norm, rounded=None, **options):
    total = x + residual
    if rounded is not None:  # the gradient is that of the sum
        total = total + (total.to(rounded).to(total.dtype) - total).detach().nan_to_num(0.0)  # inf - inf
    return _layer_norm(total, *args, norm=norm, **options), total


# norm -> the call as torch spells it, with the signature of ``normops.<norm>``
COMPOSED = {
    "group_norm": composed,
    "instance_norm": _instance_norm,
    "adaptive_instance_norm": _adaptive_instance_norm,
    "batch_norm": _batch_norm,
    "batch_renorm": _batch_renorm,
    "batch_instance_norm": _batch_instance_norm,
    "layer_norm": _layer_norm,
    "rms_norm": partial(_layer_norm, norm=F.rms_norm),
    "add_layer_norm": partial(_added, norm=F.layer_norm),
    "add_rms_norm": partial(_added, norm=F.rms_norm),
}


def roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def magnitudes(inputs: Inputs) -> dict[str, float]:
    """The largest of the terms of which each tensor is the sum, where that is not the tensor's own largest element."""
    case, wide = inputs.case, inputs.to(torch.float64)
    t = wide.tensors
    x = t["x"] + t["residual"] if "add" in case.norm else t["x"]
    eps = torch.finfo(accumulator(case.dtype)).eps if case.eps is None else case.eps
    rstd = (case.square(x) + eps).rsqrt()
    if case.frozen:
        rstd = over(1 / wide.running[1] if case.norm == "batch_renorm" else (wide.running[1] + eps).rsqrt(), x, 0)
    if "rho" in t:
        rho = over(t["rho"], x, 0)
        rstd = rho * rstd + (1 - rho) * (replace(case, norm="instance_norm").square(x) + eps).rsqrt()
    slope = over(t["weight"] + case.weight_offset, x, case.trailing) if "weight" in t else torch.ones_like(x)
    slope = slope * (1 + over(t["scale"], x, case.trailing)) if "scale" in t else slope
    of_t = slope * wide.dy
    of_x = (of_t * rstd).abs().max().item()
    if wide.dtotal is not None:
        of_x = max(of_x, wide.dtotal.abs().max().item())
    found = {"x": of_x, "residual": of_x if "add" in case.norm else 0.0}
    for name in {"weight", "bias", "scale", "shift", "rho"} & t.keys():
        # x_hat and dt*x_hat are sums too where they vanish: a group of equal values. A sum of n terms is as large as sqrt(n), but by chance
        terms, count = of_t if name == "rho" else wide.dy, wide.dy.numel() / max(1, t[name].numel())
        found[name] = max(terms.abs().max().item(), count**0.5 * terms.square().mean().sqrt().item())
    return found


def check(got: Result, inputs: Inputs, factor: float = 2) -> None:
    """Hold `got` to the tolerance above, and to the shape and dtype of what it is the gradient of."""
    case = inputs.case
    want = inputs.torch(torch.float64)
    own = accumulator(case.dtype)
    if own == torch.float64:  # torch in float32, against torch in float64 on the inputs so rounded, says what rounding costs
        narrow = inputs.to(torch.float32)
        theirs, exact = narrow.torch(torch.float32), narrow.torch(torch.float64)
        ratio = roundoff(torch.float64) / roundoff(torch.float32)
    else:
        theirs, exact, ratio = inputs.torch(own), want, 1.0
    if got.total is not None:
        assert torch.equal(got.total, inputs.tensors["x"] + inputs.tensors["residual"]), "the sum is the sum"
    largest = magnitudes(inputs)
    y_dtype = case.out_dtype or case.dtype
    tensors = [("y", got.y, want.y, theirs.y, exact.y, y_dtype)]
    for name, gradient in got.gradients.items():
        assert gradient.shape == inputs.tensors[name].shape, f"d{name}: shape {tuple(gradient.shape)}"
        dtype = inputs.tensors[name].dtype
        tensors.append((f"d{name}", gradient, want.gradients[name], theirs.gradients[name], exact.gradients[name], dtype))
    for (name, value), given in zip(got.running.items(), inputs.running, strict=True):
        tensors.append((name, value, want.running[name], theirs.running[name], exact.running[name], given.dtype))
    failures = []
    for name, mine, oracle, other, other_oracle, dtype in tensors:
        assert mine.dtype == dtype, f"{name}: dtype {mine.dtype}"
        error = (mine.to(oracle) - oracle).abs().max().item()
        loss = (other.to(dtype if own != torch.float64 else other.dtype).double() - other_oracle).abs().max().item() * ratio
        magnitude = max(oracle.abs().max().item(), largest.get(name[1:], 0.0))
        # an output wider than what it was computed in is no better than that
        unit = max(roundoff(dtype), roundoff(own))
        tiny = torch.finfo(dtype).smallest_normal * unit
        limit = factor * loss + FLOOR * unit * magnitude + tiny
        if not error <= limit:  # NaN fails too
            failures.append(f"{name}: error {error:.3g} > {limit:.3g} (torch loses {loss:.3g}, largest {magnitude:.3g})")
    assert not failures, f"{case.why}: " + "; ".join(failures)


def assert_layout(y: Tensor, inputs: Inputs) -> None:
    """y lies in memory as the kernels read x."""
    x = inputs.case.dense(inputs.tensors["x"])
    sizes = [i for i, size in enumerate(y.shape) if size > 1]
    assert [y.stride(i) for i in sizes] == [x.stride(i) for i in sizes], f"{inputs.case.layout}: strides {y.stride()}, expected {x.stride()}"
