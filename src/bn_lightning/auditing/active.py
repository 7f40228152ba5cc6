"""The active stage: run data through the network, and measure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.auditing.attribution import Attribution, InputShift, no_gradients_because
from bn_lightning.auditing.exchange import from_everyone
from bn_lightning.auditing.losses import LossChange, LossReadings, compare_losses
from bn_lightning.auditing.observer import Observer
from bn_lightning.auditing.passes import Passes
from bn_lightning.errors import SingleValueError
from bn_lightning.recalibration import LayerPopulation
from bn_lightning.recalibration.run import Run, examples_in

__all__ = ["Measured", "measure", "usable_statistics"]

# So many of the layers whose recalibration is predicted to matter most are recalibrated indeed.
_CONFIRMED = 3
_NO_LOSS = "no loss was given: loss= for (input, target) batches, step= for any other"
_LOSSES, _CHANGES = "loss readings", "predicted loss changes"


@dataclass(frozen=True, slots=True)
class Measured:
    """What the passes gave.

    Attributes:
        population: Every selected layer's input over the training batches.
        evaluation: The same over the evaluation batches; empty without them.
        losses: The loss under five readings, or ``None``.
        changes: By layer, what recalibrating it alone would do to the deployed loss; empty without a loss.
        problems: What could not be had, with the reason.
        single_values: Of batches that give a layer one value per channel, which were left out.
    """

    population: Mapping[str, LayerPopulation]
    evaluation: Mapping[str, LayerPopulation] = field(default_factory=dict)
    losses: LossReadings | None = None
    changes: Mapping[str, LossChange] = field(default_factory=dict)
    problems: Mapping[str, str] = field(default_factory=dict)
    single_values: tuple[SingleValueError, ...] = ()


@dataclass(frozen=True, slots=True)
class _Share:
    """What one process read of its own batches: losses by reading, changes as `Attribution.changes`."""

    losses: Mapping[str, Sequence[float | None]]
    examples: Sequence[int]
    movable: Sequence[str]
    changes: Mapping[str, float]
    problem: str | None


def measure(
    network: nn.Module,
    layers: Mapping[str, _BatchNorm],
    train_batches: Sequence[Any],
    val_batches: Sequence[Any] | None,
    *,
    run: Run,
    observers: Sequence[Observer] = (),
) -> Measured:
    """Make the passes, on a network that is borrowed already.

    With a loss these are four over the batches whose losses are read, one of them with a backward pass, and one for
    each layer whose prediction is confirmed. They are the training batches; or the evaluation batches if they are
    given, which take two passes more: one over the training batches for the population statistics, one with the
    statistics of the evaluation inputs. Without a loss there is one pass over each kind of batches.

    With several processes each runs its own batches, of any number, and all get the readings of all: no collective runs
    during a pass, and what fails in one raises in all (`from_everyone`).
    """
    passes = Passes(network, layers, run, observers)
    reads_train = run.reads_losses and val_batches is None
    population, by_batch = passes.population(train_batches, "population", reads=reads_train)
    evaluation: dict[str, LayerPopulation] = {}
    if val_batches is not None:
        evaluation, by_batch = passes.population(val_batches, "evaluation_population", reads=run.reads_losses)
    told = tuple(passes.single_values)
    if not run.reads_losses:
        return Measured(population, evaluation, problems={_LOSSES: _NO_LOSS}, single_values=told)
    batches = train_batches if val_batches is None else val_batches
    precise = usable_statistics(layers, population)

    def read() -> _Share:
        shifts = {name: InputShift.towards(layers[name], *statistics) for name, statistics in precise.items()}
        movable = {name: shift for name, shift in shifts.items() if shift is not None}
        attribution = Attribution(movable, no_gradients_because(network))
        losses = {
            "full_training": passes.training(batches),
            "batch_statistics": by_batch,
            "recalibrated": passes.evaluation(batches, "recalibrated", precise),
            "deployed": passes.evaluation(batches, "deployed", {}, attribution),
        }
        if val_batches is not None:
            of_evaluation = usable_statistics(layers, evaluation)
            losses["evaluation_statistics"] = passes.evaluation(batches, "evaluation_statistics", of_evaluation)
        examples = [examples_in(batch) for batch in batches]
        return _Share(losses, examples, list(movable), attribution.changes, attribution.problem)

    shares = from_everyone(read)
    losses = {name: _joined(share.losses[name] for share in shares) for name in shares[0].losses}
    examples = _joined(share.examples for share in shares)
    readings = compare_losses("training" if val_batches is None else "evaluation", losses, examples)
    if readings is None:
        reason = "no batch has a loss in all readings: the step returned none, or batches are empty or of single values"
        return Measured(population, evaluation, problems={_LOSSES: reason}, single_values=told)
    problems = _shortcomings(readings, len(examples))
    problem = next((share.problem for share in shares if share.problem is not None), None)
    changes: dict[str, LossChange] = {}
    if problem is not None:
        problems[_CHANGES] = problem
    else:
        changes = _predicted(layers, shares, sum(_counted(losses["deployed"], examples)))
        deployed = _mean(losses["deployed"], examples)

        def confirmed(name: str) -> float:
            own = from_everyone(lambda: passes.evaluation(batches, f"confirm {name}", {name: precise[name]}))
            return _mean(_joined(own), examples) - deployed

        for name in sorted(changes, key=lambda name: -abs(changes[name].predicted or 0.0))[:_CONFIRMED]:
            if changes[name].predicted:
                changes[name] = LossChange(changes[name].predicted, confirmed(name))
    return Measured(population, evaluation, readings, changes, problems, told)


def usable_statistics(
    layers: Mapping[str, _BatchNorm], population: Mapping[str, LayerPopulation]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Give the mean and variance (correction=1) that recalibration would write, of the layers it would write to."""
    return {
        name: (each.moments.mean, each.moments.var(correction=1))
        for name, each in population.items()
        if each.moments.count > 1
        and not each.frozen
        and each.unlike is None
        and layers[name].running_mean is not None
        and layers[name].running_var is not None
    }


