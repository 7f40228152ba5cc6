"""The variants with timm's drop and activation behind them: what ``timm.layers.BatchNormAct2d`` becomes."""

from typing import Any

from torch import Tensor, nn

from bn_lightning.layers.adaptive import AdaptiveBatchNorm
from bn_lightning.layers.base import BatchNormVariant
from bn_lightning.layers.cross_replica import CrossReplicaBatchNorm
from bn_lightning.layers.debiased import DebiasedBatchNorm
from bn_lightning.layers.domain import DomainBatchNorm
from bn_lightning.layers.frozen import FrozenBatchNorm
from bn_lightning.layers.ghost import GhostBatchNorm
from bn_lightning.layers.lp import LpBatchNorm
from bn_lightning.layers.masked import MaskedBatchNorm
from bn_lightning.layers.noisy import NoisyBatchNorm
from bn_lightning.layers.renorm import BatchRenorm

__all__ = [
    "AdaptiveBatchNormAct",
    "BatchRenormAct",
    "CrossReplicaBatchNormAct",
    "DebiasedBatchNormAct",
    "DomainBatchNormAct",
    "FrozenBatchNormAct",
    "GhostBatchNormAct",
    "GroupNormAct",
    "LpBatchNormAct",
    "MaskedBatchNormAct",
    "NoisyBatchNormAct",
    "ThenActivation",
    "with_activation",
]


class ThenActivation(nn.Module):
    """Mixin before a normalization: ``act(drop(normalized))``.

    Args:
        *args: What the normalization takes.
        drop: Applied to the normalized values; nothing if ``None``.
        act: Applied last; nothing if ``None``.
        **options: What the normalization takes.
    """

    drop: nn.Module
    act: nn.Module

    def __init__(self, *args: Any, drop: nn.Module | None = None, act: nn.Module | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.drop = nn.Identity() if drop is None else drop
        self.act = nn.Identity() if act is None else act

    def forward(self, input: Tensor, *args: Any, **options: Any) -> Tensor:
        """Normalize, drop, activate."""
        return self.act(self.drop(super().forward(input, *args, **options)))


# Written out, one by one: only a class that can be imported by name goes through torch.save and into other processes.
class AdaptiveBatchNormAct(ThenActivation, AdaptiveBatchNorm):
    """`AdaptiveBatchNorm`, then drop and activation."""


class BatchRenormAct(ThenActivation, BatchRenorm):
    """`BatchRenorm`, then drop and activation."""


class CrossReplicaBatchNormAct(ThenActivation, CrossReplicaBatchNorm):
    """`CrossReplicaBatchNorm`, then drop and activation."""


class DebiasedBatchNormAct(ThenActivation, DebiasedBatchNorm):
    """`DebiasedBatchNorm`, then drop and activation."""


class DomainBatchNormAct(ThenActivation, DomainBatchNorm):
    """`DomainBatchNorm`, then drop and activation."""


class FrozenBatchNormAct(ThenActivation, FrozenBatchNorm):
    """`FrozenBatchNorm`, then drop and activation."""


class GhostBatchNormAct(ThenActivation, GhostBatchNorm):
    """`GhostBatchNorm`, then drop and activation."""


class LpBatchNormAct(ThenActivation, LpBatchNorm):
    """`LpBatchNorm`, then drop and activation."""


class MaskedBatchNormAct(ThenActivation, MaskedBatchNorm):
    """`MaskedBatchNorm`, then drop and activation."""


class NoisyBatchNormAct(ThenActivation, NoisyBatchNorm):
    """`NoisyBatchNorm`, then drop and activation."""


class GroupNormAct(ThenActivation, nn.GroupNorm):
    """``torch.nn.GroupNorm``, then drop and activation."""


def with_activation(variant: type[BatchNormVariant]) -> type[BatchNormVariant] | None:
    """Return the class that does what a variant does, then drop and activation; ``None`` if there is none.

    A variant of your own gets one by ``class MineAct(ThenActivation, Mine)``.

    Example:
        >>> with_activation(GhostBatchNorm).__name__
        'GhostBatchNormAct'
    """
    kinds: list[type[Any]] = ThenActivation.__subclasses__()
    return next((kind for kind in kinds if kind.__bases__ == (ThenActivation, variant)), None)
