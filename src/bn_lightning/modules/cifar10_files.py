"""The files of CIFAR-10's Python version: fetched, checked, read."""

import hashlib
import io
import pickle
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bn_lightning.errors import BatchNormError, first_line
from bn_lightning.reports.atomic import atomic_write
from bn_lightning.reports.progress import progress

__all__ = ["ARCHIVE", "TEST", "TRAIN", "fetch", "find_folder", "read_batches"]

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
ARCHIVE = "cifar-10-python.tar.gz"
FOLDER = "cifar-10-batches-py"
TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST = ("test_batch",)
#: As the data set's page and torchvision have them.
MD5 = {
    ARCHIVE: "c58f30108f718f92721af3b95e74349a",
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
_CHUNK = 1 << 20


def find_folder(root: Path) -> Path | None:
    """Return where all batches lie, ``root`` or its ``cifar-10-batches-py``; ``None`` if they do not."""
    folders = (root / FOLDER, root)
    return next((folder for folder in folders if all((folder / name).is_file() for name in (*TRAIN, *TEST))), None)


def fetch(root: Path, *, download: bool) -> None:
    """Put the batches into ``root``, from the archive there or, if ``download``, from the internet.

    Nothing but the six batches is taken out of the archive, and under names of our own: whatever names and links it
    holds, nothing is written outside the folder.

    Raises:
        BatchNormError: If the archive is not there, cannot be had, or has another checksum.
    """
    archive = root / ARCHIVE
    if not archive.is_file():
        if not download:
            raise _missing(root)
        _download(archive)
    _unpack(archive, root / FOLDER)


def read_batches(folder: Path, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Read images, (N, 3, 32, 32) uint8, and labels, (N,) int64.

    The batches are pickles, which can run code when they are read. A file is read only if its checksum is the
    published one, and what is unpickled are the very bytes that were checked.

    Raises:
        BatchNormError: If a checksum is another.
    """
    images, labels = [], []
    for name in names:
        content = (folder / name).read_bytes()
        _require_checksum(folder / name, MD5[name], hashlib.md5(content, usedforsecurity=False).hexdigest())
        batch = pickle.load(io.BytesIO(content), encoding="bytes")
        images.append(torch.as_tensor(batch[b"data"]).view(-1, 3, 32, 32))
        labels.append(torch.as_tensor(batch[b"labels"], dtype=torch.int64))
    return torch.cat(images), torch.cat(labels)


def _download(archive: Path) -> None:
    """Fetch the archive; only the whole one, with the right checksum, comes to stand under its name."""
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with urllib.request.urlopen(URL, timeout=60) as response, atomic_write(archive) as file:
            size = response.headers.get("Content-Length")
            with progress("downloading CIFAR-10", int(size) // _CHUNK + 1 if size else None) as advance:
                while chunk := response.read(_CHUNK):
                    digest.update(chunk)
                    file.write(chunk)
                    advance()
            _require_checksum(archive, MD5[ARCHIVE], digest.hexdigest())
    except (urllib.error.URLError, OSError) as error:
        raise BatchNormError(
            f"CIFAR-10 cannot be downloaded from {URL} ({first_line(error)}). Where there is no internet, put "
            f"{ARCHIVE} into {str(archive.parent)!r} by hand."
        ) from error


def _unpack(archive: Path, folder: Path) -> None:
    with open(archive, "rb") as file:
        digest = hashlib.md5(usedforsecurity=False)
        _in_chunks(file.read, digest.update)
        _require_checksum(archive, MD5[ARCHIVE], digest.hexdigest())
        file.seek(0)
        with tarfile.open(fileobj=file) as opened:
            for name in (*TRAIN, *TEST):
                content = opened.extractfile(f"{FOLDER}/{name}")
                assert content is not None, "the archive of this checksum holds them"
                with atomic_write(folder / name) as target:
                    target.write(content.read())


def _in_chunks(read: Callable[[int], bytes], use: Callable[[bytes], object]) -> None:
    while chunk := read(_CHUNK):
        use(chunk)


def _require_checksum(path: Path, expected: str, found: str) -> None:
    if found != expected:
        raise BatchNormError(
            f"{path} is not CIFAR-10 as published: its md5 is {found}, expected {expected}. It was not opened. Remove "
            "it, and get it again from https://www.cs.toronto.edu/~kriz/cifar.html (the Python version)."
        )


def _missing(root: Path) -> BatchNormError:
    there = sorted(path.name for path in root.iterdir()) if root.is_dir() else None
    found = "there is no such folder" if there is None else f"it holds {', '.join(there[:5]) or 'nothing'}"
    return BatchNormError(
        f"CIFAR-10 is not in {str(root)!r} ({found}). Expected {ARCHIVE}, or a folder {FOLDER} with data_batch_1 to "
        "data_batch_5 and test_batch. Pass download=True to fetch them (170 MB), or root= where they are."
    )
