"""Means and variances that flow through a model: the type, and the rules by which torch functions pass them on.

`Moments` stand for an activation of one sample: a random input's mean and variance at every unit. Torch functions, modules and whole models take
them where they take tensors; each function has a rule. What a rule assumes (independent inputs, a normal distribution before a non-linearity)
is in its docstring; `analytic.report` shows how far it holds for a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from normops import checks


@dataclass(frozen=True)
class Closure:
    """What propagation assumes where means and variances do not tell.

    padding: "ignore" lets the positions go on beyond the border, as the authors' code, where they are alike; "coverage" counts the zeros.
    pooling: the correlation of the positions of a pooling window. residual: that of the two terms of a sum.
    dropout: its noise counts in "training", as it works, or "always".
    """

    padding: str = "ignore"
    pooling: float = 0.0
    residual: float = 0.0
    dropout: str = "training"

    def __post_init__(self) -> None:
        if self.padding not in ("ignore", "coverage"):
            raise ValueError(f"propagate: expected padding out of ignore, coverage, got {self.padding!r}")
        for name, value, least in (("pooling", self.pooling, 0.0), ("residual", self.residual, -1.0)):
            if not least <= value <= 1:
                raise ValueError(f"propagate: expected {name} in [{least:g}, 1], got {value}")


class Moments:
    """Mean and variance of the units of an activation.

    mean, var: tensors that broadcast to `sample`, the shape of one sample: ``(C, 1, 1)`` where all positions of an image are alike. Given as
    ``(C,)`` beside a longer shape they are those of channels. float64 inside.
    """

    __slots__ = ("before", "layers", "mu", "patch", "sample", "var")
    __hash__ = object.__hash__

    def __init__(
        self, mean: Any, var: Any, sample: tuple[int, ...] | None = None, layers: frozenset[str] = frozenset(),
        before: tuple[Callable[[Moments], Moments], Moments] | None = None, patch: tuple[Tensor, Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.layers = layers  # linear layers that lie between here and the last non-linearity
        self.before = before  # a monotone function and what it was applied to
        self.patch = patch  # of an input: mean and covariance of what a kernel of the first convolution sees
        if type(sample) is torch.Size and _fit(mean, var, sample):  # as rules make them
            self.mu, self.var, self.sample = mean, var, sample
            return
        mean, var = (torch.as_tensor(value, dtype=torch.float64).as_subclass(Tensor) for value in (mean, var))
        self.sample = shape = checks.broadcast("Moments", "mean and var", mean.shape, var.shape) if sample is None else torch.Size(sample)
        if mean.dim() == var.dim() == 1 < len(shape):
            mean, var = (value.view(-1, *(1,) * (len(shape) - 1)) for value in (mean, var))
        for name, value in (("mean", mean), ("var", var)):
            if not _broadcasts(value.shape, shape):
                raise ValueError(f"Moments: expected {name} that broadcasts to a sample of shape {tuple(shape)}, got {tuple(value.shape)}")
        self.mu, self.var = (value.reshape((1,) * (len(shape) - value.dim()) + value.shape) for value in (mean, var))

    def __copy__(self) -> Moments:
        return Moments(self.mu, self.var, self.sample, self.layers, self.before, self.patch)

    def check(self) -> Moments:
        """Itself, if mean and variance are finite and no variance is negative; else ``ValueError``. It waits for the device."""
        for name, value in (("mean", self.mu), ("var", self.var)):
            if not torch.isfinite(value).all():
                raise ValueError(f"Moments: expected a finite {name}, got {float(value[~torch.isfinite(value)][0])}")
        if (self.var < 0).any():
            raise ValueError(f"Moments: expected var >= 0, got {float(self.var.min()):g}")
        return self

    @property
    def mean(self) -> Tensor:
        """The mean; called, ``torch.mean`` of this activation, as in the code of models."""
        value = self.mu.as_subclass(_Mean)
        value.of = self
        return value

    @property
    def std(self) -> Tensor:
        """The square root of var."""
        return self.var.sqrt()

    def dense(self) -> Moments:
        """With a value for every unit."""
        return Moments(self.mu.expand(self.sample), self.var.expand(self.sample), self.sample, self.layers)

    def channels(self, dim: int = 0) -> Moments:
        """One mean and variance for each index of a dimension: over positions, the variance within and between them."""
        if dim == 0 and self.uniform and len(self.mu) == len(self.var) == self.sample[0]:
            return Moments(self.mu, self.var, self.sample, self.layers)
        dim = dim % len(self.sample)
        positions = tuple(other for other in range(len(self.sample)) if other != dim)
        mean, var = (
            value if value.shape[dim] == self.sample[dim] else value.expand(*value.shape[:dim], self.sample[dim], *value.shape[dim + 1 :])
            for value in (self.mu, self.var)
        )
        if all(size == 1 for value in (mean, var) for other, size in enumerate(value.shape) if other != dim):
            return Moments(mean, var, self.sample, self.layers)
        center = mean.mean(positions, keepdim=True)
        between = (mean - center).square().mean(positions, keepdim=True)
        return Moments(center, var.mean(positions, keepdim=True) + between, self.sample, self.layers)

    @property
    def uniform(self) -> bool:
        """Whether all positions of a channel are alike."""
        return self.mu.shape[1:].numel() == self.var.shape[1:].numel() == 1

    def __repr__(self) -> str:
        return f"Moments(mean={_span(self.mu)}, var={_span(self.var)}, sample={tuple(self.sample)})"

    def to(self, *args: Any, **kwargs: Any) -> Moments:
        """On the device that ``torch.Tensor.to`` of these arguments names; always float64."""
        device = torch.empty(0, device=self.device).to(*args, **kwargs).device
        patch = None if self.patch is None else (self.patch[0].to(device), self.patch[1].to(device))
        return Moments(self.mu.to(device), self.var.to(device), self.sample, self.layers, self.before, patch)

    # ---- as a tensor of one sample, for the code of models ----

    def size(self, dim: int | None = None) -> Any:
        size = torch.Size((1, *self.sample))
        return size if dim is None else size[dim]

    def dim(self) -> int:
        return 1 + len(self.sample)

    def numel(self) -> int:
        return self.sample.numel()

    shape = property(lambda self: self.size())
    ndim = property(dim)
    dtype = property(lambda self: torch.get_default_dtype())
    device = property(lambda self: self.mu.device)
    requires_grad = property(lambda self: self.mu.requires_grad or self.var.requires_grad)
    is_cuda = property(lambda self: self.mu.is_cuda)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        method = getattr(Tensor, name, None)
        if not callable(method):
            raise AttributeError(f"Moments have no {name}")
        return lambda *args, **kwargs: self.__torch_function__(method, (), (self, *args), kwargs)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", str(function))
        rule = RULES.get(function) or RULES.get(name)
        if rule is None:
            raise NotImplementedError(f"propagate: no rule for {name}; write one: @propagate.register(function) above a function of its arguments")
        kwargs = kwargs or {}
        if not (name.endswith("_") and not name.endswith("__") or kwargs.get("inplace") or name.startswith("__i")):
            return apply(rule, *args, **kwargs)
        x, *rest = args
        result = apply(rule, copy(x), *rest, **kwargs)
        for field in Moments.__slots__:
            setattr(x, field, getattr(result, field))
        return x


def apply(rule: Callable, *args: Any, **kwargs: Any) -> Any:
    """Call a rule. What it saves for its backward pass is kept: a checkpoint could not repeat it without the propagation around it."""
    if _saved_tensors_hooks(False) is None:
        return rule(*args, **kwargs)
    with torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
        return rule(*args, **kwargs)


_saved_tensors_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_is_tracing: True)


def _as_it_is(saved: Tensor) -> Tensor:
    return saved


def _operator(name: str) -> Callable:
    return lambda self, *args: self.__torch_function__(getattr(Tensor, name), (), (self, *args))


for _name in (
    "add", "radd", "iadd", "sub", "rsub", "isub", "mul", "rmul", "imul", "truediv", "itruediv", "neg", "pow", "matmul", "getitem",
    "eq", "ne", "lt", "le", "gt", "ge",
):  # fmt: skip
    setattr(Moments, f"__{_name}__", _operator(f"__{_name}__"))


def given(op: str, moments: Moments, model: Any = None) -> Moments:
    """A copy of a function's argument, checked, on the device of a model."""
    if not isinstance(moments, Moments):
        raise TypeError(f"{op}: expected Moments, got {type(moments).__name__}")
    parameters = model.parameters() if isinstance(model, torch.nn.Module) else iter(())
    return moments.check().to(next((parameter.device for parameter in parameters), moments.device))


