"""Thin Lightning adapters: they call the rooms below and hold no arithmetic."""

from bn_lightning.callbacks.activation_monitor import ActivationMonitor
from bn_lightning.callbacks.audit import BatchNormAudit
from bn_lightning.callbacks.batch_norm_monitor import BatchNormMonitor
from bn_lightning.callbacks.convert import ConvertBatchNorm
from bn_lightning.callbacks.fold import FoldBatchNorm
from bn_lightning.callbacks.freeze import FreezeBatchNorm
from bn_lightning.callbacks.recalibrate import RecalibrateBatchNorm

__all__ = [
    "ActivationMonitor",
    "BatchNormAudit",
    "BatchNormMonitor",
    "ConvertBatchNorm",
    "FoldBatchNorm",
    "FreezeBatchNorm",
    "RecalibrateBatchNorm",
]
