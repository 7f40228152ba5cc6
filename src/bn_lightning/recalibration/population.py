"""The statistics of each BN layer's input over the data, under the present weights."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.errors import RecalibrationError, SingleValueError
from bn_lightning.functional import ChannelMoments
from bn_lightning.layers.base import unlike_population
from bn_lightning.layers.frozen import FrozenBatchNorm
from bn_lightning.layers.processes import count_processes
from bn_lightning.recalibration.batches import Forward, checked_batches
from bn_lightning.recalibration.measuring import EarlyStop, LocalPass, Tally, measure_locally
from bn_lightning.recalibration.random_draw import checked_tolerance
from bn_lightning.recalibration.replicas import merge_passes
from bn_lightning.selection import describe, require_batch_norms, unwrap

if TYPE_CHECKING:  # not every build of torch has it
    from torch.distributed import ProcessGroup

__all__ = ["LayerPopulation", "Population", "measure_population", "population_statistics"]


@dataclass(frozen=True, slots=True)
class LayerPopulation:
    """What one BN layer's input was over all batches, of all processes.

    Attributes:
        moments: Pooled over every value the layer was given, in float64; ``count`` 0 if it never ran.
        calls: How often the layer ran, several times a batch if it is shared.
        batches: How many batches the model was given.
        frozen: Whether the model is in training mode and the layer trains on its running statistics, being a
            `FrozenBatchNorm` or in evaluation mode. It then normalized by them here too.
        unlike: Why the layer's running statistics are not to be compared with these, if so: a variant's may be others
            than mean and variance of all it is given.
        standard_error: How well so many batches determine them (`Spread.standard_error`): the larger of the standard
            errors of the mean, in σ, and of σ, relative, both RMS over channels. ``None`` for fewer than two batches.
    """

    moments: ChannelMoments
    calls: int
    batches: int
    frozen: bool
    unlike: str | None
    standard_error: float | None = None


@dataclass(frozen=True, slots=True)
class Population:
    """All layers' populations, and how far the measurement went.

    Attributes:
        layers: By name, in registration order.
        batches: How many batches were measured, in all processes together.
        stopped_early: Whether a process left batches undrawn because it knew enough.
    """

    layers: dict[str, LayerPopulation]
    batches: int
    stopped_early: bool


def population_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    max_batches: int = 200,
    forward: Forward | None = None,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    tolerance: float | None = None,
    process_group: "ProcessGroup | None" = None,
    on_single_value: Callable[[SingleValueError], None] | None = None,
    show_progress: bool = True,
) -> dict[str, LayerPopulation]:
    """Measure every selected BN layer's input over the data, under the present weights.

    The selected layers normalize by batch statistics, so that each layer sees what it sees in training, whatever the
    running statistics before it say; everything else (dropout, layers not selected) is in evaluation mode. A layer that
    is in evaluation mode inside a model in training mode counts as frozen and stays so: it is measured, but it
    normalizes by its running statistics. The model is given back bit for bit, also after an error.

    Where ``torch.distributed`` is initialized, every process of the group has to call this with its own share of the
    data. The shares may be of any size, none included, as no collective happens during the passes:
    `CrossReplicaBatchNorm` and SyncBatchNorm, too, normalize by the process's own batch here. Afterwards all layers'
    moments go round in one collective, and every process returns the same bits, those of all data together. What goes
    wrong in one process raises in all. An interrupt does not: the others wait until their process group gives up.

    Args:
        model: The network; DDP and ``torch.compile`` wrappers are looked through.
        batches: Tensors, or tuples or lists whose first element is the input, moved to the model's device; anything
            else with ``forward``. Unequal and empty batches are welcome: values weigh equally, not batches.
        max_batches: Take at most so many batches, in each process; a generator may be given.
        forward: A function ``(model, batch) -> output`` for other batches; it moves them itself.
        include: Name patterns (``fnmatch``) of the BN layers to measure; empty means all.
        exclude: Name patterns of the BN layers to leave out.
        tolerance: Draw no more batches once the standard error of every layer is below it, in σ: of its mean, and of σ
            itself, as `LayerPopulation.standard_error` has it. It is looked at every fifth batch from the twentieth
            on, below which an estimate from the batches' spread is not to be trusted, by each process for its own
            share. ``None`` or 0 takes all batches. What is measured is exact either way.
        process_group: The processes; ``None`` for all.
        on_single_value: Is told of a batch that gives one value per channel to a layer that normalizes by batch
            statistics; the batch is then left out, in all layers. ``None`` raises.
        show_progress: Whether a bar shows on a terminal when it takes more than a second.

    Returns:
        Layer name to what was measured. A layer that never ran is there with ``moments.count`` 0.

    Raises:
        RecalibrationError: If the model has no BN layer or all of them are frozen, if there is no data, if a layer that
            normalizes by batch statistics is given one value per channel (`SingleValueError`), or if a batch is of
            unknown structure; with several processes also if their layers differ, or for any error in one of them.
        BatchNormError: If a pattern matches no BN layer.

    Example:
        >>> import torch
        >>> population_statistics(nn.BatchNorm1d(1), [torch.tensor([[1.0], [3.0]])])[""].moments.mean
        tensor([2.], dtype=torch.float64)

    Reference:
        Ioffe & Szegedy, arXiv:1502.03167, Alg. 2; Wu & Johnson, arXiv:2105.07576, §3.
    """
    return measure_population(
        model,
        batches,
        max_batches=max_batches,
        forward=forward,
        include=include,
        exclude=exclude,
        tolerance=tolerance,
        process_group=process_group,
        on_single_value=on_single_value,
        show_progress=show_progress,
    ).layers


def measure_population(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    max_batches: int,
    forward: Forward | None,
    include: Iterable[str],
    exclude: Iterable[str],
    tolerance: float | None,
    process_group: "ProcessGroup | None",
    on_single_value: Callable[[SingleValueError], None] | None = None,
    show_progress: bool = True,
    check: Callable[[Mapping[str, _BatchNorm]], None] = lambda layers: None,
) -> Population:
    """Measure as `population_statistics` does, and tell how it went; ``check`` may refuse the layers beforehand."""
    processes = count_processes(process_group)
    layers: dict[str, _BatchNorm] = {}
    frozen: set[str] = set()
    done, problem = LocalPass({}), None
    # An error must not keep this process from the exchange that the others wait in.
    try:
        model = unwrap(model)
        layers = require_batch_norms(model, include, exclude, error=RecalibrationError)
        check(layers)
        batches = checked_batches(batches, max_batches)
        frozen = _frozen(model, layers)
        judged = {n: layer.eps for n, layer in layers.items() if n not in frozen and unlike_population(layer) is None}
        stop = EarlyStop(checked_tolerance(tolerance), judged)
        done = measure_locally(
            model, layers, frozen, batches, max_batches, forward, stop, on_single_value, show_progress
        )
    except Exception as error:
        if processes == 1:
            raise
        problem = error
    if processes > 1:
        done = merge_passes(model, layers, frozen, done, problem, process_group)
    if not done.batches:
        raise done.left_out or RecalibrationError(
            "batches gave no data: an empty loader, or a generator that was already used up? Pass a fresh one."
        )
    return Population(
        {
            name: LayerPopulation(
                tally.moments,
                tally.calls,
                done.batches,
                name in frozen,
                unlike_population(layers[name]),
                _standard_error(tally, layers[name].eps),
            )
            for name, tally in done.tallies.items()
        },
        done.batches,
        done.stopped_early,
    )


def _frozen(model: nn.Module, layers: Mapping[str, _BatchNorm]) -> set[str]:
    frozen = {
        name
        for name, layer in layers.items()
        if model.training and (isinstance(layer, FrozenBatchNorm) or not layer.training)
    }
    if len(frozen) == len(layers):
        raise RecalibrationError(
            f"every selected BatchNorm layer of {type(model).__name__} ({describe(layers)}) is frozen: in evaluation "
            "mode, or a FrozenBatchNorm, inside a model in training mode. Call model.eval() first to measure them all "
            "the same."
        )
    return frozen


def _standard_error(tally: Tally, eps: float) -> float | None:
    if tally.spread.batches < 2:
        return None
    error = float(tally.spread.standard_error(eps))
    return error if math.isfinite(error) else None
