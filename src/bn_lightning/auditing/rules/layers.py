"""What several rules ask about a layer and its training."""

from typing import Any

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.auditing.reading import AuditReading
from bn_lightning.layers.frozen import FrozenBatchNorm

__all__ = [
    "affine_parameters",
    "are_fresh",
    "fresh_half",
    "is_averaged",
    "is_frozen",
    "learned_weights",
    "may_move",
    "trained_parameters",
]


def are_fresh(layer: _BatchNorm) -> bool:
    """Tell whether the running statistics are exactly (0, 1), as they are before the first update."""
    mean, var = layer.running_mean, layer.running_var
    return mean is not None and var is not None and bool((mean == 0).all()) and bool((var == 1).all())


def fresh_half(layer: _BatchNorm) -> str | None:
    """Name the one of running_mean and running_var that is as at creation while the other is not, or ``None``.

    Example:
        >>> from torch import nn
        >>> layer = nn.BatchNorm1d(2)
        >>> layer.running_mean.fill_(0.5), fresh_half(layer)
        (tensor([0.5000, 0.5000]), 'running_var')
    """
    mean, var = layer.running_mean, layer.running_var
    if mean is None or var is None:
        return None
    fresh = {"running_mean": bool((mean == 0).all()), "running_var": bool((var == 1).all())}
    return next((name for name in fresh if fresh[name]), None) if sum(fresh.values()) == 1 else None


def is_frozen(reading: AuditReading, layer: _BatchNorm) -> bool:
    """Tell whether a layer trains on its running statistics: by its kind, or in evaluation mode in a training model."""
    return isinstance(layer, FrozenBatchNorm) or (reading.model.training and not layer.training)


def is_averaged(reading: AuditReading, name: str) -> bool:
    """Tell whether a layer was seen to follow other weights without a gradient, as a teacher of BYOL or MoCo does.

    Its passes under ``torch.no_grad()`` are all it has, and its running statistics are meant to follow them.
    """
    seen = None if reading.history is None else reading.history.layers.get(name)
    return seen is not None and seen.averaged


def may_move(reading: AuditReading, layer: _BatchNorm) -> bool:
    """Tell whether training is to move a layer's running statistics, its momentum apart."""
    return layer.running_mean is not None and layer.track_running_stats and not is_frozen(reading, layer)


def trained_parameters(reading: AuditReading) -> set[int]:
    """Return the ``id`` of every parameter that is trained: it needs a gradient and, if optimizers are known, has one.

    One in a group whose learning rate was 0 from the beginning is not trained; a schedule may end at 0.

    Example:
        >>> from torch import nn
        >>> net = nn.BatchNorm1d(3).requires_grad_(False)
        >>> trained_parameters(AuditReading(net, ()))
        set()
    """
    needing = {id(parameter) for parameter in reading.model.parameters() if parameter.requires_grad}
    if not reading.optimizers:
        return needing
    groups = [group for optimizer in reading.optimizers for group in optimizer.param_groups]
    # Rates that are all 0 were set so, step by step, without a scheduler.
    moving = [group for group in groups if _rate(group)] or groups
    return needing & {id(parameter) for group in moving for parameter in group["params"]}


def _rate(group: dict[str, Any]) -> float:
    """Return the learning rate that a schedule started from, or the present one; 1 if the optimizer has none."""
    rate = group.get("initial_lr") or group.get("lr")
    return 1.0 if rate is None else float(rate)


def affine_parameters(layer: _BatchNorm) -> list[Tensor]:
    """Return γ and β, those that there are."""
    return [parameter for parameter in (layer.weight, layer.bias) if parameter is not None]


def learned_weights(reading: AuditReading, name: str, layer: _BatchNorm) -> list[Tensor]:
    """Return γ and β; of a layer without them all parameters of the nearest module around it that has any.

    Example:
        >>> from torch import nn
        >>> body = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2, affine=False))
        >>> net = nn.Sequential(body, nn.Linear(2, 2))
        >>> [weight.dim() for weight in learned_weights(AuditReading(net, ()), "0.1", body[1])]
        [4]
    """
    weights = affine_parameters(layer)
    while not weights and name:
        name = name.rpartition(".")[0]
        weights = list(reading.model.get_submodule(name).parameters())
    return weights
