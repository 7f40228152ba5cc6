"""Whether a network still has the weights its statistics were measured under."""

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bn_lightning.selection import plain_name

__all__ = ["changed_weight", "weight_checksums"]


def weight_checksums(network: nn.Module) -> dict[str, int]:
    """Take a checksum of every parameter's values, whatever device and memory format they are in.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> before = weight_checksums(layer)
        >>> changed_weight(layer, before) is None
        True
        >>> _ = layer.bias.data.add_(1)
        >>> changed_weight(layer, before)
        'bias'
    """
    named = network.named_parameters()
    return {plain_name(name): _checksum(value) for name, value in named if not is_lazy(value)}


def changed_weight(network: nn.Module, before: Mapping[str, int]) -> str | None:
    """Return the name of a parameter that is not as it was: changed, new or gone; ``None`` if all are."""
    now = weight_checksums(network)
    return next((name for name in {**before, **now} if before.get(name) != now.get(name)), None)


@torch.inference_mode(False)
@torch.no_grad()
def _checksum(value: Tensor) -> int:
    flat = value.detach().cpu().contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().data)
