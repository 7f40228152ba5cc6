"""One sample of every watched layer, read."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bn_lightning.errors import BatchNormError
from bn_lightning.functional.activation import Row
from bn_lightning.monitoring.statistics import ChannelStatistics, LayerStatistics
from bn_lightning.reports.table import Table
from bn_lightning.reports.tabled import Tabled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["NOT_CALLED", "ActivationSnapshot"]

NOT_CALLED = "not called"
"""The reason of a layer that did not run during the sample."""

_COLUMNS = ("layer", "mean", "std", "min", "max", "zeros %", "values", "remark")


@dataclass(frozen=True)
class ActivationSnapshot(Tabled):
    """The statistics of each layer's output over one sample, layers in order of execution.

    Attributes:
        blocks: Layer to its channels' statistics, (7, C) on the CPU, rows as in `functional.activation.Row`.
        reasons: Layer to why nothing, or not everything, of it was measured.
        absent: The layers that were not called.
        step: Optimizer step of the sample; ``None`` where there is no such thing.
        limits: Layer to the largest finite value of its output's dtype, the smallest one if it had several.
        kind: What was measured: ``"activations"``, or ``"gradients"``, those that flow back into the outputs.
        kinds: Layer to the name of its class, as far as known.
        gradients: The gradients of the same sample, if they were asked for.
        histograms: Layer to its values' counts, (512,) as in `log2_histogram`, if they were asked for.
    """

    blocks: Mapping[str, Tensor]
    reasons: Mapping[str, str]
    absent: frozenset[str] = frozenset()
    step: int | None = None
    limits: Mapping[str, float] = field(default_factory=dict)
    kind: str = "activations"
    kinds: Mapping[str, str] = field(default_factory=dict)
    gradients: "ActivationSnapshot | None" = None
    histograms: Mapping[str, Tensor] = field(default_factory=dict)

    @cached_property
    def rows(self) -> Mapping[str, LayerStatistics]:
        """The layers' pooled statistics by name."""
        widths = [block.shape[1] for block in self.blocks.values()]
        together = torch.cat(list(self.blocks.values()), dim=1) if widths else torch.empty(len(Row), 0, device="cpu")
        reasons = [self.reasons.get(name, "") for name in self.blocks]
        limits = [self.limits.get(name, math.nan) for name in self.blocks]
        return dict(zip(self.blocks, LayerStatistics.of_layers(together, widths, reasons, limits), strict=True))

    def layers(self) -> Iterator[tuple[str, LayerStatistics]]:
        """Go through the layers' names and pooled statistics."""
        yield from self.rows.items()

    def to_dict(self) -> dict[str, dict[str, int | float | str]]:
        """Return the fields of `LayerStatistics` by layer, without channels."""
        return {name: row.to_dict() for name, row in self.layers()}

    def channels(self, layer: str) -> ChannelStatistics:
        """Return one layer channel by channel.

        A module called with several channel counts has them one after the other, in order of first appearance.

        Raises:
            BatchNormError: If the layer is not watched.
        """
        if layer not in self.blocks:
            known = ", ".join(repr(name) for name in list(self.blocks)[:5])
            raise BatchNormError(
                f"layer {layer!r} is not among the {len(self.blocks)} watched layers, which begin with {known}. "
                "Name one of those, or widen include=."
            )
        return ChannelStatistics.of(self.blocks[layer])

    def totals(self) -> dict[str, float]:
        """Return what sums the whole network up.

        These are ``nonfinite`` values, ``dead_channels``, ``max_abs``, the largest magnitude, which is NaN if any layer
        put out a NaN, and ``saturation``, the largest of any layer, where one is known.
        """
        rows = [row for row in self.rows.values() if row.count]
        totals = {
            "nonfinite": float(sum(row.nonfinite for row in rows)),
            "dead_channels": float(sum(row.dead_channels for row in rows)),
            "max_abs": _largest([abs(value) for row in rows for value in (row.min, row.max)]),
        }
        known = [row.saturation for row in rows if not math.isnan(row.saturation)]
        return {**totals, "saturation": max(known)} if known else totals

    def table(self, *, none_called: str = "no layer was called in this sample") -> Table:
        """Return one row a layer, in order of execution; no rows if no layer was called.

        Args:
            none_called: What to say in that case.
        """
        at = "" if self.step is None else f" at optimizer step {self.step}"
        title = f"{self.kind} of {len(self.blocks)} {'layer' if len(self.blocks) == 1 else 'layers'}{at}"
        if self.absent.issuperset(self.blocks):
            why = list(dict.fromkeys(self.reasons.values())) or ["there is no layer to watch"]
            return Table(f"{title}, none called", _COLUMNS, [], [none_called] if why == [NOT_CALLED] else why)
        called = f", {len(self.blocks) - len(self.absent)} called" if self.absent else ""
        rows = [(name, *_numbers(row), row.count, row.remark) for name, row in self.layers()]
        remarked = sum(bool(row[-1]) for row in rows)
        notes = ["zeros %: values that are exactly 0; std over all values of the layer, correction=0"]
        if remarked:
            notes.append(f"layers with a remark: {remarked} of {len(rows)}")
        return Table(f"{title}{called}, in order of execution", _COLUMNS, rows, notes)

    def figure(self, stat: str = "std") -> "Figure":
        """Draw a statistic of every channel: one row a layer, its channels sorted from smallest to largest.

        Args:
            stat: A field of `ChannelStatistics`: mean, std, min, max, rms or zero_fraction.

        Raises:
            BatchNormError: If there is no such statistic, or nothing was measured.
        """
        from bn_lightning.monitoring.pictures import channel_map

        return channel_map(self, stat)


def _largest(values: Sequence[float]) -> float:
    return max(values) if values and not any(map(math.isnan, values)) else math.nan


def _numbers(row: LayerStatistics) -> tuple[float | None, ...]:
    if not row.count:
        return (None,) * 5
    return row.mean, row.std, row.min, row.max, 100 * row.zero_fraction
