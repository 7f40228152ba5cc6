"""An audit's report for a terminal and a log file: the verdict and what to type first, then the numbers."""

import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from bn_lightning.auditing.rows import GapRow
from bn_lightning.auditing.words import (
    BOUNDS,
    GAP,
    READINGS,
    FindingGroup,
    evidence_in_words,
    grouped,
    headline,
    listed,
    many,
    named,
    overview,
    reasons,
    verdict,
)
from bn_lightning.reports.intervals import interval_in_words
from bn_lightning.reports.shortened import shortened
from bn_lightning.reports.table import Table

if TYPE_CHECKING:
    from rich.console import Console

    from bn_lightning.auditing.losses import LossReadings
    from bn_lightning.auditing.report import AuditReport

__all__ = ["gap_table", "print_report", "to_text", "told_change"]

_WIDEST, _NARROWEST = 110, 40
_NARROWEST_NAME = 16
# Of many healthy layers a few show that they were looked at.
_MOST_LAYERS, _FEWEST_LAYERS = 20, 5
_MOST_FIXES = 3
_STYLES = {"error": "bold red", "warning": "bold yellow", "info": "bold blue"}
# A line, or several, and its style in a terminal.
_Part = tuple[str, str]


def to_text(report: "AuditReport", width: int | None = None) -> str:
    """Write the report as plain text.

    Args:
        report: The report.
        width: Columns, 40 to 110; those of the terminal if ``None``, and 110 where there is none.
    """
    columns = shutil.get_terminal_size((_WIDEST, 24)).columns if width is None else width
    return "\n".join(text for text, _ in _Writer(columns).parts(report))


