"""How each layer's weight gradient is distributed: its size, its tails, its histogram."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bn_lightning.functional import accumulation_dtype
from bn_lightning.probes.objective import Loss, Objective, Step, objective_of
from bn_lightning.probes.weights import call_order, place_in, weight_layers
from bn_lightning.reports.curves import Curve, along_layers, draw_curves, empty_figure
from bn_lightning.reports.table import Table
from bn_lightning.reports.tabled import Tabled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["GradientTails", "LayerTail", "gradient_tails", "measure_gradient_tails"]

_BINS = 41


@dataclass(frozen=True, slots=True)
class LayerTail:
    """The distribution of one layer's weight gradient over its elements.

    Attributes:
        name: The layer's.
        norm: ‖∂L/∂W‖₂.
        std: About the mean, correction=0; loss by weight units.
        largest: The largest magnitude.
        kurtosis: E[(g − E g)⁴]/Var(g)² − 3, 0 for a normal distribution; NaN where all elements are equal.
        counts: Of elements in 41 bins of equal width from −largest to largest.
    """

    name: str
    norm: float
    std: float
    largest: float
    kurtosis: float
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GradientTails(Tabled):
    """One row a layer, in order of execution.

    Attributes:
        loss: Of the batch.
        layers: Those measured.
    """

    loss: float
    layers: tuple[LayerTail, ...]

    @property
    def median_kurtosis(self) -> float:
        """The median over the layers, NaN aside."""
        known = torch.tensor([row.kurtosis for row in self.layers if not math.isnan(row.kurtosis)], dtype=torch.float64)
        return known.median().item() if len(known) else math.nan

    def scalars(self) -> dict[str, float]:
        """Return what one logs of it."""
        return {
            "gradient_kurtosis": self.median_kurtosis,
            **{f"{row.name}/gradient_norm": row.norm for row in self.layers},
            **{f"{row.name}/gradient_kurtosis": row.kurtosis for row in self.layers},
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def figure(self) -> "Figure":
        """Draw norm and kurtosis along the layers, and the histogram of the layer with the median kurtosis."""
        figure = empty_figure("gradients of the weights", height=6.4)
        panels = figure.subplot_mosaic([["norm", "histogram"], ["kurtosis", "histogram"]], width_ratios=[3, 2])
        places = range(1, len(self.layers) + 1)
        draw_curves(panels["norm"], [Curve("", places, [row.norm for row in self.layers])], yscale="log")
        draw_curves(panels["kurtosis"], [Curve("", places, [row.kurtosis for row in self.layers])])
        panels["norm"].set_ylabel("‖∂L/∂W‖₂")
        panels["kurtosis"].set_ylabel("excess kurtosis")
        along_layers(panels["kurtosis"])
        known = sorted((row for row in self.layers if not math.isnan(row.kurtosis)), key=lambda row: row.kurtosis)
        if known:
            row = known[(len(known) - 1) // 2]
            width = 2 * row.largest / _BINS
            edges = [-row.largest + index * width for index in range(_BINS + 1)]
            panels["histogram"].stairs(row.counts, edges, fill=True, color="#1f5fa8", alpha=0.6)
            panels["histogram"].set(xlabel=f"gradient of {row.name}", ylabel="elements", yscale="log")
        return figure

    def table(self) -> Table:
        """Put it into a table."""
        return Table(
            "gradients of the weights",
            ("layer", "‖∂L/∂W‖₂", "std", "largest / std", "excess kurtosis"),
            [
                (row.name, row.norm, row.std, row.largest / row.std if row.std else math.nan, row.kurtosis)
                for row in self.layers
            ],
            [f"median excess kurtosis {self.median_kurtosis:.3g} (a normal distribution has 0)"],
        )


def gradient_tails(
    model: nn.Module,
    loss: Loss | None,
    batch: Any,
    *,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    step: Step | None = None,
) -> GradientTails:
    """Measure size, tails and histogram of each layer's weight gradient: one forward and one backward pass.

    Args:
        model: The network; it comes back bit for bit.
        loss: A function ``(output, target) -> scalar`` for a batch that is a pair.
        batch: One.
        include: Name patterns of the layers, those with a weight of two or more axes; empty means all.
        exclude: Name patterns of layers to leave out.
        step: In place of ``loss``: a function ``(model, batch) -> scalar``.

    Raises:
        BatchNormError: If there is no loss, no gradient or no such layer.

    Example:
        >>> layer, x = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 3.0]])  # L(w) = x·w: the gradient is x
        >>> row = gradient_tails(layer, None, x, step=lambda model, x: model(x).sum()).layers[0]
        >>> row.std, row.largest, row.kurtosis
        (1.0, 3.0, -2.0)

    Reference:
        Bjorck et al., Understanding batch normalization, arXiv:1806.02375, §3 and its histogram of a kernel's gradient.
    """
    with objective_of(model, loss, batch, step) as objective:
        return measure_gradient_tails(objective, include, exclude)


def measure_gradient_tails(
    objective: Objective, include: Iterable[str] = (), exclude: Iterable[str] = ()
) -> GradientTails:
    """Measure them of an objective, see `gradient_tails`."""
    weights = weight_layers(objective, include, exclude)
    with call_order(objective.network) as order:
        loss, gradients = objective.gradient(weights)
    ordered = sorted(weights.items(), key=lambda item: place_in(order, item[1]))
    return GradientTails(loss, tuple(_tail(layer, gradients[weight]) for weight, layer in ordered))


def _tail(layer: str, gradient: Tensor) -> LayerTail:
    values = gradient.detach().flatten().to(accumulation_dtype(gradient.device))
    centred = values - values.mean()
    variance = centred.square().mean().item()
    largest = values.abs().max().item()
    kurtosis = centred.pow(4).mean().item() / variance**2 - 3 if variance else math.nan
    counts = torch.histc(values.cpu(), _BINS, -largest, largest) if 0 < largest < math.inf else torch.zeros(_BINS)
    return LayerTail(
        layer, values.norm().item(), math.sqrt(variance), largest, kurtosis, tuple(map(int, counts.tolist()))
    )
