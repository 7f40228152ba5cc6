"""When to sample, and when to draw again."""

import math
import time
from collections.abc import Callable
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
        for option, value in (("every_n_steps", self.every_n_steps), ("first_steps", self.first_steps)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise BatchNormError(f"{option} counts optimizer steps: expected a whole number, got {value!r}.")
        if self.every_n_steps < 1:
            raise BatchNormError(f"every_n_steps counts optimizer steps: expected at least 1, got {self.every_n_steps}")
        if self.first_steps < 0:
            raise BatchNormError(f"first_steps counts optimizer steps: expected 0 or more, got {self.first_steps}")

    def is_due(self, step: int) -> bool:
        """Tell whether to sample the optimizer step, counted from 0."""
        return step < self.first_steps or step % self.every_n_steps == 0

    def samples(self, steps: float) -> float:
        """Return how many of so many steps are sampled, about.

        Example:
            >>> Cadence(every_n_steps=50, first_steps=20).samples(1020), Cadence().samples(float("inf"))
            (40.0, inf)
        """
        first = min(steps, self.first_steps)
        return first + (steps - first) / self.every_n_steps


# So that it takes a five-hundredth of the time.
_WAIT_BY_COST = 500


class GrowingInterval:
    """Something dear, to be done again each time the step count has grown by half, but not too soon after the last.

    Args:
        first: The step of the first time.
        seconds: How long to wait at least; and 500 times as long as it took, as `took` is told.
        clock: What tells the time, in seconds.

    Example:
        >>> redraw = GrowingInterval(first=100, seconds=0)
        >>> [step for step in range(400) if redraw.is_due(step)]
        [100, 150, 225, 338]
    """

    def __init__(self, first: int, seconds: float = 60.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._next: float = first
        self._clock = clock
        self._last = -math.inf
        self._took = 0.0

    def is_due(self, step: int) -> bool:
        """Tell whether to do it now; a yes counts as done."""
        if step < self._next or self._clock() < self._last + max(self.seconds, _WAIT_BY_COST * self._took):
            return False
        self._next, self._last = 1.5 * step, self._clock()
        return True

    def took(self) -> None:
        """Tell that it has been done, since `is_due` said yes."""
        self._took = self._clock() - self._last
