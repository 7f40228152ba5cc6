"""How far moving averages are from the population's statistics, by the size of the batches they average."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.errors import BatchNormError
from bn_lightning.functional import channel_gap, layer_gap
from bn_lightning.layers.frozen import FrozenBatchNorm
from bn_lightning.preservation import eagerly, out_of_inference_mode, preserved
from bn_lightning.probes.objective import Step
from bn_lightning.probes.rebatched import Examples
from bn_lightning.recalibration.population import LayerPopulation, population_statistics
from bn_lightning.recalibration.result import write_statistics
from bn_lightning.recalibration.run import Run, same_randomness
from bn_lightning.reports.curves import Curve, curve_figure
from bn_lightning.reports.progress import progress
from bn_lightning.reports.table import Table
from bn_lightning.reports.tabled import Tabled
from bn_lightning.selection import require_batch_norms, unwrap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LayerGap", "PopulationGap", "population_gap"]


@dataclass(frozen=True, slots=True)
class LayerGap:
    """One layer at one batch size.

    Attributes:
        name: The layer's.
        batch_size: Examples a batch.
        gap: Error of evaluation's output by the moving averages, in its standard deviations; NaN if not measured.
        variance_error: |moving average − population| / population of the variance, the median over channels.
        reason: Why it was not measured, or ``None``.
    """

    name: str
    batch_size: int
    gap: float
    variance_error: float
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class PopulationGap(Tabled):
    """One row a layer and batch size, by batch size.

    Attributes:
        batch_sizes: Ascending.
        steps: How many batches were averaged at each.
        layers: The rows.
    """

    batch_sizes: tuple[int, ...]
    steps: int
    layers: tuple[LayerGap, ...]

    def median_gap(self, batch_size: int) -> float:
        """Return the median over the layers; NaN if none was measured."""
        gaps = self._gaps(batch_size)
        return median(gaps) if gaps else math.nan

    def scalars(self) -> dict[str, float]:
        """Return what one logs of it."""
        return {f"population_gap/batch_size_{size}": self.median_gap(size) for size in self.batch_sizes}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def figure(self) -> "Figure":
        """Draw the layers' median gap over the batch size, the smallest and the largest around it."""
        gaps = [self._gaps(size) or [math.nan] for size in self.batch_sizes]
        middle = [median(each) for each in gaps]
        return curve_figure(
            [Curve("", self.batch_sizes, middle, [min(each) for each in gaps], [max(each) for each in gaps])],
            title="gap between moving averages and Algorithm 2: median layer, least to largest in the shade",
            xlabel="examples a batch",
            ylabel="gap, standard deviations of the output",
            xscale="log",
            yscale="log",
        )

    def _gaps(self, batch_size: int) -> list[float]:
        return [row.gap for row in self.layers if row.batch_size == batch_size and row.reason is None]

    def table(self) -> Table:
        """Put it into a table."""
        reasons = {row.name: row.reason for row in self.layers if row.reason}
        return Table(
            f"moving averages over {self.steps} batches against Algorithm 2",
            ("layer", "examples a batch", "gap, output σ", "error of the variance"),
            [(row.name, row.batch_size, row.gap, row.variance_error) for row in self.layers],
            [f"{name!r} was not measured: {reason}" for name, reason in reasons.items()],
        )


def population_gap(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    batch_sizes: Iterable[int] = (4, 16, 64),
    steps: int = 100,
    max_batches: int = 200,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    step: Step | None = None,
    seed: int = 0,
) -> PopulationGap:
    """Compare what moving averages know of the data with Algorithm 2, by batch size, under the present weights.

    At each size the data is put together anew. Population statistics are measured over all of it; from them, so that
    no beginning is left in the averages, the layers' own moving averages go on for ``steps`` batches drawn at random.
    What remains is the noise of an average that remembers some 1/momentum batches. For values that are independent and
    normal, the gap is √(3/2 · momentum / ((2 − momentum) · n)) for n values a channel and batch.

    It takes ``steps`` forward passes, and one through all the data, at each size; no backward pass.

    Args:
        model: The network; it comes back bit for bit.
        batches: Tensors, or whatever ``step`` takes; every tensor in them has one entry an example.
        batch_sizes: Examples a batch.
        steps: How many batches the moving averages go on for.
        max_batches: At most so many of the batches are kept.
        include: Name patterns of the BN layers; empty means all.
        exclude: Name patterns of the BN layers to leave out.
        step: A function ``(model, batch)`` that runs the network on batches that are no (input, …) tuples.
        seed: Of the draws.

    Raises:
        BatchNormError: If there is no BN layer, no batch of such a size, or the network cannot be run.

    Example:
        >>> import torch
        >>> x = torch.randn(256, 2, generator=torch.Generator().manual_seed(0))
        >>> found = population_gap(nn.BatchNorm1d(2), [x], batch_sizes=(4, 64))
        >>> found.median_gap(4) > 2 * found.median_gap(64)
        True

    Reference:
        Ioffe & Szegedy, Batch normalization, arXiv:1502.03167, Alg. 2; Wu & Johnson, arXiv:2105.07576, §3.
    """
    network, sizes = unwrap(model), tuple(sorted(batch_sizes))
    layers = require_batch_norms(network, include, exclude)
    examples = Examples(batches, max_batches)
    if steps < 1 or not sizes or not 1 <= sizes[0] <= sizes[-1] <= examples.count:
        raise BatchNormError(
            f"expected steps ≥ 1 and batch_sizes from 1 to the {examples.count} examples there are, got steps={steps}, "
            f"batch_sizes={sizes}."
        )
    run, rows = Run(forward=step, cure="step=lambda model, batch: model(...)"), []
    with progress("batches", steps * len(sizes)) as advance:
        for size in sizes:
            with _training(network):
                found = population_statistics(
                    network,
                    examples.in_order(size),
                    max_batches=examples.count,
                    forward=run,
                    include=include,
                    exclude=exclude,
                    show_progress=False,
                )
                for name, layer in layers.items():
                    if _reason(layer, found[name]) is None:
                        moments = found[name].moments
                        write_statistics(layer, moments.mean, moments.var(correction=1))
                for index, batch in enumerate(examples.drawn(size, steps, seed)):
                    same_randomness(index)
                    run(network, batch)
                    advance()
                rows += [_row(name, layer, found[name], size) for name, layer in layers.items()]
    return PopulationGap(sizes, steps, tuple(rows))


@contextmanager
def _training(network: nn.Module) -> Iterator[None]:
    """Lend the network out in training mode, its statistics moving, without gradients."""
    with preserved(network), out_of_inference_mode(), eagerly():
        if not network.training:
            for module in network.modules():
                module.training = not isinstance(module, FrozenBatchNorm)  # not .train(): it may rebuild the module
        yield


def _reason(layer: _BatchNorm, population: LayerPopulation) -> str | None:
    if layer.running_mean is None:
        return "it has no running statistics"
    if population.moments.count < 2:
        return "never reached"
    if population.frozen:
        return "frozen: its running statistics do not move"
    return population.unlike


def _row(name: str, layer: _BatchNorm, population: LayerPopulation, size: int) -> LayerGap:
    reason = _reason(layer, population)
    if reason is not None:
        return LayerGap(name, size, math.nan, math.nan, reason)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    mean, var = population.moments.mean, population.moments.var(correction=1)
    running = layer.running_var.to(var)
    channels = channel_gap(layer.running_mean.to(mean), running, mean, var, layer.eps)
    gap = float(layer_gap(channels, None if layer.weight is None else layer.weight.detach()))
    return LayerGap(name, size, gap, float(((running - var).abs() / var).median()))
