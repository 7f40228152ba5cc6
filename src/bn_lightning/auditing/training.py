"""How a training is set up, as far as BatchNorm cares."""

from dataclasses import dataclass
from typing import Any

from torch.utils.data import BatchSampler

__all__ = ["TrainingSettings", "batch_sizes"]


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


def batch_sizes(loader: Any, batches: float | None = None) -> tuple[int | None, int | None]:
    """Tell the examples of a loader's batch and of an epoch's last one, of which nothing is drawn.

    Args:
        loader: What gives the batches; of anything but a ``DataLoader`` little is known.
        batches: How many of them make an epoch, if not all.

    Returns:
        Both, each ``None`` where it is unknown.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> batch_sizes(DataLoader(range(33), 16)), batch_sizes(DataLoader(range(33), 16, drop_last=True))
        ((16, 1), (16, 16))
    """
    sampled: Any = getattr(loader, "batch_sampler", None)
    size = getattr(loader, "batch_size", None) or getattr(sampled, "batch_size", None)
    if not isinstance(size, int):
        return None, None  # the dataset makes batches, or a sampler of the user's
    if type(sampled) is not BatchSampler:
        return size, None
    sampler: Any = sampled.sampler
    try:
        whole, rest = divmod(len(sampler), size)
    except TypeError:  # a stream
        return size, None
    if sampled.drop_last or not rest or (batches is not None and batches <= whole):
        return (size, size) if whole else (None, None)
    return (size if whole else rest), rest
