"""The main job, from end to end, on real data: train, watch, audit, recalibrate, fold."""

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from bn_lightning.auditing import audit_batch_norm
from bn_lightning.callbacks import ActivationMonitor, BatchNormAudit, BatchNormMonitor, FoldBatchNorm
from bn_lightning.callbacks.dataloaders import rebuilt_train_loader
from bn_lightning.errors import BatchNormError
from bn_lightning.folding import fold_batch_norm
from bn_lightning.folding.speed import compare_speed
from bn_lightning.modules import DigitsDataModule, ImageClassifier
from bn_lightning.preservation import preserved
from bn_lightning.recalibration import recalibrate_batch_norm
from bn_lightning.reports.heatmap import save_png

__all__ = ["demo"]


def demo(output: str = "runs/demo", epochs: int = 15, seed: int = 0) -> None:
    """Train a residual network on handwritten digits with every callback, and show what they found.

    Args:
        output: Folder for the TensorBoard log and the heat map. For example:
            bn-lightning demo --epochs 8 --output runs/short
        epochs: Passes over the 1,257 training images.
        seed: Of the weights and of the order of the images.
    """
    if epochs < 1:
        raise BatchNormError(f"epochs must be at least 1 to have something to show, got {epochs}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for images of 8 × 8 more bring nothing, and on a busy machine they wait for each other
    try:
        _demo(output, epochs, seed)
    finally:
        torch.set_num_threads(threads)


def _demo(output: str, epochs: int, seed: int) -> None:
    # Two cores and 8 × 8 images: dataloader workers would cost more than they bring.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    pl.seed_everything(seed, verbose=False)
    data, module = DigitsDataModule(), ImageClassifier("residual")
    monitor = ActivationMonitor(every_n_steps=10, gradients=True, histograms=True)
    running, midway = BatchNormMonitor(every_n_steps=10), _Midway(epoch=min(4, epochs))
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=TensorBoardLogger(output, name="", default_hp_metric=False),
        callbacks=[monitor, running, midway, BatchNormAudit(), FoldBatchNorm(stages=["test"]), TQDMProgressBar(20)],
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=10,
    )

    _heading("1. Training on 1,257 handwritten digits; at its end BatchNormAudit reports")
    trainer.fit(module, data)
    folder = Path(str(trainer.log_dir))
    picture = folder / "activations_std.png"
    save_png(monitor.figure("std"), picture)

    _heading("2. What ActivationMonitor saw at its last sample")
    print(monitor.table())

    _heading(f"3. The audit after epoch {midway.epoch}, with the learning rate high, before and after recalibration")
    print(f"{midway.before}\n\n{midway.after}\n")
    print(
        f"validation accuracy after epoch {midway.epoch}: {midway.accuracies[0]:.3f}, and with recalibrated statistics "
        f"{midway.accuracies[1]:.3f}.\nThe weights were the same. Recalibration was then undone and training went on."
    )

    _heading("4. Shipping: FoldBatchNorm tests the network with every BatchNorm folded away")
    accuracy = trainer.test(module, data, verbose=False)[0]["test/accuracy"]
    images = data.test_data.tensors[0]
    folded = fold_batch_norm(module.eval(), images, inplace=False)
    print(f"\nspeed on {len(images)} images: {compare_speed(module, folded.model, images)}")
    print(f"test accuracy, folded: {accuracy:.4f}")

    _heading("Where everything is, and what to run next")
    print(f"heat map, layer × step:  {picture}")
    programs = Path(sys.executable).parent
    print(f"TensorBoard:             {programs / 'tensorboard'} --logdir {output}")
    print("                         (tab Images, activations/heatmap; tick 'Show actual image size')")
    print(f"the same in your code:   {sys.executable} examples/quickstart.py")


class _Midway(pl.Callback):
    """Audits, recalibrates and evaluates after one epoch, and leaves everything as it was."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.before: object = None
        self.after: object = None
        self.accuracies: tuple[float, float] = (0.0, 0.0)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch + 1 != self.epoch:
            return
        validation: Any = trainer.datamodule  # type: ignore[attr-defined]
        images, labels = validation.val_data.tensors
        loader = rebuilt_train_loader(trainer)
        self.before = audit_batch_norm(pl_module, loader)
        accuracy = _accuracy(pl_module, images, labels)
        result = recalibrate_batch_norm(pl_module, loader)
        self.accuracies = (accuracy, _accuracy(pl_module, images, labels))
        self.after = audit_batch_norm(pl_module, loader)
        result.undo()


def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with preserved(model), torch.no_grad():
        return (model.eval()(images).argmax(1) == labels).float().mean().item()


def _heading(text: str) -> None:
    print(f"\n── {text}\n", flush=True)
