"""What became of every BatchNorm layer in a conversion, and the way back."""

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from bn_lightning.errors import ConversionError
from bn_lightning.layers.swap import LayerChange
from bn_lightning.reports.table import Table
from bn_lightning.reports.tabled import Tabled

__all__ = ["EXCLUDED", "ConversionReport", "ConversionRow"]

#: The reason of a layer that include= and exclude= left out.
EXCLUDED = "excluded by pattern"


@dataclass(frozen=True, slots=True)
class ConversionRow:
    """What became of one BatchNorm layer.

    Attributes:
        name: Its qualified name; the first, if it is registered under several.
        before: Name of its class before.
        after: Name of its class after.
        reason: Begins with ``converted``, ``already``, ``excluded`` or ``kept``, and goes on with what there is to say.
    """

    name: str
    before: str
    after: str
    reason: str

    @property
    def changed(self) -> bool:
        """Whether the layer was changed."""
        return self.reason.startswith("converted")


@dataclass(frozen=True, slots=True)
class ConversionReport(Tabled):
    """What `convert_batch_norm` or `revert_batch_norm` did, and the way back.

    Attributes:
        title: One line.
        rows: One for every BatchNorm layer of the model, in registration order.
    """

    title: str
    rows: tuple[ConversionRow, ...]
    _changes: tuple[LayerChange, ...] = field(default=(), repr=False, compare=False)

    def undo(self, *, leave_others: bool = False) -> None:
        """Give every layer back its class, attributes, buffers and ``requires_grad``; again is harmless.

        It is the conversion that is undone, not the training since: parameters and running statistics keep the values
        they have by now. Several conversions are undone in reverse order.

        Args:
            leave_others: Leave layers alone that something else has converted since, instead of refusing.

        Raises:
            ConversionError: If a layer was converted once more; nothing is undone then.
        """
        changed = [row for row in self.rows if row.changed]
        for change, row in zip(self._changes, changed, strict=False):  # a dry run changed nothing
            if not (leave_others or change.undone or change.stands):
                raise ConversionError(
                    f"{row.name or '(root)'!r} is a {type(change.layer).__name__} by now, not the {row.after} that "
                    "this conversion made of it. Undo the later conversion first; nothing was undone."
                )
        for change in reversed(self._changes):
            if change.stands:
                change.undo()

    def concerns(self, model: nn.Module) -> bool:
        """Tell whether layers that it changed are in this model."""
        changed = {id(change.layer) for change in self._changes}
        return any(id(module) in changed for module in model.modules())

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that go into JSON."""
        return {"title": self.title, "rows": [asdict(row) for row in self.rows]}

    def table(self) -> Table:
        """One row a layer."""
        shown = [row for row in self.rows if row.reason != EXCLUDED]
        rest = ", ".join(row.name or "(root)" for row in self.rows if row.reason == EXCLUDED)
        rows = [(row.name or "(root)", row.before, row.after, row.reason) for row in shown]
        notes = (f"{len(self.rows) - len(shown)} not selected: {rest}",) if rest else ()
        return Table(self.title, ("layer", "before", "after", "reason"), rows, notes)
