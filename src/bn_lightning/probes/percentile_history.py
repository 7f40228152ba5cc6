"""Percentiles of activations over the course of training."""

from typing import TYPE_CHECKING, Any

from bn_lightning.errors import BatchNormError
from bn_lightning.probes.percentiles import ActivationPercentiles
from bn_lightning.reports.curves import Curve, curve_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PercentileHistory"]


class PercentileHistory:
    """Collect `activation_percentiles` while a network trains, and draw them over the steps as Fig. 1 does.

    Attributes:
        steps: When.
        samples: What was measured then.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from bn_lightning.probes import activation_percentiles
        >>> network, history = nn.Sequential(nn.Linear(2, 2)), PercentileHistory()
        >>> for step in range(3):
        ...     history.append(step, activation_percentiles(network, torch.zeros(4, 2)))
        >>> history.drift("0") == (0.0, 0.0, 0.0)
        True

    Reference:
        Ioffe & Szegedy, Batch normalization, arXiv:1502.03167, Fig. 1(b, c).
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.samples: list[ActivationPercentiles] = []

    def append(self, step: int, sample: ActivationPercentiles) -> None:
        """Add a time.

        Raises:
            BatchNormError: If it is of other percentiles, or not of inputs as the others, or of outputs.
        """
        for other in self.samples[:1]:
            if (other.percentiles, other.of) != (sample.percentiles, sample.of):
                raise BatchNormError(
                    f"this history is of the percentiles {other.percentiles} of each {other.of}, got "
                    f"{sample.percentiles} of each {sample.of}. Collect them in another."
                )
        self.steps.append(step)
        self.samples.append(sample)

    def values(self, layer: str) -> list[tuple[float, ...]]:
        """Return a layer's percentiles at each time.

        Raises:
            BatchNormError: If the layer is not among those measured, or nothing was.
        """
        found = [row.values for sample in self.samples for row in sample.layers if row.name == layer]
        if len(found) != len(self.samples) or not found:
            known = ", ".join(repr(row.name) for sample in self.samples[:1] for row in sample.layers) or "none yet"
            raise BatchNormError(f"layer {layer!r} was not measured at every time; the layers are {known}.")
        return found

    def drift(self, layer: str) -> tuple[float, ...]:
        """Return how far each percentile of a layer has gone from its lowest to its highest, activation units."""
        return tuple(max(each) - min(each) for each in zip(*self.values(layer), strict=True))

    def figure(self, layer: str) -> "Figure":
        """Draw a layer's percentiles over the steps."""
        by_percentile = zip(*self.values(layer), strict=True)
        sample = self.samples[0]
        return curve_figure(
            [
                Curve(f"{percentile:g} %", self.steps, values)
                for percentile, values in zip(sample.percentiles, by_percentile, strict=True)
            ],
            title=f"percentiles of the {sample.of} of {layer}",
            xlabel="optimizer step",
            ylabel="activation units",
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {"steps": list(self.steps), "samples": [sample.to_dict() for sample in self.samples]}
