"""Percentiles of what goes into or comes out of a layer."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bn_lightning.errors import BatchNormError
from bn_lightning.monitoring.channels import find_tensor
from bn_lightning.monitoring.layers import unmeasurable
from bn_lightning.probes.objective import Step, forward_of
from bn_lightning.probes.observed import observed_layers
from bn_lightning.reports.curves import Curve, along_layers, curve_figure
from bn_lightning.reports.table import Table
from bn_lightning.reports.tabled import Tabled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ActivationPercentiles", "LayerPercentiles", "activation_percentiles"]

_SIDES = ("output", "input")


@dataclass(frozen=True, slots=True)
class LayerPercentiles:
    """One layer's.

    Attributes:
        name: The layer's.
        values: One a percentile, activation units; NaN if there is a NaN among the activations or it was not measured.
        reason: Why nothing, or not everything, was measured, or ``None``.
    """

    name: str
    values: tuple[float, ...]
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class ActivationPercentiles(Tabled):
    """One row a layer, in order of execution, at one time.

    Attributes:
        percentiles: Which, in percent, ascending.
        of: ``"output"`` or ``"input"``.
        layers: All that were asked for, those not measured with a reason.
    """

    percentiles: tuple[float, ...]
    of: str
    layers: tuple[LayerPercentiles, ...]

    def scalars(self) -> dict[str, float]:
        """Return what one logs of it."""
        return {
            f"{row.name}/{self.of}_p{percentile:g}": value
            for row in self.layers
            for percentile, value in zip(self.percentiles, row.values, strict=True)
            if not math.isnan(value) or row.reason is None
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def figure(self) -> "Figure":
        """Draw each percentile along the layers; over time they are drawn by `PercentileHistory`."""
        places = range(1, len(self.layers) + 1)
        curves = [
            Curve(f"{percentile:g} %", places, [row.values[index] for row in self.layers])
            for index, percentile in enumerate(self.percentiles)
        ]
        figure = curve_figure(
            curves, title=f"percentiles of each layer's {self.of}", xlabel="layer", ylabel="activation units"
        )
        along_layers(figure.axes[0])
        return figure

    def table(self) -> Table:
        """Put it into a table."""
        return Table(
            f"percentiles of each layer's {self.of}, activation units",
            ("layer", *(f"{percentile:g} %" for percentile in self.percentiles)),
            [(row.name, *row.values) for row in self.layers],
            [f"{row.name!r}: {row.reason}" for row in self.layers if row.reason],
        )


def activation_percentiles(
    model: nn.Module,
    batch: Any,
    *,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    of: str = "output",
    percentiles: Sequence[float] = (15, 50, 85),
    channel: int | None = None,
    channel_dim: int = 1,
    step: Step | None = None,
) -> ActivationPercentiles:
    """Measure percentiles of the layers' outputs or inputs at one time of training: one forward pass.

    Between two values that are nearest they are interpolated linearly, as NumPy does. Internal covariate shift is what
    they do over time, which `PercentileHistory` collects.

    Args:
        model: The network; it comes back bit for bit. In evaluation mode it is run in training mode all the same.
        batch: A tensor, or a tuple or list whose first element is the input.
        include: Name patterns of the layers, of any kind; empty means all convolutions and linear layers.
        exclude: Name patterns of layers to leave out.
        of: ``"output"`` or ``"input"``.
        percentiles: Which, from 0 to 100.
        channel: The one channel to look at, as Fig. 1 does; ``None`` takes all values of the layer together.
        channel_dim: Where the channels are, if one was chosen; -1 for linear layers on sequences.
        step: A function ``(model, batch)`` that runs the network on any other batch.

    Raises:
        BatchNormError: If the network cannot be run, there is no such layer, or the percentiles are none.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0]])
        >>> activation_percentiles(nn.Sequential(nn.ReLU()), x, include=["0"], percentiles=(25, 50)).layers[0].values
        (1.0, 2.0)

    Reference:
        Ioffe & Szegedy, Batch normalization, arXiv:1502.03167, §4.1 and Fig. 1(b, c).
    """
    chosen = tuple(sorted(percentiles))
    if not chosen or not all(0 <= each <= 100 for each in chosen):
        raise BatchNormError(f"percentiles lie between 0 and 100, and there is at least one, got {percentiles!r}.")
    if of not in _SIDES:
        raise BatchNormError(f"of= must be one of {', '.join(map(repr, _SIDES))}, got {of!r}.")

    def measure(values: Tensor) -> Tensor:
        if channel is not None:
            values = values.select(channel_dim, channel)
        return _percentiles(values, chosen)

    with forward_of(model, batch, step) as objective, torch.no_grad():
        names = observed_layers(objective.network, include, exclude)
        with _first_calls(objective.network, names, of, measure) as (found, reasons):
            objective.forward()
    for name in names:
        if name not in found:
            reasons.setdefault(name, "not called")
    unknown = (math.nan,) * len(chosen)
    measured = list(found.values())
    # One transfer, whatever the number of layers.
    rows = torch.stack([each.to(measured[0].device) for each in measured]).tolist() if measured else []
    values = dict(zip(found, rows, strict=True))
    return ActivationPercentiles(
        chosen,
        of,
        tuple(
            LayerPercentiles(name or "(root)", tuple(values.get(name, unknown)), reasons.get(name))
            for name in dict.fromkeys([*found, *names])
        ),
    )


def _percentiles(values: Tensor, percentiles: Sequence[float]) -> Tensor:
    """Sort, and interpolate between neighbours: torch.quantile takes no more than 2²⁴ values."""
    ordered = values.detach().reshape(-1)
    ordered = (ordered if ordered.dtype == torch.float64 else ordered.float()).sort().values
    if not len(ordered):
        return ordered.new_full((len(percentiles),), math.nan, dtype=torch.float32)
    at = torch.tensor([each / 100 * (len(ordered) - 1) for each in percentiles], dtype=torch.float64).to(ordered.device)
    below = at.floor()
    found = torch.lerp(ordered[below.long()], ordered[at.ceil().long()], (at - below).to(ordered.dtype))
    return torch.where(ordered[-1].isnan(), math.nan, found).double()  # NaN are sorted to the end


@contextmanager
def _first_calls(
    network: nn.Module, names: Iterable[str], of: str, measure: Callable[[Tensor], Tensor]
) -> Iterator[tuple[dict[str, Tensor], dict[str, str]]]:
    """Measure the input or output of each layer's first call, at once: an activation may overwrite it in place."""
    found: dict[str, Tensor] = {}
    reasons: dict[str, str] = {}

    def look(name: str, given: Any) -> None:
        if name in found or name in reasons:
            reasons[name] = "called more than once, of which the first is measured" if name in found else reasons[name]
            return
        tensor = find_tensor(given)
        reason = f"there is no tensor in its {of}" if tensor is None else unmeasurable(tensor).replace("output", of)
        if tensor is None or reason:
            reasons[name] = reason
            return
        try:
            found[name] = measure(tensor)
        except IndexError as error:
            raise BatchNormError(
                f"the {of} of {name!r} has shape {tuple(tensor.shape)}, which has no such channel: {error}. Give "
                "another channel= or channel_dim=, or leave the layer out with exclude=."
            ) from error

    def hook_for(name: str) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            look(name, (args, kwargs))

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            look(name, output)

        return before if of == "input" else after

    with ExitStack() as hooks:
        for name in names:
            module = network.get_submodule(name)
            if of == "input":
                hooks.callback(module.register_forward_pre_hook(hook_for(name), with_kwargs=True).remove)
            else:
                hooks.callback(module.register_forward_hook(hook_for(name)).remove)
        yield found, reasons
