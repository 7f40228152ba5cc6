"""Per-channel statistics of some positions of a batch, by weighted sums."""

from typing import Any

import torch
from torch import Tensor

from bn_lightning.functional.normalize import normalize

__all__ = ["masked_statistics"]


def masked_statistics(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Measure each channel's mean and variance (correction=0) over the valid positions; gradients flow through both.

    With n valid positions, mean = Σ m·x / n and variance = Σ m·(x − mean)² / n: every sum runs over all positions, so
    that nothing is gathered and no shape depends on the mask. Half precision is measured in float32. Where no position
    is valid the statistics are NaN. Invalid positions weigh zero, but have to be finite: zero times NaN is NaN.

    Args:
        x: The batch.
        mask: ``True`` marks the valid positions, of all channels alike.

    Returns:
        Mean, variance, and the number of valid positions (a tensor without axes, of the statistics' dtype).

    Shape:
        ``x``: (N, C, *); ``mask``: (N, 1, *), bool. Results: (C,), (C,), ().

    Example:
        >>> x, mask = torch.tensor([[[1.0, 3.0, 9.0]]]), torch.tensor([[[True, True, False]]])
        >>> masked_statistics(x, mask)
        (tensor([2.]), tensor([1.]), tensor(2.))
    """
    count = mask.sum().to(torch.promote_types(x.dtype, torch.float32))
    mean, var = _MaskedStatistics.apply(x, mask, count)
    return mean, var, count


class _MaskedStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        shape, axes = (1, -1, *[1] * (x.dim() - 2)), [axis for axis in range(x.dim()) if axis != 1]
        # Products with floats: selecting by booleans costs eight times as much on a CPU. One temporary for all.
        weights = mask.to(count.dtype)
        products = x * weights
        near = products.sum(axes) / count
        # Centred before it is squared, and the mean corrected by what is left of it: exact at a large mean.
        deviations = torch.sub(x, near.view(shape), out=products).mul_(weights)
        rest = deviations.sum(axes) / count
        mean = near + rest
        var = deviations.mul_(deviations).sum(axes) / count - rest.square()
        ctx.save_for_backward(x, mask, count, mean)
        return mean, var

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor) -> tuple[Tensor, None, None]:
        x, mask, count, mean = ctx.saved_tensors
        # dx = m·(grad_mean + 2·grad_var·(x − mean))/n: but for the mask an affine map of each channel.
        grad = normalize(x, mean, torch.ones_like(mean), grad_var * 2 / count, grad_mean / count, 0.0)
        return grad.mul_(mask.to(grad.dtype)), None, None
