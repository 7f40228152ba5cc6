"""The audit in GitHub's Markdown, short, for TensorBoard's text tab."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from bn_lightning.auditing.console import gap_table
from bn_lightning.auditing.words import FindingGroup, grouped, headline, overview, verdict
from bn_lightning.reports.table import markdown_escaped

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
        # No table: TensorBoard breaks words to fit its columns.
        yield "**What was found, and what to do**"
        yield "\n".join(_finding(group) for group in grouped(report.findings))
    if report.losses is not None:
        yield "**The loss, read in different ways**"
        yield "\n".join(f"- {markdown_escaped(line)}" for line in report.losses.sentences())
    worst = [row for row in report.layers if row.gap is not None][:_MOST_LAYERS]
    if worst:
        yield gap_table(worst, "Largest gaps, in output standard deviations").to_markdown()
    if report.not_looked:
        yield f"Not looked at: {markdown_escaped(', '.join(each.what for each in report.not_looked))}"


def _finding(group: FindingGroup) -> str:
    what = f"{group.worst.severity} {group.rule}, {group.where}: {group.worst.message}"
    fixes = [" ".join(fix.split()) for fix in group.fixes[:2]]
    return "\n".join([f"- {markdown_escaped(what)}", *(f"    {_item('fix', fix)}" for fix in fixes)])


def _item(label: str, line: str) -> str:
    if label == "fix" and "`" not in line and "\n" not in line:
        return f"- fix: `{line}`"
    return f"- {label}: {markdown_escaped(line)}" if label else f"  {markdown_escaped(line)}"
