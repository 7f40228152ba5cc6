"""Networks with normalization, small enough to study on a laptop."""

from bn_lightning.networks.deep_linear import DeepLinearNetwork
from bn_lightning.networks.lsuv import lsuv_
from bn_lightning.networks.mlp import MLP
from bn_lightning.networks.registry import build_network
from bn_lightning.networks.residual import ResidualNetwork
from bn_lightning.networks.vgg import VGG

__all__ = ["MLP", "VGG", "DeepLinearNetwork", "ResidualNetwork", "build_network", "lsuv_"]
