"""Networks with normalization, small enough to study on a laptop."""

from bn_lightning.networks.registry import build_network
from bn_lightning.networks.residual import ResidualNetwork

__all__ = ["ResidualNetwork", "build_network"]
