"""Watch every BatchNorm layer's running statistics while Lightning trains."""

import warnings
from collections.abc import Callable
from typing import Any

from typing_extensions import override

from bn_lightning.callbacks.base import BatchNormCallback, ends_optimizer_step, log_scalars
from bn_lightning.errors import BatchNormError
from bn_lightning.internals import logging_step
from bn_lightning.monitoring import Cadence, RunningSnapshot, RunningStatisticsWatch
from bn_lightning.reports.table import Table
from bn_lightning.selection import as_patterns, require_batch_norms

__all__ = ["BatchNormMonitor"]

_ON_NONFINITE = ("warn", "restore", "raise")
_MOST_LAYERS_AS_SCALARS = 100


class BatchNormMonitor(BatchNormCallback):
    """Log what BatchNorm layers compute anyway: no hook, no pass over data, nothing that waits for the device.

    The mean and variance of each step's batch are recovered from the change of the running statistics. What is logged
    is averaged over the optimizer steps since the last time; σ = √(running_var + eps). A value that rounding hides is
    not logged. In a distributed run rank zero logs its own.

    =====================  =====================================================================================
    key                    meaning and unit
    =====================  =====================================================================================
    ``bn/<layer>/drift``   how far the running mean is behind the batches' mean, σ (up to 100 layers)
    ``bn/<layer>/noise``   standard deviation of the batch mean from step to step, σ (same)
    ``bn/<layer>/dead``    share of channels that a ReLU behind the layer would leave at zero, predicted (same)
    ``bn/worst_drift``     the largest of any layer, σ
    ``bn/worst_noise``     the largest of any layer, σ
    ``bn/nonfinite``       running statistics that are NaN or infinite, a count over all layers
    ``bn/restored``        how often a layer's running statistics were put back in this fit (``"restore"`` only)
    =====================  =====================================================================================

    Args:
        include: Name patterns (``fnmatch``) of the BN layers to watch; ``None`` means all.
        exclude: Name patterns of the BN layers to leave out.
        every_n_steps: Log at every n-th optimizer step what was read at the time before.
        first_steps: Do so at each of the first optimizer steps too.
        on_nonfinite: What to do about a NaN or an infinity in running statistics, which they never lose again:
            ``"warn"``; ``"raise"``, at the next time of logging; or ``"restore"`` the layer's last finite ones after
            the very step, which changes training.

    Raises:
        BatchNormError: If ``on_nonfinite`` or a cadence is out of range, or a pattern is a bare string; at the start
            of the fit, if the module has no BN layer or a pattern matches none.

    Example:
        >>> BatchNormMonitor(on_nonfinite="restore").on_nonfinite
        'restore'
    """

    def __init__(
        self,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        every_n_steps: int = 50,
        first_steps: int = 20,
        on_nonfinite: str = "warn",
    ) -> None:
        if on_nonfinite not in _ON_NONFINITE:
            raise BatchNormError(
                f"on_nonfinite must be one of {', '.join(map(repr, _ON_NONFINITE))}, got {on_nonfinite!r}."
            )
        self.include = as_patterns(include, "include")
        self.exclude = as_patterns(exclude, "exclude")
        self.cadence = Cadence(every_n_steps, first_steps)
        self.on_nonfinite = on_nonfinite
        self.snapshot: RunningSnapshot | None = None
        self._watch: RunningStatisticsWatch | None = None
        self._open_step: int | None = None
        self._reading: Callable[[], RunningSnapshot] | None = None
        self._told: set[str] = set()

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(include=self.include, exclude=self.exclude)

    def table(self) -> Table:
        """Return the newest reading, one row a layer.

        Raises:
            BatchNormError: If nothing was read yet.
        """
        if self.snapshot is None:
            raise BatchNormError("nothing was read yet: fit for at least two logged optimizer steps, or to the end.")
        return self.snapshot.table()

    @override
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_fit_start(trainer, pl_module)
        layers = require_batch_norms(pl_module, self.include, self.exclude)
        self._watch = RunningStatisticsWatch(layers, restore=self.on_nonfinite == "restore")
        self._open_step, self._reading, self._told = None, None, set()

    @override
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        step = logging_step(trainer)
        if self._open_step != step:
            self._close_step()  # accumulate_grad_batches changed after the last batch
            assert self._watch is not None
            self._watch.begin()
            self._open_step = step

    @override
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not ends_optimizer_step(trainer, batch_idx):
            return
        step = self._open_step
        self._close_step()
        if step is not None and self.cadence.is_due(step):
            self._log(trainer)
            assert self._watch is not None
            self._reading = self._watch.start_reading()

    @override
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._close_step()
        self._log(trainer)
        assert self._watch is not None
        if self._watch.has_steps:
            self._reading = self._watch.start_reading()
            self._log(trainer)

    def _close_step(self) -> None:
        if self._open_step is not None:
            assert self._watch is not None
            self._watch.end(self._open_step)
            self._open_step = None

    def _log(self, trainer: Any) -> None:
        """Log the reading that was started at the time before."""
        if self._reading is None:
            return
        self.snapshot, self._reading = self._reading(), None
        assert self.snapshot.step is not None
        log_scalars(trainer, _scalars(self.snapshot), self.snapshot.step)
        self._tell_nonfinite(self.snapshot)

    def _tell_nonfinite(self, snapshot: RunningSnapshot) -> None:
        message = snapshot.nonfinite_message(besides=self._told)
        if not message:
            return
        self._told.update(row.layer for row in snapshot.rows if row.first_spoiled is not None)
        if self.on_nonfinite == "raise":
            raise BatchNormError(message)
        warnings.warn(message, stacklevel=2)


def _scalars(snapshot: RunningSnapshot) -> dict[str, float]:
    scalars = {f"bn/{name}": value for name, value in snapshot.totals().items()}
    if len(snapshot.rows) <= _MOST_LAYERS_AS_SCALARS:
        for row in snapshot.rows:
            found = {"drift": row.drift, "noise": row.noise, "dead": row.dead_share}
            scalars.update({f"bn/{row.layer}/{stat}": value for stat, value in found.items() if value is not None})
    return scalars
