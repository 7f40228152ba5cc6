"""bn-lightning audit: a zoo network, a Lightning checkpoint with its data, exit codes for CI."""

import importlib
import json
import sys
import textwrap
import warnings

import lightning.pytorch as pl
import pytest
import torch

from bn_lightning.auditing import AuditReport, Finding
from bn_lightning.cli.main import main
from bn_lightning.modules import DigitsDataModule, ImageClassifier

audit_module = importlib.import_module("bn_lightning.cli.audit")


def run(*arguments):
    """Return the exit code."""
    try:
        main(["audit", *map(str, arguments)])
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    path = tmp_path_factory.mktemp("audit") / "last.ckpt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(ImageClassifier("residual", network_options={"widths": (8, 16)}), DigitsDataModule(batch_size=64))
        trainer.save_checkpoint(path)
    return path


CLASSES = ("bn_lightning.modules:ImageClassifier", "--data", "bn_lightning.modules:DigitsDataModule")


def test_a_zoo_network_without_data_is_looked_at_as_it_stands(capsys):
    assert run("timm:resnet10t", "--input_size", "3,64,64", "--json") == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert len(report["layers"]) > 5
    assert {"what": "active stage", "reason": "no training batches were given"} in report["not_looked"]
    assert "weights are random" in captured.err


