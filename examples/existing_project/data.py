"""The project's own data: stripes in three directions, in noise."""

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset


def stripes(number: int, seed: int) -> TensorDataset:
    """Draw images of 12 × 12 and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(number) % 3
    across = torch.arange(12).float().sin()
    patterns = torch.stack([across.expand(12, 12), across.expand(12, 12).T, across[:, None] * across])
    images = 3 * patterns[labels] + torch.randn(number, 12, 12, generator=generator) + 2
    return TensorDataset(images[:, None], labels)


class Stripes(pl.LightningDataModule):
    """Training and validation images."""

    def __init__(self, batch_size: int = 32) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        """Shuffle."""
        return DataLoader(stripes(480, 0), self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """Keep the order."""
        return DataLoader(stripes(120, 1), self.batch_size)
