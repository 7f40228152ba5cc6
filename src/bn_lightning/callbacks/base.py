"""The base of every callback here: a ``Callback`` of both Lightning families at once."""

from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl

__all__ = ["BatchNormCallback", "log_figure", "log_scalars"]

if TYPE_CHECKING:
    BatchNormCallback = pl.Callback
else:
    # `lightning.pytorch.Trainer` and `pytorch_lightning.Trainer` each take only their own class.
    bases = [pl.Callback]
    try:
        from pytorch_lightning import Callback as StandaloneCallback

        bases.append(StandaloneCallback)
    except ImportError:
        pass
    BatchNormCallback = type("BatchNormCallback", tuple(bases), {"__doc__": __doc__, "__module__": __name__})


def log_scalars(trainer: Any, scalars: dict[str, float], step: int) -> None:
    """Write scalars to every logger of the trainer; without one this does nothing."""
    for logger in trainer.loggers:
        logger.log_metrics(scalars, step=step)


def log_figure(trainer: Any, tag: str, image: Any, step: int) -> None:
    """Write an (H, W, 3) uint8 picture to every TensorBoard-like logger (one whose experiment has ``add_image``)."""
    for logger in trainer.loggers:
        add_image = getattr(logger.experiment, "add_image", None)
        if callable(add_image):
            add_image(tag, image, step, dataformats="HWC")
