"""Which tensors lie in the same memory."""

import weakref

from torch import Tensor

__all__ = ["Memories"]


class Memories:
    """Numbers for the memories of tensors: the same for views of one another, another once it was freed.

    Example:
        >>> import torch
        >>> memories, x = Memories(), torch.ones(4)
        >>> memories.number(x) == memories.number(x[2:]), memories.number(x) == memories.number(x.clone())
        (True, False)
    """

    def __init__(self) -> None:
        # Address → the number of what lies there now, and the tensors that keep it there.
        self._known: dict[int, tuple[int, list[weakref.ref[Tensor]]]] = {}
        self._next = 0

    def number(self, tensor: Tensor) -> int:
        """Return the number of a tensor's memory; −1 if it has none that can be told (sparse, under torch.vmap)."""
        try:
            address = tensor.untyped_storage().data_ptr()
        except (RuntimeError, NotImplementedError):
            return -1
        if not address:
            return -1
        number, holders = self._known.get(address, (-1, []))
        if not any(holder() is not None for holder in holders):  # freed, and now another's
            number, holders = self._next, []
            self._next += 1
        holders.append(weakref.ref(tensor))
        self._known[address] = (number, holders)
        return number

    def clear(self) -> None:
        """Forget all tensors; no number is given again."""
        self._known.clear()
