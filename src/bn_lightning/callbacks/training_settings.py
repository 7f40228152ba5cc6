"""How a Trainer is set up, in the audit's words."""

from typing import Any

from torch.utils.data import BatchSampler

from bn_lightning.auditing import TrainingSettings
from bn_lightning.callbacks.dataloaders import train_loaders

__all__ = ["training_settings"]

# By name, among a callback's classes: those of both Lightning families, of which either may be missing.
_AVERAGING = ("WeightAveraging", "StochasticWeightAveraging")
_ACCUMULATING = "GradientAccumulationScheduler"


def training_settings(trainer: Any, module: Any) -> TrainingSettings:
    """Read a Trainer's settings, once its training loader is there, of which nothing is drawn."""
    size, last = _sizes(trainer)
    return TrainingSettings(
        batch_size=size,
        last_batch=last,
        accumulate_grad_batches=_accumulated(trainer),
        processes=int(trainer.world_size),
        precision=str(trainer.precision),
        averaging=tuple(type(each).__name__ for each in trainer.callbacks if _is_a(each, *_AVERAGING)),
        manual_optimization=not module.automatic_optimization,
    )


def _is_a(callback: Any, *names: str) -> bool:
    return any(kind.__name__ in names for kind in type(callback).__mro__)


def _accumulated(trainer: Any) -> int:
    """Tell the most batches that ever make one optimizer step; a callback may change them from epoch to epoch."""
    scheduled = [each.scheduling for each in trainer.callbacks if _is_a(each, _ACCUMULATING)]
    return max(int(trainer.accumulate_grad_batches), *(max(each.values()) for each in scheduled), 1)


def _sizes(trainer: Any) -> tuple[int | None, int | None]:
    """Tell the examples of a batch and of an epoch's last one, in this process; ``None`` where that is unknown."""
    loaders = train_loaders(trainer)
    if len(loaders) != 1:
        return None, None
    batches: Any = getattr(loaders[0], "batch_sampler", None)
    size = getattr(loaders[0], "batch_size", None) or getattr(batches, "batch_size", None)
    if not isinstance(size, int):
        return None, None  # the dataset makes batches, or a sampler of the user's
    if type(batches) is not BatchSampler:
        return size, None
    sampler: Any = batches.sampler
    try:
        whole, rest = divmod(len(sampler), size)
    except TypeError:  # a stream
        return size, None
    if batches.drop_last or not rest or trainer.num_training_batches <= whole:
        return (size, size) if whole else (None, None)
    return (size if whole else rest), rest
