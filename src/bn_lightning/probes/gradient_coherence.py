"""Whether examples and places agree on each weight's gradient, or cancel one another."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.modules.conv import _ConvNd

from bn_lightning.functional import accumulation_dtype
from bn_lightning.probes.objective import Loss, Objective, Step, objective_of
from bn_lightning.probes.weights import call_order, place_in, weight_layers
from bn_lightning.reports.curves import Curve, along_layers, draw_curves, empty_figure
from bn_lightning.reports.table import Table
from bn_lightning.reports.tabled import Tabled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["GradientCoherence", "LayerCoherence", "gradient_coherence", "measure_gradient_coherence"]


@dataclass(frozen=True, slots=True)
class LayerCoherence:
    """One layer's weight gradient as a sum over examples and places; d is what one of them adds to one weight.

    Attributes:
        name: The layer's.
        sum_of_sizes: Σ|d|, the mean over the weights.
        size_of_sum: |Σd|, the mean over the weights.
        reason: Why it was not measured, or ``None``.
    """

    name: str
    sum_of_sizes: float
    size_of_sum: float
    reason: str | None = None

    @property
    def coherence(self) -> float:
        """|Σd|/Σ|d|: 1 where all agree, near 0 where they cancel; NaN where there is no gradient."""
        return self.size_of_sum / self.sum_of_sizes if self.sum_of_sizes else math.nan


@dataclass(frozen=True, slots=True)
class GradientCoherence(Tabled):
    """One row a layer, in order of execution.

    Attributes:
        layers: All that were asked for, those not measured with a reason.
    """

    layers: tuple[LayerCoherence, ...]

    @property
    def mean_coherence(self) -> float:
        """The mean over the layers that have one."""
        known = [row.coherence for row in self.layers if not math.isnan(row.coherence)]
        return sum(known) / len(known) if known else math.nan

    def scalars(self) -> dict[str, float]:
        """Return what one logs of it."""
        measured = [row for row in self.layers if row.reason is None]
        return {
            "gradient_coherence": self.mean_coherence,
            **{f"{row.name}/gradient_coherence": row.coherence for row in measured},
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def figure(self) -> "Figure":
        """Draw both sums and their ratio along the layers."""
        figure = empty_figure("coherence of the weights' gradients over examples and places")
        places = range(1, len(self.layers) + 1)
        upper, lower = figure.subplots(2, 1, sharex=True)
        sizes = Curve("Σ|d|", places, [row.sum_of_sizes for row in self.layers])
        draw_curves(upper, [sizes, Curve("|Σd|", places, [row.size_of_sum for row in self.layers])], yscale="log")
        draw_curves(lower, [Curve("", places, [row.coherence for row in self.layers])])
        upper.set_ylabel("mean over the weights")
        lower.set(ylabel="|Σd| / Σ|d|", ylim=(0, 1))
        along_layers(lower)
        return figure

    def table(self) -> Table:
        """Put it into a table."""
        return Table(
            "coherence of the weights' gradients over examples and places",
            ("layer", "Σ|d|", "|Σd|", "|Σd| / Σ|d|"),
            [(row.name, row.sum_of_sizes, row.size_of_sum, row.coherence) for row in self.layers],
            [f"{row.name!r} was not measured: {row.reason}" for row in self.layers if row.reason],
        )


def gradient_coherence(
    model: nn.Module,
    loss: Loss | None,
    batch: Any,
    *,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    step: Step | None = None,
) -> GradientCoherence:
    """Compare Σ|d| with |Σd| for each weight, where the weight's gradient is Σd over the batch and all places.

    What one example adds at one place is d = δ·a, of the gradient δ of an output and the input a that the weight
    multiplies; so Σ|d| = Σ|δ||a| is the layer's own weight gradient for |a| and |δ|. It takes one forward and backward
    pass, and another forward and backward of each measured layer alone.

    Args:
        model: The network; it comes back bit for bit.
        loss: A function ``(output, target) -> scalar`` for a batch that is a pair; a mean over examples.
        batch: One.
        include: Name patterns of the layers, those with a weight of two or more axes; empty means all.
        exclude: Name patterns of layers to leave out.
        step: In place of ``loss``: a function ``(model, batch) -> scalar``.

    Raises:
        BatchNormError: If there is no loss, no gradient or no such layer.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)  # L(w) = Σxw: d = x
        >>> x = torch.tensor([[1.0], [-3.0]])
        >>> row = gradient_coherence(layer, None, x, step=lambda model, x: model(x).sum()).layers[0]
        >>> row.sum_of_sizes, row.size_of_sum, row.coherence
        (4.0, 2.0, 0.5)

    Reference:
        Bjorck et al., Understanding batch normalization, arXiv:1806.02375, §4, on the gradients of a kernel.
    """
    with objective_of(model, loss, batch, step) as objective:
        return measure_gradient_coherence(objective, include, exclude)


def measure_gradient_coherence(
    objective: Objective, include: Iterable[str] = (), exclude: Iterable[str] = ()
) -> GradientCoherence:
    """Measure it of an objective, see `gradient_coherence`."""
    weights = weight_layers(objective, include, exclude)
    reasons = {name: _reason(objective.network.get_submodule(name)) for name in weights.values()}
    measured = {name: weight for weight, name in weights.items() if reasons[name] is None}
    layers = {name: objective.network.get_submodule(name) for name in measured}
    with call_order(objective.network) as order, torch.enable_grad(), _calls_of(layers) as calls:
        loss = objective.loss()
    # One list for both: the backward pass is made once.
    edges = [edge for each in calls.values() for _, edge in each]
    found = objective.gradients_of(loss, [*edges, *(objective.parameters[weight] for weight in measured.values())])
    by_call, by_layer = iter(found), dict(zip(measured, found[len(edges) :], strict=True))
    sizes = {name: sum(_sizes(layers[name], given, next(by_call)) for given, _ in calls[name]) for name in calls}
    rows = []
    for name in sorted(reasons, key=lambda name: place_in(order, name)):
        if name not in measured:
            rows.append(LayerCoherence(name, math.nan, math.nan, reasons[name]))
            continue
        total = by_layer[name]
        rows.append(LayerCoherence(name, sizes[name], 0.0 if total is None else _mean(total.abs())))
    return GradientCoherence(tuple(rows))


def _reason(layer: nn.Module) -> str | None:
    """Say why a layer's gradient is not a sum of products of an input and an output's gradient, if so."""
    if not isinstance(layer, _ConvNd | nn.Linear):
        return f"a {type(layer).__name__} is neither a convolution nor a linear layer"
    return None


@contextmanager
def _calls_of(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, list[tuple[Tensor, GradientEdge]]]]:
    """Keep the input of each call, and where in the graph its output is made."""
    calls: dict[str, list[tuple[Tensor, GradientEdge]]] = {name: [] for name in layers}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            # Not the output itself, which an activation may overwrite in place.
            calls[name].append((args[0].detach(), get_gradient_edge(output)))

        return hook

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_hook(keep(name)).remove)
        yield calls


def _sizes(layer: nn.Module, given: Tensor, gradient: Tensor | None) -> float:
    """Return the mean of the layer's weight gradient for |input| and |gradient|."""
    if gradient is None:
        return 0.0
    weight = layer._parameters["weight"]
    assert weight is not None
    with torch.enable_grad(), torch.autocast(given.device.type, enabled=False):
        output = type(layer).forward(layer, given.abs().to(weight.dtype))
        (sizes,) = torch.autograd.grad(output, weight, gradient.abs().to(weight.dtype))
    return _mean(sizes)


def _mean(values: Tensor) -> float:
    return float(values.detach().mean(dtype=accumulation_dtype(values.device)))
