"""What an audit measured, before any rule judges it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.functional import channel_gap, layer_gap
from bn_lightning.recalibration import LayerPopulation

__all__ = ["AuditReading", "LayerReading", "read_layer"]


@dataclass(frozen=True, slots=True)
class LayerReading:
    """One BN layer and its data.

    Attributes:
        name: Qualified name.
        layer: The layer, as it is; rules only look.
        population: What was measured of its input.
        channels: Each channel's gap, (C,), float64 on the CPU, or ``None`` where there is none.
        gap: The layer's gap in standard deviations of its output, or ``None`` where there is none.
        reason: Why there is no gap, or ``None``.
    """

    name: str
    layer: _BatchNorm
    population: LayerPopulation
    channels: Tensor | None
    gap: float | None
    reason: str | None


@dataclass(frozen=True, slots=True)
class AuditReading:
    """The model and all that was measured of it: what every rule is given."""

    model: nn.Module
    layers: tuple[LayerReading, ...]


def read_layer(name: str, layer: _BatchNorm, population: LayerPopulation) -> LayerReading:
    """Compare a layer's running statistics with its population statistics (variance with correction=1)."""
    moments = population.moments
    if layer.running_mean is None or layer.running_var is None:
        reason = f"no running statistics (track_running_stats={layer.track_running_stats})"
        return LayerReading(name, layer, population, None, None, reason)
    if moments.count < 2:
        reason = "never reached by the data" if moments.count == 0 else "only one value per channel in all the data"
        return LayerReading(name, layer, population, None, None, reason)
    if population.unlike is not None:
        return LayerReading(name, layer, population, None, None, population.unlike)
    wide = moments.mean.dtype
    with torch.inference_mode(False), torch.no_grad():
        channels = channel_gap(
            layer.running_mean.to(wide), layer.running_var.to(wide), moments.mean, moments.var(correction=1), layer.eps
        )
        gap = float(layer_gap(channels, layer.weight))
        return LayerReading(name, layer, population, channels.cpu().double(), gap, None)
