"""Batch Renormalization: train on batch statistics corrected towards the running ones."""

from collections.abc import Sequence

from torch import Tensor

from bn_lightning.layers.renorm_schedule import RenormSchedule

__all__ = ["BatchRenorm"]


class BatchRenorm(RenormSchedule):
    """Normalize the batch as evaluation will, as far as r_max and d_max allow; evaluate as plain BatchNorm.

    In training y = (x̂ · r + d) · weight + bias, where x̂ is the batch normalized by its own statistics,
    r = clip(σ_batch / σ_running, 1/r_max, r_max), d = clip((mean_batch − mean_running) / σ_running, −d_max, d_max) and
    σ = √(variance + eps). The running statistics are those before this step; no gradient flows through r and d. It
    starts as plain BatchNorm, while the running statistics are not good enough to correct towards.

    The paper runs it with a ``momentum`` (weight of the new batch) of 0.01. Running statistics that come without a
    count, from a file or by conversion, are taken for converged: the limits are wide at once. While running statistics
    are paused, they are used as they are and the schedule stands still.

    Args:
        r_max: Limit of r, at least 1.
        d_max: Limit of d in running standard deviations, at least 0.
        r_warmup: Batches over which the limit of r widens from 1 to ``r_max``; two equal numbers are a jump, ``None``
            is ``r_max`` from the start.
        d_warmup: Batches over which the limit of d widens from 0 to ``d_max``, likewise.
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias: See `BatchNormVariant`.

    Shape:
        (N, C, *).

    Raises:
        ConversionError: Without running statistics (``track_running_stats=False``), or if a limit makes no sense.

    Example:
        >>> import torch
        >>> layer = BatchRenorm(3, momentum=0.01, r_warmup=(100, 800), d_warmup=(100, 500))
        >>> x = torch.randn(8, 3, 5, 5)
        >>> torch.allclose(layer(x), torch.nn.BatchNorm2d(3)(x), atol=1e-6)  # plain at first
        True

    Reference:
        Ioffe, arXiv:1702.03275, Alg. 1 and §4.
    """

    def configure(
        self,
        r_max: float = 3.0,
        d_max: float = 5.0,
        r_warmup: Sequence[int] | None = (5_000, 40_000),
        d_warmup: Sequence[int] | None = (5_000, 25_000),
    ) -> None:
        """Set the limits and their schedule."""
        self.require_running_statistics()
        self.set_limits(r_max, d_max, r_warmup, d_warmup)

    def normalize_batch(self, x: Tensor) -> Tensor:
        """Normalize by the batch's statistics, corrected."""
        return self.normalize_corrected(x)
