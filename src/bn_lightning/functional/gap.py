"""How far running statistics take a BN layer's output from what population statistics would give."""

import torch
from torch import Tensor

__all__ = ["channel_gap", "layer_gap"]


def channel_gap(
    running_mean: Tensor, running_var: Tensor, population_mean: Tensor, population_var: Tensor, eps: float
) -> Tensor:
    """Measure each channel's root-mean-square output error, in standard deviations of the right output.

    With r = √((σ²pop + ε)/(σ²run + ε)) and d = (μpop − μrun)/√(σ²pop + ε), a normalized input z of variance
    v = σ²pop/(σ²pop + ε) comes out as r·z + r·d instead of z, so the error is √((r − 1)²·v + r²·d²). For
    σ²pop >> ε, v is 1; a constant channel (v = 0) with a wrong running variance is no error at all.

    Shape:
        All tensors: (C,).

    Example:
        >>> channel_gap(torch.zeros(1), torch.ones(1), torch.full((1,), 0.5), torch.ones(1), 0.0)
        tensor([0.5000])
    """
    wide = population_var + eps
    r = torch.sqrt(wide / (running_var + eps))
    d = (population_mean - running_mean) / torch.sqrt(wide)
    return torch.sqrt((r - 1).square() * (population_var / wide) + (r * d).square())


def layer_gap(channels: Tensor, weight: Tensor | None) -> Tensor:
    """Combine the channels' gaps into the layer's: root of their mean square, weighed by γ².

    Args:
        channels: (C,), from `channel_gap`.
        weight: γ, (C,), or ``None`` for all ones. If γ is zero everywhere, so is the gap.

    Returns:
        A scalar tensor, in standard deviations of the layer's output.

    Example:
        >>> layer_gap(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0]))
        tensor(4.)
    """
    squares = torch.ones_like(channels) if weight is None else weight.to(channels.dtype).square()
    total = squares.sum()
    # nan * 0 must stay nan: a channel of unknown error is not a channel without error.
    weighed = (squares * channels.square()).sum() / total
    return torch.where(total > 0, torch.sqrt(weighed), torch.zeros_like(total))
