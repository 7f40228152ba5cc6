"""The last samples, for when something has gone wrong."""

from collections import deque
from collections.abc import Mapping

from bn_lightning.errors import BatchNormError
from bn_lightning.monitoring.snapshot import ActivationSnapshot
from bn_lightning.monitoring.statistics import LayerStatistics
from bn_lightning.reports.table import Table

__all__ = ["RecentSamples"]


class RecentSamples:
    """The rows of the last samples, without their channels.

    Args:
        most: How many to keep.

    Example:
        >>> import torch
        >>> from bn_lightning.monitoring import observe_activations
        >>> recent = RecentSamples()
        >>> with observe_activations(torch.nn.ReLU()) as activations:
        ...     _ = torch.nn.ReLU()(torch.ones(1))
        >>> recent.append(activations.snapshot())
        >>> len(recent.samples)
        1
    """

    def __init__(self, most: int = 20) -> None:
        self.samples: deque[tuple[int | None, Mapping[str, LayerStatistics]]] = deque(maxlen=most)

    def append(self, snapshot: ActivationSnapshot) -> None:
        """Add a sample; the oldest goes if there are too many."""
        self.samples.append((snapshot.step, snapshot.rows))

    def table(self, layer: str) -> Table:
        """Return one layer's last samples, one a row, the oldest first.

        Raises:
            BatchNormError: If it is in none of them.
        """
        found = [(step, rows[layer]) for step, rows in self.samples if layer in rows]
        if not found:
            raise BatchNormError(f"layer {layer!r} is in none of the last {len(self.samples)} samples.")
        columns = ("step", "mean", "std", "min", "max", "zeros %", "nonfinite", "remark")
        rows = [
            (step, row.mean, row.std, row.min, row.max, 100 * row.zero_fraction, row.nonfinite, row.remark)
            if row.count
            else (step, *[None] * 6, row.remark)
            for step, row in found
        ]
        return Table(f"the last {len(rows)} samples of {layer}", columns, rows)
