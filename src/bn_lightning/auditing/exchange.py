"""What one process read, made everyone's."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import distributed

from bn_lightning.auditing.finding import Finding
from bn_lightning.errors import AuditError, BatchNormError, first_line
from bn_lightning.layers.processes import count_processes

__all__ = ["findings_of_everyone", "from_everyone", "together"]

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


def findings_of_everyone(own: Sequence[Finding]) -> list[Finding]:
    """Put together what the processes found; what only some found says in which.

    A batch of one example, or statistics that are not finite, may be of one process alone, whose report nobody reads.

    Example:
        >>> findings_of_everyone([])
        []
    """
    everyone = from_everyone(lambda: list(own))
    if len(everyone) == 1:
        return everyone[0]
    found: dict[tuple[str, str | None], dict[int, Finding]] = {}
    for rank, theirs in enumerate(everyone):
        for each in theirs:
            found.setdefault((each.rule, each.layer), {}).setdefault(rank, each)
    return [_where_found(by_rank, len(everyone)) for by_rank in found.values()]


def _where_found(by_rank: dict[int, Finding], processes: int) -> Finding:
    first = by_rank[min(by_rank)]
    if len(by_rank) == processes:
        return first
    ranks = ", ".join(map(str, sorted(by_rank)))
    return replace(first, message=f"in process {ranks} of {processes}: {first.message}")
