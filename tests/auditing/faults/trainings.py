"""A small network on real digits under the Trainer, in which the fixtures put bugs that only training shows."""

import warnings

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from auditing.faults.digits_training import digits, network

from bn_lightning.callbacks import BatchNormAudit

__all__ = ["Digits", "audited", "train"]


class Digits(pl.LightningModule):
    def __init__(self, **options):
        super().__init__()
        self.net = network(**options)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val", F.cross_entropy(self(x), y))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)
        return [optimizer], [schedule]


def train(module, *callbacks, train_batches=None, val_batches=None, **options):
    """Fit, quietly; return the trainer."""
    torch.manual_seed(0)
    given = digits(28)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            callbacks=list(callbacks),
            **{
                "max_epochs": 5,
                "accelerator": "cpu",
                "logger": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "enable_checkpointing": False,
                **options,
            },
        )
        trainer.fit(module, _loader(train_batches or given[:20]), _loader(val_batches or given[20:]))
    return trainer


def audited(module, *callbacks, stages=None, train_batches=None, val_batches=None, **options):
    """Fit with the audit, and return its report."""
    audit = BatchNormAudit(stages=stages)
    train(module, *callbacks, audit, train_batches=train_batches, val_batches=val_batches, **options)
    return audit.report


def _loader(batches):
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    data = torch.utils.data.TensorDataset(x, y)
    return torch.utils.data.DataLoader(data, 64, shuffle=True, drop_last=True)
