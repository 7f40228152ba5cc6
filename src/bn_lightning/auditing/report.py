"""What an audit reports: the layers' gaps, worst first, and the findings with their fixes."""

import json
import math
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from bn_lightning.auditing.finding import SEVERITIES, Finding
from bn_lightning.auditing.reading import LayerReading
from bn_lightning.errors import AuditError
from bn_lightning.reports.table import Table

__all__ = ["AuditReport", "ChannelGap", "GapRow", "gap_row"]

SCHEMA_VERSION = 1
_SHOWN_LAYERS = 25
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
    """

    name: str
    gap: float | None
    worst_channels: tuple[ChannelGap, ...]
    count: int
    reason: str | None

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
        }


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What `audit_batch_norm` found.

    Attributes:
        model: Class name of the network.
        batches: How many training batches were measured.
        layers: One row per selected BN layer, worst first.
        findings: Worst first.
    """

    model: str
    batches: int
    layers: tuple[GapRow, ...]
    findings: tuple[Finding, ...]

    def exit_code(self, fail_on: str = "error") -> int:
        """Return 1 if a finding is at least as severe as ``fail_on`` (``info``, ``warning``, ``error``), else 0.

        Raises:
            AuditError: If ``fail_on`` is none of the three.
        """
        if fail_on not in SEVERITIES:
            raise AuditError(f"fail_on must be one of {', '.join(map(repr, SEVERITIES))}, got {fail_on!r}.")
        bound = SEVERITIES.index(fail_on)
        return int(any(SEVERITIES.index(finding.severity) >= bound for finding in self.findings))

    def to_dict(self) -> dict[str, object]:
        """Return plain values; numbers that are not finite stay floats."""
        return {
            "schema_version": SCHEMA_VERSION,
            "model": self.model,
            "batches": self.batches,
            "layers": [row.to_dict() for row in self.layers],
            "findings": [finding.to_dict() for finding in self.findings],
        }

    def to_json(self, *, indent: int | None = 2) -> str:
        """Return strict JSON; numbers that are not finite become the strings "nan", "inf" and "-inf"."""
        return json.dumps(_strict(self.to_dict()), indent=indent, allow_nan=False, ensure_ascii=False)

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
        return Table(
            f"BatchNorm audit of {self.model}: {_many(len(self.layers), 'layer')}, "
            f"{_many(self.batches, 'training batch')}",
            ("layer", "gap (output std)", "worst channels (gap)", "values per channel", "note"),
            [
                (
                    row.name or "(root)",
                    row.gap,
                    ", ".join(f"{worst.channel} ({worst.gap:.2g})" for worst in row.worst_channels),
                    row.count,
                    row.reason or "",
                )
                for row in self.layers[:shown]
            ],
            notes,
        )

    def _told(self) -> Iterator[str]:
        yield self._verdict()
        # Many layers share a rule and its fix: tell it once, of the worst layer.
        by_rule: dict[str, list[Finding]] = {}
        for found in self.findings:
            by_rule.setdefault(found.rule, []).append(found)
        for rule, (worst, *others) in by_rule.items():
            yield ""
            where = "" if worst.layer is None else f" in {worst.layer!r}"
            yield _wrapped(f"{worst.severity.upper()} {rule}{where}: {worst.message}")
            if others:
                names = ", ".join(f"{found.layer!r} ({found.severity})" for found in others[:4])
                more = f" and {len(others) - 4} more" if len(others) > 4 else ""
                yield _wrapped(f"  likewise: {names}{more}")
            yield "  evidence: " + ", ".join(f"{key}={_short(value)}" for key, value in worst.evidence.items())
            yield f"  threshold: {worst.threshold}"
            yield f"  fix: {worst.fix}"


def gap_row(reading: LayerReading) -> GapRow:
    """Turn a layer's reading into its row."""
    reason = reading.reason
    if reason is None and reading.population.frozen:
        reason = "frozen: it trains on its running statistics too"
    worst: tuple[ChannelGap, ...] = ()
    if reading.channels is not None and reading.gap != 0:
        gaps, weight = reading.channels, reading.layer.weight
        if weight is not None:
            gamma = weight.detach().to(gaps).abs()
            gaps = gaps * gamma / gamma.square().mean().sqrt()
        # A channel of unknown gap is worse than any other.
        order = gaps.nan_to_num(nan=math.inf).argsort(descending=True, stable=True)[:_WORST_CHANNELS].tolist()
        worst = tuple(ChannelGap(channel, float(gaps[channel])) for channel in order)
    return GapRow(reading.name, reading.gap, worst, reading.population.moments.count, reason)


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
