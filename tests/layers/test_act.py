"""timm's BatchNormAct2d becomes a variant and keeps its drop and activation."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import bn_lightning as bnl
from bn_lightning.errors import ConversionError
from bn_lightning.layers import GhostBatchNorm, act
from bn_lightning.layers.registry import VARIANTS

timm_layers = pytest.importorskip("timm.layers")

NAMES = [*sorted(VARIANTS), "group"]


def layer(**settings):
    made = timm_layers.BatchNormAct2d(4, **{"act_layer": nn.ReLU, "inplace": True, **settings})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (made.weight, made.bias, made.running_mean):
            tensor.copy_(torch.randn(4, generator=generator))
        made.running_var.copy_(torch.rand(4, generator=generator) + 0.5)
        made.num_batches_tracked.fill_(100_000)
    return made


def images():
    return torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(1))


def plain(name, made):
    """The same variant without activation, of the same values."""
    bare = nn.BatchNorm2d(4)
    bare.load_state_dict(made.state_dict())
    bnl.convert_batch_norm(bare, name, **({"num_groups": 2} if name == "group" else {}))
    return bare


@pytest.mark.parametrize("inplace", [True, False], ids="inplace={}".format)
@pytest.mark.parametrize("name", NAMES)
def test_normalize_then_drop_then_activate(name, inplace):
    made = layer(inplace=inplace, drop_layer=lambda: nn.LeakyReLU(-1.0))
    drop, activation, bare = made.drop, made.act, plain(name, made)
    report = bnl.convert_batch_norm(made, name, **({"num_groups": 2} if name == "group" else {}))
    assert report.rows[0].before == "BatchNormAct2d"
    assert report.rows[0].after == ("GroupNormAct" if name == "group" else f"{VARIANTS[name].__name__}Act")
    assert made.drop is drop
    assert made.act is activation
    for training in (True, False):
        x, y = (images().requires_grad_() for _ in range(2))
        torch.manual_seed(3)
        out = made.train(training)(x)
        torch.manual_seed(3)
        expected = torch.relu(bare.train(training)(y).abs())
        assert torch.equal(out, expected)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
        for result in (out, expected):
            (result * weights).sum().backward()
        assert torch.equal(x.grad, y.grad)
    report.undo()
    assert type(made) is timm_layers.BatchNormAct2d


def test_whole_models_go_through_files_into_a_new_process(tmp_path):
    paths = [str(tmp_path / name) for name in NAMES]
    for name, path in zip(NAMES, paths, strict=True):
        model = nn.Sequential(nn.Conv2d(4, 4, 1), layer(), nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)).eval()
        bnl.convert_batch_norm(model, name, **({"num_groups": 2} if name == "group" else {}))
        torch.save(model, f"{path}.pt")
        torch.save((images(), model(images()).detach()), f"{path}.out")
    code = (
        "import sys, torch\n"
        "for path in sys.argv[1:]:\n"
        "    x, y = torch.load(path + '.out')\n"
        "    model = torch.load(path + '.pt', weights_only=False)\n"
        "    assert torch.equal(model(x), y), path\n"
        "    if not path.endswith('group'):\n"
        "        import bn_lightning\n"
        "        bn_lightning.revert_batch_norm(model)\n"
        "        assert [type(model[i]).__name__ for i in (1, 3)] == ['BatchNormAct2d', 'BatchNorm2d'], path\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_timms_own_sync_layer():
    made = timm_layers.convert_sync_batchnorm(nn.Sequential(layer()))[0]
    bnl.convert_batch_norm(made, "ghost")
    assert type(made) is act.GhostBatchNormAct
    assert made(images()).min() >= 0
    bnl.revert_batch_norm(made)
    assert type(made) is timm_layers.SyncBatchNormAct


class Mine(GhostBatchNorm):
    pass


def test_a_variant_of_the_user_needs_a_class_for_it():
    model = nn.Sequential(nn.BatchNorm2d(4), layer())
    report = bnl.convert_batch_norm(model, Mine)
    assert report.rows[1].reason == (
        "kept: no class does Mine and then drop and activation; make one: (ThenActivation, Mine)"
    )

    class MineAct(act.ThenActivation, Mine):
        pass

    bnl.convert_batch_norm(model, Mine)
    assert type(model[1]) is MineAct
    with pytest.raises(ConversionError, match="MineAct is what layers with an activation become; say Mine"):
        bnl.convert_batch_norm(model, MineAct)


def test_built_by_hand():
    made = act.GhostBatchNormAct(4, virtual_batch_size=2, act=nn.ReLU(inplace=True))
    assert made(images()).min() >= 0
    report = bnl.revert_batch_norm(made, plain_class=nn.BatchNorm2d)
    assert report.rows[0].reason == "kept: BatchNorm2d would lose the drop and activation it was built with"
    bnl.convert_batch_norm(made, "renorm")
    assert type(made) is act.BatchRenormAct


@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")  # dynamo's own tracing
@pytest.mark.parametrize("name", ["ghost", "frozen", "group"])
def test_compiles_in_one_graph(name):
    torch._dynamo.reset()
    made, eager = layer(), layer()
    for one in (made, eager):
        bnl.convert_batch_norm(one, name, **({"num_groups": 2} if name == "group" else {}))
    torch.testing.assert_close(torch.compile(made, backend="aot_eager", fullgraph=True)(images()), eager(images()))
