"""What will be folded, what was, and why the rest stays."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bn_lightning.reports.table import Cell, Table

__all__ = ["REASONS", "FoldPair", "FoldPlan", "FoldReport", "FoldRow"]

# The codes are stable: scripts may rely on them. A row's `detail` says it with names.
REASONS = {
    "training": "the layer is in training mode",
    "no_stats": "it has no running statistics",
    "not_reached": "no example call reaches it",
    "reused": "the layer or its producer is used in more than one way",
    "tied": "a tensor of the pair is shared with something else",
    "multi_user": "what it normalizes is also read by something else",
    "escaped": "what it normalizes outlives the forward pass",
    "opaque": "code that cannot be recorded reads a tensor of the pair",
    "output": "the model returns what it normalizes",
    "hook": "a hook sees values that folding would change",
    "parametrized": "a weight is computed, not a parameter of the model",
    "subclass": "a class whose own forward is not known to be foldable",
    "functional": "the statistics are used by a call outside a BatchNorm layer",
    "axis_mismatch": "it normalizes another axis than the producer's channels",
    "nonlinear_between": "what feeds it is not a convolution or linear layer",
    "excluded": "left out by include= or exclude=",
    "nonfinite": "its statistics or weights are not finite",
    "overflow": "the folded weights leave the range of their dtype",
    "unverified": "with it folded the outputs differed",
}


# More rows than this that stay for one reason are told by the first few and their number.
_MANY, _FEW = 12, 3


@dataclass(frozen=True, slots=True)
class FoldRow:
    """What happens to one BatchNorm layer.

    Attributes:
        name: Qualified name of the layer.
        action: ``folded-backward`` or ``kept``.
        into: Qualified name of the layer it is folded into, ``None`` if it is kept.
        reason: For a kept layer one of the stable codes in `REASONS`, else empty.
        detail: The same for people, with names and numbers.
    """

    name: str
    action: str
    into: str | None = None
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class FoldPair:
    """A BatchNorm layer and the layer that takes it up.

    Attributes:
        batch_norm: Qualified name of the BatchNorm layer.
        producer: Qualified name of the module that owns the weight.
        weight: Qualified name of the weight.
        bias: Qualified name of the bias, which is made if it is ``None`` now.
        kind: ``conv, conv_transpose`` or ``linear``.
        groups: Of the convolution, else 1.
        called: Whether calling the producer returns the very value that is normalized; a module that owns the
            weight and does more with it, like one that calls the BatchNorm layer itself, does not.
    """

    batch_norm: str
    producer: str
    weight: str
    bias: str
    kind: str
    groups: int
    called: bool = True


@dataclass(frozen=True, slots=True)
class FoldPlan:
    """What `fold_batch_norm` would do.

    Attributes:
        rows: One a BatchNorm layer, in the model's order, then one for each functional batch norm.
    """

    rows: tuple[FoldRow, ...]
    pairs: tuple[FoldPair, ...] = field(repr=False)

    def table(self) -> Table:
        """One row a BatchNorm layer; many that stay for the same reason are summed up."""
        return _table("fold plan", self.rows, [f"to fold: {_share(self.rows)}"])

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that go into JSON."""
        return {"rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


@dataclass(frozen=True, slots=True)
class FoldReport:
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
    """

    rows: tuple[FoldRow, ...]
    error: float
    verified_in: str
    tolerance: float
    native_dtype: str = ""
    native_error_before: float | None = None
    native_error_after: float | None = None
    note: str = ""

    @property
    def summary(self) -> str:
        """One line: how many were folded, and the measured errors."""
        parts = [f"folded {_share(self.rows)}"]
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
        return _table("folded batch norms", self.rows, [self.summary, *filter(None, [self.note])])

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that go into JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def _share(rows: Sequence[FoldRow]) -> str:
    return f"{sum(row.action != 'kept' for row in rows)} of {len(rows)}"


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
            shown.append((row.name or "(root)", row.action, row.into, why))
        if row is group[min(_FEW, len(group)) - 1] and len(group) > _FEW:
            shown.append(_summed_up(group[_FEW:]))
    return Table(title, ("layer", "action", "into", "why it stays"), shown, notes)


def _summed_up(rows: Sequence[FoldRow]) -> tuple[Cell, ...]:
    details = {row.detail for row in rows}
    why = details.pop() if len(details) == 1 else REASONS[rows[0].reason]
    return f"… and {len(rows)} more", rows[0].action, None, f"{rows[0].reason}: {why}"
