"""Merge the statistics that several processes took of their own share of the data."""

from collections.abc import Callable

import torch
from torch import Tensor, distributed

from bn_lightning.functional.activation import empty_statistics, pool_statistics
from bn_lightning.monitoring.buffer import Layout
from bn_lightning.monitoring.host import copy_to_host

__all__ = ["Merged", "ProcessMerge", "alone"]

Merged = tuple[Tensor, Layout, Tensor]
"""Statistics (7, total channels), which layers' columns they are, and counts; on the CPU."""


class ProcessMerge:
    """Merge statistics over the processes of ``torch.distributed``, unequal shares included.

    One all-gather and one copy to the host a merge, and nothing waits for the device until the result is asked for.
    The processes need not have seen the same layers: a flag in that gather tells when some process has new ones, and
    then the layouts are exchanged and the gather is repeated.
    """

    def __init__(self) -> None:
        self._agreed: Layout = []

    def start(self, values: Tensor, layout: Layout, counts: Tensor, *, across_processes: bool) -> Callable[[], Merged]:
        """Start to merge what all processes hold, and return what gives the result.

        Args:
            values: This process's statistics, which may change as soon as this returns.
            layout: Which layers' columns they are.
            counts: Whatever else is to be added up; of one shape in all processes.
            across_processes: Whether to ask the others, if there are any. Every process has to say the same then, and
                to ask for the result at the same time.

        Shape:
            ``values``: (7, total channels). ``counts``: any.
        """
        if not across_processes or alone():
            finish = copy_to_host(torch.cat([values.flatten(), counts.to(values).flatten()]))

            def read() -> Merged:
                statistics, rest = finish().tensor_split([values.numel()])
                return statistics.view(values.shape), layout, rest.view(counts.shape)

            return read
        mine = values.clone(), counts.to(values, copy=True)
        begun = self._gather(*mine, layout)

        def read_all() -> Merged:
            statistics, added, grown = begun()
            # Every process reads the same flags, so they all take this branch or none does.
            if grown:
                self._agree(layout)
                statistics, added, _ = self._gather(*mine, layout)()
            return statistics, list(self._agreed), added

        return read_all

    def _agree(self, layout: Layout) -> None:
        layouts: list[Layout] = [[] for _ in range(distributed.get_world_size())]
        distributed.all_gather_object(layouts, layout)
        self._agreed = list(dict.fromkeys(entry for entries in [self._agreed, *layouts] for entry in entries))

    def _gather(self, values: Tensor, counts: Tensor, layout: Layout) -> Callable[[], tuple[Tensor, Tensor, bool]]:
        width = sum(channels for _, channels in self._agreed)
        mine = empty_statistics(width, device=values.device, dtype=values.dtype)
        columns = dict(zip(layout, values.split([channels for _, channels in layout], dim=1), strict=True))
        start = 0
        for entry in self._agreed:
            if entry in columns:
                mine[:, start : start + entry[1]] = columns[entry]
            start += entry[1]
        new = mine.new_full((1,), float(not set(layout) <= set(self._agreed)))
        sent = torch.cat([mine.flatten(), counts.flatten(), new])
        everyone = [torch.empty_like(sent) for _ in range(distributed.get_world_size())]
        distributed.all_gather(everyone, sent)
        gathered = torch.stack(everyone)
        statistics = pool_statistics(gathered[:, : mine.numel()].view(len(gathered), *mine.shape).movedim(0, 1))
        finish = copy_to_host(torch.cat([statistics.flatten(), gathered[:, mine.numel() :].sum(0)]))

        def read() -> tuple[Tensor, Tensor, bool]:
            pooled, added, grown = finish().tensor_split([mine.numel(), sent.numel() - 1])
            return pooled.view(mine.shape), added.view(counts.shape), bool(grown)

        return read


def alone() -> bool:
    """Tell whether this process has no others to merge with."""
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1
