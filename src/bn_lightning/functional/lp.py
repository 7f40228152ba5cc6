"""Per-channel mean and average Lp norm of a batch."""

import math
from typing import Any

import torch
from torch import Tensor

from bn_lightning.functional.normalize import channel_statistics, normalize

__all__ = ["lp_statistics"]


def lp_statistics(x: Tensor, p: float, *, centered: bool) -> tuple[Tensor, Tensor]:
    """Measure each channel's mean and squared average Lp norm s² in one batch; gradients flow through both.

    s = (mean |x|ᵖ)^(1/p), for p = ∞ the largest |x|; with ``centered`` of x − mean, so that s² is the variance
    (correction=0) for p = 2. Half precision is measured in float32. Where several values share the largest |x|, they
    share its gradient evenly; where |x| has no derivative, at 0, it counts as 0.

    Args:
        x: The batch.
        p: 1, 2 or ``math.inf``.
        centered: Whether the mean is taken off before the norm.

    Returns:
        Mean (activation units) and s² (activation units²).

    Shape:
        ``x``: (N, C, *). Results: (C,).

    Example:
        >>> lp_statistics(torch.tensor([[1.0], [-3.0]]), 1, centered=False)
        (tensor([-1.]), tensor([4.]))

    Reference:
        Santurkar et al., arXiv:1805.11604, §3.3.
    """
    if p == 2 and centered:
        return channel_statistics(x)
    mean, average = _LpStatistics.apply(x, p, centered)
    return mean, average if p == 2 else average.square()


class _LpStatistics(torch.autograd.Function):
    """Mean and s, or s² for p = 2 (uncentered), whose derivative exists at 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, centered: bool) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        axes = _all_but_channels(x)
        mean = x.mean(axes, dtype=wide)
        center = mean if centered else torch.zeros_like(mean)
        top = bottom = None
        if p == math.inf:
            # Nothing of x's size: the largest |x| is one of the two extremes.
            highest, lowest = _extremes(x)
            above, below = highest - center, center - lowest
            norm = torch.maximum(above, below)
            # An extreme that falls short of the norm gets no gradient: at infinity, no value is equal to it.
            top = torch.where(above == norm, highest.to(wide), math.inf)
            bottom = torch.where(below == norm, lowest.to(wide), -math.inf)
        elif p == 1:
            norm = ((x - _spread(center, x)).abs_() if centered else x.abs()).mean(axes, dtype=wide)
        else:
            norm = x.to(wide).square().mean(axes)
        ctx.save_for_backward(x, center, top, bottom)
        ctx.p, ctx.centered = p, centered
        return mean, norm

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_norm: Tensor) -> tuple[Tensor, None, None]:
        x, center, top, bottom = ctx.saved_tensors
        axes, count = _all_but_channels(x), x.numel() // max(x.shape[1], 1)
        if ctx.p == 2:  # ds² = 2·x·dx/n
            one_pass = normalize(x, center, torch.ones_like(center), grad_norm * 2 / count, grad_mean / count, 0.0)
            return one_pass, None, None
        # ds/dx is a sign divided by how many values share in s.
        if ctx.p == 1:
            signs = (x - _spread(center, x)).sign_()
            total, sharing = signs.sum(axes), count
        else:
            # 1 where x is the top, −1 where it is the bottom: by signs, as a comparison costs six times as much.
            signs = (x - _spread(top, x)).sign_().add_(1)
            tops = signs.sum(axes)
            negative = (x - _spread(bottom, x)).sign_().sub_(1)
            bottoms = -negative.sum(axes)
            signs.add_(negative)
            total, sharing = tops - bottoms, tops + bottoms
        gain = grad_norm / sharing
        # With ``centered`` the mean moves along with each value.
        shift = grad_mean / count - (gain * total / count if ctx.centered else 0)
        return signs.mul_(_spread(gain, x)).add_(_spread(shift, x)).to(x.dtype), None, None


def _extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return each channel's largest and smallest value."""
    if not x.is_contiguous():
        axes = _all_but_channels(x)
        return x.amax(axes), x.amin(axes)
    # Over few positions, or many, the wrong axis first costs two to ten times as much, and all in one go fifteen times.
    values = x.reshape(x.shape[0], x.shape[1], -1)
    first, second = (0, 1) if values.shape[2] < 64 else (2, 0)
    return values.amax(first).amax(second), values.amin(first).amin(second)


def _all_but_channels(x: Tensor) -> list[int]:
    return [axis for axis in range(x.dim()) if axis != 1]


def _spread(statistic: Tensor, x: Tensor) -> Tensor:
    """View (C,) as (1, C, 1, …), to be broadcast over (N, C, *)."""
    return statistic.view(1, -1, *[1] * (x.dim() - 2))
