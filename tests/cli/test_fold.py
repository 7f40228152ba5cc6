"""``bn-lightning fold``: from a name to a folded network in a file."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from bn_lightning.cli import main
from bn_lightning.cli.network import importable_here, inputs_for, open_network
from bn_lightning.errors import BatchNormError
from bn_lightning.modules import ImageClassifier
from bn_lightning.zoo import load_zoo_model

NETWORKS = """
    import torch
    import lightning.pytorch as pl
    from torch import nn

    def body(num_classes=4):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.BatchNorm2d(6), nn.Tanh(), nn.Conv2d(6, 5, 3),
            nn.BatchNorm2d(5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, num_classes),
        )
        for index in (1, 3, 6):
            net[index].running_mean.normal_(0.3, 0.5)
            net[index].running_var.uniform_(0.2, 3.0)
        return net

    def stays():
        return nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.ReLU())

    def half():
        return body().bfloat16()

    class Module(pl.LightningModule):
        def __init__(self, num_classes=4, scale=1.0, object=None):
            super().__init__()
            self.save_hyperparameters()
            self.net, self.scale = body(num_classes), scale
            self.example_input_array = torch.randn(1, 3, 10, 10)

        def forward(self, x):
            return self.net(x) * self.scale
"""
SMALL = ("--input_size", "3,12,12")


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module in the working folder, which is not on Python's path."""
    (tmp_path / "nets_in_this_folder.py").write_text(textwrap.dedent(NETWORKS))
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield "nets_in_this_folder"
    sys.modules.pop("nets_in_this_folder", None)
    assert sys.path == path


def built(mine, name, **options):
    """The network before it is folded."""
    return getattr(sys.modules[mine], name)(**options).eval().requires_grad_(False)


def size(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_it_shows_what_became_of_each_layer(mine, capsys):
    main(["fold", f"{mine}:body", *SMALL])
    printed = capsys.readouterr().out
    for line in ("1 .* folded-backward .* 0", "3 .* kept", "6 .* folded-backward .* 5"):
        assert any(all(part in row for part in line.split(" .* ")) for row in printed.splitlines()), line
    assert "folded 2 of 3; float64 error" in printed
    assert "written" not in printed


@pytest.mark.parametrize("standalone", ["keep", "affine"])
@pytest.mark.parametrize("ending", [".pt", ".pth", ".pt2", ".onnx"])
def test_each_ending_is_written_and_loads_as_it_says(mine, capsys, ending, standalone):
    output = Path("new") / f"net{ending}"
    main(["fold", f"{mine}:body", *SMALL, "--output", str(output), "--standalone", standalone])
    written = capsys.readouterr().out.splitlines()[-1]
    assert written.startswith(f"written to {output}: ")
    assert f"{output.stat().st_size / 1e6:.3g} MB" in written
    needs = {".pt2": "torch", ".onnx": "onnxruntime"}
    library = "torch, bn_lightning" if standalone == "affine" else "torch"
    assert written.endswith(f"(needs {needs.get(ending, library)})")
    load, x = written.split("load it by ")[1].rsplit(" (needs", 1)[0], size(5, 3, 12, 12)
    if ending == ".onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        session = eval(load, {"onnxruntime": onnxruntime})
        found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    else:
        found = eval(load)(x)
    torch.testing.assert_close(found, built(mine, "body")(x), rtol=1e-4, atol=1e-5)


def test_json_is_all_it_prints(mine, capsys):
    main(["fold", f"{mine}:body", *SMALL, "--json", "--output", "net.onnx", "--standalone", "affine"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["model"] == f"{mine}:body"
    assert printed["folded"] == 2
    assert [row["action"] for row in printed["rows"]] == ["folded-backward", "affine", "folded-backward"]
    assert printed["error"] <= 1e-9
    assert printed["output"]["path"] == "net.onnx"
    assert printed["output"]["size"] == Path("net.onnx").stat().st_size
    main(["fold", f"{mine}:body", *SMALL, "--json"])
    assert json.loads(capsys.readouterr().out)["output"] is None


@pytest.mark.parametrize(
    ("options", "folded"),
    [
        pytest.param(["--include", "1"], ["1"], id="include"),
        pytest.param(["--include", "1,6", "--exclude", "6*"], ["1"], id="exclude"),
        pytest.param(["--include", "6, 1"], ["1", "6"], id="commas"),
        pytest.param(["--exclude+", "1", "--exclude+", "3"], ["6"], id="list"),
    ],
)
def test_patterns_pick_layers(mine, capsys, options, folded):
    main(["fold", f"{mine}:body", *SMALL, "--json", *options])
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["name"] for row in rows if row["action"] == "folded-backward"] == folded


def test_nothing_folded_is_said_and_is_no_failure(mine, capsys):
    main(["fold", f"{mine}:stays", *SMALL, "--output", "net.pt"])
    printed = capsys.readouterr().out
    assert "folded 0 of 1" in printed
    assert "No BatchNorm layer was folded" in printed
    assert Path("net.pt").is_file()


@pytest.mark.parametrize("zoo", ["timm", "torchvision"])
def test_a_zoo_network_with_a_checkpoint(tmp_path, capsys, randomized, zoo):
    pytest.importorskip(zoo)
    trained = randomized(load_zoo_model(f"{zoo}:resnet18", num_classes=3))
    torch.save({"state_dict": trained.state_dict(prefix="module.")}, tmp_path / "weights.pt")
    output = str(tmp_path / "net.pt")
    weights = ("--checkpoint", str(tmp_path / "weights.pt"), "--num_classes", "3")
    main(["fold", f"{zoo}:resnet18", *weights, "--input_size", "3,32,32", "--output", output])
    printed = capsys.readouterr()
    assert "folded 20 of 20" in printed.out
    assert printed.err == ""
    net, x = torch.load(output, weights_only=False), size(2, 3, 32, 32)
    assert "BatchNorm2d" not in repr(net)
    with torch.no_grad():
        torch.testing.assert_close(net(x), trained(x), rtol=1e-3, atol=1e-4)


def test_random_weights_are_said_to_be_random(capsys):
    pytest.importorskip("timm")
    main(["fold", "timm:test_resnet", "--input_size", "3,32,32", "--json"])
    printed = capsys.readouterr()
    assert "the weights are random" in printed.err
    assert json.loads(printed.out)["folded"] > 0


def test_what_is_odd_about_the_weights_is_one_line_each(tmp_path, capsys):
    pytest.importorskip("timm")
    torch.save(dict(load_zoo_model("timm:test_resnet").named_parameters()), tmp_path / "weights.pt")
    main(
        ["fold", "timm:test_resnet", "--checkpoint", str(tmp_path / "weights.pt"), "--input_size", "3,32,32", "--json"]
    )
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("bn-lightning: 'timm:test_resnet': the file has no running statistics for all 15 BatchNorm")
    assert json.loads(printed.out)["folded"] > 0


@pytest.fixture
def randomized():
    """Give every BN statistics that are not the neutral ones, and evaluation mode."""

    def randomize(net):
        generator = torch.Generator().manual_seed(0)
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0.3, 0.5, generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)
        return net.eval()

    return randomize


def saved_by_lightning(module, path):
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, enable_model_summary=False, barebones=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)