def print_report(report: "AuditReport", console: "Console | None" = None) -> None:
    """Print the report; see `AuditReport.print`."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    if console.is_terminal:
        with console.capture() as captured:
            for part in _Writer(console.width).parts(report):
                console.print(Text(*part), soft_wrap=True)
        text = captured.get()
    else:
        text = f"{to_text(report, _WIDEST)}\n"
    # A terminal or a file that has no Greek letters is no reason to end a run.
    encoding = console.encoding or "utf-8"
    console.file.write(text.encode(encoding, "replace").decode(encoding))


def gap_table(rows: Sequence[GapRow], title: str, width: int = _WIDEST) -> Table:
    """Make a table of rows that fits the width: with fewer worst channels, then shorter names, if need be."""
    changes = any(row.predicted_loss_change is not None for row in rows)
    head = ("gap", "worst channels", *(("loss change", "confirmed") if changes else ()))
    longest = max(len(row.name or "(root)") for row in rows)
    for most in (3, 2, 1):
        cells = [_cells(row, most, changes) for row in rows]
        left = width - 3 - sum(max(map(len, column)) + 3 for column in zip(head, *cells, strict=True))
        if left >= longest:
            break
    names = [shortened(row.name or "(root)", max(_NARROWEST_NAME, left)) for row in rows]
    return Table(title, ("layer", *head), [(name, *row) for name, row in zip(names, cells, strict=True)])


def told_change(change: float | None) -> str:
    """Write a change with its sign."""
    return "–" if change is None else f"{change:+.2g}"


def _cells(row: GapRow, most_channels: int, changes: bool) -> tuple[str, ...]:
    return (
        "–" if row.gap is None else f"{row.gap:.2g}",
        ", ".join(f"{worst.channel} ({worst.gap:.2g})" for worst in row.worst_channels[:most_channels]),
        *((told_change(row.predicted_loss_change), told_change(row.confirmed_loss_change)) if changes else ()),
    )


class _Writer:
    """Lays the report out within a width."""

    def __init__(self, width: int) -> None:
        self.width = min(max(width, _NARROWEST), _WIDEST)

    def parts(self, report: "AuditReport") -> Iterator[_Part]:
        yield self._wrapped(headline(report)), "bold"
        worst = report.findings[0].severity if report.findings else None
        yield (
            self._wrapped(verdict(report)),
            "bold green" if worst is None and report.batches else _STYLES.get(worst or "", ""),
        )
        for label, line in overview(report):
            yield self._wrapped(line, f"  {label:<5}  "), "bold" if label == "fix" else ""
        for group in grouped(report.findings):
            yield "", ""
            yield from self._told_short(group) if group.worst.severity == "info" else self._told(group)
        if report.losses is not None:
            yield "", ""
            yield from self._losses(report.losses)
        yield "", ""
        yield from self._gaps(report)
        if report.not_looked:
            yield "", ""
            yield "not looked at", "bold"
            for reason, what in reasons(report.not_looked).items():
                yield self._wrapped(f"{', '.join(what)}: {reason}", "  ", 4), "dim"

    def _told(self, group: FindingGroup) -> Iterator[_Part]:
        worst = group.worst
        sign = " in" if len(group.findings) == 1 else ":"
        yield self._wrapped(f"{worst.severity.upper()} {group.rule}{sign} {group.where}"), _STYLES[worst.severity]
        told = worst.message if len(group.findings) == 1 else f"{named(worst.layer)}: {worst.message}"
        yield self._wrapped(told, "  "), ""
        others = [named(found.layer) for found in group.findings[1:]]
        if others:
            yield self._wrapped(listed(others), "  likewise:  "), ""
        if worst.evidence:
            yield self._wrapped(evidence_in_words(worst.evidence.items()), "  evidence:  "), ""
        yield self._wrapped(worst.threshold, "  threshold: "), ""
        for label, fix in zip(
            ("fix:       ", *("or there:  ",) * _MOST_FIXES), group.fixes[:_MOST_FIXES], strict=False
        ):
            yield self._wrapped(fix, f"  {label}"), "bold"
        if len(group.fixes) > _MOST_FIXES:
            yield f"  … and {len(group.fixes) - _MOST_FIXES} more fixes; report.findings has all", ""

    def _told_short(self, group: FindingGroup) -> Iterator[_Part]:
        """Tell in few lines what is only worth knowing."""
        where = listed([named(found.layer) for found in group.findings], 3)
        yield self._wrapped(f"INFO {group.rule} in {where}"), _STYLES["info"]
        yield self._wrapped(group.worst.message, "  "), ""
        yield self._wrapped(group.worst.fix, "  fix:       "), ""

    def _losses(self, losses: "LossReadings") -> Iterator[_Part]:
        yield f"loss on the same {many(losses.batches, f'{losses.source} batch')}, mean [95 % interval]", "bold"
        rows = [
            (name.replace("_", " "), interval_in_words(each.mean, each.low, each.high), READINGS[name])
            for name, each in losses.readings().items()
        ]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        for name, interval, meaning in rows:
            yield self._wrapped(meaning, f"  {name:<{widths[0]}}  {interval:<{widths[1]}}  "), ""
        yield from ((self._wrapped(line, "", 2), "") for line in losses.sentences())

    def _gaps(self, report: "AuditReport") -> Iterator[_Part]:
        with_gap = [row for row in report.layers if row.gap is not None]
        if with_gap:
            shown = with_gap
            if len(with_gap) > _MOST_LAYERS:
                noteworthy = sum(not (row.gap or 0.0) < BOUNDS[0][1] for row in with_gap)
                shown = with_gap[: max(_FEWEST_LAYERS, min(_MOST_LAYERS, noteworthy))]
            title, *drawn = str(gap_table(shown, "gaps along the layers, worst first", self.width)).splitlines()
            yield title, "bold"
            yield "\n".join(drawn), ""
            left = len(with_gap) - len(shown)
            if left:
                yield f"… and {many(left, 'layer')} with smaller gaps; report.layers has all", ""
            yield self._wrapped(GAP), "dim"
            if any(row.predicted_loss_change is not None for row in shown):
                change = "loss change: of the deployed network to first order, if that layer alone were recalibrated."
                yield self._wrapped(change), "dim"
        else:
            yield "gaps: none; no layer's running statistics were compared with data.", ""
        for reason, names in reasons(report.layers).items():
            yield self._wrapped(f"{listed(names)}: {reason}", "", 2), "dim"

    def _wrapped(self, text: str, first: str = "", hanging: int | None = None) -> str:
        """Wrap between words: what is to be typed can be copied, since Python reads over a break within brackets."""
        return textwrap.fill(
            text,
            width=self.width,
            initial_indent=first,
            subsequent_indent=" " * (len(first) if hanging is None else hanging),
            break_long_words=False,
            break_on_hyphens=False,
        )
