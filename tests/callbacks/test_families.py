"""Every callback with both Lightning packages: bare, in a list, over a checkpoint, and from LightningCLI's YAML."""

from importlib import import_module

import pytest
import torch
import yaml
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bn_lightning import callbacks

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*",
    "ignore:.*log_every_n_steps.*",
    "ignore:.*BatchNorm audit.*",
    "ignore:Dataloader\\(s\\) should be stateful",
)
FAMILIES = ("lightning.pytorch", "pytorch_lightning")
OPTIONS = {
    "ActivationMonitor": {"every_n_steps": 1},
    "BatchNormAudit": {"max_batches": 2},
    "BatchNormMonitor": {"every_n_steps": 1},
    "ConvertBatchNorm": {"variant": "ghost", "options": {"virtual_batch_size": 4}},
    "FoldBatchNorm": {"stages": ["test"]},
    "FreezeBatchNorm": {},
    "OptimizationProbe": {"every_n_steps": 2},
    "RecalibrateBatchNorm": {},
}
TRAINER = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


def examples():
    generator = torch.Generator().manual_seed(1)
    images = 1 + 2 * torch.randn(24, 3, 6, 6, generator=generator)
    return DataLoader(TensorDataset(images, torch.randint(0, 2, (24,), generator=generator)), batch_size=8)


def module_class(family):
    class Net(import_module(family).LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.body(x).mean((2, 3)))

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            self.log("loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

        test_step = validation_step

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

        def train_dataloader(self):
            return examples()

        val_dataloader = test_dataloader = train_dataloader

    return Net


def made(name):
    return getattr(callbacks, name)(**OPTIONS[name])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", OPTIONS)
def test_it_trains_resumes_and_tests(name, family, tmp_path):
    package = import_module(family)

    def trainer(epochs, given):
        return package.Trainer(max_epochs=epochs, callbacks=given, default_root_dir=tmp_path, **TRAINER)

    callback = made(name)
    assert isinstance(callback, package.Callback)
    first = trainer(1, callback)  # bare
    assert callback in first.callbacks
    first.fit(module_class(family)())
    first.save_checkpoint(tmp_path / "one.ckpt")
    second, resumed = trainer(2, [made(name)]), module_class(family)()
    second.fit(resumed, ckpt_path=tmp_path / "one.ckpt")
    whole = module_class(family)()
    trainer(2, [made(name)]).fit(whole)
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), f"{key}, resumed against trained in one go"
    plain = package.Trainer(default_root_dir=tmp_path, **TRAINER).test(resumed, verbose=False)[0]["loss"]
    assert second.test(resumed, verbose=False)[0]["loss"] == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_lightning_cli_makes_all_of_them_from_yaml(family, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # lightning 2.6.6 on jsonargparse 4.53
    options = {**OPTIONS, "FreezeBatchNorm": {"from_epoch": 1}}  # of frozen layers there is nothing to recalibrate
    listed = [{"class_path": f"bn_lightning.callbacks.{name}", "init_args": given} for name, given in options.items()]
    trainer = {**TRAINER, "max_epochs": 2, "default_root_dir": str(tmp_path), "callbacks": listed}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"seed_everything": 1, "trainer": trainer}))
    cli = import_module(f"{family}.cli").LightningCLI(
        module_class(family), args=["fit", "--config", str(tmp_path / "config.yaml")], save_config_callback=None
    )
    assert [type(callback).__name__ for callback in cli.trainer.callbacks] == list(OPTIONS)
    assert cli.trainer.state.finished


def test_no_callback_was_forgotten():
    assert set(OPTIONS) == set(callbacks.__all__)
