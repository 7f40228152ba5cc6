"""What an audit's report says in words, the same wherever it is read."""

import math
from collections.abc import Iterable, Iterator, Sequence
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
    "overview",
    "reasons",
    "verdict",
]

# Of the gap; the rules' own thresholds state the same.
BOUNDS = (("info", 0.1), ("warning", 0.25), ("error", 1.0))
GAP = (
    "gap: how far evaluation's output is from what the training data's own statistics would give, in standard "
    "deviations of the layer's output, its worst channels' in brackets; 0.1 is noteworthy, 0.25 a warning, 1 an error."
)
READINGS = {
    "full_training": "everything in training mode",
    "batch_statistics": "BatchNorm by the batch, all else in evaluation mode",
    "recalibrated": "evaluation mode, with the training data's own statistics",
    "deployed": "evaluation mode, as the network is",
    "evaluation_statistics": "evaluation mode, with the evaluation data's own statistics",
}
APPLY = "bn_lightning.apply_fixes(model, report)"
_MOST_RULES = 3


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


def overview(report: "AuditReport") -> list[tuple[str, str]]:
    """Say what is wrong, where, what it costs and what to type, as labels and lines; what is fine has no line."""
    told = []
    groups = grouped(report.findings)
    serious = [group for group in groups if group.worst.severity != "info"]
    if serious:
        told.append(("what", listed([f"{group.rule} in {group.where}" for group in serious], _MOST_RULES)))
    told += [("where", gap) for gap in _largest_gap(report)]
    if report.losses is not None:
        evident = [each for each in report.losses.differences if each.is_evident]
        largest_first = sorted(evident, key=lambda each: -abs(each.mean))
        told += [("loss", report.losses.sentence(each)) for each in largest_first]
    repaired = [group for group in groups if group.worst.repair is not None]
    if serious and serious[0] not in repaired:
        told.append(("fix", serious[0].worst.fix))
    if repaired:
        count = sum(found.repair is not None for found in report.findings)
        rules = ", ".join(group.rule for group in repaired)
        told.append(("fix", APPLY))
        told.append(
            ("", f"repairs {count} of {many(len(report.findings), 'finding')} ({rules}); no weight changes; has undo()")
        )
    return told


def _largest_gap(report: "AuditReport") -> Iterator[str]:
    worst = min((row for row in report.layers if row.gap is not None), key=lambda row: row.rank, default=None)
    if worst is not None and worst.gap is not None and not worst.gap < BOUNDS[0][1]:
        size = "not finite" if math.isnan(worst.gap) else f"{worst.gap:.2g} output standard deviations"
        yield f"largest gap in {named(worst.name)}: {size}"


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
    plural = noun + ("es" if noun.endswith(("ch", "x")) else "s")
    return f"{count} {noun if count == 1 else plural}"


def _counts(findings: Sequence[Finding]) -> list[str]:
    counts = [(name, sum(found.severity == name for found in findings)) for name in reversed(SEVERITIES)]
    return [f"{count} info" if name == "info" else many(count, name) for name, count in counts if count]
