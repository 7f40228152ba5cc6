"""What an audit measured, before any rule judges it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from bn_lightning.auditing.history import TrainingHistory
from bn_lightning.auditing.losses import LossReadings
from bn_lightning.auditing.observers import Observations
from bn_lightning.auditing.training import TrainingSettings
from bn_lightning.errors import SingleValueError
from bn_lightning.functional import channel_gap, layer_gap
from bn_lightning.recalibration import LayerPopulation
from bn_lightning.tracing import ForwardRecord

__all__ = ["AuditReading", "LayerReading", "read_layer"]


@dataclass(frozen=True, slots=True)
class LayerReading:
    """One BN layer and its data.

    Attributes:
        name: Qualified name.
        layer: The layer, as it is; rules only look.
        population: What was measured of its input, or ``None`` without training batches.
        channels: Each channel's gap, (C,), float64 on the CPU, or ``None`` where there is none.
        gap: The layer's gap in standard deviations of its output, or ``None`` where there is none.
        reason: Why there is no gap, or ``None``.
    """

    name: str
    layer: _BatchNorm
    population: LayerPopulation | None
    channels: Tensor | None
    gap: float | None
    reason: str | None


@dataclass(frozen=True, slots=True)
class AuditReading:
    """The model and all that was measured of it: what every rule is given.

    Attributes:
        model: The network, unwrapped; rules only look.
        layers: Every selected BN layer, in registration order.
        record: One recorded forward pass in evaluation mode, or ``None``.
        optimizers: Those that train it; empty if unknown.
        training: How the training is set up, or ``None``.
        history: What was seen while training, or ``None``.
        losses: The loss under five readings, or ``None``.
        evaluation: What each layer's input is over the evaluation batches; empty without them.
        seen: What was seen of the data beside population statistics.
        single_values: Of batches that give a layer one value per channel, which were left out.
        last_batch: Examples in the last training batch of an epoch, be it looked at or not, or ``None``.
        processes: How many processes audit together.
        spread: How far one process's running statistics are from those of all, as in `LayerHistory`, at present.
    """

    model: nn.Module
    layers: tuple[LayerReading, ...]
    record: ForwardRecord | None = None
    optimizers: tuple[Optimizer, ...] = ()
    training: TrainingSettings | None = None
    history: TrainingHistory | None = None
    losses: LossReadings | None = None
    evaluation: Mapping[str, LayerPopulation] = field(default_factory=dict)
    seen: Observations = field(default_factory=Observations)
    single_values: tuple[SingleValueError, ...] = ()
    last_batch: int | None = None
    processes: int = 1
    spread: Mapping[str, float] = field(default_factory=dict)

    def has(self, source: str) -> bool:
        """Tell whether there is one of the rules' `SOURCES`."""
        return {
            "model": True,
            "record": self.record is not None,
            "optimizer": bool(self.optimizers),
            "training": self.training is not None,
            "history": self.history is not None,
            "data": any(layer.population is not None for layer in self.layers),
            "losses": self.losses is not None,
            "evaluation": bool(self.evaluation),
            "processes": self.processes > 1,
        }[source]


def read_layer(name: str, layer: _BatchNorm, population: LayerPopulation | None) -> LayerReading:
    """Compare a layer's running statistics with its population statistics (variance with correction=1)."""
    if population is None:
        return LayerReading(name, layer, None, None, None, "no training batches were given")
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
