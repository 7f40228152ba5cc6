"""Why evaluation is worse than training, which layer does it, and the cure."""

from bn_lightning.auditing.audit import audit_batch_norm
from bn_lightning.auditing.finding import SEVERITIES, Finding
from bn_lightning.auditing.reading import AuditReading, LayerReading
from bn_lightning.auditing.report import AuditReport, ChannelGap, GapRow
from bn_lightning.auditing.rules import RULES, Rule

__all__ = [
    "RULES",
    "SEVERITIES",
    "AuditReading",
    "AuditReport",
    "ChannelGap",
    "Finding",
    "GapRow",
    "LayerReading",
    "Rule",
    "audit_batch_norm",
]
