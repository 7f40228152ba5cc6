"""Frozen Batch Normalization: running statistics always, whatever the mode."""

from torch import Tensor

from bn_lightning.errors import ConversionError
from bn_lightning.functional.normalize import normalize
from bn_lightning.layers.base import BatchNormVariant

__all__ = ["FrozenBatchNorm"]


class FrozenBatchNorm(BatchNormVariant):
    """Normalize by running statistics in training too, and never move them; ``.train()`` changes nothing.

    Args:
        trainable: Whether scale and shift go on learning. ``False`` takes ``requires_grad`` from them, and the layer
            then keeps no activation for the backward pass.
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias: See `BatchNormVariant`.

    Shape:
        (N, C, *).

    Raises:
        ConversionError: If there are no running statistics to freeze (``track_running_stats=False``).

    Example:
        >>> import torch
        >>> layer = FrozenBatchNorm(3).train()
        >>> x = torch.randn(8, 3)
        >>> torch.equal(layer(x), layer.eval()(x))
        True

    See Also:
        ``torchvision.ops.FrozenBatchNorm2d``, whose scale and shift are buffers, and which is for images alone.
    """

    trainable: bool

    def configure(self, trainable: bool = True) -> None:
        """Let scale and shift learn, or not.

        Raises:
            ConversionError: If there are no running statistics to freeze.
        """
        if self.running_mean is None:
            raise ConversionError(
                f"FrozenBatchNorm({self.num_features}) has no running statistics to freeze "
                "(track_running_stats=False). "
                "Exclude the layer, or train it with running statistics first."
            )
        self.trainable = trainable
        if not trainable:
            for parameter in self.parameters(recurse=False):
                parameter.requires_grad_(False)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (N, C, *) by the running statistics."""
        self._check_input_dim(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        return normalize(input, self.running_mean, self.running_var, self.weight, self.bias, self.eps)
