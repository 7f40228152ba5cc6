"""Noisy Batch Normalization: covariate shift put back in, to see whether BN suffers from it."""

import math

from torch import Tensor

from bn_lightning.errors import ConversionError
from bn_lightning.functional.noise import apply_noise, draw_noise
from bn_lightning.layers.base import BatchNormVariant

__all__ = ["NoisyBatchNorm"]


class NoisyBatchNorm(BatchNormVariant):
    """Scale and shift the output of BatchNorm at random in training; evaluate as plain BatchNorm.

    After BN with its own scale and shift, y ← s·y + m. At each step every channel draws μ ~ U(−n_mu, n_mu) and
    σ ~ U(1, n_sigma) anew, and each of its values m ~ U(μ − r_mu, μ + r_mu) and s ~ N(σ, r_sigma²). The draws are those
    of the device's default generator, so a seeded run repeats.

    The paper leaves two things open. Here ``r_sigma`` is a standard deviation, not a variance, and there is noise in
    training only. The scale of every value is kept for the backward pass: one activation more than BN keeps.

    Args:
        n_mu: Half the range of a channel's mean shift, in units of the output.
        n_sigma: Largest mean scale of a channel, at least 1.
        r_mu: Half the range of a value's shift about its channel's, in units of the output.
        r_sigma: Standard deviation of a value's scale about its channel's.
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias: See `BatchNormVariant`.

    Shape:
        (N, C, *).

    Example:
        >>> import torch
        >>> layer = NoisyBatchNorm(3)
        >>> x = torch.randn(8, 3)
        >>> torch.equal(layer(x), layer(x))
        False

    Reference:
        Santurkar et al., arXiv:1805.11604, Alg. 1, whose constants are the defaults.
    """

    n_mu: float
    n_sigma: float
    r_mu: float
    r_sigma: float

    def configure(self, n_mu: float = 0.5, n_sigma: float = 1.25, r_mu: float = 0.1, r_sigma: float = 0.1) -> None:
        """Set the noise.

        Raises:
            ConversionError: If a range is negative or not finite, or ``n_sigma`` is below 1.
        """
        for name, value, least in (
            ("n_mu", n_mu, 0),
            ("n_sigma", n_sigma, 1),
            ("r_mu", r_mu, 0),
            ("r_sigma", r_sigma, 0),
        ):
            if not isinstance(value, int | float) or not least <= value < math.inf:
                raise ConversionError(
                    f"{name} has to be a finite number of at least {least}, got {value!r}; {least} takes that part of "
                    "the noise away."
                )
        self.n_mu, self.n_sigma, self.r_mu, self.r_sigma = n_mu, n_sigma, r_mu, r_sigma

    def normalize_batch(self, x: Tensor) -> Tensor:
        """Normalize as plain BN does, then add the noise."""
        y = self.plain_step(x)
        return apply_noise(y, *draw_noise(y, self.n_mu, self.n_sigma, self.r_mu, self.r_sigma))
