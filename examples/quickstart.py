"""Train, watch, audit, recalibrate and fold a network on real digits. Takes under a minute."""

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger

import bn_lightning as bnl
from bn_lightning.callbacks import ActivationMonitor, BatchNormAudit, FoldBatchNorm
from bn_lightning.modules import DigitsDataModule, ImageClassifier

if __name__ == "__main__":
    pl.seed_everything(0)
    data = DigitsDataModule(batch_size=64)
    module = ImageClassifier("residual", network_options={"widths": (16, 32)})

    # Three callbacks, added to a Trainer as they would be to yours.
    monitor = ActivationMonitor(every_n_steps=10)
    trainer = pl.Trainer(
        max_epochs=8,
        accelerator="cpu",
        logger=TensorBoardLogger("runs/quickstart", name=""),
        callbacks=[monitor, BatchNormAudit(), FoldBatchNorm(stages=["test"])],
        enable_checkpointing=False,
        log_every_n_steps=10,
    )
    trainer.fit(module, data)  # ends with the audit: which BN layer's running statistics are off, and by how much
    print(monitor.table())  # every layer's activations; TensorBoard has them as layer × step heat maps

    # Put population statistics into the running buffers; result.undo() takes them out again.
    result = bnl.recalibrate_batch_norm(module, data.train_dataloader())
    print(result)

    # Tested without a single BatchNorm: FoldBatchNorm folds for the stage and restores afterwards.
    trainer.test(module, data)

    # Fold for good, to ship: same class, same names, proven equal in float64.
    images, _ = next(iter(data.test_dataloader()))
    folded = bnl.fold_batch_norm(module.eval(), images)
    print(folded.report.summary)
