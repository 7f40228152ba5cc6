"""A scale and a shift of each channel: what is left of a BN that cannot be folded."""

import torch
from torch import Tensor, nn

from bn_lightning.errors import BatchNormError

__all__ = ["ChannelAffine"]


class ChannelAffine(nn.Module):
    """Compute ``scale * x + shift`` with one value of each per channel.

    Computed in the wider of the input's and the parameters' dtypes, like BN, and rounded once to the input's.

    Args:
        num_features: C.
        scale: Whether to have the scale; it starts at 1. Without it ``scale`` is ``None``.
        shift: Whether to have the shift; it starts at 0. Without it ``shift`` is ``None``.
        device: Of the parameters.
        dtype: Of the parameters.

    Shape:
        (N, C, *), any number of further axes; the output has the same shape, dtype and memory format.

    Raises:
        BatchNormError: If the input has another shape.

    Example:
        >>> layer = ChannelAffine(2, scale=False)
        >>> _ = nn.init.constant_(layer.shift, 3.0)
        >>> layer(torch.ones(1, 2))
        tensor([[4., 4.]], grad_fn=<AddBackward0>)

    See Also:
        `bn_lightning.functional.eval_affine`, which gives the scale and the shift of a BN in evaluation.
    """

    scale: nn.Parameter | None
    shift: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        scale: bool = True,
        shift: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        for name, wanted in (("scale", scale), ("shift", shift)):
            empty = torch.empty(num_features, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(empty) if wanted else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set scale to 1 and shift to 0."""
        if self.scale is not None:
            nn.init.ones_(self.scale)
        if self.shift is not None:
            nn.init.zeros_(self.shift)

    def forward(self, input: Tensor) -> Tensor:
        """Scale and shift (N, C, *)."""
        if input.dim() < 2 or input.shape[1] != self.num_features:
            raise BatchNormError(
                f"ChannelAffine({self.num_features}) takes (N, {self.num_features}, *), got shape {tuple(input.shape)}."
            )
        per_channel = (-1, *[1] * (input.dim() - 2))
        output = input
        if self.scale is not None:
            output = output * self.scale.view(per_channel)
        if self.shift is not None:
            output = output + self.shift.view(per_channel)
        return output.to(input.dtype)

    def extra_repr(self) -> str:
        """Show the channels, and which of the two there are."""
        return f"{self.num_features}, scale={self.scale is not None}, shift={self.shift is not None}"
