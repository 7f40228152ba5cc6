"""Walk the tensors in whatever a forward pass takes or returns."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

__all__ = ["iter_tensors", "map_tensors"]


def iter_tensors(tree: Any) -> Iterator[Tensor]:
    """Yield every tensor in nested tuples, lists, sets, mappings, slices and dataclasses, in order.

    Example:
        >>> import torch
        >>> [tensor.shape[0] for tensor in iter_tensors({"a": torch.ones(1), "b": (torch.ones(2), 3)})]
        [1, 2]
    """
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        yield from iter_tensors(tuple(tree.values()))
    elif isinstance(tree, tuple | list | set | frozenset):
        for branch in tree:
            yield from iter_tensors(branch)
    elif isinstance(tree, slice):
        yield from iter_tensors((tree.start, tree.stop, tree.step))
    elif is_dataclass(tree) and not isinstance(tree, type):
        yield from iter_tensors(tuple(getattr(tree, field.name) for field in fields(tree)))


def map_tensors(tree: Any, change: Callable[[Tensor], Any]) -> Any:
    """Rebuild nested tuples, lists and dicts with every tensor changed; anything else stays the same object.

    Example:
        >>> import torch
        >>> map_tensors((torch.ones(2), [torch.zeros(1), "x"]), lambda tensor: tensor.sum().item())
        (2.0, [0.0, 'x'])
    """
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, tuple):
        branches = [map_tensors(branch, change) for branch in tree]
        return type(tree)(*branches) if hasattr(tree, "_fields") else tuple(branches)
    if isinstance(tree, list):
        return [map_tensors(branch, change) for branch in tree]
    if isinstance(tree, Mapping):
        return {key: map_tensors(branch, change) for key, branch in tree.items()}
    return tree
