"""What a rule is."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bn_lightning.auditing.finding import Evidence, Finding, Repair
from bn_lightning.auditing.reading import AuditReading

__all__ = ["RECALIBRATE", "SOURCES", "Rule"]

# What a rule may rest on, and how a person provides it.
SOURCES = {
    "model": "the model",
    "record": "example_inputs= or training batches, for one recorded forward pass",
    "optimizer": "optimizer=",
    "training": "training=TrainingSettings(…), or BatchNormAudit under a Trainer",
    "history": "history= of a TrainingWatch, or BatchNormAudit under a Trainer",
    "data": "training batches",
    "losses": "training batches and loss= or step=",
    "evaluation": "training batches and val_batches=",
    "processes": "several processes that audit together",
}

RECALIBRATE = "bn_lightning.recalibrate_batch_norm(model, train_batches)"


@dataclass(frozen=True, slots=True)
class Rule:
    """One way in which BatchNorm goes wrong, and how to see it.

    Attributes:
        slug: Name of the rule, stable across versions.
        severity: The worst severity its findings have.
        threshold: When it speaks, in words and numbers.
        find: Yields its findings; changes nothing.
        needs: Which of `SOURCES` it can rest on. It looks if there is at least one of them; otherwise the report says
            that it did not look.
    """

    slug: str
    severity: str
    threshold: str
    find: Callable[["Rule", AuditReading], Iterator[Finding]]
    needs: tuple[str, ...] = ("model",)

    def finding(
        self,
        layer: str | None,
        message: str,
        evidence: dict[str, Evidence],
        fix: str,
        *,
        severity: str | None = None,
        repair: Repair | None = None,
    ) -> Finding:
        """Make a finding of this rule, by default of its own severity."""
        return Finding(self.slug, severity or self.severity, layer, message, evidence, self.threshold, fix, repair)
