"""The variants of Batch Normalization, and putting them in each other's place."""

from bn_lightning.layers.base import BatchNormVariant
from bn_lightning.layers.frozen import FrozenBatchNorm
from bn_lightning.layers.ghost import GhostBatchNorm

__all__ = [
    "BatchNormVariant",
    "FrozenBatchNorm",
    "GhostBatchNorm",
]
