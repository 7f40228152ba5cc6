import re
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bn_lightning.cli import main
from bn_lightning.errors import BatchNormError


@pytest.fixture(scope="module")
def demonstrated(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo")
    code = "from bn_lightning.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "demo", "--output", str(output)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr, output


def test_it_reaches_the_accuracy_it_promises(demonstrated):
    printed, _, _ = demonstrated
    assert float(re.search(r"test accuracy, folded: ([\d.]+)", printed).group(1)) >= 0.97


def test_it_shows_every_room(demonstrated):
    printed, progress, output = demonstrated
    for layer in ("model.stem.1", "model.stages.2.1.bn2"):
        assert printed.count(layer) >= 5, layer  # watched, audited at the end and twice midway, folded
    assert "folded 15 of 15" in printed
    assert "× as fast" in printed
    assert f"tensorboard --logdir {output}" in printed
    before, after = re.search(r"accuracy after epoch 4: (\d\.\d+), .* statistics (\d\.\d+)", printed).groups()
    assert float(after) > float(before)
    assert "Epoch 14" in progress + printed


def test_it_leaves_a_log_and_a_picture(demonstrated):
    printed, _, output = demonstrated
    (picture,) = output.rglob("activations_std.png")
    assert str(picture) in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    log = EventAccumulator(str(picture.parent), size_guidance={"images": 0, "scalars": 0}).Reload()
    assert "activations/heatmap/std" in log.Tags()["images"]
    assert "val/accuracy" in log.Tags()["scalars"]


def test_errors_are_one_sentence_and_no_traceback(monkeypatch):
    def fails(output: str = "runs") -> None:
        raise BatchNormError("the layer, and the cure")

    monkeypatch.setattr("bn_lightning.cli.demo.demo", fails)
    with pytest.raises(SystemExit, match="bn-lightning: the layer, and the cure"):
        main(["demo"])


def test_nothing_to_show_is_said_before_anything_runs():
    with pytest.raises(SystemExit, match="epochs must be at least 1"):
        main(["demo", "--epochs", "0"])
