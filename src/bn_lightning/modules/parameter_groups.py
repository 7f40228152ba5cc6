"""Which parameters weight decay should shrink."""

from typing import Any

from torch import nn

__all__ = ["decay_groups"]


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split parameters into weights, which decay, and norm parameters, biases and scalars, which do not.

    A weight before a BN may shrink without changing what the network computes; γ and β may not.

    Args:
        model: The network; parameters that need no gradient are left out.
        weight_decay: For the first group, per step and unit of learning rate.

    Returns:
        Two parameter groups for an optimizer; the second holds every parameter of fewer than two axes.

    Example:
        >>> groups = decay_groups(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), 0.1)
        >>> [(len(group["params"]), group["weight_decay"]) for group in groups]
        [(1, 0.1), (3, 0.0)]
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trainable if parameter.dim() >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trainable if parameter.dim() < 2], "weight_decay": 0.0},
    ]
