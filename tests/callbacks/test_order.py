"""Our callbacks do the same before and after Lightning's own in the list, as `bn_lightning.callbacks` says."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import callbacks as lightnings
from lightning.pytorch.callbacks import BackboneFinetuning, EarlyStopping, ModelCheckpoint, StochasticWeightAveraging
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bn_lightning.callbacks import (
    ActivationMonitor,
    BatchNormAudit,
    BatchNormMonitor,
    ConvertBatchNorm,
    FoldBatchNorm,
    FreezeBatchNorm,
    OptimizationProbe,
    RecalibrateBatchNorm,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*",
    "ignore:.*log_every_n_steps.*",
    "ignore:Swapping scheduler.*",
    "ignore:The provided params to be frozen.*",  # BackboneFinetuning leaves BN's in the optimizer (train_bn=True)
    "ignore:.*is frozen and keeps its running_.*",  # averaging weights assigns it
)


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.backbone(x).mean((2, 3)))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def configure_optimizers(self):
        trained = [value for value in self.parameters() if value.requires_grad]
        return torch.optim.SGD(trained, lr=0.1, momentum=0.9)


THEIRS = {
    "ModelCheckpoint": lambda folder: ModelCheckpoint(folder, monitor="val", save_last=True),
    "EarlyStopping": lambda folder: EarlyStopping("val", patience=1, min_delta=0.05),
    "BackboneFinetuning": lambda folder: BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.01),
    "StochasticWeightAveraging": lambda folder: StochasticWeightAveraging(0.05, swa_epoch_start=2, annealing_epochs=1),
}
if hasattr(lightnings, "WeightAveraging"):  # since Lightning 2.6
    THEIRS["WeightAveraging"] = lambda folder: lightnings.WeightAveraging()
OURS = {
    "see": lambda: [
        ActivationMonitor(every_n_steps=2, alerts=False),
        BatchNormMonitor(every_n_steps=2),
        BatchNormAudit(max_batches=2, when="validation"),
        OptimizationProbe(["loss_landscape"], every_n_steps=3, options={"loss_landscape": {"points": 2}}),
    ],
    "recalibrate": lambda: [RecalibrateBatchNorm(max_batches=2)],
    "recalibrate at the end": lambda: [RecalibrateBatchNorm(when="end", max_batches=2)],
    "convert": lambda: [ConvertBatchNorm("ghost", options={"virtual_batch_size": 4})],
    "freeze": lambda: [FreezeBatchNorm(from_epoch=1)],
    "fold": lambda: [FoldBatchNorm(["test"])],
}


def fitted(folder, callbacks):
    torch.manual_seed(0)
    module = Net()
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(32, 1, 6, 6, generator=generator) + 1, torch.arange(32) % 3)
    trainer = pl.Trainer(
        max_epochs=4,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in callbacks),
        callbacks=callbacks,
    )
    trainer.fit(module, DataLoader(data, 8, shuffle=True), DataLoader(data, 16))
    trainer.test(module, DataLoader(data, 16), verbose=False)
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    return {key: value.clone() for key, value in module.state_dict().items()}, metrics, trainer.current_epoch


def assert_equal(one, other):
    (ours, *rest), (theirs, *others) = one, other
    assert rest == others
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key


@pytest.mark.parametrize("theirs", THEIRS)
def test_what_sees_changes_nothing_on_either_side(theirs, tmp_path):
    bare = fitted(tmp_path / "bare", [THEIRS[theirs](tmp_path / "bare")])
    for name, order in (("before", 1), ("after", -1)):
        callbacks = [*OURS["see"](), THEIRS[theirs](tmp_path / name)]
        assert_equal(fitted(tmp_path / name, callbacks[::order]), bare)


@pytest.mark.parametrize("theirs", THEIRS)
@pytest.mark.parametrize("ours", [name for name in OURS if name != "see"])
def test_what_changes_does_the_same_on_either_side(ours, theirs, tmp_path):
    before = fitted(tmp_path / "before", [*OURS[ours](), THEIRS[theirs](tmp_path / "before")])
    after = fitted(tmp_path / "after", [THEIRS[theirs](tmp_path / "after"), *OURS[ours]()])
    assert_equal(before, after)
