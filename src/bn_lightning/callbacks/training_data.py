"""The training data as the network gets it, for a callback that runs the network on it once more."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from bn_lightning.callbacks.batches import as_collected, input_of, of_the_loader
from bn_lightning.callbacks.dataloaders import rebuilt_train_loader
from bn_lightning.errors import BatchNormError
from bn_lightning.internals import before_batch_transfer

__all__ = [
    "as_the_network_gets_it",
    "count_batches",
    "draws_progress",
    "forward_in_precision",
    "told",
    "training_inputs",
]


def training_inputs(trainer: Any, *, instead: str) -> Iterator[Tensor]:
    """Give the training inputs, batch by batch, on the strategy's device and in the Trainer's precision.

    They come from a loader of their own (`rebuilt_train_loader`), which is built when the first is drawn.

    Args:
        trainer: That of the fit.
        instead: What to call where a batch's input cannot be told, such as ``"audit_batch_norm(module, loader"``.

    Raises:
        BatchNormError: If the loader cannot be rebuilt, or a batch is neither a tensor nor begins with one.
    """
    given = trainer.train_dataloader
    for batch in rebuilt_train_loader(trainer):
        moved = of_the_loader(given, as_the_network_gets_it(trainer, as_collected(given, batch)))
        x = input_of(moved)
        if x is None:
            raise BatchNormError(
                f"expected training batches that are a tensor or an (input, target, …) tuple, got a "
                f"{type(moved).__name__}: how the network is run on it cannot be guessed. Call the function yourself "
                f"and say so: bn_lightning.{instead}, forward=lambda module, batch: module(...))."
            )
        yield x


def as_the_network_gets_it(trainer: Any, batch: Any) -> Any:
    """Convert and move a batch, through the user's hooks before, for and after the transfer."""
    prepared = before_batch_transfer(trainer.lightning_module, trainer.precision_plugin.convert_input(batch))
    return trainer.strategy.batch_to_device(prepared, trainer.strategy.root_device)


def forward_in_precision(trainer: Any) -> Callable[[Any, Any], object]:
    """Return how to run the module on such an input, as ``training_step`` would see it run."""

    def forward(module: Any, x: Any) -> object:
        with trainer.precision_plugin.forward_context():
            return module(x)

    return forward


def count_batches(trainer: Any, at_most: int) -> int:
    """Return how many batches to take: no more than an epoch has under ``limit_train_batches``, and one at least."""
    return int(min(at_most, max(trainer.num_training_batches, 1)))


def draws_progress(trainer: Any) -> bool:
    """Tell whether the Trainer has a bar of its own on the terminal."""
    bar = trainer.progress_bar_callback
    return bar is not None and not bar.is_disabled


def told(error: Exception, *, instead: str) -> str:
    """Tell why the network could not be run on its training data, with what to do about it."""
    if isinstance(error, BatchNormError):
        return str(error)
    return (
        f"{type(error).__name__}: {error}\nIt calls module(input) with each batch's first element; if the network "
        f"is run otherwise, use bn_lightning.{instead}, forward=lambda module, batch: ...)."
    )
