"""Audit the network at the end of ``fit``, or at every validation, over loaders of its own."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from bn_lightning.auditing import SEVERITIES, AuditReport, TrainingSettings, TrainingWatch
from bn_lightning.callbacks.audit_stages import STAGES, StagedAudit
from bn_lightning.callbacks.base import BatchNormCallback
from bn_lightning.callbacks.batches import input_of, of_the_loader
from bn_lightning.callbacks.dataloaders import rebuilt_train_loader
from bn_lightning.callbacks.publishing import log_figure, log_scalars, log_text
from bn_lightning.callbacks.training_settings import training_settings
from bn_lightning.errors import AuditError, BatchNormError, first_line
from bn_lightning.internals import logging_step
from bn_lightning.preservation import on_device
from bn_lightning.selection import as_patterns, named_batch_norms, require_batch_norms, unwrap

__all__ = ["BatchNormAudit"]

_WHEN = ("end", "validation")


class BatchNormAudit(BatchNormCallback):
    """Report why evaluation is worse than training, which BN layers do it, and the cure (`audit_batch_norm`).

    *Static* looks at the module's optimizers and the Trainer's settings; the module itself and one recorded forward
    pass are looked at in any case. *Passive* looks at how often running statistics were moved while training and
    validating, by their counters. *Active* runs training batches through and reads the loss of ``training_step`` in
    five ways: on validation batches, where there is one loader of batches that are built like the training batches,
    else on training batches, the same in all five, so that what differs are BatchNorm's statistics and dropout.
    ``batch_idx`` is the batch's place in its loader. No optimizer steps, no hook is called, parameters that the step
    writes to are put back, and what it logs goes nowhere. Where it fails outside of training, where all layers are
    frozen or the data cannot be gone through twice, the rest of the audit is made, and ``report.not_looked`` has the
    reason.

    It runs after every callback's ``on_train_end``, hence on averaged weights where ``WeightAveraging`` or
    ``StochasticWeightAveraging`` put them; with ``when="validation"`` also before the first batch of every validation,
    on the weights that are validated. The report is printed at the end and kept as ``report`` (``None`` until then, or
    if the audit was not possible, which a warning explains). Logged are ``bn/<layer>/gap``, in standard deviations of
    the layer's output, ``bn/loss/<reading>``, the report as text (``bn/audit``) and a picture of the gaps (``bn/gap``).
    Neither the Trainer's dataloaders nor anything else that training could notice is touched. In a distributed run each
    process goes through its own share of the data, and statistics and losses are those of all; only rank zero prints
    and logs.

    Args:
        stages: Of ``"static"``, ``"passive"`` and ``"active"``, which to make; ``None`` means all.
        when: ``"end"``, or ``"validation"`` for each validation and the end.
        max_batches: Audit over at most so many batches, in each process.
        include: Name patterns (``fnmatch``) of the BN layers to audit; ``None`` means all.
        exclude: Name patterns of the BN layers to leave out.
        fail_on: Raise if a finding is at least as severe: ``"info"``, ``"warning"`` or ``"error"``. An audit that was
            not possible then raises too, while ``fast_dev_run``, whose statistics mean nothing, never does.
        step: A function ``(module, batch) -> loss`` in place of ``training_step``; needed for losses where that
            optimizes by itself (manual optimization).

    Raises:
        AuditError: If an argument is none of these or ``max_batches`` not positive; at the start of the fit, if the
            module has no BN layer.
        BatchNormError: If a pattern is a bare string; at the start of the fit, if a pattern matches no BN layer.

    Example:
        >>> BatchNormAudit(max_batches=8, fail_on="error").fail_on
        'error'
    """

    def __init__(
        self,
        stages: list[str] | None = None,
        when: str = "end",
        max_batches: int = 32,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        fail_on: str | None = None,
        step: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        if fail_on is not None and fail_on not in SEVERITIES:
            raise AuditError(f"fail_on must be None or one of {', '.join(map(repr, SEVERITIES))}, got {fail_on!r}.")
        if max_batches < 1:
            raise AuditError(f"max_batches must be a positive whole number, got {max_batches!r}.")
        unknown = [stage for stage in stages or () if stage not in STAGES]
        if unknown or isinstance(stages, str) or stages == []:
            raise AuditError(f"stages must be a list of some of {', '.join(map(repr, STAGES))}, got {stages!r}.")
        if when not in _WHEN:
            raise AuditError(f"when must be one of {', '.join(map(repr, _WHEN))}, got {when!r}.")
        self.max_batches = max_batches
        self.include = as_patterns(include, "include")
        self.exclude = as_patterns(exclude, "exclude")
        self.fail_on = fail_on
        self.stages = tuple(stages or STAGES)
        self.when = when
        self.step = step
        self.report: AuditReport | None = None
        self._watch: TrainingWatch | None = None
        self._modes: dict[nn.Module, bool] = {}
        self._settings: TrainingSettings | None = None
        self._example: Tensor | None = None
        self._announced: str | None = None
        self._due = False
        self._backward_passes = 0

    @override
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Forget the report of an earlier fit, and refuse now what would fail when the training is done."""
        super().on_fit_start(trainer, pl_module)
        self.report, self._watch, self._settings, self._example = None, None, None, None
        self._modes, self._due = {}, False
        layers = require_batch_norms(unwrap(pl_module), self.include, self.exclude, error=AuditError)
        if "passive" in self.stages:
            self._watch = TrainingWatch(layers)

    @override
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Read the settings, and warn now if there will be no data to audit with."""
        self._settings = training_settings(trainer, pl_module)
        self._announced = None
        if "active" not in self.stages:
            return
        try:
            rebuilt_train_loader(trainer)
        except BatchNormError as error:
            self._announced = str(error)
            warnings.warn(f"the BatchNorm audit of this fit will run no data through: {error}", stacklevel=2)

    @override
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._example is None and (x := input_of(of_the_loader(trainer.train_dataloader, batch))) is not None:
            self._example = x[:2].detach().clone()
        if self._watch is not None:
            if batch_idx == 0:  # other callbacks replace layers when an epoch starts
                self._watch.follow(named_batch_norms(unwrap(pl_module)))
            self._watch.begin_batch()
        self._backward_passes = 0

    @override
    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        if self._watch is not None:
            self._watch.before_backward()
        self._backward_passes += 1

    @override
    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if self._watch is not None:
            self._watch.after_backward()

    @override
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._watch is not None:
            # An optimizer with a closure runs training_step again; by hand, one step has several backward passes.
            self._watch.end_batch(max(self._backward_passes, 1) if pl_module.automatic_optimization else 1)
        if self.when == "validation":  # in which all is in evaluation mode, frozen or not
            self._modes = {module: module.training for module in pl_module.modules()}

    @override
    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if self._watch is not None and not trainer.sanity_checking:
            self._watch.begin_validation()

    @override
    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        # Weights and statistics are swapped in this hook, before or after this callback. The first batch follows it.
        self._due = not trainer.sanity_checking

    @override
    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.sanity_checking:
            return
        if self._watch is not None:
            self._watch.begin_validation_batch()
            if self._due:  # DDP puts those of process 0 everywhere when it runs
                self._look_across_processes(self._watch)
        if self._due and self.when == "validation" and self._modes:
            self._audit_before_validation(trainer, pl_module)
        self._due = False

    @override
    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if self._watch is not None and not trainer.sanity_checking:
            self._watch.end_validation()

    @override
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self._watch is not None:
            self._watch.end_training()

    @override
    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Audit, print, log and judge."""
        audit = self._audit(trainer, pl_module)
        # Lightning has moved the module to the CPU by now; the data would take far longer there.
        with on_device(pl_module, trainer.strategy.root_device):
            self.report, impossible = self._tried(audit)
        if self.report is not None:
            if trainer.is_global_zero:
                print(self.report)
            self._log(trainer, self.report)
        if self.fail_on is None or trainer.fast_dev_run:
            return
        if impossible is not None:
            raise AuditError(f"the BatchNorm audit was not possible. {impossible}")
        assert self.report is not None
        # All processes raise, or the others would wait for this one.
        if trainer.strategy.reduce_boolean_decision(bool(self.report.exit_code(self.fail_on)), all=False):
            raise AuditError(_verdict(self.report, self.fail_on))

    @override
    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._watch, self._settings, self._example, self._modes = None, None, None, {}

    def _look_across_processes(self, watch: TrainingWatch) -> None:
        try:
            watch.look_across_processes()
        except BatchNormError as error:
            rank_zero_warn(f"the BatchNorm audit could not compare the processes: {error}")

    def _audit_before_validation(self, trainer: Any, pl_module: Any) -> None:
        with self._training_modes():
            report, _ = self._tried(self._audit(trainer, pl_module))
        if report is not None:
            self.report = report
            self._log(trainer, report)
            rank_zero_info(f"BatchNorm audit before validation at step {trainer.global_step}: {report.summary}")

    def _audit(self, trainer: Any, pl_module: Any) -> StagedAudit:
        return StagedAudit(
            trainer,
            pl_module,
            self.stages,
            self.max_batches,
            self.step,
            {"include": self.include, "exclude": self.exclude},
            settings=self._settings,
            history=None if self._watch is None else self._watch.history(),
            example=self._example,
        )

    def _tried(self, audit: StagedAudit) -> tuple[AuditReport | None, str | None]:
        """Audit, and tell why it was not possible: the user's own code runs, and must not cost the training."""
        try:
            report = audit.run()
        except Exception as error:
            impossible = str(error) if isinstance(error, BatchNormError) else first_line(error)
            warnings.warn(f"the BatchNorm audit was not possible. {impossible}", stacklevel=3)
            return None, impossible
        if audit.impossible not in (None, self._announced):
            warnings.warn(f"the BatchNorm audit was not possible with data. {audit.impossible}", stacklevel=3)
        return report, audit.impossible

    def _log(self, trainer: Any, report: AuditReport) -> None:
        if trainer.is_global_zero:
            step = logging_step(trainer)
            log_scalars(trainer, report.scalars(), step)
            log_text(trainer, "bn/audit", report.to_markdown(), step)
            if report.layers:
                log_figure(trainer, "bn/gap", report.figure, step)

    @contextmanager
    def _training_modes(self) -> Iterator[None]:
        before = {module: module.training for module in self._modes}
        try:
            for module, mode in self._modes.items():
                module.training = mode
            yield
        finally:
            for module, mode in before.items():
                module.training = mode


def _verdict(report: AuditReport, fail_on: str) -> str:
    found = [finding for finding in report.findings if finding.severity in SEVERITIES[SEVERITIES.index(fail_on) :]]
    if not found:
        return "the BatchNorm audit of another process has findings that fail this one too."
    return (
        f"the BatchNorm audit has {len(found)} finding(s) of severity {fail_on!r} or worse, the first: "
        f"{found[0].rule} in {found[0].layer!r}: {found[0].message}. Fix: {found[0].fix}"
    )
