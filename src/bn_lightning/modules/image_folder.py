"""Images of a folder, one folder a class; Pillow, which matplotlib brings, reads them."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from bn_lightning.errors import BatchNormError, first_line
from bn_lightning.modules.split_data import SplitDataModule

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ImageFolderDataModule"]

_ENDINGS = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# ImageNet's, which pretrained networks expect.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_RATIO = 4 / 3
_MARGIN = 8 / 7


class ImageFolderDataModule(SplitDataModule):
    """Images from ``root/train/<class>/…`` and ``root/val/<class>/…``, as ImageNet is laid out.

    Classes are numbered in the order of their names in ``train``. Every image becomes RGB and is standardized by
    ImageNet's mean and standard deviation, which zoo networks expect. Training cuts out a random part of 8 to 100 % of
    the area with sides in a ratio of 3:4 to 4:3, resizes it and mirrors it with probability ½; evaluation cuts the
    middle out, 7/8 of the shorter side (224 of 256 pixels).

    Args:
        root: The folder with ``train`` and ``val``; ``test`` is used in test and prediction, and ``val`` if there is
            none.
        image_size: Pixels of width and height.
        batch_size: Images a batch; the last training batch may be smaller.
        augment: Whether training cuts out and mirrors at random; else it sees what evaluation does.
        num_workers: Of the dataloaders; reading images takes time, so one a core is a good start.

    Shape:
        Batches are (N, 3, image_size, image_size) float32 images and (N,) int64 labels.

    Raises:
        BatchNormError: If a folder is missing or empty, holds a class that ``train`` does not have, or an image cannot
            be read.

    Reference:
        The random part: Szegedy et al., arXiv:1409.4842, §6.
    """

    classes: tuple[str, ...]

    def __init__(
        self, root: str, image_size: int = 224, batch_size: int = 64, augment: bool = True, num_workers: int = 0
    ) -> None:
        super().__init__(batch_size, num_workers)
        self.save_hyperparameters()
        self.root, self.image_size, self.augment = Path(root).expanduser(), image_size, augment

    def setup(self, stage: str | None = None) -> None:
        """List the images; the same for every stage."""
        train = _images_by_class(self.root, "train")
        self.classes = tuple(train)
        self.train_data = self._part(train, augment=self.augment)
        self.val_data = self._part(self._evaluated("val"))
        self.test_data = self._part(self._evaluated("test")) if (self.root / "test").is_dir() else self.val_data

    def _evaluated(self, part: str) -> Mapping[str, list[Path]]:
        images = _images_by_class(self.root, part)
        unknown = [name for name in images if name not in self.classes]
        if unknown:
            raise BatchNormError(
                f"{self.root / part} has {_few(unknown)}, which {self.root / 'train'} has not; a network that is "
                "trained there cannot name such classes."
            )
        return images

    def _part(self, images: Mapping[str, list[Path]], *, augment: bool = False) -> "_Images":
        labels = {name: index for index, name in enumerate(self.classes)}
        pairs = [(path, labels[name]) for name, paths in images.items() for path in paths]
        return _Images(pairs, self.image_size, augment=augment)


class _Images(Dataset[tuple[Tensor, int]]):
    def __init__(self, pairs: list[tuple[Path, int]], size: int, *, augment: bool) -> None:
        self.pairs, self.size, self.augment = pairs, size, augment

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.pairs[index]
        image = _read(path)
        box = _random_part(*image.size) if self.augment else _middle(*image.size)
        pixels = _pixels(image, self.size, box)
        return pixels.flip(2) if self.augment and torch.rand(()) < 0.5 else pixels, label


def _images_by_class(root: Path, part: str) -> dict[str, list[Path]]:
    """List the images of each class folder, by name; what is none is told in a warning."""
    folder = root / part
    if not folder.is_dir():
        there = sorted(path.name for path in root.iterdir()) if root.is_dir() else None
        found = f"there is no folder {str(root)!r}" if there is None else f"{str(root)!r} holds {_few(there)}"
        raise BatchNormError(
            f"{str(folder)!r} is missing ({found}). Expected root/train/<class>/<image> and root/val/<class>/<image>: "
            "pass root= the folder above train and val."
        )
    images: dict[str, list[Path]] = {}
    others = []
    for kind in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        files = sorted(path for path in kind.rglob("*") if path.is_file() and not path.name.startswith("."))
        images[kind.name] = [path for path in files if path.suffix.lower() in _ENDINGS]
        others += [path for path in files if path.suffix.lower() not in _ENDINGS]
        if not images[kind.name]:
            raise BatchNormError(
                f"{str(kind)!r} is a class without images ({_few(sorted(_ENDINGS), 9)}). Remove it, or fill it."
            )
    if not images:
        raise BatchNormError(f"{str(folder)!r} has no class folders; expected {part}/<class>/<image>.")
    if others:
        rank_zero_warn(f"{len(others)} files in {str(folder)!r} are left out, being no images: {_few(others)}")
    return images


def _read(path: Path) -> "Image":
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # whatever a decoder raises of a damaged file
        raise BatchNormError(
            f"{str(path)!r} cannot be read as an image ({first_line(error)}). Remove or replace it."
        ) from error


def _pixels(image: "Image", size: int, box: tuple[float, float, float, float]) -> Tensor:
    """Resize a part of an image, and standardize it; (3, size, size)."""
    from PIL.Image import Resampling

    small = image.resize((size, size), Resampling.BILINEAR, box=box)
    flat = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
    pixels = flat.view(size, size, 3).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(_MEAN).view(3, 1, 1)) / torch.tensor(_STD).view(3, 1, 1)


def _middle(width: int, height: int) -> tuple[float, float, float, float]:
    side = min(width, height) / _MARGIN
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _random_part(width: int, height: int) -> tuple[float, float, float, float]:
    """Draw a part by area and ratio of its sides; one that would not fit is cut to the image."""
    area, ratio, x, y = torch.rand(4).tolist()
    share, sides = 0.08 + 0.92 * area, _RATIO ** (2 * ratio - 1)
    wide = min((width * height * share * sides) ** 0.5, width)
    high = min((width * height * share / sides) ** 0.5, height)
    left, top = x * (width - wide), y * (height - high)
    return left, top, left + wide, top + high


def _few(names: list[Path] | list[str], most: int = 3) -> str:
    shown = ", ".join(str(name) for name in names[:most]) or "nothing"
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
