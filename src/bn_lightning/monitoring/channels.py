"""Where the outputs of layers have their channels."""

import weakref

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.tracing.nested import iter_tensors

__all__ = ["ChannelAxes", "find_tensor", "own_axis"]

_CHANNELS_LAST = (
    nn.Linear,
    nn.Bilinear,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
)
_SPATIAL_KINDS = (
    "Conv",
    "ConvTranspose",
    "InstanceNorm",
    "MaxPool",
    "MaxUnpool",
    "AvgPool",
    "AdaptiveMaxPool",
    "AdaptiveAvgPool",
    "LPPool",
    "FractionalMaxPool",
)
_SPATIAL = {
    axes: tuple(getattr(nn, f"{kind}{axes}d") for kind in _SPATIAL_KINDS if hasattr(nn, f"{kind}{axes}d"))
    for axes in (1, 2, 3)
}
# (N, C), (N, C, H, W) and (N, C, D, H, W); three axes are as often (N, L, C) as (N, C, L).
_CHANNELS_SECOND = (2, 4, 5)


class ChannelAxes:
    """Follow the channel axis from layer to layer while a network runs.

    A convolution or a linear layer knows where it puts its channels. An activation or a layer of the user's own does
    not: it has them where the tensor it was given has them, if another layer made that tensor.

    Example:
        >>> import torch
        >>> linear, relu, axes = nn.Linear(3, 2), nn.ReLU(), ChannelAxes()
        >>> hidden = linear(torch.zeros(1, 5, 3))
        >>> axes.of(linear, (), hidden), axes.of(relu, (hidden,), relu(hidden))
        (2, 2)
        >>> print(axes.of(relu, (torch.zeros(1, 5, 3),), torch.zeros(1, 5, 3)))
        None
    """

    def __init__(self) -> None:
        # By identity: comparing tensors compares their values. The reference tells whether the id was given away anew.
        self._known: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def of(self, module: nn.Module, args: object, output: Tensor) -> int | None:
        """Return the channel axis of a layer's output, counted from 0, and remember it for the next layer.

        Args:
            module: The layer.
            args: What it was given.
            output: Its output, with at least two axes.

        Returns:
            ``None`` if nothing tells.
        """
        axis = own_axis(module, output)
        if axis is None:
            axis = self._inherited(find_tensor(args), output)
        if axis is None and output.dim() in _CHANNELS_SECOND:
            axis = 1
        if axis is None:
            return None
        axis %= output.dim()
        self._known[id(output)] = weakref.ref(output), axis
        return axis

    def clear(self) -> None:
        """Forget all tensors."""
        self._known.clear()

    def _inherited(self, given: Tensor | None, output: Tensor) -> int | None:
        reference, axis = self._known.get(id(given), (None, 0))
        if given is None or reference is None or reference() is not given or given.dim() != output.dim():
            return None
        if given.data_ptr() == output.data_ptr() and given.numel() == output.numel():
            # A view: its axes are those of the same size and stride.
            same = (given.shape[axis], given.stride(axis))
            places = [index for index in range(output.dim()) if (output.shape[index], output.stride(index)) == same]
            if len(places) == 1:
                return places[0]
        changed = [index for index in range(given.dim()) if given.shape[index] != output.shape[index]]
        # What changes the channels and the other axes too has reordered them.
        return axis if axis not in changed or changed == [axis] else None


def own_axis(module: nn.Module, output: Tensor) -> int | None:
    """Tell where a layer puts its channels, from its kind alone; ``None`` for a kind that leaves them where they were.

    Example:
        >>> import torch
        >>> own_axis(nn.Linear(2, 3), torch.zeros(1, 5, 3)), own_axis(nn.Conv2d(2, 3, 1), torch.zeros(3, 4, 4))
        (-1, -3)
    """
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        if len(module.normalized_shape) > 1:
            return None
        # Subclasses that normalize (N, C, H, W) over C permute and back; then the sizes do not match at the end.
        return -1 if output.shape[-1] == module.normalized_shape[0] else 1
    if isinstance(module, _CHANNELS_LAST):
        return -1
    if isinstance(module, _BatchNorm | nn.GroupNorm):
        return 1
    for spatial, kinds in _SPATIAL.items():
        # With or without a batch axis.
        if isinstance(module, kinds) and output.dim() in (spatial + 1, spatial + 2):
            return -(spatial + 1)
    return None


def find_tensor(output: object) -> Tensor | None:
    """Return the first floating tensor in nested tuples, lists, mappings and dataclasses, else the first tensor.

    Example:
        >>> import torch
        >>> find_tensor({"index": torch.tensor(1), "logits": [torch.tensor(2.0)]})
        tensor(2.)
    """
    if isinstance(output, Tensor):
        return output
    first = None
    for tensor in iter_tensors(output):
        if tensor.is_floating_point():
            return tensor
        first = tensor if first is None else first
    return first
