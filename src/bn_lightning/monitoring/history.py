"""How activations and running statistics went, layer × step."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bn_lightning.functional.activation import Row, empty_statistics, pool_statistics
from bn_lightning.functional.grouped import add_groups, pool_groups
from bn_lightning.monitoring.columns import History
from bn_lightning.monitoring.running_snapshot import RunningSnapshot
from bn_lightning.monitoring.snapshot import ActivationSnapshot
from bn_lightning.monitoring.statistics import ChannelStatistics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ActivationHistory", "RunningHistory"]

# Below the rows of `Row`: the share of dead channels times the count of values, which add up as zeros do.
_DEAD = len(Row)


class ActivationHistory(History):
    """Each layer's statistics at each sampled step.

    Once there are more than ``most_columns`` samples, neighbours are merged two by two by Chan's formula, so that a
    column stands for two samples, then for four, and the whole run stays in view. The share of dead channels of a
    merged column is the mean of its samples', weighed by their values: the largest would grow with the run.

    Args:
        most_columns: The width at which neighbours are merged.

    Example:
        >>> history = ActivationHistory(most_columns=2)
        >>> one_layer = lambda v: ActivationSnapshot({"fc": torch.tensor([[4.0, v, 0, v, v, 0, 0]]).double().mT}, {})
        >>> for step in range(4):
        ...     history.append(step, one_layer(float(step)))
        >>> history.steps, history.values("mean").tolist(), history.values("std").tolist()
        ([0, 2], [[0.5, 2.5]], [[0.5, 0.5]])
    """

    maps = ("mean", "std", "rms", "min", "max", "zero_fraction", "dead_fraction")
    _fields = ("count", *maps, "nonfinite")

    def append(self, step: int, snapshot: ActivationSnapshot) -> None:
        """Add the sample of an optimizer step; a second sample of the same step is merged into it."""
        self.kind = snapshot.kind
        if snapshot.blocks:
            self._append(step, list(snapshot.blocks), _readings(list(snapshot.blocks.values())))
        else:
            self._append(step, [], self._nothing(0, 1)[..., 0])

    def values(self, stat: str) -> Tensor:
        """Return a statistic as (layers, steps); NaN where a layer was not called.

        Args:
            stat: A field of `ChannelStatistics`, here of a whole layer; or ``dead_fraction``, the share of its
                channels that were exactly 0 throughout a sample.
        """
        if stat == "dead_fraction":
            return self._values[_DEAD] / self._values[Row.COUNT]
        statistics = ChannelStatistics.of(self._values[:_DEAD].flatten(1))
        values: Tensor = getattr(statistics, stat).double()
        return values.reshape(len(self.layers), len(self.steps))

    def figure(self, stat: str = "std") -> "Figure":
        """Draw a statistic as a heat map, layers in order of execution from top to bottom.

        Args:
            stat: One of ``maps``.

        Raises:
            BatchNormError: If there is no such statistic, or nothing was sampled yet.
        """
        return super().figure(stat)

    def spoiled(self, stat: str) -> Tensor:
        """Tell where a NaN or infinity among a layer's values went into a statistic."""
        return (self.values("nonfinite") > 0) & ~self.values(stat).isfinite()

    def _known(self) -> Tensor:
        return self._values[Row.COUNT] > 0

    @staticmethod
    def _nothing(layers: int, columns: int) -> Tensor:
        block = empty_statistics(layers * columns, device=torch.device("cpu"), dtype=torch.float64)
        return torch.cat([block, block[:1]]).reshape(len(Row) + 1, layers, columns)

    @staticmethod
    def _merged(parts: Tensor) -> Tensor:
        return torch.cat([pool_statistics(parts[:_DEAD]), parts[_DEAD:].sum(1)])


class RunningHistory(History):
    """What the running statistics of each BatchNorm layer told at each reading.

    Once there are more than ``most_columns`` readings, neighbours are merged two by two: a merged column shows the
    largest of its readings that are known.

    Args:
        most_columns: The width at which neighbours are merged.

    Example:
        >>> from bn_lightning.monitoring.running_snapshot import RunningRow
        >>> history = RunningHistory(most_columns=2)
        >>> for step, drift in enumerate([0.5, None, 0.25, 0.125]):
        ...     history.append(step, RunningSnapshot((RunningRow("bn", 8, drift=drift),), step, {}, {}))
        >>> history.steps, history.values("drift").tolist()
        ([0, 2], [[0.5, 0.25]])
    """

    maps = ("drift", "noise", "dead")
    _fields = (*maps, "spoiled_steps")

    def append(self, step: int, snapshot: RunningSnapshot) -> None:
        """Add the reading of an optimizer step; a second reading of the same step is merged into it."""
        unknown = float("nan")
        readings = [
            [unknown if value is None else value for value in (row.drift, row.noise, row.dead_share, row.spoiled_steps)]
            for row in snapshot.rows
        ]
        readings_by_field = torch.tensor(readings, dtype=torch.float64, device="cpu").reshape(-1, len(self._fields)).mT
        self._append(step, [row.layer for row in snapshot.rows], readings_by_field)

    def values(self, stat: str) -> Tensor:
        """Return a statistic as (layers, steps); NaN where it is unknown.

        Args:
            stat: ``drift`` or ``noise``, in σ; ``dead``, a share of channels; or ``spoiled_steps``, after how many
                optimizer steps running statistics were NaN or infinite.
        """
        return self._values[self._fields.index(stat)]

    def spoiled(self, stat: str) -> Tensor:
        """Tell where running statistics were NaN or infinite after a step; the share of dead channels survives that."""
        return (self.values("spoiled_steps") > 0) & (stat != "dead")

    def _known(self) -> Tensor:
        return ~self._values[:-1].isnan().all(0) | (self._values[-1] > 0)

    def _number(self, field: str, value: float) -> float | int | str | None:
        return None if value != value else super()._number(field, value)

    @staticmethod
    def _nothing(layers: int, columns: int) -> Tensor:
        return torch.full((len(RunningHistory._fields), layers, columns), torch.nan, dtype=torch.float64, device="cpu")

    @staticmethod
    def _merged(parts: Tensor) -> Tensor:
        return torch.fmax(*parts.unbind(1))


def _readings(blocks: list[Tensor]) -> Tensor:
    widths = [block.shape[1] for block in blocks]
    together = torch.cat(blocks, dim=1).double()
    whole = pool_groups(together, widths)
    dead = add_groups(ChannelStatistics.of(together).dead.double(), widths)
    share = dead / torch.tensor(widths, device="cpu").clamp(min=1)
    return torch.cat([whole, (share * whole[Row.COUNT])[None]])
