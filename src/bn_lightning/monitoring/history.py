"""Layer × step arrays of sampled statistics, bounded in width."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bn_lightning.functional.activation import Row, empty_statistics, pool_statistics
from bn_lightning.monitoring.snapshot import ActivationSnapshot
from bn_lightning.monitoring.statistics import ChannelStatistics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ActivationHistory"]


class ActivationHistory:
    """Each layer's statistics at each sampled step.

    Once there are more than ``most_columns`` samples, neighbours are merged two by two by Chan's formula, so that a
    column stands for two samples, then for four, and the whole run stays in view.

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

    def __init__(self, most_columns: int = 400) -> None:
        self.most_columns = most_columns
        self.layers: list[str] = []
        self.steps: list[int] = []
        self._values = _nothing(0, 0)
        self._samples_a_column = 1
        self._samples_in_last = 0
        self.last_step = -1

    def append(self, step: int, snapshot: ActivationSnapshot) -> None:
        """Add the sample of an optimizer step; a second sample of the same step is merged into it."""
        new = [name for name in snapshot.blocks if name not in set(self.layers)]
        self.layers += new
        self._values = torch.cat([self._values, _nothing(len(new), len(self.steps))], dim=1)
        column = _nothing(len(self.layers), 1)
        for name, block in snapshot.blocks.items():
            column[:, self.layers.index(name), 0] = pool_statistics(block.double())
        if self.steps and (step == self.last_step or self._samples_in_last < self._samples_a_column):
            self._samples_in_last += step != self.last_step
            last = torch.stack([self._values[..., -1:], column], dim=1)
            self._values[..., -1:] = pool_statistics(last)
        else:
            self.steps.append(step)
            self._samples_in_last = 1
            self._values = torch.cat([self._values, column], dim=2)
        self.last_step = step
        if len(self.steps) > self.most_columns:
            self._halve()

    def values(self, stat: str) -> Tensor:
        """Return a statistic as (layers, steps); NaN where a layer was not called.

        Args:
            stat: A field of `ChannelStatistics`; here of a whole layer.
        """
        statistics = ChannelStatistics.of(self._values.flatten(1))
        values: Tensor = getattr(statistics, stat).double()
        return values.reshape(len(self.layers), len(self.steps))

    def figure(self, stat: str = "std") -> "Figure":
        """Draw a statistic as a heat map, layers in order of execution from top to bottom."""
        from bn_lightning.monitoring.pictures import history_map

        return history_map(self, stat)

    def state_dict(self) -> dict[str, Any]:
        """Return the history as plain values and one CPU tensor."""
        return {
            "layers": list(self.layers),
            "steps": list(self.steps),
            "values": self._values.clone(),
            "samples_a_column": self._samples_a_column,
            "samples_in_last": self._samples_in_last,
            "last_step": self.last_step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self.layers = list(state["layers"])
        self.steps = list(state["steps"])
        self._values = state["values"].clone()
        self._samples_a_column = state["samples_a_column"]
        self._samples_in_last = state["samples_in_last"]
        self.last_step = state["last_step"]

    def _halve(self) -> None:
        """Merge columns two by two, from the oldest; an odd one at the end waits for its second half."""
        odd = len(self.steps) % 2
        padded = torch.cat([self._values, _nothing(len(self.layers), odd)], dim=2)
        self._values = pool_statistics(torch.stack([padded[..., 0::2], padded[..., 1::2]], dim=1))
        self.steps = self.steps[0::2]
        if not odd:
            self._samples_in_last += self._samples_a_column
        self._samples_a_column *= 2


def _nothing(layers: int, columns: int) -> Tensor:
    block = empty_statistics(layers * columns, device=torch.device("cpu"), dtype=torch.float64)
    return block.reshape(len(Row), layers, columns)
