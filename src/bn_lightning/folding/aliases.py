"""What goes wrong in memory when layers that made new tensors no longer do."""

from collections.abc import Iterator, Mapping
from itertools import product

from bn_lightning.folding.norms import Norm
from bn_lightning.folding.reasons import Kept
from bn_lightning.tracing.record import ForwardRecord, Operation, Value

__all__ = ["Aliases"]

# Autograd refuses a write to one of several views, and to what a function keeps; nothing writes to an expanded tensor.
_UNWRITABLE = frozenset({"split", "split_with_sizes", "chunk", "tensor_split", "unbind", "expand", "expand_as", "amax"})
# They copy or return a view, as the layout of their input has it: at a batch of one, or in channels_last, otherwise.
_COPIES_IF_NEEDED = frozenset(
    {"contiguous", "reshape", "reshape_as", "flatten", "to", "type", "type_as", "float", "double", "half", "bfloat16"}
)
# They need the layout that a BatchNorm layer gives its output.
_BY_LAYOUT = frozenset({"view", "view_as", "as_strided"})


class Aliases:
    """Which values come to lie in one memory as layers are left out.

    A BatchNorm layer writes its output to memory of its own; once it is gone, its output is its very input. Whoever
    wrote to the one in place then writes to the other, too.

    Args:
        record: The recorded forward pass.
    """

    def __init__(self, record: ForwardRecord) -> None:
        self._record = record
        # Memory to those that may be the same one.
        self._classes: dict[int, frozenset[int]] = {}
        self._values: dict[int, list[int]] = {}
        for value in record.values:
            self._values.setdefault(value.memory, []).append(value.index)
        self._writers: dict[int, list[int]] = {}
        for operation in record.operations:
            for memory in operation.overwrites:
                self._writers.setdefault(memory, []).append(operation.index)
            if operation.function in _COPIES_IF_NEEDED:
                for given, made in product(operation.inputs, operation.outputs):
                    self._classes.update(self._united(given, made))

    def conflict(self, norm: Norm) -> Kept | None:
        """Say what would go wrong if a layer were left out, too."""
        for joined in self._joined(norm).values():
            for memory in joined & self._writers.keys():
                for writer in self._writers[memory]:
                    kept = self._seen(writer, joined - self._class_of(memory))
                    if kept:
                        return kept
        return self._wrong_layout(norm)

    def leave_out(self, norm: Norm) -> None:
        """Note that a layer is left out."""
        self._classes.update(self._joined(norm))

    def _joined(self, norm: Norm) -> dict[int, frozenset[int]]:
        """Tell for each memory of a layer's calls what may lie in it without the layer."""
        joined: dict[int, frozenset[int]] = {}
        for call in norm.calls:
            joined.update(self._united(call.input, call.output, joined))
        return joined

    def _united(
        self, one: int, other: int, known: Mapping[int, frozenset[int]] | None = None
    ) -> dict[int, frozenset[int]]:
        """Tell what may lie in one memory if two values do."""
        ends = [self._record.values[index].memory for index in (one, other)]
        if min(ends) < 0:
            return {}
        united = frozenset().union(*((known or {}).get(end) or self._class_of(end) for end in ends))
        return dict.fromkeys(united, united)

    def _class_of(self, memory: int) -> frozenset[int]:
        return self._classes.get(memory) or frozenset({memory})

    def _seen(self, writer: int, memories: frozenset[int]) -> Kept | None:
        """Find who would see what an operation writes in place, and did not while the memories were apart."""
        operation = self._record.operations[writer]
        for index in (index for memory in memories for index in self._values[memory]):
            maker = self._record.producer(index)
            if maker is not None and maker.index > writer:
                continue  # made of what was written
            later = [reader for reader in self._record.readers(index) if reader.index > writer]
            if later:
                return Kept("overwritten", f"{operation} would overwrite the output of {maker}, which {later[0]} reads")
            if maker is not None and maker.function in _UNWRITABLE:
                return Kept(
                    "overwritten", f"{operation} would write to the output of {maker}, which is no tensor of its own"
                )
        return None

    def _wrong_layout(self, norm: Norm) -> Kept | None:
        for call in norm.calls:
            given, made = (self._record.values[index] for index in (call.input, call.output))
            maker = self._record.producer(self._values[given.memory][0])  # of which the input may be a view
            if _strides(given) == _strides(made) and maker is not None and _makes_a_standard_layout(maker):
                continue
            for reader in self._views(made.memory):
                return Kept("layout", f"{reader} needs the memory layout that the layer gives its output")
        return None

    def _views(self, memory: int) -> Iterator[str]:
        for index in self._values.get(memory, []):
            yield from (str(each) for each in self._record.readers(index) if each.function in _BY_LAYOUT)


def _strides(value: Value) -> list[int]:
    """Strides that matter: along an axis of size 1 any will do."""
    return [stride for size, stride in zip(value.shape, value.strides, strict=True) if size != 1]


def _makes_a_standard_layout(maker: Operation) -> bool:
    """Whether a new tensor comes of it, laid out as BatchNorm's output; a ReLU, say, keeps any layout of its input."""
    return maker.kind != "other" or maker.function == "cat" or "pool" in maker.function
