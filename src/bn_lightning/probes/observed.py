"""Which layers' outputs a probe observes."""

from collections.abc import Iterable

from torch import nn

from bn_lightning.errors import BatchNormError
from bn_lightning.monitoring.layers import watchable_layers
from bn_lightning.probes.weights import is_weight_layer
from bn_lightning.selection import as_patterns

__all__ = ["observed_layers"]


def observed_layers(network: nn.Module, include: Iterable[str] = (), exclude: Iterable[str] = ()) -> list[str]:
    """Name the layers to observe: those the patterns pick, or without ``include`` all convolutions and linear layers.

    Raises:
        BatchNormError: If there is none, or a pattern matches none.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> observed_layers(network), observed_layers(network, include=["1"])
        (['0'], ['1'])
    """
    include = as_patterns(include, "include")
    layers = watchable_layers(network, include, exclude)
    found = ["" if name == "(root)" else name for name, each in layers.items() if include or is_weight_layer(each)]
    if not found:
        raise BatchNormError(
            f"{type(network).__name__} has no convolution or linear layer to measure: name others with include=."
        )
    return found
