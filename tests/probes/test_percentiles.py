"""Percentiles of layers' inputs and outputs against NumPy's, at one time and over time."""

import copy
import math

import lightning.pytorch as pl
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from probes.probed import FailsAt, State, batch, perceptron
from torch import nn

from bn_lightning.errors import BatchNormError
from bn_lightning.layers import convert_batch_norm
from bn_lightning.probes import PercentileHistory, activation_percentiles


def convolutional():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 5, 3))


IMAGES = 2 + torch.randn(5, 3, 7, 7, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("of", ["input", "output"])
@pytest.mark.parametrize("percentiles", [(15, 50, 85), (0, 33.3, 100)])
@pytest.mark.parametrize("channel", [None, 2])
def test_they_are_those_of_numpy(of, percentiles, channel):
    network, seen = convolutional(), {}
    found = activation_percentiles(
        network, IMAGES, include=["?"], exclude=["0"], of=of, percentiles=percentiles, channel=channel
    )
    slow = copy.deepcopy(network)
    for name, layer in slow.named_children():
        layer.register_forward_pre_hook(lambda module, args, name=name: seen.update({(name, "input"): args[0].clone()}))
        layer.register_forward_hook(lambda module, args, y, name=name: seen.update({(name, "output"): y.clone()}))
    slow(IMAGES)
    assert [row.name for row in found.layers] == ["1", "2", "3"]
    for row in found.layers:
        values = seen[row.name, of].detach().numpy()
        values = values if channel is None else values[:, channel]
        assert row.values == pytest.approx(np.percentile(values, percentiles), rel=1e-5, abs=1e-6)


def test_more_values_than_torch_takes_for_a_quantile():
    x = torch.arange(2.0**24 + 3, dtype=torch.float64).view(1, -1)
    row = activation_percentiles(nn.Sequential(nn.Identity()), x, include=["0"], step=lambda model, x: model[0](x))
    assert row.layers[0].values == pytest.approx([share * (2**24 + 2) for share in (0.15, 0.5, 0.85)], rel=1e-12)


def test_by_default_they_are_of_convolutions_and_linear_layers():
    found = activation_percentiles(perceptron(), batch())
    assert [row.name for row in found.layers] == ["0", "4", "8"]
    assert found.percentiles == (15, 50, 85)


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.twice, self.unused, self.pair = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.pair.forward = lambda x: "no tensor"

    def forward(self, x):
        self.pair(x)
        return self.twice(self.twice(x))


def test_what_is_not_measured_has_its_reason():
    x = batch()[0]
    network = Odd()
    twice, unused, pair = activation_percentiles(network, x).layers
    assert twice.values == pytest.approx(np.percentile(network.twice(x).detach().numpy(), (15, 50, 85)), rel=1e-5)
    assert (twice.reason, unused.reason) == ("called more than once, of which the first is measured", "not called")
    assert pair.reason == "there is no tensor in its output"
    assert math.isnan(unused.values[0])
    found = activation_percentiles(network, x)
    assert "'unused': not called" in str(found)
    assert {key.partition("/")[0] for key in found.scalars()} == {"twice"}
    x[0, 0] = torch.nan
    spoiled = activation_percentiles(perceptron(), x)
    assert math.isnan(spoiled.layers[0].values[1])
    assert spoiled.scalars().keys() == activation_percentiles(perceptron(), batch()).scalars().keys()


def test_over_time():
    torch.manual_seed(0)
    network, history = perceptron(), PercentileHistory()
    x = batch()[0]
    for step in (0, 10, 20):
        history.append(step, activation_percentiles(network, x, include=["8"]))
        network[8].bias.data += 1
    values = np.array(history.values("8"))
    np.testing.assert_allclose(values[1] - values[0], 1, rtol=1e-5)
    assert history.drift("8") == pytest.approx((2, 2, 2), rel=1e-5)
    axes = history.figure("8").axes[0]
    assert [line.get_label() for line in axes.lines] == ["15 %", "50 %", "85 %"]
    assert list(axes.lines[0].get_xdata()) == [0, 10, 20]
    assert history.to_dict()["steps"] == [0, 10, 20]
    with pytest.raises(BatchNormError, match="'9' was not measured at every time; the layers are '8'"):
        history.figure("9")
    with pytest.raises(BatchNormError, match="got \\(50,\\) of each output"):
        history.append(30, activation_percentiles(network, x, percentiles=(50,)))
    with pytest.raises(BatchNormError, match="none yet"):
        PercentileHistory().values("8")


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = perceptron()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.network(batch["x"]), batch["y"])


def test_a_lightning_module_by_its_training_step():
    pair, module = batch(), Module()
    found = activation_percentiles(
        module, {"x": pair[0], "y": pair[1]}, step=lambda module, batch: module.training_step(batch, 0)
    )
    assert [row.values for row in found.layers] == [
        row.values for row in activation_percentiles(perceptron(), pair).layers
    ]


@pytest.mark.parametrize("name", ["resnet18", "resnetv2_50"])
def test_zoo_networks_under_autocast_and_with_variants(name):
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=4)
    convert_batch_norm(network, "noisy", include=("*.0.norm1" if name == "resnetv2_50" else "*.0.bn1",))
    with torch.autocast("cpu", torch.bfloat16):
        found = activation_percentiles(network, torch.randn(2, 3, 32, 32), of="input")
    assert len(found.layers) == sum(isinstance(each, nn.Conv2d | nn.Linear) for each in network.modules())
    assert all(row.reason is None and row.values == tuple(sorted(row.values)) for row in found.layers)


def test_it_takes_one_pass_and_gives_the_network_back_also_after_an_error():
    network, calls = perceptron(dropout=0.2).eval(), []
    network.register_forward_hook(lambda *_: calls.append(1))
    for of in ("input", "output"):
        state = State(network)
        activation_percentiles(network, batch(), of=of)
        state.assert_back()
    assert calls == [1, 1]
    broken = nn.Sequential(network, FailsAt(0))
    state = State(broken)
    with pytest.raises(ArithmeticError, match="stop"):
        activation_percentiles(broken, batch())
    state.assert_back()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"percentiles": ()}, "at least one"),
        ({"percentiles": (50, 101)}, "between 0 and 100"),
        ({"of": "weight"}, "'output', 'input', got 'weight'"),
        ({"channel": 99}, r"of '0' has shape \(16, 8\), which has no such channel"),
        ({"include": ["nothing"]}, "matches none"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    network = perceptron()
    state = State(network)
    with pytest.raises(BatchNormError, match=message):
        activation_percentiles(network, batch(), **options)
    state.assert_back()


def test_shows_itself():
    found = activation_percentiles(perceptron(), batch())
    assert "85 %" in str(found)
    assert "<table>" in found._repr_html_()
    assert found.scalars()["8/output_p50"] == found.layers[2].values[1]
    assert found.to_dict()["layers"][0]["name"] == "0"
    assert len(found.figure().axes[0].lines) == 3
