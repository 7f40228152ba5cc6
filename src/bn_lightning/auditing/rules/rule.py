"""What a rule is."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bn_lightning.auditing.finding import Evidence, Finding
from bn_lightning.auditing.reading import AuditReading

__all__ = ["RECALIBRATE", "Rule"]

RECALIBRATE = "bn_lightning.recalibrate_batch_norm(model, train_batches)"


@dataclass(frozen=True, slots=True)
class Rule:
    """One way in which BatchNorm goes wrong, and how to see it.

    Attributes:
        slug: Name of the rule, stable across versions.
        severity: The worst severity its findings have.
        threshold: When it speaks, in words and numbers.
        find: Yields its findings; changes nothing.
    """

    slug: str
    severity: str
    threshold: str
    find: Callable[["Rule", AuditReading], Iterator[Finding]]

    def finding(
        self,
        layer: str | None,
        message: str,
        evidence: dict[str, Evidence],
        fix: str,
        *,
        severity: str | None = None,
    ) -> Finding:
        """Make a finding of this rule, by default of its own severity."""
        return Finding(self.slug, severity or self.severity, layer, message, evidence, self.threshold, fix)
