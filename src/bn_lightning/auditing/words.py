"""What an audit's report says in words, the same wherever it is read."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bn_lightning.auditing.finding import SEVERITIES, Evidence, Finding
from bn_lightning.auditing.rows import GapRow, NotLooked

if TYPE_CHECKING:
    from bn_lightning.auditing.report import AuditReport

__all__ = [
    "APPLY",
    "BOUNDS",
    "GAP",
    "READINGS",
    "FindingGroup",
    "evidence_in_words",
    "grouped",
    "headline",
    "listed",
    "many",
    "named",
    "next_step",
    "reasons",
    "verdict",
    "worst_gap",
]

# Of the gap; the rules' own thresholds state the same.
BOUNDS = (("info", 0.1), ("warning", 0.25), ("error", 1.0))
GAP = (
    "gap: how far evaluation's output is from what the training data's own statistics would give, in standard "
    "deviations of the layer's output; 0.1 is noteworthy, 0.25 a warning, 1 an error."
)
READINGS = {
    "full_training": "everything in training mode",
    "batch_statistics": "BatchNorm by the batch, all else in evaluation mode",
    "recalibrated": "evaluation, with the training data's own statistics",
    "deployed": "evaluation, as the network is",
    "evaluation_statistics": "evaluation, with the evaluation data's own statistics",
}
APPLY = "bn_lightning.apply_fixes(model, report)"


@dataclass(frozen=True, slots=True)
class FindingGroup:
    """The findings of one rule, worst first."""

    rule: str
    findings: tuple[Finding, ...]

    @property
    def worst(self) -> Finding:
        """The finding that is told in full."""
        return self.findings[0]

    @property
    def fixes(self) -> tuple[str, ...]:
        """The different fixes, that of the worst finding first."""
        return tuple(dict.fromkeys(finding.fix for finding in self.findings))

    @property
    def where(self) -> str:
        """Say how many layers of which severity; of a single finding, its layer.

        Example:
            >>> found = [Finding("r", level, name, "", {}, "", "") for level, name in (("error", "a"), ("info", "b"))]
            >>> FindingGroup("r", tuple(found)).where, FindingGroup("r", tuple(found[:1])).where
            ('2 layers (1 error, 1 info)', "'a'")
        """
        if len(self.findings) == 1:
            return named(self.worst.layer)
        found = many(len(self.findings), "layer" if all(each.layer is not None for each in self.findings) else "place")
        counts = _counts(self.findings)
        return found if len(counts) == 1 else f"{found} ({', '.join(counts)})"


def grouped(findings: Iterable[Finding]) -> list[FindingGroup]:
    """Put the findings of each rule together; the rules stay in order of their worst finding."""
    by_rule: dict[str, list[Finding]] = {}
    for found in findings:
        by_rule.setdefault(found.rule, []).append(found)
    return [FindingGroup(rule, tuple(found)) for rule, found in by_rule.items()]


def headline(report: "AuditReport") -> str:
    """Say what was audited."""
    return (
        f"BatchNorm audit of {report.model}: {many(len(report.layers), 'layer')}, "
        f"{many(report.batches, 'training batch')}"
    )


def verdict(report: "AuditReport") -> str:
    """Say in a line how it stands."""
    if report.findings:
        return "findings: " + ", ".join(_counts(report.findings))
    if not report.batches:
        return "no findings, but without training batches the running statistics were compared with nothing"
    compared = sum(row.gap is not None for row in report.layers)
    if not compared:
        return "no findings, but no layer could be compared with the training data either"
    return f"no findings: the running statistics of {many(compared, 'layer')} describe the training data"


def worst_gap(report: "AuditReport") -> str | None:
    """Say where evaluation is most wrong, unless that is not worth a word."""
    worst = min((row for row in report.layers if row.gap is not None), key=lambda row: row.rank, default=None)
    if worst is None or worst.gap is None or worst.gap < BOUNDS[0][1]:
        return None
    if math.isnan(worst.gap):
        return f"largest gap: not finite, in {named(worst.name)}"
    return f"largest gap: {worst.gap:.2g} output standard deviations, in {named(worst.name)}"


def next_step(report: "AuditReport") -> str | None:
    """Say what `apply_fixes` would do, if anything."""
    repairs = [group for group in grouped(found for found in report.findings if found.repair is not None)]
    if not repairs:
        return None
    count = sum(len(group.findings) for group in repairs)
    rules = ", ".join(group.rule for group in repairs)
    return (
        f"it repairs {count} of {many(len(report.findings), 'finding')} ({rules}), changes no weight, and its result "
        "can be undone"
    )


def reasons(missed: Iterable[NotLooked | GapRow]) -> dict[str, list[str]]:
    """Put together what shares a reason; layers without one are left out."""
    by_reason: dict[str, list[str]] = {}
    for each in missed:
        if each.reason is not None:
            what = each.what if isinstance(each, NotLooked) else named(each.name)
            by_reason.setdefault(each.reason, []).append(what)
    return by_reason


def evidence_in_words(evidence: Iterable[tuple[str, Evidence]]) -> str:
    """Write the numbers a finding rests on, to three digits."""
    return ", ".join(f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}" for key, value in evidence)


def named(layer: str | None) -> str:
    """Write a layer's name; the root has none."""
    return "the model" if layer is None else repr(layer) if layer else "(root)"


def listed(names: Sequence[str], most: int = 4) -> str:
    """Name the first, and count the others.

    Example:
        >>> listed(["a", "b", "c", "d"], most=2)
        'a, b and 2 more'
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def many(count: int, noun: str) -> str:
    """Write a number of things.

    Example:
        >>> many(1, "layer"), many(2, "training batch")
        ('1 layer', '2 training batches')
    """
    plural = noun + ("es" if noun.endswith("ch") else "s")
    return f"{count} {noun if count == 1 else plural}"


def _counts(findings: Sequence[Finding]) -> list[str]:
    counts = [(name, sum(found.severity == name for found in findings)) for name in reversed(SEVERITIES)]
    return [f"{count} {name}" for name, count in counts if count]
