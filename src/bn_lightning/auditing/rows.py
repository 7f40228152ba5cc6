"""The rows of an audit's report."""

import math
from dataclasses import dataclass

from bn_lightning.auditing.losses import LossChange
from bn_lightning.auditing.reading import LayerReading

__all__ = ["ChannelGap", "GapRow", "NotLooked", "gap_row"]

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
