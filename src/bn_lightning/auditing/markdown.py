"""The audit in GitHub's Markdown, short, for TensorBoard's text tab."""

from typing import TYPE_CHECKING

from bn_lightning.auditing.console import gap_table
from bn_lightning.auditing.words import grouped, headline, verdict, worst_gap
from bn_lightning.reports.table import Table

if TYPE_CHECKING:
    from bn_lightning.auditing.report import AuditReport

__all__ = ["to_markdown"]

_MOST_LAYERS = 10


def to_markdown(report: "AuditReport") -> str:
    """Write the verdict, the findings by rule, the loss differences and the worst layers."""
    losses = () if report.losses is None else report.losses.sentences()
    missed = () if not report.not_looked else (f"Not looked at: {', '.join(each.what for each in report.not_looked)}.",)
    found = Table(
        headline(report),
        ("severity", "rule", "where", "what", "fix"),
        [
            (group.worst.severity, group.rule, group.where, group.worst.message, " · ".join(group.fixes[:2]))
            for group in grouped(report.findings)
        ],
        (verdict(report), *filter(None, [worst_gap(report)]), *losses, *missed),
    )
    worst = [row for row in report.layers if row.gap is not None][:_MOST_LAYERS]
    parts = [found, *([gap_table(worst, "largest gaps, in output standard deviations")] if worst else [])]
    return "\n\n".join(part.to_markdown() for part in parts)
