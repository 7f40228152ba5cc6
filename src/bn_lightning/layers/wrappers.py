"""What around a model stands in the way of changing its layers."""

import sys
from collections.abc import Iterable

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bn_lightning.errors import ConversionError
from bn_lightning.layers.swap import LayerChange

__all__ = ["refuse_sharded", "refuse_under_ddp"]


def refuse_sharded(model: nn.Module) -> None:
    """Refuse a model whose parameters are spread over processes.

    Raises:
        ConversionError: After ``fully_shard``, inside FSDP, or with a DTensor among the parameters.
    """
    # What was never imported cannot have sharded anything.
    fsdp, tensors = sys.modules.get("torch.distributed.fsdp"), sys.modules.get("torch.distributed.tensor")
    sharding = tuple(filter(None, (getattr(fsdp, name, None) for name in ("FSDPModule", "FullyShardedDataParallel"))))
    distributed = getattr(tensors, "DTensor", ())
    for name, module in model.named_modules():
        spread = any(isinstance(parameter, distributed) for parameter in module.parameters(recurse=False))
        if spread or isinstance(module, sharding):
            raise ConversionError(
                f"{name or '(root)'!r} is sharded over processes ({type(module).__name__}), which has fixed the "
                "classes and parameters of its layers. Convert before fully_shard or FSDP."
            )


def refuse_under_ddp(model: nn.Module, changes: Iterable[LayerChange]) -> None:
    """Refuse changes that DDP, which took stock of the parameters when it was built, would not follow.

    Raises:
        ConversionError: If DDP is around a layer that has other parameters, buffers or ``requires_grad`` now.
    """
    wrapped = {
        id(module): name
        for wrapper in model.modules()
        if isinstance(wrapper, DistributedDataParallel)
        for name, module in wrapper.module.named_modules()
    }
    for change in changes:
        if id(change.layer) in wrapped and change.alters_training:
            raise ConversionError(
                f"{wrapped[id(change.layer)] or '(root)'!r} would have other parameters, buffers or requires_grad, and "
                "DistributedDataParallel has taken stock of them already. Convert before wrapping; nothing was "
                "converted."
            )
