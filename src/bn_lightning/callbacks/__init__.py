"""Thin Lightning adapters: they call the rooms below and hold no arithmetic.

Where they stand in ``Trainer(callbacks=[…])`` makes no difference, also beside Lightning's own:

- ``WeightAveraging`` validates averaged weights: `RecalibrateBatchNorm` and `BatchNormAudit` take those, and its
  average keeps the result. At the end all of them see the averaged weights that the network is left with.
- ``StochasticWeightAveraging`` moves its average into the network and measures BatchNorm anew in an epoch of its own.
  `RecalibrateBatchNorm` replaces what that leaves; layers that `FreezeBatchNorm` froze keep theirs, with a warning.
- ``BackboneFinetuning`` freezes and unfreezes parameters; `FreezeBatchNorm` decides for statistics, scale and shift.
- ``ModelCheckpoint`` saves what validation saw: with `RecalibrateBatchNorm` at each validation its files hold
  recalibrated statistics, with ``when="end"`` they do not. Files of `ConvertBatchNorm` load into the plain network, and
  none holds a network that `FoldBatchNorm` folded, unless asked.
- ``EarlyStopping`` judges by the metrics of those validations.
"""

from bn_lightning.callbacks.activation_monitor import ActivationMonitor
from bn_lightning.callbacks.audit import BatchNormAudit
from bn_lightning.callbacks.batch_norm_monitor import BatchNormMonitor
from bn_lightning.callbacks.convert import ConvertBatchNorm
from bn_lightning.callbacks.fold import FoldBatchNorm
from bn_lightning.callbacks.freeze import FreezeBatchNorm
from bn_lightning.callbacks.optimization_probe import OptimizationProbe
from bn_lightning.callbacks.recalibrate import RecalibrateBatchNorm

__all__ = [
    "ActivationMonitor",
    "BatchNormAudit",
    "BatchNormMonitor",
    "ConvertBatchNorm",
    "FoldBatchNorm",
    "FreezeBatchNorm",
    "OptimizationProbe",
    "RecalibrateBatchNorm",
]
