"""The statistics of the batches of a training step, recovered from the change of the running ones."""

import torch
from torch import Tensor

__all__ = ["recover_batch_statistics", "update_weight"]


def update_weight(momentum: Tensor, updates: Tensor, total: Tensor) -> Tensor:
    """Return the share that the last updates have in a running average.

    ``1 - (1 - momentum)^updates``; where ``momentum`` is NaN the average is cumulative and the share
    ``updates / total``.

    Args:
        momentum: Weight of the new batch.
        updates: How many there were.
        total: How many there have been in all.

    Shape:
        All (*), the same.

    Example:
        >>> nan = float("nan")
        >>> update_weight(torch.tensor([0.1, 0.1, nan]), torch.tensor([1, 2, 1]), torch.tensor([9, 9, 4]))
        tensor([0.1000, 0.1900, 0.2500])
    """
    exponential = -torch.expm1(updates * torch.log1p(-momentum))
    exponential = torch.where(updates > 0, exponential, 0.0)  # also for a momentum of 1, where 0 times -inf is NaN
    cumulative = updates.to(momentum.dtype) / total.clamp(min=1)
    return torch.where(momentum.isnan(), cumulative, exponential)


def recover_batch_statistics(
    before: Tensor, after: Tensor, weight: Tensor, updates: Tensor, *, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute what a running average was moved by: ``before + (after - before) / weight``.

    Of several updates it is their average, the later ones weighing more, as in the running average itself.
    The running average is stored with a rounding each update, which the division makes larger by ``1 / weight``.

    Args:
        before: Running statistics before the step.
        after: The same after it.
        weight: Share of the step's updates in ``after``, as by `update_weight`.
        updates: How many there were.
        eps: Distance of 1 to the next number in the dtype of the running statistics.

    Returns:
        The batch statistics, NaN where there was no update, and their resolution: the most by which rounding can have
        put them off, in the same unit.

    Shape:
        All (*), broadcast together.

    Example:
        >>> before, after = torch.tensor([0.0]), torch.tensor([0.5])
        >>> value, resolution = recover_batch_statistics(
        ...     before, after, torch.tensor([0.1]), torch.tensor([1]), eps=1e-7)
        >>> value, bool(resolution < 2e-6)
        (tensor([5.]), True)
    """
    value = before + (after - before) / weight
    # Three roundings an update at most: of momentum times the batch's, of the rest, and of their sum.
    resolution = 2 * eps * updates * torch.maximum(before.abs(), after.abs()) / weight
    moved = weight > 0
    return torch.where(moved, value, torch.nan), torch.where(moved, resolution, torch.nan)
