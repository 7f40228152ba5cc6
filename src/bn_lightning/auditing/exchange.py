"""What one process read, made everyone's."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributed

from bn_lightning.errors import AuditError, BatchNormError, first_line
from bn_lightning.layers.processes import count_processes

__all__ = ["from_everyone", "together"]

_Part = TypeVar("_Part")


def from_everyone(read: Callable[[], _Part]) -> list[_Part]:
    """Call a function in every process, and return what it gave in each, in the order of ranks, in all of them.

    One process alone just calls it. What goes wrong in one raises in all, so that none waits for ever; an interrupt
    does not, and the others wait until their process group gives up.

    Raises:
        AuditError: If it failed in another process, which is named.

    Example:
        >>> from_everyone(lambda: 1)
        [1]
    """
    processes = count_processes()
    if processes == 1:
        return [read()]
    own: Any = None
    problem: Exception | None = None
    try:
        own = read()
    except Exception as error:
        problem = error
    told = None if problem is None else str(problem) if isinstance(problem, BatchNormError) else first_line(problem)
    everyone: list[Any] = [None] * processes
    distributed.all_gather_object(everyone, (told, own))
    if problem is not None:
        raise problem
    for rank, (theirs, _) in enumerate(everyone):
        if theirs is not None:
            raise AuditError(f"process {rank} cannot audit: {theirs}")
    return [part for _, part in everyone]


def together(do: Callable[[], _Part]) -> _Part:
    """Do something of this process's own; where it fails in one process it raises in all, as in `from_everyone`.

    Example:
        >>> together(lambda: 1)
        1
    """
    own: list[_Part] = []
    from_everyone(lambda: own.append(do()))
    return own[0]
