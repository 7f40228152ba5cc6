"""The audit in GitHub's Markdown, short, for TensorBoard's text tab."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from bn_lightning.auditing.console import gap_table
from bn_lightning.auditing.words import grouped, headline, overview, verdict
from bn_lightning.reports.table import Table, markdown_escaped

if TYPE_CHECKING:
    from bn_lightning.auditing.report import AuditReport

__all__ = ["to_markdown"]

_MOST_LAYERS = 10


def to_markdown(report: "AuditReport") -> str:
    """Write the verdict and what to type, the findings by rule, the loss differences and the worst layers."""
    return "\n\n".join(_parts(report))


def _parts(report: "AuditReport") -> Iterator[str]:
    yield f"**{markdown_escaped(headline(report))}**"
    yield f"**{markdown_escaped(verdict(report))}**"
    told = overview(report)
    if told:
        yield "\n".join(_item(label, line) for label, line in told)
    if report.findings:
        yield Table(
            "What was found, and what to do",
            ("severity", "rule", "where", "what", "fix"),
            [
                (group.worst.severity, group.rule, group.where, group.worst.message, " · ".join(group.fixes[:2]))
                for group in grouped(report.findings)
            ],
        ).to_markdown()
    if report.losses is not None:
        yield "\n".join(f"- {markdown_escaped(line)}" for line in report.losses.sentences())
    worst = [row for row in report.layers if row.gap is not None][:_MOST_LAYERS]
    if worst:
        yield gap_table(worst, "Largest gaps, in output standard deviations").to_markdown()
    if report.not_looked:
        yield f"Not looked at: {markdown_escaped(', '.join(each.what for each in report.not_looked))}"


def _item(label: str, line: str) -> str:
    if label == "fix" and "`" not in line and "\n" not in line:
        return f"- fix: `{line}`"
    return f"- {label}: {markdown_escaped(line)}" if label else f"  {markdown_escaped(line)}"
