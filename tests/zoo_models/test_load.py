"""Networks by name, and their weights from files."""

import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from bn_lightning.errors import BatchNormError
from bn_lightning.zoo import default_input_size, is_zoo_name, load_checkpoint, load_zoo_model, read_checkpoint

NETWORKS = """
    import torch
    from torch import nn

    number = 3
    ready = nn.Linear(2, 1)

    class Net(nn.Sequential):
        def __init__(self, num_classes=5):
            super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(num_classes))

    def small():
        return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))

    def needs_width(width):
        return nn.Linear(width, width)

    def returns_a_list():
        return [nn.Linear(2, 2)]

    def breaks():
        raise RuntimeError("the data is not there")
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of somebody's own, on the path for one test."""
    (tmp_path / "networks_of_mine.py").write_text(textwrap.dedent(NETWORKS))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "networks_of_mine"
    sys.modules.pop("networks_of_mine", None)


def small(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
        net[1].running_mean.normal_()
    return net


def same(net, other):
    return all(torch.equal(value, other.state_dict()[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("zoo", ["timm", "torchvision"])
def test_a_zoo_builds_its_network(zoo):
    pytest.importorskip(zoo)
    net = load_zoo_model(f"{zoo}:resnet18", num_classes=7)
    assert type(net).__module__.split(".")[0] == zoo
    assert net.fc.out_features == 7
    assert net.training
    assert default_input_size(net) == (3, 224, 224)
    assert load_zoo_model(f"{zoo}:resnet18").fc.out_features == 1000


def test_timm_says_its_own_input_size_and_takes_its_tags():
    pytest.importorskip("timm")
    assert default_input_size(load_zoo_model("timm:inception_v3.tf_in1k")) == (3, 299, 299)


def test_torchvision_without_pretrained_downloads_no_backbone(monkeypatch):
    pytest.importorskip("torchvision")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *args, **kwargs: pytest.fail("a download"))
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda *args, **kwargs: pytest.fail("a download")
    )
    assert load_zoo_model("torchvision:lraspp_mobilenet_v3_large", num_classes=2)


def test_networks_that_take_no_images_say_no_size():
    pytest.importorskip("torchvision")
    assert default_input_size(load_zoo_model("torchvision:mc3_18")) is None
    assert default_input_size(nn.Linear(2, 1)) is None


def test_a_callable_is_imported_and_called(mine):
    assert load_zoo_model(f"{mine}:Net", num_classes=3)[3].out_features == 3
    assert load_zoo_model(f"{mine}:Net")[3].out_features == 5
    assert len(load_zoo_model(f"{mine}:small")) == 2
    assert load_zoo_model(f"{mine}:ready") is sys.modules[mine].ready
    assert is_zoo_name("timm:resnet18")
    assert not is_zoo_name(f"{mine}:Net")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        pytest.param("resnet18", "'resnet18' does not say where .* 'timm:resnet50'", id="no-zoo"),
        pytest.param("timm:", "does not say where", id="no-name"),
        pytest.param("tim:resnet18", r"'tim', which cannot be imported .*No module.*did you mean 'timm'", id="zoo"),
        pytest.param("timm:resnet81", r"timm .* has no 'resnet81' \(did you mean 'resnet18'", id="timm"),
        pytest.param("timm:resnet18.nobody", "'timm:resnet18.nobody' could not be built .*nobody", id="tag"),
        pytest.param("torchvision:resnet81", r"torchvision .* has no 'resnet81' \(did you mean", id="torchvision"),
        pytest.param("networks_of_mine:Met", r"has no 'Met' \(did you mean 'Net'", id="attribute"),
        pytest.param("networks_of_mine:number", "is a int; expected a function or class", id="not-callable"),
        pytest.param("networks_of_mine:needs_width", "cannot be called with no arguments .*'width'", id="arguments"),
        pytest.param("networks_of_mine:returns_a_list", "returned a list; expected a torch.nn.Module", id="no-module"),
        pytest.param("networks_of_mine:breaks", "could not be built .*the data is not there", id="raises"),
    ],
)
def test_what_is_wrong_with_a_name_is_said(mine, name, says):
    if ":" in name and (package := name.split(":")[0]) in ("timm", "torchvision"):
        pytest.importorskip(package)
    with pytest.raises(BatchNormError, match=says):
        load_zoo_model(name)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        pytest.param("small", {"num_classes": 3}, "cannot be called with num_classes=3", id="no-such-option"),
        pytest.param("ready", {"num_classes": 3}, "is a Linear; expected .* with num_classes=3", id="built-already"),
        pytest.param("small", {"pretrained": True}, "pretrained=True is for timm, torchvision and hf", id="pretrained"),
        pytest.param("small", {"pretrained": True, "checkpoint": "x"}, "weights twice", id="weights-twice"),
    ],
)
def test_options_that_do_not_apply_are_refused(mine, name, options, says):
    with pytest.raises(BatchNormError, match=says):
        load_zoo_model(f"{mine}:{name}", **options)


