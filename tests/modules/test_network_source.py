"""A network by name, by class path and as an object."""

import sys
from types import SimpleNamespace

import pytest
import timm
import torch
from batch_normed import randomized
from torch import nn

from bn_lightning.errors import BatchNormError
from bn_lightning.modules.network_source import open_source, require_plain
from bn_lightning.networks import ResidualNetwork
from bn_lightning.zoo import WeightsWarning


class Wrapped(nn.Module):
    def __init__(self, inner, scale=1.0):
        super().__init__()
        self.inner, self.scale = inner, scale

    def forward(self, x):
        return self.scale * self.inner(x)


LINEAR = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 2, "out_features": 3}}


def test_names_of_each_source():
    assert isinstance(open_source("residual", 4, network_options={"widths": (4,)}), ResidualNetwork)
    of_timm = open_source("timm:test_resnet", 4)
    assert type(of_timm) is type(timm.create_model("test_resnet"))
    assert of_timm.num_classes == 4
    assert isinstance(open_source("bn_lightning.networks:ResidualNetwork", 4), ResidualNetwork)
    network = nn.Linear(2, 2)
    assert open_source(network, 4) is network


def test_a_class_path_may_hold_another(monkeypatch):
    monkeypatch.setitem(sys.modules, "their_networks", SimpleNamespace(Wrapped=Wrapped))
    network = open_source({"class_path": "their_networks.Wrapped", "init_args": {"inner": LINEAR, "scale": 2.0}}, 3)
    assert isinstance(network.inner, nn.Linear)
    assert network(torch.zeros(1, 2)).shape == (1, 3)
    assert network.scale == 2.0


@pytest.mark.parametrize("source", ["residual", "timm:test_resnet", "object"])
def test_weights_of_a_file(tmp_path, source):
    def built():
        return open_source(ResidualNetwork() if source == "object" else source, 10)

    trained = randomized(built())
    torch.save({"state_dict": trained.state_dict(prefix="module.")}, tmp_path / "weights.pt")
    given = ResidualNetwork() if source == "object" else source
    loaded = open_source(given, 10, checkpoint=str(tmp_path / "weights.pt"))
    for name, value in trained.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    torch.save(dict(trained.named_parameters()), tmp_path / "weights.pt")
    with pytest.warns(WeightsWarning, match="no running statistics for all"):
        open_source(given, 10, checkpoint=str(tmp_path / "weights.pt"))


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        pytest.param("resnet50", {}, "no network is called 'resnet50'", id="zoo left out"),
        pytest.param("timm:resnet5", {}, "timm .* has no 'resnet5'", id="zoo name"),
        pytest.param(
            "timm:test_resnet", {"network_options": {"widths": (4,)}}, "network_options= are for a network of", id="zoo"
        ),
        pytest.param(nn.Linear(2, 2), {"network_options": {"a": 1}}, "given by name; got a Linear", id="object"),
        pytest.param(LINEAR, {"network_options": {"a": 1}}, "has its own", id="class path with options"),
        pytest.param("residual", {"pretrained": True}, "pretrained=True is for a zoo's name", id="own pretrained"),
        pytest.param({"init_args": {}}, {}, r"\{'class_path': 'package.module.Class'", id="no class_path"),
        pytest.param({"class_path": "Linear"}, {}, "'package.module.Class'", id="no module"),
        pytest.param({**LINEAR, "init_arg": {}}, {}, "got .*'init_arg'", id="misspelt"),
        pytest.param({"class_path": "torch.nn.Liner"}, {}, "has no 'Liner'", id="no such class"),
        pytest.param(
            {"class_path": "torch.nn.Linear", "init_args": {"in_features": 2}},
            {},
            "'torch.nn.Linear' cannot be built with init_args .*out_features",
            id="arguments",
        ),
        pytest.param(
            {"class_path": "os.getenv", "init_args": {"key": "HOME"}},
            {},
            "'os.getenv' is no subclass of torch.nn.Module; a function .* is named 'os:getenv'",
            id="a function is not called",
        ),
    ],
)
def test_what_does_not_fit_is_named(source, options, message):
    with pytest.raises(BatchNormError, match=message):
        open_source(source, 10, **options)


def test_plain_values():
    require_plain("options", {"a": [1, 2.0, None, True, "x"], "b": {"c": (1, 2)}})
    with pytest.raises(BatchNormError, match=r"options\['a'\]\[1\] is a Tensor; expected names, numbers"):
        require_plain("options", {"a": [1, torch.zeros(1)]})
