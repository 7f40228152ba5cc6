"""Internal covariate shift: what the step of the layers before one does to its gradient."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from bn_lightning.errors import BatchNormError
from bn_lightning.functional import accumulation_dtype
from bn_lightning.probes.objective import Loss, Objective, Step, norm_of, objective_of
from bn_lightning.probes.weights import call_order, place_in, weight_layers
from bn_lightning.reports.curves import Curve, along_layers, draw_curves, empty_figure
from bn_lightning.reports.progress import progress
from bn_lightning.reports.table import Table
from bn_lightning.reports.tabled import Tabled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CovariateShift", "LayerShift", "internal_covariate_shift", "measure_covariate_shift"]


@dataclass(frozen=True, slots=True)
class LayerShift:
    """What happens to the gradient of one layer's weight.

    Attributes:
        name: The layer's.
        gradient_norm: ‖G‖₂, before.
        shift: ‖G − G′‖₂, G′ after the layers before it took their step; 0 is no shift.
        cosine: Of the angle between G and G′; 1 is no shift, NaN if one of them is 0.
    """

    name: str
    gradient_norm: float
    shift: float
    cosine: float


@dataclass(frozen=True, slots=True)
class CovariateShift(Tabled):
    """One row a layer, in order of execution.

    Attributes:
        learning_rate: Of the step.
        layers: Those measured; the first of a network has no layer before it, and hence no shift.
    """

    learning_rate: float
    layers: tuple[LayerShift, ...]

    def scalars(self) -> dict[str, float]:
        """Return what one logs of it."""
        return {
            **{f"{row.name}/gradient_shift": row.shift for row in self.layers},
            **{f"{row.name}/gradient_cosine": row.cosine for row in self.layers},
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def figure(self) -> "Figure":
        """Draw shift and cosine along the layers."""
        figure = empty_figure("internal covariate shift (Santurkar et al., Def. 2.1)")
        places = range(1, len(self.layers) + 1)
        upper, lower = figure.subplots(2, 1, sharex=True)
        relative = [row.shift / row.gradient_norm if row.gradient_norm else math.nan for row in self.layers]
        draw_curves(upper, [Curve("", places, relative)])
        draw_curves(lower, [Curve("", places, [row.cosine for row in self.layers])])
        upper.set_ylabel("‖G − G′‖ / ‖G‖")
        lower.set(ylabel="cosine of G, G′", ylim=(-1.05, 1.05))
        along_layers(lower)
        return figure

    def table(self) -> Table:
        """Put it into a table."""
        return Table(
            f"internal covariate shift at a step of {self.learning_rate:g} times the gradient",
            ("layer", "‖G‖", "‖G − G′‖", "cosine"),
            [(row.name, row.gradient_norm, row.shift, row.cosine) for row in self.layers],
        )


def internal_covariate_shift(
    model: nn.Module,
    loss: Loss | None,
    batch: Any,
    *,
    learning_rate: float,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    step: Step | None = None,
) -> CovariateShift:
    """Measure how each layer's gradient changes when the layers before it take their gradient step, on the same batch.

    A layer is a module with a weight of two or more axes that takes a gradient, which is its W; what comes before it
    are the parameters, BatchNorm's γ and β among them, of all modules that were called before it. It takes one
    forward and backward pass, and one more for each layer but the first.

    Args:
        model: The network; it comes back bit for bit.
        loss: A function ``(output, target) -> scalar`` for a batch that is a pair.
        batch: One.
        learning_rate: Of the plain gradient step from t to t + 1.
        include: Name patterns of the layers to measure; empty means all. All others still take their steps.
        exclude: Name patterns of layers to leave out.
        step: In place of ``loss``: a function ``(model, batch) -> scalar``.

    Raises:
        BatchNormError: If there is no loss, no gradient or no such layer.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        >>> pair = torch.randn(8, 2), torch.randn(8, 1)
        >>> found = internal_covariate_shift(network, nn.functional.mse_loss, pair, learning_rate=0.1)
        >>> [row.name for row in found.layers], found.layers[0].shift
        (['0', '2'], 0.0)

    Reference:
        Santurkar et al., How does batch normalization help optimization?, arXiv:1805.11604, Def. 2.1.
    """
    if not 0 < learning_rate < math.inf:
        raise BatchNormError(f"learning_rate must be positive, got {learning_rate}.")
    with objective_of(model, loss, batch, step) as objective:
        return measure_covariate_shift(objective, learning_rate, include, exclude)


def measure_covariate_shift(
    objective: Objective, learning_rate: float, include: Iterable[str] = (), exclude: Iterable[str] = ()
) -> CovariateShift:
    """Measure it of an objective, see `internal_covariate_shift`."""
    weights = weight_layers(objective, include, exclude)
    with call_order(objective.network) as order:
        _, start = objective.gradient()
    places = {name: place_in(order, name.rpartition(".")[0]) for name in objective.parameters}
    rows = []
    with progress("layers", len(weights)) as advance:
        for name in sorted(weights, key=places.__getitem__):
            before, after = start[name], start[name]
            earlier = {other: start[other] for other, place in places.items() if place < places[name]}
            if earlier:
                with objective.moved(earlier, learning_rate):
                    after = objective.gradient([name])[1][name]
            rows.append(_compared(weights[name], before, after))
            advance()
    return CovariateShift(learning_rate, tuple(rows))


def _compared(layer: str, before: Tensor, after: Tensor) -> LayerShift:
    norm, norm_after = norm_of({"": before}), norm_of({"": after})
    inner = float((before * after).sum(dtype=accumulation_dtype(before.device)))
    cosine = inner / (norm * norm_after) if norm and norm_after else math.nan
    return LayerShift(layer, norm, norm_of({"": after - before}), cosine)
