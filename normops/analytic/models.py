"""Models normalized or initialized by propagated statistics: `normalize`, `fold`, `initialize_`, and the sweep before each call."""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any, TypeVar

import torch
from torch import Tensor

from normops import weights
from normops.analytic.layers import ANALYTIC, Analytic, output_dim
from normops.analytic.moments import Closure, Moments, assuming, given, layers_before_nonlinearities, module_rules

Model = TypeVar("Model", bound=torch.nn.Module)


def normalize(
    model: Model, moments: Moments, *, layers: list[str] | None = None, preserve: bool = True, eps: float = 1e-10,
    padding: str = "ignore", pooling: float = 0.0, residual: float = 0.0,
) -> Model:  # fmt: skip
    """Normalize a model's layers by statistics that are propagated through it from those of its input, in place; return it.

    Every linear or convolution layer whose output reaches a non-linearity before another layer (or those that `layers` names) gets a parameter
    `scale`: its outputs have the analytic standard deviation `scale` and the mean `bias`, whatever its weight. Before every call of the model
    one sweep computes the statistics from the current parameters, and gradients go through them. Nothing depends on the batch, nothing is averaged
    over steps, and training and evaluation are the same; the noise of dropout counts in both. Hooks of the model's modules see the sweep too.

    moments: of the input, as `input_moments` gives them; kept as buffers. preserve: scale and bias are set so that the model computes what it
    did before (a layer that is called at several places: at the first); else to 1 and 0. Layers without a bias get one. padding, pooling,
    residual: see `Closure`. Before training from scratch call `initialize_`: the smaller a weight, the faster its normalized layer learns.

    Under ``torch.utils.checkpoint`` use ``use_reentrant=False``. `fold` makes the model plain again: do so before threads share it. Raises
    ``ValueError`` for a model that is normalized already, unknown names and statistics that are not finite, ``NotImplementedError`` for a
    function without a rule.

    Source: Shekhovtsov & Flach 2018 (arXiv 1803.10560).
    """
    if any(isinstance(module, Analytic) for module in model.modules()):
        raise ValueError("analytic.normalize: expected a model that is not normalized yet, got one with analytic layers")
    assumptions = Closure(padding, pooling, residual, "always")
    names: list[str] = []

    def name_layer(name: str, layer: torch.nn.Module, x: Moments, output: Moments) -> Moments:
        names.append(name)
        return Moments(output.mu, output.var, output.sample, frozenset((name,)), output.before, output.patch)

    moments = given("analytic.normalize", moments, model)
    with layers_before_nonlinearities() as found, _layer_outputs(model, name_layer):
        _run(model, moments, assumptions)
    chosen = found if layers is None else set(layers)
    if unknown := chosen - set(names):
        raise ValueError(f"analytic.normalize: expected names of layers out of {', '.join(names)}, got {', '.join(sorted(unknown))}")

    def make_analytic(name: str, layer: Any, x: Moments, output: Moments) -> Moments:
        if name not in chosen or isinstance(layer, Analytic):
            return output
        mean, std = _of_outputs(layer, output, eps)
        layer.__class__ = ANALYTIC[type(layer)]
        layer.eps = eps
        layer.scale = torch.nn.Parameter((std if preserve else torch.ones_like(std)).to(layer.weight))
        if layer.bias is None:
            layer.bias = torch.nn.Parameter(torch.empty_like(layer.scale))
        layer.bias.copy_(mean if preserve else torch.zeros_like(mean))
        return layer.sweep(x)

    with _layer_outputs(model, make_analytic):
        _run(model, moments, assumptions)
    _forget(model.modules())
    buffers = {"mean": moments.mu, "var": moments.var}
    if moments.patch is not None:
        buffers |= zip(("patch_mean", "patch_covariance"), moments.patch, strict=True)
    for name, value in buffers.items():
        model.register_buffer(f"analytic_{name}", value.detach().clone())
    model.__dict__["analytic"] = moments.sample, assumptions
    model.register_forward_pre_hook(_sweep, with_kwargs=True)
    return model


def _run(model: torch.nn.Module, moments: Moments, assumptions: Closure) -> None:
    with torch.no_grad(), assuming(assumptions), module_rules(model.modules()):
        model._call_impl(copy(moments))  # with the model's own hooks, but not what it is compiled to


