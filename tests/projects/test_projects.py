"""Projects after Lightning's templates, watched from the environment, train to the weights they train to without."""

import contextlib
import importlib
import re
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.cli import LightningCLI

HERE = Path(__file__).parent
SEEING = "monitor:every_n_steps=2;activations:every_n_steps=2,first_steps=2,alerts=false;audit:max_batches=2"
CHANGING = "recalibrate:max_batches=2,when={}"
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*", "ignore:.*log_every_n_steps.*", "ignore:.*BatchNorm audit.*"
)
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "enable_checkpointing": False}


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """In a folder of its own, with the projects' modules by their own names, as beside a training script."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.setattr(sys, "argv", sys.argv[:1])  # LightningCLI warns of arguments beside those that it is given
    yield
    for name in ("zoo_cli", "gan", "self_supervised"):
        sys.modules.pop(name, None)


def by_trainer(module, loader):
    trainer = pl.Trainer(max_epochs=2, accelerator="cpu", **QUIET)
    trainer.fit(module, loader)
    return trainer, module


def zoo_cli():
    project = importlib.import_module("zoo_cli")
    arguments = ["fit", "--seed_everything=0", "--trainer.max_epochs=2", "--trainer.accelerator=cpu"]
    arguments += [f"--trainer.{key}={str(value).lower()}" for key, value in QUIET.items()]
    cli = LightningCLI(project.ZooClassifier, project.Pictures, args=arguments, save_config_callback=None)
    return cli.trainer, cli.model


def gan():
    project = importlib.import_module("gan")
    return by_trainer(project.GAN(), project.loader())


def self_supervised():
    project = importlib.import_module("self_supervised")
    return by_trainer(project.SelfSupervised(), project.loader())


def trained(project, monkeypatch, asked):
    monkeypatch.setenv("BN_LIGHTNING", asked)
    pl.seed_everything(0, verbose=False)
    return project()


@pytest.mark.parametrize("project", [zoo_cli, gan, self_supervised], ids=lambda project: project.__name__)
def test_the_weights_are_bit_for_bit_those_without(project, monkeypatch):
    _, bare = trained(project, monkeypatch, "")
    trainer, seen = trained(project, monkeypatch, SEEING)
    validates = project is zoo_cli
    changing = CHANGING.format("validation" if validates else "end")
    # A GAN's forward takes noise, not a batch: that is said, and the statistics stay those of training.
    said = pytest.warns(UserWarning, match="as training left them") if project is gan else contextlib.nullcontext()
    with said:
        _, recalibrated = trained(project, monkeypatch, changing)
    for key, value in bare.state_dict().items():
        assert torch.equal(seen.state_dict()[key], value), key
        if "running" not in key:
            assert torch.equal(recalibrated.state_dict()[key], value), key
    monitor, activations, audit = (each for each in trainer.callbacks if "FromEnvironment" in type(each).__name__)
    layers = sum(isinstance(each, torch.nn.modules.batchnorm._BatchNorm) for each in bare.modules())
    assert len(audit.report.layers) == len(monitor.snapshot.rows) == layers
    assert len(activations.table().rows) >= layers


def test_what_cannot_be_asked_of_a_gan_is_said(monkeypatch):
    trainer, _ = trained(gan, monkeypatch, "audit:max_batches=2")
    (audit,) = trainer.callbacks
    reasons = {each.what: each.reason for each in audit.report.not_looked}
    assert "automatic_optimization=False" in reasons["loss readings"]


def test_a_teacher_that_averages_its_student_is_told_but_not_accused(monkeypatch):
    trainer, _ = trained(self_supervised, monkeypatch, "audit:max_batches=2")
    (audit,) = trainer.callbacks
    found = {(finding.rule, finding.layer): finding.severity for finding in audit.report.findings}
    assert "frozen-weights-moving-statistics" not in {rule for rule, _ in found}, "its weights move with the student's"
    assert found["shared-layer", "teacher.1"] == "info", "it runs twice a batch"


def test_no_project_knows_the_library():
    for path in HERE.glob("*.py"):
        if not path.name.startswith("test_"):
            text = path.read_text()
            assert re.findall("bn_lightning", text) == ["bn_lightning"], "named once, by the docstring"
            assert "does not know bn_lightning" in text
