"""How a training is set up, as far as BatchNorm cares."""

from dataclasses import dataclass

__all__ = ["TrainingSettings"]


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """What the rules want to know of a training beyond its model; everything may be unknown.

    Attributes:
        batch_size: Examples in one forward pass of one process, or ``None``.
        last_batch: Examples in the last training batch of an epoch in one process, or ``None``.
        accumulate_grad_batches: Forward passes for one optimizer step.
        processes: How many train together.
        precision: As Lightning names it, such as ``"bf16-true"``; empty if unknown.
        averaging: Names of what averages the weights, such as ``"StochasticWeightAveraging"``.
        manual_optimization: Whether ``training_step`` takes the optimizer steps itself.

    Example:
        >>> TrainingSettings(batch_size=4, accumulate_grad_batches=8).examples_per_step
        32
    """

    batch_size: int | None = None
    last_batch: int | None = None
    accumulate_grad_batches: int = 1
    processes: int = 1
    precision: str = ""
    averaging: tuple[str, ...] = ()
    manual_optimization: bool = False

    @property
    def examples_per_step(self) -> int | None:
        """How many examples an optimizer step sees; BatchNorm never sees them together."""
        if self.batch_size is None:
            return None
        return self.batch_size * self.accumulate_grad_batches * self.processes
