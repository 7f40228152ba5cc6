"""Segmentation against NumPy by hand; torchvision's networks; checkpoints; the way out."""

import warnings

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from batch_normed import kinds, randomized
from modules.loading import SAFELY
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large

from bn_lightning.errors import BatchNormError
from bn_lightning.layers import GhostBatchNorm
from bn_lightning.modules import SegmentationModule

CLASSES = 4


class Pixels(nn.Module):
    """A small network from images to logits of their size."""

    def __init__(self, num_classes=CLASSES):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Conv2d(8, num_classes, 1)

    def forward(self, images):
        return self.head(self.body(images))


class Answers(nn.Module):
    """Gives the logits that are asked for: an "image" is them."""

    def forward(self, images):
        return {"out": images}


def trainer(tmp_path, **options):
    return pl.Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def pictures(count=48, size=12):
    """Noisy squares whose class shows in their colour; a border that has no label."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.zeros(count, size, size, dtype=torch.int64)
    for index in range(count):
        top, left, side = (int(torch.randint(1, 6, (), generator=generator)) for _ in range(3))
        labels[index, top : top + side, left : left + side] = 1 + index % (CLASSES - 1)
    colours = torch.randn(CLASSES, 3, generator=generator) * 2
    images = colours[labels].permute(0, 3, 1, 2) + 0.5 * torch.randn(count, 3, size, size, generator=generator)
    labels[:, 0] = labels[:, :, -1] = 255
    return TensorDataset(images, labels)


def test_loss_mean_iou_and_accuracy_over_unequal_batches(tmp_path):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(7, CLASSES + 1, 5, 6, generator=generator)  # class 4 is in no label
    logits[:, CLASSES] -= 99  # and never predicted: it is not among those the mean is over
    labels = torch.randint(0, CLASSES, (7, 5, 6), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = 255
    labels[3:6] = 255  # a whole batch to ignore
    module = SegmentationModule(Answers(), num_classes=CLASSES + 1)
    loader = DataLoader(TensorDataset(logits, labels), batch_size=3)
    logged = trainer(tmp_path).test(module, loader, verbose=False)[0]

    valid = (labels != 255).numpy()
    z = logits.double().permute(0, 2, 3, 1).numpy()[valid]
    y = labels.numpy()[valid]
    loss = (np.log(np.exp(z).sum(1)) - z[np.arange(len(y)), y]).mean()
    predicted = z.argmax(1)
    ious = [((predicted == k) & (y == k)).sum() / ((predicted == k) | (y == k)).sum() for k in range(CLASSES)]
    assert logged["test/loss"] == pytest.approx(loss, rel=1e-5)
    assert logged["test/mean_iou"] == pytest.approx(np.mean(ious), abs=1e-6)
    assert logged["test/accuracy"] == pytest.approx((predicted == y).mean(), abs=1e-6)


def test_it_learns(tmp_path):
    pl.seed_everything(0, verbose=False)
    module = SegmentationModule(Pixels(), CLASSES, norm="ghost", norm_options={"virtual_batch_size": 4})
    data = DataLoader(pictures(), batch_size=8)
    fit = trainer(tmp_path, max_epochs=12)
    fit.fit(module, data, data)
    logged = fit.validate(module, data, verbose=False)[0]
    assert logged["val/mean_iou"] > 0.7
    assert fit.predict(module, data)[0].shape == (8, 12, 12)
    assert set(kinds(module.model)) == {GhostBatchNorm}


def test_a_network_of_torchvision_and_its_auxiliary_logits():
    torch.manual_seed(0)
    network = deeplabv3_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=CLASSES, aux_loss=True
    ).train()
    module = SegmentationModule(network, CLASSES)
    for child in network.modules():
        if isinstance(child, nn.Dropout):
            child.p = 0.0
    images, labels = torch.randn(2, 3, 32, 32), torch.randint(0, CLASSES, (2, 32, 32))
    labels[0, :5] = 255
    output = network(images)
    main, aux = (nn.functional.cross_entropy(output[name], labels, ignore_index=255) for name in ("out", "aux"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*self.log")
        loss = module.training_step((images, labels), 0)
    torch.testing.assert_close(loss, main + 0.5 * aux)
    assert torch.equal(module(images), output["out"])


def test_a_name_of_torchvision_rebuilds_bit_for_bit_and_an_object_is_asked_for(tmp_path):
    module = SegmentationModule("torchvision:lraspp_mobilenet_v3_large", CLASSES, optimizer="adamw", ignore_index=0)
    randomized(module.model)
    fit = trainer(tmp_path)
    fit.strategy.connect(module)
    fit.save_checkpoint(tmp_path / "named.ckpt")
    loaded = SegmentationModule.load_from_checkpoint(tmp_path / "named.ckpt", **SAFELY)
    assert loaded.hparams == module.hparams
    for name, value in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name

    fit.strategy.connect(SegmentationModule(Pixels(), CLASSES))
    fit.save_checkpoint(tmp_path / "object.ckpt")
    with pytest.raises(BatchNormError, match=r"SegmentationModule.load_from_checkpoint\(path, model=network\)"):
        SegmentationModule.load_from_checkpoint(tmp_path / "object.ckpt", **SAFELY)
    again = SegmentationModule.load_from_checkpoint(tmp_path / "object.ckpt", model=Pixels(), **SAFELY)
    assert again.hparams["ignore_index"] == 255


def test_it_folds_and_ships(tmp_path):
    module = SegmentationModule(randomized(Pixels()), CLASSES)
    images = pictures(2).tensors[0]
    result = module.folded(images)
    assert result.report.error < 1e-9
    assert not kinds(result.model)
    shipped = module.ship(tmp_path / "pixels.pt2", images)
    expected = module.eval()(images)
    torch.testing.assert_close(torch.export.load(shipped.path).module()(images), expected, rtol=1e-4, atol=1e-4)


def test_logits_of_another_size_are_named():
    module = SegmentationModule(nn.Conv2d(3, CLASSES, 3, stride=2), CLASSES)
    images, labels = pictures(2).tensors
    with pytest.raises(BatchNormError, match=r"gave logits of shape \[2, 4, 5, 5\] .* expected \[2, 4, 12, 12\]"):
        module.training_step((images, labels), 0)
