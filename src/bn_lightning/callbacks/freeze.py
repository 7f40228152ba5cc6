"""Freeze BatchNorm layers for good: statistics, scale and shift."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from bn_lightning.callbacks.base import BatchNormCallback
from bn_lightning.errors import ConversionError
from bn_lightning.layers.convert import convert_batch_norm
from bn_lightning.layers.frozen import FrozenBatchNorm
from bn_lightning.layers.report import ConversionReport
from bn_lightning.selection import as_patterns, describe, named_batch_norms

__all__ = ["FreezeBatchNorm"]


class FreezeBatchNorm(BatchNormCallback):
    """Train with BatchNorm layers that neither learn nor move, from an epoch on.

    The layers become `FrozenBatchNorm`, which normalizes by running statistics whatever the mode, so that neither
    ``.train()`` nor a finetuning callback brings batch statistics back. The gradients of scale and shift are dropped
    before every optimizer step rather than ``requires_grad`` taken away: DDP goes on finding them, weight decay and
    momentum pass them by, and ``BackboneFinetuning(train_bn=True)``, which makes them trainable again, makes no
    difference. When fit ends or fails, the layers get their own classes back, with their frozen values. What was
    frozen is said once, on rank zero.

    Args:
        include: Name patterns of the layers to freeze; ``None`` means all.
        exclude: Name patterns of layers to keep training; ``None`` means none.
        from_epoch: First epoch, counted from 0, that they are frozen in.
        trainable: Freeze the statistics alone; scale and shift go on learning.

    Attributes:
        report: The `ConversionReport` of what was frozen, ``None`` before that.

    Raises:
        ConversionError: When fit begins, if there is no BatchNorm layer or a pattern matches none.

    Example:
        >>> trainer = pl.Trainer(callbacks=[FreezeBatchNorm(include=["backbone.*"])], logger=False, accelerator="cpu",
        ...                      enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        from_epoch: int = 0,
        trainable: bool = False,
    ) -> None:
        if not isinstance(from_epoch, int) or from_epoch < 0:
            raise ConversionError(f"from_epoch counts epochs from 0, got {from_epoch!r}.")
        self.include = as_patterns(include, "include")
        self.exclude = as_patterns(exclude, "exclude")
        # A layer that was frozen before keeps what it was told of scale and shift.
        self._picked: dict[str, Any] = {"include": self.include, "exclude": self.exclude, "trainable": None}
        self.from_epoch = from_epoch
        self.trainable = trainable
        self.report: ConversionReport | None = None
        self._undoable: ConversionReport | None = None
        self._frozen: dict[str, FrozenBatchNorm] = {}
        self._hooks: list[RemovableHandle] = []
        self._states: dict[str, list[Tensor]] = {}
        self._epochs: int | None = None
        self._done = False

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._epochs = trainer.max_epochs

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._done = False
        # Refuse now what would fail in from_epoch.
        convert_batch_norm(pl_module, FrozenBatchNorm, **self._picked, dry_run=True)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A step that the module takes by itself, with the bare optimizer, passes on_before_optimizer_step by.
        for optimizer in trainer.optimizers:
            self._hooks.append(optimizer.register_step_pre_hook(self._before_step))
        self._freeze_if_due(trainer, pl_module)  # a run resumed within an epoch starts none

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._freeze_if_due(trainer, pl_module)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        self._drop_gradients()

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._drop_gradients()
        # A closure makes the gradients within the step.
        return tuple(map(self._dropping, args)), {name: self._dropping(value) for name, value in kwargs.items()}

    def _dropping(self, argument: Any) -> Any:
        if not callable(argument):
            return argument

        def closure() -> Any:
            loss = argument()
            self._drop_gradients()
            return loss

        return closure

    def _drop_gradients(self) -> None:
        if self.trainable:
            return
        for layer in self._frozen.values():
            for parameter in layer.parameters(recurse=False):
                parameter.grad = None  # not zero: momentum and weight decay would still move it

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._done:
            rank_zero_warn(
                f"FreezeBatchNorm(from_epoch={self.from_epoch}) has frozen nothing: fit ended in epoch "
                f"{trainer.current_epoch}."
            )

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._thaw()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._thaw()

    def _freeze_if_due(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._done or trainer.current_epoch < self.from_epoch:
            return
        if self._epochs is not None and 0 <= self._epochs <= trainer.current_epoch:
            return  # an epoch that StochasticWeightAveraging adds, when it has reset BatchNorm to measure it anew
        self._done = True
        self.report = self._undoable = convert_batch_norm(pl_module, FrozenBatchNorm, **self._picked)
        picked = named_batch_norms(pl_module, self.include, self.exclude)
        self._frozen = {name: bn for name, bn in picked.items() if isinstance(bn, FrozenBatchNorm)}
        self._states = {name: self._state(bn) for name, bn in self._frozen.items()}
        what = "running statistics" if self.trainable else "running statistics, scale and shift"
        rank_zero_info(
            f"FreezeBatchNorm: {len(self._frozen)} BatchNorm layers are frozen from epoch {trainer.current_epoch} on "
            f"({what}): {', '.join(self._frozen)}."
        )
        left = {name: bn for name, bn in picked.items() if name not in self._frozen}
        if left:
            reasons = {row.name: row.reason for row in self.report.rows}
            first = next(iter(left))
            rank_zero_warn(
                f"FreezeBatchNorm could not freeze {len(left)} of {len(picked)} BatchNorm layers ({describe(left)}). "
                f"The first: {reasons[first]}."
            )

    def _thaw(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for name, layer in self._frozen.items():  # averaging weights mixes in earlier ones, and resets counts
            for tensor, value in zip(self._held(layer), self._states[name], strict=True):
                if not torch.equal(tensor, value):
                    tensor.detach().copy_(value)
        if self._undoable is not None:
            self._undoable.undo()
        self._undoable, self._frozen, self._hooks = None, {}, []

    def _held(self, layer: FrozenBatchNorm) -> list[Tensor]:
        """List the tensors that are not to change."""
        parameters = [] if self.trainable else list(layer.parameters(recurse=False))
        return [*layer.buffers(recurse=False), *parameters]

    def _state(self, layer: FrozenBatchNorm) -> list[Tensor]:
        return [tensor.detach().clone() for tensor in self._held(layer)]
