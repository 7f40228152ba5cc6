"""What the audit sees of the data beside population statistics, during passes that it makes anyway."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.auditing.observer import Observer
from bn_lightning.auditing.observers.calls import CallObserver, LayerCalls
from bn_lightning.auditing.observers.inputs import FirstInput, FirstInputObserver
from bn_lightning.auditing.observers.padding import LayerPadding, PaddingObserver
from bn_lightning.auditing.observers.samples import DeviceError, SampleObserver
from bn_lightning.auditing.observers.traffic import LayerTraffic, TrafficObserver
from bn_lightning.auditing.observers.variance import TrainingVarianceObserver
from bn_lightning.recalibration import LayerPopulation

__all__ = ["Observations", "Observers"]


@dataclass(frozen=True, slots=True)
class Observations:
    """What was seen, by layer name in execution order; empty where it was not looked for.

    Attributes:
        calls: The training batches that layers are given, as a layer sees them.
        evaluation_calls: The same of the evaluation batches.
        first_input: Of the first weighted layer, or ``None``.
        padding: Repetitions up to the end of sequences.
        traffic: How often layers run in one step.
        dropout: Variance of a layer's input in full training over that with all else in evaluation mode.
        device: How far a layer is from float64 on a CPU, or why that is not known.
    """

    calls: Mapping[str, LayerCalls] = field(default_factory=dict)
    evaluation_calls: Mapping[str, LayerCalls] = field(default_factory=dict)
    first_input: FirstInput | None = None
    padding: Mapping[str, LayerPadding] = field(default_factory=dict)
    traffic: Mapping[str, LayerTraffic] = field(default_factory=dict)
    dropout: Mapping[str, float] = field(default_factory=dict)
    device: Mapping[str, DeviceError | str] = field(default_factory=dict)


class Observers:
    """One of each kind, for one audit."""

    def __init__(self) -> None:
        self._calls, self._inputs, self._padding = CallObserver(), FirstInputObserver(), PaddingObserver()
        self._traffic, self._variance, self._samples = TrafficObserver(), TrainingVarianceObserver(), SampleObserver()

    @property
    def all(self) -> tuple[Observer, ...]:
        """All of them, for `measure`."""
        return (self._calls, self._inputs, self._padding, self._traffic, self._variance, self._samples)

    def read(
        self,
        layers: Mapping[str, _BatchNorm],
        population: Mapping[str, LayerPopulation],
        evaluation: Mapping[str, LayerPopulation],
    ) -> Observations:
        """Gather what they saw; full training ran over the evaluation batches where there were any."""
        return Observations(
            self._calls.calls(),
            self._calls.calls("evaluation_population"),
            self._inputs.first_input(),
            self._padding.padding(),
            self._traffic.traffic(),
            self._variance.ratios(evaluation or population),
            self._samples.compare(layers),
        )
