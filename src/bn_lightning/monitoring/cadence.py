"""When to sample, and when to draw again."""

from dataclasses import dataclass

from bn_lightning.errors import BatchNormError

__all__ = ["Cadence", "GrowingInterval"]


@dataclass(frozen=True, slots=True)
class Cadence:
    """Sample the first steps, where most goes wrong, and then every n-th.

    Args:
        every_n_steps: Period in optimizer steps.
        first_steps: How many optimizer steps to sample from the beginning.

    Raises:
        BatchNormError: If ``every_n_steps`` is not positive or ``first_steps`` is negative.

    Example:
        >>> cadence = Cadence(every_n_steps=50, first_steps=2)
        >>> [step for step in range(120) if cadence.is_due(step)]
        [0, 1, 50, 100]
    """

    every_n_steps: int = 50
    first_steps: int = 20

    def __post_init__(self) -> None:
        if self.every_n_steps < 1:
            raise BatchNormError(f"every_n_steps counts optimizer steps: expected at least 1, got {self.every_n_steps}")
        if self.first_steps < 0:
            raise BatchNormError(f"first_steps counts optimizer steps: expected 0 or more, got {self.first_steps}")

    def is_due(self, step: int) -> bool:
        """Tell whether to sample the optimizer step, counted from 0."""
        return step < self.first_steps or step % self.every_n_steps == 0


class GrowingInterval:
    """Something dear, to be done again each time the step count has grown by half.

    Args:
        first: The step of the first time.

    Example:
        >>> redraw = GrowingInterval(first=100)
        >>> [step for step in range(400) if redraw.is_due(step)]
        [100, 150, 225, 338]
    """

    def __init__(self, first: int) -> None:
        self._next: float = first

    def is_due(self, step: int) -> bool:
        """Tell whether to do it now; a yes counts as done."""
        if step < self._next:
            return False
        self._next = 1.5 * step
        return True
