"""The audit's pictures: the gaps along the network, and the loss read in different ways."""

from typing import TYPE_CHECKING

from bn_lightning.auditing.losses import LossReadings
from bn_lightning.auditing.words import BOUNDS, many, verdict
from bn_lightning.reports.bars import bar_figure
from bn_lightning.reports.intervals import interval_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bn_lightning.auditing.report import AuditReport

__all__ = ["gap_figure", "loss_figure"]


def gap_figure(report: "AuditReport") -> "Figure":
    """Draw each layer's gap as a bar, from the network's first layer to its last."""
    rows = sorted(report.layers, key=lambda row: row.index)
    return bar_figure(
        [row.name or "(root)" for row in rows],
        [row.gap for row in rows],
        title=f"{report.model}: {verdict(report)}",
        ylabel="gap (output std)",
        bounds=BOUNDS,
    )


def loss_figure(losses: LossReadings) -> "Figure":
    """Draw the readings of the loss with their intervals."""
    return interval_figure(
        [(name.replace("_", " "), each.mean, each.low, each.high) for name, each in losses.readings().items()],
        title=f"loss on the same {many(losses.batches, f'{losses.source} batch')}, with 95 % intervals",
    )
