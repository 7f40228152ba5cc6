"""Folders of images drawn here: labels, pixels, cuts, and what is said of a wrong layout."""

import sys

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from modules.loading import SAFELY
from PIL import Image

from bn_lightning.errors import BatchNormError
from bn_lightning.modules import ImageClassifier, ImageFolderDataModule
from bn_lightning.modules.image_folder import _random_part

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
COLORS = {"cat": (200, 30, 90), "dog": (10, 250, 60)}


def save(path, color, size=(40, 30), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).convert(mode).save(path)


@pytest.fixture
def root(tmp_path):
    for part, count in (("train", 3), ("val", 2)):
        for name, color in COLORS.items():
            for index in range(count):
                save(tmp_path / part / name / f"{index}.{'png' if index else 'PNG'}", color)
    return tmp_path


def ready(root, **options):
    data = ImageFolderDataModule(str(root), **{"image_size": 8, **options})
    data.setup("fit")
    return data


def test_labels_sizes_and_standardized_pixels(root):
    data = ready(root, batch_size=4)
    assert data.classes == ("cat", "dog")
    assert [len(part) for part in (data.train_data, data.val_data, data.test_data)] == [6, 4, 4]
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for images, labels in loader:
            assert images.shape == (len(labels), 3, 8, 8)
            assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
            for image, label in zip(images, labels, strict=True):
                expected = (np.array(COLORS[data.classes[label]]) / 255 - MEAN) / STD
                np.testing.assert_allclose(
                    image.numpy(), np.broadcast_to(expected[:, None, None], (3, 8, 8)), rtol=1e-4
                )


def test_evaluation_sees_the_middle_and_the_right_way_round(tmp_path):
    """Each pixel holds its place, so that the cut can be read off: 7/8 of the shorter side, the image 64 × 32."""
    x, y = np.meshgrid(np.arange(64), np.arange(32))
    pixels = np.stack([x * 4, y * 8, np.zeros_like(x)], 2).astype(np.uint8)
    for part in ("train", "val"):
        (tmp_path / part / "a").mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / part / "a" / "0.png")
    image = ready(tmp_path, image_size=28).val_data[0][0]
    bytes_ = (image.numpy() * STD[:, None, None] + MEAN[:, None, None]) * 255
    np.testing.assert_allclose(bytes_[0], np.broadcast_to(4 * np.arange(18, 46), (28, 28)), atol=1e-2)
    np.testing.assert_allclose(bytes_[1], np.broadcast_to(8 * np.arange(2, 30)[:, None], (28, 28)), atol=1e-2)


def test_random_parts_have_the_area_and_the_ratio_they_should():
    torch.manual_seed(0)
    boxes = np.array([_random_part(100, 100) for _ in range(4000)])
    wide, high = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0
    assert boxes.max() <= 100 + 1e-9
    ratio, area = wide / high, wide * high / 1e4
    assert 3 / 4 - 1e-9 <= ratio.min() < 0.76
    assert 1.32 < ratio.max() <= 4 / 3 + 1e-9
    assert 0.08 - 1e-9 <= area.min() < 0.09
    assert 0.98 < area.max() <= 1
    assert abs(np.log(ratio).mean()) < 0.02
    whole = np.quantile(area, 0.25)  # 8 % and a quarter of 92 %; cut to the image only when large
    assert whole == pytest.approx(0.31, abs=0.02)
    centre = (boxes[:, 0] + boxes[:, 2]) / 2
    assert centre.mean() == pytest.approx(50, abs=1)


def test_training_is_drawn_and_mirrored_by_torchs_seed_and_can_be_as_evaluation(tmp_path):
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, :, 0] = np.arange(16) * 16
    for part in ("train", "val"):
        (tmp_path / part / "a").mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / part / "a" / "0.png")
    data = ready(tmp_path)

    def draws():
        torch.manual_seed(0)
        return [data.train_data[0][0] for _ in range(200)]

    first = draws()
    assert all(torch.equal(a, b) for a, b in zip(first, draws(), strict=True))
    mirrored = sum(bool(image[0, 0, 0] > image[0, 0, -1]) for image in first)
    assert 100 - 4 * 50**0.5 < mirrored < 100 + 4 * 50**0.5
    plain = ready(tmp_path, augment=False)
    assert torch.equal(plain.train_data[0][0], plain.val_data[0][0])


@pytest.mark.parametrize(("mode", "ending"), [("L", "png"), ("P", "gif"), ("CMYK", "jpg"), ("RGBA", "webp")])
def test_every_image_becomes_rgb(root, mode, ending):
    save(root / "train" / "cat" / f"a.{ending}", (255, 255, 255), mode=mode)
    data = ready(root, augment=False)
    index = next(i for i, (path, _) in enumerate(data.train_data.pairs) if path.name == f"a.{ending}")
    image = data.train_data[index][0].numpy()
    expected = np.broadcast_to(((1 - MEAN) / STD)[:, None, None], (3, 8, 8))
    np.testing.assert_allclose(image, expected, atol=0.05)


def test_a_test_folder_is_used_if_there_is_one(root):
    save(root / "test" / "dog" / "only.png", COLORS["dog"])
    data = ready(root)
    assert [(path.name, label) for path, label in data.test_data.pairs] == [("only.png", 1)]


def test_a_network_trains_on_it_with_workers(root, tmp_path):
    module = ImageClassifier(
        "vgg", 2, norm="ghost", network_options={"in_channels": 3, "layout": [[4], [4]], "norm_place": "after"}
    )
    trainer = pl.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path,
        enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(module, ImageFolderDataModule(str(root), image_size=8, batch_size=3, num_workers=1))
    (path,) = tmp_path.rglob("*.ckpt")
    loaded = ImageClassifier.load_from_checkpoint(path, **SAFELY)
    for name, value in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert dict(ImageFolderDataModule(str(root)).hparams) == {
        "root": str(root),
        "image_size": 224,
        "batch_size": 64,
        "augment": True,
        "num_workers": 0,
    }


def test_what_is_missing_is_named(root, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(BatchNormError, match=r"none/train' is missing \(there is no folder .*none'\)\. Expected"):
        ready(empty / "none")
    with pytest.raises(BatchNormError, match=r"train/train' is missing \('.*train' holds cat, dog\).*above train"):
        ready(root / "train")
    (empty / "train").mkdir()
    with pytest.raises(BatchNormError, match="train' has no class folders; expected train/<class>/<image>"):
        ready(empty)
    (root / "train" / "eel").mkdir()
    with pytest.raises(BatchNormError, match=r"train/eel' is a class without images \(.bmp, .gif"):
        ready(root)
    (root / "train" / "eel").rmdir()
    save(root / "val" / "eel" / "0.png", (0, 0, 0))
    with pytest.raises(BatchNormError, match=r"val has eel, which .*train has not"):
        ready(root)


def test_other_files_are_told_and_damaged_images_named(root):
    (root / "train" / "cat" / "notes.txt").touch()
    (root / "train" / "cat" / ".DS_Store").touch()
    with pytest.warns(UserWarning, match=r"1 files in .*train' are left out, being no images: .*notes.txt"):
        data = ready(root)
    path = root / "train" / "cat" / "1.png"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(BatchNormError, match=r"cat/1.png' cannot be read as an image \(.*\)\. Remove or replace it"):
        [data.train_data[index] for index in range(len(data.train_data))]


def test_torchvision_is_not_needed(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert len(next(iter(ready(root).train_dataloader()))[0]) == 6
