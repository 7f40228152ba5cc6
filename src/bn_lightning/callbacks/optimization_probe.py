"""Probe the loss around the weights while Lightning trains."""

import math
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from bn_lightning.callbacks.activation_monitor import ActivationMonitor
from bn_lightning.callbacks.base import BatchNormCallback, expected_steps
from bn_lightning.callbacks.publishing import log_figure, log_scalars
from bn_lightning.callbacks.training_step import no_step_because, quietly, training_step_of
from bn_lightning.errors import BatchNormError, first_line
from bn_lightning.internals import logging_step
from bn_lightning.monitoring import Cadence
from bn_lightning.probes import PercentileHistory
from bn_lightning.probes.registry import Passes, probe_call
from bn_lightning.reports.progress import without_progress
from bn_lightning.selection import as_patterns

__all__ = ["OptimizationProbe"]

_DEFAULT = ["loss_landscape", "gradient_tails"]
# More are shown in the picture alone.
_MOST_SCALARS = 100
_SHARDED = ("FSDP", "DeepSpeed", "ModelParallel")


class OptimizationProbe(BatchNormCallback):
    """Run the papers' measurements on the current batch during the fit; training itself is bitwise unchanged.

    Every so many optimizer steps, before the step, each probe reads the loss of ``training_step`` on the batch that is
    about to be trained on, with dropout and precision as in training: nothing is logged by it, no optimizer steps, no
    gradient and no running statistic is left behind. With several processes each probes its own batch, and rank zero's
    is logged. The start of the fit says how many passes that takes.

    A probe's ``scalars()`` are logged as ``probe/<probe>/<key>``; of a network with so many layers that there are more
    than 100, only those of the whole network. Its picture is ``probe/<probe>``, for TensorBoard, W&B and as a file
    beside a CSV log. Of ``activation_percentiles`` there is also ``probe/activation_percentiles/over_time``, of the
    last layer measured. What fails is told once, tried again at the next time, and never ends the training.

    Attributes:
        results: The newest result of each probe.
        percentiles: All of ``activation_percentiles``, for a picture over time.

    Args:
        probes: Their names: ``loss_landscape, gradient_predictiveness, effective_smoothness, relative_loss,
            internal_covariate_shift, gradient_coherence, gradient_tails, gradient_norms_by_depth,
            channel_moments_by_depth, activation_percentiles, branch_variance, max_stable_learning_rate``; by default
            ``loss_landscape`` and ``gradient_tails``.
        every_n_steps: Period in optimizer steps, beginning with the first.
        options: Options of the probes by their names, such as ``{"loss_landscape": {"points": 4}}``.
        learning_rate: What steps are multiples of; by default that of the optimizer's first parameters at the time.
        step: A function ``(module, batch) -> loss`` in place of ``training_step``; needed where that optimizes by
            itself (manual optimization).

    Raises:
        BatchNormError: If there is no such probe or option, or the period is not positive; at the start of the fit, if
            ``training_step`` cannot be used, the strategy keeps parameters in pieces, or a probe needs a single
            process.

    Example:
        >>> OptimizationProbe(["branch_variance"], every_n_steps=100).every_n_steps
        100
    """

    def __init__(
        self,
        probes: list[str] | None = None,
        every_n_steps: int = 500,
        options: dict[str, dict[str, Any]] | None = None,
        learning_rate: float | None = None,
        step: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        names, options = as_patterns(_DEFAULT if probes is None else probes, "probes"), options or {}
        unused = [name for name in options if name not in names]
        if not names or unused:
            raise BatchNormError(
                "probes= names no probe." if not names else f"options= are for {unused[0]!r}, which probes= lacks."
            )
        self.probes = [probe_call(name, options.get(name)) for name in dict.fromkeys(names)]
        self.every_n_steps, self.learning_rate, self.step = every_n_steps, learning_rate, step
        self.results: dict[str, Any] = {}
        self.percentiles = PercentileHistory()
        self._cadence = Cadence(every_n_steps, first_steps=0)
        self._probed: int | None = None
        self._told: set[str] = set()

    @override
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_fit_start(trainer, pl_module)
        self.results, self.percentiles, self._probed, self._told = {}, PercentileHistory(), None, set()
        reason = no_step_because(pl_module, type(self).__name__) if self.step is None else None
        strategy = type(trainer.strategy).__name__
        if any(kind in strategy for kind in _SHARDED):
            reason = f"{strategy} keeps parameters in pieces, and a probe needs them whole: train with DDP"
        single = [probe.name for probe in self.probes if probe.may_differ_between_processes]
        if trainer.world_size > 1 and single:
            reason = (
                f"{single[0]} takes as many steps as each process's own losses say: leave it out, or use one device"
            )
        if reason is not None:
            raise BatchNormError(f"OptimizationProbe cannot run: {reason}.")

    @override
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Say what it will cost."""
        each = {probe.name: probe.passes(pl_module) for probe in self.probes}
        total = sum(each.values(), Passes(0, 0))
        times = self._cadence.samples(expected_steps(trainer))
        often = f", some {math.ceil(times)} times" if 0 < times < math.inf else ""
        parts = ", ".join(f"{name} {one.forward} and {one.backward}" for name, one in each.items())
        rank_zero_info(
            f"OptimizationProbe makes up to {total.forward} extra forward and {total.backward} extra backward passes "
            f"every {self.every_n_steps} optimizer steps{often}: {parts}."
        )

    @override
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        step = logging_step(trainer)
        if step == self._probed or not self._cadence.is_due(step):  # micro-batches of one step: the first
            return
        self._probed = step
        with ExitStack() as stack:
            for callback in trainer.callbacks:
                if isinstance(callback, ActivationMonitor):
                    stack.enter_context(callback.paused())
            stack.enter_context(quietly(trainer, pl_module, type(self).__name__))
            stack.enter_context(without_progress())  # the Trainer has its own bar
            found = self._measured(trainer, pl_module, batch, batch_idx)
        self.results |= found
        if "activation_percentiles" in found:
            self.percentiles.append(step, found["activation_percentiles"])
        if trainer.is_global_zero:
            self._log(trainer, step, found)

    def _measured(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> dict[str, Any]:
        run = self.step or training_step_of(lambda batch: batch_idx)

        def in_precision(module: Any, batch: Any) -> Any:
            with trainer.precision_plugin.forward_context():
                return run(module, batch)

        rate, found = self.learning_rate, {}
        if rate is None:
            rate = float(trainer.optimizers[0].param_groups[0]["lr"]) if trainer.optimizers else math.nan
        for probe in self.probes:
            try:
                found[probe.name] = probe.measure(pl_module, batch, in_precision, rate)
            except Exception as error:  # the user's own code runs, and must not cost the training
                if probe.name not in self._told:
                    self._told.add(probe.name)
                    why = str(error) if isinstance(error, BatchNormError) else first_line(error)
                    warnings.warn(
                        f"OptimizationProbe could not run {probe.name} at optimizer step {self._probed}, tries again "
                        f"every {self.every_n_steps} steps and does not tell again: {why}",
                        stacklevel=2,
                    )
        return found

    def _log(self, trainer: Any, step: int, found: dict[str, Any]) -> None:
        logged: dict[str, float] = {}
        for name, result in found.items():
            scalars = result.scalars()
            few = len(scalars) <= _MOST_SCALARS
            logged |= {f"probe/{name}/{key}": value for key, value in scalars.items() if few or "/" not in key}
        log_scalars(trainer, logged, step)
        if trainer.fast_dev_run or trainer.barebones:  # which suppress logging
            return
        for name, result in found.items():
            log_figure(trainer, f"probe/{name}", result.figure, step)
            if name == "activation_percentiles":
                last = result.layers[-1].name
                log_figure(trainer, f"probe/{name}/over_time", partial(self.percentiles.figure, last), step)
