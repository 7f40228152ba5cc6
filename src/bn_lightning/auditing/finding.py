"""One thing an audit found: what, where, how it is known, and what to do."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["SEVERITIES", "Evidence", "Finding", "Repair"]

SEVERITIES = ("info", "warning", "error")

Evidence = str | int | float | None


@dataclass(frozen=True, slots=True)
class Repair:
    """What `apply_fixes` may do about a finding, since it is safe: it touches buffers and modes, no parameter.

    Attributes:
        action: ``"recalibrate"`` (population statistics as the audit measured them), ``"momentum"`` (set it to
            ``value``), or ``"training"`` (set the layer's mode to ``value``).
        value: Of the action.
    """

    action: Literal["recalibrate", "momentum", "training"]
    value: float | bool | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding of one rule.

    Attributes:
        rule: Slug of the rule.
        severity: ``"info"``, ``"warning"`` or ``"error"``.
        layer: Name of the layer, or ``None`` for the model as a whole.
        message: What is wrong, in a sentence.
        evidence: The numbers it rests on.
        threshold: When the rule speaks.
        fix: Something to type.
        repair: What `apply_fixes` does about it, or ``None`` where that is for a person to decide.
    """

    rule: str
    severity: str
    layer: str | None
    message: str
    evidence: Mapping[str, Evidence]
    threshold: str
    fix: str
    repair: Repair | None = None

    def to_dict(self) -> dict[str, object]:
        """Return the fields as plain values."""
        return {
            "rule": self.rule,
            "severity": self.severity,
            "layer": self.layer,
            "message": self.message,
            "evidence": dict(self.evidence),
            "threshold": self.threshold,
            "fix": self.fix,
            "applicable": self.repair is not None,
        }
