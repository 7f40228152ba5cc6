"""How a Trainer is set up, in the audit's words."""

from typing import Any

from bn_lightning.auditing import TrainingSettings
from bn_lightning.auditing.training import batch_sizes
from bn_lightning.callbacks.dataloaders import train_loaders

__all__ = ["training_settings"]

# By name, among a callback's classes: those of both Lightning families, of which either may be missing.
_AVERAGING = ("WeightAveraging", "StochasticWeightAveraging")
_ACCUMULATING = "GradientAccumulationScheduler"


def training_settings(trainer: Any, module: Any) -> TrainingSettings:
    """Read a Trainer's settings, once its training loader is there, of which nothing is drawn."""
    loaders = train_loaders(trainer)
    size, last = batch_sizes(loaders[0], trainer.num_training_batches) if len(loaders) == 1 else (None, None)
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
