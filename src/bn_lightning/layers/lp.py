"""Lp Batch Normalization: another norm in the place of the standard deviation."""

import math

from torch import Tensor

from bn_lightning.errors import ConversionError
from bn_lightning.functional.lp import lp_statistics
from bn_lightning.functional.normalize import normalize
from bn_lightning.layers.base import BatchNormVariant, require_flag

__all__ = ["LpBatchNorm"]


class LpBatchNorm(BatchNormVariant):
    """Subtract the mean and divide by the average Lp norm of the values: y = (x − μ) / √(s² + ε) · γ + β.

    s = (mean |x|ᵖ)^(1/p), for p = ∞ the largest |x|. The norm is that of the values "before shifting the mean", as the
    paper has it, so that channels far from zero come out small; with ``centered`` it is that of x − μ, and p = 2 is
    Batch Normalization. ``running_var`` moves towards s² (for p = 2, centered: the variance with correction=1), and
    evaluation is that of plain BatchNorm: by what the buffers hold. A layer converted from a trained BatchNorm goes on
    with its variances until training has replaced them; for a p other than 2 they are of a different size.

    Args:
        p: 1, 2 or infinity, which may also be written ``"inf"``.
        centered: Whether the norm is taken of x − μ.
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias: See `BatchNormVariant`.

    Shape:
        (N, C, *).

    Raises:
        ConversionError: If ``p`` is another number.

    Example:
        >>> import torch
        >>> layer = LpBatchNorm(1, p="inf")
        >>> layer(torch.tensor([[0.0], [2.0]])).detach()
        tensor([[-0.5000],
                [ 0.5000]])

    Reference:
        Santurkar et al., arXiv:1805.11604, §3.3.
    """

    p: float
    centered: bool

    def configure(self, p: float | str = 1, centered: bool = False) -> None:
        """Set the norm, and what it is taken of.

        Raises:
            ConversionError: If ``p`` is not 1, 2 or infinity.
        """
        if p not in (1, 2, math.inf, "inf"):
            raise ConversionError(f"p has to be 1, 2 or infinity (float('inf') or 'inf'), got {p!r}.")
        self.p = float(p)
        require_flag("centered", centered)
        self.centered = centered

    def unlike_population(self) -> str | None:
        """Say that ``running_var`` is no variance, if so."""
        return None if self.p == 2 and self.centered else "its running_var is the square of an Lp norm, no variance"

    def adopt_statistics(self) -> str | None:
        """Say what evaluation goes by until training has moved the statistics."""
        return "running_var is a variance until training has replaced it" if self.unlike_population() else None

    def normalize_batch(self, x: Tensor) -> Tensor:
        """Normalize by the batch's mean and Lp norm."""
        if self.p == 2 and self.centered:
            return self.plain_step(x)
        mean, square = lp_statistics(x, self.p, centered=self.centered)
        self.update_running_statistics(mean, square)
        return normalize(x, mean, square, self.weight, self.bias, self.eps)

    def evaluate(self, x: Tensor) -> Tensor:
        """Normalize by the running statistics, or by the batch's in the same norm where there are none."""
        if self.running_mean is not None or not x.numel():
            return super().evaluate(x)
        self.check_batch(x)
        return self.normalize_batch(x)
