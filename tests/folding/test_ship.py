"""What a folded network can be shipped as, and where it then runs."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from bn_lightning import ChannelAffine, fold_batch_norm
from bn_lightning.errors import BatchNormError
from bn_lightning.folding import ship
from bn_lightning.folding.ship import require_format, ship_network

timm = pytest.importorskip("timm")

pytestmark = pytest.mark.filterwarnings(
    # torch.export and torch.onnx of torch 2.13, in their own code
    "ignore:.*LeafSpec.*is deprecated:FutureWarning",
)


def _small():
    """One BN stays, between two activations; one brings its activation along."""
    from timm.layers import BatchNormAct2d

    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        BatchNormAct2d(8),
        nn.Conv2d(8, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.BatchNorm2d(6),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 4),
    )


# Folded once for all tests, none of which changes them.
_FOLDED = {}


@pytest.fixture(
    params=[
        pytest.param(("small", "keep", 2), id="small"),
        pytest.param(("small", "affine", 3), id="small-affine"),
        pytest.param(("resnet18", "keep", 20), id="resnet18"),
    ]
)
def folded(request, randomize):
    """A folded network, an input of batch 2, and whether it holds a ChannelAffine."""
    if request.param not in _FOLDED:
        name, standalone, changed = request.param
        net = randomize(_small() if name == "small" else timm.create_model("resnet18", num_classes=5))
        x = torch.randn(2, 3, 32, 32)
        report = fold_batch_norm(net, x, standalone=standalone).report
        assert sum(row.action != "kept" for row in report.rows) == changed
        affine = any(isinstance(module, ChannelAffine) for module in net.modules())
        assert affine == (standalone == "affine")
        _FOLDED[request.param] = net.requires_grad_(False), x, affine
    return _FOLDED[request.param]


WITHOUT_THE_LIBRARY = """
    import sys

    class NotInstalled:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "bn_lightning":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, NotInstalled())
    try:
        import bn_lightning
    except ModuleNotFoundError:
        pass
    else:
        sys.exit("the library is there after all")

    import torch
    folder = sys.argv[1]
    x, expected = torch.load(f"{folder}/expected.pt")
    net = eval(sys.argv[2])
    torch.testing.assert_close(net(x), expected)
    print([name for name in sys.modules if name.startswith("bn_lightning")])
