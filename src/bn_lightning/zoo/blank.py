"""Build a network without data, to see what it is made of."""

import warnings

import torch
from torch import nn

from bn_lightning.errors import BatchNormError
from bn_lightning.zoo.build import build_by_name

__all__ = ["build_blank"]


def build_blank(name: str) -> nn.Module:
    """Build the network that is named on the meta device, or with random weights where it cannot be built there.

    The global random state is left as it was, and nothing is warned of: nobody asked for this network.

    Raises:
        BatchNormError: If it cannot be built.

    Example:
        >>> build_blank("bn_lightning.networks:ResidualNetwork").head.weight.device.type
        'meta'
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"):
                return build_by_name(name)
        except BatchNormError as error:
            # torchvision's RegNet computes its widths with tensors; a wrong name fails again, with the same words.
            if not isinstance(error.__cause__, NotImplementedError | RuntimeError):
                raise
            return build_by_name(name)
