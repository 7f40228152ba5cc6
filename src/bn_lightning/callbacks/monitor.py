"""What the monitors share: which layers, when, alerts, and where what they find goes."""

import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from bn_lightning.callbacks.base import BatchNormCallback
from bn_lightning.callbacks.publishing import log_figure, log_scalars, log_text, unused_file
from bn_lightning.errors import BatchNormError, nearest
from bn_lightning.monitoring import ActivationHistory, Alert, AlertRules, Cadence, GrowingInterval, RunningHistory
from bn_lightning.monitoring.processes import alone
from bn_lightning.reports.table import Table
from bn_lightning.selection import as_patterns

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["MOST_LAYERS_AS_SCALARS", "Monitor"]

MOST_LAYERS_AS_SCALARS = 50
"""With more layers than that, only the summary is written as scalars, and the worst layers as text."""

_ON_ALERT = ("warn", "log", "stop")
_FIRST_PICTURE = 100
# Written again with each alert.
_LAST_ALERTS = 20


class Monitor(BatchNormCallback):
    """A callback that samples layers at a cadence, keeps their history, and tells what is wrong with them.

    Attributes:
        history: Each layer at each sampled step.
        alert_log: The alerts of this fit.
    """

    _kind: ClassVar[str]
    _alerts: ClassVar[tuple[str, ...]]
    history: ActivationHistory | RunningHistory

    def __init__(
        self,
        include: list[str] | None,
        exclude: list[str] | None,
        every_n_steps: int,
        first_steps: int,
        alerts: bool | list[str],
        on_alert: str,
    ) -> None:
        if on_alert not in _ON_ALERT:
            raise BatchNormError(f"on_alert must be one of {', '.join(map(repr, _ON_ALERT))}, got {on_alert!r}.")
        self.include = as_patterns(include, "include")
        self.exclude = as_patterns(exclude, "exclude")
        self.cadence = Cadence(every_n_steps, first_steps)
        if not isinstance(alerts, bool | list | tuple | str):
            raise BatchNormError(f"alerts must be True, False or a list of names, got {alerts!r}.")
        self.alerts, self.on_alert = alerts, on_alert
        self.alert_log: list[Alert] = []
        self._rules = self._new_rules()
        self._redraw = GrowingInterval(_FIRST_PICTURE)
        self._file: Path | None = None
        self._published = False

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(include=self.include, exclude=self.exclude)

    @override
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_fit_start(trainer, pl_module)
        self.alert_log, self._rules = [], self._new_rules()
        self._redraw, self._file = GrowingInterval(_FIRST_PICTURE), None
        self._published = False

    @override
    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        # Not if a checkpoint was resumed that had been trained to its end.
        if self._published and trainer.is_global_zero and self.history.layers and not trainer.barebones:
            self._show(trainer, self.history.last_step)
            for table in self._worst().values():
                table.print()

    def _new_rules(self) -> AlertRules:
        """Return the chosen rules of this monitor's kind, with nothing seen yet."""
        if self.alerts is True:
            return AlertRules(self._alerts)
        for name in () if isinstance(self.alerts, bool | str) else self.alerts:
            if name not in self._alerts:
                own = ", ".join(map(repr, self._alerts))
                raise BatchNormError(
                    f"{name!r} is no alert of {type(self).__name__}{nearest(str(name), self._alerts)}; its are {own}."
                )
        return AlertRules(self.alerts)

    @override
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Log what has been sampled, which may show what the training died of."""
        if not alone():  # the others may never come
            return
        try:
            self._finish(trainer)
            if self._published and self.history.layers:
                self._show(trainer, self.history.last_step)
        except Exception as error:  # the training's own exception is the one to be seen
            warnings.warn(f"{type(self).__name__} could not log its last sample: {error}", stacklevel=2)

    @abstractmethod
    def _finish(self, trainer: Any) -> None:
        """Log all that was sampled."""

    @abstractmethod
    def _figures(self) -> Mapping[str, Callable[[], "Figure"]]:
        """Return what to draw, by tag."""

    @abstractmethod
    def _worst(self) -> Mapping[str, Table]:
        """Return the layers of the newest sample that are worth a look first, by what was measured."""

    def _publish(self, trainer: Any, step: int, scalars: dict[str, float], alerts: Sequence[Alert]) -> None:
        """Log what was found at a step; every process has to call it."""
        self._published = True
        log_scalars(trainer, scalars, step)
        self.alert_log += alerts
        if self.on_alert == "stop" and trainer.strategy.reduce_boolean_decision(bool(alerts), all=False):
            trainer.should_stop = True
            rank_zero_info(f"{type(self).__name__} stops the training: {'; '.join(map(str, alerts)) or 'see its log'}")
        if not trainer.is_global_zero:
            return
        if alerts:
            log_text(trainer, f"{self._kind}/alerts", _alert_table(self.alert_log[-_LAST_ALERTS:]).to_markdown(), step)
        for alert in alerts if self.on_alert != "log" else ():
            warnings.warn(str(alert), stacklevel=2)
        if self.history.layers and self._redraw.is_due(step):
            self._show(trainer, step)
            self._redraw.took()

    def _show(self, trainer: Any, step: int) -> None:
        if not (trainer.fast_dev_run or trainer.barebones):  # which suppress logging
            self._draw(trainer, step)

    def _draw(self, trainer: Any, step: int) -> None:
        """Write pictures, texts and files."""
        for tag, draw in self._figures().items():
            log_figure(trainer, tag, draw, step)
        for kind, table in self._worst().items():
            log_text(trainer, f"{kind}/worst", table.to_markdown(), step)
        if not trainer.loggers:
            self._file = self._file or unused_file(trainer.default_root_dir, f"{self._kind}.jsonl")
            self.history.write_jsonl(self._file)


def _alert_table(alerts: Sequence[Alert]) -> Table:
    rows = [(alert.step, alert.rule, alert.layer, alert.message) for alert in alerts]
    return Table("the last alerts of this fit", ("step", "alert", "layer", "message"), rows)
