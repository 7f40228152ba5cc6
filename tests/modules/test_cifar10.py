"""CIFAR-10 from files made here: fake batches, whose checksums are put in the place of the published ones."""

import hashlib
import io
import pickle
import tarfile

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR10

from bn_lightning.errors import BatchNormError
from bn_lightning.modules import CIFAR10DataModule, cifar10_files
from bn_lightning.modules.cifar10 import random_crop_and_flip
from bn_lightning.modules.cifar10_files import ARCHIVE, FOLDER, MD5, TEST, TRAIN, URL

SIZE = 6


def fake_batch(seed):
    """Pickle a batch as Python 2 and an old NumPy did, which is how the published ones are written."""
    drawn = np.random.default_rng(seed)
    batch = {
        b"data": drawn.integers(0, 256, (SIZE, 3072), dtype=np.uint8),
        b"labels": drawn.integers(0, 10, SIZE).tolist(),
        b"filenames": [b"x"] * SIZE,
    }
    content = pickle.dumps(batch, protocol=2).replace(b"cnumpy._core.multiarray", b"cnumpy.core.multiarray")
    old_flags = content.replace(b"\x89\x88\x87", b"K\x00K\x01\x87")
    assert old_flags != content
    return old_flags, batch


BATCHES = {name: fake_batch(seed) for seed, name in enumerate((*TRAIN, *TEST))}


def archive(tmp_path, extra=()):
    """Make the archive, with what should not be in it besides."""
    path = tmp_path / "made.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, content in [*((f"{FOLDER}/{key}", value[0]) for key, value in BATCHES.items()), *extra]:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path.read_bytes()


def published(monkeypatch, **contents):
    for name, content in contents.items():
        monkeypatch.setitem(MD5, name, hashlib.md5(content).hexdigest())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    root = tmp_path / "data"
    (root / FOLDER).mkdir(parents=True)
    for name, (content, _) in BATCHES.items():
        (root / FOLDER / name).write_bytes(content)
    published(monkeypatch, **{name: content for name, (content, _) in BATCHES.items()})
    return root


def images_of(names):
    return np.concatenate([BATCHES[name][1][b"data"].reshape(-1, 3, 32, 32) for name in names])


def test_the_published_checksums_are_torchvisions():
    assert dict(map(tuple, CIFAR10.train_list + CIFAR10.test_list)) == {n: d for n, d in MD5.items() if n != ARCHIVE}
    assert (CIFAR10.url, CIFAR10.tgz_md5, CIFAR10.filename) == (URL, MD5[ARCHIVE], ARCHIVE)


