"""Real handwritten digits that need no download."""

import torch
from torch.utils.data import TensorDataset

from bn_lightning.errors import BatchNormError
from bn_lightning.modules.split_data import SplitDataModule

__all__ = ["DigitsDataModule"]


class DigitsDataModule(SplitDataModule):
    """1,797 handwritten digits of 8 × 8 pixels, split 1,257 / 180 / 360 into training, validation and test.

    The split depends on ``split_seed`` alone. Pixels are standardized by the training images' mean and standard
    deviation over all pixels.

    Args:
        batch_size: Images a batch; the last training batch is smaller.
        split_seed: Which of the fixed splits.
        num_workers: Of the dataloaders.

    Shape:
        Batches are (N, 1, 8, 8) float32 images and (N,) int64 labels.

    Raises:
        BatchNormError: If scikit-learn, which holds the images, is not installed.

    Example:
        >>> data = DigitsDataModule(batch_size=32)
        >>> data.setup("fit")
        >>> images, labels = next(iter(data.val_dataloader()))
        >>> images.shape, labels.shape
        (torch.Size([32, 1, 8, 8]), torch.Size([32]))

    Reference:
        E. Alpaydin & C. Kaynak, Optical Recognition of Handwritten Digits, UCI ML Repository, 1998 (its test part).
    """

    train_data: TensorDataset
    val_data: TensorDataset
    test_data: TensorDataset

    def __init__(self, batch_size: int = 64, split_seed: int = 0, num_workers: int = 0) -> None:
        super().__init__(batch_size, num_workers)
        self.save_hyperparameters()
        self.split_seed = split_seed

    def setup(self, stage: str | None = None) -> None:
        """Load and split the images; the same for every stage."""
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise BatchNormError(
                "the digits come with scikit-learn, which is not installed: pip install 'bn-lightning[demo]'"
            ) from error
        images, labels = load_digits(return_X_y=True)
        pixels = torch.as_tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)
        classes = torch.as_tensor(labels, dtype=torch.int64)
        order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(self.split_seed))
        test, val, train = order.split([360, 180, 1257])
        pixels = (pixels - pixels[train].mean()) / pixels[train].std()
        self.train_data, self.val_data, self.test_data = (
            TensorDataset(pixels[part], classes[part]) for part in (train, val, test)
        )
