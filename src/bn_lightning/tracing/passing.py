"""Functions that pass channels on: they move, average or add values, or take the largest, and so commute with a scale.

Which channel arrives where is found by repeating the recorded calls on tags, one number a channel, in the place of
values: one way for reshaping, transposing, splitting, concatenating, shuffling and pooling alike.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bn_lightning.tracing.layers import function_name
from bn_lightning.tracing.nested import iter_leaves, iter_tensors, map_leaves

__all__ = ["ABSENT", "MIXED", "ZERO", "Passing", "Terms", "ValueRef", "passing_kind", "replay"]

#: In the place of a channel's tag: nothing is added here, a constant zero, several channels mixed into one value.
ABSENT, ZERO, MIXED = -1.0, -2.0, -3.0

#: For each term of a sum, a float64 tensor of the value's shape that tells which channel stands in each place.
Terms = tuple[Tensor, ...]

# fmt: off
_MOVES = frozenset(
    {
        "view", "reshape", "flatten", "unflatten", "transpose", "swapaxes", "swapdims", "permute", "movedim",
        "moveaxis", "chunk", "split", "split_with_sizes", "tensor_split", "unbind", "getitem", "squeeze", "unsqueeze",
        "cat", "concat", "concatenate", "stack", "roll", "flip", "narrow", "select", "expand", "expand_as", "repeat",
        "repeat_interleave", "tile", "view_as", "reshape_as", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
        "native_channel_shuffle", "T", "mT", "pad",
    }
)
# A cast, a copy or a move to another device leaves every value in its place.
_SAME = frozenset(
    {"to", "float", "half", "double", "bfloat16", "type", "type_as", "contiguous", "clone", "detach", "alias", "cpu",
     "cuda"}
)
_AVERAGES = frozenset(
    {
        "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
        "mean", "interpolate", "upsample", "upsample_nearest", "upsample_bilinear",
    }
)
_LARGEST = frozenset(
    {"max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
     "amax"}
)
_SUMS = frozenset({"add", "add_", "iadd", "radd"})
# fmt: on
_KINDS = {
    **dict.fromkeys(_MOVES, "move"),
    **dict.fromkeys(_SAME, "same"),
    **dict.fromkeys(_AVERAGES, "average"),
    **dict.fromkeys(_LARGEST, "largest"),
    **dict.fromkeys(_SUMS, "sum"),
}


@dataclass(frozen=True, slots=True)
class ValueRef:
    """A recorded value in the place of the tensor that was given."""

    index: int


@dataclass(frozen=True, slots=True)
class Passing:
    """How to repeat a call on other tensors.

    Attributes:
        kind: ``move`` (each value goes to another place), ``same`` (to the same), ``average``, ``largest`` or ``sum``.
        function: The torch function.
        args: Its arguments, a `ValueRef` for each tensor.
        kwargs: Its keyword arguments, likewise.
    """

    kind: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def may_pad(self) -> bool:
        """Whether it puts zeros beside values; an amount of 0 here may be more for an input of another size."""
        if function_name(self.function) != "pad":
            return False
        given = {**dict(zip(("input", "pad", "mode", "value"), self.args, strict=False)), **self.kwargs}
        return given.get("mode", "constant") == "constant" and not all(amount < 0 for amount in given["pad"])

    def read(self) -> Iterator[int]:
        """Yield the values it reads, as often as it reads them."""
        yield from (reference.index for reference in iter_leaves((self.args, dict(self.kwargs)), ValueRef))


def passing_kind(function: Callable[..., Any]) -> str | None:
    """Tell how a torch function passes channels on; ``None`` if it does not.

    Example:
        >>> [passing_kind(each) for each in (torch.cat, torch.Tensor.add_, torch.relu)]
        ['move', 'sum', None]
    """
    return _KINDS.get(function_name(function))


def replay(
    passing: Passing, terms: Mapping[int, Terms], shape_of: Callable[[int], Sequence[int]]
) -> list[Terms] | None:
    """Repeat a call on channel tags in the place of values.

    Args:
        passing: The call.
        terms: The tags of the values it reads.
        shape_of: The shape of a value, for one that gives nothing but its shape.

    Returns:
        The tags of each tensor it returns; ``None`` if the call cannot be repeated.
    """
    try:
        if passing.kind == "same":
            return [terms[next(passing.read())]]
        if passing.kind == "sum":
            return _sum(passing, terms)
        number = max(len(terms[index]) for index in passing.read() if index in terms)
        outputs = [_repeat(passing, terms, shape_of, term) for term in range(number)]
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, NotImplementedError, StopIteration):
        return None
    return [tuple(each) for each in zip(*outputs, strict=True)]


def _sum(passing: Passing, terms: Mapping[int, Terms]) -> list[Terms] | None:
    if passing.kwargs:  # alpha=, out=
        return None
    added = [terms[index] for index in passing.read()]
    numbers = [value for value in passing.args if not isinstance(value, ValueRef)]
    if any(value != 0 for value in numbers):  # Python's own sum() begins with 0
        return None
    return [torch.broadcast_tensors(*(term for each in added for term in each))]


def _repeat(
    passing: Passing, terms: Mapping[int, Terms], shape_of: Callable[[int], Sequence[int]], term: int
) -> list[Tensor]:
    """Repeat a call on one term of each value; a value that has fewer adds nothing there."""
    given, named = _with_tagged_constants(passing)

    def call(change: Callable[[Tensor], Tensor]) -> list[Tensor]:
        def tags(reference: ValueRef) -> Tensor:
            if reference.index not in terms:
                return torch.zeros((), dtype=torch.float64).expand(*shape_of(reference.index))
            own = terms[reference.index]
            return change(own[term] if term < len(own) else torch.full_like(own[0], ABSENT))

        return list(iter_tensors(passing.function(*_filled(given, tags), **_filled(named, tags))))

    if passing.kind == "move":
        # A view takes contiguous tags: those that share one number along an axis have no layout to speak of.
        return call(torch.Tensor.contiguous)
    if passing.kind == "largest":
        highest, lowest = call(torch.Tensor.contiguous), call(torch.Tensor.neg)
        return [torch.where(a == -b, a, MIXED) for a, b in zip(highest, lowest, strict=True)]
    ones, means, squares = (call(change) for change in (torch.ones_like, torch.Tensor.contiguous, torch.Tensor.square))
    return [_averaged(*each) for each in zip(ones, means, squares, strict=True)]


def _averaged(ones: Tensor, means: Tensor, squares: Tensor) -> Tensor:
    """Keep a tag where nothing but its own places was averaged, with weights that add up to 1."""
    tag, close = means.round(), 1e-11
    exact = ((ones - 1).abs() <= close) & ((means - tag).abs() <= close * (1 + tag.abs()))
    exact &= (squares - tag.square()).abs() <= close * (1 + tag.square())
    return torch.where(exact, tag, MIXED)


def _with_tagged_constants(passing: Passing) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Give the arguments, those of a padding with a constant telling that there is one."""
    if function_name(passing.function) != "pad":
        return passing.args, passing.kwargs
    given = {**dict(zip(("input", "pad", "mode", "value"), passing.args, strict=False)), **passing.kwargs}
    if given.get("mode", "constant") != "constant":
        return passing.args, passing.kwargs
    return (given["input"], given["pad"]), {"value": MIXED if given.get("value") else ZERO}


def _filled(tree: Any, tags: Callable[[ValueRef], Tensor]) -> Any:
    return map_leaves(tree, ValueRef, tags)
