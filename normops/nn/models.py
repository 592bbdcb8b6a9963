"""What is done to the norms of whole models: torch's made ours, synchronized, frozen; the parameters of batch-instance norm."""

from typing import Any, TypeVar

import torch
from torch.utils.hooks import RemovableHandle

from normops.nn import batch, norms

Model = TypeVar("Model", bound=torch.nn.Module)


def _ours(module: Any, *names: str) -> dict[type, type]:
    return {getattr(torch.nn, name): getattr(module, name) for name in names}


_BATCH_NORMS = _ours(batch, "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm")
_NORMS = _BATCH_NORMS | _ours(norms, "GroupNorm", "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d", "LayerNorm", "RMSNorm")


def convert(model: Model) -> Model:
    """Make every norm module of torch.nn in `model` ours, in place, and return the model.

    The modules stay the same objects with the same parameters, buffers and hooks, so optimizers and references keep working, and the results stay
    the same. Subclasses of torch's norms are left alone: what they add is unknown. ``torch.nn.SyncBatchNorm`` becomes ours too.
    """
    return _convert(model, _NORMS)


def _convert(model: Model, classes: dict[type, type]) -> Model:
    for module in model.modules():
        module.__class__ = classes.get(type(module), type(module))
    return model


def convert_sync_batchnorm(model: Model, process_group: Any = None) -> Model:
    """Synchronize every batch norm of `model`, torch's and ours, over a ``torch.distributed`` process group (None: all workers), in place.

    As ``torch.nn.SyncBatchNorm.convert_sync_batchnorm``, which makes new modules; here they stay the same objects.
    """
    module: Any
    for module in _convert(model, _BATCH_NORMS).modules():
        if type(module) in _BATCH_NORMS.values():
            module.__class__ = batch.SyncBatchNorm
            module.process_group = process_group
    return model


def freeze_batch_norm(model: Model, affine: bool = True) -> Model:
    """Let the running statistics of every batch norm normalize, in training too, and stay what they are: fine-tuning with small batches.

    In place, also for torch's modules, which become ours; ``model.train()`` does not undo it, `unfreeze_batch_norm` does. Gradients flow through
    the norms. affine: weight and bias go on training; False stops them too. Raises ``ValueError`` for a norm without running statistics.
    """
    found = _batch_norms(_convert(model, _BATCH_NORMS))
    for name, module in found.items():
        if not module.track_running_stats:
            raise ValueError(f"freeze_batch_norm: expected running statistics in {name or 'the model'}, got a norm without")
    _set_frozen(found, True, affine)
    return model


def unfreeze_batch_norm(model: Model) -> Model:
    """Undo `freeze_batch_norm`: batches normalize in training, update the statistics, and weight and bias train."""
    _set_frozen(_batch_norms(model), False, True)
    return model


def _batch_norms(model: torch.nn.Module) -> dict[str, Any]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm | batch.BatchRenorm)}
    for name, module in found.items():
        if not isinstance(module, norms.Fused):
            raise TypeError(
                f"freeze_batch_norm: expected batch norms of torch.nn or normops.nn, got {type(module).__name__} in {name or 'the model'}"
            )
    return found


def _set_frozen(found: dict[str, Any], frozen: bool, affine: bool) -> None:
    for module in found.values():
        module.frozen = frozen
        for parameter in (module.weight, module.bias):
            if parameter is not None:
                parameter.requires_grad_(affine)


def parameter_groups(model: torch.nn.Module, lr: float, weight_decay: float = 0.0, factor: float = 10.0) -> list[dict[str, Any]]:
    """Two groups for an optimizer: all parameters, and those `rho` of batch-instance norms, with `factor` times the learning rate and no decay.

    The factor is the authors' (Nam & Kim 2018, section 4).
    """
    rhos = [module.rho for module in model.modules() if isinstance(module, batch.BatchInstanceNorm)]
    special = {id(rho) for rho in rhos}
    others = [parameter for parameter in model.parameters() if id(parameter) not in special]
    return [
        {"params": others, "lr": lr, "weight_decay": weight_decay},
        {"params": rhos, "lr": factor * lr, "weight_decay": 0.0},
    ]


def clamp_after_step(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> RemovableHandle:
    """Project the rho of every batch-instance norm of `model` onto [0, 1] after each step of `optimizer`; ``handle.remove()`` ends it."""

    def clamp(*_) -> None:
        for module in model.modules():
            if isinstance(module, batch.BatchInstanceNorm):
                module.clamp_rho_()

    return optimizer.register_step_post_hook(clamp)