@contextmanager
def _layer_outputs(model: torch.nn.Module, hook: Any) -> Iterator[None]:
    """hook(name, layer, input, output) of every linear layer that moments pass replaces its output."""

    def of(name: str):
        return lambda module, args, output: hook(name, module, args[0], output) if isinstance(output, Moments) else None

    handles = [module.register_forward_hook(of(name), prepend=True) for name, module in model.named_modules() if type(module) in ANALYTIC]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _of_outputs(layer: torch.nn.Module, output: Moments, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each output of a layer, over positions."""
    own = output.channels(output_dim(layer))
    return own.mu.flatten(), (own.var.flatten() + eps).sqrt()


@torch.compiler.disable
def _sweep(model: Any, args: tuple, kwargs: dict) -> None:
    """Before every call of a normalized model: new weights for its layers, from the statistics of its input."""
    if any(isinstance(value, Moments) for value in (*args, *kwargs.values())):
        return
    modules = list(model.modules())
    _forget(modules)
    shape, assumptions = model.analytic
    patch = (model.analytic_patch_mean, model.analytic_patch_covariance) if hasattr(model, "analytic_patch_mean") else None
    start = Moments(model.analytic_mean, model.analytic_var, shape, patch=patch)
    with assuming(assumptions), module_rules(modules):  # autocast leaves float64 alone
        if args:
            model._call_impl(start, *args[1:], **kwargs)
        else:
            model._call_impl(**{**kwargs, next(iter(inspect.signature(model.forward).parameters)): start})


def _forget(modules: Iterable[torch.nn.Module]) -> None:
    for module in modules:
        if isinstance(module, Analytic):
            module.__dict__["effective"], module.__dict__["site"] = [], 0


def fold(model: Model, *args: Any, **kwargs: Any) -> Model:
    """Make a normalized model plain again, in place, with the same outputs: torch's layers, whose weights and biases are the normalized ones.

    args, kwargs: further arguments of the model's calls, if its forward takes more than its input. Raises ``ValueError`` where a layer is called at
    several places, whose weights differ.
    """
    if not hasattr(model, "analytic"):
        raise ValueError("analytic.fold: expected a model that analytic.normalize was given, got another")
    with torch.no_grad():
        _sweep(model, (None, *args), kwargs)
    layers: list[Any] = [module for module in model.modules() if isinstance(module, Analytic)]
    for layer in layers:
        if len(layer.effective) != 1:
            raise ValueError(f"analytic.fold: expected layers that are called at one place, got a {type(layer).__name__} at {len(layer.effective)}")
    plain = {ours: torchs for torchs, ours in ANALYTIC.items()}
    for layer in layers:
        for name, value in zip(("weight", "bias"), layer.effective[0], strict=True):
            setattr(layer, name, torch.nn.Parameter(value, getattr(layer, name).requires_grad))
        del layer.scale, layer.eps, layer.effective, layer.site
        layer.__class__ = plain[type(layer)]
    for key, hook in list(model._forward_pre_hooks.items()):
        if hook is _sweep:
            del model._forward_pre_hooks[key], model._forward_pre_hooks_with_kwargs[key]
    for name in [name for name, _ in model.named_buffers(recurse=False) if name.startswith("analytic_")]:
        delattr(model, name)
    del model.analytic
    return model


def initialize_(model: Model, moments: Moments, *, eps: float = 1e-10, padding: str = "ignore", pooling: float = 0.0, residual: float = 0.0) -> Model:
    """Scale and shift every linear and convolution layer so that each of its outputs has the analytic mean 0 and variance 1; in place.

    No data but the input's moments is needed. A layer that is called at several places is set at the first. padding, pooling, residual: see
    `Closure`. Raises ``ValueError`` for a layer without a bias, which could not take its mean away.

    Source: Shekhovtsov & Flach 2018 (arXiv 1803.10560).
    """
    for name, module in model.named_modules():
        if type(module) in ANALYTIC and module.bias is None:
            raise ValueError(f"analytic.initialize_: expected a bias in every layer, got none in {name or type(module).__name__}")
    done: set[str] = set()

    def scale(name: str, layer: Any, x: Moments, output: Moments) -> Moments:
        if name in done:
            return output
        done.add(name)
        mean, std = _of_outputs(layer, output, eps)
        layer.weight.div_(weights.per_output(std, layer.weight, getattr(layer, "groups", 1), getattr(layer, "transposed", False)))
        layer.bias.copy_((layer.bias - mean) / std)
        return layer.forward(x)

    with _layer_outputs(model, scale):
        _run(model, given("analytic.initialize_", moments, model), Closure(padding, pooling, residual, "always"))
    return model