"""


def run_without_the_library(net, x, folder, load):
    torch.save((x, net(x)), folder / "expected.pt")
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(WITHOUT_THE_LIBRARY), str(folder), load],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_whole_network_loads_where_the_library_is_not_installed(folded, tmp_path):
    net, x, affine = folded
    shipped = ship_network(net, x, tmp_path / "net.pt")
    done = run_without_the_library(net, x, tmp_path, shipped.load)
    if affine:
        assert "No module named 'bn_lightning" in done.stderr
        assert "bn_lightning" in shipped.needs
        torch.testing.assert_close(eval(shipped.load)(x), net(x))
    else:
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == "[]"
        assert shipped.needs == (("torch",) if isinstance(net, nn.Sequential) else ("torch", "timm"))


def test_the_exported_program_runs_for_other_batch_sizes_and_without_the_library(folded, tmp_path):
    net, x, affine = folded
    shipped = ship_network(net, x, tmp_path / "net.pt2")
    assert shipped.needs == ("torch",)
    program = eval(shipped.load)
    for batch in (1, 3):
        y = torch.randn(batch, 3, 32, 32)
        torch.testing.assert_close(program(y), net(y))
    if affine:
        done = run_without_the_library(net, torch.randn(5, 3, 32, 32), tmp_path, shipped.load)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == "[]"


def test_onnxruntime_gives_the_same_output_for_other_batch_sizes(folded, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    net, x, _ = folded
    shipped = ship_network(net, x, tmp_path / "net.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]  # no second file for the weights
    session = eval(shipped.load, {"onnxruntime": onnxruntime})
    (given,) = session.get_inputs()
    assert given.shape == ["batch", 3, 32, 32]
    for batch in (1, 5):
        y = torch.randn(batch, 3, 32, 32)
        (found,) = session.run(None, {given.name: y.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), net(y), rtol=1e-4, atol=1e-5)


def test_it_compiles_as_one_graph(folded):
    net = folded[0]
    torch.compiler.reset()
    try:
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True, dynamic=True)
        for batch in (2, 5):
            y = torch.randn(batch, 3, 32, 32)
            torch.testing.assert_close(compiled(y), net(y))
    finally:
        torch.compiler.reset()


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, images, scale, offsets):
        return self.bn(self.conv(images)).mean((2, 3)) * scale + offsets["each"]


@pytest.mark.parametrize("batch", [1, 3])
def test_every_tensor_as_long_as_the_first_is_a_batch(randomize, tmp_path, batch):
    net = randomize(TwoInputs()).requires_grad_(False)

    def inputs(batch):
        each = torch.arange(4.0 * batch).view(batch, 4)
        return {"images": torch.randn(batch, 3, 6, 6), "scale": torch.full((4,), 2.0), "offsets": {"each": each}}

    given = inputs(batch)
    kept = given["images"].clone()
    program = torch.export.load(ship_network(net, given, tmp_path / "net.pt2").path).module()
    assert torch.equal(given["images"], kept)
    for other in (1, 2, 5):
        again = inputs(other)
        torch.testing.assert_close(program(**again), net(**again))


@pytest.mark.parametrize("ending", [".pt", ".pth", ".pt2", ".PT2"])
def test_it_says_what_it_wrote(tmp_path, ending):
    path = tmp_path / "new" / "folder" / f"net{ending}"
    shipped = ship_network(nn.Linear(2, 1).eval(), torch.ones(2, 2), path)
    assert shipped.size == path.stat().st_size
    assert str(shipped).startswith(f"{path}: {shipped.format}, 0.0")
    assert f"load it by {shipped.load} (needs torch)" in str(shipped)
    assert shipped.to_dict()["path"] == str(path)
    assert torch.equal(eval(shipped.load)(torch.ones(1, 2)), eval(shipped.load)(torch.ones(1, 2)))


@pytest.mark.parametrize("fails", ["open", "fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["full", "interrupted"])
def test_a_file_is_complete_or_as_it_was(tmp_path, monkeypatch, fails, error):
    path = tmp_path / "net.pt"
    path.write_bytes(b"the last one")

    def raises(*args, **kwargs):
        raise error

    if fails == "open":
        monkeypatch.setattr(ship.Path, "open", raises)
    else:
        monkeypatch.setattr(os, fails, raises)
    expected = BatchNormError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        ship_network(nn.Linear(2, 1).eval(), torch.ones(2, 2), path)
    monkeypatch.undo()
    assert path.read_bytes() == b"the last one"
    assert list(tmp_path.iterdir()) == [path]


class FixedBatch(nn.Module):
    def forward(self, x):
        return x.view(2, -1) * 2


class Local(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = lambda x: x

    def forward(self, x):
        return self.act(x)


@pytest.mark.parametrize(
    ("net", "name", "says"),
    [
        pytest.param(
            FixedBatch(), "net.pt2", r"FixedBatch cannot be written as torch.export .*\.pt writes", id="batch"
        ),
        pytest.param(FixedBatch(), "net.onnx", "FixedBatch cannot be written as ONNX", id="batch-onnx"),
        pytest.param(Local(), "net.pt", r"Local cannot be written as the whole .*\.pt2 or \.onnx", id="pickle"),
        pytest.param(nn.Identity(), "net.zip", r"'.*net.zip' names no format; expected one of \.pt \(", id="ending"),
        pytest.param(nn.Identity(), "net", "names no format", id="no-ending"),
    ],
)
def test_what_cannot_be_written_is_said_and_leaves_nothing(tmp_path, net, name, says):
    with pytest.raises(BatchNormError, match=says):
        ship_network(net.eval(), torch.ones(2, 4), tmp_path / "folder" / name)
    assert list(tmp_path.iterdir()) == []


def test_a_network_in_training_mode_is_refused(tmp_path):
    with pytest.raises(BatchNormError, match="Linear is in training mode"):
        ship_network(nn.Linear(2, 1), torch.ones(2, 2), tmp_path / "net.pt")


def test_what_onnx_takes_is_asked_for_before_anything_runs(monkeypatch):
    monkeypatch.setattr(ship, "find_spec", lambda name: None)
    with pytest.raises(BatchNormError, match=r"onnx and onnxscript: pip install 'bn-lightning\[export\]'"):
        require_format("net.onnx")
    require_format("net.pt2")
