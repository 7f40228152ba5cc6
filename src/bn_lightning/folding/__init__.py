"""Fold evaluation-mode BatchNorm into the weights before or behind it: plan, apply, verify, undo."""

from bn_lightning.folding.agreement import Agreement
from bn_lightning.folding.fold import FoldResult, fold_batch_norm
from bn_lightning.folding.inspection import BatchNormInspection, inspect_batch_norm
from bn_lightning.folding.plan import plan_fold
from bn_lightning.folding.report import FoldPlan, FoldReport, FoldRow

__all__ = [
    "Agreement",
    "BatchNormInspection",
    "FoldPlan",
    "FoldReport",
    "FoldResult",
    "FoldRow",
    "fold_batch_norm",
    "inspect_batch_norm",
    "plan_fold",
]
