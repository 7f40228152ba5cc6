"""Why evaluation is worse than training, which layer does it, and the cure."""

from bn_lightning.auditing.audit import audit_batch_norm
from bn_lightning.auditing.finding import SEVERITIES, Finding, Repair
from bn_lightning.auditing.fixes import AppliedFix, FixResult, LeftFinding, apply_fixes
from bn_lightning.auditing.history import LayerHistory, TrainingHistory
from bn_lightning.auditing.losses import LossChange, LossDifference, LossReading, LossReadings
from bn_lightning.auditing.reading import AuditReading, LayerReading
from bn_lightning.auditing.report import AuditReport, ChannelGap, GapRow, NotLooked
from bn_lightning.auditing.rules import RULES, Rule
from bn_lightning.auditing.training import TrainingSettings
from bn_lightning.auditing.watch import TrainingWatch

__all__ = [
    "RULES",
    "SEVERITIES",
    "AppliedFix",
    "AuditReading",
    "AuditReport",
    "ChannelGap",
    "Finding",
    "FixResult",
    "GapRow",
    "LayerHistory",
    "LayerReading",
    "LeftFinding",
    "LossChange",
    "LossDifference",
    "LossReading",
    "LossReadings",
    "NotLooked",
    "Repair",
    "Rule",
    "TrainingHistory",
    "TrainingSettings",
    "TrainingWatch",
    "apply_fixes",
    "audit_batch_norm",
]
