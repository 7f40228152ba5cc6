"""Mean and variance of each channel along the layers of a network."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bn_lightning.monitoring import ActivationSnapshot, observe_activations
from bn_lightning.probes.objective import Step, forward_of
from bn_lightning.probes.observed import observed_layers
from bn_lightning.reports.curves import Curve, along_layers, draw_curves, empty_figure
from bn_lightning.reports.table import Table
from bn_lightning.reports.tabled import Tabled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DepthMoments", "LayerMoments", "channel_moments_by_depth"]


@dataclass(frozen=True, slots=True)
class LayerMoments:
    """The channels of one layer's output, over examples and places.

    Attributes:
        name: The layer's.
        mean: Of each channel, activation units.
        variance: Of each channel, correction=0, activation units².
        reason: Why nothing, or not everything, was measured, or ``None``.
    """

    name: str
    mean: tuple[float, ...]
    variance: tuple[float, ...]
    reason: str | None = None

    @property
    def mean_size(self) -> float:
        """The mean over the channels of |mean|; NaN if there is none."""
        return _average([abs(value) for value in self.mean])

    @property
    def mean_variance(self) -> float:
        """The mean over the channels of the variance; NaN if there is none."""
        return _average(self.variance)


@dataclass(frozen=True, slots=True)
class DepthMoments(Tabled):
    """One row a layer, in order of execution.

    Attributes:
        layers: All that were asked for, those not measured with a reason.
    """

    layers: tuple[LayerMoments, ...]

    def scalars(self) -> dict[str, float]:
        """Return what one logs of it."""
        measured = [row for row in self.layers if row.mean]
        return {
            **{f"{row.name}/channel_mean_size": row.mean_size for row in measured},
            **{f"{row.name}/channel_variance": row.mean_variance for row in measured},
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def figure(self) -> "Figure":
        """Draw the mean over the channels, and their range, along the layers."""
        figure = empty_figure("channels by depth: mean over the channels, smallest to largest in the shade", height=6.4)
        upper, lower = figure.subplots(2, 1, sharex=True)
        sizes = [[abs(value) for value in row.mean] for row in self.layers]
        draw_curves(upper, [_spread(sizes)], yscale="log")
        draw_curves(lower, [_spread([row.variance for row in self.layers])], yscale="log")
        upper.set_ylabel("|channel mean|")
        lower.set_ylabel("channel variance")
        along_layers(lower)
        return figure

    def table(self) -> Table:
        """Put it into a table."""
        return Table(
            "channel means and variances, in order of execution",
            ("layer", "channels", "mean of |mean|", "largest |mean|", "mean variance", "largest variance"),
            [
                (
                    row.name,
                    len(row.mean),
                    row.mean_size,
                    max(map(abs, row.mean), default=math.nan),
                    row.mean_variance,
                    max(row.variance, default=math.nan),
                )
                for row in self.layers
            ],
            [f"{row.name!r}: {row.reason}" for row in self.layers if row.reason],
        )


def channel_moments_by_depth(
    model: nn.Module,
    batch: Any,
    *,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    step: Step | None = None,
) -> DepthMoments:
    """Measure mean and variance of each channel of the layers' outputs, in order of execution: one forward pass.

    Without normalization both grow from layer to layer, most of all in a residual network; with it they do not.

    Args:
        model: The network; it comes back bit for bit. In evaluation mode it is run in training mode all the same.
        batch: A tensor, or a tuple or list whose first element is the input.
        include: Name patterns of the layers, of any kind; empty means all convolutions and linear layers.
        exclude: Name patterns of layers to leave out.
        step: A function ``(model, batch)`` that runs the network on any other batch.

    Raises:
        BatchNormError: If the network cannot be run, or there is no such layer.

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 2.0]])
        >>> row = channel_moments_by_depth(nn.Sequential(nn.ReLU()), x, include=["0"]).layers[0]
        >>> row.mean, row.variance
        ((2.0, 2.0), (1.0, 0.0))

    Reference:
        Bjorck et al., Understanding batch normalization, arXiv:1806.02375, §3, on channels at initialization.
    """
    with forward_of(model, batch, step) as objective:
        names = observed_layers(objective.network, include, exclude)
        with torch.no_grad(), observe_activations(objective.network, include=names) as activations:
            objective.forward()
            snapshot = activations.snapshot()
    return DepthMoments(tuple(_row(snapshot, name) for name in snapshot.blocks))


def _row(snapshot: ActivationSnapshot, name: str) -> LayerMoments:
    channels, reason = snapshot.channels(name), snapshot.reasons.get(name)
    variance = tuple((channels.std**2).tolist())
    return LayerMoments(name, tuple(channels.mean.tolist()), variance, reason)


def _spread(values: Sequence[Sequence[float]]) -> Curve:
    return Curve(
        "",
        range(1, len(values) + 1),
        [_average(each) for each in values],
        [min(each, default=math.nan) for each in values],
        [max(each, default=math.nan) for each in values],
    )


def _average(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
