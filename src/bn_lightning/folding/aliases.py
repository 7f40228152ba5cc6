"""What goes wrong in memory when layers that made new tensors no longer do."""

from collections.abc import Iterator

from bn_lightning.folding.norms import Norm
from bn_lightning.folding.reasons import Kept
from bn_lightning.tracing.record import ForwardRecord

__all__ = ["Aliases"]

# Autograd refuses a write to one of several views, and to what a function keeps; nothing writes to an expanded tensor.
_UNWRITABLE = frozenset(
    {"split", "split_with_sizes", "chunk", "tensor_split", "unbind", "expand", "expand_as", "broadcast_to", "amax"}
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
        self._classes: dict[int, frozenset[int]] = {}
        self._values: dict[int, list[int]] = {}
        for value in record.values:
            self._values.setdefault(value.memory, []).append(value.index)
        self._writers: dict[int, list[int]] = {}
        for operation in record.operations:
            for memory in operation.overwrites:
                self._writers.setdefault(memory, []).append(operation.index)
        self._gone: set[int] = set()

    def conflict(self, norm: Norm) -> Kept | None:
        """Say what would go wrong if a layer were left out, too."""
        gone = self._gone | norm.operations
        for joined in self._joined(norm).values():
            for memory in joined & self._writers.keys():
                for writer in self._writers[memory]:
                    kept = self._seen(writer, joined - {memory}, gone)
                    if kept:
                        return kept
        return self._wrong_layout(norm)

    def leave_out(self, norm: Norm) -> None:
        """Note that a layer is left out."""
        self._classes.update(self._joined(norm))
        self._gone |= norm.operations

    def _joined(self, norm: Norm) -> dict[int, frozenset[int]]:
        """Tell for each memory of a layer's calls what lies in it without the layer."""
        joined: dict[int, frozenset[int]] = {}
        for call in norm.calls:
            ends = [self._record.values[index].memory for index in (call.input, call.output)]
            if min(ends) < 0:
                continue
            one, other = (joined.get(end) or self._classes.get(end) or frozenset({end}) for end in ends)
            joined.update(dict.fromkeys(one | other, one | other))
        return joined

    def _seen(self, writer: int, memories: frozenset[int], gone: set[int]) -> Kept | None:
        """Find who would see what an operation writes in place, and did not while the memories were apart."""
        operation = self._record.operations[writer]
        for index in (index for memory in memories for index in self._values[memory]):
            value, maker = self._record.values[index], self._record.producer(index)
            if maker is not None and maker.index > writer:
                continue  # made of what was written
            later = [reader for reader in self._record.readers(index) if reader.index > writer]
            later = [reader for reader in later if reader.index not in gone]
            if later:
                return Kept("overwritten", f"{operation} would overwrite the output of {maker}, which {later[0]} reads")
            if value.output or value.escaped:
                return Kept("overwritten", f"{operation} would overwrite the output of {maker}, which is kept")
            if maker is not None and maker.function in _UNWRITABLE:
                return Kept(
                    "overwritten", f"{operation} would write to the output of {maker}, which is no tensor of its own"
                )
        return None

    def _wrong_layout(self, norm: Norm) -> Kept | None:
        for call in norm.calls:
            given, made = (self._record.values[index] for index in (call.input, call.output))
            if given.strides == made.strides:
                continue
            for reader in self._views(made.memory):
                return Kept("layout", f"{reader} needs the memory layout that the layer gives its output")
        return None

    def _views(self, memory: int) -> Iterator[str]:
        for index in self._values.get(memory, []):
            yield from (str(each) for each in self._record.readers(index) if each.function in _BY_LAYOUT)
