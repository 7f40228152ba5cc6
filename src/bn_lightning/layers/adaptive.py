"""Adaptive Batch Normalization: statistics of the test batch, mixed with those of training."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bn_lightning.errors import BatchNormError, ConversionError
from bn_lightning.functional.normalize import channel_statistics, normalize
from bn_lightning.layers.base import BatchNormVariant

__all__ = ["AdaptiveBatchNorm"]


class AdaptiveBatchNorm(BatchNormVariant):
    """Evaluate by running statistics mixed with the batch's; train as plain BatchNorm.

    In evaluation mean = (1 − α)·running_mean + α·batch_mean, and the variance likewise, the batch's with correction=0.
    The running statistics stay as they are. Gradients flow through the batch's part, so that scale and shift can be
    trained in evaluation mode, as TENT does (under the Trainer with ``inference_mode=False``).

    Args:
        alpha: Weight of the batch, in [0, 1]: 1 is AdaBN on one batch, 0 plain evaluation. Schneider et al. take
            n / (n + N) for batches of n examples, where N says how many examples the source statistics are worth.
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias: See `BatchNormVariant`.

    Shape:
        (N, C, *).

    Raises:
        BatchNormError: In evaluation, if all weight is on a batch with a single value per channel.

    Example:
        >>> layer = AdaptiveBatchNorm(1, alpha=0.5, eps=0.0, affine=False).eval()
        >>> layer(torch.tensor([[4.0], [10.0]]))  # mean 0.5·0 + 0.5·7, variance 0.5·1 + 0.5·9
        tensor([[0.2236],
                [2.9069]])

    Reference:
        Li et al., arXiv:1603.04779 (AdaBN); Schneider et al., arXiv:2006.16971.
    """

    alpha: float

    def configure(self, alpha: float = 1.0) -> None:
        """Set the batch's weight.

        Raises:
            ConversionError: If it is no number in [0, 1].
        """
        if not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
            raise ConversionError(
                f"alpha is the batch's weight in the statistics of evaluation, in [0, 1]; got {alpha!r}."
            )
        self.alpha = alpha

    def fixed_tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None:
        """Return what it normalizes by if the batch has no weight (``alpha=0``)."""
        return super().fixed_tensors() if self.alpha == 0 else None

    def normalize_batch(self, x: Tensor) -> Tensor:
        """Normalize as plain BN does."""
        return self.plain_step(x)

    def evaluate(self, x: Tensor) -> Tensor:
        """Normalize by the mixture; by the batch's own statistics where there are no others."""
        if self.running_mean is None or self.running_var is None or self.alpha == 1:
            self._check_variance(x)
            return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)
        if self.alpha == 0 or not x.numel():
            return super().evaluate(x)
        batch_mean, batch_var = channel_statistics(x)
        mean = torch.lerp(self.running_mean.to(batch_mean.dtype), batch_mean, self.alpha)
        var = torch.lerp(self.running_var.to(batch_var.dtype), batch_var, self.alpha)
        return normalize(x, mean, var, self.weight, self.bias, self.eps)

    def _check_variance(self, x: Tensor) -> None:
        if x.numel() == x.shape[1]:
            raise BatchNormError(
                f"{self.label} evaluates with alpha={self.alpha} by the batch's statistics alone "
                f"and needs more than one value per channel, got shape {tuple(x.shape)}. Use a larger batch, or alpha "
                "below 1 and running statistics."
            )
