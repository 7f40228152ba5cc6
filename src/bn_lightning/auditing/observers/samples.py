"""A few real examples of each layer's input, to compare the layer on its device with float64 on a CPU."""

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm

from bn_lightning.auditing.observer import Observer, each_input
from bn_lightning.errors import first_line
from bn_lightning.functional import ChannelMoments, batch_moments
from bn_lightning.internals import drop_hooks
from bn_lightning.layers.base import BatchNormVariant
from bn_lightning.layers.cross_replica import CrossReplicaBatchNorm
from bn_lightning.layers.ghost import GhostBatchNorm
from bn_lightning.layers.kinds import has_activation, is_plain
from bn_lightning.preservation import preserved_rng, without_autocast
from bn_lightning.recalibration.run import same_randomness

__all__ = ["FLOOR", "ROUNDINGS", "DeviceError", "SampleObserver", "compare_with_float64"]

# What a sample has at most, in elements; and of the examples.
_ELEMENTS, _EXAMPLES = 2**15, 16
# What is tolerated, relative to the scale: the larger of this and so many times the dtype's rounding.
FLOOR, ROUNDINGS = 1e-4, 16
# Of a class of the user's, this share of the channels' gradients is overlooked, one at least: an activation inside it
# may have a kink, and a value on it, on whose side rounding decides, changes the gradient of its whole channel.
_KINKS = 0.1


@dataclass(frozen=True, slots=True)
class DeviceError:
    """The largest difference from float64 on a CPU, in training or evaluation mode, whichever is larger.

    Attributes:
        forward: Of the output, relative to the largest there.
        backward: Of the input's gradient, relative to the channel's |γ| / √(σ² + ε), for output gradients up to 1.
        place: Device, dtype and memory format it ran in.
        tolerance: What its dtype explains, given how far the channels' means are from 0.
    """

    forward: float
    backward: float
    place: str
    tolerance: float


class SampleObserver(Observer):
    """Keeps a copy of a part of the first input of every layer, in its memory format."""

    def __init__(self) -> None:
        self._samples: dict[str, Tensor] = {}

    def watching(self, network: nn.Module, layers: Mapping[str, _BatchNorm], name: str) -> AbstractContextManager[None]:
        """Watch one pass."""
        return each_input(layers, self._see)

    def compare(self, layers: Mapping[str, _BatchNorm]) -> dict[str, DeviceError | str]:
        """Compare every layer that was seen, or say why it could not be."""
        found: dict[str, DeviceError | str] = {}
        for name, sample in self._samples.items():
            try:
                found[name] = compare_with_float64(layers[name], sample)
            except Exception as error:  # a class of the user's may refuse to be copied, or float64
                found[name] = first_line(error)
        return found

    def _see(self, name: str, layer: _BatchNorm, x: Tensor) -> None:
        if name not in self._samples and x.numel() and x.is_floating_point():
            self._samples[name] = _part(x)


def _part(x: Tensor) -> Tensor:
    """Copy the first examples, and of them a corner if they are large; the order of the axes in memory stays."""
    x = x[:_EXAMPLES]
    sides = list(x.shape[2:])
    while x.shape[0] * x.shape[1] * torch.Size(sides).numel() > _ELEMENTS and max(sides, default=1) > 1:
        sides[sides.index(max(sides))] = (max(sides) + 1) // 2
    return x[(slice(None), slice(None), *map(slice, sides))].clone()


