"""The rules that look at the samples of a training."""

from collections.abc import Sequence

from bn_lightning.errors import BatchNormError, nearest
from bn_lightning.monitoring.alerts.activations import DeadChannels, Nonfinite, Saturation, ScaleJump
from bn_lightning.monitoring.alerts.alert import Alert
from bn_lightning.monitoring.alerts.gradients import ExplodingGradient, NonfiniteGradient, VanishingGradient
from bn_lightning.monitoring.alerts.running import Drift, NonfiniteStatistics
from bn_lightning.monitoring.alerts.symptom import Symptom
from bn_lightning.monitoring.running_snapshot import RunningSnapshot
from bn_lightning.monitoring.snapshot import ActivationSnapshot

__all__ = ["AlertRules"]

_ACTIVATIONS: tuple[type[Symptom[ActivationSnapshot]], ...] = (Nonfinite, DeadChannels, Saturation, ScaleJump)
_GRADIENTS: tuple[type[Symptom[ActivationSnapshot]], ...] = (NonfiniteGradient, VanishingGradient, ExplodingGradient)
_RUNNING: tuple[type[Symptom[RunningSnapshot]], ...] = (NonfiniteStatistics, Drift)


class AlertRules:
    """Look at one sample after the other and tell what begins to go wrong, once.

    Most rules wait for three samples in a row; layers in which the same begins with the same sample are one alert.

    ======================  =========================================================================================
    rule                    speaks when
    ======================  =========================================================================================
    ``nonfinite``           a layer's output has a NaN or an infinity; at once
    ``dead``                more than half of the channels of a layer that puts out nothing negative are zero throughout
    ``saturation``          the largest magnitude is above half of what the output's dtype can hold
    ``scale-jump``          the standard deviation is off by more than a factor of 4 from its last samples' median
    ``nonfinite-gradient``  a gradient is NaN or infinite; at once, under float16 after 10 samples in a row
    ``vanishing-gradient``  less than 0.3 % of the network's median gradient norm reaches the first layers
    ``exploding-gradient``  a gradient norm is above 316 times that of the layers nearest the loss
    ``nonfinite-statistics``  BatchNorm's running statistics are NaN or infinite; at once
    ``drift``               BatchNorm's running mean is more than 0.25 σ from the batches' mean, and beyond the noise
    ======================  =========================================================================================

    Measured on healthy and on sick trainings by ``tests/benchmarks/false_alarms.py``.

    Args:
        rules: ``True`` for all, ``False`` for none, or the names of some.

    Raises:
        BatchNormError: If there is no rule of a name, or ``rules`` is a bare string.

    Example:
        >>> import torch
        >>> from bn_lightning.monitoring import observe_activations
        >>> rules, net = AlertRules(["nonfinite"]), torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.ReLU())
        >>> with observe_activations(net) as activations:
        ...     _ = net(torch.tensor([[float("inf")]]))
        >>> [(alert.rule, alert.layer) for alert in rules.of_activations(activations.snapshot())]
        [('nonfinite', '0')]
    """

    names: tuple[str, ...] = (
        *(kind.rule for kind in (*_ACTIVATIONS, *_GRADIENTS)),
        *(kind.rule for kind in _RUNNING),
    )
    """The rules there are."""

    def __init__(self, rules: bool | Sequence[str] = True) -> None:
        chosen = _chosen(rules, self.names)
        self._activations = [kind() for kind in _ACTIVATIONS if kind.rule in chosen]
        self._gradients = [kind() for kind in _GRADIENTS if kind.rule in chosen]
        self._running = [kind() for kind in _RUNNING if kind.rule in chosen]

    def of_activations(self, snapshot: ActivationSnapshot) -> list[Alert]:
        """Look at a sample of activations."""
        alerts = (symptom.look(snapshot, snapshot.step) for symptom in self._activations)
        return [alert for alert in alerts if alert is not None]

    def of_gradients(self, snapshot: ActivationSnapshot) -> list[Alert]:
        """Look at a sample of the gradients that flow back into layers' outputs."""
        alerts = (symptom.look(snapshot, snapshot.step) for symptom in self._gradients)
        return [alert for alert in alerts if alert is not None]

    def of_running(self, snapshot: RunningSnapshot) -> list[Alert]:
        """Look at a reading of running statistics."""
        alerts = (symptom.look(snapshot, snapshot.step) for symptom in self._running)
        return [alert for alert in alerts if alert is not None]


def _chosen(rules: bool | Sequence[str], names: Sequence[str]) -> set[str]:
    if isinstance(rules, bool):
        return set(names) if rules else set()
    if isinstance(rules, str):
        raise BatchNormError(f"alerts are chosen by True, False or a list of names: write [{rules!r}].")
    for name in rules:
        if name not in names:
            there = ", ".join(map(repr, names))
            raise BatchNormError(f"no alert is called {name!r}{nearest(str(name), names)}; there are {there}.")
    return set(rules)
