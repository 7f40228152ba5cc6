"""Replace BatchNorm by a variant when a stage begins."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from bn_lightning.callbacks.base import BatchNormCallback
from bn_lightning.errors import ConversionError
from bn_lightning.layers.base import BatchNormVariant
from bn_lightning.layers.convert import convert_batch_norm
from bn_lightning.layers.kinds import is_candidate
from bn_lightning.layers.report import ConversionReport
from bn_lightning.layers.target import resolve_target
from bn_lightning.selection import as_patterns, describe, is_selected

__all__ = ["ConvertBatchNorm"]


class ConvertBatchNorm(BatchNormCallback):
    """Convert the LightningModule's BatchNorm layers in ``setup``, before a checkpoint is loaded.

    The layers stay converted; ``callback.undo()`` or `bn_lightning.revert_batch_norm` turns them back, and a
    later validate, test or predict leaves that as it is. What the report says is printed once, on rank zero; a warning
    names layers that had to be kept. Layers that the module makes later, in its own ``setup`` or in
    ``configure_model``, come too late for a callback: a warning names them. Convert them there, at the end of that
    method.

    ``load_from_checkpoint`` runs no callbacks, and loads a converted network's checkpoint into the plain one all the
    same; for ``"domain"`` and ``"group"``, whose state_dicts are others, convert in the module's ``__init__`` instead.

    Args:
        variant: A name such as ``"ghost"``; the table is in the README.
        include: Name patterns of the layers to convert; ``None`` means all.
        exclude: Name patterns of layers to keep; ``None`` means none.
        options: The variant's settings, such as ``{"virtual_batch_size": 32}``.

    Attributes:
        report: The last `ConversionReport` with changes, ``None`` before the first stage.

    Raises:
        ConversionError: For an unknown name or option. At the start of a stage, if there was no BatchNorm layer; at
            the start of fit, if something has replaced the converted layers, as ``Trainer(sync_batchnorm=True)`` does.
        BatchNormError: In ``setup``, for a pattern that matches no layer.

    Example:
        >>> callback = ConvertBatchNorm("ghost", include=["layer4.*"], options={"virtual_batch_size": 32})
        >>> trainer = pl.Trainer(callbacks=[callback], logger=False, accelerator="cpu", enable_progress_bar=False,
        ...                      enable_model_summary=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        variant: str,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.variant = variant
        self.include = as_patterns(include, "include")
        self.exclude = as_patterns(exclude, "exclude")
        self.options = dict(options or {})
        resolve_target(variant, self.options)  # refuse now what would fail at the start of fit
        self.report: ConversionReport | None = None
        self._changes: list[ConversionReport] = []

    def undo(self) -> None:
        """Take back what this callback has converted, but for layers that something else has converted since."""
        while self._changes:
            self._changes.pop().undo(leave_others=True)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if any(map(is_candidate, pl_module.modules())):  # else they may appear yet
            self._convert(trainer, pl_module, again=stage == "fit")
        super().setup(trainer, pl_module, stage)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._report_newcomers(pl_module)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._report_newcomers(pl_module)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._report_newcomers(pl_module)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._report_newcomers(pl_module)

    def _convert(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, again: bool) -> None:
        known = any(report.concerns(pl_module) for report in self._changes)
        if known and not again:
            return
        report = convert_batch_norm(pl_module, self.variant, include=self.include, exclude=self.exclude, **self.options)
        kept = {row.name: row for row in report.rows if row.reason.startswith("kept")}
        if kept:
            first = next(iter(kept.values()))
            rank_zero_warn(
                f"ConvertBatchNorm({self.variant!r}) left {len(kept)} of {len(report.rows)} BatchNorm layers as they "
                f"are: {', '.join(kept)}. The first, {first.name!r}, is {first.reason}."
            )
        changed = any(row.changed for row in report.rows)
        if changed and trainer.is_global_zero:
            print(f"\n{report}")
        if changed:
            self._changes.append(report)
        if changed or not known:
            self.report = report

    def _report_newcomers(self, pl_module: pl.LightningModule) -> None:
        present = {name: module for name, module in pl_module.named_modules() if is_candidate(module)}
        known = {row.name for row in self.report.rows} if self.report else set()
        newcomers = {
            name: layer
            for name, layer in present.items()
            if name not in known and is_selected(name, self.include, self.exclude)
        }
        cure = (
            f"Call bn_lightning.convert_batch_norm(self, {self.variant!r}) at the end of the method of "
            f"{type(pl_module).__name__} that makes them (setup or configure_model)."
        )
        if self.report is None and not all(isinstance(bn, BatchNormVariant) for bn in present.values()):
            raise ConversionError(
                f"ConvertBatchNorm({self.variant!r}) found no BatchNorm layer in setup, and now there are "
                f"{len(newcomers)}: {describe(newcomers)}. {cure}"
            )
        if self.report is None and not present:
            raise ConversionError(
                f"ConvertBatchNorm({self.variant!r}): {type(pl_module).__name__} has no BatchNorm layer."
            )
        if newcomers and self.report:
            rank_zero_warn(
                f"ConvertBatchNorm({self.variant!r}) came before {len(newcomers)} BatchNorm layers were made, which "
                f"are not converted: {describe(newcomers)}. {cure}"
            )
