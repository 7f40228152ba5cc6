"""What a callback may know of a batch without asking."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["as_collected", "input_of", "of_the_loader"]


def input_of(batch: Any) -> Tensor | None:
    """Return a batch's input: the batch itself, or the first element of a tuple or list; ``None`` if that is no tensor.

    Example:
        >>> import torch
        >>> input_of((torch.tensor(1.0), "a label"))
        tensor(1.)
    """
    x = batch[0] if isinstance(batch, tuple | list) and batch else batch
    return x if isinstance(x, Tensor) else None


def as_collected(loaders: Any, batch: Any) -> Any:
    """Put a batch of the only loader into what the Trainer's loaders are collected in, as ``training_step`` gets it.

    Args:
        loaders: What the Trainer was given: a loader, or a list, tuple or dict with one in it.
        batch: As the loader gives it.

    Example:
        >>> as_collected(["a loader"], "a batch"), as_collected({"photos": "a loader"}, "a batch")
        (['a batch'], {'photos': 'a batch'})
    """
    if isinstance(loaders, Mapping):
        return {key: as_collected(inner, batch) for key, inner in loaders.items()}
    if isinstance(loaders, list | tuple):
        return type(loaders)(as_collected(inner, batch) for inner in loaders)
    return batch


def of_the_loader(loaders: Any, batch: Any) -> Any:
    """Take the batch of the only loader out again; one that a hook of the module has unpacked comes back as it is.

    Example:
        >>> of_the_loader({"photos": ["a loader"]}, {"photos": ["a batch"]})
        'a batch'
    """
    if isinstance(loaders, Mapping) and isinstance(batch, Mapping):
        inner = [(each, batch[key]) for key, each in loaders.items() if key in batch]
    elif isinstance(loaders, list | tuple) and isinstance(batch, list | tuple):
        inner = list(zip(loaders, batch, strict=False))
    else:
        return batch
    return of_the_loader(*inner[0]) if len(inner) == 1 else batch