@pytest.mark.filterwarnings("ignore:.*GPU available", "ignore:.*does not have many workers")
def test_a_lightning_checkpoint_with_its_class(mine, capsys, randomized):
    main(["fold", f"{mine}:Module", "--json"])  # its own example_input_array
    assert json.loads(capsys.readouterr().out)["folded"] == 2
    trained = randomized(built(mine, "Module", num_classes=7, scale=3.0))
    saved_by_lightning(trained, "last.ckpt")
    main(["fold", f"{mine}:Module", "--checkpoint", "last.ckpt", "--output", "net.pt2"])
    assert "folded 2 of 3" in capsys.readouterr().out
    x = size(4, 3, 10, 10)  # the example was a batch of one
    torch.testing.assert_close(torch.export.load("net.pt2").module()(x), trained(x), rtol=1e-4, atol=1e-5)
    for options in (["--num_classes", "3"], ["--pretrained"]):
        with pytest.raises(SystemExit, match="from the Lightning checkpoint; leave out"):
            main(["fold", f"{mine}:Module", "--checkpoint", "last.ckpt", *options])


def test_a_classifier_of_this_library(tmp_path, capsys):
    classifier = ImageClassifier("residual", network_options={"widths": (8,), "blocks": 1}).eval()
    saved_by_lightning(classifier, tmp_path / "last.ckpt")
    given = ["fold", "bn_lightning.modules:ImageClassifier", "--checkpoint", str(tmp_path / "last.ckpt")]
    with pytest.raises(SystemExit, match=r"ImageClassifier does not say the size of its inputs; .* --input_size"):
        main(given)
    main([*given, "--input_size", "1,8,8", "--output", str(tmp_path / "net.pt")])
    assert capsys.readouterr().out.strip().endswith("(needs torch, bn_lightning, lightning, torchmetrics)")
    x = size(3, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "net.pt", weights_only=False)(x), classifier(x))


