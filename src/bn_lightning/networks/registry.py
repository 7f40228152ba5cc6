"""Networks by name, so that hyperparameters and configuration files can say which one."""

import inspect
from typing import Any

from torch import nn

from bn_lightning.errors import BatchNormError, nearest
from bn_lightning.networks.deep_linear import DeepLinearNetwork
from bn_lightning.networks.mlp import MLP
from bn_lightning.networks.residual import ResidualNetwork
from bn_lightning.networks.vgg import VGG

__all__ = ["build_network"]

_NETWORKS: dict[str, type[nn.Module]] = {
    "deep_linear": DeepLinearNetwork,
    "mlp": MLP,
    "residual": ResidualNetwork,
    "vgg": VGG,
}


def build_network(name: str, **options: Any) -> nn.Module:
    """Build a network from its name and its constructor's options.

    Args:
        name: ``deep_linear, mlp, residual`` or ``vgg``.
        **options: As `DeepLinearNetwork`, `MLP`, `ResidualNetwork` and `VGG` take them.

    Raises:
        BatchNormError: If there is no such network or option, with the nearest name; or as the network's own.

    Example:
        >>> type(build_network("vgg", layout=[[8], [16]], norm="ghost")).__name__
        'VGG'
    """
    if name not in _NETWORKS:
        there = ", ".join(map(repr, sorted(_NETWORKS)))
        raise BatchNormError(f"no network is called {name!r}{nearest(name, _NETWORKS)}; there are {there}.")
    known = inspect.signature(_NETWORKS[name]).parameters
    for option in options:
        if option not in known:
            raise BatchNormError(
                f"the network {name!r} has no option {option!r}{nearest(option, known)}; it takes {', '.join(known)}."
            )
    return _NETWORKS[name](**options)
