"""The statistics of activations as a torchmetrics metric, for ``self.log`` and ``MetricCollection``."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from bn_lightning.errors import BatchNormError
from bn_lightning.functional.activation import activation_statistics, empty_statistics, pool_statistics
from bn_lightning.functional.moments import accumulation_dtype
from bn_lightning.monitoring.statistics import ChannelStatistics as Channels
from bn_lightning.monitoring.statistics import LayerStatistics

__all__ = ["ChannelStatistics"]

_STATISTICS = ("mean", "std", "min", "max", "rms", "zero_fraction", "nonfinite", "dead_channels")


class ChannelStatistics(Metric):
    """Mean, standard deviation, extremes, zeros and nonfinite values of every channel, over all it was updated with.

    Samples of unequal size, and processes with unequal shares, merge exactly by Chan's formula. In float64, or float32
    on a device without it.

    Args:
        num_features: C.
        statistic: Which one `compute` returns: mean, std (``correction=0``), min, max, rms, zero_fraction, nonfinite or
            dead_channels, over all values of all channels, as in `bn_lightning.monitoring.LayerStatistics`. ``None``
            returns all of them, keyed by name, as ``log_dict`` and ``MetricCollection`` take it.
        channel_dim: Axis of the channels; -1 for the output of a linear layer.
        **options: Those of ``torchmetrics.Metric``.

    Shape:
        ``update`` takes (N, C, *), for ``channel_dim=1``.

    Raises:
        BatchNormError: If there is no such statistic; in ``update``, if there are not C channels.

    Example:
        >>> metric = ChannelStatistics(2)
        >>> metric.update(torch.tensor([[0.0, 4.0]]))
        >>> metric.update(torch.tensor([[0.0, 6.0], [0.0, 2.0]]))
        >>> values = metric.compute()
        >>> values["mean"].item(), values["zero_fraction"].item(), values["dead_channels"].item()
        (2.0, 0.5, 1.0)
        >>> metric.channels().mean.tolist()
        [0.0, 4.0]

    Reference:
        Chan, Golub & LeVeque, The American Statistician 37(3), 1983, eq. 2.1.
    """

    full_state_update = False
    block: Tensor

    def __init__(
        self, num_features: int, statistic: str | None = None, *, channel_dim: int = 1, **options: Any
    ) -> None:
        super().__init__(**options)
        if statistic is not None and statistic not in _STATISTICS:
            raise BatchNormError(f"statistic= is one of {', '.join(_STATISTICS)}, or None; got {statistic!r}.")
        self.num_features, self.statistic, self.channel_dim = num_features, statistic, channel_dim
        nothing = empty_statistics(num_features, device=torch.device("cpu"), dtype=torch.float64)
        self.add_state("block", default=nothing, dist_reduce_fx=_pooled)

    def update(self, x: Tensor) -> None:
        """Take a sample in, of any size."""
        if x.dim() < 2 or x.shape[self.channel_dim] != self.num_features:
            raise BatchNormError(
                f"ChannelStatistics({self.num_features}) takes a tensor with {self.num_features} channels along axis "
                f"{self.channel_dim}, got shape {tuple(x.shape)}."
            )
        sample = activation_statistics(x, channel_dim=self.channel_dim)
        self.block = _pooled(torch.stack([self.block.to(sample), sample]))

    def compute(self) -> Tensor | dict[str, Tensor]:
        """Return the statistic, or all of them by name, as scalars."""
        row = LayerStatistics.pooled(self.block.cpu()).to_dict()
        wide = accumulation_dtype(self.block.device)
        values = {name: torch.tensor(float(row[name]), dtype=wide, device=self.block.device) for name in _STATISTICS}
        return values if self.statistic is None else values[self.statistic]

    def channels(self) -> Channels:
        """Return this process's statistics, channel by channel."""
        return Channels.of(self.block.cpu())


def _pooled(blocks: Tensor) -> Tensor:
    return pool_statistics(blocks.movedim(0, 1))
