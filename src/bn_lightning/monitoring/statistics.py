"""What one sample says about a layer and about its channels, as plain values."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from bn_lightning.functional.activation import Row, pool_statistics

__all__ = ["ChannelStatistics", "LayerStatistics"]


@dataclass(frozen=True, slots=True)
class LayerStatistics:
    """All values of one layer's output, pooled over its channels by Chan's formula.

    Attributes:
        count: Values seen.
        mean: Activation units; NaN where there are no values, as are all fractions and units below.
        std: Activation units, ``correction=0``, over all values: the spread between channels is in it.
        min: Activation units.
        max: Activation units.
        rms: √(mean² + std²), activation units.
        zero_fraction: Share of values that are exactly 0.
        nonfinite: How many values are NaN or infinite.
        dead_channels: How many channels were exactly 0 throughout the sample.
        channels: How many channels there are.
        reason: Why nothing, or not everything, was measured; empty otherwise.
    """

    count: int
    mean: float
    std: float
    min: float
    max: float
    rms: float
    zero_fraction: float
    nonfinite: int
    dead_channels: int
    channels: int = 0
    reason: str = ""

    @classmethod
    def pooled(cls, block: Tensor, reason: str = "") -> "LayerStatistics":
        """Pool the statistics of channels, (7, C).

        Example:
            >>> from bn_lightning.functional.activation import activation_statistics
            >>> row = LayerStatistics.pooled(activation_statistics(torch.tensor([[0.0, 2.0], [0.0, 4.0]])))
            >>> row.mean, row.zero_fraction, row.dead_channels
            (1.5, 0.5, 1)
        """
        channels = ChannelStatistics.of(block)
        whole = ChannelStatistics.of(pool_statistics(block)[:, None])
        return cls(
            count=int(whole.count),
            mean=float(whole.mean),
            std=float(whole.std),
            min=float(whole.min),
            max=float(whole.max),
            rms=float(whole.rms),
            zero_fraction=float(whole.zero_fraction),
            nonfinite=int(whole.nonfinite),
            dead_channels=int(channels.dead.sum()),
            channels=block.shape[1],
            reason=reason,
        )

    def to_dict(self) -> dict[str, int | float | str]:
        """Return the fields by name."""
        return asdict(self)

    @property
    def remark(self) -> str:
        """What is worth a second look, in words; empty for most layers."""
        remarks = [self.reason] if self.reason else []
        if self.nonfinite:
            remarks.append(f"{self.nonfinite} nonfinite values")
        if self.dead_channels:
            all_of_them = self.dead_channels == self.channels
            remarks.append("all zero" if all_of_them else f"{self.dead_channels} of {self.channels} channels zero")
        elif self.count > 1 and self.std == 0:
            remarks.append("constant")
        return "; ".join(remarks)


@dataclass(frozen=True, slots=True)
class ChannelStatistics:
    """Each channel of one layer's output, on the CPU; definitions as in `LayerStatistics`.

    Attributes:
        count: (C,), int64.
        mean: (C,), float64.
        std: (C,), float64.
        min: (C,), float64.
        max: (C,), float64.
        rms: (C,), float64.
        zero_fraction: (C,), float64.
        nonfinite: (C,), int64.
        dead: (C,), bool: exactly 0 throughout the sample.
    """

    count: Tensor
    mean: Tensor
    std: Tensor
    min: Tensor
    max: Tensor
    rms: Tensor
    zero_fraction: Tensor
    nonfinite: Tensor
    dead: Tensor

    @classmethod
    def of(cls, block: Tensor) -> "ChannelStatistics":
        """Read a block of statistics, (7, C), of which any number of channels may be empty."""
        block = block.double()
        count = block[Row.COUNT]
        empty = count == 0
        mean, variance, smallest, largest, zero_fraction = (
            value.masked_fill(empty, torch.nan)
            for value in (
                block[Row.MEAN],
                block[Row.M2] / count,
                block[Row.MIN],
                block[Row.MAX],
                block[Row.ZEROS] / count,
            )
        )
        return cls(
            count=count.round().long(),
            mean=mean,
            std=variance.sqrt(),
            min=smallest,
            max=largest,
            rms=(mean.square() + variance).sqrt(),
            zero_fraction=zero_fraction,
            nonfinite=block[Row.NONFINITE].round().long(),
            dead=(block[Row.ZEROS] == count) & ~empty,
        )

    def to_dict(self) -> dict[str, list[float]]:
        """Return the fields by name, as lists."""
        return {name: getattr(self, name).tolist() for name in self.__slots__}
