"""Layer × step values of a bounded width: what the histories share."""

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from bn_lightning.reports.atomic import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["History"]

_COUNTS = ("count", "nonfinite", "spoiled_steps")


class History(ABC):
    """Readings of every layer at each sampled step.

    Once there are more than ``most_columns`` samples, neighbours are merged two by two, so that a column stands for two
    samples, then for four, and the whole run stays in view.

    Attributes:
        maps: The statistics that `figure` draws.
        layers: Names, in order of appearance.
        steps: The first optimizer step of each column.
        last_step: The last one added; -1 before.
        kind: What was sampled, ``"activations"`` or ``"gradients"``; for the title of a picture.
    """

    maps: ClassVar[tuple[str, ...]]
    _fields: ClassVar[tuple[str, ...]]

    def __init__(self, most_columns: int = 400) -> None:
        self.most_columns = most_columns
        self.layers: list[str] = []
        self.steps: list[int] = []
        self._values = self._nothing(0, 0)
        self._samples_a_column = 1
        self._samples_in_last = 0
        self.last_step = -1
        self.kind = "activations"

    @abstractmethod
    def values(self, stat: str) -> Tensor:
        """Return a statistic as (layers, steps), float64; NaN where there is no value."""

    @abstractmethod
    def spoiled(self, stat: str) -> Tensor:
        """Tell where a picture of a statistic shows it as not finite, (layers, steps)."""

    @staticmethod
    @abstractmethod
    def _nothing(layers: int, columns: int) -> Tensor:
        """Return the readings of nothing, (rows, layers, columns), neutral in `_merged`."""

    @staticmethod
    @abstractmethod
    def _merged(parts: Tensor) -> Tensor:
        """Merge two readings along axis 1: (rows, 2, *) to (rows, *)."""

    @property
    def samples(self) -> list[int]:
        """How many samples are merged in each column."""
        return [self._samples_a_column] * (len(self.steps) - 1) + [self._samples_in_last] * bool(self.steps)

    def figure(self, stat: str) -> "Figure":
        """Draw a statistic as a heat map, layers from top to bottom.

        Raises:
            BatchNormError: If there is no such statistic, or nothing was sampled yet.
        """
        from bn_lightning.monitoring.pictures import history_map

        return history_map(self, stat)

    def write_jsonl(self, path: str | os.PathLike[str]) -> None:
        """Write one line of strict JSON a column: ``{"step": …, "samples": …, "layers": {name: {field: number}}}``.

        ``samples`` is how many are merged in it, from ``step`` on. Numbers have six significant digits, counts all.
        Layers of which nothing is known in a column are left out, ``null`` is a single unknown number, and values that
        are not finite are the strings ``"nan"``, ``"inf"`` and ``"-inf"``. A reader sees the old file or the whole new
        one.
        """
        fields = {name: self.values(name).mT.tolist() for name in self._fields}
        known = self._known().mT.tolist()
        with atomic_write(path) as file:
            for column, (step, samples) in enumerate(zip(self.steps, self.samples, strict=True)):
                layers = {
                    layer: {name: self._number(name, values[column][index]) for name, values in fields.items()}
                    for index, layer in enumerate(self.layers)
                    if known[column][index]
                }
                line = {"step": step, "samples": samples, "layers": layers}
                text = json.dumps(line, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
                file.write(text.encode() + b"\n")

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

    @abstractmethod
    def _known(self) -> Tensor:
        """Tell of which layers there is anything in which column, (layers, steps)."""

    def _number(self, field: str, value: float) -> float | int | str | None:
        if field in _COUNTS:
            return int(value)
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)

    def _append(self, step: int, layers: Sequence[str], readings: Tensor) -> None:
        """Add a sample, (rows, layers); a second one of the same step is merged into it."""
        new = [name for name in layers if name not in set(self.layers)]
        self.layers += new
        self._values = torch.cat([self._values, self._nothing(len(new), len(self.steps))], dim=1)
        column = self._nothing(len(self.layers), 1)
        place = {name: index for index, name in enumerate(self.layers)}
        column[:, [place[name] for name in layers], 0] = readings
        if self.steps and (step == self.last_step or self._samples_in_last < self._samples_a_column):
            self._samples_in_last += step != self.last_step
            self._values[..., -1:] = self._merged(torch.stack([self._values[..., -1:], column], dim=1))
        else:
            self.steps.append(step)
            self._samples_in_last = 1
            self._values = torch.cat([self._values, column], dim=2)
        self.last_step = step
        if len(self.steps) > self.most_columns:
            self._halve()

    def _halve(self) -> None:
        """Merge columns two by two, from the oldest; an odd one at the end waits for its second half."""
        odd = len(self.steps) % 2
        padded = torch.cat([self._values, self._nothing(len(self.layers), odd)], dim=2)
        self._values = self._merged(torch.stack([padded[..., 0::2], padded[..., 1::2]], dim=1))
        self.steps = self.steps[0::2]
        if not odd:
            self._samples_in_last += self._samples_a_column
        self._samples_a_column *= 2
