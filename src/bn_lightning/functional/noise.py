"""Random scale and shift of activations, from a distribution that is itself drawn for each channel."""

import torch
from torch import Tensor

__all__ = ["apply_noise", "draw_noise"]


def draw_noise(x: Tensor, n_mu: float, n_sigma: float, r_mu: float, r_sigma: float) -> tuple[Tensor, Tensor]:
    """Draw the scale s and the shift m of every value of ``x`` from its device's default generator.

    Each channel has μ ~ U(−n_mu, n_mu) and σ ~ U(1, n_sigma), and each of its values m ~ U(μ − r_mu, μ + r_mu) and
    s ~ N(σ, r_sigma²). So E[m] = 0, Var[m] = (n_mu² + r_mu²)/3, E[s] = (1 + n_sigma)/2 and
    Var[s] = (n_sigma − 1)²/12 + r_sigma².

    Args:
        x: (N, C, *), read for its shape, dtype, device and memory format only.
        n_mu: Half the range of a channel's mean shift, in units of ``x``.
        n_sigma: Largest mean scale of a channel, at least 1.
        r_mu: Half the range of a value's shift about its channel's, in units of ``x``.
        r_sigma: Standard deviation of a value's scale about its channel's.

    Returns:
        Scale and shift, both like ``x`` and without gradient.

    Example:
        >>> scale, shift = draw_noise(torch.zeros(4, 3), 0.5, 1.25, 0.1, 0.1)
        >>> scale.shape, bool((shift.abs() <= 0.6).all())
        (torch.Size([4, 3]), True)

    Reference:
        Santurkar et al., arXiv:1805.11604, Alg. 1.
    """
    of_channel = (1, x.shape[1], *[1] * (x.dim() - 2))
    mu = x.new_empty(of_channel).uniform_(-n_mu, n_mu)
    sigma = x.new_empty(of_channel).uniform_(1.0, n_sigma)
    # Drawn in memory order and then permuted: channels_last, the generator takes ten times as long on a CPU.
    channels_last = x.dim() > 2 and x.stride(1) == 1
    order = [0, *range(2, x.dim()), 1] if channels_last else list(range(x.dim()))
    shape, back = [x.shape[axis] for axis in order], [order.index(axis) for axis in range(x.dim())]
    shift = x.new_empty(shape).uniform_(-r_mu, r_mu).permute(back).add_(mu)
    scale = x.new_empty(shape).normal_(0.0, r_sigma).permute(back).add_(sigma)
    return scale, shift


def apply_noise(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Compute ``scale * x + shift``, all of one shape; of the three only ``scale`` is kept for the backward pass.

    Example:
        >>> apply_noise(torch.ones(2), torch.tensor([2.0, 3.0]), torch.tensor([0.5, 0.0]))
        tensor([2.5000, 3.0000])
    """
    return torch.addcmul(shift, x, scale)
