"""Tables of the layers that look worst."""

import math
from collections.abc import Sequence
from statistics import median

from bn_lightning.monitoring.running_snapshot import RunningRow, RunningSnapshot
from bn_lightning.monitoring.snapshot import ActivationSnapshot
from bn_lightning.monitoring.statistics import NEAR_OVERFLOW, LayerStatistics
from bn_lightning.reports.table import Cell, Table

__all__ = ["worst_batch_norms", "worst_layers"]

# Of what a dtype can hold; float32 outputs are at 1e-36, which says nothing.
_NOTEWORTHY = 1e-4


def worst_layers(snapshot: ActivationSnapshot, most: int = 10) -> Table:
    """Return the layers whose outputs look worst, the worst first.

    Nonfinite values come first, in order of execution, since they spread from where they arise. Then come layers with
    dead channels, by their share; outputs beyond half of what their dtype can hold; constant ones; and the others by
    how far their rms is from the median of all layers, as a factor.

    Args:
        snapshot: One sample.
        most: How many layers to show.

    Example:
        >>> import torch
        >>> from bn_lightning.functional.activation import activation_statistics
        >>> outputs = {"fc": torch.eye(4), "relu": torch.zeros(4, 2), "head": torch.tensor([[torch.nan, 1.0]])}
        >>> blocks = {name: activation_statistics(x) for name, x in outputs.items()}
        >>> print(worst_layers(ActivationSnapshot(blocks, {}), most=2))
        activations: the 2 worst of 3 layers
          layer   rms   rms / median   dead %   of dtype %   remark
         ───────────────────────────────────────────────────────────────────────
          head    nan              –        0            –   1 nonfinite values
          relu      0              0      100            –   all zero
        rms / median: by that of the median layer; of dtype %: the largest magnitude, of what the dtype can hold
        1 layer is not shown
    """
    measured = {name: row for name, row in snapshot.rows.items() if row.count}
    sizes = [row.rms for row in measured.values() if _has_size(row)]
    usual = median(sizes) if sizes else math.nan
    # Sorting is stable: ties stay in order of execution.
    order = sorted(measured, key=lambda name: _activation_rank(measured[name], usual))
    rows = [(name, *_activation_cells(measured[name], usual)) for name in order[:most]]
    notes = [
        "rms / median: by that of the median layer; of dtype %: the largest magnitude, of what the dtype can hold",
        *_not_shown(len(order) - len(rows), len(snapshot.rows) - len(measured)),
    ]
    columns = ("layer", "rms", "rms / median", "dead %", "of dtype %", "remark")
    return Table(_title(snapshot.kind, len(rows), len(measured), snapshot.step), columns, rows, notes)


def worst_batch_norms(snapshot: RunningSnapshot, most: int = 10) -> Table:
    """Return the BatchNorm layers whose running statistics look worst, the worst first.

    Those that were nonfinite come first, the earliest before the others; then by drift, noise and predicted share of
    dead channels, in this order, where unknown counts as least.

    Args:
        snapshot: One reading.
        most: How many layers to show.

    Example:
        >>> rows = (RunningRow("bn1", 8, updates=1.0, drift=0.1), RunningRow("bn2", 8, updates=1.0, drift=0.7))
        >>> print(worst_batch_norms(RunningSnapshot(rows, 150, {}, {}), most=1))
        running statistics: the worst of 2 layers at optimizer step 150
          layer   drift   noise   dead %   remark
         ─────────────────────────────────────────
          bn2       0.7       –        –
        1 layer is not shown
    """
    measured = [row for row in snapshot.rows if row.updates is not None]
    order = sorted(measured, key=_running_rank)
    rows = [
        (row.layer, row.drift, row.noise, None if row.dead_share is None else 100 * row.dead_share, row.remark)
        for row in order[:most]
    ]
    notes = _not_shown(len(order) - len(rows), len(snapshot.rows) - len(measured))
    title = _title("running statistics", len(rows), len(measured), snapshot.step)
    return Table(title, ("layer", "drift", "noise", "dead %", "remark"), rows, notes)


def _has_size(row: LayerStatistics) -> bool:
    return math.isfinite(row.rms) and row.rms > 0


def _activation_rank(row: LayerStatistics, usual: float) -> tuple[int, float]:
    if row.nonfinite:
        return 0, 0.0
    if row.dead_channels:
        return 1, -row.dead_channels / row.channels
    if row.saturation > NEAR_OVERFLOW:
        return 2, -row.saturation
    if row.count > 1 and row.std == 0:
        return 3, 0.0
    if row.rms == math.inf:  # its square is more than can be added up
        return 4, -math.inf
    return 4, -abs(math.log2(row.rms / usual)) if _has_size(row) else 0.0


def _activation_cells(row: LayerStatistics, usual: float) -> Sequence[Cell]:
    return (
        row.rms,
        row.rms / usual if math.isfinite(row.rms) and math.isfinite(usual) else None,
        100 * row.dead_channels / row.channels,
        None if math.isnan(row.saturation) else 100 * row.saturation if row.saturation > _NOTEWORTHY else 0.0,
        row.remark,
    )


def _running_rank(row: RunningRow) -> tuple[float, ...]:
    spoiled = row.first_spoiled if row.first_spoiled is not None else 0 if row.nonfinite else math.inf
    return spoiled, *(-(value or 0.0) for value in (row.drift, row.noise, row.dead_share))


def _title(what: str, shown: int, known: int, step: int | None) -> str:
    at = "" if step is None else f" at optimizer step {step}"
    worst = "the worst" if shown == 1 else f"the {shown} worst"
    return f"{what}: {worst} of {known} {'layer' if known == 1 else 'layers'}{at}"


def _not_shown(less_bad: int, unmeasured: int) -> list[str]:
    notes = [f"{less_bad} {'layer is' if less_bad == 1 else 'layers are'} not shown"] if less_bad else []
    if unmeasured:
        notes.append(f"{unmeasured} {'layer has' if unmeasured == 1 else 'layers have'} no values")
    return notes
