"""What the data modules here have in common: three parts and their loaders."""

from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader, Dataset

__all__ = ["SplitDataModule"]


class SplitDataModule(pl.LightningDataModule):
    """Loads ``train_data``, ``val_data`` and ``test_data``, which a subclass sets in ``setup``.

    Args:
        batch_size: Images a batch; the last training batch may be smaller.
        num_workers: Of the dataloaders.
    """

    train_data: Dataset[Any]
    val_data: Dataset[Any]
    test_data: Dataset[Any]

    def __init__(self, batch_size: int, num_workers: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.num_workers = num_workers

    def train_dataloader(self) -> DataLoader[Any]:
        """Return shuffled training batches."""
        return self._loader(self.train_data, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return validation batches in fixed order."""
        return self._loader(self.val_data)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return test batches in fixed order."""
        return self._loader(self.test_data)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the test batches."""
        return self._loader(self.test_data)

    def _loader(self, data: Dataset[Any], *, shuffle: bool = False) -> DataLoader[Any]:
        return DataLoader(
            data,
            batch_size=self.batch_size,  # by name: Lightning rebuilds a loader from its arguments
            shuffle=shuffle,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )
