"""``bn-lightning inspect``, ``recalibrate`` and ``convert``: what they print, write and refuse."""

import json
import sys
import textwrap

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from bn_lightning.cli import main
from bn_lightning.cli.main import COMMANDS
from bn_lightning.layers import GhostBatchNorm

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*log_every_n_steps.*")
MINE = """
    import lightning.pytorch as pl
    import torch
    from torch import nn

    class Net(pl.LightningModule):
        def __init__(self, width=4):
            super().__init__()
            self.save_hyperparameters()
            self.body = nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.BatchNorm2d(width))
            self.example_input_array = torch.zeros(2, 1, 6, 6)

        def forward(self, x):
            return self.body(x).mean((2, 3))

        def training_step(self, batch, batch_idx):
            return self(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)

    def batches():
        generator = torch.Generator().manual_seed(0)
        return [(torch.randn(8, 1, 6, 6, generator=generator) * 3 + 1, torch.zeros(8)) for _ in range(4)]

    def dicts():
        return [{"picture": x} for x, _ in batches()]

    def by_picture(model, batch):
        return model(batch["picture"])

    def network():
        torch.manual_seed(0)
        return Net().body
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "mine_here.py").write_text(textwrap.dedent(MINE))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("mine_here", None)


def fitted(ckpt_path=None, **options):
    import mine_here

    torch.manual_seed(0)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", enable_checkpointing=False, **quiet, **options)
    data = torch.utils.data.DataLoader([(x[0], 0.0) for x, _ in mine_here.batches()])
    trainer.fit(mine_here.Net(), data, ckpt_path=ckpt_path)
    return trainer


@pytest.fixture
def trained(folder, monkeypatch):
    """A Lightning checkpoint of an epoch, as a project leaves it."""
    monkeypatch.syspath_prepend(folder)
    fitted(max_epochs=1).save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


def pooled(x):
    """Mean and variance of each channel in float64, with correction=1."""
    values = x.double().transpose(0, 1).flatten(1)
    return values.mean(1), values.var(1)


def test_recalibrate_writes_a_lightning_checkpoint_with_the_pooled_statistics_and_all_else_as_it_was(
    folder, trained, capsys
):
    main(
        ["recalibrate", "mine_here:Net", "mine_here:batches", "--checkpoint", str(trained), "--output", "out/new.ckpt"]
    )
    printed = capsys.readouterr().out
    assert "recalibrated 2 of 2 BatchNorm layers on 4 batches" in printed
    assert "written to out/new.ckpt" in printed
    old, new = (torch.load(path, weights_only=True) for path in (trained, folder / "out/new.ckpt"))
    assert old.keys() == new.keys()
    assert {key: old[key] for key in ("epoch", "global_step", "hyper_parameters")} == {
        key: new[key] for key in ("epoch", "global_step", "hyper_parameters")
    }
    assert str(old["optimizer_states"]) == str(new["optimizer_states"])
    net = sys.modules["mine_here"].Net.load_from_checkpoint(folder / "out/new.ckpt").eval()
    x = torch.cat([x for x, _ in sys.modules["mine_here"].batches()])
    mean, var = pooled(net.body[0](x))
    torch.testing.assert_close(net.body[1].running_mean.double(), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(net.body[1].running_var.double(), var, rtol=1e-5, atol=1e-5)
    for key, value in old["state_dict"].items():
        assert torch.equal(new["state_dict"][key], value) == ("running" not in key), key
    again = fitted(max_epochs=2, ckpt_path=folder / "out/new.ckpt")
    assert again.global_step == 8, "Lightning goes on from it"


def test_without_output_nothing_is_written_and_forward_names_a_function(folder, trained, capsys):
    before = trained.read_bytes(), sorted(folder.iterdir())
    options = ["--checkpoint", str(trained), "--forward", "mine_here:by_picture"]
    main(["recalibrate", "mine_here:Net", "mine_here:dicts", *options])
    assert "nothing was written: --output" in capsys.readouterr().out
    main(["recalibrate", "mine_here:Net", "mine_here:dicts", *options, "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in shown["layers"]] == ["body.1", "body.3"]
    assert shown["output"] is None
    assert (trained.read_bytes(), sorted(folder.iterdir())) == before


def test_convert_writes_weights_that_fit_the_plain_network(folder, capsys):
    torch.save({"epoch": 7, "model": {f"module.{k}": v for k, v in plain().state_dict().items()}}, "weights.pt")
    options = ["--options", '{"virtual_batch_size": 4}', "--checkpoint", "weights.pt", "--output", "ghost.pt"]
    main(["convert", "mine_here:network", "ghost", "--include", "1", *options])
    printed = capsys.readouterr().out
    assert "converted 1 of 2 BatchNorm layers to GhostBatchNorm" in printed
    written = torch.load("ghost.pt", weights_only=True)
    assert written["epoch"] == 7
    assert written["model"].keys() == {f"module.{key}" for key in plain().state_dict()}
    main(["convert", "mine_here:network", "bn_lightning.layers:GhostBatchNorm", "--json"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["after"] for row in rows] == [GhostBatchNorm.__name__] * 2


def test_converting_to_group_drops_the_statistics_from_the_file_and_nothing_else(folder):
    torch.save({"state_dict": {**plain().state_dict(prefix="net."), "other.weight": torch.ones(1)}}, "weights.pt")
    torch.save({"state_dict": plain().state_dict(prefix="net.")}, "alone.pt")
    with pytest.raises(SystemExit, match=r"do not fit"):
        main(["convert", "mine_here:network", "group", "--checkpoint", "weights.pt", "--output", "group.pt"])
    torch.save({"state_dict": plain().state_dict(prefix="model.")}, "model.pt")
    options = ["--options", '{"num_groups": 2}', "--checkpoint", "model.pt", "--output", "group.pt"]
    main(["convert", "mine_here:network", "group", *options])
    keys = torch.load("group.pt", weights_only=True)["state_dict"].keys()
    assert keys == {f"model.{key}" for key in plain().state_dict() if "running" not in key and "tracked" not in key}


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))


def test_inspect_shows_what_people_ask_first(folder, trained, capsys):
    main(["inspect", "mine_here:Net", "--checkpoint", str(trained)])
    printed = " ".join(capsys.readouterr().out.split())
    for said in (
        "Net: 2 BatchNorm layers, of which 1 can be folded",
        "body.1 4 conv2d in 'body.0' relu in 'body.2' → body.0",
        "body.3 4 relu in 'body.2' mean no: nonlinear_between",
        "all of them: 4 updates",
    ):
        assert said in printed, printed
    main(["inspect", "mine_here:Net", "--checkpoint", str(trained), "--include", "*.3", "--json"])
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["name"], row["place"], row["updates"], row["training"]) == ("body.3", 1, 4, False)


def test_zoo_lists_what_a_pattern_names(capsys):
    main(["zoo", "timm:resnet1[08]t*, torchvision:resnet18", "--detail", "layers"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "torchvision:resnet18 11.7 20" in printed
    assert "2 networks, 2 with BatchNorm" in printed
    main(["zoo", "torchvision:alexnet", "--json"])
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["name"], row["batch_norms"]) == ("torchvision:alexnet", 0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspect", "mine_here:nothing"], "has no 'nothing'"),
        (["inspect", "timm:no_such_network"], "no_such_network"),
        (["inspect", "mine_here:network", "--input_size", "1,6,6", "--include", "zzz"], "zzz"),
        (["convert", "mine_here:network", "gost"], "ghost"),
        (["zoo", "timm:no_such_network*"], "no_such_network"),
        (["zoo", ""], "give one, such as"),
        (["convert", "mine_here:network", "ghost", "--options", '{"size": 3}'], "virtual_batch_size"),
        (["recalibrate", "mine_here:network", "mine_here:dicts"], "forward="),
        (["recalibrate", "mine_here:network", "mine_here:batches", "--output", "mine_here.py/x.pt"], "mine_here.py"),
    ],
)
def test_what_goes_wrong_is_told_in_one_sentence(arguments, said, folder, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert isinstance(stopped.value.code, str), "status 1 and the sentence"
    assert stopped.value.code.startswith("bn-lightning: ")
    assert said in stopped.value.code
    assert "\n" not in stopped.value.code
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    assert f"For example: bn-lightning {command} " in told
    with pytest.raises(SystemExit) as stopped:
        main([command, "--nonsense"])
    assert stopped.value.code == 2
