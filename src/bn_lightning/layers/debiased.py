"""Debiased Batch Normalization: running statistics that are right from the first step."""

import math

import torch
from torch import Tensor

from bn_lightning.errors import ConversionError
from bn_lightning.functional.normalize import batch_norm_with_statistics
from bn_lightning.layers.step_dependent import StepDependent

__all__ = ["DebiasedBatchNorm"]


class DebiasedBatchNorm(StepDependent):
    """Normalize as plain BatchNorm; the running statistics forget that they began at mean 0 and variance 1.

    They are the exponential average of the batches alone, divided by its total weight, kept in the plain buffers: at
    step t the new batch weighs momentum / (1 − (1 − momentum)^t), which is 1 at the first step and ends at
    ``momentum`` (weight of the new batch). The average is right for a ``momentum`` that stays what it is.
    Running statistics that come without a count, from a file or by conversion, are taken for converged.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias: See `BatchNormVariant`.

    Shape:
        (N, C, *).

    Raises:
        ConversionError: With ``momentum=None``, a cumulative average, in which there is nothing to debias.

    Example:
        >>> layer = DebiasedBatchNorm(1)
        >>> _ = layer(torch.tensor([[10.0], [12.0]]))
        >>> layer.running_mean, layer.running_var
        (tensor([11.]), tensor([2.]))

    Reference:
        Kingma & Ba, arXiv:1412.6980, §3, for Adam's averages.
    """

    def configure(self) -> None:
        """Check the momentum."""
        if self.momentum is None:
            raise ConversionError(
                f"DebiasedBatchNorm({self.num_features}) needs a momentum, got None: a cumulative average has no bias "
                "to remove. Set a momentum, or keep torch.nn.BatchNorm."
            )
        if not 0 <= self.momentum <= 1:
            raise ConversionError(
                f"DebiasedBatchNorm({self.num_features}) needs a momentum from 0 to 1, the weight of the new batch, "
                f"got {self.momentum!r}."
            )

    def normalize_batch(self, x: Tensor) -> Tensor:
        """Normalize by batch statistics."""
        y, mean, var = batch_norm_with_statistics(x, self.weight, self.bias, self.eps)
        self.update_running_statistics(mean, var)
        return y

    def plain_step(self, x: Tensor) -> Tensor:
        """Pass an empty batch on without counting it: it adds no weight to the average."""
        return self.evaluate(x)

    def step_momentum(self) -> float | Tensor:
        """Return momentum / (1 − (1 − momentum)^t), t counting this step too."""
        # torch.optim.swa_utils.update_bn sets None for a while; 0 moves nothing and 1 keeps the last batch only.
        if self.momentum is None or self.momentum in (0, 1):
            return super().step_momentum()
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        dtype = self.running_mean.dtype
        step = self.num_batches_tracked.to(torch.promote_types(dtype, torch.float32))
        # Written with expm1: 1 − (1 − m)^t loses digits at a small momentum.
        minus_total = torch.expm1(step * math.log1p(-self.momentum))
        return (-self.momentum / minus_total).to(dtype)

    def converged_count(self) -> int:
        """Return the step whose momentum equals ``momentum`` to the last bit, in float64 too."""
        if self.momentum is None or self.momentum in (0, 1):
            return 0
        return math.ceil(54 * math.log(2) / -math.log1p(-self.momentum))