class _Mean(Tensor):
    """The mean of `Moments` under the name of a tensor's method."""

    of: Moments
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # results are plain tensors

    def __call__(self, *args: Any, **kwargs: Any) -> Moments:
        return torch.mean(self.of, *args, **kwargs)  # type: ignore[call-overload]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


def _fit(mean: Any, var: Any, sample: torch.Size) -> bool:
    """Whether these are plain, float64, and broadcast to a sample with a dimension for each of its."""
    if type(mean) is not Tensor or type(var) is not Tensor or not mean.dtype == var.dtype == torch.float64:
        return False
    if not len(mean.shape) == len(var.shape) == len(sample):
        return False
    for a, b, size in zip(mean.shape, var.shape, sample, strict=True):
        if a not in (1, size) or b not in (1, size):
            return False
    return True


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    return len(shape) <= len(to) and all(size in (1, whole) for size, whole in zip(reversed(shape), reversed(to), strict=False))


def _span(value: Tensor) -> str:
    if not value.numel():
        return "empty"
    low, high = float(value.detach().min()), float(value.detach().max())
    return f"{low:.4g}" if low == high else f"{low:.4g}..{high:.4g}"


# ---- propagation ----

RULES: dict[Any, Callable] = {}  # by function or its name, or by module class
_USUAL = Closure()
_closure: ContextVar[Closure] = ContextVar("closure", default=_USUAL)
_nonlinear: ContextVar[set[str] | None] = ContextVar("nonlinear", default=None)