def test_a_checkpoint_with_its_module_and_data_reads_losses_and_fails_ci(checkpoint, tmp_path, capsys):
    page = tmp_path / "new" / "page.html"
    arguments = (*CLASSES, "--checkpoint", checkpoint, "--batches", 4, "--html", page)
    assert run(*arguments, "--fail_on", "warning") == 3
    told = capsys.readouterr().out
    assert "stale statistics" in told.lower()
    assert "not-converged" in told
    assert "apply_fixes" in told
    assert run(*arguments, "--fail_on", "never", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["batches"] == 4
    assert report["losses"]["source"] == "evaluation"
    assert report["losses"]["deployed"]["mean"] != report["losses"]["recalibrated"]["mean"]
    text = page.read_text()
    assert "data:image/png;base64," in text
    assert "http" not in text


PROJECT = """
    import torch
    import lightning.pytorch as pl
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    def net(offset=3.0):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))
        net[0].running_mean.fill_(offset)
        net[0].num_batches_tracked.fill_(100)
        return net

    class Module(pl.LightningModule):
        def __init__(self, offset=3.0):
            super().__init__()
            self.save_hyperparameters()
            self.net = net(offset)

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            assert batch_idx == 0
            loss = nn.functional.cross_entropy(self(batch["x"]), batch["y"])
            self.log("loss", loss)
            return loss

    class ByHand(Module):
        def __init__(self, offset=3.0):
            super().__init__(offset)
            self.automatic_optimization = False

    class WithTrainer(Module):
        def training_step(self, batch, batch_idx):
            return self.trainer.nowhere

    def pairs(number=4, classes=3):
        made = torch.Generator().manual_seed(0)
        return [
            (torch.randn(32, 4, generator=made), torch.randint(classes, (32,), generator=made)) for _ in range(number)
        ]

    class Data(pl.LightningDataModule):
        def __init__(self, number=4):
            super().__init__()
            self.number = number

        def train_dataloader(self):
            items = [{"x": x, "y": y} for batch in pairs(self.number) for x, y in zip(*batch)]
            return DataLoader(items, batch_size=32, shuffle=True)

    def half_a_loss(output, target):
        return 0.5 * nn.functional.cross_entropy(output, target)

    def broken_loss(output, target):
        raise KeyError("wrong\\nlabel")
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project's own folder, which is not on Python's path."""
    (tmp_path / "nets_of_a_project.py").write_text(textwrap.dedent(PROJECT))
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield "nets_of_a_project"
    sys.modules.pop("nets_of_a_project", None)
    assert sys.path == path


def saved(project, kind, path="last.ckpt", **options):
    """Write a Lightning checkpoint, as a Trainer does."""
    sys.path.insert(0, "")
    module = getattr(importlib.import_module(project), kind)(**options)
    sys.path.pop(0)
    content = {
        "state_dict": module.state_dict(),
        "pytorch-lightning_version": pl.__version__,
        "hyper_parameters": dict(module.hparams),
        "hparams_name": "kwargs",
    }
    torch.save(content, path)
    return path


def test_a_projects_own_module_checkpoint_and_data_in_the_working_folder(project, capsys):
    path = saved(project, "Module", offset=9.0)
    arguments = (f"{project}:Module", "--checkpoint", path, "--data", f"{project}:Data")
    assert run(*arguments) == 3
    told = capsys.readouterr().out
    assert told.splitlines()[:3] == [
        "BatchNorm audit of Module: 1 layer, 4 training batches",
        told.splitlines()[1],
        "  what   fresh-statistics in 'net.0'",
    ]
    assert "stale statistics cost" in told
    assert run(*arguments, "--data_options", '{"number": 2}', "--json") == 3
    first = capsys.readouterr()
    assert json.loads(first.out)["batches"] == 2
    assert first.err == ""
    torch.rand(3)
    assert run(*arguments, "--data_options", '{"number": 2}', "--json") == 3
    assert capsys.readouterr().out == first.out, "the same again, though the loader shuffles"


def test_a_function_of_networks_with_data_and_a_loss(project, capsys):
    arguments = (f"{project}:net", "--data", f"{project}:pairs", "--json")

    def deployed(*more):
        assert run(*arguments, *more) == 3
        losses = json.loads(capsys.readouterr().out)["losses"]
        return None if losses is None else losses["deployed"]["mean"]

    assert deployed() is None
    whole = deployed("--loss", "cross_entropy")
    assert whole > 0
    assert deployed("--loss", "torch.nn:CrossEntropyLoss") == pytest.approx(whole)
    assert deployed("--loss", f"{project}:half_a_loss") == pytest.approx(whole / 2)
    assert run(f"{project}:net", "--data", f"{project}:pairs", "--batches", 3, "--json", "--fail_on", "never") == 0
    assert json.loads(capsys.readouterr().out)["batches"] == 3


def test_exit_codes_follow_fail_on(project, monkeypatch):
    def code(fail_on, *severities):
        found = tuple(Finding("r", severity, None, "", {}, "", "") for severity in severities)
        monkeypatch.setattr(audit_module, "audit_batch_norm", lambda *a, **k: AuditReport("Net", 1, (), found))
        return run(f"{project}:net", "--input_size", "4", *(() if fail_on is None else ("--fail_on", fail_on)))

    assert [code(None, each) for each in ("info", "warning", "error")] == [0, 0, 3]
    assert [code("warning", each) for each in ("info", "warning", "error")] == [0, 3, 3]
    assert [code("info", each) for each in ("info", "warning", "error")] == [3, 3, 3]
    assert code("info") == 0
    assert code("never", "error") == 0
    assert run(f"{project}:net", "--no_such_option") == 2


def test_layers_are_picked_by_patterns(project, capsys):
    arguments = ("timm:resnet10t", "--input_size", "3,64,64", "--json", "--fail_on", "never")
    assert run(*arguments, "--include", "layer1.*, layer2.*", "--exclude", "*.bn2") == 0
    names = [row["name"] for row in json.loads(capsys.readouterr().out)["layers"]]
    assert names
    assert all(name.startswith(("layer1.", "layer2.")) and not name.endswith(".bn2") for name in names)


def test_manual_optimization_says_why_there_is_no_loss(project, capsys):
    path = saved(project, "ByHand")
    assert run(f"{project}:ByHand", "--checkpoint", path, "--data", f"{project}:pairs") == 3
    captured = capsys.readouterr()
    assert "ByHand optimizes by hand" in captured.err
    assert "loss on the same" not in captured.out
    assert run(f"{project}:ByHand", "--checkpoint", path, "--data", f"{project}:pairs", "--loss", "cross_entropy") == 3
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "loss on the same" in captured.out


def test_help_has_an_example(capsys):
    assert run("--help") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "bn-lightning audit my.models:Classifier --checkpoint last.ckpt --data my.data:DataModule" in told
    assert "to exit with 3 for. Otherwise the exit code is 0; it is 1" in told


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        pytest.param(("timm:resnet10t", "--data", "bn_lightning.modules:Nowhere"), "Nowhere", id="no-such-data"),
        pytest.param(("timm:resnet10t", "--data", "builtins:list"), "gave no data", id="no-batches"),
        pytest.param(
            ("timm:resnet10t", "--data", "builtins:list", "--loss", "nothing"), "--loss takes a name", id="no-such-loss"
        ),
        pytest.param(("nets_of_a_project:absent",), "has no 'absent'", id="no-such-network"),
        pytest.param(("no_such_module:net",), "cannot be imported", id="no-such-module"),
        pytest.param(("nets_of_a_project:net", "--input_size", "5"), "cannot take inputs", id="wrong-size"),
        pytest.param(
            ("nets_of_a_project:net", "--checkpoint", "absent.ckpt"), "no checkpoint file", id="no-checkpoint"
        ),
        pytest.param(
            ("nets_of_a_project:net", "--data", "nets_of_a_project:pairs", "--loss", "nets_of_a_project:broken_loss"),
            "KeyError: 'wrong",
            id="loss-fails",
        ),
        pytest.param(
            ("nets_of_a_project:WithTrainer", "--data", "nets_of_a_project:Data"), "Trainer", id="step-needs-trainer"
        ),
        pytest.param(
            ("nets_of_a_project:net", "--input_size", "4", "--html", "nets_of_a_project.py/page.html"),
            "cannot be written",
            id="no-place-for-the-page",
        ),
    ],
)
def test_what_cannot_be_audited_is_told_in_a_sentence(project, arguments, sentence):
    code = run(*arguments)
    assert isinstance(code, str), "which Python prints, with status 1"
    assert code.startswith("bn-lightning: ")
    assert sentence in code
    assert "\n" not in code
    assert "Traceback" not in code
