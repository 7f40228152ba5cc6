"""Merge the statistics that several processes took of their own share of the data."""

import torch
from torch import Tensor, distributed

from bn_lightning.functional.activation import Row, empty_statistics, pool_statistics
from bn_lightning.monitoring.buffer import Layout

__all__ = ["ProcessMerge"]


class ProcessMerge:
    """Merge statistics over the processes of ``torch.distributed``, unequal shares included.

    One all-gather a merge. The processes need not have seen the same layers: a flag in that gather tells when some
    process has new ones, and then the layouts are exchanged and the gather is repeated.
    """

    def __init__(self) -> None:
        self._agreed: Layout = []

    def merge(self, values: Tensor, layout: Layout) -> tuple[Tensor, Layout]:
        """Return the statistics of all processes together; without a process group, what was given.

        Args:
            values: This process's statistics.
            layout: Which layers' columns they are.

        Shape:
            ``values``: (7, total channels). Result: (7, total channels of all layouts together).
        """
        if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
            return values, layout
        gathered, grown = self._gather(values, layout)
        # Every process reads the same flags, so they all take this branch or none does.
        if grown:
            layouts: list[Layout] = [[] for _ in range(distributed.get_world_size())]
            distributed.all_gather_object(layouts, layout)
            self._agreed = list(dict.fromkeys(entry for entries in [self._agreed, *layouts] for entry in entries))
            gathered, _ = self._gather(values, layout)
        return pool_statistics(gathered), list(self._agreed)

    def _gather(self, values: Tensor, layout: Layout) -> tuple[Tensor, bool]:
        width = sum(channels for _, channels in self._agreed)
        mine = empty_statistics(width + 1, device=values.device, dtype=values.dtype)
        columns = dict(zip(layout, values.split([channels for _, channels in layout], dim=1), strict=True))
        start = 0
        for entry in self._agreed:
            if entry in columns:
                mine[:, start : start + entry[1]] = columns[entry]
            start += entry[1]
        mine[Row.NONFINITE, width] = float(not set(layout) <= set(self._agreed))
        everyone = [torch.empty_like(mine) for _ in range(distributed.get_world_size())]
        distributed.all_gather(everyone, mine)
        gathered = torch.stack(everyone, dim=1)
        return gathered[..., :width], bool(gathered[Row.NONFINITE, :, width].any())
