"""One buffer on the device for the statistics of every layer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bn_lightning.functional.activation import empty_statistics, pool_statistics
from bn_lightning.functional.moments import accumulation_dtype

__all__ = ["Layout", "Slot", "StatisticsBuffer"]

Layout = list[tuple[str, int]]
"""Which layers' columns stand side by side, in order: name and channel count."""


@dataclass(slots=True)
class Slot:
    """The columns of the buffer that belong to one layer at one channel count.

    Attributes:
        layer: The layer's name.
        start: First column.
        channels: Number of columns.
        written: Whether this sample has written to them.
    """

    layer: str
    start: int
    channels: int
    written: bool = False

    @property
    def columns(self) -> slice:
        """The columns, for indexing."""
        return slice(self.start, self.start + self.channels)


class StatisticsBuffer:
    """Statistics of many layers side by side in one (7, capacity) tensor, which grows when a layer is first seen.

    Args:
        capacity: Columns to begin with; one channel takes one, 56 bytes. After the first sample there are as many as
            it took.
        device: Where to keep the tensor if no layer is ever seen; otherwise it is where the first one's block is.

    Example:
        >>> buffer = StatisticsBuffer()
        >>> block = empty_statistics(2, device=torch.device("cpu"), dtype=torch.float64)
        >>> buffer.add("conv1", block)
        >>> buffer.used.shape
        torch.Size([7, 2])
    """

    def __init__(self, capacity: int = 4096, device: torch.device | None = None) -> None:
        self.slots: dict[tuple[str, int], Slot] = {}
        self._capacity = capacity
        self._device = device or torch.device("cpu")
        self._dtype = accumulation_dtype(self._device)
        self._values: Tensor | None = None

    @property
    def used(self) -> Tensor:
        """The columns in use, (7, total channels), on the device; empty before the first `add`."""
        width = sum(slot.channels for slot in self.slots.values())
        return self._empty(0) if self._values is None else self._values[:, :width]

    @property
    def layout(self) -> Layout:
        """What `used` holds."""
        return list(self.slots)

    def add(self, layer: str, block: Tensor) -> None:
        """Merge a block of statistics into its layer's columns, on the device.

        Args:
            layer: The layer's name.
            block: (7, C). Another C than before gets columns of its own.
        """
        slot = self.slots.get((layer, block.shape[1])) or self._allot(layer, block)
        assert self._values is not None
        own = self._values[:, slot.columns]
        block = block.to(self._values.device, non_blocking=True)
        own.copy_(pool_statistics(torch.stack([own, block], dim=1)) if slot.written else block)
        slot.written = True

    def clear(self) -> None:
        """Begin a new sample; the slots stay."""
        width = self.used.shape[1]
        if self._values is not None and self._values.shape[1] > width > 0:
            self._values = self._empty(width)  # what the first sample did not need
        elif self._values is not None:
            self._values.copy_(self._empty(1))
        for slot in self.slots.values():
            slot.written = False

    def _allot(self, layer: str, block: Tensor) -> Slot:
        channels, start = block.shape[1], self.used.shape[1]
        if self._values is None:
            self._device, self._dtype = block.device, accumulation_dtype(block.device)
            self._values = self._empty(max(self._capacity, channels))
        elif start + channels > self._values.shape[1]:
            grown = self._empty(2 * (start + channels))
            grown[:, :start] = self._values[:, :start]
            self._values = grown
        return self.slots.setdefault((layer, channels), Slot(layer, start, channels))

    def _empty(self, channels: int) -> Tensor:
        return empty_statistics(channels, device=self._device, dtype=self._dtype)
