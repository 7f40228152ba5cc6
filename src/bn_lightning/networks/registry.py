"""Networks by name, so that hyperparameters and configuration files can say which one."""

from typing import Any

from torch import nn

from bn_lightning.errors import BatchNormError, nearest
from bn_lightning.networks.residual import ResidualNetwork

__all__ = ["build_network"]

_NETWORKS: dict[str, type[nn.Module]] = {"residual": ResidualNetwork}


def build_network(name: str, **options: Any) -> nn.Module:
    """Build a network from its name and its constructor's options.

    Raises:
        BatchNormError: If there is no such network; the message has the nearest name.

    Example:
        >>> type(build_network("residual", widths=(8, 16))).__name__
        'ResidualNetwork'
    """
    if name not in _NETWORKS:
        there = ", ".join(map(repr, sorted(_NETWORKS)))
        raise BatchNormError(f"no network is called {name!r}{nearest(name, _NETWORKS)}; there are {there}.")
    return _NETWORKS[name](**options)
