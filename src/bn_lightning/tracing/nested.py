"""Walk the tensors in whatever a forward pass takes or returns."""

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from torch import Tensor

__all__ = ["iter_leaves", "iter_tensors", "map_leaves", "map_tensors"]

_Leaf = TypeVar("_Leaf")


def iter_tensors(tree: Any) -> Iterator[Tensor]:
    """Yield every tensor in nested tuples, lists, sets, mappings, slices and dataclasses, in order.

    Example:
        >>> import torch
        >>> [tensor.shape[0] for tensor in iter_tensors({"a": torch.ones(1), "b": (torch.ones(2), 3)})]
        [1, 2]
    """
    return iter_leaves(tree, Tensor)


def iter_leaves(tree: Any, kind: type[_Leaf]) -> Iterator[_Leaf]:
    """Yield every object of one kind in nested tuples, lists, sets, mappings, slices and dataclasses, in order."""
    if isinstance(tree, kind):
        yield tree
    elif isinstance(tree, Mapping):
        yield from iter_leaves(tuple(tree.values()), kind)
    elif isinstance(tree, tuple | list | set | frozenset):
        for branch in tree:
            yield from iter_leaves(branch, kind)
    elif isinstance(tree, slice):
        yield from iter_leaves((tree.start, tree.stop, tree.step), kind)
    elif is_dataclass(tree) and not isinstance(tree, type):
        yield from iter_leaves(tuple(getattr(tree, field.name) for field in fields(tree)), kind)


def map_tensors(tree: Any, change: Callable[[Tensor], Any]) -> Any:
    """Rebuild nested tuples, lists, dicts and dataclasses with every tensor changed; the rest stays the same.

    Example:
        >>> import torch
        >>> map_tensors((torch.ones(2), [torch.zeros(1), "x"]), lambda tensor: tensor.sum().item())
        (2.0, [0.0, 'x'])
    """
    return map_leaves(tree, Tensor, change)


def map_leaves(tree: Any, kind: type[_Leaf], change: Callable[[_Leaf], Any]) -> Any:
    """Rebuild nested tuples, lists, mappings and dataclasses with every object of one kind changed.

    What holds none of them stays the very object.
    """
    if isinstance(tree, kind):
        return change(tree)
    if next(iter_leaves(tree, kind), None) is None:
        return tree
    if is_dataclass(tree):
        return _copied(tree, {each.name: map_leaves(getattr(tree, each.name), kind, change) for each in fields(tree)})
    if isinstance(tree, tuple):
        branches = [map_leaves(branch, kind, change) for branch in tree]
        return type(tree)(*branches) if hasattr(tree, "_fields") else tuple(branches)
    if isinstance(tree, list):
        return [map_leaves(branch, kind, change) for branch in tree]
    if isinstance(tree, MutableMapping):
        made = copy.copy(tree)
        made.update({key: map_leaves(branch, kind, change) for key, branch in tree.items()})
        return made
    if isinstance(tree, Mapping):
        return {key: map_leaves(branch, kind, change) for key, branch in tree.items()}
    return tree


def _copied(original: Any, values: dict[str, Any]) -> Any:
    """Copy a dataclass without its constructor, which may take something else and compute the fields."""
    made = copy.copy(original)
    for name, value in values.items():
        object.__setattr__(made, name, value)
    return made
