"""What an audit reports, as plain values and in every form that a person or a program reads."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from bn_lightning.auditing.finding import SEVERITIES, Finding
from bn_lightning.auditing.losses import LossReadings
from bn_lightning.auditing.rows import ChannelGap, GapRow, NotLooked, gap_row
from bn_lightning.auditing.words import verdict
from bn_lightning.errors import AuditError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

__all__ = ["AuditReport", "ChannelGap", "GapRow", "NotLooked", "gap_row"]

SCHEMA_VERSION = 2


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

    Example:
        >>> finding = Finding("momentum-zero", "error", "bn1", "it never moves", {"momentum": 0.0}, "0", "momentum=0.1")
        >>> report = AuditReport("Net", 8, (GapRow("bn1", 1.5, (), 512, None),), (finding,))
        >>> report.exit_code(), report.exit_code("warning")
        (1, 1)
        >>> print(report)  # doctest: +ELLIPSIS
        BatchNorm audit of Net: 1 layer, 8 training batches
        findings: 1 error
          what   momentum-zero in 'bn1'
          where  largest gap in 'bn1': 1.5 output standard deviations
          fix    momentum=0.1
        ...
    """

    model: str
    batches: int
    layers: tuple[GapRow, ...]
    findings: tuple[Finding, ...]
    losses: LossReadings | None = None
    not_looked: tuple[NotLooked, ...] = ()
    # Layer to mean and variance (correction=1) over the training data, for `apply_fixes`.
    _population: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False, compare=False)
    # Checksums of the weights it was measured under.
    _weights: Mapping[str, int] = field(default_factory=dict, repr=False, compare=False)

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
        return verdict(self)

    def scalars(self) -> dict[str, float]:
        """Give what a logger may take: ``bn/<layer>/gap``, in output std, and ``bn/loss/<reading>``."""
        scalars = {f"bn/{row.name}/gap": row.gap for row in self.layers if row.gap is not None}
        if self.losses is not None:
            scalars |= {f"bn/loss/{name}": reading.mean for name, reading in self.losses.readings().items()}
        return scalars

    def to_dict(self) -> dict[str, object]:
        """Return plain values, see `to_json`; numbers that are not finite stay floats."""
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
        """Return strict JSON; numbers that are not finite become the strings "nan", "inf" and "-inf".

        ``schema_version`` (an integer) rises with every change by which a reader of the present fields could be misled,
        and when a field goes. Version 2 has, with ``?`` for what may be null and ``number`` for a number or one of the
        three strings::

            schema_version, model: string, batches: integer
            layers[]       name: string, gap: number?, worst_channels[] (channel: integer, gap: number),
                           count: integer, reason: string?, predicted_loss_change: number?,
                           confirmed_loss_change: number?, index: integer
                           worst first; index counts along the network
            losses?        source: "training" or "evaluation", batches: integer,
                           full_training, batch_statistics, recalibrated, deployed, evaluation_statistics?:
                           (mean, low, high: number),
                           differences[] (name, higher, lower: string, mean, low, high: number, evident: boolean)
            findings[]     rule: string, severity: "info", "warning" or "error", layer: string?, message: string,
                           evidence: by name, string, number, boolean or null, threshold: string, fix: string,
                           applicable: boolean                      worst first
            not_looked[]   what: string, reason: string

        Units are those of `GapRow`, `LossReadings` and `Finding`.
        """
        return json.dumps(_strict(self.to_dict()), indent=indent, allow_nan=False, ensure_ascii=False)

    def to_markdown(self) -> str:
        """Return a short report in GitHub's Markdown, which TensorBoard's text tab shows; every name is escaped."""
        from bn_lightning.auditing.markdown import to_markdown

        return to_markdown(self)

    def to_html(self) -> str:
        """Return a page that needs nothing else: no network, no script; every name and message is escaped."""
        from bn_lightning.auditing.page import to_page

        return to_page(self)

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Write `to_html` to a file; a reader sees the old file or the whole new one. Missing folders are made."""
        from bn_lightning.reports.atomic import atomic_write

        page = self.to_html()
        with atomic_write(path) as file:
            file.write(page.encode())

    def figure(self) -> "Figure":
        """Draw the gaps along the network, coloured by severity."""
        from bn_lightning.auditing.pictures import gap_figure

        return gap_figure(self)

    def print(self, console: "Console | None" = None) -> None:
        """Print to the terminal, in colours and within its width; as plain text where there is no terminal.

        Args:
            console: Where to; by default standard output.
        """
        from bn_lightning.auditing.console import print_report

        print_report(self, console)

    def __str__(self) -> str:
        from bn_lightning.auditing.console import to_text

        return to_text(self)

    def _repr_html_(self) -> str:
        from bn_lightning.auditing.page import to_fragment

        return to_fragment(self)


def _strict(value: object) -> object:
    if isinstance(value, dict):
        return {key: _strict(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_strict(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
