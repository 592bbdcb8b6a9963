"""Drop-in modules: torch.nn's constructors, state_dicts and representations, plus what the kernels fuse; and what is done to whole models.

Each is a subclass of the torch module of its name, with the keywords `activation` and `negative_slope`. Calls take ``residual`` of the input's shape,
and ``scale``, ``shift``, one vector per sample::

    GroupNorm(32, C, activation="silu")(x)  ==  F.silu(torch.nn.GroupNorm(32, C)(x))
"""

from normops.nn.batch import (
    BatchInstanceNorm1d,
    BatchInstanceNorm2d,
    BatchInstanceNorm3d,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchRenorm1d,
    BatchRenorm2d,
    BatchRenorm3d,
    RenormSchedule,
    SyncBatchNorm,
)
from normops.nn.models import (
    clamp_after_step,
    convert,
    convert_sync_batchnorm,
    freeze_batch_norm,
    parameter_groups,
    unfreeze_batch_norm,
)
from normops.nn.norms import (
    AdaptiveInstanceNorm,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm,
    LayerNorm2d,
    RMSNorm,
    RMSNorm2d,
)

__all__ = [
    "AdaptiveInstanceNorm",
    "BatchInstanceNorm1d",
    "BatchInstanceNorm2d",
    "BatchInstanceNorm3d",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "LayerNorm2d",
    "RMSNorm",
    "RMSNorm2d",
    "RenormSchedule",
    "SyncBatchNorm",
    "clamp_after_step",
    "convert",
    "convert_sync_batchnorm",
    "freeze_batch_norm",
    "parameter_groups",
    "unfreeze_batch_norm",
]
