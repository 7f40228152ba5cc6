"""Pool the channels of many layers at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bn_lightning.functional.activation import Row, empty_statistics

__all__ = ["add_groups", "pool_groups"]


def pool_groups(block: Tensor, widths: Sequence[int]) -> Tensor:
    """Merge neighbouring columns of a block of statistics, group by group, by Chan's formula.

    The same as `pool_statistics` on each group, at the cost of one.

    Args:
        block: Statistics in the rows of `Row`; empty columns are neutral.
        widths: How many columns belong to each group; a group of none is an empty sample.

    Shape:
        ``block``: (7, sum of ``widths``). Result: (7, G).

    Example:
        >>> from bn_lightning.functional.activation import activation_statistics
        >>> block = activation_statistics(torch.tensor([[0.0, 4.0, 1.0]]))
        >>> pool_groups(block, [2, 1])[:3].tolist()
        [[2.0, 1.0], [2.0, 1.0], [8.0, 0.0]]

    Reference:
        Chan, Golub & LeVeque, The American Statistician 37(3), 1983, eq. 2.1.
    """
    owner = _owner(block, widths)
    count = block[Row.COUNT]
    total = add_groups(count, widths)
    mean = add_groups(block[Row.MEAN] * (count / total.clamp(min=1)[owner]), widths)
    between = count * (block[Row.MEAN] - mean[owner]).square()
    pooled = empty_statistics(len(widths), device=block.device, dtype=block.dtype)
    pooled[Row.COUNT], pooled[Row.MEAN] = total, mean
    pooled[Row.M2] = add_groups(block[Row.M2] + between, widths)
    pooled[Row.MIN].scatter_reduce_(0, owner, block[Row.MIN], "amin")
    pooled[Row.MAX].scatter_reduce_(0, owner, block[Row.MAX], "amax")
    pooled[Row.ZEROS] = add_groups(block[Row.ZEROS], widths)
    pooled[Row.NONFINITE] = add_groups(block[Row.NONFINITE], widths)
    return pooled


def add_groups(values: Tensor, widths: Sequence[int]) -> Tensor:
    """Add up neighbouring values, group by group: (sum of ``widths``) to (G,)."""
    return values.new_zeros(len(widths)).index_add_(0, _owner(values, widths), values)


def _owner(values: Tensor, widths: Sequence[int]) -> Tensor:
    groups = torch.arange(len(widths), device=values.device)
    return groups.repeat_interleave(torch.tensor(widths, dtype=torch.int64, device=values.device))
