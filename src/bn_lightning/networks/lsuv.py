"""Layer-sequential unit-variance initialization, from one batch of data."""

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from bn_lightning.errors import BatchNormError
from bn_lightning.functional import accumulation_dtype
from bn_lightning.networks.initialization import initialize_
from bn_lightning.preservation import out_of_inference_mode, preserved
from bn_lightning.selection import describe, select_modules

__all__ = ["lsuv_"]

_TOLERANCE = 0.01


def lsuv_(network: nn.Module, images: Tensor) -> None:
    """Give every linear layer and convolution orthonormal weights, scaled so that its outputs have variance 1.

    The layers are done in the order in which they run, each on what those before it make by then. Biases become zero;
    a layer is then linear in its weight, and one division by the standard deviation of all its outputs (correction=0)
    does what the paper iterates for. Dropout is off meanwhile, and BatchNorm normalizes by the batch. Only weights and
    biases change; a weight that is used more than once is scaled at its first use.

    Args:
        network: Any network; after an error it is as it was.
        images: A batch that is like the training data, large enough for variances: what the network takes.

    Raises:
        BatchNormError: If there is nothing to initialize, a layer is not reached or multiplies by something else than
            its weight, or its outputs are all alike or not finite.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> x = torch.randn(100, 8)
        >>> lsuv_(network, x)
        >>> f"{network(x).var(correction=0):.4f}"
        '1.0000'

    Reference:
        Mishkin & Matas, All you need is a good init, arXiv:1511.06422, Algorithm 1.
    """
    layers = select_modules(network, where=lambda module: isinstance(module, nn.Linear | _ConvNd))
    if not layers:
        raise BatchNormError(f"{type(network).__name__} has no linear layer and no convolution to initialize.")
    waiting = {id(layer): name for name, layer in layers.items()}
    scaled: set[int] = set()

    def scale(layer: Any, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        name = waiting.pop(id(layer), None)
        if name is None or id(layer.weight) in scaled:
            return None
        std = _std(output)
        if not 0 < std < math.inf:
            raise BatchNormError(
                f"LSUV cannot scale {name!r}: what it makes of this batch has a standard deviation of {std:g}. "
                "Its inputs have to be finite, and not all zero."
            )
        layer.weight.div_(std)
        scaled.add(id(layer.weight))
        output = layer.forward(*args)
        if not abs(_std(output) - 1) < _TOLERANCE:
            raise BatchNormError(
                f"LSUV divided the weight of {name!r} by {std:g}, yet its outputs have a standard deviation of "
                f"{_std(output):g}: it does not multiply by its weight as it is. Remove the parametrization."
            )
        return output

    with out_of_inference_mode(), preserved(network), _unless_done(layers.values()), ExitStack() as hooks:
        for module in network.modules():
            module.training = isinstance(module, _BatchNorm)
        for layer in layers.values():
            initialize_(layer, "orthogonal")  # type: ignore[arg-type]
            hooks.callback(layer.register_forward_hook(scale).remove)
        network(images)
        if waiting:
            raise BatchNormError(
                f"LSUV did not reach {describe(dict.fromkeys(waiting.values(), network))}: the forward pass does not "
                "run it, or not as a module."
            )


def _std(output: Tensor) -> float:
    return output.to(accumulation_dtype(output.device)).std(correction=0).item()


@contextmanager
def _unless_done(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Put weights and biases back if there is an error."""
    tensors = [parameter for layer in layers for parameter in layer.parameters(recurse=False)]
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    except BaseException:
        for tensor, value in zip(tensors, before, strict=True):
            tensor.data.copy_(value)
        raise
