"""The loss and its gradient along the gradient: landscape, predictiveness, effective smoothness."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from bn_lightning.errors import BatchNormError
from bn_lightning.probes.objective import Loss, Objective, Step, norm_of, objective_of
from bn_lightning.reports.curves import Curve, curve_figure
from bn_lightning.reports.progress import progress
from bn_lightning.reports.table import Table
from bn_lightning.reports.tabled import Tabled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["GradientLine", "LossLandscape", "effective_smoothness", "gradient_predictiveness", "loss_landscape"]

# Santurkar et al., §3.2: steps of [1/2, 4] times the learning rate.
_FACTORS = (0.5, 4.0)


@dataclass(frozen=True, slots=True)
class LossLandscape(Tabled):
    """The loss at steps along the gradient, none of them kept.

    Attributes:
        loss: Where the network is.
        gradient_norm: ‖∇L‖₂ there, over all parameters.
        steps: Multiples of the gradient that were subtracted, ascending.
        losses: The loss after each.
    """

    loss: float
    gradient_norm: float
    steps: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def low(self) -> float:
        """The lowest loss along the line; NaN if one is."""
        return -_largest([-loss for loss in self.losses])

    @property
    def high(self) -> float:
        """The highest loss along the line; NaN or infinite if one is."""
        return _largest(self.losses)

    @property
    def width(self) -> float:
        """The range of the loss, the quantity of Fig. 4(a): small where a step does what its size says."""
        return self.high - self.low

    def scalars(self) -> dict[str, float]:
        """Return what one logs of it."""
        return {"loss_low": self.low, "loss_high": self.high}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), **self.scalars()}

    def figure(self) -> "Figure":
        """Draw the loss over the step."""
        here = Curve("here", self.steps, [self.loss] * len(self.steps))
        return curve_figure(
            [Curve("after the step", self.steps, self.losses), here],
            title="loss along the gradient",
            xlabel="step, times the gradient",
            ylabel="loss",
            xscale="log",
        )

    def table(self) -> Table:
        """Put it into a table."""
        note = f"range {self.low:.4g} to {self.high:.4g}; {self.loss:.4g} before the step"
        return Table(
            "loss along the gradient", ("step", "loss"), list(zip(self.steps, self.losses, strict=True)), [note]
        )


@dataclass(frozen=True, slots=True)
class GradientLine(Tabled):
    """The loss and how far its gradient is from that at the start, at steps along the gradient, none of them kept.

    Attributes:
        landscape: The losses.
        changes: ‖∇L(θ) − ∇L(θ − s∇L(θ))‖₂ at each step s, over all parameters.
    """

    landscape: LossLandscape
    changes: tuple[float, ...]

    @property
    def predictiveness(self) -> tuple[float, float]:
        """The least and the largest change, the quantity of Fig. 4(b): small where the gradient holds further on."""
        return -_largest([-change for change in self.changes]), _largest(self.changes)

    @property
    def smoothness(self) -> float:
        """β: the largest change by the distance moved, 1/(loss · distance²) in units; NaN where the gradient is 0."""
        moved = [abs(step) * self.landscape.gradient_norm for step in self.landscape.steps]
        ratios = [change / distance for change, distance in zip(self.changes, moved, strict=True) if distance]
        return _largest(ratios) if ratios else math.nan

    def scalars(self) -> dict[str, float]:
        """Return what one logs of it."""
        least, largest = self.predictiveness
        return {"gradient_change_low": least, "gradient_change_high": largest, "effective_smoothness": self.smoothness}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), **self.scalars()}

    def figure(self) -> "Figure":
        """Draw the change of the gradient over the step."""
        return curve_figure(
            [Curve("", self.landscape.steps, self.changes)],
            title=f"change of the gradient along it; effective β {self.smoothness:.3g}",
            xlabel="step, times the gradient",
            ylabel="‖∇L − ∇L after the step‖₂",
            xscale="log",
            yscale="log",
        )

    def table(self) -> Table:
        """Put it into a table."""
        rows = list(zip(self.landscape.steps, self.landscape.losses, self.changes, strict=True))
        note = f"effective β {self.smoothness:.4g}; ‖∇L‖₂ {self.landscape.gradient_norm:.4g} before the step"
        return Table("the gradient along itself", ("step", "loss", "‖change of ∇L‖₂"), rows, [note])


def loss_landscape(
    model: nn.Module,
    loss: Loss | None,
    batch: Any,
    *,
    learning_rate: float,
    factors: tuple[float, float] = _FACTORS,
    points: int = 8,
    step: Step | None = None,
) -> LossLandscape:
    """Measure the loss at steps along the gradient of the same batch.

    It takes one backward pass and ``points`` + 1 forward passes.

    Args:
        model: The network; it comes back bit for bit.
        loss: A function ``(output, target) -> scalar`` for a batch that is a pair.
        batch: One.
        learning_rate: What a step is a multiple of.
        factors: The shortest and the longest step, times the learning rate; the rest lie between at equal ratios.
        points: How many steps, at least 2.
        step: In place of ``loss``: a function ``(model, batch) -> scalar``.

    Raises:
        BatchNormError: If there is no loss, or no gradient, or the steps are none.

    Example:
        >>> import torch
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> pair = torch.ones(1, 1), torch.zeros(1, 1)  # L(w) = w²: a step of 1/2 goes to its bottom
        >>> found = loss_landscape(layer, nn.functional.mse_loss, pair, learning_rate=0.5, factors=(0.5, 1), points=2)
        >>> [round(value / found.loss, 3) for value in found.losses]
        [0.25, 0.0]

    Reference:
        Santurkar et al., How does batch normalization help optimization?, arXiv:1805.11604, §3.2 and Fig. 4(a).
    """
    steps = line_steps(learning_rate, factors, points)
    with objective_of(model, loss, batch, step) as objective:
        return measure_line(objective, steps, gradients=False)[0]


def gradient_predictiveness(
    model: nn.Module,
    loss: Loss | None,
    batch: Any,
    *,
    learning_rate: float,
    factors: tuple[float, float] = _FACTORS,
    points: int = 8,
    step: Step | None = None,
) -> GradientLine:
    """Measure how far the gradient after a step along it is from the one before, on the same batch.

    It takes ``points`` + 1 forward and backward passes, and has the losses, `GradientLine.predictiveness` and
    `GradientLine.smoothness` of them all. Arguments and errors are those of `loss_landscape`.

    Example:
        >>> import torch
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> pair = torch.ones(1, 1), torch.zeros(1, 1)  # L(w) = w² has β = 2 everywhere
        >>> found = gradient_predictiveness(layer, nn.functional.mse_loss, pair, learning_rate=0.1)
        >>> round(found.smoothness, 4)
        2.0

    Reference:
        Santurkar et al., arXiv:1805.11604, §3.2 and Fig. 4(b).
    """
    steps = line_steps(learning_rate, factors, points)
    with objective_of(model, loss, batch, step) as objective:
        landscape, changes = measure_line(objective, steps, gradients=True)
    return GradientLine(landscape, changes)


def effective_smoothness(
    model: nn.Module,
    loss: Loss | None,
    batch: Any,
    *,
    longest: float = 0.4,
    points: int = 8,
    step: Step | None = None,
) -> GradientLine:
    """Measure β, the largest change of the gradient by the distance moved, up to a step of 0.4 times the gradient.

    `gradient_predictiveness` at other steps, 1/8 of the longest to the longest; `GradientLine.smoothness` is β.

    Example:
        >>> import torch
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> pair = torch.full((1, 1), 3.0), torch.zeros(1, 1)  # L(w) = 9w²
        >>> round(effective_smoothness(layer, nn.functional.mse_loss, pair).smoothness, 3)
        18.0

    Reference:
        Santurkar et al., arXiv:1805.11604, §3.2 and Fig. 4(c), whose steps end at 0.4.
    """
    return gradient_predictiveness(
        model, loss, batch, learning_rate=longest, factors=(0.125, 1.0), points=points, step=step
    )


def line_steps(learning_rate: float, factors: tuple[float, float], points: int) -> tuple[float, ...]:
    """Return steps at equal ratios between two multiples of a learning rate.

    Raises:
        BatchNormError: If they are not positive and ascending, or fewer than 2.

    Example:
        >>> line_steps(0.1, (0.5, 2.0), 3)
        (0.05, 0.1, 0.2)
    """
    low, high = factors
    if not (0 < low < high < math.inf and 0 < learning_rate < math.inf) or points < 2:
        raise BatchNormError(
            f"steps along the gradient need a positive learning_rate, 0 < factors[0] < factors[1] and points ≥ 2, got "
            f"learning_rate={learning_rate}, factors={factors}, points={points}."
        )
    ratio = (high / low) ** (1 / (points - 1))
    return tuple(learning_rate * low * ratio**index for index in range(points))


def measure_line(
    objective: Objective, steps: Sequence[float], *, gradients: bool
) -> tuple[LossLandscape, tuple[float, ...]]:
    """Measure the loss at each step, and if asked how far its gradient is from that at the start."""
    loss, start = objective.gradient()
    losses, changes = [], []
    with progress("steps along the gradient", len(steps)) as advance:
        for distance in steps:
            with objective.moved(start, distance):
                if gradients:
                    value, there = objective.gradient()
                    changes.append(norm_of({name: there[name] - each for name, each in start.items()}))
                else:
                    value = objective.value()
            losses.append(value)
            advance()
    return LossLandscape(loss, norm_of(start), tuple(steps), tuple(losses)), tuple(changes)


def _largest(values: Sequence[float]) -> float:
    """Return the largest; NaN if there is one, which max() may pass over."""
    return math.nan if any(map(math.isnan, values)) else max(values)
