"""The audit under a Trainer, in the stages that were asked for and as far as its module lets it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.fabric.utilities import move_data_to_device

from bn_lightning.auditing import AuditReport, TrainingHistory, TrainingSettings, audit_batch_norm
from bn_lightning.auditing.exchange import together
from bn_lightning.callbacks.audit_data import AuditData
from bn_lightning.callbacks.loan import trains
from bn_lightning.callbacks.training_step import no_step_because, quietly, training_step_of
from bn_lightning.errors import BatchNormError, first_line
from bn_lightning.selection import named_batch_norms, unwrap

__all__ = ["STAGES", "StagedAudit"]

STAGES = ("static", "passive", "active")
_LOSSES, _EVALUATION, _ACTIVE = "loss readings", "evaluation inputs", "active stage"

Step = Callable[[Any, Any], Any]


@dataclass(slots=True)
class StagedAudit:
    """One audit of a LightningModule that is on the strategy's device.

    Attributes:
        trainer: That of the fit.
        module: The LightningModule.
        stages: Of `STAGES`.
        max_batches: At most so many of either kind, in each process.
        step: A function ``(module, batch) -> loss`` in place of ``training_step``, or ``None``.
        options: ``include`` and ``exclude``.
        settings: Of the training.
        history: What was seen while training, or ``None``.
        example: An input to record a forward pass with where no data is run through, or ``None``.
        impossible: Once run, why no data was run through though the active stage was asked for; else ``None``.
    """

    trainer: Any
    module: Any
    stages: Sequence[str]
    max_batches: int
    step: Step | None
    options: dict[str, Any]
    settings: TrainingSettings | None = None
    history: TrainingHistory | None = None
    example: Any = None
    impossible: str | None = None

    def run(self) -> AuditReport:
        """Audit as far as it goes: with validation data and losses, without the one or the other, without data.

        With several processes every one has to call this, and what fails in one is left out in all.
        """
        left_out = {f"{stage} stage": "stages= leaves it out" for stage in STAGES if stage not in self.stages}
        given = {**self.options, "history": self.history, "left_out": left_out, "max_batches": self.max_batches}
        array = getattr(self.module, "example_input_array", None)
        given["example_inputs"] = None if array is None else self._moved(array)
        if "static" in self.stages:
            given |= {"optimizer": self.trainer.optimizers, "training": self.settings}
        if self._all_frozen():
            left_out.setdefault(_ACTIVE, "every selected BatchNorm layer is frozen, and evaluates as it trains")
        if _ACTIVE not in left_out:
            for attempt, what in self._attempts(left_out):
                try:
                    with quietly(self.trainer, self.module):
                        return together(lambda attempt=attempt: audit_batch_norm(self.module, **attempt, **given))  # type: ignore[misc]
                except Exception as error:
                    left_out[what] = self._told(error, attempt)
            self.impossible = left_out[_ACTIVE]
        if array is None:
            given["example_inputs"] = self.example
        return audit_batch_norm(self.module, **given)

    def _all_frozen(self) -> bool:
        layers = named_batch_norms(unwrap(self.module), self.options["include"], self.options["exclude"])
        return self.module.training and not any(map(trains, layers.values()))

    def _attempts(self, left_out: dict[str, str]) -> Iterator[tuple[dict[str, Any], str]]:
        """Give arguments to try, and what has to be left out if they fail."""
        try:
            data = AuditData(self.trainer, self.max_batches)
        except Exception as error:
            left_out[_ACTIVE] = str(error) if isinstance(error, BatchNormError) else first_line(error)
            return
        train: dict[str, Any] = {"train_batches": data.training}
        with_validation = None if data.validation is None else {**train, "val_batches": data.validation}
        if data.no_validation is not None:
            left_out[_EVALUATION] = data.no_validation
        reason = no_step_because(self.module) if self.step is None else None
        step = self._in_precision(self.step or training_step_of(data.index_of))
        forward = self._in_precision(data.forward)
        for run, what in (({"step": step}, _LOSSES), ({"forward": forward}, _ACTIVE)):
            if what == _LOSSES and reason is not None:
                left_out[_LOSSES] = reason
                continue
            if with_validation is not None:
                yield {**with_validation, **run}, _EVALUATION
            yield {**train, **run}, what
            if with_validation is not None:
                del left_out[_EVALUATION]  # they are not what fails

    def _in_precision(self, run: Step) -> Step:
        def in_precision(module: Any, batch: Any) -> Any:
            with self.trainer.precision_plugin.forward_context():
                return run(module, batch)

        return in_precision

    def _told(self, error: Exception, attempt: dict[str, Any]) -> str:
        why = str(error) if isinstance(error, BatchNormError) else first_line(error)
        if "step" in attempt:
            return f"{'training_step' if self.step is None else 'step'} failed: {why}"
        if isinstance(error, BatchNormError):
            return why
        return (
            f"module(input) failed with each batch's first element: {why}. If the network is run otherwise, say how: "
            "BatchNormAudit(step=lambda module, batch: …), which returns the batch's loss"
        )

    def _moved(self, example: Any) -> Any:
        converted = self.trainer.precision_plugin.convert_input(example)
        return move_data_to_device(converted, self.trainer.strategy.root_device)