def closure() -> Closure:
    """The assumptions of the propagation that is running."""
    return _closure.get()


@contextmanager
def assuming(assumptions: Closure) -> Iterator[None]:
    """Rules inside take these assumptions."""
    token = _closure.set(assumptions)
    try:
        yield
    finally:
        _closure.reset(token)


@contextmanager
def layers_before_nonlinearities() -> Iterator[set[str]]:
    """The set is filled with the names (`Moments.layers`) of the layers whose outputs reach a non-linearity before another layer."""
    found: set[str] = set()
    token = _nonlinear.set(found)
    try:
        yield found
    finally:
        _nonlinear.reset(token)


def meets_nonlinearity(x: Moments) -> None:
    """Called by rules of non-linear functions."""
    found = _nonlinear.get()
    if found is not None:
        found |= x.layers


class _Propagate:
    """``propagate(model_or_function, moments, *, padding="ignore", pooling=0.0, residual=0.0)``: the moments of its output.

    Runs it on `moments`; a module's buffers, parameters and training flag are left alone. Other inputs of the function may be given as keyword
    arguments. ``@propagate.register(function)`` declares the rule of a function, ``@propagate.register(ModuleClass)`` that of a module, called
    as ``rule(module, moments)``.
    """

    def __call__(
        self, function: Callable, moments: Moments, *, padding: str = "ignore", pooling: float = 0.0, residual: float = 0.0, **kwargs
    ) -> Moments:
        moments = given("propagate", moments, function)
        modules = function.modules() if isinstance(function, torch.nn.Module) else ()
        with assuming(Closure(padding, pooling, residual)), module_rules(modules):
            return function(moments, **kwargs)

    def register(self, function: Any) -> Callable[[Callable], Callable]:
        """Declare the rule of a function or of a module class."""

        def decorate(rule: Callable) -> Callable:
            RULES[function] = rule
            return rule

        return decorate


propagate = _Propagate()


@contextmanager
def module_rules(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Modules whose class has a rule follow it, and batch norms do not count."""
    changed = []
    counts: list[tuple[torch.nn.Module, Tensor]] = []
    for module in modules:
        count = module._buffers.get("num_batches_tracked")
        if count is not None:
            module._buffers["num_batches_tracked"] = count.clone()
            counts.append((module, count))
        rule = RULES.get(type(module))
        if rule is not None and "forward" not in vars(module):
            module.forward = partial(apply, rule, module)
            changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward
        for module, count in counts:
            module._buffers["num_batches_tracked"] = count
