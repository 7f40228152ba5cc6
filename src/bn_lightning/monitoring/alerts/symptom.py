"""One way in which layers go wrong, and in which layers it is present."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Generic, TypeVar

from bn_lightning.monitoring.alerts.alert import Alert

__all__ = ["PATIENCE", "Symptom"]

# Samples in a row: one batch like no other is no fault.
PATIENCE = 3

_Sample = TypeVar("_Sample")


class Symptom(ABC, Generic[_Sample]):
    """Give each layer of a sample a number, and notice where it stays too large.

    A symptom is told once, when it begins: when a layer's number is above ``begins`` in ``patience`` samples in a row.
    It has ended, and may begin anew, when the number is at most ``ends`` in as many as `PATIENCE`. A sample that says
    nothing about a layer, by NaN or by leaving it out, counts neither way. Layers in which it begins with the same
    sample are told together.

    Thresholds come from ``tests/benchmarks/false_alarms.py``: what its 29 healthy trainings reach, with three seeds,
    and what its sick ones do, stands beside each.

    Attributes:
        rule: Its name, as users type it.
        begins: What a layer's number has to exceed.
        ends: What it has to come down to.
        patience: For so many samples in a row.
        names_first: Whether it names the first of several layers, else the worst.
    """

    rule: ClassVar[str]
    begins: ClassVar[float]
    ends: ClassVar[float]
    patience: int = PATIENCE
    names_first: ClassVar[bool] = False

    def __init__(self) -> None:
        self._in_a_row: dict[str, int] = {}
        self._present: set[str] = set()

    @abstractmethod
    def measure(self, sample: _Sample) -> Mapping[str, float]:
        """Give each layer its number, layers in order of execution; NaN if the sample does not tell."""

    @abstractmethod
    def describe(self, layer: str, value: float, sample: _Sample) -> tuple[str, str]:
        """Say what was found in a layer and what was expected, and what to do."""

    def look(self, sample: _Sample, step: int | None) -> Alert | None:
        """Take a sample in; tell if the symptom begins with it."""
        values = self.measure(sample)
        begun = [layer for layer, value in values.items() if self._begins(layer, value)]
        if not begun:
            return None
        layer = begun[0] if self.names_first else max(begun, key=values.__getitem__)
        others = len(begun) - 1
        found, cure = self.describe(layer, values[layer], sample)
        head = f"{self.rule} in {layer!r}"
        if others:
            head += f" and {others} other layer{'s' if others > 1 else ''}"
        if step is not None:
            head += f" at optimizer step {step}"
        return Alert(self.rule, layer, step, f"{head}: {found}. {cure}.")

    def _begins(self, layer: str, value: float) -> bool:
        if math.isnan(value):
            return False
        present = layer in self._present
        counts = value <= self.ends if present else value > self.begins
        self._in_a_row[layer] = self._in_a_row.get(layer, 0) + 1 if counts else 0
        if self._in_a_row[layer] < (PATIENCE if present else self.patience):
            return False
        self._in_a_row[layer] = 0
        (self._present.remove if present else self._present.add)(layer)
        return not present