@pytest.mark.parametrize(("zoo", "package"), [("timm", "timm"), ("torchvision", "torchvision"), ("hf", "transformers")])
def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch, zoo, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BatchNormError, match=rf"needs the package {package}.*pip install 'bn-lightning\[zoo\]'"):
        load_zoo_model(f"{zoo}:resnet18")


def test_a_name_imports_nothing_else():
    code = """
        import sys
        from bn_lightning.zoo import load_zoo_model
        load_zoo_model("torch.nn:Identity")
        heavy = ("timm", "torchvision", "transformers", "lightning", "safetensors")
        print([name for name in heavy if name in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("under", [None, "state_dict", "model"])
def test_a_checkpoint_is_found_under_its_key_and_prefix(tmp_path, prefix, under):
    trained, net = small(1), small(2)
    state = trained.state_dict(prefix=prefix)
    torch.save(state if under is None else {under: state, "epoch": 3}, tmp_path / "weights.pt")
    parameters = [id(parameter) for parameter in net.parameters()]
    load_checkpoint(net, tmp_path / "weights.pt")
    assert same(net, trained)
    assert [id(parameter) for parameter in net.parameters()] == parameters


def test_a_prefix_that_belongs_to_the_network_stays(tmp_path):
    inside = nn.ModuleDict({"model": nn.ModuleDict({"model": small(1)})})
    torch.save(inside.state_dict(), tmp_path / "weights.pt")
    net = nn.ModuleDict({"model": nn.ModuleDict({"model": small(2)})})
    load_checkpoint(net, tmp_path / "weights.pt")
    assert same(net, inside)
    load_checkpoint(net["model"], tmp_path / "weights.pt")  # one of two taken off


def test_a_safetensors_file(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    trained, net = small(1), small(2)
    save_file(trained.state_dict(), tmp_path / "weights.safetensors")
    load_checkpoint(net, tmp_path / "weights.safetensors")
    assert same(net, trained)


def test_module_versions_come_along(tmp_path):
    """torchvision's MNASNet refuses weights that do not say which version of it wrote them."""
    pytest.importorskip("torchvision")
    net = load_zoo_model("torchvision:mnasnet0_5")
    torch.save(nn.DataParallel(net).state_dict(), tmp_path / "weights.pt")
    load_checkpoint(load_zoo_model("torchvision:mnasnet0_5"), tmp_path / "weights.pt")
    inside = nn.ModuleDict({"model": net})
    torch.save(inside.state_dict(), tmp_path / "weights.pt")
    load_checkpoint(inside, tmp_path / "weights.pt")


def test_weights_of_before_batches_were_counted_load(tmp_path):
    state = {key: value for key, value in small(1).state_dict().items() if "num_batches" not in key}
    torch.save(dict(state), tmp_path / "weights.pt")
    load_checkpoint(net := small(2), tmp_path / "weights.pt")
    assert torch.equal(net[1].running_mean, state["1.running_mean"])
    del state["0.bias"]
    torch.save(dict(state), tmp_path / "weights.pt")
    with pytest.raises(BatchNormError, match=r"the file lacks '0.bias'\. Load"):
        load_checkpoint(small(2), tmp_path / "weights.pt")


