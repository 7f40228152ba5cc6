"""What became of running statistics that several processes merged."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bn_lightning.reports.table import Table
from bn_lightning.reports.tabled import Tabled

__all__ = ["MergeResult", "MergedLayer", "write"]


@dataclass(frozen=True, slots=True)
class MergedLayer:
    """One row of a `MergeResult`.

    Attributes:
        name: The layer, and of a `DomainBatchNorm` each further domain.
        processes: How many processes had statistics to merge.
        gap: How far the process that was farthest off was from the merged statistics, in standard deviations of the
            layer's output; ``None`` if nothing was merged.
        reason: Why the layer was left as it was, or ``None`` if it was merged.
    """

    name: str
    processes: int
    gap: float | None
    reason: str | None

    def to_dict(self) -> dict[str, str | int | float | None]:
        """Return the fields."""
        return {"name": self.name, "processes": self.processes, "gap": self.gap, "reason": self.reason}


@dataclass(frozen=True, slots=True)
class MergeResult(Tabled):
    """What `merge_statistics` did, the same in every process, and the way back.

    Attributes:
        rows: One per selected layer, in registration order.
        processes: How many took part.
    """

    rows: tuple[MergedLayer, ...]
    processes: int
    _before: tuple[tuple[Tensor, Tensor], ...] = field(default=(), repr=False, compare=False)

    def undo(self) -> None:
        """Put this process's former statistics back, bit for bit, whatever they became since."""
        write(self._before)

    def to_dict(self) -> dict[str, object]:
        """Return plain values."""
        return {"processes": self.processes, "layers": [row.to_dict() for row in self.rows]}

    def table(self) -> Table:
        """One row a layer."""
        done = sum(row.reason is None for row in self.rows)
        return Table(
            f"merged the running statistics of {done} of {len(self.rows)} BatchNorm layers over {self.processes} "
            + ("process" if self.processes == 1 else "processes"),
            ("layer", "processes with statistics", "largest gap before (output std)", "left as it was because"),
            [(row.name or "(root)", row.processes, row.gap, row.reason) for row in self.rows],
        )


@torch.inference_mode(False)
@torch.no_grad()
def write(values: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Write values into buffers: in place, since DDP, averaged copies and compiled graphs hold references."""
    for buffer, value in values:
        buffer.copy_(value)
