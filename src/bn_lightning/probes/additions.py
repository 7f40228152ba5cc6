"""The additions of a residual network in a recorded forward pass: which side is the skip, which the branch."""

from collections.abc import Container, Iterator
from dataclasses import dataclass
from heapq import heappop, heappush

from bn_lightning.tracing import ForwardRecord, Operation

__all__ = ["Addition", "Undecided", "residual_additions"]

_SUMS = frozenset({"add", "add_", "iadd", "radd"})
_LAYERS = frozenset({"conv", "conv_transpose", "linear"})


@dataclass(frozen=True, slots=True)
class Addition:
    """One x + f(x).

    Attributes:
        operation: Index of the addition in the record.
        module: Name of the module whose forward adds.
        skip: Value on the skip side, x or a projection of it.
        branch: Value on the side of f.
    """

    operation: int
    module: str
    skip: int
    branch: int


@dataclass(frozen=True, slots=True)
class Undecided:
    """An addition of two values that come from one, neither of which is the skip.

    Attributes:
        module: Name of the module whose forward adds.
        reason: Why.
    """

    module: str
    reason: str


def residual_additions(
    record: ForwardRecord, apart: Container[str] = ()
) -> tuple[tuple[Addition, ...], tuple[Undecided, ...]]:
    """Find the additions of two values of one shape, at least two axes, that were made from the same value.

    From the nearest such value on, the side that passes fewer convolutions and linear layers is the skip, or with as
    many of them fewer operations: x itself, or a projection of it.

    Args:
        record: Of one forward pass.
        apart: Names of modules whose own additions do not count, such as a normalization's.

    Returns:
        The additions in execution order, and those whose sides are alike.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from bn_lightning.tracing import record_forward
        >>> class Block(nn.Linear):
        ...     def forward(self, x):
        ...         return super().forward(x) + x
        >>> record = record_forward(nn.Sequential(Block(2, 2)), torch.zeros(1, 2))
        >>> [(found.module, record.producer(found.branch).function) for found in residual_additions(record)[0]]
        [('0', 'linear')]
    """
    found: list[Addition] = []
    undecided: list[Undecided] = []
    for operation in record.operations:
        if operation.function not in _SUMS or operation.module in apart or len(operation.inputs) != 2:
            continue
        one, other = operation.inputs
        shape = record.values[one].shape
        if len(shape) < 2 or shape != record.values[other].shape:
            continue
        source = _nearest_common(record, one, other)
        if source is None:
            continue
        depths = [_deepest(record, source, end) for end in (one, other)]
        if depths[0] == depths[1]:
            undecided.append(Undecided(operation.module, f"its two sides pass {_said(depths[0])} alike"))
            continue
        skip, branch = (one, other) if depths[0] < depths[1] else (other, one)
        found.append(Addition(operation.index, operation.module, skip, branch))
    return tuple(found), tuple(undecided)


def _nearest_common(record: ForwardRecord, one: int, other: int) -> int | None:
    """Find the last value before which both come, going back from both; either may be it."""
    reached = {one: {0}, other: {1}}
    pending = sorted((-one, -other))
    while pending:
        value = -heappop(pending)  # the latest first: what comes before it has a smaller index
        sides = reached.pop(value)
        if len(sides) == 2:
            return value
        for before in _before(record, value):
            if before not in reached:
                reached[before] = set()
                heappush(pending, -before)
            reached[before] |= sides
    return None


def _deepest(record: ForwardRecord, source: int, end: int) -> tuple[int, int]:
    """Count layers, then operations, on the longest way from one value to a later one."""
    known: dict[int, tuple[int, int] | None] = {source: (0, 0)}
    pending = [end]
    while pending:
        value = pending[-1]
        before = [each for each in _before(record, value) if each >= source] if value not in known else []
        missing = [each for each in before if each not in known]
        if missing:
            pending += missing
            continue
        pending.pop()
        ways = [way for each in before if (way := known[each]) is not None]
        if value not in known:
            operation = record.producer(value)
            known[value] = None
            if ways and operation is not None:
                layers, operations = max(ways)
                known[value] = layers + (operation.kind in _LAYERS), operations + 1
    depth = known[end]
    assert depth is not None, "it was reached from there"
    return depth


def _before(record: ForwardRecord, value: int) -> Iterator[int]:
    operation: Operation | None = record.producer(value)
    yield from () if operation is None else (each for each in operation.inputs if each < value)


def _said(depth: tuple[int, int]) -> str:
    layers, operations = depth
    return f"{layers} layer{'' if layers == 1 else 's'} and {operations} operation{'' if operations == 1 else 's'}"
