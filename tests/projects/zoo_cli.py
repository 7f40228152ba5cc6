"""After Lightning's image classifier template: a timm network under LightningCLI. It does not know bn_lightning."""

import lightning.pytorch as pl
import timm
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset


class ZooClassifier(pl.LightningModule):
    def __init__(self, name: str = "resnet10t", lr: float = 0.01):
        super().__init__()
        self.save_hyperparameters()
        self.model = timm.create_model(name, num_classes=3)

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2)]


class Pictures(pl.LightningDataModule):
    def __init__(self, batch_size: int = 8):
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage):
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(40, 3, 32, 32, generator=generator) + 1
        labels = torch.arange(40) % 3
        self.train, self.val = TensorDataset(images[:24], labels[:24]), TensorDataset(images[24:], labels[24:])

    def train_dataloader(self):
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, self.batch_size)
