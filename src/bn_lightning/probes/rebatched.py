"""The same examples in batches of another size."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from bn_lightning.errors import BatchNormError
from bn_lightning.recalibration.batches import checked_batches
from bn_lightning.tracing.nested import iter_tensors, map_tensors

__all__ = ["Examples"]


class Examples:
    """The examples of some batches, every tensor of which has one entry an example along its first axis.

    Args:
        batches: All of one structure.
        max_batches: At most so many are kept.

    Raises:
        BatchNormError: If there is none, or they cannot be put together.

    Example:
        >>> examples = Examples([(torch.arange(3), torch.zeros(3)), (torch.arange(3, 5), torch.ones(2))], 10)
        >>> [batch[0].tolist() for batch in examples.in_order(2)]
        [[0, 1], [2, 3]]
    """

    def __init__(self, batches: Iterable[Any], max_batches: int) -> None:
        kept = list(islice(checked_batches(batches, max_batches), max_batches))
        self._template = kept[0] if kept else None
        try:
            columns = list(zip(*(list(iter_tensors(batch)) for batch in kept), strict=True))
            self._columns = [torch.cat(column) for column in columns]
        except (ValueError, RuntimeError) as error:
            raise BatchNormError(f"the batches' tensors cannot be put together: {error}.") from error
        lengths = {len(column) for column in self._columns}
        if len(lengths) != 1:
            raise BatchNormError(
                f"expected batches of tensors with one entry an example along their first axis, got {len(kept)} "
                f"batches whose tensors together have {sorted(lengths) or 'no'} entries."
            )
        (self.count,) = lengths

    def in_order(self, size: int) -> Iterator[Any]:
        """Go through all examples once; what is left at the end, fewer than ``size``, is left out."""
        for first in range(0, self.count - size + 1, size):
            yield self._batch(torch.arange(first, first + size))

    def drawn(self, size: int, number: int, seed: int) -> Iterator[Any]:
        """Draw batches at random, the examples of each without repetition."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(number):
            yield self._batch(torch.randperm(self.count, generator=generator)[:size])

    def _batch(self, places: Tensor) -> Any:
        columns = iter([column[places.to(column.device)] for column in self._columns])
        return map_tensors(self._template, lambda _: next(columns))
