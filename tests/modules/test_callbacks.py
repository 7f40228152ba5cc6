"""Every callback with both modules, on one short run each."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from batch_normed import kinds, randomized
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bn_lightning.callbacks import (
    ActivationMonitor,
    BatchNormAudit,
    BatchNormMonitor,
    ConvertBatchNorm,
    FoldBatchNorm,
    FreezeBatchNorm,
    RecalibrateBatchNorm,
)
from bn_lightning.layers import GhostBatchNorm
from bn_lightning.modules import ImageClassifier, SegmentationModule

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
CLASSES = 6


class Classify(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Conv2d(8, CLASSES, 1)

    def forward(self, images):
        return self.head(self.body(images)).mean((2, 3))


class Segment(Classify):
    """Answers as torchvision's networks do."""

    def forward(self, images):
        return {"out": self.head(self.body(images))}


@pytest.fixture(params=[(ImageClassifier, Classify), (SegmentationModule, Segment)], ids=["classifier", "segmentation"])
def case(request):
    make, network = request.param
    torch.manual_seed(0)
    shape = (40,) if make is ImageClassifier else (40, 6, 6)
    examples = TensorDataset(torch.randn(40, 3, 6, 6) * 2 + 1, torch.randint(0, CLASSES, shape))
    return make(randomized(network()), num_classes=CLASSES, learning_rate=0.01), DataLoader(examples, batch_size=8)


def fitted(case, callback, tmp_path, entry="fit"):
    module, loader = case
    trainer = pl.Trainer(
        max_epochs=2,
        callbacks=[callback],
        accelerator="cpu",
        logger=False,
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if entry == "fit":
        trainer.fit(module, loader, loader)
        return module, trainer
    return module, trainer.test(module, loader, verbose=False)[0]


@pytest.mark.parametrize("monitor", [ActivationMonitor, BatchNormMonitor])
def test_monitors_see_the_layers(case, monitor, tmp_path, capsys):
    fitted(case, monitor(every_n_steps=1), tmp_path)
    assert "model.body.1" in capsys.readouterr().out


def test_the_audit_reads_its_losses_from_training_step(case, tmp_path):
    audit = BatchNormAudit()
    fitted(case, audit, tmp_path)
    assert [row.name for row in audit.report.layers] == ["model.body.1"]
    assert audit.report.losses.full_training.mean > 0


def test_recalibration_gives_population_statistics(case, tmp_path):
    module, _ = fitted(case, RecalibrateBatchNorm(when="end"), tmp_path)
    images = case[1].dataset.tensors[0]
    with torch.no_grad():
        inputs = module.model.body[0](images).double()
    torch.testing.assert_close(module.model.body[1].running_mean.double(), inputs.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)


def test_freezing_keeps_statistics_and_scale(case, tmp_path):
    before = copy.deepcopy(case[0].model.state_dict())
    module, _ = fitted(case, FreezeBatchNorm(), tmp_path)
    after = module.model.state_dict()
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(after[f"body.1.{name}"], before[f"body.1.{name}"]), name
    assert not torch.equal(after["head.weight"], before["head.weight"])


def test_conversion_before_training(case, tmp_path):
    module, _ = fitted(case, ConvertBatchNorm("ghost", options={"virtual_batch_size": 4}), tmp_path)
    assert set(kinds(module.model)) == {GhostBatchNorm}


def test_testing_folded_is_testing(case, tmp_path):
    fold = FoldBatchNorm(stages=["test"])
    module, plain = fitted(case, pl.Callback(), tmp_path, "test")
    _, folded = fitted(case, fold, tmp_path, "test")
    assert folded == pytest.approx(plain, rel=1e-4)
    assert fold.report.rows[0].action == "folded-backward"
    assert kinds(module.model) == [nn.BatchNorm2d]
