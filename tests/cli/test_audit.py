"""bn-lightning audit: a zoo network, a Lightning checkpoint with its data, exit codes for CI."""

import json
import warnings

import lightning.pytorch as pl
import pytest

from bn_lightning.cli.main import main
from bn_lightning.modules import DigitsDataModule, ImageClassifier


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


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        pytest.param(("timm:resnet10t", "--data", "bn_lightning.modules:Nowhere"), "Nowhere", id="no-such-data"),
        pytest.param(("timm:resnet10t", "--data", "builtins:list"), "gave no data", id="no-batches"),
        pytest.param(
            ("timm:resnet10t", "--data", "builtins:list", "--loss", "nothing"), "--loss takes a name", id="no-such-loss"
        ),
    ],
)
def test_what_cannot_be_audited_is_told_in_a_sentence(arguments, sentence):
    code = run(*arguments)
    assert isinstance(code, str), "which Python prints, with status 1"
    assert sentence in code
