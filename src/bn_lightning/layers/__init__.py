"""The variants of Batch Normalization, and putting them in each other's place."""

from bn_lightning.layers.accumulation import (
    AdjustedLayer,
    MomentumResult,
    accumulation_momentum,
    adjust_momentum,
)
from bn_lightning.layers.adaptive import AdaptiveBatchNorm
from bn_lightning.layers.base import BatchNormVariant
from bn_lightning.layers.channel_affine import ChannelAffine
from bn_lightning.layers.convert import convert_batch_norm
from bn_lightning.layers.cross_replica import CrossReplicaBatchNorm
from bn_lightning.layers.debiased import DebiasedBatchNorm
from bn_lightning.layers.domain import DomainBatchNorm
from bn_lightning.layers.domains import select_domain, use_domain
from bn_lightning.layers.frozen import FrozenBatchNorm
from bn_lightning.layers.ghost import GhostBatchNorm
from bn_lightning.layers.lp import LpBatchNorm
from bn_lightning.layers.masked import MaskedBatchNorm, valid_positions
from bn_lightning.layers.merge import merge_statistics, statistics_spread
from bn_lightning.layers.merge_result import MergedLayer, MergeResult
from bn_lightning.layers.noisy import NoisyBatchNorm
from bn_lightning.layers.paused import paused_statistics
from bn_lightning.layers.renorm import BatchRenorm
from bn_lightning.layers.report import ConversionReport, ConversionRow
from bn_lightning.layers.revert import revert_batch_norm
from bn_lightning.layers.skip_init import SkipInit
from bn_lightning.layers.target import batch_norm_layer

__all__ = [
    "AdaptiveBatchNorm",
    "AdjustedLayer",
    "BatchNormVariant",
    "BatchRenorm",
    "ChannelAffine",
    "ConversionReport",
    "ConversionRow",
    "CrossReplicaBatchNorm",
    "DebiasedBatchNorm",
    "DomainBatchNorm",
    "FrozenBatchNorm",
    "GhostBatchNorm",
    "LpBatchNorm",
    "MaskedBatchNorm",
    "MergeResult",
    "MergedLayer",
    "MomentumResult",
    "NoisyBatchNorm",
    "SkipInit",
    "accumulation_momentum",
    "adjust_momentum",
    "batch_norm_layer",
    "convert_batch_norm",
    "merge_statistics",
    "paused_statistics",
    "revert_batch_norm",
    "select_domain",
    "statistics_spread",
    "use_domain",
    "valid_positions",
]