def compare_with_float64(layer: _BatchNorm, x: Tensor) -> DeviceError:
    """Run copies of a layer, one as it is and one in float64 on a CPU, forward and backward; the layer is not called.

    A mode in which the layer gives one thing now and another then is left out, and so is training where it would need
    other processes. Drop and activation that torch's and timm's classes have behind the normalization are left out too.

    Args:
        layer: Any kind of BatchNorm.
        x: (N, C, *), on the layer's device and as the layer is given it.

    Example:
        >>> compare_with_float64(nn.BatchNorm1d(3), torch.randn(8, 3)).forward < 1e-5
        True
    """
    forward = backward = 0.0
    moments = batch_moments(x)
    known = is_plain(layer) or isinstance(layer, BatchNormVariant)
    with preserved_rng(x.device), without_autocast(layer):
        for training in (False, True) if _trains_alone(layer, x) else (False,):
            own = _run(_scratch(layer, training, x), x, seed=0)
            if not is_plain(layer):
                again = _run(_scratch(layer, training, x), x, seed=1)[0]
                if not torch.allclose(own[0], again, rtol=0, atol=0, equal_nan=True):
                    continue  # dropout or noise
            reference = _scratch(layer, training, x).cpu().double()
            wide = _run(reference, x.detach().cpu().double().contiguous(), seed=0)
            gain = _gain(reference, moments, training).view(-1, *[1] * (x.dim() - 2))
            forward = max(forward, _largest(own[0], wide[0], wide[0].abs().max()))
            # What is left of a gradient once its mean is taken away may be nothing but rounding: not by its own size.
            backward = max(backward, _largest(own[1], wide[1], gain, 0.0 if known else _KINKS))
    kind = "channels_last" if x.dim() in (4, 5) and not x.is_contiguous() else "contiguous"
    dtypes = [x.dtype, *(tensor.dtype for tensor in (layer.weight, layer.running_mean) if tensor is not None)]
    coarsest = max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)
    # Where the mean is large, rounding it moves what is left when it is subtracted.
    offset = (moments.mean.abs() / (moments.var(correction=0) + layer.eps).sqrt()).max()
    tolerance = max(FLOOR, ROUNDINGS * coarsest * (1 + float(offset)))
    return DeviceError(forward, backward, f"{x.device.type}, {str(x.dtype).removeprefix('torch.')}, {kind}", tolerance)


def _trains_alone(layer: _BatchNorm, x: Tensor) -> bool:
    communicates = isinstance(layer, SyncBatchNorm | CrossReplicaBatchNorm)
    return not communicates and x.numel() // x.shape[1] > 1


def _scratch(layer: _BatchNorm, training: bool, x: Tensor) -> _BatchNorm:
    scratch = copy.deepcopy(layer)
    for module in scratch.modules():
        drop_hooks(module)
    if has_activation(scratch):
        scratch.drop, scratch.act = nn.Identity(), nn.Identity()
    if isinstance(scratch, GhostBatchNorm):
        scratch.virtual_batch_size = x.shape[0]  # which examples meet in a group depends on the memory format
    scratch.train(training)
    return scratch


def _run(layer: _BatchNorm, x: Tensor, *, seed: int) -> tuple[Tensor, Tensor]:
    # The gradient of a fixed weighting of the outputs: of their sum alone it would be 0 in training mode.
    same_randomness(seed, [x.device])
    with torch.inference_mode(False), torch.enable_grad():
        given = x.detach().clone().requires_grad_()
        output: Any = layer(given)
        weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape)
        (gradient,) = torch.autograd.grad((output * weights.to(output)).sum(), given)
    return output.detach(), gradient


def _gain(layer: _BatchNorm, moments: ChannelMoments, training: bool) -> Tensor:
    """How much each channel is scaled, (C,): |γ| / √(σ² + ε)."""
    var = layer.running_var
    if training or var is None:
        var = moments.var(correction=0).cpu().double()
    gain = (var + layer.eps).rsqrt()
    return gain if layer.weight is None else gain * layer.weight.detach().abs()


def _largest(own: Tensor, wide: Tensor, scale: Tensor, overlooked: float = 0.0) -> float:
    """Give the largest difference in terms of a scale but for a share of channels; 0 where the truth is not finite."""
    if not bool(torch.isfinite(wide).all()):
        return 0.0
    differences = (own.cpu().double() - wide).abs() / scale.clamp(min=torch.finfo(torch.float32).tiny)
    channels = differences.nan_to_num(nan=torch.inf).transpose(0, 1).flatten(1).amax(1)
    if overlooked:
        channels = channels.sort(descending=True).values[max(1, int(overlooked * len(channels))) :]
    return float(channels.max()) if len(channels) else 0.0
