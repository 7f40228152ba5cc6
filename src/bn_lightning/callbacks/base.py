"""The base of every callback here: a ``Callback`` of both Lightning families at once, that guards variants."""

from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from bn_lightning.callbacks.replaced import require_same_classes, variant_classes

__all__ = ["BatchNormCallback", "ends_optimizer_step", "expected_steps"]

if TYPE_CHECKING:
    _Callback = pl.Callback
else:
    # `lightning.pytorch.Trainer` and `pytorch_lightning.Trainer` each take only their own class.
    bases = [pl.Callback]
    try:
        from pytorch_lightning import Callback as StandaloneCallback

        bases.append(StandaloneCallback)
    except ImportError:
        pass
    _Callback = type("_Callback", tuple(bases), {"__module__": __name__})


class BatchNormCallback(_Callback):
    """Stop training where a strategy has replaced BatchNorm variants, as ``sync_batchnorm=True`` does."""

    _variants: dict[str, type] | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._variants = variant_classes(pl_module)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._variants:
            require_same_classes(pl_module, self._variants)


def expected_steps(trainer: Any) -> float:
    """Return how many optimizer steps a fit will take, once it has begun; -1 or 0 where Lightning cannot tell."""
    try:
        return float(trainer.estimated_stepping_batches)
    except MisconfigurationException:  # accumulate_grad_batches differs between epochs
        return 0.0


def ends_optimizer_step(trainer: Any, batch_idx: int) -> bool:
    """Tell, after a training batch, whether the optimizer steps now: with its last micro-batch, or the epoch's."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or bool(trainer.is_last_batch)
