"""How unequal the channels of a weight are, which one scale for the whole tensor has to bear."""

from torch import Tensor, nn

from bn_lightning.folding.numbers import Numbers, owned_tensor
from bn_lightning.folding.steps import FoldTarget

__all__ = ["channel_spread", "weight_spread"]


def weight_spread(weight: Tensor, *, kind: str, groups: int = 1, forward: bool = False) -> float:
    """Divide the largest channel of a weight by the smallest, each measured by its largest |w|.

    Channels that are zero throughout are left out: they need no resolution.

    Args:
        weight: As torch has it for the kind of layer.
        kind: ``conv, conv_transpose`` or ``linear``.
        groups: Of a convolution.
        forward: Whether to compare input channels instead of output channels.

    Returns:
        At least 1; 1 for a weight that is zero.

    Example:
        >>> import torch
        >>> weight_spread(torch.tensor([[1.0, -8.0], [0.5, 0.25]]), kind="linear")
        16.0

    Reference:
        Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, arXiv:1906.04721, §3.1.
    """
    first_axis = forward if kind == "conv_transpose" else not forward
    grouped = weight.detach().abs().reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    sizes = grouped.amax((2, 3) if first_axis else (1, 3)).flatten()
    sizes = sizes[sizes > 0]
    return float(sizes.max() / sizes.min()) if len(sizes) else 1.0


def channel_spread(model: nn.Module, numbers: Numbers, target: FoldTarget, *, forward: bool) -> tuple[float, float]:
    """Measure a target's weight before and after all folds."""
    before, after = owned_tensor(model, target.weight), numbers.tensor(target.weight)
    assert before is not None
    assert after is not None
    first, last = (
        weight_spread(weight, kind=target.kind, groups=target.groups, forward=forward) for weight in (before, after)
    )
    return first, last
