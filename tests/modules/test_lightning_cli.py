"""LightningCLI from YAML: class_path networks, callbacks, and checkpoints that rebuild themselves."""

import pytest
import torch
import yaml
from batch_normed import kinds
from lightning.pytorch.cli import LightningCLI
from modules.loading import SAFELY

from bn_lightning.callbacks import BatchNormMonitor
from bn_lightning.layers import FrozenBatchNorm, GhostBatchNorm
from bn_lightning.modules import DigitsDataModule, ImageClassifier, SegmentationModule
from bn_lightning.networks import ResidualNetwork

TRAINER = {
    "accelerator": "cpu",
    "max_steps": 2,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "callbacks": [{"class_path": "bn_lightning.callbacks.BatchNormMonitor", "init_args": {"every_n_steps": 1}}],
}
RESIDUAL = {"class_path": "bn_lightning.networks.ResidualNetwork", "init_args": {"widths": [4], "blocks": 1}}


@pytest.fixture(autouse=True)
def nothing_else_on_the_command_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # lightning 2.6.6 on jsonargparse 4.53


def run(tmp_path, kind, model, *arguments, data=DigitsDataModule):
    config = {"seed_everything": 1, "trainer": {**TRAINER, "default_root_dir": str(tmp_path)}, "model": model}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return LightningCLI(kind, data, args=["fit", "--config", str(path), *arguments], save_config_callback=None)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        pytest.param(RESIDUAL, {}, id="class path"),
        pytest.param("residual", {"network_options": {"widths": [4], "blocks": 1}}, id="own network"),
        pytest.param("bn_lightning.networks:ResidualNetwork", {}, id="callable"),
    ],
)
def test_a_configuration_trains_and_its_checkpoint_rebuilds_itself(tmp_path, model, options):
    given = {
        "model": model,
        "norm": "ghost",
        "norm_options": {"virtual_batch_size": 16},
        "optimizer": "adamw",
        "optimizer_options": {"betas": [0.9, 0.95]},
        "schedule": "cosine",
        **options,
    }
    cli = run(tmp_path, ImageClassifier, given)
    assert isinstance(cli.model.model, ResidualNetwork)
    assert set(kinds(cli.model.model)) == {GhostBatchNorm}
    assert any(isinstance(callback, BatchNormMonitor) for callback in cli.trainer.callbacks)
    assert type(cli.trainer.optimizers[0]) is torch.optim.AdamW
    (path,) = tmp_path.rglob("*.ckpt")
    loaded = ImageClassifier.load_from_checkpoint(path, **SAFELY)
    assert loaded.hparams["model"] == model
    for name, value in cli.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_the_command_line_overrides_the_file(tmp_path):
    arguments = ("--model.norm", "frozen", "--model.schedule=constant", "--model.learning_rate=0.5")
    cli = run(tmp_path, ImageClassifier, {"model": RESIDUAL}, *arguments)
    assert set(kinds(cli.model.model)) == {FrozenBatchNorm}
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == 0.5


class Bright(DigitsDataModule):
    """The class of a pixel is its brightness."""

    def setup(self, stage=None):
        super().setup(stage)
        for part in (self.train_data, self.val_data, self.test_data):
            images = part.tensors[0]
            part.tensors = (images, (images[:, 0] > 0).long() + (images[:, 0] > 1).long())


def test_the_segmentation_module_has_every_argument_too(tmp_path):
    model = {
        "model": {
            "class_path": "torch.nn.Conv2d",
            "init_args": {"in_channels": 1, "out_channels": 3, "kernel_size": 1},
        },
        "num_classes": 3,
        "ignore_index": -1,
        "optimizer": "adam",
        "weight_decay": 0.0,
    }
    cli = run(tmp_path, SegmentationModule, model, "--trainer.callbacks=null", data=Bright)
    assert type(cli.trainer.optimizers[0]) is torch.optim.Adam
    (path,) = tmp_path.rglob("*.ckpt")
    loaded = SegmentationModule.load_from_checkpoint(path, **SAFELY)
    assert dict(loaded.hparams) == dict(cli.model.hparams)
