"""Watch every layer's activations while Lightning trains."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from bn_lightning.callbacks.base import BatchNormCallback, ends_optimizer_step, log_figure, log_scalars
from bn_lightning.errors import BatchNormError
from bn_lightning.internals import logging_step
from bn_lightning.monitoring import ActivationHistory, ActivationSnapshot, ActivationWatch, Cadence, GrowingInterval
from bn_lightning.reports.heatmap import figure_image
from bn_lightning.reports.table import Table
from bn_lightning.selection import as_patterns

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ActivationMonitor"]

_MOST_LAYERS_AS_SCALARS = 100
_SCALARS = ("mean", "std", "zero_fraction")
_HEAT_MAPS = ("std", "zero_fraction")
_FIRST_PICTURE = 100


class ActivationMonitor(BatchNormCallback):
    """Log the statistics of layer outputs at sampled optimizer steps; training itself is bitwise unchanged.

    A sample holds all micro-batches of one optimizer step and, in a distributed run, those of every process.
    Validation and sanity checking are never in it. Logged, with ``<layer>`` the name within the LightningModule:

    ====================================  ===========================================================================
    key                                   meaning and unit
    ====================================  ===========================================================================
    ``activations/<layer>/mean``          mean of all values, activation units (up to 100 layers)
    ``activations/<layer>/std``           standard deviation of all values, ``correction=0``, activation units (same)
    ``activations/<layer>/zero_fraction``  share of values that are exactly 0 (same)
    ``activations/nonfinite``             NaN and infinite values in all layers, a count
    ``activations/dead_channels``         channels that were 0 throughout the sample, a count
    ``activations/max_abs``               largest magnitude in any layer, activation units; NaN if there is a NaN
    ``activations/heatmap/std``           picture, layer × step, logarithmic colours (TensorBoard)
    ``activations/heatmap/zero_fraction``  picture, layer × step (TensorBoard)
    ====================================  ===========================================================================

    Pictures are drawn when the number of steps has grown by half, from step 100 on, and at the end of the fit.
    Without a logger `table` and `figure` show the same.

    Args:
        include: ``fnmatch`` patterns on layer names, of which at least one has to match. By default every layer
            without children that is neither Identity, dropout, loss nor metric. A full name picks that very module.
        exclude: Patterns of which none may match.
        every_n_steps: Sample every n-th optimizer step.
        first_steps: Sample each of the first optimizer steps too.

    Raises:
        BatchNormError: If ``every_n_steps`` or ``first_steps`` is out of range, or ``include`` or ``exclude`` is a
            bare string; at the start of the fit, if a pattern matches no layer or the patterns leave none.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> monitor = ActivationMonitor(every_n_steps=100, exclude=["head.*"])
        >>> trainer = Trainer(callbacks=[monitor], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        every_n_steps: int = 50,
        first_steps: int = 20,
    ) -> None:
        self.include = as_patterns(include, "include")
        self.exclude = as_patterns(exclude, "exclude")
        self.cadence = Cadence(every_n_steps, first_steps)
        self.history = ActivationHistory()
        self.snapshot: ActivationSnapshot | None = None
        self._watch = ActivationWatch()
        self._redraw = GrowingInterval(_FIRST_PICTURE)
        self._sampled_step: int | None = None

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(include=self.include, exclude=self.exclude)

    def table(self) -> Table:
        """Return the newest sample, one row a layer in order of execution.

        Raises:
            BatchNormError: If nothing was sampled yet.
        """
        if self.snapshot is None:
            raise BatchNormError("nothing was sampled yet: fit for at least one sampled optimizer step first.")
        return self.snapshot.table()

    def figure(self, stat: str = "std") -> "Figure":
        """Draw the heat map of a statistic: mean, std, min, max, rms or zero_fraction.

        Raises:
            BatchNormError: If there is no such statistic, or nothing was sampled yet.
        """
        return self.history.figure(stat)

    @override
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_fit_start(trainer, pl_module)
        self._watch = ActivationWatch()
        self._watch.install(pl_module, self.include, self.exclude)
        self._redraw = GrowingInterval(_FIRST_PICTURE)
        self._sampled_step = None

    @override
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if logging_step(trainer) == 0:  # another run, not one resumed
            self.history = ActivationHistory()

    @override
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        step = logging_step(trainer)
        if self._sampled_step not in (None, step):
            self._flush(trainer)  # accumulate_grad_batches changed after the last batch
        self._watch.sampling = self.cadence.is_due(step)
        self._sampled_step = step if self._watch.sampling else None

    @override
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._watch.sampling = False
        if ends_optimizer_step(trainer, batch_idx) and self._sampled_step is not None:
            self._flush(trainer)

    @override
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._watch.sampling = False
        if self._sampled_step is not None:
            self._flush(trainer)

    @override
    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self._watch.remove()
        if self.history.steps:
            self._draw(trainer, self.history.last_step)

    @override
    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._watch.remove()

    @override
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._watch.remove()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history.load_state_dict(state_dict["history"])

    def _flush(self, trainer: Any) -> None:
        assert self._sampled_step is not None
        step, self._sampled_step = self._sampled_step, None
        self.snapshot = replace(self._watch.flush(across_processes=True), step=step)
        self.history.append(step, self.snapshot)
        log_scalars(trainer, _scalars(self.snapshot), step)
        if self._redraw.is_due(step):
            self._draw(trainer, step)

    def _draw(self, trainer: Any, step: int) -> None:
        if not (trainer.is_global_zero and trainer.loggers and self.history.layers):
            return
        for stat in _HEAT_MAPS:
            log_figure(trainer, f"activations/heatmap/{stat}", figure_image(self.history.figure(stat)), step)


def _scalars(snapshot: ActivationSnapshot) -> dict[str, float]:
    scalars = {f"activations/{name}": value for name, value in snapshot.totals().items()}
    if len(snapshot.blocks) <= _MOST_LAYERS_AS_SCALARS:
        for layer, row in snapshot.layers():
            if row.count:
                scalars.update({f"activations/{layer}/{stat}": getattr(row, stat) for stat in _SCALARS})
    return scalars
