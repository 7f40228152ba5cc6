"""Which parameters weight decay should shrink."""

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["decay_groups"]

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split parameters into weights, which decay, and norm parameters, biases and scalars, which do not.

    A weight before a BN may shrink without changing what the network computes; γ and β may not.

    Args:
        model: The network; parameters that need no gradient are left out.
        weight_decay: For the first group, per step and unit of learning rate.

    Returns:
        Two parameter groups for an optimizer; the second holds every parameter of fewer than two axes, and those of
        norm layers whatever their shape, as a LayerNorm over (C, H, W) or a layer with one row a domain has them.

    Example:
        >>> groups = decay_groups(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), 0.1)
        >>> [(len(group["params"]), group["weight_decay"]) for group in groups]
        [(1, 0.1), (3, 0.0)]
    """
    norms = (module for module in model.modules() if isinstance(module, _NORMS))
    of_norms = {id(parameter) for norm in norms for parameter in norm.parameters(recurse=False)}
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            spared = parameter.dim() < 2 or id(parameter) in of_norms
            (kept if spared else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
