"""Follow channels through a recorded forward pass, up to where they are made or down to where they are read."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bn_lightning.tracing.passing import ABSENT, Passing, Terms, replay
from bn_lightning.tracing.record import ForwardRecord, Operation

__all__ = ["Bypass", "Cone", "channel_axis", "channel_origins", "compact", "tagged"]


@dataclass(frozen=True, slots=True)
class Bypass:
    """A call of a layer that gives each channel its own scale and shift, and may be looked through once it is gone.

    Attributes:
        input: The value it reads.
        output: The value it makes.
        operations: Indices of the operations it consists of.
    """

    input: int
    output: int
    operations: frozenset[int]


class Cone:
    """The values between some makers of channels and some readers, and the operations that pass them on.

    Args:
        record: The recorded forward pass.
        bypasses: Calls that are looked through, as if they were not there.
        makers: Values at which climbing ends, even if the operation that made them passes channels on.

    Attributes:
        values: All values in it.
        operations: Those that pass channels on inside it, by their index.
        linked: The outputs in it of layers that are looked through.
        sources: Values it was climbed up to, whose makers pass nothing on.
        readers: What reads its values otherwise than by passing them on, with the value, where it was descended.
        terms: For each value the tags that `carry` found.
    """

    def __init__(self, record: ForwardRecord, bypasses: Iterable[Bypass] = (), makers: Iterable[int] = ()) -> None:
        self.record = record
        self._makers = frozenset(makers)
        self._links = {each.output: each.input for each in bypasses}
        self._behind = {(each.input, index): each.output for each in bypasses for index in each.operations}
        self.values: set[int] = set()
        self.operations: dict[int, Operation] = {}
        self.linked: set[int] = set()
        self.sources: list[int] = []
        self.readers: list[tuple[Operation, int]] = []
        self.terms: dict[int, Terms] = {}

    def climb(self, value: int) -> None:
        """Add a value and all it is made of, up to the sources."""
        waiting = [value]
        while waiting:
            index = waiting.pop()
            if index in self.values:
                continue
            self.values.add(index)
            maker = self.record.producer(index)
            if index in self._links:
                self.linked.add(index)
                waiting.append(self._links[index])
            elif maker is None or maker.passing is None or index in self._makers:
                self.sources.append(index)
            else:
                self.operations[maker.index] = maker
                waiting += maker.inputs

    def descend(self, value: int) -> None:
        """Add a value and all that is made of it by passing it on; a sum ends it, since it mixes in something else."""
        waiting = [value]
        while waiting:
            index = waiting.pop()
            if index in self.values:
                continue
            self.values.add(index)
            for reader in self.record.readers(index):
                behind = self._behind.get((index, reader.index))
                if behind is not None:
                    self.linked.add(behind)
                    waiting.append(behind)
                elif reader.passing is None or reader.passing.kind == "sum":
                    self.readers.append((reader, index))
                else:
                    self.operations[reader.index] = reader
                    waiting += reader.outputs

    def carry(self, terms: Mapping[int, Terms]) -> Operation | None:
        """Carry tags through the cone; a value from outside carries none.

        Returns:
            An operation that does not pass channels on after all, if there is one.
        """
        self.terms = dict(terms)
        steps: list[tuple[int, Operation | int]] = list(self.operations.items())
        for made in self.linked:
            maker = self.record.producer(made)
            assert maker is not None
            steps.append((maker.index, made))
        for _, step in sorted(steps, key=lambda each: each[0]):
            if isinstance(step, int):
                self.terms[step] = self.terms[self._links[step]]
                continue
            assert step.passing is not None
            for index in step.inputs:
                if index not in self.terms:
                    self.terms[index] = (_filled(self.record.values[index].shape, ABSENT),)
            found = replay(step.passing, self.terms, lambda index: self.record.values[index].shape)
            if found is None or len(found) != len(step.outputs):
                return step
            if any(f[0].shape != self.record.values[i].shape for i, f in zip(step.outputs, found, strict=True)):
                return step
            self.terms.update(zip(step.outputs, found, strict=True))
        return None

    def passed_by(self, chosen: Callable[[Passing], bool]) -> set[int]:
        """Return the tags of what some of its operations made."""
        found = [
            compact(term).flatten().unique()
            for operation in self.operations.values()
            if operation.passing is not None and chosen(operation.passing)
            for output in operation.outputs
            for term in self.terms[output]
        ]
        return {int(tag) for tags in found for tag in tags if tag >= 0}


def tagged(shape: tuple[int, ...], axis: int, first: int) -> Terms:
    """Tag each channel with a number, from ``first`` on; it takes no memory, whatever the shape."""
    tags = torch.arange(first, first + shape[axis], dtype=torch.float64)
    return (tags.view([-1 if each == axis % len(shape) else 1 for each in range(len(shape))]).expand(shape),)


def compact(tags: Tensor) -> Tensor:
    """Leave out axes along which nothing changes, at no cost."""
    for axis, stride in enumerate(tags.stride()):
        if stride == 0 and tags.shape[axis] > 1:
            tags = tags.narrow(axis, 0, 1)
    return tags


def channel_axis(operation: Operation, dims: int, weight_dims: int) -> int:
    """Return the axis of a convolution's or linear layer's channels in a value of ``dims`` axes."""
    return dims - 1 if operation.kind == "linear" else dims - weight_dims + 1


def channel_origins(record: ForwardRecord, value: int, axis: int = 1) -> list[frozenset[tuple[int, int]] | None]:
    """Tell which channels of which operations each channel of a value carries.

    Reshaping, transposing, splitting, concatenating, shuffling, pooling, padding, adding and dropout in evaluation
    are looked through; anything else makes new channels, along its own axis 1 (a linear layer's along the last).

    Args:
        record: From `record_forward`.
        value: Index of the value.
        axis: Along which its channels lie.

    Returns:
        For each index along the axis the pairs of operation index and channel that were added into it, or ``None``
        where there is something else: channels mixed together, zeros of a padding, a value from outside.

    Example:
        >>> from bn_lightning import record_forward
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 1), torch.nn.ChannelShuffle(2)).eval()
        >>> record = record_forward(net, torch.zeros(1, 1, 2, 2))
        >>> [set(origin) for origin in channel_origins(record, record.operations[-1].outputs[0])]
        [{(0, 0)}, {(0, 2)}, {(0, 1)}, {(0, 3)}]
    """
    cone = Cone(record)
    cone.climb(value)
    names: list[tuple[int, int]] = []
    terms: dict[int, Terms] = {}
    for source in cone.sources:
        maker, shape = record.producer(source), record.values[source].shape
        if maker is not None and len(shape) > 1:
            own = len(shape) - 1 if maker.kind == "linear" else 1
            terms[source] = tagged(shape, own, len(names))
            names += [(maker.index, channel) for channel in range(shape[own])]
        else:
            terms[source] = (_filled(shape, ABSENT),)
    if cone.carry(terms) is not None:
        return [None] * record.values[value].shape[axis]
    origins: list[frozenset[tuple[int, int]] | None] = []
    for channel in range(record.values[value].shape[axis]):
        found = [set(compact(term.select(axis, channel)).flatten().tolist()) for term in cone.terms[value]]
        whole = all(len(each) == 1 and min(each) >= 0 for each in found)
        origins.append(frozenset(names[int(tag)] for each in found for tag in each) if whole else None)
    return origins


def _filled(shape: tuple[int, ...], tag: float) -> Tensor:
    return torch.tensor(tag, dtype=torch.float64).expand(shape)
