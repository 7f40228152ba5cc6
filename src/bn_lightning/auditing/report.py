"""What an audit reports: the layers' gaps, worst first, and the findings with their fixes."""

import json
import math
import os
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from bn_lightning.auditing.finding import SEVERITIES, Finding
from bn_lightning.auditing.losses import LossChange, LossReadings
from bn_lightning.auditing.page import page
from bn_lightning.auditing.reading import LayerReading
from bn_lightning.errors import AuditError
from bn_lightning.reports.atomic import atomic_write
from bn_lightning.reports.bars import bar_figure
from bn_lightning.reports.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["AuditReport", "ChannelGap", "GapRow", "NotLooked", "gap_row"]

SCHEMA_VERSION = 2
_SHOWN_LAYERS = 25
_BOUNDS = (("info", 0.1), ("warning", 0.25), ("error", 1.0))
_WORST_CHANNELS = 3


@dataclass(frozen=True, slots=True)
class ChannelGap:
    """One channel and how far its output is off, in standard deviations of the layer's output (its γ counts)."""

    channel: int
    gap: float

    def to_dict(self) -> dict[str, int | float]:
        """Return the fields."""
        return {"channel": self.channel, "gap": self.gap}


@dataclass(frozen=True, slots=True)
class GapRow:
    """How far evaluation's output of one layer is off.

    Attributes:
        name: The layer.
        gap: In standard deviations of the layer's output; nan where statistics are not finite.
        worst_channels: Up to three, worst first; the layer's gap is the root mean square over all channels.
        count: Values per channel that were measured.
        reason: Why there is no gap, or what else to know about the layer, or ``None``.
        predicted_loss_change: Of the deployed network, to first order, if this layer alone were recalibrated;
            ``None`` where no loss was read, or there is none, which ``reason`` then explains.
        confirmed_loss_change: The same by a real swap, for the layers that matter most.
        index: Its place in the network, in registration order.
    """

    name: str
    gap: float | None
    worst_channels: tuple[ChannelGap, ...]
    count: int
    reason: str | None
    predicted_loss_change: float | None = None
    confirmed_loss_change: float | None = None
    index: int = 0

    @property
    def rank(self) -> tuple[int, float]:
        """Sorts worst first: unknown for want of finite numbers, then by gap, then those without one."""
        if self.gap is None:
            return (2, 0.0)
        return (0, 0.0) if math.isnan(self.gap) else (1, -self.gap)

    def to_dict(self) -> dict[str, object]:
        """Return the fields as plain values."""
        return {
            "name": self.name,
            "gap": self.gap,
            "worst_channels": [channel.to_dict() for channel in self.worst_channels],
            "count": self.count,
            "reason": self.reason,
            "predicted_loss_change": self.predicted_loss_change,
            "confirmed_loss_change": self.confirmed_loss_change,
            "index": self.index,
        }


