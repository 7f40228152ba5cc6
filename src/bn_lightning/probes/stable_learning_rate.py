"""The largest learning rate at which plain gradient descent does not diverge."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bn_lightning.errors import BatchNormError
from bn_lightning.preservation import written_back
from bn_lightning.probes.objective import Loss, Objective, Step, objective_of
from bn_lightning.recalibration.batches import checked_batches
from bn_lightning.reports.curves import Curve, curve_figure
from bn_lightning.reports.progress import progress
from bn_lightning.reports.table import Table
from bn_lightning.reports.tabled import Tabled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["StableLearningRate", "TrialRun", "max_stable_learning_rate", "most_runs"]


@dataclass(frozen=True, slots=True)
class TrialRun:
    """One run from the given weights.

    Attributes:
        learning_rate: Of its steps.
        losses: Of each batch before its step, up to where it diverged.
        diverged_at: The step at which it did, counted from 1; ``None`` if it did not.
    """

    learning_rate: float
    losses: tuple[float, ...]
    diverged_at: int | None


@dataclass(frozen=True, slots=True)
class StableLearningRate(Tabled):
    """What was tried, and between which two runs the limit lies.

    Attributes:
        runs: By learning rate, ascending.
        steps: Of a run.
        diverged: From what loss, times that of the first step, on a run counts as diverged.
    """

    runs: tuple[TrialRun, ...]
    steps: int
    diverged: float

    @property
    def learning_rate(self) -> float | None:
        """The largest one below all that diverged; ``None`` if the smallest one tried did."""
        stable = [run.learning_rate for run in self.runs if run.diverged_at is None]
        return max((each for each in stable if each < (self.diverging or math.inf)), default=None)

    @property
    def diverging(self) -> float | None:
        """The smallest one that diverged; ``None`` if none did."""
        return min((run.learning_rate for run in self.runs if run.diverged_at is not None), default=None)

    def scalars(self) -> dict[str, float]:
        """Return what one logs of it: 0 where even the smallest one diverged."""
        return {"max_stable_learning_rate": self.learning_rate or 0.0}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), "learning_rate": self.learning_rate, "diverging": self.diverging}

    def figure(self) -> "Figure":
        """Draw the losses of the two runs between which the limit lies, and of the outermost ones."""
        from matplotlib.ticker import MaxNLocator

        shown = {self.runs[0].learning_rate, self.learning_rate, self.diverging, self.runs[-1].learning_rate}
        runs = [run for run in self.runs if run.learning_rate in shown]
        figure = curve_figure(
            [
                Curve(
                    f"learning rate {run.learning_rate:.3g}{'' if run.diverged_at is None else ' diverges'}",
                    range(1, len(run.losses) + 1),
                    run.losses,
                )
                for run in runs
            ],
            title="plain gradient descent from the same weights",
            xlabel="step",
            ylabel="loss before the step",
            yscale="log",
        )
        figure.axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
        return figure

    def table(self) -> Table:
        """Put it into a table."""
        stable, diverging = self.learning_rate, self.diverging
        if stable is None:
            found = f"even {self.runs[0].learning_rate:.3g} diverges: try smaller ones with low="
        elif diverging is None:
            found = f"none diverges, up to {stable:.3g}: try larger ones with high="
        else:
            found = f"stable at {stable:.3g}, diverging at {diverging:.3g}"
        return Table(
            f"plain gradient descent over {self.steps} steps, from the same weights",
            ("learning rate", "last loss", "diverged at step"),
            [(run.learning_rate, run.losses[-1], run.diverged_at) for run in self.runs],
            [found, f"diverged: a loss above {self.diverged:g} times the first, or none that is finite"],
        )


def max_stable_learning_rate(
    model: nn.Module,
    loss: Loss | None,
    batches: Iterable[Any],
    *,
    low: float = 1e-4,
    high: float = 10.0,
    ratio: float = 1.1,
    steps: int = 30,
    diverged: float = 1e3,
    step: Step | None = None,
) -> StableLearningRate:
    """Find the largest learning rate at which plain gradient descent from the present weights does not diverge.

    A run takes ``steps`` steps w ← w − η∇L, over the batches in turn, without momentum or weight decay. It has diverged
    once a loss is not finite or more than ``diverged`` times that of its first step. The limit is looked for by
    bisection between ``low`` and ``high`` on a logarithmic scale, until the smallest η that diverges is less than
    ``ratio`` times the largest below it. On a quadratic loss it is 2/λ, λ the largest curvature, approached from above
    as ``steps`` grow.

    It takes up to 2 + log₂(ln(high/low)/ln ratio) runs of ``steps`` forward and backward passes each, by default 9;
    one that diverges ends there. Every run starts from the same weights, which are put back in place; beside them,
    their copy and the gradients nothing is kept.

    Args:
        model: The network; it comes back bit for bit.
        loss: A function ``(output, target) -> scalar`` for batches that are pairs.
        batches: At most ``steps`` of them are kept; they are gone through again if there are fewer.
        low: The smallest η to try.
        high: The largest η to try.
        ratio: How well to know the limit, above 1.
        steps: Of a run.
        diverged: From what loss, times the first, on a run counts as diverged; above 1.
        step: In place of ``loss``: a function ``(model, batch) -> scalar``.

    Raises:
        BatchNormError: If there is no loss, gradient or batch, or a limit makes no sense.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> pair = torch.full((1, 1), 2.0), torch.zeros(1, 1)  # L(w) = 4w², λ = 8: the limit is 0.25
        >>> found = max_stable_learning_rate(layer, nn.functional.mse_loss, [pair], steps=200)
        >>> found.learning_rate < 0.26 < 1.1 * found.diverging
        True

    Reference:
        Bjorck et al., Understanding batch normalization, arXiv:1806.02375, §3: BN's gain is the learning rate it
        allows.
    """
    if not (0 < low < high < math.inf and ratio > 1 and diverged > 1 and steps >= 1):
        raise BatchNormError(
            "expected 0 < low < high, ratio > 1, diverged > 1 and steps ≥ 1, got "
            f"low={low}, high={high}, ratio={ratio}, diverged={diverged}, steps={steps}."
        )
    kept = list(islice(checked_batches(batches, steps), steps))
    if not kept:
        raise BatchNormError("batches gave no data: an empty loader, or a generator that was already used up?")
    runs: dict[float, TrialRun] = {}
    with (
        objective_of(model, loss, kept[0], step) as objective,
        written_back(objective.network) as put_back,
        progress("learning rates", most_runs(low, high, ratio)) as advance,
    ):

        def diverges(rate: float) -> bool:
            runs[rate] = _run(objective, kept, rate, steps, diverged)
            put_back()
            advance()
            return runs[rate].diverged_at is not None

        if not diverges(low) and diverges(high):
            stable, diverging = low, high
            while diverging > ratio * stable:
                middle = math.sqrt(stable * diverging)
                stable, diverging = (stable, middle) if diverges(middle) else (middle, diverging)
    return StableLearningRate(tuple(runs[rate] for rate in sorted(runs)), steps, diverged)


def most_runs(low: float, high: float, ratio: float) -> int:
    """Return how many runs `max_stable_learning_rate` takes at most.

    Example:
        >>> most_runs(1e-4, 10.0, 1.1)
        9
    """
    return 2 + math.ceil(math.log2(max(math.log(high / low) / math.log(ratio), 1)))


def _run(objective: Objective, batches: Sequence[Any], rate: float, steps: int, diverged: float) -> TrialRun:
    losses: list[float] = []
    for index in range(steps):
        objective.batch, objective.draw = batches[index % len(batches)], index
        loss, gradient = objective.gradient()
        losses.append(loss)
        if not math.isfinite(loss) or loss > diverged * losses[0]:
            return TrialRun(rate, tuple(losses), index + 1)
        with torch.no_grad():
            for name, each in gradient.items():
                objective.parameters[name].sub_(each, alpha=rate)
    return TrialRun(rate, tuple(losses), None)
