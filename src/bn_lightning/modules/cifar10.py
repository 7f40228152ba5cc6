"""CIFAR-10 from a local folder, or downloaded."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from bn_lightning.errors import BatchNormError
from bn_lightning.modules.cifar10_files import TEST, TRAIN, fetch, find_folder, read_batches
from bn_lightning.modules.split_data import SplitDataModule

__all__ = ["CIFAR10DataModule", "random_crop_and_flip"]


class CIFAR10DataModule(SplitDataModule):
    """60,000 photographs of 32 × 32 pixels in ten classes: 50,000 for training and validation, 10,000 for the test.

    Each color is standardized by the training images' mean and standard deviation. Training images are padded by 4
    black pixels, cropped at random and mirrored with probability ½.

    Args:
        root: Folder that holds ``cifar-10-batches-py`` (the Python version) or ``cifar-10-python.tar.gz``.
        download: Whether to fetch the archive (170 MB) if neither is there.
        batch_size: Images a batch; the last training batch is smaller.
        val_size: Training images that are held out for validation; with 0 all are trained on, and validation is on the
            test images.
        augment: Whether to crop and mirror.
        split_seed: Which images are held out.
        num_workers: Of the dataloaders.

    Shape:
        Batches are (N, 3, 32, 32) float32 images and (N,) int64 labels.

    Raises:
        BatchNormError: If the data is missing, cannot be downloaded, or has another checksum than the published: the
            files are pickles, and none is opened before its checksum is right.

    Reference:
        A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009, §3. The augmentation: He et al.,
        arXiv:1512.03385, §4.2.
    """

    def __init__(
        self,
        root: str,
        download: bool = False,
        batch_size: int = 128,
        val_size: int = 5000,
        augment: bool = True,
        split_seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers)
        self.save_hyperparameters()
        self.root = Path(root).expanduser()
        self.download, self.val_size, self.augment, self.split_seed = download, val_size, augment, split_seed

    def prepare_data(self) -> None:
        """Unpack the archive, downloaded if asked for, unless the batches are there."""
        if find_folder(self.root) is None:
            fetch(self.root, download=self.download)

    def setup(self, stage: str | None = None) -> None:
        """Read, check and split the images; the same for every stage."""
        self.prepare_data()  # where nobody called it, as without a Trainer
        folder = find_folder(self.root)
        assert folder is not None
        images, labels = read_batches(folder, TRAIN)
        if not 0 <= self.val_size < len(labels):
            raise BatchNormError(f"val_size has to be from 0 to {len(labels) - 1} images, got {self.val_size}.")
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.split_seed))
        val, train = order.split([self.val_size, len(labels) - self.val_size])
        mean, std = _color_statistics(images[train])
        self.train_data = _Images(images[train], labels[train], mean, std, augment=self.augment)
        self.test_data = _Images(*read_batches(folder, TEST), mean, std)
        self.val_data = _Images(images[val], labels[val], mean, std) if self.val_size else self.test_data


def random_crop_and_flip(images: Tensor, padding: int = 4) -> Tensor:
    """Pad images with zeros, cut each out again at a random place, and mirror it with probability ½.

    Shape:
        (N, C, H, W), also of the output.

    Example:
        >>> random_crop_and_flip(torch.ones(2, 3, 8, 8)).shape
        torch.Size([2, 3, 8, 8])
    """
    count, _, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    rows = torch.randint(2 * padding + 1, (count, 1)) + torch.arange(height)
    columns = torch.randint(2 * padding + 1, (count, 1)) + torch.arange(width)
    columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
    which = torch.arange(count)[:, None, None]
    return padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


class _Images(Dataset[tuple[Tensor, Tensor]]):
    """Images as bytes, made into floats a batch at a time."""

    def __init__(self, images: Tensor, labels: Tensor, mean: Tensor, std: Tensor, *, augment: bool = False) -> None:
        self.images, self.labels, self.augment = images, labels, augment
        self.mean, self.std = mean.view(3, 1, 1), std.view(3, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Return a batch's images, which the loader asks for at once."""
        images = self.images[indices]
        if self.augment:
            images = random_crop_and_flip(images)
        return list(zip((images.float() - self.mean) / self.std, self.labels[indices], strict=True))


def _color_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (correction=0) of each color, exact: from how often each byte occurs."""
    counts = torch.stack([torch.bincount(images[:, color].flatten(), minlength=256) for color in range(3)]).double()
    share = counts / counts.sum(1, keepdim=True)
    values = torch.arange(256, dtype=torch.float64)
    mean = share @ values
    var = (share * (values - mean[:, None]).square()).sum(1)
    return mean.float(), var.sqrt().float()
