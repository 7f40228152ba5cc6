"""What will be folded, what was, and why the rest stays."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bn_lightning.folding.agreement import Agreement
from bn_lightning.folding.reasons import REASONS
from bn_lightning.folding.steps import FoldStep
from bn_lightning.reports.table import Cell, Table
from bn_lightning.reports.tabled import Tabled

__all__ = ["FoldPlan", "FoldReport", "FoldRow"]

# More rows than this that stay for one reason are told by the first few and their number.
_MANY, _FEW = 12, 3
# Of the 127 steps of a symmetric int8 scale fewer than four are left to the smallest channel.
_INT8_SPREAD = 32.0


@dataclass(frozen=True, slots=True)
class FoldRow:
    """What happens to one BatchNorm layer.

    Attributes:
        name: Qualified name of the layer.
        action: ``folded-backward``, ``folded-forward``, ``merged`` (into another BatchNorm layer), ``affine`` (a
            `ChannelAffine` stands in its place) or ``kept``.
        into: Qualified names of the layers it is folded into, with commas between, ``None`` if there are none.
        reason: For a layer that is not folded one of the stable codes in `REASONS`, else empty.
        detail: The same for people, with names and numbers.
        spread_before: Largest channel of the weight over its smallest, by max |w|, before the fold; of the channels
            that are scaled, and of the worst weight where there are several. ``None`` if no weight is written.
        spread_after: The same once everything is folded.
    """

    name: str
    action: str
    into: str | None = None
    reason: str = ""
    detail: str = ""
    spread_before: float | None = None
    spread_after: float | None = None

    @property
    def suffers_in_int8(self) -> bool:
        """Whether one int8 scale for the whole weight leaves its smallest channel fewer than four steps."""
        return self.spread_after is not None and self.spread_after > _INT8_SPREAD


@dataclass(frozen=True, slots=True)
class FoldPlan(Tabled):
    """What `fold_batch_norm` would do.

    Attributes:
        rows: One a BatchNorm layer, in the model's order, then one for each functional batch norm.
        blind_spots: What the recorded forward pass could not see, in words.
    """

    rows: tuple[FoldRow, ...]
    steps: tuple[FoldStep, ...] = field(repr=False)
    blind_spots: tuple[str, ...] = field(default=(), repr=False)

    def table(self) -> Table:
        """One row a BatchNorm layer; many that stay for the same reason are summed up."""
        return _table("fold plan", self.rows, [f"to fold: {_share(self.rows)}", *_int8(self.rows)])

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that go into JSON."""
        return {"rows": [_plain(row) for row in self.rows], "blind_spots": list(self.blind_spots)}


@dataclass(frozen=True, slots=True)
class FoldReport(Tabled):
    """What was folded and how well it was verified.

    Errors are max|Δ| / max|y|, the largest over all floating-point outputs of all example calls.

    Attributes:
        rows: One a BatchNorm layer, in the model's order, then one for each functional batch norm.
        error: Folded against unfolded, both computed in ``verified_in``; 0 if nothing was folded.
        verified_in: ``float64``; the model's own dtype if it cannot run in float64; ``nothing folded``.
        tolerance: The largest ``error`` that was let pass.
        native_dtype: The dtype of the folded weights.
        native_error_before: The unfolded model in its own dtype against itself in float64; ``None`` if unknown.
        native_error_after: The folded model in its own dtype against the unfolded in float64; ``None`` if unknown.
        note: What else there is to know about the verification.
        agreement: Folded against unfolded on the batches that were given; ``None`` if none were.
    """

    rows: tuple[FoldRow, ...]
    error: float
    verified_in: str
    tolerance: float
    native_dtype: str = ""
    native_error_before: float | None = None
    native_error_after: float | None = None
    note: str = ""
    agreement: Agreement | None = None

    @property
    def summary(self) -> str:
        """One line: how many were folded, and the measured errors."""
        parts = [f"folded {_share(self.rows)}"]
        affine = sum(row.action == "affine" for row in self.rows)
        if affine:
            parts.append(f"{affine} left as scale and shift")
        if self.verified_in in ("float64", self.native_dtype):
            parts.append(f"{self.verified_in} error {self.error:.1e} (allowed {self.tolerance:.1e})")
        if self.native_error_before is not None and self.native_error_after is not None:
            parts.append(
                f"in {self.native_dtype} {self.native_error_after:.1e} from the exact output, "
                f"unfolded {self.native_error_before:.1e}"
            )
        return "; ".join(parts)

    def table(self) -> Table:
        """One row a BatchNorm layer, the summary below; many that stay for the same reason are summed up."""
        agreement = [str(self.agreement)] if self.agreement else []
        notes = [self.summary, *agreement, *_int8(self.rows), *filter(None, [self.note])]
        return _table("folded batch norms", self.rows, notes)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that go into JSON."""
        return {**asdict(self), "rows": [_plain(row) for row in self.rows]}


def _share(rows: Sequence[FoldRow]) -> str:
    return f"{sum(row.action not in ('kept', 'affine') for row in rows)} of {len(rows)}"


def _plain(row: FoldRow) -> dict[str, Any]:
    return {**asdict(row), "suffers_in_int8": row.suffers_in_int8}


def _int8(rows: Sequence[FoldRow]) -> list[str]:
    """Name the layers for which one int8 scale for the whole weight is too coarse."""
    suffering = sorted((row for row in rows if row.suffers_in_int8), key=lambda row: -(row.spread_after or 0.0))
    if not suffering:
        return []
    worst = suffering[0]
    many = "1 weight spreads" if len(suffering) == 1 else f"{len(suffering)} weights spread"
    return [
        f"int8: once folded {many} more than {_INT8_SPREAD:.0f}-fold over channels, most of all that of {worst.into} "
        f"({worst.spread_before:.3g} → {worst.spread_after:.3g}); quantize per channel, not per tensor"
    ]


def _table(title: str, rows: Sequence[FoldRow], notes: Sequence[str]) -> Table:
    groups: dict[str, list[FoldRow]] = {}
    for row in rows:
        groups.setdefault(row.reason, []).append(row)
    many = {reason: group for reason, group in groups.items() if reason and len(group) > _MANY}
    shown: list[tuple[Cell, ...]] = []
    for row in rows:
        group = many.get(row.reason, [row])
        if row in group[:_FEW]:
            why = f"{row.reason}: {row.detail}" if row.reason else None
            shown.append((row.name or "(root)", row.action, row.into, _spread(row), why))
        if row is group[min(_FEW, len(group)) - 1] and len(group) > _FEW:
            shown.append(_summed_up(group[_FEW:]))
    return Table(title, ("layer", "action", "into", "weight spread", "why it stays"), shown, notes)


def _summed_up(rows: Sequence[FoldRow]) -> tuple[Cell, ...]:
    details = {row.detail for row in rows}
    why = details.pop() if len(details) == 1 else REASONS[rows[0].reason]
    return f"… and {len(rows)} more", rows[0].action, None, None, f"{rows[0].reason}: {why}"


def _spread(row: FoldRow) -> str | None:
    if row.spread_before is None or row.spread_after is None:
        return None
    return f"{row.spread_before:.3g} → {row.spread_after:.3g}{' (int8!)' if row.suffers_in_int8 else ''}"
