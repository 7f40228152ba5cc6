"""How well batches that differ pin down the statistics of all of them."""

import torch
from torch import Tensor

from bn_lightning.functional import ChannelMoments

__all__ = ["Spread"]


class Spread:
    """The standard error of one layer's pooled mean and variance, from how much its batches differ.

    Values within a batch depend on each other (pixels of an image, images of a batch that is normalized together), so
    σ/√n would be far too small. Batches are what was drawn: with n_b values in batch b, whose sums about a shift are
    d_b = Σ(x − s) and y_b = Σ(x − s)², mean and variance are ratios of sums over batches, and their standard errors
    those of ratio estimators: the root of Σ e_b² · B/(B − 1), with e_b a batch's first-order influence. Batches count
    with the values they have.

    Kept on the device in 13 numbers a channel: Σu and Σuuᵀ of u = (n, d, y). Nothing here waits for the device.

    Reference:
        Cochran, Sampling Techniques, 3rd ed. 1977, §2.11, estimation of a ratio.
    """

    def __init__(self) -> None:
        self.batches = 0
        self.shift = torch.empty(0)
        self.sums = torch.empty(3, 0)
        self.products = torch.empty(3, 3, 0)

    def add(self, batch: ChannelMoments) -> None:
        """Count one batch in."""
        if not self.batches:
            self.shift = batch.mean
            self.sums = batch.mean.new_zeros(3, len(batch.mean))
            self.products = batch.mean.new_zeros(3, 3, len(batch.mean))
        self.batches += 1
        offset = batch.mean - self.shift
        d = offset * batch.count
        u = torch.stack([torch.full_like(d, batch.count), d, torch.addcmul(batch.m2, offset, d)])
        self.sums += u
        self.products.addcmul_(u[:, None], u[None])

    def merge(self, other: "Spread") -> None:
        """Count another process's batches in."""
        if not other.batches:
            return
        if not self.batches:
            self.shift, self.sums, self.products = other.shift, other.sums, other.products
        else:
            # About this shift: Σ(x − s)² = y + 2kd + k²n, so the sums are another basis' and go over linearly.
            k = other.shift - self.shift
            one, zero = torch.ones_like(k), torch.zeros_like(k)
            change = torch.stack([one, zero, zero, k, one, zero, k.square(), 2 * k, one]).view(3, 3, -1)
            self.sums = self.sums + torch.einsum("ijc,jc->ic", change, other.sums)
            self.products = self.products + torch.einsum("ijc,jkc,lkc->ilc", change, other.products, change)
        self.batches += other.batches

    def standard_error(self, eps: float) -> Tensor:
        """Return the larger of two standard errors: of the mean in σ, and of σ relative; both RMS over channels.

        σ is what the layer divides by, √(variance + eps), so that a constant channel asks for nothing. Both are parts
        of the same error, that of the layer's output in its standard deviations.

        Returns:
            A scalar on the device; NaN for fewer than two batches.
        """
        n, d, y = self.sums
        delta, square = d / n, y / n
        var = (square - delta.square()).clamp_min(0) + eps
        zero, one = torch.zeros_like(delta), torch.ones_like(delta)
        of_mean = torch.stack([-delta, one, zero])
        of_var = torch.stack([2 * delta.square() - square, -2 * delta, one])
        correction = self.batches / (self.batches - 1) if self.batches > 1 else float("nan")
        errors = [
            # Rounding may leave a spread of none slightly negative.
            torch.einsum("ic,ijc,jc->c", influence, self.products, influence).clamp_min(0) * correction / n.square()
            for influence in (of_mean, of_var)
        ]
        mean_square = torch.stack([(errors[0] / var).mean(), (errors[1] / (2 * var).square()).mean()])
        return mean_square.max().sqrt()
