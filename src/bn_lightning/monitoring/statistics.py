"""What one sample says about a layer and about its channels, as plain values."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from bn_lightning.functional.activation import Row
from bn_lightning.functional.grouped import add_groups, pool_groups

__all__ = ["NEAR_OVERFLOW", "ChannelStatistics", "LayerStatistics"]

# From here on, twice as much is more than the dtype can hold.
NEAR_OVERFLOW = 0.5


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
        saturation: Largest magnitude as a share of the largest finite value of the output's dtype; NaN if not known.
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
    saturation: float = math.nan
    reason: str = ""

    @classmethod
    def pooled(cls, block: Tensor, reason: str = "", limit: float = math.nan) -> "LayerStatistics":
        """Pool the statistics of channels, (7, C), of outputs whose dtype goes up to ``limit``.

        Example:
            >>> from bn_lightning.functional.activation import activation_statistics
            >>> row = LayerStatistics.pooled(activation_statistics(torch.tensor([[0.0, 2.0], [0.0, 4.0]])))
            >>> row.mean, row.zero_fraction, row.dead_channels
            (1.5, 0.5, 1)
        """
        (row,) = cls.of_layers(block, [block.shape[1]], [reason], [limit])
        return row

    @classmethod
    def of_layers(
        cls, block: Tensor, widths: Sequence[int], reasons: Sequence[str], limits: Sequence[float]
    ) -> list["LayerStatistics"]:
        """Pool the statistics of layers that stand side by side, (7, all channels), in ``widths`` columns each."""
        whole = ChannelStatistics.of(pool_groups(block.double(), widths))
        dead = add_groups(ChannelStatistics.of(block).dead.long(), widths)
        largest = torch.stack([whole.min, whole.max]).abs().amax(0)
        columns = (
            whole.count,
            whole.mean,
            whole.std,
            whole.min,
            whole.max,
            whole.rms,
            whole.zero_fraction,
            whole.nonfinite,
            dead,
            torch.tensor(widths, dtype=torch.int64, device="cpu"),
            largest / torch.tensor(limits, dtype=torch.float64, device="cpu"),
        )
        return [cls(*row) for row in zip(*(column.tolist() for column in columns), reasons, strict=True)]

    def to_dict(self) -> dict[str, int | float | str]:
        """Return the fields by name."""
        return asdict(self)

    @property
    def remark(self) -> str:
        """What is worth a second look, in words; empty for most layers."""
        remarks = [self.reason] if self.reason else []
        if self.nonfinite:
            remarks.append(f"{self.nonfinite} nonfinite values")
        elif self.saturation > NEAR_OVERFLOW:
            remarks.append(f"up to {100 * self.saturation:.0f} % of what its dtype can hold")
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
