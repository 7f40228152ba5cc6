"""Audit the trained network at the end of ``fit``, over a loader of its own."""

import warnings
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from bn_lightning.auditing import SEVERITIES, AuditReport, audit_batch_norm
from bn_lightning.callbacks.base import BatchNormCallback
from bn_lightning.callbacks.batches import input_of
from bn_lightning.callbacks.dataloaders import rebuilt_train_loader
from bn_lightning.callbacks.publishing import log_scalars
from bn_lightning.errors import AuditError, BatchNormError
from bn_lightning.internals import logging_step
from bn_lightning.preservation import on_device
from bn_lightning.selection import as_patterns, require_batch_norms, unwrap

__all__ = ["BatchNormAudit"]


class BatchNormAudit(BatchNormCallback):
    """Report, when training has ended, which BN layers evaluate differently from what the training data say.

    Prints the report, keeps it as ``report`` (``None`` until then, or if the audit was not possible, which a warning
    explains) and logs ``bn/<layer>/gap``, in standard deviations of the layer's output. It runs after ``on_train_end``,
    hence on averaged weights where ``WeightAveraging`` put them. Neither the Trainer's dataloader nor anything else
    that training could notice is touched. In a distributed run each process audits its own share of the data, and only
    rank zero prints and logs.

    Args:
        max_batches: Audit over at most so many training batches.
        include: Name patterns (``fnmatch``) of the BN layers to audit; ``None`` means all.
        exclude: Name patterns of the BN layers to leave out.
        fail_on: Raise if a finding is at least as severe: ``"info"``, ``"warning"`` or ``"error"``. An audit that was
            not possible then raises too, while ``fast_dev_run``, whose statistics mean nothing, never does.

    Raises:
        AuditError: If ``fail_on`` is none of these or ``max_batches`` not positive; at the start of the fit, if the
            module has no BN layer.
        BatchNormError: If a pattern is a bare string; at the start of the fit, if a pattern matches no BN layer.

    Example:
        >>> BatchNormAudit(max_batches=8, fail_on="error").fail_on
        'error'
    """

    def __init__(
        self,
        max_batches: int = 32,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        fail_on: str | None = None,
    ) -> None:
        if fail_on is not None and fail_on not in SEVERITIES:
            raise AuditError(f"fail_on must be None or one of {', '.join(map(repr, SEVERITIES))}, got {fail_on!r}.")
        if max_batches < 1:
            raise AuditError(f"max_batches must be a positive whole number, got {max_batches!r}.")
        self.max_batches = max_batches
        self.include = as_patterns(include, "include")
        self.exclude = as_patterns(exclude, "exclude")
        self.fail_on = fail_on
        self.report: AuditReport | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Forget the report of an earlier fit, and refuse now what would fail when the training is done."""
        super().on_fit_start(trainer, pl_module)
        self.report = None
        require_batch_norms(unwrap(pl_module), self.include, self.exclude, error=AuditError)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Warn now if there will be no data to audit with."""
        try:
            rebuilt_train_loader(trainer)
        except BatchNormError as error:
            warnings.warn(f"there will be no BatchNorm audit at the end of this fit: {error}", stacklevel=2)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Audit, print, log and judge."""
        may_fail = self.fail_on is not None and not trainer.fast_dev_run
        try:
            self.report = self._audit(trainer, pl_module)
        except Exception as error:
            # The user's own forward runs here, in ways training_step may not run it. The training it follows is done
            # and must not be lost over a diagnosis.
            reason = f"the BatchNorm audit was not possible. {_told(error)}"
            if may_fail:
                raise AuditError(reason) from error
            warnings.warn(reason, stacklevel=2)
            return
        if trainer.is_global_zero:
            print(self.report)
            gaps = {f"bn/{row.name}/gap": row.gap for row in self.report.layers if row.gap is not None}
            log_scalars(trainer, gaps, logging_step(trainer))
        if may_fail and self.fail_on is not None and self.report.exit_code(self.fail_on):
            found = [finding for finding in self.report.findings if finding.severity in _at_least(self.fail_on)]
            raise AuditError(
                f"the BatchNorm audit has {len(found)} finding(s) of severity {self.fail_on!r} or worse, the first: "
                f"{found[0].rule} in {found[0].layer!r}: {found[0].message}. Fix: {found[0].fix}"
            )

    def _audit(self, trainer: Any, pl_module: Any) -> AuditReport:
        # Lightning has moved the module to the CPU by now; the data would take far longer there.
        device = trainer.strategy.root_device
        precision = trainer.precision_plugin
        loader = rebuilt_train_loader(trainer)

        def inputs() -> Iterator[Tensor]:
            for batch in loader:
                moved = trainer.strategy.batch_to_device(precision.convert_input(batch), device)
                yield _input_of(moved)

        def forward(module: Any, x: Tensor) -> object:
            with precision.forward_context():
                return module(x)

        with on_device(pl_module, device):
            return audit_batch_norm(
                pl_module,
                inputs(),
                max_batches=int(min(self.max_batches, max(trainer.num_training_batches, 1))),
                forward=forward,
                include=self.include,
                exclude=self.exclude,
            )


def _input_of(batch: Any) -> Tensor:
    x = input_of(batch)
    if x is None:
        raise AuditError(
            f"expected training batches that are a tensor or an (input, target, …) tuple, got a "
            f"{type(batch).__name__}: how the network is run on it cannot be guessed. Call the function yourself "
            "and say so: bn_lightning.audit_batch_norm(module, loader, forward=lambda module, batch: module(...))."
        )
    return x


def _told(error: Exception) -> str:
    if isinstance(error, BatchNormError):
        return str(error)
    return (
        f"{type(error).__name__}: {error}\nIt calls module(input) with each batch's first element; if the network "
        "is run otherwise, use bn_lightning.audit_batch_norm(module, loader, forward=lambda module, batch: ...)."
    )


def _at_least(severity: str) -> tuple[str, ...]:
    return SEVERITIES[SEVERITIES.index(severity) :]
