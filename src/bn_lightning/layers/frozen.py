"""Frozen Batch Normalization: running statistics always, whatever the mode."""

import warnings
from typing import Any

from torch import Tensor

from bn_lightning.errors import ConversionError
from bn_lightning.functional.normalize import normalize
from bn_lightning.layers.base import BatchNormVariant, require_flag

__all__ = ["FrozenBatchNorm"]


class FrozenBatchNorm(BatchNormVariant):
    """Normalize by running statistics in training too, and never move them; ``.train()`` changes nothing.

    Args:
        trainable: Whether scale and shift go on learning. ``False`` takes ``requires_grad`` from them, and the layer
            then keeps no activation for the backward pass. ``None`` leaves ``requires_grad`` as it is.
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

    trainable: bool | None
    _loading: bool = False

    def configure(self, trainable: bool | None = True) -> None:
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
        if trainable is not None:
            require_flag("trainable", trainable)
        if trainable is not None and trainable != self.__dict__.get("trainable", True):
            for parameter in self.parameters(recurse=False):
                parameter.requires_grad_(trainable)
        self.trainable = trainable

    def fixed_tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None:
        """Return what it normalizes by, in either mode."""
        assert self.running_mean is not None
        assert self.running_var is not None
        return self.running_mean, self.running_var, self.weight, self.bias

    def reset_running_stats(self) -> None:
        """Do nothing once the layer is made: ``torch.optim.swa_utils.update_bn`` would leave mean 0 and variance 1."""
        if "trainable" not in self.__dict__:
            super().reset_running_stats()

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning's StochasticWeightAveraging assigns new buffers, to be filled in a pass that moves nothing here.
        if name in ("running_mean", "running_var") and "trainable" in self.__dict__ and not self._loading:
            if value is self._buffers.get(name):
                return
            warnings.warn(f"{self.label} is frozen and keeps its {name}; another was to be assigned.", stacklevel=2)
            return
        super().__setattr__(name, value)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._loading = True  # with assign=True a file's tensors are assigned
        try:
            super()._load_from_state_dict(*args)
        finally:
            del self._loading

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (N, C, *) by the running statistics."""
        self._check_input_dim(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        return normalize(input, self.running_mean, self.running_var, self.weight, self.bias, self.eps)