@dataclass(frozen=True, slots=True)
class NotLooked:
    """Something the audit did not look at, a rule or a stage, and why."""

    what: str
    reason: str

    def to_dict(self) -> dict[str, str]:
        """Return the fields."""
        return {"what": self.what, "reason": self.reason}


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What `audit_batch_norm` found.

    Attributes:
        model: Class name of the network.
        batches: How many training batches were measured.
        layers: One row per selected BN layer, worst first.
        findings: Worst first.
        losses: The loss under five readings, or ``None``.
        not_looked: Rules and stages that could not look, each with the reason.
    """

    model: str
    batches: int
    layers: tuple[GapRow, ...]
    findings: tuple[Finding, ...]
    losses: LossReadings | None = None
    not_looked: tuple[NotLooked, ...] = ()
    # Layer to mean and variance (correction=1) over the training data, for `apply_fixes`.
    _population: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    def exit_code(self, fail_on: str = "error") -> int:
        """Return 1 if a finding is at least as severe as ``fail_on`` (``info``, ``warning``, ``error``), else 0.

        Raises:
            AuditError: If ``fail_on`` is none of the three.
        """
        if fail_on not in SEVERITIES:
            raise AuditError(f"fail_on must be one of {', '.join(map(repr, SEVERITIES))}, got {fail_on!r}.")
        bound = SEVERITIES.index(fail_on)
        return int(any(SEVERITIES.index(finding.severity) >= bound for finding in self.findings))

    @property
    def summary(self) -> str:
        """The verdict in a line."""
        return self._verdict()

    def scalars(self) -> dict[str, float]:
        """Give what a logger may take: ``bn/<layer>/gap``, in output std, and ``bn/loss/<reading>``."""
        scalars = {f"bn/{row.name}/gap": row.gap for row in self.layers if row.gap is not None}
        if self.losses is not None:
            scalars |= {f"bn/loss/{name}": reading.mean for name, reading in self.losses.readings().items()}
        return scalars

    def to_dict(self) -> dict[str, object]:
        """Return plain values; numbers that are not finite stay floats."""
        return {
            "schema_version": SCHEMA_VERSION,
            "model": self.model,
            "batches": self.batches,
            "layers": [row.to_dict() for row in self.layers],
            "losses": None if self.losses is None else self.losses.to_dict(),
            "findings": [finding.to_dict() for finding in self.findings],
            "not_looked": [each.to_dict() for each in self.not_looked],
        }

    def to_json(self, *, indent: int | None = 2) -> str:
        """Return strict JSON; numbers that are not finite become the strings "nan", "inf" and "-inf"."""
        return json.dumps(_strict(self.to_dict()), indent=indent, allow_nan=False, ensure_ascii=False)

    def figure(self) -> "Figure":
        """Draw the gaps along the network."""
        rows = sorted(self.layers, key=lambda row: row.index)
        return bar_figure(
            [row.name or "(root)" for row in rows],
            [row.gap for row in rows],
            title=f"{self.model}: {self.summary}",
            ylabel="gap (output std)",
            bounds=_BOUNDS,
        )

    def to_html(self) -> str:
        """Return a page that needs nothing else: no network, no script; the picture of the gaps is inside."""
        compared = any(row.gap is not None for row in self.layers)
        return page(
            f"BatchNorm audit of {self.model}",
            self.summary,
            self._by_rule(),
            self.losses,
            self.figure() if compared else None,
            self._layer_table(len(self.layers))._repr_html_(),
            [(each.what, each.reason) for each in self.not_looked],
        )

    def save_html(self, path: "str | os.PathLike[str]") -> None:
        """Write `to_html` to a file; folders on the way are made."""
        with atomic_write(path) as file:
            file.write(self.to_html().encode())

    def __str__(self) -> str:
        return "\n".join([str(self._layer_table(_SHOWN_LAYERS)), "", *self._told()])

    def _repr_html_(self) -> str:
        findings = Table(
            self._verdict(),
            ("severity", "rule", "layer", "what", "fix"),
            [
                (found.severity, found.rule, found.layer or "(model)", found.message, found.fix)
                for found in self.findings
            ],
        )
        return self._layer_table(len(self.layers))._repr_html_() + findings._repr_html_()

    def _verdict(self) -> str:
        if not self.findings:
            compared = sum(row.gap is not None for row in self.layers)
            if not compared:
                return "no findings, but no layer could be compared with the training data either"
            return f"no findings: the running statistics of {_many(compared, 'layer')} describe the training data"
        counts = [(name, sum(found.severity == name for found in self.findings)) for name in reversed(SEVERITIES)]
        return "findings: " + ", ".join(f"{count} {name}" for name, count in counts if count)

    def _layer_table(self, shown: int) -> Table:
        notes = ["gap: how far evaluation's output is from what the training data's own statistics would give, in its"]
        notes.append("standard deviations; 0.1 is noteworthy, 0.25 a warning, 1 an error.")
        if len(self.layers) > shown:
            notes.insert(
                0, f"… and {len(self.layers) - shown} layers with smaller gaps or none; report.layers has all."
            )
        head: tuple[str, ...] = ()
        if any(row.predicted_loss_change is not None for row in self.layers):
            head = ("loss change predicted", "confirmed")
            notes.append("loss change: of the deployed network, if that layer alone were recalibrated.")
        return Table(
            f"BatchNorm audit of {self.model}: {_many(len(self.layers), 'layer')}, "
            f"{_many(self.batches, 'training batch')}",
            ("layer", "gap (output std)", "worst channels (gap)", "values per channel", *head, "note"),
            [
                (
                    row.name or "(root)",
                    row.gap,
                    ", ".join(f"{worst.channel} ({worst.gap:.2g})" for worst in row.worst_channels),
                    row.count,
                    *_change_cells(row)[: len(head)],
                    row.reason or "",
                )
                for row in self.layers[:shown]
            ],
            notes,
        )

    def _told(self) -> Iterator[str]:
        yield self._verdict()
        if self.losses is not None:
            yield ""
            yield from map(_wrapped, _losses_told(self.losses))
        # Many layers share a rule and its fix: tell it once, of the worst layer.
        for worst, *others in self._by_rule():
            rule = worst.rule
            yield ""
            where = "" if worst.layer is None else f" in {worst.layer!r}"
            yield _wrapped(f"{worst.severity.upper()} {rule}{where}: {worst.message}")
            if others:
                names = ", ".join(f"{found.layer!r} ({found.severity})" for found in others[:4])
                more = f" and {len(others) - 4} more" if len(others) > 4 else ""
                yield _wrapped(f"  likewise: {names}{more}")
            yield "  evidence: " + ", ".join(f"{key}={_short(value)}" for key, value in worst.evidence.items())
            yield _wrapped(f"  threshold: {worst.threshold}")
            yield f"  fix: {worst.fix}"
        if any(found.repair is not None for found in self.findings):
            yield ""
            yield "bn_lightning.apply_fixes(model, report) does what of this is safe, and can be undone."
        if self.not_looked:
            yield ""
            reasons: dict[str, list[str]] = {}
            for each in self.not_looked:
                reasons.setdefault(each.reason, []).append(each.what)
            for reason, what in reasons.items():
                yield _wrapped(f"not looked at: {', '.join(what)} ({reason})")

    def _by_rule(self) -> list[list[Finding]]:
        by_rule: dict[str, list[Finding]] = {}
        for found in self.findings:
            by_rule.setdefault(found.rule, []).append(found)
        return list(by_rule.values())


def _change_cells(row: GapRow) -> tuple[str | None, str | None]:
    changes = (row.predicted_loss_change, row.confirmed_loss_change)
    return tuple(None if each is None else f"{each:+.2g}" for each in changes)  # type: ignore[return-value]


def gap_row(reading: LayerReading, change: LossChange | None = None, index: int = 0) -> GapRow:
    """Turn a layer's reading into its row."""
    reason, population = reading.reason, reading.population
    if reason is None and population is not None and population.frozen:
        reason = "frozen: it trains on its running statistics too"
    if reason is None and change is not None:
        reason = change.reason
    worst: tuple[ChannelGap, ...] = ()
    if reading.channels is not None and reading.gap != 0:
        gaps, weight = reading.channels, reading.layer.weight
        if weight is not None:
            gamma = weight.detach().to(gaps).abs()
            gaps = gaps * gamma / gamma.square().mean().sqrt()
        # A channel of unknown gap is worse than any other.
        order = gaps.nan_to_num(nan=math.inf).argsort(descending=True, stable=True)[:_WORST_CHANNELS].tolist()
        worst = tuple(ChannelGap(channel, float(gaps[channel])) for channel in order)
    return GapRow(
        reading.name,
        reading.gap,
        worst,
        0 if population is None else population.moments.count,
        reason,
        None if change is None else change.predicted,
        None if change is None else change.confirmed,
        index,
    )


def _losses_told(losses: LossReadings) -> Iterator[str]:
    yield f"loss on the same {_many(losses.batches, f'{losses.source} batch')}, mean [95 % interval]:"
    for name, each in losses.readings().items():
        yield f"  {name.replace('_', ' ')}: {each.mean:.4g} [{each.low:.4g}, {each.high:.4g}]"
    yield from (f"  {line}" for line in losses.sentences())


def _strict(value: object) -> object:
    if isinstance(value, dict):
        return {key: _strict(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_strict(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _wrapped(line: str) -> str:
    return textwrap.fill(line, width=110, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


def _many(count: int, noun: str) -> str:
    plural = noun + ("es" if noun.endswith("ch") else "s")
    return f"{count} {noun if count == 1 else plural}"
