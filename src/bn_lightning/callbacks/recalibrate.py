"""Recalibrate BatchNorm before each validation, or once when training has ended."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from bn_lightning.callbacks.base import BatchNormCallback
from bn_lightning.callbacks.dataloaders import rebuilt_train_loader, train_loaders
from bn_lightning.callbacks.loan import StatisticsLoan, copied_statistics, trains, write_all
from bn_lightning.callbacks.training_data import (
    count_batches,
    draws_progress,
    forward_in_precision,
    told,
    training_inputs,
)
from bn_lightning.errors import BatchNormError, RecalibrationError
from bn_lightning.internals import averaged_networks
from bn_lightning.preservation import on_device
from bn_lightning.recalibration import RecalibrationResult, recalibrate_batch_norm
from bn_lightning.recalibration.random_draw import AUTO, checked_tolerance, tolerance_for
from bn_lightning.selection import as_patterns, named_batch_norms, require_batch_norms

__all__ = ["RecalibrateBatchNorm"]

_WHEN = ("validation", "end")
_INSTEAD = "recalibrate_batch_norm(module, loader"


class RecalibrateBatchNorm(BatchNormCallback):
    """Replace running statistics by those of the training set under the present weights (`recalibrate_batch_norm`).

    ``when="validation"``: before the first batch of every validation within ``fit``, on the weights that are validated.
    Checkpoints that are saved before training goes on hold them. Then training gets its own statistics back, since
    `BatchRenorm` reads them: training is bitwise what it is without this callback, and so it is after a resume. Where
    ``fit`` ends with a validation, the network keeps the recalibrated ones, and so does a layer that is frozen at the
    start of an epoch, as `FreezeBatchNorm` does.

    ``when="end"``: once, after every callback's ``on_train_end``, on the weights that are left then.

    It goes through a training loader of its own and calls ``module(input)`` with each batch's first element, in the
    Trainer's precision; the Trainer's own loader is not touched. With several processes each goes through its own share
    and all get the statistics of all data. Layers that train frozen stay as they are. Where it is not possible a
    warning tells why, and training goes on; data that cannot be gone through twice are announced at its start.

    Its place among the callbacks does not matter to these, and beside them it does the following.

    - ``WeightAveraging`` validates averaged weights: those are recalibrated, the average keeps the result, also in
      checkpoints, and training goes on with its own. Where it averages buffers, later averages mix in those of
      training until the next validation; ``"end"`` recalibrates what is left after ``fit``, and the average with it.
    - ``StochasticWeightAveraging`` moves its average into the network and spends an epoch on averages of batch
      statistics, with dropout. Either setting puts exact statistics of the averaged weights in their place, ``"end"``
      also where that epoch never happens: after early stopping or without ``max_epochs``.
    - ``ModelCheckpoint`` saves recalibrated statistics with ``"validation"``, if it saves after a validation. ``"end"``
      comes too late for its files; ``trainer.save_checkpoint`` after ``fit`` has them.

    Put ``"end"`` before a `BatchNormAudit` that is to see its effect: both run at ``on_fit_end``.

    Args:
        when: ``"validation"`` or ``"end"``.
        max_batches: Take at most so many training batches, in each process.
        include: Name patterns (``fnmatch``) of the BN layers to recalibrate; ``None`` means all.
        exclude: Name patterns of the BN layers to leave out.
        tolerance: Take fewer once the estimated standard error of every mean and standard deviation is below so many
            σ; ``None`` takes them all, and ``"auto"`` is 0.01 where the training loader shuffles, else ``None``: of
            batches that come in an order the first say nothing of the rest.

    Attributes:
        result: The last `RecalibrationResult`; ``None`` before it, or where it was not possible.

    Raises:
        RecalibrationError: If ``when`` is neither or ``max_batches`` not positive; at the start of the fit, if the
            module has no BN layer.
        BatchNormError: If a pattern is a bare string; at the start of the fit, if a pattern matches no BN layer.

    Example:
        >>> RecalibrateBatchNorm(when="end", max_batches=50).when
        'end'
    """

    def __init__(
        self,
        when: str = "validation",
        max_batches: int = 200,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        tolerance: float | str | None = AUTO,
    ) -> None:
        if when not in _WHEN:
            raise RecalibrationError(f"when must be one of {', '.join(map(repr, _WHEN))}, got {when!r}.")
        if max_batches < 1:
            raise RecalibrationError(f"max_batches must be a positive whole number, got {max_batches!r}.")
        checked_tolerance(tolerance_for(None, tolerance))
        self.when = when
        self.max_batches = max_batches
        self.include = as_patterns(include, "include")
        self.exclude = as_patterns(exclude, "exclude")
        self.tolerance = tolerance
        self.result: RecalibrationResult | None = None
        self._layers: dict[str, _BatchNorm] | None = None
        self._trains: dict[str, bool] = {}
        self._possible = False  # only from on_train_start to the end of that fit
        self._due = False
        self._met = False  # a validation
        self._loan = StatisticsLoan()
        self._module: Any = None

    @property
    @override
    def state_key(self) -> str:
        return str(self._generate_state_key(when=self.when))

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return what training goes on from, where the checkpoint itself holds the recalibrated statistics."""
        return {"own": self._loan.state(self._module)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loan.resume(state_dict.get("own", {}))

    @override
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse now what could never work."""
        super().on_fit_start(trainer, pl_module)
        self.result, self._module, self._met = None, pl_module, False
        require_batch_norms(pl_module, self.include, self.exclude, error=RecalibrationError)

    @override
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Warn now if there will be no data to recalibrate with."""
        problem = None
        try:
            rebuilt_train_loader(trainer)
        except BatchNormError as error:
            problem = error
        # All processes or none: those that take part wait for each other.
        self._possible = trainer.strategy.reduce_boolean_decision(problem is None)
        if not self._possible:
            why = problem or "another process has the reason."
            rank_zero_warn(f"RecalibrateBatchNorm: there will be no recalibration in this fit: {why}")
        self._layers = None
        self._note_modes(pl_module)

    @override
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._layers = None  # other callbacks replace layers in this hook

    @override
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._loan.settle(pl_module)

    @override
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.when == "validation":
            self._note_modes(pl_module)

    @override
    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        # WeightAveraging swaps in this hook, before or after this callback. What follows it is the first batch.
        self._due = self._possible and self.when == "validation"

    @override
    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not self._due:
            return
        self._due, self._met = False, True
        own = copied_statistics(pl_module, self.include, self.exclude)
        if self.result is not None and not any(self._trains.get(name, True) for name in own):
            return  # they were frozen since, with what they have
        with self._training_modes(pl_module):
            self._recalibrate(trainer, pl_module)
        if self.result is not None:
            self._loan.lend(own, copied_statistics(pl_module, self.include, self.exclude))

    @override
    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        if self._possible and self.when == "end":
            # Lightning has moved the module to the CPU by now, and what is written on the way back there is lost.
            with on_device(pl_module, trainer.strategy.root_device):
                self._recalibrate(trainer, pl_module)
                found = copied_statistics(pl_module, self.include, self.exclude)
            if self.result is not None:
                for network in (pl_module, *averaged_networks(trainer)):
                    write_all(named_batch_norms(network), found)
                rank_zero_info(f"RecalibrateBatchNorm: {str(self.result).splitlines()[0]}.")
        elif self._possible and not self._met:
            rank_zero_warn(
                "RecalibrateBatchNorm(when='validation') has recalibrated nothing: there was no validation in this "
                "fit. Use when='end'."
            )
        self._forget()

    @override
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._possible = self._due = False

    @override
    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._forget()

    def _forget(self) -> None:
        self._possible = self._due = False
        self._loan, self._module, self._layers = StatisticsLoan(), None, None

    def _recalibrate(self, trainer: Any, pl_module: Any) -> None:
        self.result = None
        try:
            self.result = recalibrate_batch_norm(
                pl_module,
                training_inputs(trainer, instead=_INSTEAD),
                max_batches=count_batches(trainer, self.max_batches),
                forward=forward_in_precision(trainer),
                include=self.include,
                exclude=self.exclude,
                tolerance=self._tolerance(trainer),
                show_progress=not draws_progress(trainer),
            )
        except Exception as error:
            # The user's own forward runs here, in ways training_step may not run it: no reason to lose the training.
            why = told(error, instead=_INSTEAD)
            rank_zero_warn(f"RecalibrateBatchNorm: the running statistics are as training left them. {why}")

    def _tolerance(self, trainer: Any) -> Any:
        loaders = train_loaders(trainer)
        return tolerance_for(loaders[0] if len(loaders) == 1 else None, self.tolerance)

    def _note_modes(self, pl_module: Any) -> None:
        """Remember which layers train: in validation all are in evaluation mode, frozen or not."""
        if self._layers is None:
            self._layers = named_batch_norms(pl_module)
        self._trains = {name: trains(layer) for name, layer in self._layers.items()}

    @contextmanager
    def _training_modes(self, pl_module: Any) -> Iterator[None]:
        layers = named_batch_norms(pl_module)
        before = [(module, module.training) for module in (pl_module, *layers.values())]
        try:
            pl_module.training = True
            for name, layer in layers.items():
                layer.training = self._trains.get(name, True)
            yield
        finally:
            for module, mode in before:
                module.training = mode
