"""How large the gradient is along the layers of a network."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from bn_lightning.monitoring import observe_activations
from bn_lightning.probes.objective import Loss, Step, norm_of, objective_of
from bn_lightning.probes.weights import weight_layers
from bn_lightning.reports.curves import Curve, along_layers, draw_curves, empty_figure
from bn_lightning.reports.table import Table
from bn_lightning.reports.tabled import Tabled
from bn_lightning.selection import plain_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["GradientNorms", "LayerNorms", "gradient_norms_by_depth"]


@dataclass(frozen=True, slots=True)
class LayerNorms:
    """The size of the loss's gradient at one layer.

    Attributes:
        name: The layer's.
        weight: ‖∂L/∂W‖₂.
        output: ‖∂L/∂y‖₂ of its output y over the batch; NaN if it was not measured.
        reason: Why it was not, or ``None``.
    """

    name: str
    weight: float
    output: float
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class GradientNorms(Tabled):
    """One row a layer, in order of execution.

    Attributes:
        loss: Of the batch.
        layers: Those measured.
    """

    loss: float
    layers: tuple[LayerNorms, ...]

    def scalars(self) -> dict[str, float]:
        """Return what one logs of it."""
        measured = [row for row in self.layers if row.reason is None]
        return {
            **{f"{row.name}/weight_gradient_norm": row.weight for row in self.layers},
            **{f"{row.name}/output_gradient_norm": row.output for row in measured},
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def figure(self) -> "Figure":
        """Draw both norms along the layers."""
        figure = empty_figure("gradient norms by depth", height=6.4)
        places = range(1, len(self.layers) + 1)
        upper, lower = figure.subplots(2, 1, sharex=True)
        draw_curves(upper, [Curve("", places, [row.weight for row in self.layers])], yscale="log")
        draw_curves(lower, [Curve("", places, [row.output for row in self.layers])], yscale="log")
        upper.set_ylabel("‖∂L/∂W‖₂ of the weight")
        lower.set_ylabel("‖∂L/∂y‖₂ of the output")
        along_layers(lower)
        return figure

    def table(self) -> Table:
        """Put it into a table."""
        return Table(
            "gradient norms, in order of execution",
            ("layer", "‖∂L/∂W‖₂ of the weight", "‖∂L/∂y‖₂ of the output"),
            [(row.name, row.weight, row.output) for row in self.layers],
            [f"the output of {row.name!r} was not measured: {row.reason}" for row in self.layers if row.reason],
        )


def gradient_norms_by_depth(
    model: nn.Module,
    loss: Loss | None,
    batch: Any,
    *,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    step: Step | None = None,
) -> GradientNorms:
    """Measure the gradient of each layer's weight and output, in order of execution: one forward and backward pass.

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
        >>> import torch
        >>> layer, x = nn.Linear(2, 1, bias=False), torch.tensor([[3.0, 4.0]])  # L(w) = x·w: the gradient is x
        >>> row = gradient_norms_by_depth(layer, None, x, step=lambda model, x: model(x).sum()).layers[0]
        >>> row.weight, row.output
        (5.0, 1.0)

    Reference:
        Bjorck et al., Understanding batch normalization, arXiv:1806.02375, §3, on gradients at initialization.
    """
    with objective_of(model, loss, batch, step) as objective:
        weights = weight_layers(objective, include, exclude)
        observed = {plain_name(name) or "(root)": weight for weight, name in weights.items()}
        with observe_activations(objective.network, include=list(weights.values()), gradients=True) as activations:
            value, gradients = objective.gradient(weights)
            found = activations.gradients()
    rows = []
    for name, row in found.layers():
        norm = row.rms * math.sqrt(row.count) if row.count else math.nan
        rows.append(LayerNorms(name, norm_of({name: gradients[observed[name]]}), norm, row.reason or None))
    return GradientNorms(value, tuple(rows))