@pytest.mark.parametrize("place", ["folder", "root itself"])
def test_every_image_is_there_once_and_standardized(folder, place):
    root = folder if place == "folder" else folder / FOLDER
    data = CIFAR10DataModule(str(root), val_size=7, augment=False, batch_size=4)
    data.prepare_data()
    data.setup("fit")
    parts = {
        name: [torch.cat(each) for each in zip(*getattr(data, f"{name}_dataloader")(), strict=True)]
        for name in ("train", "val", "test")
    }
    assert [len(labels) for _, labels in parts.values()] == [5 * SIZE - 7, 7, SIZE]
    train = parts["train"][0].double()
    torch.testing.assert_close(train.mean((0, 2, 3)), torch.zeros(3).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(train.var((0, 2, 3), correction=0), torch.ones(3).double(), atol=1e-5, rtol=0)
    mean, std = data.train_data.mean, data.train_data.std
    found = [((part[0] * std + mean).round().byte().numpy(), part[1].tolist()) for part in parts.values()]
    train_and_val = np.concatenate([found[0][0], found[1][0]])
    labels = [label for name in TRAIN for label in BATCHES[name][1][b"labels"]]
    expected = {image.tobytes(): label for image, label in zip(images_of(TRAIN), labels, strict=True)}
    given = zip(train_and_val, found[0][1] + found[1][1], strict=True)
    assert {image.tobytes(): label for image, label in given} == expected
    assert np.array_equal(found[2][0], images_of(TEST))
    assert found[2][1] == BATCHES["test_batch"][1][b"labels"]


def test_without_validation_images_it_validates_on_the_test_images(folder):
    data = CIFAR10DataModule(str(folder), val_size=0)
    data.setup()
    assert len(data.train_data) == 5 * SIZE
    assert data.val_data is data.test_data
    with pytest.raises(BatchNormError, match="val_size has to be from 0 to 29 images, got 30"):
        CIFAR10DataModule(str(folder), val_size=30).setup()


def test_the_split_is_fixed_by_its_seed_and_only_training_is_augmented(folder):
    def ready(**options):
        data = CIFAR10DataModule(str(folder), val_size=7, **options)
        data.setup()
        return data

    one, same, other = ready(), ready(), ready(split_seed=1)
    assert torch.equal(one.val_data.images, same.val_data.images)
    assert not torch.equal(one.val_data.images, other.val_data.images)
    torch.manual_seed(0)
    assert not torch.equal(one.train_data[0][0], one.train_data[0][0])
    assert torch.equal(one.val_data[0][0], one.val_data[0][0])
    assert torch.equal(one.test_data[0][0], one.test_data[0][0])


def test_crops_and_mirrors_are_those_of_a_padded_image_and_all_occur():
    image = torch.arange(1, 26, dtype=torch.uint8).view(1, 1, 5, 5).expand(-1, 3, -1, -1)
    padded = np.pad(image[0].numpy(), ((0, 0), (1, 1), (1, 1)))
    possible = {}
    for top in range(3):
        for left in range(3):
            crop = padded[:, top : top + 5, left : left + 5]
            possible[crop.tobytes()] = (top, left, False)
            possible[crop[:, :, ::-1].tobytes()] = (top, left, True)
    torch.manual_seed(0)
    drawn = random_crop_and_flip(image.expand(3600, -1, -1, -1), padding=1)
    counts = dict.fromkeys(possible.values(), 0)
    for each in drawn.numpy():
        counts[possible[each.tobytes()]] += 1
    assert min(counts.values()) > 200 - 5 * 200**0.5
    assert max(counts.values()) < 200 + 5 * 200**0.5


def test_the_loader_asks_for_a_batch_at_once(folder, monkeypatch):
    data = CIFAR10DataModule(str(folder), val_size=7)
    data.setup()
    sizes = []
    kind, get = type(data.train_data), type(data.train_data).__getitems__
    monkeypatch.setattr(kind, "__getitems__", lambda self, which: sizes.append(len(which)) or get(self, which))
    list(DataLoader(data.train_data, batch_size=20))
    assert sizes == [20, 3]


class Exploit:
    """Leaves a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_file_with_another_checksum_is_not_unpickled(folder, tmp_path):
    proof = tmp_path / "proof"
    (folder / FOLDER / "data_batch_3").write_bytes(pickle.dumps(Exploit(str(proof))))
    with pytest.raises(BatchNormError, match=r"data_batch_3 is not CIFAR-10 as published: its md5 is .* not opened"):
        CIFAR10DataModule(str(folder)).setup()
    assert not proof.exists()


@pytest.mark.parametrize("download", [False, True], ids=["by hand", "download"])
def test_an_archive_is_unpacked_and_nothing_else_of_it(tmp_path, monkeypatch, folder, download):
    content = archive(tmp_path, [("../outside", b"x"), (f"{FOLDER}/../../outside", b"x"), (f"{FOLDER}/more", b"x")])
    published(monkeypatch, **{ARCHIVE: content})
    root = tmp_path / "empty" / "root"
    if download:
        monkeypatch.setattr(cifar10_files, "URL", (tmp_path / "made.tar.gz").as_uri())
    else:
        root.mkdir(parents=True)
        (root / ARCHIVE).write_bytes(content)
    data = CIFAR10DataModule(str(root), download=download, val_size=7)
    data.prepare_data()
    everything = {str(path.relative_to(tmp_path / "empty")) for path in (tmp_path / "empty").rglob("*")}
    assert everything == {"root", f"root/{ARCHIVE}", f"root/{FOLDER}", *(f"root/{FOLDER}/{name}" for name in BATCHES)}
    data.setup()
    assert len(data.test_data) == SIZE
    monkeypatch.setattr(cifar10_files, "URL", "file:///nowhere")
    data.prepare_data()  # what is there is not fetched again


def test_a_wrong_archive_is_neither_kept_nor_unpacked(tmp_path, monkeypatch):
    archive(tmp_path)
    monkeypatch.setattr(cifar10_files, "URL", (tmp_path / "made.tar.gz").as_uri())
    root = tmp_path / "root"
    with pytest.raises(BatchNormError, match=r"tar.gz is not CIFAR-10 .*c58f30108f718f92721af3b95e74349a"):
        CIFAR10DataModule(str(root), download=True).prepare_data()
    assert list(root.iterdir()) == []
    (root / ARCHIVE).write_bytes(b"half of it")
    with pytest.raises(BatchNormError, match="not CIFAR-10 as published"):
        CIFAR10DataModule(str(root)).prepare_data()
    assert [path.name for path in root.iterdir()] == [ARCHIVE]


def test_missing_data_and_a_failed_download_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(BatchNormError, match=r"not in .*/none' \(there is no such folder\).*download=True"):
        CIFAR10DataModule(str(tmp_path / "none")).setup()
    (tmp_path / "readme.txt").touch()
    with pytest.raises(BatchNormError, match=r"\(it holds readme.txt\)\. Expected cifar-10-python.tar.gz, or a folder"):
        CIFAR10DataModule(str(tmp_path)).prepare_data()
    monkeypatch.setattr(cifar10_files, "URL", (tmp_path / "nowhere").as_uri())
    with pytest.raises(BatchNormError, match=r"cannot be downloaded from .*put cifar-10-python.tar.gz into .* by hand"):
        CIFAR10DataModule(str(tmp_path / "new"), download=True).prepare_data()


def test_hyperparameters_are_plain_values(folder):
    data = CIFAR10DataModule(str(folder), val_size=7, augment=False)
    assert dict(data.hparams) == {
        "root": str(folder),
        "download": False,
        "batch_size": 128,
        "val_size": 7,
        "augment": False,
        "split_seed": 0,
        "num_workers": 0,
    }