class Anything:
    """Not on anybody's list of safe classes."""


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param({"state_dict": {}, "hyper_parameters": {}}, "failed with RuntimeError: .*Missing key", id="keys"),
        pytest.param({"state_dict": {}, "hyper_parameters": Anything()}, "holds Python objects", id="object"),
        pytest.param({"net.0.weight": torch.ones(1)}, "'last.ckpt' has no 'state_dict'", id="weights-alone"),
    ],
)
def test_a_lightning_checkpoint_that_does_not_fit_is_refused(mine, content, says):
    versioned = {"pytorch-lightning_version": pl.__version__, **content} if "state_dict" in content else content
    torch.save(versioned, "last.ckpt")
    with pytest.raises(SystemExit, match=says) as raised:
        main(["fold", f"{mine}:Module", "--checkpoint", "last.ckpt"])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param(["{mine}:body"], "Sequential does not say the size .* --input_size 3,224,224", id="no-size"),
        pytest.param(["{mine}:body", "--input_size", "3,x"], "one to five whole numbers .* got '3,x'", id="size"),
        pytest.param(["{mine}:body", "--input_size", "0,3,9,9"], "above 0", id="empty-batch"),
        pytest.param(["{mine}:body", "--input_size", "1,9,9"], r"cannot take inputs of \[2, 1, 9, 9\]", id="channels"),
        pytest.param(["{mine}:body", *SMALL, "--include", "7"], "include pattern '7' matches none", id="pattern"),
        pytest.param(["{mine}:body", *SMALL, "--checkpoint", "no.pt"], "no checkpoint file 'no.pt'", id="checkpoint"),
        pytest.param(["{mine}:buddy", *SMALL], "has no 'buddy'.*did you mean 'body'", id="name"),
        pytest.param(["body", *SMALL], "'body' does not say where", id="zoo"),
        pytest.param(["torch.nn:Identity", *SMALL], "Identity has no BatchNorm layer", id="no-batch-norm"),
        pytest.param(["{mine}:body", *SMALL, "--output", "{mine}.py/net.pt"], "cannot be written", id="folder"),
    ],
)
def test_errors_are_one_sentence(mine, arguments, says):
    with pytest.raises(SystemExit, match=f"^bn-lightning: .*{says}") as raised:
        main(["fold", *(argument.format(mine=mine) for argument in arguments)])
    assert "\n" not in str(raised.value)


def test_another_ending_is_refused_before_anything_is_built(mine):
    with pytest.raises(SystemExit, match=r"'net.h5' names no format; expected one of \.pt .*\.pth .*\.pt2 .*\.onnx"):
        main(["fold", f"{mine}:body", *SMALL, "--output", "net.h5"])
    assert mine not in sys.modules


def test_the_help_states_the_formats(capsys):
    with pytest.raises(SystemExit):
        main(["fold", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for part in (
        ".pt or .pth is the whole network by torch.save",
        ".pt2 is a torch.export",
        ".onnx is ONNX",
        "timm:NAME",
    ):
        assert part in printed


def test_the_command_itself(mine):
    command = [sys.executable, "-c", "from bn_lightning.cli import main; main()", "fold", f"{mine}:body"]
    done = subprocess.run([*command, *SMALL, "--output", "net.onnx"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # nor any warning of torch's own code
    assert done.stdout.splitlines()[-1].startswith("written to net.onnx")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("bn-lightning: Sequential does not say")


def test_a_reader_that_leaves_early_gets_no_traceback(mine):
    command = [sys.executable, "-c", "from bn_lightning.cli import main; main()", "fold", f"{mine}:body", *SMALL]
    # Buffered, as a user's Python is, whatever runs the tests: the rest of the buffer must not be written at the end.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, env=environment, text=True) as running:
        running.stdout.close()
        assert running.stderr.read() == ""
    assert running.returncode == 1


def test_the_name_of_a_zoo_looks_nowhere_else():
    path = list(sys.path)
    with importable_here("timm:resnet18"):
        assert sys.path == path
    with importable_here("mine:resnet18"):
        assert sys.path == ["", *path]
    assert sys.path == path


def test_inputs_are_the_same_each_time_and_as_the_network_takes_them(mine):
    with importable_here(mine):
        half = open_network(f"{mine}:half")
    assert not half.training
    inputs = inputs_for(half, "3,9,9")
    assert inputs.shape == (2, 3, 9, 9)
    assert inputs.dtype == torch.bfloat16
    assert torch.equal(inputs, inputs_for(half, "2,3,9,9"))
    assert inputs_for(half, "(1, 3, 9, 9)").shape == (1, 3, 9, 9)
    with pytest.raises(BatchNormError, match="does not say the size"):
        inputs_for(half)
