"""The loss on identical samples under five readings, and what their differences are."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from bn_lightning.functional.bootstrap import mean_interval
from bn_lightning.reports.intervals import interval_in_words

__all__ = ["LossChange", "LossDifference", "LossReading", "LossReadings", "compare_losses"]


@dataclass(frozen=True, slots=True)
class LossReading:
    """A mean loss with its 95 % bootstrap interval over batches.

    Attributes:
        mean: Over samples.
        low: Lower end.
        high: Upper end.
    """

    mean: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """Return the fields."""
        return {"mean": self.mean, "low": self.low, "high": self.high}


@dataclass(frozen=True, slots=True)
class LossDifference:
    """One reading less another, paired batch by batch.

    Attributes:
        name: What the difference is: ``"stale statistics"``, ``"batch dependence"``, ``"dropout"``, ``"domain shift"``.
        higher: The reading that is subtracted from.
        lower: The reading that is subtracted.
        mean: The difference of the means.
        low: Lower end of its 95 % bootstrap interval.
        high: Upper end.
        rounding: What two ways of computing the same reading may differ by: a ten-thousandth of the loss.
    """

    name: str
    higher: str
    lower: str
    mean: float
    low: float
    high: float
    rounding: float = 0.0

    @property
    def is_evident(self) -> bool:
        """Whether the interval leaves out zero by more than rounding; else there is no evidence of a difference."""
        return self.low > self.rounding or self.high < -self.rounding

    def to_dict(self) -> dict[str, float | str | bool]:
        """Return the fields."""
        return {
            "name": self.name,
            "higher": self.higher,
            "lower": self.lower,
            "mean": self.mean,
            "low": self.low,
            "high": self.high,
            "evident": self.is_evident,
        }


@dataclass(frozen=True, slots=True)
class LossReadings:
    """The loss of the same samples, with the same random numbers, under up to five readings of the network.

    Differences of neighbouring readings are one cause each: *dropout* and its like (``batch_statistics`` less
    ``full_training``), *batch dependence* (``recalibrated`` less ``batch_statistics``: what normalizing by a batch in
    place of all data gives; over evaluation batches that is of the evaluation batches' sizes), *stale statistics*
    (``deployed`` less ``recalibrated``), and on evaluation batches *domain shift* (``recalibrated`` less
    ``evaluation_statistics``). A positive one is a loss that the reading named first has on top.

    Attributes:
        source: ``"training"`` or ``"evaluation"``: which batches these are.
        batches: How many.
        full_training: Everything in training mode.
        batch_statistics: BN by batch statistics, everything else in evaluation mode.
        recalibrated: Evaluation with the training data's population statistics.
        deployed: Evaluation as the network is.
        evaluation_statistics: Evaluation with population statistics of the evaluation inputs; ``None`` without them.
        differences: What the readings' differences are.
    """

    source: str
    batches: int
    full_training: LossReading
    batch_statistics: LossReading
    recalibrated: LossReading
    deployed: LossReading
    evaluation_statistics: LossReading | None
    differences: tuple[LossDifference, ...]

    def difference(self, name: str) -> LossDifference | None:
        """Return a difference by its name."""
        return next((each for each in self.differences if each.name == name), None)

    def readings(self) -> dict[str, LossReading]:
        """Return those there are, by name."""
        values = {name: getattr(self, name) for name in _READINGS}
        return {name: value for name, value in values.items() if value is not None}

    def sentence(self, difference: LossDifference) -> str:
        """Say in words what a difference is, with its interval."""
        name, mean, low, high = difference.name, difference.mean, difference.low, difference.high
        readings = [(reading, getattr(self, reading).mean) for reading in (difference.higher, difference.lower)]
        told = ", ".join(f"{reading.replace('_', ' ')} {value:.3g}" for reading, value in readings)
        if not math.isfinite(mean):
            return f"{name}: unknown ({told})"
        if not difference.is_evident:
            return f"{name}: no evidence, the difference is {interval_in_words(mean, low, high)} ({told})"
        if mean < 0:
            what = f"{difference.higher} is {interval_in_words(-mean, -high, -low)} below {difference.lower}"
            return f"{name}: {what.replace('_', ' ')} ({told})"
        return f"{name} {'cost' if name.endswith('s') else 'costs'} {interval_in_words(mean, low, high)} ({told})"

    def sentences(self) -> list[str]:
        """Say what all differences are, and what else to know of the intervals."""
        told = [self.sentence(each) for each in self.differences]
        if self.batches == 1:
            told.append("One batch has no interval, so that nothing can be evident.")
        elif any(each.low < 0 <= each.mean for each in self.readings().values()):
            told.append(f"An end below 0, where the loss cannot be, only says that {self.batches} batches are few.")
        return told

    def to_dict(self) -> dict[str, object]:
        """Return plain values."""
        values = self.readings()
        return {
            "source": self.source,
            "batches": self.batches,
            **{name: values[name].to_dict() if name in values else None for name in _READINGS},
            "differences": [each.to_dict() for each in self.differences],
        }


_READINGS = ("full_training", "batch_statistics", "recalibrated", "deployed", "evaluation_statistics")
# Name, the reading subtracted from, the reading subtracted.
_DIFFERENCES = (
    ("dropout", "batch_statistics", "full_training"),
    ("batch dependence", "recalibrated", "batch_statistics"),
    ("stale statistics", "deployed", "recalibrated"),
    ("domain shift", "recalibrated", "evaluation_statistics"),
)
_ROUNDING = 1e-4


def compare_losses(
    source: str, losses: Mapping[str, Sequence[float | None]], examples: Sequence[int]
) -> LossReadings | None:
    """Make readings of each batch's losses, and their differences, paired batch by batch.

    Args:
        source: ``"training"`` or ``"evaluation"``.
        losses: Reading to a loss a batch; ``None`` where a batch gave none, which leaves it out of all readings.
        examples: In each batch; batches weigh by them.

    Returns:
        The readings; ``None`` if no batch gave a loss in all of them.

    Example:
        >>> two = [1.0, 3.0]
        >>> names = ("full_training", "batch_statistics", "recalibrated", "deployed")
        >>> compare_losses("training", dict.fromkeys(names, two), [1, 3]).deployed.mean
        2.5
    """
    whole = [place for place in range(len(examples)) if all(each[place] is not None for each in losses.values())]
    if not whole:
        return None
    weights = torch.tensor([float(examples[place]) for place in whole], dtype=torch.float64)
    values = {
        name: torch.tensor([float(each[place] or 0.0) for place in whole], dtype=torch.float64)
        for name, each in losses.items()
    }
    readings = {name: LossReading(*mean_interval(value, weights)) for name, value in values.items()}
    differences = []
    for name, higher, lower in _DIFFERENCES:
        if higher in values and lower in values:
            rounding = _ROUNDING * max(abs(readings[higher].mean), abs(readings[lower].mean))
            interval = mean_interval(values[higher] - values[lower], weights)
            differences.append(LossDifference(name, higher, lower, *interval, rounding))
    return LossReadings(
        source,
        len(whole),
        readings["full_training"],
        readings["batch_statistics"],
        readings["recalibrated"],
        readings["deployed"],
        readings.get("evaluation_statistics"),
        tuple(differences),
    )


@dataclass(frozen=True, slots=True)
class LossChange:
    """By how much the deployed loss would change if one layer alone were recalibrated.

    Attributes:
        predicted: To first order, from one backward pass for all layers; ``None`` where there is no prediction.
        confirmed: By a real swap, for the layers that matter most; ``None`` for the others.
        reason: Why there is no prediction, or ``None``.
    """

    predicted: float | None
    confirmed: float | None = None
    reason: str | None = None
