"""Fold BatchNorm while the Trainer tests, predicts or validates, and give the network back afterwards."""

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from bn_lightning.callbacks.base import BatchNormCallback
from bn_lightning.callbacks.batches import input_of
from bn_lightning.errors import FoldError
from bn_lightning.folding.fold import FoldResult, fold_batch_norm
from bn_lightning.folding.guard import FoldGuard
from bn_lightning.folding.plan import require_standalone
from bn_lightning.folding.report import FoldReport
from bn_lightning.preservation import out_of_inference_mode
from bn_lightning.selection import as_patterns

__all__ = ["FoldBatchNorm"]

_STAGES = ("test", "predict", "validate")


class FoldBatchNorm(BatchNormCallback):
    """Run a stage with every BatchNorm folded that can be, verified, and restore the network bit for bit after it.

    The LightningModule's own ``forward`` is recorded. Its inputs are ``example_input_array`` if the module has
    one, else those of the stage's first batch: the batch itself if it is a tensor, or its first element. What was
    folded is printed once, on rank zero. Training, and checkpoints saved at any time, hold the unfolded network.

    A step may use inner layers directly, or take a branch that was not recorded. Where that touches what a folded
    layer gives, the stage fails and names the layers, rather than go on with other numbers. Folds that go forward,
    into several layers or through other operations are watched by the order of their calls only, and layers that
    ``torch.compile`` runs not at all; the printed report names both.

    Args:
        stages: Entry points to fold in: ``test``, ``predict`` and ``validate``. The validation inside ``fit`` is
            never folded.
        include: Name patterns of the BatchNorm layers to fold; ``None`` means all.
        exclude: Name patterns of layers to keep; ``None`` means none.
        standalone: What becomes of a layer that cannot be folded: ``"keep"``, or ``"affine"`` for a `ChannelAffine`.
        save_folded: Whether checkpoints saved during the stage hold the folded network. They then load into a network
            folded in the same way, and not into the LightningModule as it is.

    Attributes:
        report: The last `FoldReport`, ``None`` before the first fold.

    Raises:
        FoldError: At the stage's start, if the module has no BatchNorm layer, or its ``forward`` cannot take the
            inputs. During the stage, if a step uses a folded layer in a way that the recorded ``forward`` does not.
        BatchNormError: If ``include`` or ``exclude`` is a bare string.

    Example:
        >>> trainer = pl.Trainer(callbacks=[FoldBatchNorm(stages=["test"])], logger=False, accelerator="cpu",
        ...                      enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)

    See Also:
        `bn_lightning.fold_batch_norm`, which does it for good.
    """

    def __init__(
        self,
        stages: list[str] | tuple[str, ...] = ("test", "predict"),
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        standalone: str = "keep",
        save_folded: bool = False,
    ) -> None:
        unknown = [stages] if isinstance(stages, str) else [stage for stage in stages if stage not in _STAGES]
        if unknown:
            raise FoldError(f"stages= takes a list of {', '.join(map(repr, _STAGES))}; got {unknown[0]!r}.")
        self.stages = tuple(stages)
        self.include = as_patterns(include, "include")
        self.exclude = as_patterns(exclude, "exclude")
        require_standalone(standalone)
        self.standalone = standalone
        self.save_folded = save_folded
        self.report: FoldReport | None = None
        self._folded: FoldResult | None = None
        self._guard: FoldGuard | None = None
        self._state_dict_hooks: ExitStack | None = None

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._on_start(trainer, pl_module, "test")

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._on_start(trainer, pl_module, "predict")

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._on_start(trainer, pl_module, "validate")

    @override
    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._on_batch(trainer, pl_module, batch, "test")

    @override
    def on_predict_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._on_batch(trainer, pl_module, batch, "predict")

    @override
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._on_batch(trainer, pl_module, batch, "validate")

    @override
    def on_test_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *batch: Any) -> None:
        self._check()

    @override
    def on_predict_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *batch: Any) -> None:
        self._check()

    @override
    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *batch: Any) -> None:
        self._check()

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish()

    @override
    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._restore()

    def _due(self, trainer: pl.Trainer, stage: str) -> bool:
        return stage in self.stages and trainer.state.fn == stage and self._folded is None

    def _on_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        inputs = pl_module.example_input_array
        if self._due(trainer, stage) and inputs is not None:
            # Lightning reads a list there as positional arguments, `fold_batch_norm` as several calls.
            inputs = tuple(inputs) if isinstance(inputs, list) else inputs
            inputs = trainer.strategy.batch_to_device(inputs, pl_module.device)
            self._fold(trainer, pl_module, trainer.precision_plugin.convert_input(inputs))

    def _on_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, stage: str) -> None:
        if not self._due(trainer, stage):
            return
        inputs = input_of(batch)
        if inputs is None:
            raise FoldError(
                f"FoldBatchNorm cannot tell the inputs of {type(pl_module).__name__}.forward from a batch of type "
                f"{type(batch).__name__} (expected a tensor, or a tuple or list that begins with one). Set "
                "self.example_input_array in the module's __init__: a tensor, a tuple of positional arguments or "
                "a dict of keyword arguments."
            )
        self._fold(trainer, pl_module, inputs)

    def _fold(self, trainer: pl.Trainer, pl_module: pl.LightningModule, inputs: Any) -> None:
        try:
            self._folded = fold_batch_norm(
                pl_module, inputs, include=self.include, exclude=self.exclude, standalone=self.standalone
            )
        except FoldError as error:
            if error.__cause__ is None:  # not forward that failed
                raise
            raise FoldError(
                f"{error} FoldBatchNorm records forward: define `forward` in {type(pl_module).__name__}, and if it "
                "takes anything but the first element of a batch, set self.example_input_array in __init__."
            ) from error
        if not self.save_folded:
            self._state_dict_hooks = _unfold_state_dict(pl_module, self._folded)
        self._guard = self._folded.guarded()
        self.report = _with_unwatched(self._folded.report, self._guard)
        if trainer.is_global_zero:
            print(f"\n{self.report}")  # on a line of its own, below the progress bar
        if all(row.action == "kept" for row in self.report.rows):
            first = self.report.rows[0]
            rank_zero_warn(
                f"FoldBatchNorm folded no layer of {type(pl_module).__name__}; the first, {first.name!r}, stays for "
                f"{first.reason}: {first.detail}. print(callback.report) lists them all."
            )

    def _check(self) -> None:
        if self._guard is not None:
            self._guard.check()

    def _finish(self) -> None:
        try:
            self._check()
        finally:
            self._restore()

    def _restore(self) -> None:
        if self._guard is not None:
            self._guard.close()
        if self._state_dict_hooks is not None:
            self._state_dict_hooks.close()
        if self._folded is not None:
            self._folded.undo()
        self._guard = self._state_dict_hooks = self._folded = None


