"""What a callback may know of a batch without asking."""

from typing import Any

from torch import Tensor

__all__ = ["input_of"]


def input_of(batch: Any) -> Tensor | None:
    """Return a batch's input: the batch itself, or the first element of a tuple or list; ``None`` if that is no tensor.

    Example:
        >>> import torch
        >>> input_of((torch.tensor(1.0), "a label"))
        tensor(1.)
    """
    x = batch[0] if isinstance(batch, tuple | list) and batch else batch
    return x if isinstance(x, Tensor) else None
