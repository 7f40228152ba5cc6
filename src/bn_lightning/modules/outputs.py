"""What a network returns, read as logits: a tensor, a mapping, or a record with auxiliary outputs."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from bn_lightning.errors import BatchNormError

__all__ = ["LogitsOnly", "logits_of", "weighted_logits"]

# transformers and torchvision's googlenet and inception_v3; torchvision's segmentation networks.
_MAIN = ("logits", "out")
_AUXILIARY = {"aux_logits1": 0.3, "aux_logits2": 0.3, "aux_logits": 0.4, "aux": 0.5}


def logits_of(output: Any) -> Tensor:
    """Return the main logits of a network's output.

    Raises:
        BatchNormError: If there are none to be recognized.

    Example:
        >>> import torch
        >>> logits_of({"out": torch.zeros(1, 21, 8, 8)}).shape
        torch.Size([1, 21, 8, 8])
    """
    return weighted_logits(output)[0][0]


def weighted_logits(output: Any) -> list[tuple[Tensor, float]]:
    """Return all logits that a loss is to be computed of, each with its weight in the sum; the main ones first, with 1.

    Auxiliary classifiers weigh as they do in their papers and in torchvision's own training scripts: 0.3 (GoogLeNet),
    0.4 (Inception-v3), 0.5 (FCN, DeepLab). In evaluation the networks return none, or they are ignored.

    Args:
        output: A tensor; or a mapping or object with ``logits`` (transformers, torchvision) or ``out`` (torchvision's
            segmentation networks), and perhaps ``aux_logits`` or ``aux`` beside.

    Raises:
        BatchNormError: If it is none of these.

    Example:
        >>> import torch
        >>> [(tuple(logits.shape), weight) for logits, weight in weighted_logits(
        ...     {"out": torch.zeros(2, 21, 8, 8), "aux": torch.zeros(2, 21, 8, 8)})]
        [((2, 21, 8, 8), 1.0), ((2, 21, 8, 8), 0.5)]

    Reference:
        Szegedy et al., arXiv:1409.4842, §5 (0.3).
    """
    if isinstance(output, Tensor):
        return [(output, 1.0)]
    names = (*_MAIN, *_AUXILIARY)
    if isinstance(output, Mapping):
        found = {name: output[name] for name in names if isinstance(output.get(name), Tensor)}
    else:
        found = {name: getattr(output, name) for name in names if isinstance(getattr(output, name, None), Tensor)}
    main = [found[name] for name in _MAIN if name in found]
    if not main:
        held = f" with {', '.join(map(repr, output))}" if isinstance(output, Mapping) else ""
        raise BatchNormError(
            f"the network returned a {type(output).__name__}{held}; expected logits: a tensor, or a mapping or object "
            "that has them as 'logits' or 'out'. Wrap the network in a module that returns the logits."
        )
    return [(main[0], 1.0), *((found[name], weight) for name, weight in _AUXILIARY.items() if name in found)]


class LogitsOnly(nn.Module):
    """A network that returns its main logits and nothing else, whatever the one inside returns.

    An exported program of a network that returns a record needs the package of the record's class to be loaded.

    Example:
        >>> import torch
        >>> LogitsOnly(nn.Linear(2, 3))(torch.zeros(1, 2)).shape
        torch.Size([1, 3])
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Return the main logits."""
        return logits_of(self.network(images))