def _with_unwatched(report: FoldReport, guard: FoldGuard) -> FoldReport:
    said = [
        _said("Not watched in this stage", guard.unwatched),
        _said("Watched in this stage by the order of their calls only", guard.by_order),
    ]
    return replace(report, note=" ".join(filter(None, [report.note, *said])))


def _said(what: str, layers: dict[str, str]) -> str:
    named = [f"{name!r} ({why})" for name, why in layers.items()]
    more = f" and {len(named) - 3} more" if len(named) > 3 else ""
    return f"{what}: {', '.join(named[:3])}{more}." if named else ""


def _unfold_state_dict(module: nn.Module, folded: FoldResult) -> ExitStack:
    """Make a folded module's ``state_dict()`` that of the unfolded one, until the returned stack is closed.

    The Trainer takes weights-only checkpoints without asking any callback, but always through the module.
    """
    lent, hooks = ExitStack(), ExitStack()

    def before(module: nn.Module, prefix: str, keep_vars: bool) -> None:
        lent.enter_context(folded.unfolded())

    def after(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        # Its tensors share memory with the weights, which are about to be folded again.
        with out_of_inference_mode():
            for key, value in state_dict.items():
                if key.startswith(prefix) and isinstance(value, Tensor):
                    state_dict[key] = value.detach().clone()
        lent.close()

    hooks.callback(module.register_state_dict_pre_hook(before).remove)
    hooks.callback(module.register_state_dict_post_hook(after).remove)
    return hooks