def _predicted(layers: Mapping[str, _BatchNorm], shares: Sequence[_Share], counted: int) -> dict[str, LossChange]:
    """Add up what all processes predict, or say why there is no prediction."""
    found = {}
    for name in layers:
        reached = [share.changes[name] for share in shares if name in share.changes]
        total = sum(reached) / counted
        if not all(name in share.movable for share in shares):
            reason = "it has no statistics to be recalibrated with, or they are not finite"
        elif not reached:
            reason = (
                "no gradient reaches it: it did not run, or ran under torch.no_grad() or in a checkpoint with "
                "use_reentrant=True, or its output is detached"
            )
        elif not math.isfinite(total):
            reason = "the gradient of the loss is not finite"
        else:
            found[name] = LossChange(total)
            continue
        found[name] = LossChange(None, None, f"no predicted loss change: {reason}")
    return found


def _shortcomings(readings: LossReadings, batches: int) -> dict[str, str]:
    """Say what the readings do not cover."""
    found = {}
    if readings.batches < batches:
        found["losses of some batches"] = (
            f"{batches - readings.batches} of {batches} batches are left out of all readings: the step returned no "
            "loss for them, or they are empty, or give a layer one value per channel"
        )
    wild = [name for name, reading in readings.readings().items() if not math.isfinite(reading.mean)]
    if wild:
        found["finite losses"] = (
            f"the loss is not finite under {', '.join(wild)}: what is compared with it says nothing"
        )
    return found


def _joined(parts: Any) -> list[Any]:
    return list(chain.from_iterable(parts))


def _counted(losses: Sequence[float | None], examples: Sequence[int]) -> list[int]:
    """Give each batch's examples, 0 for a batch without a loss."""
    return [0 if loss is None else number for loss, number in zip(losses, examples, strict=True)]


def _mean(losses: Sequence[float | None], examples: Sequence[int]) -> float:
    """Average over examples, of the batches that gave a loss."""
    counts = _counted(losses, examples)
    return sum((loss or 0.0) * number for loss, number in zip(losses, counts, strict=True)) / sum(counts)
