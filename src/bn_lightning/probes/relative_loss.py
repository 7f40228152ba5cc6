"""The loss after a step along the gradient by that before it, over many sizes of step, and where it diverges."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from bn_lightning.errors import BatchNormError
from bn_lightning.probes.gradient_line import LossLandscape, line_steps, measure_line
from bn_lightning.probes.objective import Loss, Step, objective_of
from bn_lightning.reports.curves import Curve, curve_figure
from bn_lightning.reports.table import Table
from bn_lightning.reports.tabled import Tabled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["RelativeLoss", "divergence_step", "relative_loss"]

# Bjorck et al., §3.
_DIVERGED = 1e3


@dataclass(frozen=True, slots=True)
class RelativeLoss(Tabled):
    """The landscape, by the loss at its start.

    Attributes:
        landscape: The losses.
        diverged: From what relative loss on a step counts as divergence.
    """

    landscape: LossLandscape
    diverged: float

    @property
    def relative(self) -> tuple[float, ...]:
        """L(θ − s∇L)/L(θ) at each step s; infinite where the loss is not a number."""
        losses = self.landscape.losses
        return tuple(math.inf if math.isnan(loss) else loss / self.landscape.loss for loss in losses)

    @property
    def divergence_step(self) -> float | None:
        """The shortest step at which the loss diverges; ``None`` if none of those tried does."""
        return divergence_step(self.landscape.steps, self.relative, self.diverged)

    @property
    def best_step(self) -> float:
        """The step with the lowest loss."""
        return self.landscape.steps[self.relative.index(min(self.relative))]

    def scalars(self) -> dict[str, float]:
        """Return what one logs of it; a network that diverges nowhere has an infinite divergence step."""
        step = self.divergence_step
        return {
            "relative_loss_low": min(self.relative),
            "best_step": self.best_step,
            "divergence_step": math.inf if step is None else step,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), "relative": self.relative, **self.scalars()}

    def figure(self) -> "Figure":
        """Draw the relative loss over the step, both logarithmic."""
        limit = Curve("divergence", self.landscape.steps, [self.diverged] * len(self.relative))
        return curve_figure(
            [Curve("relative loss", self.landscape.steps, self.relative), limit],
            title="relative loss along the gradient",
            xlabel="step, times the gradient",
            ylabel="loss after the step / before",
            xscale="log",
            yscale="log",
        )

    def table(self) -> Table:
        """Put it into a table."""
        step = self.divergence_step
        note = f"no step diverges (up to {self.landscape.steps[-1]:.3g})" if step is None else f"diverges at {step:.3g}"
        rows = list(zip(self.landscape.steps, self.relative, strict=True))
        return Table("relative loss along the gradient", ("step", "loss / loss before"), rows, [note])


def relative_loss(
    model: nn.Module,
    loss: Loss | None,
    batch: Any,
    *,
    steps: tuple[float, float] = (1e-4, 10.0),
    points: int = 21,
    diverged: float = _DIVERGED,
    step: Step | None = None,
) -> RelativeLoss:
    """Measure the relative loss at steps along the gradient of the same batch, over many orders of magnitude.

    It takes one backward pass and ``points`` + 1 forward passes.

    Args:
        model: The network; it comes back bit for bit.
        loss: A function ``(output, target) -> scalar`` for a batch that is a pair.
        batch: One.
        steps: The shortest and the longest multiple of the gradient; the rest lie between at equal ratios.
        points: How many steps, at least 2.
        diverged: From what relative loss on a step counts as divergence.
        step: In place of ``loss``: a function ``(model, batch) -> scalar``.

    Raises:
        BatchNormError: If there is no loss or gradient, the steps are none, or the loss is not positive to begin with.

    Example:
        >>> import torch
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> pair = torch.ones(1, 1), torch.zeros(1, 1)  # L(w) = w², and (1 − 2s)² is its relative loss
        >>> found = relative_loss(layer, nn.functional.mse_loss, pair, steps=(0.25, 25), points=3)
        >>> [round(value, 3) for value in found.relative], found.divergence_step
        ([0.25, 16.0, 2401.0], 25.0)

    Reference:
        Bjorck et al., Understanding batch normalization, arXiv:1806.02375, §3 and its figure of the relative loss.
    """
    places = line_steps(1.0, steps, points)
    with objective_of(model, loss, batch, step) as objective:
        landscape, _ = measure_line(objective, places, gradients=False)
    if not landscape.loss > 0:
        raise BatchNormError(
            f"a relative loss needs a positive loss to begin with, got {landscape.loss:g}. Use loss_landscape."
        )
    return RelativeLoss(landscape, diverged)


def divergence_step(steps: Sequence[float], relative: Sequence[float], diverged: float = _DIVERGED) -> float | None:
    """Return the first step whose relative loss exceeds a limit; ``None`` if there is none.

    Example:
        >>> divergence_step([0.1, 1.0], [0.5, math.inf])
        1.0
    """
    return next((step for step, value in zip(steps, relative, strict=True) if value > diverged), None)
