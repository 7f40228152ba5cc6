"""Watch every layer's activations while Lightning trains."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from bn_lightning.callbacks.base import ends_optimizer_step, expected_steps
from bn_lightning.callbacks.monitor import MOST_LAYERS_AS_SCALARS, Monitor
from bn_lightning.callbacks.publishing import log_histogram, log_text
from bn_lightning.errors import BatchNormError
from bn_lightning.functional.fused import FusedStatistics
from bn_lightning.functional.log_histogram import raw_histogram
from bn_lightning.internals import gradient_scale, logging_step
from bn_lightning.monitoring import ActivationHistory, ActivationSnapshot, ActivationWatch, RecentSamples
from bn_lightning.monitoring.pictures import depth_profile
from bn_lightning.monitoring.processes import alone
from bn_lightning.monitoring.worst import worst_layers
from bn_lightning.reports.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

__all__ = ["ActivationMonitor"]

# Compiling takes some 20 seconds. A sample of a step of half a second gets a tenth of a second cheaper.
_LONG, _MANY = 1_000, 200
_SCALARS = {"activations": ("mean", "std", "zero_fraction"), "gradients": ("rms",)}
_HEAT_MAPS = {"activations": ("mean", "std", "zero_fraction", "dead_fraction"), "gradients": ("rms",)}


class ActivationMonitor(Monitor):
    """Log the statistics of layer outputs at sampled optimizer steps; training itself is bitwise unchanged.

    A sample holds all micro-batches of one optimizer step and, in a distributed run, those of every process.
    Validation and sanity checking are never in it, nor what activation checkpointing recomputes. Nothing waits for the
    device: a sample is logged at the next sampled step, and the last one at the end. Logged, with ``<layer>`` the name
    within the LightningModule:

    =======================================  ========================================================================
    key                                      meaning and unit
    =======================================  ========================================================================
    ``activations/<layer>/mean``             mean of all values, activation units (up to 50 layers)
    ``activations/<layer>/std``              their standard deviation, ``correction=0``, activation units (same)
    ``activations/<layer>/zero_fraction``    share of values that are exactly 0 (same)
    ``activations/nonfinite``                NaN and infinite values in all layers, a count
    ``activations/dead_channels``            channels that were 0 throughout the sample, a count
    ``activations/max_abs``                  largest magnitude in any layer, activation units; NaN if there is a NaN
    ``activations/saturation``               the same as a share of what the layer's dtype can hold, the largest
    ``activations/heatmap/<statistic>``      picture, layer × step: mean, std, zero_fraction, dead_fraction
    ``activations/profile``                  picture: mean ± std along the network
    ``activations/worst``                    text: the layers that are worth a look first
    ``activations/alerts``                   text: the last 20 alerts of the fit
    ``activations/before``                   text: a layer's last 20 samples, when it is the first with a nonfinite one
    ``activations/histogram/<layer>``        histogram of all values in powers of two (``histograms=True``)
    ``gradients/<layer>/rms``                root mean square of the loss's gradient by the layer's output, units of
                                             1 / activation (``gradients=True``, as all below; up to 50 layers)
    ``gradients/nonfinite, …/max_abs``       as above, of gradients
    ``gradients/heatmap/rms, …/profile``     as above, of gradients; so is ``gradients/worst``
    =======================================  ========================================================================

    TensorBoard and W&B get all of it (W&B no histograms), a CSV logger the scalars, and pictures and texts as files
    in its folder. Without a logger there is ``activations.jsonl`` in the trainer's ``default_root_dir``, one line a
    column of the heat map. Pictures, texts and histograms are written when the number of steps has grown by half, from
    step 100 on, at most once a minute and in a five-hundredth of the time, and at the end of the fit, where the worst
    layers are printed too. `table` and `figure` show the same at any time.

    Alerts, each told once when it begins, with what to do; see `AlertRules` for when:
    ``nonfinite`` (with the last 20 samples of the first such layer), ``dead``, ``saturation``, ``scale-jump`` and, of
    gradients, ``nonfinite-gradient``, ``vanishing-gradient``, ``exploding-gradient``.

    Two of them, for different layers, keep apart what they know, but write the same summary tags, pictures and texts.

    Gradients are those of the loss as it is given back by ``training_step``, divided by the number of micro-batches
    where they are accumulated; what ``precision="16-mixed"`` multiplies it by is taken out. A backward pass with
    ``create_graph=True`` is not counted, any other is. Only modules are seen: a ReLU that is called as a function has
    no row and no alert.

    Args:
        include: ``fnmatch`` patterns on layer names, of which at least one has to match. By default every layer
            without children that is neither Identity, dropout, loss nor metric. A full name picks that very module.
        exclude: Patterns of which none may match.
        every_n_steps: Sample every n-th optimizer step.
        first_steps: Sample each of the first optimizer steps too.
        gradients: Measure the gradients that flow back into the outputs too.
        histograms: Count values by sign and power of two too.
        alerts: Whether to tell what looks wrong, or the names of the alerts to tell.
        on_alert: ``"warn"``; ``"log"`` them only; or ``"stop"`` the training, too.

    Raises:
        BatchNormError: If a cadence is out of range, there is no such alert or ``on_alert``, or ``include`` or
            ``exclude`` is a bare string; at the start of the fit, if a pattern matches no layer or the patterns leave
            none.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> monitor = ActivationMonitor(every_n_steps=100, exclude=["head.*"])
        >>> trainer = Trainer(callbacks=[monitor], logger=False, enable_checkpointing=False)
    """

    _kind = "activations"
    _alerts = (
        *("nonfinite", "dead", "saturation", "scale-jump"),
        *("nonfinite-gradient", "vanishing-gradient", "exploding-gradient"),
    )
    history: ActivationHistory
    _sampled_step: int | None
    _scale: "Tensor | None"

    def __init__(
        self,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        every_n_steps: int = 50,
        first_steps: int = 20,
        gradients: bool = False,
        histograms: bool = False,
        alerts: bool | list[str] = True,
        on_alert: str = "warn",
    ) -> None:
        super().__init__(include, exclude, every_n_steps, first_steps, alerts, on_alert)
        asked = [] if isinstance(alerts, bool) else alerts
        blind = [name for name in asked if name.endswith("-gradient")]
        if blind and not gradients:
            raise BatchNormError(f"the alert {blind[0]!r} needs gradients=True.")
        self.gradients, self.histograms = gradients, histograms
        self._forget()
        self._begin()

    def table(self) -> Table:
        """Return the newest sample, one row a layer in order of execution.

        Raises:
            BatchNormError: If nothing was sampled yet.
        """
        return self._newest().table()

    def figure(self, stat: str = "std", *, gradients: bool = False) -> "Figure":
        """Draw the heat map of a statistic: mean, std, min, max, rms, zero_fraction or dead_fraction.

        Args:
            stat: The statistic.
            gradients: Whether of the gradients.

        Raises:
            BatchNormError: If there is no such statistic, or nothing was sampled yet.
        """
        if gradients and not self.gradients:
            raise BatchNormError("gradients are not measured: ActivationMonitor(gradients=True) does.")
        self._look()
        return (self.gradient_history if gradients else self.history).figure(stat)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let passes that another callback makes within a training step go by unmeasured."""
        sampling, self._watch.sampling = self._watch.sampling, False
        try:
            yield
        finally:
            self._watch.sampling = sampling

    @override
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_fit_start(trainer, pl_module)
        self._begin()
        self._watch.install(pl_module, self.include, self.exclude)

    @override
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        steps = expected_steps(trainer)
        samples = self.cadence.samples(steps)
        if _LONG <= steps < math.inf and samples >= _MANY:  # a fit without an end may end soon
            self._watch.statistics = FusedStatistics()
            rank_zero_info(f"ActivationMonitor compiles its pass over activations, for some {samples:g} samples.")
        if logging_step(trainer) == 0:  # another run, not one resumed
            self._forget()

    @override
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        step = logging_step(trainer)
        if self._sampled_step not in (None, step):
            self._flush(trainer)  # accumulate_grad_batches changed after the last batch
        self._watch.sampling = self.cadence.is_due(step)
        self._sampled_step = step if self._watch.sampling else None

    @override
    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        if self._watch.sampling and self.gradients:
            self._scale = gradient_scale(trainer)  # after the optimizer step it may be another

    @override
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._watch.sampling = False
        if ends_optimizer_step(trainer, batch_idx) and self._sampled_step is not None:
            self._flush(trainer)

    @override
    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._watch.sampling = False

    @override
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._watch.sampling = False  # still on if on_train_batch_start has ended the epoch

    @override
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._finish(trainer)
        if isinstance(self._watch.statistics, FusedStatistics) and self._watch.statistics.reason:
            rank_zero_info(f"ActivationMonitor took the eager way: {self._watch.statistics.reason}.")

    @override
    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self._watch.remove()
        super().on_fit_end(trainer, pl_module)

    @override
    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._watch.remove()

    @override
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._watch.remove()
        super().on_exception(trainer, pl_module, exception)

    @override
    def state_dict(self) -> dict[str, Any]:
        self._look()
        return {"history": self.history.state_dict(), "gradient_history": self.gradient_history.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history.load_state_dict(state_dict["history"])
        self.gradient_history.load_state_dict(state_dict["gradient_history"])

    def _begin(self) -> None:
        """Begin a fit."""
        self._watch = ActivationWatch(gradients=self.gradients, histograms=self.histograms)
        self._sampled_step = None
        self._reading: Callable[[], ActivationSnapshot] | None = None
        self._unlogged: ActivationSnapshot | None = None
        self._scale = None
        self._recent = RecentSamples()

    def _forget(self) -> None:
        """Forget the run before."""
        self.snapshot: ActivationSnapshot | None = None
        self.history, self.gradient_history = ActivationHistory(), ActivationHistory()

    @override
    def _finish(self, trainer: Any) -> None:
        self._watch.sampling = False
        # Among other processes, one without a call takes part all the same.
        if self._sampled_step is not None and (self._watch.has_calls or not alone()):
            self._flush(trainer)
        self._log(trainer)

    def _flush(self, trainer: Any) -> None:
        """Log the sample before, and start to read this one."""
        self._log(trainer)
        step, self._sampled_step = self._sampled_step, None
        self._reading = self._watch.start_flush(step=step, across_processes=True, gradient_scale=self._scale)

    def _collect(self) -> None:
        """Take in the sample whose reading was started."""
        if self._reading is None:
            return
        self.snapshot = self._unlogged = snapshot = self._reading()
        self._reading = None
        assert snapshot.step is not None
        self.history.append(snapshot.step, snapshot)
        if snapshot.gradients is not None:
            self.gradient_history.append(snapshot.step, snapshot.gradients)
        self._recent.append(snapshot)

    def _log(self, trainer: Any) -> None:
        self._collect()
        snapshot, self._unlogged = self._unlogged, None
        if snapshot is None or snapshot.step is None:
            return
        scalars, alerts = _scalars(snapshot), self._rules.of_activations(snapshot)
        if snapshot.gradients is not None:
            scalars |= _scalars(snapshot.gradients)
            alerts += self._rules.of_gradients(snapshot.gradients)
        self._publish(trainer, snapshot.step, scalars, alerts)
        for alert in alerts:
            if alert.rule == "nonfinite" and trainer.is_global_zero:
                log_text(trainer, "activations/before", self._recent.table(alert.layer).to_markdown(), snapshot.step)

    @override
    def _draw(self, trainer: Any, step: int) -> None:
        super()._draw(trainer, step)
        if self.gradients and self._file is not None:
            self.gradient_history.write_jsonl(self._file.with_name(f"gradients-of-{self._file.name}"))
        for layer, counts in self._newest().histograms.items():
            log_histogram(trainer, f"activations/histogram/{layer}", raw_histogram(counts).arguments(), step)

    @override
    def _figures(self) -> Mapping[str, Callable[[], "Figure"]]:
        snapshot = self._newest()
        histories = {"activations": (self.history, snapshot)}
        if snapshot.gradients is not None:
            histories["gradients"] = self.gradient_history, snapshot.gradients
        figures: dict[str, Callable[[], Figure]] = {}
        for kind, (history, newest) in histories.items():
            figures |= {f"{kind}/heatmap/{stat}": partial(history.figure, stat) for stat in _HEAT_MAPS[kind]}
            if any(row.count for row in newest.rows.values()):
                figures[f"{kind}/profile"] = partial(depth_profile, newest)
        return figures

    @override
    def _worst(self) -> Mapping[str, Table]:
        newest = self._newest()
        samples = [newest] if newest.gradients is None else [newest, newest.gradients]
        return {sample.kind: worst_layers(sample) for sample in samples}

    def _look(self) -> None:
        """Take the newest sample in between two cadences; among other processes all would have to, so none does."""
        if alone():
            self._collect()

    def _newest(self) -> ActivationSnapshot:
        self._look()
        if self.snapshot is None:
            raise BatchNormError("nothing was sampled yet: fit for at least one sampled optimizer step first.")
        return self.snapshot


def _scalars(snapshot: ActivationSnapshot) -> dict[str, float]:
    scalars = {f"{snapshot.kind}/{name}": value for name, value in snapshot.totals().items()}
    if len(snapshot.blocks) <= MOST_LAYERS_AS_SCALARS:
        for layer, row in snapshot.layers():
            if row.count:
                scalars |= {f"{snapshot.kind}/{layer}/{stat}": getattr(row, stat) for stat in _SCALARS[snapshot.kind]}
    return scalars
