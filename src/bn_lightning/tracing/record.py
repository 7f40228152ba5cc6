"""What a recorded forward pass tells, as plain values."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest

import torch

from bn_lightning.reports.table import Cell, Table
from bn_lightning.reports.tabled import Tabled
from bn_lightning.tracing.passing import Passing

__all__ = ["DropoutUse", "ForwardRecord", "LayerUse", "ModuleCall", "Operation", "Value"]


@dataclass(frozen=True, slots=True)
class Value:
    """One tensor at one version: an operation in place makes a new value of the same tensor.

    Attributes:
        index: Its place in `ForwardRecord.values`.
        shape: Its shape when it was first seen.
        dtype: Its dtype.
        producer: Index of the operation that made it; ``None`` if it came from elsewhere (an input, a constant,
            a change through a view).
        readers: Indices of the operations that read it; reading its shape or dtype does not count.
        output: Whether the model returns it.
        escaped: Whether it outlived the forward pass in some other way, such as ``self.cache = value``.
        unseen: Kernels that read it behind the recorder's back (TorchScript, C++, ``torch.vmap``).
        memory: The same number for values that lie in the same memory, views of one another; −1 if unknown.
        strides: Of the tensor, in elements; empty where it has none (sparse).
    """

    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    producer: int | None
    readers: tuple[int, ...]
    output: bool
    escaped: bool
    unseen: tuple[str, ...]
    memory: int = -1
    strides: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class LayerUse:
    """How a convolution, linear or batch norm function was called.

    Attributes:
        input: The value it was applied to; ``None`` if that is a parameter or buffer of the model.
        tensors: For each tensor argument (``weight, bias, running_mean, running_var``) the qualified names under
            which the model owns that very tensor. Empty when the model does not own it, ``None`` when it was
            not given.
        groups: Of a convolution, else 1.
        training: Of a batch norm: whether it normalized by the batch's own statistics.
        eps: Of a batch norm, else 0.
        reads_padding: Of a convolution: whether some output takes in zeros from beyond its input.
    """

    input: int | None
    tensors: Mapping[str, tuple[str, ...] | None]
    groups: int = 1
    training: bool = False
    eps: float = 0.0
    reads_padding: bool = False

    def owners(self, role: str) -> tuple[str, ...]:
        """Name the modules that own the tensor in this role, the root module being ``""``."""
        return tuple(name.rpartition(".")[0] for name in self.tensors.get(role) or ())


@dataclass(frozen=True, slots=True)
class Operation:
    """One call of a torch function.

    Attributes:
        index: Its place in `ForwardRecord.operations`, which is execution order.
        call: Which of the example calls it belongs to.
        kind: ``conv, conv_transpose, linear, batch_norm`` or ``other``.
        function: The function's own name, such as ``conv2d`` or ``cat``.
        module: Qualified name of the module whose forward was running.
        inputs: Values it reads.
        outputs: Values it makes.
        layer: For every kind but ``other``.
        passing: For a function that passes channels on (moves, averages or adds values), how to repeat it.
        overwrites: The memory (`Value.memory`) that it writes to, operating in place.
    """

    index: int
    call: int
    kind: str
    function: str
    module: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    layer: LayerUse | None = None
    passing: Passing | None = field(default=None, repr=False)
    overwrites: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.function} in {self.module!r}" if self.module else self.function


@dataclass(frozen=True, slots=True)
class ModuleCall:
    """One call of a module.

    Attributes:
        module: Qualified name of the module.
        call: Which of the example calls it belongs to.
        first: Index of the first operation since it began.
        end: Index after the last operation before it returned.
        inputs: Values among its positional arguments.
        outputs: Values it returned.
        arguments: How many positional arguments it was given, tensors and others.
        parent: Place in `ForwardRecord.module_calls` of the call it was made from, ``None`` for the outermost.
    """

    module: str
    call: int
    first: int
    end: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    arguments: int
    parent: int | None


@dataclass(frozen=True, slots=True)
class DropoutUse:
    """One call of a dropout function, also one in evaluation mode, which gives back the very value and is no operation.

    Attributes:
        function: Its own name, such as ``dropout2d``.
        module: Qualified name of the module whose forward was running.
        call: Which of the example calls it belongs to.
        p: Probability of an element or channel to be dropped.
        input: The value it was given.
        output: The value it returned, in evaluation mode the same.
        end: Index after the last operation before it returned.
    """

    function: str
    module: str
    call: int
    p: float
    input: int
    output: int
    end: int


@dataclass(frozen=True, slots=True)
class ForwardRecord(Tabled):
    """Everything a forward pass did, over all example calls.

    Attributes:
        operations: In execution order.
        values: Every tensor that the operations made or read, parameters and buffers apart.
        tensor_reads: Qualified parameter or buffer name to the indices of the operations that read it.
        unseen_tensors: Names of parameters and buffers read behind the recorder's back, to the kernels that did.
        module_calls: In the order in which they began.
        dropouts: In execution order.
    """

    operations: tuple[Operation, ...]
    values: tuple[Value, ...]
    tensor_reads: Mapping[str, tuple[int, ...]] = field(repr=False)
    unseen_tensors: Mapping[str, tuple[str, ...]] = field(repr=False)
    module_calls: tuple[ModuleCall, ...] = field(default=(), repr=False)
    dropouts: tuple[DropoutUse, ...] = field(default=(), repr=False)

    def producer(self, value: int) -> Operation | None:
        """Return the operation that made a value, ``None`` for one that came from elsewhere."""
        index = self.values[value].producer
        return None if index is None else self.operations[index]

    def readers(self, value: int) -> tuple[Operation, ...]:
        """Return the operations that read a value, in execution order."""
        return tuple(self.operations[index] for index in self.values[value].readers)

    def tensor_readers(self, name: str) -> tuple[Operation, ...]:
        """Return the operations that read a parameter or buffer, by its qualified name."""
        return tuple(self.operations[index] for index in self.tensor_reads.get(name, ()))

    def of_kind(self, kind: str) -> tuple[Operation, ...]:
        """Return the operations of one kind, in execution order."""
        return tuple(operation for operation in self.operations if operation.kind == kind)

    def of_calls(self, number: int) -> "ForwardRecord":
        """Return the record of the first example calls alone."""
        operations = tuple(operation for operation in self.operations if operation.call < number)
        values = {index for operation in operations for index in (*operation.inputs, *operation.outputs)}
        end = len(operations)
        return ForwardRecord(
            operations,
            self.values[: max(values, default=-1) + 1],
            {name: tuple(index for index in readers if index < end) for name, readers in self.tensor_reads.items()},
            self.unseen_tensors,
            tuple(call for call in self.module_calls if call.call < number),
            tuple(dropout for dropout in self.dropouts if dropout.call < number),
        )

    @property
    def blind_spots(self) -> tuple[str, ...]:
        """What could not be seen, in words: one sentence each, none if everything was."""
        return tuple(_blind_spots(self))

    def table(self) -> Table:
        """One row an operation; below them what could not be seen."""
        calls = 1 + max((operation.call for operation in self.operations), default=0)
        return Table(
            f"{len(self.operations)} operations in {calls} forward {'pass' if calls == 1 else 'passes'}",
            ("#", "function", "module", "reads", "makes", "shape", "fate"),
            [self._row(operation) for operation in self.operations],
            notes=self.blind_spots,
        )

    def _row(self, operation: Operation) -> list[Cell]:
        made = [self.values[index] for index in operation.outputs]
        marks = {
            "output": any(value.output for value in made),
            "escaped": any(value.escaped for value in made),
            "read unseen": any(value.unseen for value in made),
        }
        return [
            operation.index,
            operation.function,
            operation.module or "(root)",
            " ".join(f"v{index}" for index in operation.inputs) or None,
            " ".join(f"v{value.index}" for value in made) or None,
            " ".join("×".join(map(str, value.shape)) or "scalar" for value in made) or None,
            ", ".join(mark for mark, applies in marks.items() if applies) or None,
        ]


# What turns a tensor into a number of Python's.
_TO_PYTHON = frozenset({"item", "tolist", "numpy", "bool", "int", "float", "index"})


def _blind_spots(record: ForwardRecord) -> Iterator[str]:
    for name, kernels in record.unseen_tensors.items():
        yield f"{name!r} is read by {kernels[0]} in code that cannot be recorded (TorchScript, C++, torch.vmap)."
    for value in record.values:
        made_by = (
            "a value from elsewhere" if value.producer is None else f"the output of {record.producer(value.index)}"
        )
        if value.unseen:
            yield f"v{value.index}, {made_by}, is read by {value.unseen[0]} in code that cannot be recorded."
        if value.escaped:
            yield f"v{value.index}, {made_by}, is kept somewhere after the forward pass."
    for operation in record.operations:
        roles = () if operation.layer is None else operation.layer.tensors.items()
        computed = [role for role, names in roles if names == ()]
        if computed:
            yield f"{operation} is given a {computed[0]} that is computed or lent, none of the model's own."
    read = [operation for operation in record.operations if operation.function in _TO_PYTHON and not operation.outputs]
    if read:
        again = f", and {len(read) - 1} times more" if len(read) > 1 else ""
        yield f"Python reads a value ({read[0]}{again}): what follows may differ for other values."
    yield from _divergences(record)


def _divergences(record: ForwardRecord) -> Iterator[str]:
    """Tell where an example call takes another way through the model than the first one."""
    calls: dict[int, list[Operation]] = {}
    for operation in record.operations:
        calls.setdefault(operation.call, []).append(operation)
    first = calls.pop(0, [])
    for number, operations in calls.items():
        for ours, theirs in zip_longest(first, operations):
            if ours is None or theirs is None or (ours.function, ours.module) != (theirs.function, theirs.module):
                yield (
                    f"Control flow differs between example calls: where the first runs {ours or 'nothing more'}, call "
                    f"{number + 1} runs {theirs or 'nothing more'}."
                )
                break
