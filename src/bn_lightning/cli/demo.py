"""The main job, from end to end, on real data: train, watch, audit, recalibrate, fold."""

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger

from bn_lightning.auditing import audit_batch_norm
from bn_lightning.callbacks import ActivationMonitor, BatchNormAudit, FoldBatchNorm
from bn_lightning.folding import fold_batch_norm
from bn_lightning.folding.speed import compare_speed
from bn_lightning.modules import DigitsDataModule, ImageClassifier
from bn_lightning.recalibration import recalibrate_batch_norm
from bn_lightning.reports.heatmap import save_png

__all__ = ["demo"]


def demo(output: str = "runs/demo", epochs: int = 15, seed: int = 0) -> None:
    """Train a residual network on handwritten digits with every callback, and show what they found.

    Args:
        output: Folder for the TensorBoard log and the heat map.
        epochs: Passes over the 1,257 training images.
        seed: Of the weights and of the order of the images.

    Example:
        bn-lightning demo --epochs 5
    """
    # Two cores and 8 × 8 images: dataloader workers would cost more than they bring.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    pl.seed_everything(seed, verbose=False)
    data, module = DigitsDataModule(), ImageClassifier("residual")
    monitor, audit, fold = ActivationMonitor(every_n_steps=10), BatchNormAudit(), FoldBatchNorm(stages=["test"])
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=TensorBoardLogger(output, name="", default_hp_metric=False),
        callbacks=[monitor, audit, fold, TQDMProgressBar(refresh_rate=5)],
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=10,
    )

    _heading("1. Training, with ActivationMonitor and BatchNormAudit attached")
    trainer.fit(module, data)
    folder = Path(str(trainer.log_dir))
    picture = folder / "activations_std.png"
    save_png(monitor.figure("std"), picture)

    _heading("2. What ActivationMonitor saw at its last sample")
    print(monitor.table())

    _heading("3. What BatchNormAudit found: running against population statistics")
    print(audit.report)

    _heading("4. The same after recalibration")
    print(recalibrate_batch_norm(module, data.train_dataloader()))
    print(audit_batch_norm(module, data.train_dataloader()))

    _heading("5. Shipping: tested with every BatchNorm folded away by FoldBatchNorm")
    accuracy = trainer.test(module, data, verbose=False)[0]["test/accuracy"]
    images: Any = data.test_data.tensors[0]
    module.eval()
    folded = fold_batch_norm(module, images, inplace=False)
    print(folded.report)
    print(f"speed on {len(images)} images: {compare_speed(module, folded.model, images)}")
    print(f"test accuracy, folded: {accuracy:.4f}")

    _heading("Where everything is")
    print(f"heat map, layer × step:  {picture}")
    print(f"TensorBoard:             tensorboard --logdir {output}   (Images: activations/heatmap)")
    print("the same in your code:   examples/quickstart.py; README.md has the API")


def _heading(text: str) -> None:
    print(f"\n── {text}\n", flush=True)
