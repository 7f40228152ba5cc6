"""What `examples/existing_project` says of the three ways into a project that exists, by doing it."""

import os
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch

PROJECT = Path(__file__).parent.parent / "examples" / "existing_project"
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*", "ignore:.*LeafSpec.*", "ignore::Warning"
)


def applied(text, diff):
    """Apply a unified diff of one hunk after the other, each of which has to fit."""
    for hunk in re.split(r"^@@.*@@\n", diff, flags=re.MULTILINE)[1:]:
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] in " -")
        assert text.count(before) == 1, "the diff does not fit the project"
        text = text.replace(before, "".join(line[1:] for line in lines if line[0] in " +"))
    return text


def run(folder, monkeypatch, capsys, script, *arguments, diff=None):
    """Run a script of a copy of the project as ``python script`` does; return what it printed and the weights."""
    shutil.copytree(PROJECT, folder)
    if diff is not None:
        text = (PROJECT / diff).read_text()
        changed = folder / re.search(r"^\+\+\+ b/(.*)$", text, flags=re.MULTILINE).group(1)
        changed.write_text(applied(changed.read_text(), text))
    for name, value in re.findall(r'^(\w+)="([^"]*)"', (folder / "run.sh").read_text(), flags=re.MULTILINE):
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    try:
        runpy.run_path(os.path.join(folder, script), run_name="__main__")
    finally:
        for name in ("data", "model"):
            sys.modules.pop(name, None)
        os.environ.pop("PL_GLOBAL_SEED", None)
    (file,) = folder.glob("lightning_logs/version_0/checkpoints/*.ckpt")
    weights = torch.load(file, weights_only=True)["state_dict"]
    return capsys.readouterr().out, {key: value for key, value in weights.items() if "running" not in key}


def accuracy(printed):
    return float(re.search(r"val_accuracy\D+([\d.]+)", printed).group(1))


@pytest.fixture
def stock(tmp_path, monkeypatch, capsys):
    return run(tmp_path / "stock", monkeypatch, capsys, "train.py")


def test_the_project_does_not_know_the_library():
    for file in PROJECT.glob("*.py"):
        assert "bn_lightning" not in file.read_text().replace("does not know bn_lightning", "")


@pytest.mark.parametrize(
    ("diff", "script", "arguments"),
    [
        ("1-in-code.diff", "train.py", ()),
        ("2-in-yaml.diff", "main.py", ("fit", "--config", "config.yaml")),
        ("3-in-environment.diff", "train.py", ()),
    ],
    ids=["code", "yaml", "environment"],
)
def test_each_way_finds_and_mends_it_and_trains_the_same_weights(
    diff, script, arguments, stock, tmp_path, monkeypatch, capsys
):
    printed, weights = stock
    assert accuracy(printed) == pytest.approx(0.67, abs=0.01)
    assert "BatchNorm audit" not in printed
    mended, same = run(tmp_path / "mended", monkeypatch, capsys, script, *arguments, diff=diff)
    assert "BatchNorm audit of Classifier" in mended
    if script == "train.py":
        assert accuracy(mended) == 1.0
    assert weights.keys() == same.keys()
    for key, value in weights.items():
        assert torch.equal(same[key], value), key
