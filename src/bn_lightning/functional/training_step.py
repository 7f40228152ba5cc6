"""One training step of plain Batch Normalization, as torch's layer takes it, without making the host wait."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bn_lightning.functional.normalize import batch_norm_with_statistics

__all__ = ["batch_norm_step"]


def batch_norm_step(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | None,
    eps: float,
) -> Tensor:
    """Normalize a batch by its own statistics, count it, and move the running statistics in place.

    Args:
        x: (N, C, *). An empty batch is counted and moves nothing.
        running_mean: (C,), or ``None`` to move nothing; a row of a larger tensor will do.
        running_var: (C,), or ``None``; moves towards the variance with correction=1.
        num_batches_tracked: 0-dimensional, or ``None``.
        weight: (C,), or ``None`` for ones.
        bias: (C,), or ``None`` for zeros.
        momentum: Weight of the new batch; ``None`` averages all batches alike, by a count that stays on its device.
        eps: Added to the variance.

    Example:
        >>> mean, var, count = torch.zeros(1), torch.ones(1), torch.tensor(0)
        >>> y = batch_norm_step(torch.tensor([[1.0], [3.0]]), mean, var, count, None, None, 0.1, 1e-5)
        >>> mean, var, count
        (tensor([0.2000]), tensor([1.1000]), tensor(1))
    """
    if running_mean is None or running_var is None or num_batches_tracked is None:
        return F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)
    num_batches_tracked.add_(1)
    if momentum is not None:
        return F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps)
    y, mean, var = batch_norm_with_statistics(x, weight, bias, eps)
    if x.numel():
        with torch.no_grad():
            share = num_batches_tracked.to(running_mean.dtype).reciprocal()
            running_mean.lerp_(mean.to(running_mean.dtype), share)
            running_var.lerp_(var.to(running_var.dtype), share)
    return y
