"""What recalibration did to each layer, and the way back."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.reports.table import Table
from bn_lightning.reports.tabled import Tabled

__all__ = ["RecalibratedLayer", "RecalibrationResult", "batches_named", "write_statistics"]


@dataclass(frozen=True, slots=True)
class RecalibratedLayer:
    """One row of a `RecalibrationResult`.

    Attributes:
        name: The layer.
        count: Values per channel behind the population statistics.
        gap: How far evaluation's output was off before, in its standard deviations; ``None`` where unknown.
        reason: Why the layer was left as it was, or ``None`` if it was recalibrated.
        standard_error: How well the batches determine the population statistics, in σ: the larger of the standard
            errors of the mean and of σ itself; ``None`` for fewer than two batches.
    """

    name: str
    count: int
    gap: float | None
    reason: str | None
    standard_error: float | None = None

    def to_dict(self) -> dict[str, str | int | float | None]:
        """Return the fields."""
        return {
            "name": self.name,
            "count": self.count,
            "gap": self.gap,
            "reason": self.reason,
            "standard_error": self.standard_error,
        }


@dataclass(frozen=True, slots=True)
class RecalibrationResult(Tabled):
    """What `recalibrate_batch_norm` did, and the way back.

    Attributes:
        rows: One per selected layer, in registration order.
        batches: How many batches were measured, in all processes together.
        stopped_early: Whether batches were left undrawn, since every layer was known well enough.
    """

    rows: tuple[RecalibratedLayer, ...]
    batches: int
    _before: tuple[tuple[_BatchNorm, Tensor, Tensor], ...] = field(repr=False, compare=False)
    stopped_early: bool = False

    @property
    def standard_error(self) -> float | None:
        """The largest among the layers that were recalibrated, in σ; ``None`` where it is not known."""
        known = [row.standard_error for row in self.rows if row.reason is None and row.standard_error is not None]
        return max(known, default=None)

    def undo(self) -> None:
        """Put the former running statistics back, bit for bit, whatever they became since."""
        for layer, mean, var in self._before:
            write_statistics(layer, mean, var)

    def to_dict(self) -> dict[str, object]:
        """Return plain values."""
        return {
            "batches": self.batches,
            "stopped_early": self.stopped_early,
            "standard_error": self.standard_error,
            "layers": [row.to_dict() for row in self.rows],
        }

    def table(self) -> Table:
        """One row a layer."""
        done = sum(row.reason is None for row in self.rows)
        return Table(
            f"recalibrated {done} of {len(self.rows)} BatchNorm layers on {batches_named(self.batches)}",
            ("layer", "gap before (output std)", "values per channel", "standard error (σ)", "left as it was because"),
            [(row.name or "(root)", row.gap, row.count, row.standard_error, row.reason) for row in self.rows],
            self._notes(),
        )

    def _notes(self) -> list[str]:
        if not self.stopped_early or self.standard_error is None:
            return []
        return [
            f"Stopped early: the largest standard error of a mean or standard deviation is {self.standard_error:.2g} "
            "σ, estimated from the batches drawn."
        ]


@torch.inference_mode(False)
@torch.no_grad()
def write_statistics(layer: _BatchNorm, mean: Tensor, var: Tensor) -> None:
    """Write into the buffers a layer has: in place, since DDP, averaged copies and compiled graphs hold references."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    layer.running_mean.copy_(mean)
    layer.running_var.copy_(var)


def batches_named(count: int) -> str:
    """Say a number of batches."""
    return f"{count} {'batch' if count == 1 else 'batches'}"