WRONG = {
    "missing": lambda state: state.pop("2.bias"),
    "unknown": lambda state: state.update(head=torch.ones(1)),
    "shape": lambda state: state.update({"2.weight": torch.ones(4, 3)}),
    "no-tensor": lambda state: state.update({"2.bias": "zero"}),
    "many": lambda state: [state.pop(key) for key in list(state)[1:]],
}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        pytest.param("missing", "the file lacks '2.bias'", id="missing"),
        pytest.param("unknown", "the network lacks 'head'", id="unknown"),
        pytest.param("shape", r"'2.weight' is \[4, 3\] in the file and \[1, 3\] in the network", id="shape"),
        pytest.param("no-tensor", r"'2.bias' is a str in the file", id="no-tensor"),
        pytest.param("many", r"the file lacks '0.bias', '1.weight', '1.bias' and 4 more", id="many"),
    ],
)
def test_keys_that_do_not_fit_are_named_and_nothing_is_half_loaded(tmp_path, prefix, wrong, says):
    state = small(1).state_dict()
    WRONG[wrong](state)
    torch.save({prefix + key: value for key, value in state.items()}, tmp_path / "weights.pt")
    net, before = small(2), small(2)
    with pytest.raises(BatchNormError, match=f"do not fit Sequential, and none were loaded: {says}"):
        load_checkpoint(net, tmp_path / "weights.pt")
    assert same(net, before)


def test_an_interrupt_leaves_the_network_as_it_was(tmp_path):
    class Interrupted(nn.Linear):
        def _load_from_state_dict(self, state_dict, prefix, *args):
            super()._load_from_state_dict(state_dict, prefix, *args)
            if not torch.equal(state_dict[prefix + "weight"], kept):
                raise KeyboardInterrupt

    net = nn.Sequential(nn.Linear(2, 2), Interrupted(2, 2))
    kept, before = net[1].weight.detach().clone(), {key: value.clone() for key, value in net.state_dict().items()}
    torch.save(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(KeyboardInterrupt):
        load_checkpoint(net, tmp_path / "weights.pt")
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


class Anything:
    """Not on anybody's list of safe classes."""


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param(Anything(), "holds Python objects", id="object"),
        pytest.param(small(), "holds Python objects", id="whole-network"),
        pytest.param({"state_dict": small().state_dict(), "hparams": Anything()}, "Python objects", id="object-beside"),
        pytest.param([torch.ones(1)], "holds a list; expected a state_dict", id="list"),
        pytest.param({"net": {"a": torch.ones(1)}, "epoch": 3}, "holds 'net', 'epoch'; expected the keys", id="keys"),
        pytest.param({}, "holds nothing; expected", id="empty"),
        pytest.param({0: torch.ones(1)}, "holds 0; expected", id="numbers"),
        pytest.param({"state_dict": {}}, "the file lacks '0.weight'", id="empty-inside"),
    ],
)
def test_files_that_hold_something_else_are_refused(tmp_path, content, says):
    torch.save(content, tmp_path / "weights.pt")
    net, before = small(2), small(2)
    with pytest.raises(BatchNormError, match=says):
        load_checkpoint(net, tmp_path / "weights.pt")
    assert same(net, before)


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    (tmp_path / "notes.pt").write_text("not weights")
    with pytest.raises(BatchNormError, match="of another format"):
        read_checkpoint(tmp_path / "notes.pt")
    (tmp_path / "half.pt").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(BatchNormError, match="cannot be read as tensors"):
        read_checkpoint(tmp_path / "half.pt")
    for missing in (tmp_path / "nothing.pt", tmp_path):
        with pytest.raises(BatchNormError, match="there is no checkpoint file"):
            read_checkpoint(missing)
    with pytest.raises(BatchNormError, match="there is no checkpoint file"):
        load_zoo_model("torch.nn:Identity", checkpoint=tmp_path / "nothing.pt")
