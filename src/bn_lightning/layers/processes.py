"""Processes that are about to exchange statistics: how many there are, and whether they speak of the same layers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import distributed

from bn_lightning.errors import BatchNormError

if TYPE_CHECKING:  # not every build of torch has it
    from torch.distributed import ProcessGroup

__all__ = ["Layout", "count_processes", "require_agreement"]

Layout = Sequence[tuple[str, int | None]]
"""Each layer's name and number of channels, ``None`` without running statistics, in the order of the exchange."""


def count_processes(group: "ProcessGroup | None" = None) -> int:
    """Return how many processes a group has; 1 without ``torch.distributed`` or outside of the group.

    Example:
        >>> count_processes()
        1
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return max(distributed.get_world_size(group), 1)  # -1 outside the group


def require_agreement(
    problem: str | None,
    layout: Layout,
    group: "ProcessGroup | None",
    *,
    task: str,
    error: type[BatchNormError] = BatchNormError,
) -> None:
    """Raise in all processes if one has a problem or other layers: a collective of unequal lengths would hang.

    Args:
        problem: What is wrong in this process; ``None`` if nothing is.
        layout: This process's layers.
        group: The processes; ``None`` for all. Every one of them has to call this.
        task: What a process with a problem cannot do, as in "process 1 cannot …".
        error: The class to raise.

    Raises:
        BatchNormError: Of the given class, naming the process.
    """
    everyone: list[tuple[str | None, Layout]] = [(None, [])] * distributed.get_world_size(group)
    distributed.all_gather_object(everyone, (problem, layout), group=group)
    for rank, (theirs, _) in enumerate(everyone):
        if theirs is not None:
            raise error(f"process {rank} cannot {task}: {theirs}")
    first = everyone[0][1]
    for rank, (_, other) in enumerate(everyone):
        if other != first:
            raise error(
                f"the processes' BatchNorm layers differ, so their statistics cannot be merged: process 0 has "
                f"{_difference(first, other)}, process {rank} has {_difference(other, first)}. Build the same model "
                "in every process, or pick what they share with include= and exclude=."
            )


def _difference(one: Layout, other: Layout) -> str:
    """Name the first entry that the other does not have in its place."""
    for index, (name, channels) in enumerate(one):
        if other[index : index + 1] != [(name, channels)]:
            width = "no running statistics" if channels is None else f"{channels} channels"
            return f"{name or '(root)'!r} ({width})"
    return f"no more than {len(one)} layers"
