"""What goes wrong in the gradients that flow back into layers' outputs."""

import math
from collections.abc import Mapping
from itertools import accumulate
from statistics import median

import torch

from bn_lightning.monitoring.alerts.symptom import Symptom
from bn_lightning.monitoring.snapshot import ActivationSnapshot

__all__ = ["ExplodingGradient", "NonfiniteGradient", "VanishingGradient"]

_FLOAT16 = torch.finfo(torch.float16).max
# A gradient scaler that begins at 2¹⁶ and halves at each overflow has then come down to 2⁶.
_SCALER_PATIENCE = 10
# One layer alone is not the rest of a network: a loss's input may have a gradient that no layer below it shares.
_FEWEST = 2


class NonfiniteGradient(Symptom[ActivationSnapshot]):
    """NaN or infinite gradients; at once, but under float16, where a gradient scaler finds its scale by overflows."""

    rule = "nonfinite-gradient"
    begins = ends = 0.0
    patience = 1
    names_first = True

    def measure(self, sample: ActivationSnapshot) -> Mapping[str, float]:
        """Count them, layers in the order in which the backward pass reaches them."""
        if sample.limits:
            self.patience = _SCALER_PATIENCE if _FLOAT16 in sample.limits.values() else 1
        backward = reversed(list(sample.rows.items()))
        return {name: float(row.nonfinite) if row.count else math.nan for name, row in backward}

    def describe(self, layer: str, value: float, sample: ActivationSnapshot) -> tuple[str, str]:
        """Name the first layer of the backward pass."""
        row = sample.rows[layer]
        again = f" for {self.patience} samples in a row" if self.patience > 1 else ""
        return (
            f"{row.nonfinite} of the {row.count} gradients that flow back into its output are NaN or infinite{again}, "
            "where all should be finite; it is the first such layer of the backward pass",
            "Look at what follows it for a root, a logarithm or a division near 0, and at the loss; "
            "torch.autograd.set_detect_anomaly(True) names the operation",
        )


class VanishingGradient(Symptom[ActivationSnapshot]):
    """The gradient is lost before it reaches the first layers.

    The number is how many powers of ten lie between the median layer's gradient norm and the largest one in this
    layer and all before it, so a side branch that a skip connection goes round does not count. The norm is over all
    values, which neither batch size nor resolution nor the loss's scale changes against other layers'. Layers without
    any gradient are no part of the median.
    """

    rule = "vanishing-gradient"
    # Healthy: 0.9 at most. Sick: 3.6 eight sigmoids deep, 5.4 twelve.
    begins = 2.5
    ends = 2.0
    names_first = True

    def measure(self, sample: ActivationSnapshot) -> Mapping[str, float]:
        """Return the powers of ten."""
        norms = _norms(sample)
        flowing = [norm for norm in norms.values() if norm > 0]
        if len(flowing) < _FEWEST:
            return {}
        middle = median(flowing)
        reached = accumulate(norms.values(), max)
        return {name: -_log10(norm / middle) for name, norm in zip(norms, reached, strict=True)}

    def describe(self, layer: str, value: float, sample: ActivationSnapshot) -> tuple[str, str]:
        """Say how little arrives."""
        norm = _norms(sample)[layer]
        much = f"{10**-value:.3g} of" if math.isfinite(value) else "nothing of"
        return (
            f"the gradient that arrives at its output has norm {norm:.3g}, {much} the network's median, for "
            f"{self.patience} samples in a row; {10**-self.begins:.3g} of it is the least expected",
            "The layers up to here do not learn: look for dead or saturated activations behind them, normalize, use "
            "skip connections, or initialize larger",
        )


class ExplodingGradient(Symptom[ActivationSnapshot]):
    """The gradient grows on its way back.

    The number is how many powers of ten a layer's gradient norm lies above the largest one in the quarter of layers
    that run last, nearest the loss.
    """

    rule = "exploding-gradient"
    # Healthy: 1.1 at most. Sick: 2.9 in twelve tanhs, 4.9 in twelve ReLUs with weights too large.
    begins = 2.5
    ends = 2.0

    def measure(self, sample: ActivationSnapshot) -> Mapping[str, float]:
        """Return the powers of ten."""
        norms = _norms(sample)
        last = max(list(norms.values())[-max(1, len(norms) // 4) :], default=0.0)
        return {name: _log10(norm / last) for name, norm in norms.items()} if last > 0 else {}

    def describe(self, layer: str, value: float, sample: ActivationSnapshot) -> tuple[str, str]:
        """Say how large."""
        return (
            f"the gradient that arrives at its output has norm {_norms(sample)[layer]:.3g}, {10**value:.2g} times that "
            f"of the layers nearest the loss, for {self.patience} samples in a row; {10**self.begins:.0f} times is the "
            "most expected",
            "Clip gradients, lower the learning rate, normalize between here and the loss, or initialize smaller",
        )


def _norms(sample: ActivationSnapshot) -> dict[str, float]:
    """Return the norm of each layer's gradient, where there is a finite one, in order of execution."""
    return {
        name: row.rms * math.sqrt(row.count)
        for name, row in sample.rows.items()
        if row.count and math.isfinite(row.rms)
    }


def _log10(ratio: float) -> float:
    return math.log10(ratio) if ratio > 0 else -math.inf
