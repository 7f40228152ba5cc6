"""What a file of weights turned out to be."""

import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from bn_lightning.reports.table import Table

__all__ = ["LoadReport", "Remark", "WeightsWarning", "warn_of"]


class WeightsWarning(UserWarning):
    """What is odd about a network's weights or BatchNorm layers."""


@dataclass(frozen=True, slots=True)
class Remark:
    """One thing to know about a network and the weights it was given.

    Attributes:
        about: ``statistics``, ``eps``, ``momentum`` or ``keys``.
        severity: ``warning`` if outputs or further training are likely to be wrong, else ``info``.
        message: What is so, what it does, and the cure.
        layers: Names of the BatchNorm layers it is about.
    """

    about: str
    severity: str
    message: str
    layers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What `load_checkpoint` loaded, and what is odd about it.

    Attributes:
        path: Of the file.
        tensors: How many were loaded.
        prefix: What was taken off the front of the file's keys.
        source: The network that the file says its weights are from, in a name for `load_zoo_model`; ``None`` if it
            does not say, or not of the same zoo.
        batch_norms: How many BatchNorm layers the network has.
        eps: Of the BatchNorm layers, each value once.
        momentum: Of the BatchNorm layers, the weight of the new batch, each value once; ``None`` is the mean of all.
        remarks: What to know, warnings first.
    """

    path: str
    tensors: int
    prefix: str
    source: str | None
    batch_norms: int
    eps: tuple[float, ...]
    momentum: tuple[float | None, ...]
    remarks: tuple[Remark, ...]

    def table(self) -> Table:
        """One row a remark, what was loaded above."""
        rows = [(remark.severity, remark.about, remark.message) for remark in self.remarks]
        return Table(self._title(), ("", "about", "what"), rows)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that go into JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join([self._title(), *(f"{each.severity}: {each.message}" for each in self.remarks)])

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def _title(self) -> str:
        taken = f", {self.prefix!r} taken off their names" if self.prefix else ""
        source = f", saved from {self.source}" if self.source else ""
        norms = "no BatchNorm layer"
        if self.batch_norms:
            plural = "s" if self.batch_norms > 1 else ""
            eps, momentum = (
                " and ".join(f"{value:g}" if value is not None else "None" for value in values)
                for values in (self.eps, self.momentum)
            )
            norms = f"{self.batch_norms} BatchNorm layer{plural} with eps {eps}, momentum {momentum}"
        return f"{self.path}: {self.tensors} tensors loaded{taken}{source}; {norms}"


def warn_of(network: str, remarks: Iterable[Remark]) -> None:
    """Warn the caller's caller of each remark that is a warning.

    Args:
        network: What it is called.
        remarks: From a report.
    """
    for remark in remarks:
        if remark.severity == "warning":
            warnings.warn(f"{network}: {remark.message}", WeightsWarning, stacklevel=3)
