"""Give a network numbers as training leaves them, so that no error hides behind neutral ones."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from bn_lightning.folding.norms import named_norms

__all__ = ["randomize"]

_NEGATIVE_SHARE = 0.25
# A layer scale of 1e-6 or a weight of zero hides whatever stands before it.
_NEARLY_ZERO, _INSTEAD = 1e-2, 0.1


def randomize(model: nn.Module, images: Tensor, generator: torch.Generator) -> None:
    """Draw statistics, weight and bias of every BatchNorm layer, and every other weight that begins at zero.

    Mean and variance are those of what the layer is given for ``images``, the mean moved by a normal half standard
    deviation and the variance multiplied by 0.5 to 2. Statistics that know nothing of the network let activations
    explode in deep networks, and in many others fade until the output is the same for every image: then no error in
    the first layers shows. Weights are 0.5 to 1.5 with a quarter of the signs turned, biases normal with 0.1.
    """
    norms = named_norms(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.abs().max() < _NEARLY_ZERO and not name.endswith("bias"):
                parameter.normal_(0, _INSTEAD, generator=generator)
        for norm in norms.values():
            norm.running_mean.normal_(generator=generator)
            norm.running_var.uniform_(0.5, 2, generator=generator)
            if norm.weight is not None:
                norm.weight.uniform_(0.5, 1.5, generator=generator)
                norm.weight[torch.rand(norm.weight.shape, generator=generator) < _NEGATIVE_SHARE] *= -1
                norm.bias.normal_(0, 0.1, generator=generator)
        model.train().eval()  # LeViT and its kin keep what they derive from weights until the mode changes
        with ExitStack() as hooks:
            for norm in norms.values():
                hooks.callback(norm.register_forward_pre_hook(_take_statistics(generator)).remove)
            model(images)


def _take_statistics(generator: torch.Generator) -> Callable[[nn.Module, Any], None]:
    seen: set[nn.Module] = set()

    def hook(norm: nn.Module, args: Any) -> None:
        if norm in seen:  # a layer of several calls goes by the first
            return
        seen.add(norm)
        axes = [axis for axis in range(args[0].dim()) if axis != 1]
        var, mean = torch.var_mean(args[0], axes, correction=0)
        if not var.mean() > 1e-12:
            return
        var.clamp_min_(0.1 * var.mean())  # a dead channel has none, and would be scaled by 300
        norm.running_mean.copy_(mean + 0.5 * var.sqrt() * torch.randn(mean.shape, generator=generator))
        norm.running_var.copy_(var * (0.5 + 1.5 * torch.rand(var.shape, generator=generator)))

    return hook
