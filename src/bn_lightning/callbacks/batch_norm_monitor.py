"""Watch every BatchNorm layer's running statistics while Lightning trains."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from bn_lightning.callbacks.base import ends_optimizer_step
from bn_lightning.callbacks.monitor import MOST_LAYERS_AS_SCALARS, Monitor
from bn_lightning.errors import BatchNormError
from bn_lightning.internals import logging_step
from bn_lightning.monitoring import AlertRules, RunningHistory, RunningSnapshot, RunningStatisticsWatch
from bn_lightning.monitoring.worst import worst_batch_norms
from bn_lightning.reports.table import Table
from bn_lightning.selection import plain_name, require_batch_norms

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["BatchNormMonitor"]

_ON_NONFINITE = ("warn", "restore", "raise")
# Told in any case, unlike the other alerts.
_NONFINITE = "nonfinite-statistics"
_ELSEWHERE = "BatchNorm's running statistics are NaN or infinite in another process, whose message names the layer."
_HEAT_MAPS = ("drift", "noise", "dead")


class BatchNormMonitor(Monitor):
    """Log what BatchNorm layers compute anyway: no hook, no pass over data, nothing that waits for the device.

    The mean and variance of each step's batch are recovered from the change of the running statistics. What is logged
    is averaged over the optimizer steps since the last time; σ = √(running_var + eps). A value that rounding hides is
    not logged. In a distributed run rank zero logs its own.

    =====================  =====================================================================================
    key                    meaning and unit
    =====================  =====================================================================================
    ``bn/<layer>/drift``   how far the running mean is behind the batches' mean, σ (up to 50 layers)
    ``bn/<layer>/noise``   standard deviation of the batch mean from step to step, σ (same)
    ``bn/<layer>/dead``    share of channels that a ReLU behind the layer would leave at zero, predicted (same)
    ``bn/worst_drift``     the largest of any layer, σ
    ``bn/worst_noise``     the largest of any layer, σ
    ``bn/nonfinite``       running statistics that are NaN or infinite, a count over all layers
    ``bn/restored``        how often a layer's running statistics were put back in this fit (``"restore"`` only)
    ``bn/heatmap/…``       pictures, layer × step: drift, noise, dead
    ``bn/worst``           text: the layers that are worth a look first
    ``bn/alerts``          text: the last 20 alerts of the fit
    =====================  =====================================================================================

    Where pictures and texts go, and when, is as in `ActivationMonitor`; without a logger there is ``bn.jsonl``.
    The alert is ``drift``: a running mean stays far behind its batches' mean; see `AlertRules`.

    Args:
        include: Name patterns (``fnmatch``) of the BN layers to watch; ``None`` means all.
        exclude: Name patterns of the BN layers to leave out.
        every_n_steps: Log at every n-th optimizer step what was read at the time before.
        first_steps: Do so at each of the first optimizer steps too.
        on_nonfinite: What to do about a NaN or an infinity in running statistics, which they never lose again:
            ``"warn"``; ``"raise"``, at the next time of logging; or ``"restore"`` the layer's last finite ones after
            the very step, which changes training.
        alerts: Whether to tell what looks wrong, or the names of the alerts to tell.
        on_alert: ``"warn"``; ``"log"`` them only; or ``"stop"`` the training, too.

    Raises:
        BatchNormError: If ``on_nonfinite``, ``on_alert`` or a cadence is out of range, there is no such alert, or a
            pattern is a bare string; at the start of the fit, if the module has no BN layer or a pattern matches none.

    Example:
        >>> BatchNormMonitor(on_nonfinite="restore").on_nonfinite
        'restore'
    """

    _kind = "bn"
    _alerts = ("drift", _NONFINITE)
    history: RunningHistory

    def __init__(
        self,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        every_n_steps: int = 50,
        first_steps: int = 20,
        on_nonfinite: str = "warn",
        alerts: bool | list[str] = True,
        on_alert: str = "warn",
    ) -> None:
        super().__init__(include, exclude, every_n_steps, first_steps, alerts, on_alert)
        if on_nonfinite not in _ON_NONFINITE:
            raise BatchNormError(
                f"on_nonfinite must be one of {', '.join(map(repr, _ON_NONFINITE))}, got {on_nonfinite!r}."
            )
        self.on_nonfinite = on_nonfinite
        self.history = RunningHistory()
        self.snapshot: RunningSnapshot | None = None
        self._watch: RunningStatisticsWatch | None = None
        self._open_step: int | None = None
        self._reading: Callable[[], RunningSnapshot] | None = None
        self._unlogged: RunningSnapshot | None = None

    def table(self) -> Table:
        """Return the newest reading, one row a layer.

        Raises:
            BatchNormError: If nothing was read yet.
        """
        self._collect()
        if self.snapshot is None:
            raise BatchNormError("nothing was read yet: fit for at least one logged optimizer step.")
        return self.snapshot.table()

    def figure(self, stat: str = "drift") -> "Figure":
        """Draw the heat map of a statistic: drift, noise or dead.

        Raises:
            BatchNormError: If there is no such statistic, or nothing was read yet.
        """
        self._collect()
        return self.history.figure(stat)

    @override
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_fit_start(trainer, pl_module)
        found = require_batch_norms(pl_module, self.include, self.exclude)
        layers = {plain_name(name): layer for name, layer in found.items()}
        self._watch = RunningStatisticsWatch(layers, restore=self.on_nonfinite == "restore")
        self._open_step, self._reading, self._unlogged = None, None, None

    @override
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if logging_step(trainer) == 0:  # another run, not one resumed
            self.history, self.snapshot = RunningHistory(), None

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
        self._finish(trainer)

    @override
    def state_dict(self) -> dict[str, Any]:
        self._collect()
        return {"history": self.history.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history.load_state_dict(state_dict["history"])

    @override
    def _new_rules(self) -> AlertRules:
        super()._new_rules()  # refuses wrong names
        if isinstance(self.alerts, bool):
            return AlertRules(self._alerts if self.alerts else [_NONFINITE])
        return AlertRules([*self.alerts, _NONFINITE])

    @override
    def _finish(self, trainer: Any) -> None:
        self._close_step()
        self._log(trainer)
        if self._watch is not None and self._watch.has_steps:
            self._reading = self._watch.start_reading()
            self._log(trainer)

    def _close_step(self) -> None:
        if self._open_step is not None:
            assert self._watch is not None
            self._watch.end(self._open_step)
            self._open_step = None

    def _log(self, trainer: Any) -> None:
        """Log the reading that was started at the time before."""
        self._collect()
        snapshot, self._unlogged = self._unlogged, None
        if snapshot is None or snapshot.step is None:
            return
        alerts = self._rules.of_running(snapshot)
        if self.on_nonfinite == "raise":
            spoiled = [alert.message for alert in alerts if alert.rule == _NONFINITE]
            # All processes raise, or the others would wait for this one.
            if trainer.strategy.reduce_boolean_decision(bool(spoiled), all=False):
                self.alert_log += alerts
                raise BatchNormError(spoiled[0] if spoiled else _ELSEWHERE)
        self._publish(trainer, snapshot.step, _scalars(snapshot), alerts)

    def _collect(self) -> None:
        """Take in the reading that was started."""
        if self._reading is not None:
            self.snapshot = self._unlogged = snapshot = self._reading()
            self._reading = None
            assert snapshot.step is not None
            self.history.append(snapshot.step, snapshot)

    @override
    def _figures(self) -> Mapping[str, Callable[[], "Figure"]]:
        return {f"bn/heatmap/{stat}": partial(self.history.figure, stat) for stat in _HEAT_MAPS}

    @override
    def _worst(self) -> Mapping[str, Table]:
        assert self.snapshot is not None
        return {self._kind: worst_batch_norms(self.snapshot)}


def _scalars(snapshot: RunningSnapshot) -> dict[str, float]:
    scalars = {f"bn/{name}": value for name, value in snapshot.totals().items()}
    if len(snapshot.rows) <= MOST_LAYERS_AS_SCALARS:
        for row in snapshot.rows:
            found = {"drift": row.drift, "noise": row.noise, "dead": row.dead_share}
            scalars.update({f"bn/{row.layer}/{stat}": value for stat, value in found.items() if value is not None})
    return scalars
