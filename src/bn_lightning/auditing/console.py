"""An audit's report for a terminal and a log file: the verdict first, what to type, then the numbers."""

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

from bn_lightning.auditing.rows import GapRow
from bn_lightning.auditing.words import (
    APPLY,
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
    next_step,
    reasons,
    verdict,
    worst_gap,
)
from bn_lightning.reports.shortened import shortened
from bn_lightning.reports.table import Table

if TYPE_CHECKING:
    from rich.console import Console

    from bn_lightning.auditing.losses import LossReadings
    from bn_lightning.auditing.report import AuditReport

__all__ = ["print_report", "to_text", "told_change"]

_WIDTH = 110
_NARROWEST_NAME = 16
# Healthy layers are not worth a page; a few show that they were looked at.
_MOST_LAYERS, _FEWEST_LAYERS = 20, 5
_MOST_FIXES = 3
_STYLES = {"error": "bold red", "warning": "bold yellow", "info": "bold blue"}
# A part: a table, or a line and its style in a terminal.
_Part = Table | tuple[str, str]


def to_text(report: "AuditReport") -> str:
    """Write the report as plain text of at most 110 columns, what a person is to type excepted."""
    parts = _parts(report)
    return "\n".join(str(part) if isinstance(part, Table) else part[0] for part in parts)


def print_report(report: "AuditReport", console: "Console | None" = None) -> None:
    """Print the report; see `AuditReport.print`."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    if console.is_terminal:
        for part in _parts(report):
            if isinstance(part, Table):
                part.print(console)
            else:
                console.print(Text(*part), soft_wrap=True)
        return
    # A file that has no Greek letters is no reason to end a run.
    encoding = console.encoding or "utf-8"
    console.file.write(f"{to_text(report)}\n".encode(encoding, "replace").decode(encoding))


def _parts(report: "AuditReport") -> Iterator[_Part]:
    yield headline(report), "bold"
    worst = report.findings[0].severity if report.findings else None
    yield verdict(report), "bold green" if worst is None and report.batches else _STYLES.get(worst or "", "")
    gap = worst_gap(report)
    if gap is not None:
        yield gap, ""
    if report.losses is not None:
        told = zip(report.losses.differences, report.losses.sentences(), strict=True)
        yield from ((_wrapped(line), "") for difference, line in told if difference.is_evident)
    for group in grouped(report.findings):
        yield "", ""
        yield from _told_short(group) if group.worst.severity == "info" else _told(group)
    step = next_step(report)
    if step is not None:
        yield "", ""
        yield f"next: {APPLY}", "bold"
        yield _wrapped(step, 6), ""
    if report.losses is not None:
        yield "", ""
        yield from _losses(report.losses)
    yield "", ""
    yield from _gaps(report)
    if report.not_looked:
        yield "", ""
        yield "not looked at", "bold"
        for reason, what in reasons(report.not_looked).items():
            yield _wrapped(f"{', '.join(what)}: {reason}", 2, 4), "dim"


def _told(group: FindingGroup) -> Iterator[_Part]:
    worst = group.worst
    sign = " in" if len(group.findings) == 1 else ":"
    yield _wrapped(f"{worst.severity.upper()} {group.rule}{sign} {group.where}"), _STYLES[worst.severity]
    told = worst.message if len(group.findings) == 1 else f"{named(worst.layer)}: {worst.message}"
    yield _wrapped(told, 2), ""
    others = [named(found.layer) for found in group.findings[1:]]
    if others:
        yield _wrapped(f"likewise:  {listed(others)}", 2, 13), ""
    if worst.evidence:
        yield _wrapped(f"evidence:  {evidence_in_words(worst.evidence.items())}", 2, 13), ""
    yield _wrapped(f"threshold: {worst.threshold}", 2, 13), ""
    # Not wrapped: it is there to be copied.
    for label, fix in zip(("fix:       ", *("or there:  ",) * _MOST_FIXES), group.fixes[:_MOST_FIXES], strict=False):
        yield f"  {label}{fix}", "bold"
    if len(group.fixes) > _MOST_FIXES:
        yield f"  … and {len(group.fixes) - _MOST_FIXES} more fixes; report.findings has all", ""


def _told_short(group: FindingGroup) -> Iterator[_Part]:
    """Tell in one line what is only worth knowing."""
    names = listed([named(found.layer) for found in group.findings], 3)
    message = group.worst.message.rstrip(".")
    yield _wrapped(f"INFO {group.rule}: {names}: {message}. Fix: {group.worst.fix}", 0, 2), _STYLES["info"]


def _losses(losses: "LossReadings") -> Iterator[_Part]:
    batches = many(losses.batches, f"{losses.source} batch")
    yield (
        Table(
            f"loss on the same {batches}, read in different ways",
            ("reading", "mean", "95 % interval", "which is"),
            [
                (name.replace("_", " "), f"{each.mean:.4g}", f"{each.low:.4g} to {each.high:.4g}", READINGS[name])
                for name, each in losses.readings().items()
            ],
        )
    )
    yield from ((_wrapped(line), "") for line in losses.sentences())


def _gaps(report: "AuditReport") -> Iterator[_Part]:
    with_gap = [row for row in report.layers if row.gap is not None]
    if with_gap:
        noteworthy = sum(not (row.gap or 0.0) < BOUNDS[0][1] for row in with_gap)
        shown = with_gap[: max(_FEWEST_LAYERS, min(_MOST_LAYERS, noteworthy))]
        notes = textwrap.wrap(GAP, _WIDTH)
        if any(row.predicted_loss_change is not None for row in report.layers):
            notes.append("loss change: of the deployed network to first order, if that layer alone were recalibrated.")
        left = len(with_gap) - len(shown)
        if left:
            notes.insert(0, f"… and {many(left, 'layer')} with smaller gaps; report.layers has all.")
        yield gap_table(shown, "gaps along the layers, worst first")
    else:
        notes = ["gaps: none; no layer's running statistics were compared with data."]
    yield from ((note, "dim") for note in notes)
    for reason, names in reasons(report.layers).items():
        yield _wrapped(f"{listed(names)}: {reason}", 0, 2), "dim"


def gap_table(rows: "list[GapRow]", title: str) -> Table:
    """Make a table of rows that fits 110 columns, names shortened if need be."""
    changes = any(row.predicted_loss_change is not None for row in rows)
    head = ("gap", "worst channels (gap)", *(("loss change", "confirmed") if changes else ()))
    cells = [
        (
            "nan" if row.gap is None or row.gap != row.gap else f"{row.gap:.2g}",
            ", ".join(f"{worst.channel} ({worst.gap:.2g})" for worst in row.worst_channels),
            *((told_change(row.predicted_loss_change), told_change(row.confirmed_loss_change)) if changes else ()),
        )
        for row in rows
    ]
    taken = sum(max(len(cell) for cell in column) + 3 for column in zip(head, *cells, strict=True))
    longest = max(_NARROWEST_NAME, _WIDTH - taken - 3)
    names = [shortened(row.name or "(root)", longest) for row in rows]
    return Table(title, ("layer", *head), [(name, *row) for name, row in zip(names, cells, strict=True)])


def told_change(change: float | None) -> str:
    """Write a change with its sign."""
    return "–" if change is None else f"{change:+.2g}"


def _wrapped(line: str, indent: int = 0, hanging: int | None = None) -> str:
    return textwrap.fill(
        line,
        width=_WIDTH,
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent if hanging is None else hanging),
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
    )
