"""What several rules ask about a layer and its training."""

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.auditing.reading import AuditReading
from bn_lightning.layers.frozen import FrozenBatchNorm

__all__ = ["affine_parameters", "are_fresh", "is_frozen", "may_move", "trained_parameters"]


def are_fresh(layer: _BatchNorm) -> bool:
    """Tell whether the running statistics are exactly (0, 1), as they are before the first update."""
    mean, var = layer.running_mean, layer.running_var
    return mean is not None and var is not None and bool((mean == 0).all()) and bool((var == 1).all())


def is_frozen(reading: AuditReading, layer: _BatchNorm) -> bool:
    """Tell whether a layer trains on its running statistics: by its kind, or in evaluation mode in a training model."""
    return isinstance(layer, FrozenBatchNorm) or (reading.model.training and not layer.training)


def may_move(reading: AuditReading, layer: _BatchNorm) -> bool:
    """Tell whether training is to move a layer's running statistics, its momentum apart."""
    return layer.running_mean is not None and layer.track_running_stats and not is_frozen(reading, layer)


def trained_parameters(reading: AuditReading) -> set[int]:
    """Return the ``id`` of every parameter that is trained: it needs a gradient and, if optimizers are known, has one.

    Example:
        >>> from torch import nn
        >>> net = nn.BatchNorm1d(3).requires_grad_(False)
        >>> trained_parameters(AuditReading(net, ()))
        set()
    """
    needing = {id(parameter) for parameter in reading.model.parameters() if parameter.requires_grad}
    if not reading.optimizers:
        return needing
    return needing & {
        id(parameter)
        for optimizer in reading.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def affine_parameters(layer: _BatchNorm) -> list[Tensor]:
    """Return γ and β, those that there are."""
    return [parameter for parameter in (layer.weight, layer.bias) if parameter is not None]
