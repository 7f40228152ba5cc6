"""The audit as a page that needs nothing else, and as what a notebook shows."""

import html
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from bn_lightning.auditing.console import told_change
from bn_lightning.auditing.pictures import gap_figure, loss_figure
from bn_lightning.auditing.words import (
    GAP,
    READINGS,
    FindingGroup,
    evidence_in_words,
    grouped,
    headline,
    named,
    overview,
    reasons,
    verdict,
)
from bn_lightning.reports.document import document, fragment, picture, table
from bn_lightning.reports.intervals import interval_in_words

if TYPE_CHECKING:
    from bn_lightning.auditing.losses import LossReadings
    from bn_lightning.auditing.report import AuditReport

__all__ = ["to_fragment", "to_page"]


def to_page(report: "AuditReport") -> str:
    """Write the whole page."""
    return document(f"BatchNorm audit of {report.model}", _body(report))


def to_fragment(report: "AuditReport") -> str:
    """Write what a notebook shows."""
    return fragment(_body(report))


def _body(report: "AuditReport") -> str:
    return "".join(_parts(report))


def _parts(report: "AuditReport") -> Iterator[str]:
    yield f"<h1>{html.escape(headline(report))}</h1>"
    yield from _verdict(report)
    if any(row.gap is not None for row in report.layers):
        yield "<h2>Gaps along the network</h2>"
        yield picture(gap_figure(report), "gap of each layer, from the first to the last")
        yield f'<p class="small">{html.escape(GAP[0].upper() + GAP[1:])}</p>'
    if report.findings:
        yield "<h2>What was found, and what to do</h2>"
        yield from map(_group, grouped(report.findings))
    if report.losses is not None:
        yield "<h2>The loss, read in different ways</h2>"
        yield from _losses(report.losses)
    yield from _layers(report)
    if report.not_looked:
        yield "<h2>Not looked at</h2>"
        rows = [(", ".join(what), reason) for reason, what in reasons(report.not_looked).items()]
        yield table(("what", "why"), rows)


def _verdict(report: "AuditReport") -> Iterator[str]:
    severity = report.findings[0].severity if report.findings else "fine" if report.batches else ""
    yield f'<section class="card {severity}"><p><strong>{html.escape(verdict(report))}</strong></p>'
    for label, line in overview(report):
        told = html.escape(line)
        yield f"<p>{label}:</p><pre>{told}</pre>" if label == "fix" else f"<p>{label}{': ' if label else ''}{told}</p>"
    yield "</section>"


def _group(group: FindingGroup) -> str:
    worst = group.worst
    sign = " in" if len(group.findings) == 1 else ":"
    message = worst.message if len(group.findings) == 1 else f"{named(worst.layer)}: {worst.message}"
    evidence = evidence_in_words(worst.evidence.items())
    others = ""
    if len(group.findings) > 1:
        rows = [
            (found.severity, named(found.layer), evidence_in_words(found.evidence.items())) for found in group.findings
        ]
        others = (
            f'<details class="small"><summary>all {len(rows)}, with their evidence</summary>'
            + table(("severity", "layer", "evidence"), rows)
            + "</details>"
        )
    return (
        f'<section class="card {worst.severity}">'
        f"<h3>{worst.severity.upper()} {html.escape(group.rule)}{sign} {html.escape(group.where)}</h3>"
        f"<p>{html.escape(message)}</p>"
        + "".join(f"<pre>{html.escape(fix)}</pre>" for fix in group.fixes)
        + '<p class="small">'
        + (f"evidence: {html.escape(evidence)}<br>" if evidence else "")
        + f"threshold: {html.escape(worst.threshold)}</p>{others}</section>"
    )


def _losses(losses: "LossReadings") -> Iterator[str]:
    yield picture(loss_figure(losses), "mean loss of each reading with its interval")
    rows = [
        (name.replace("_", " "), interval_in_words(each.mean, each.low, each.high), READINGS[name])
        for name, each in losses.readings().items()
    ]
    yield table(("reading", "mean [95 % interval]", "which is"), rows)
    yield "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in losses.sentences()) + "</ul>"


def _layers(report: "AuditReport") -> Iterator[str]:
    yield "<h2>Every layer, in the order of the network</h2>"
    changes = any(row.predicted_loss_change is not None for row in report.layers)
    head = ("layer", "gap", "worst channels (gap)", "values per channel")
    rows = []
    for row in sorted(report.layers, key=lambda row: row.index):
        gap = "–" if row.gap is None else "nan" if math.isnan(row.gap) else f"{row.gap:.2g}"
        worst = ", ".join(f"{each.channel} ({each.gap:.2g})" for each in row.worst_channels)
        told = (told_change(row.predicted_loss_change), told_change(row.confirmed_loss_change)) if changes else ()
        rows.append((row.name or "(root)", gap, worst, str(row.count), *told))
    more = ("loss change predicted", "confirmed") if changes else ()
    yield table((*head, *more), rows, numbers=(1, 3, 4, 5))
    if changes:
        yield '<p class="small">Loss change: of the deployed network, if that layer alone were recalibrated.</p>'
    notes = [(reason, ", ".join(names)) for reason, names in reasons(report.layers).items()]
    if notes:
        yield table(("note", "layers"), notes)
