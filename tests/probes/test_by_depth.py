"""Channel moments and gradient norms by depth, against hooks and NumPy in float64."""

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
from bn_lightning.probes import channel_moments_by_depth, gradient_norms_by_depth


def slow_outputs(network, pair, names):
    """Run a copy in float64, and return each layer's output and its gradient."""
    network, outputs = copy.deepcopy(network).double().train(), {}

    def keep(name):
        def hook(module, args, output):
            outputs[name] = output
            output.retain_grad()

        return hook

    for name in names:
        network.get_submodule(name).register_forward_hook(keep(name))
    F.cross_entropy(network(pair[0].double()), pair[1]).backward()
    weights = {name: network.get_submodule(name).weight.grad.norm().item() for name in names}
    return [(name, each.detach().numpy(), each.grad.norm().item(), weights[name]) for name, each in outputs.items()]


def convolutional():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(45, 3)
    )


CASES = {
    "linear": (perceptron, batch(), ["0", "4", "8"]),
    "convolutional": (convolutional, (2 + torch.randn(6, 3, 7, 7), torch.tensor([0, 1, 2, 0, 1, 2])), ["0", "3", "5"]),
}


@pytest.mark.parametrize(("build", "pair", "names"), CASES.values(), ids=CASES)
def test_moments_and_norms_are_those_of_the_outputs(build, pair, names):
    network = build()
    moments = channel_moments_by_depth(network, pair)
    norms = gradient_norms_by_depth(network, F.cross_entropy, pair)
    slow = slow_outputs(network, pair, names)
    assert [row.name for row in moments.layers] == [row.name for row in norms.layers] == [name for name, *_ in slow]
    for row, norm, (_, output, gradient, weight) in zip(moments.layers, norms.layers, slow, strict=True):
        axes = (0, *range(2, output.ndim))
        assert row.mean == pytest.approx(output.mean(axes), rel=1e-4, abs=1e-6)
        assert row.variance == pytest.approx(output.var(axes), rel=1e-4)
        assert row.mean_size == pytest.approx(np.abs(output.mean(axes)).mean(), rel=1e-4)
        assert (norm.weight, norm.output) == pytest.approx((weight, gradient), rel=1e-4)


def test_without_normalization_variances_and_gradients_grow_by_the_gain_and_with_it_they_do_not():
    def deep(normalize):
        torch.manual_seed(0)
        layers = []
        for _ in range(12):
            layers += [nn.Linear(128, 128, bias=False), *([nn.BatchNorm1d(128)] if normalize else [])]
            nn.init.normal_(layers[-1 - normalize].weight, std=2 / math.sqrt(128))  # a gain of 2, a variance of 4
        return nn.Sequential(*layers, nn.Linear(128, 3))

    x = torch.randn(256, 128)
    pair = x, torch.zeros(256, dtype=torch.long)
    for normalize, growth in ((False, 4.0), (True, 1.0)):
        rows = channel_moments_by_depth(deep(normalize), x).layers
        assert (rows[11].mean_variance / rows[0].mean_variance) ** (1 / 11) == pytest.approx(growth, rel=0.1)
    shrink = [row.output for row in gradient_norms_by_depth(deep(False), F.cross_entropy, pair).layers]
    assert (shrink[0] / shrink[11]) ** (1 / 11) == pytest.approx(2, rel=0.1)


def test_include_names_layers_of_any_kind_and_one_that_does_not_run_has_its_reason():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused, self.act = nn.Linear(6, 3), nn.Linear(6, 3), nn.ReLU()

        def forward(self, x):
            return self.act(self.used(x))

    found = channel_moments_by_depth(Skips(), batch())
    assert [(row.name, row.reason) for row in found.layers] == [("used", None), ("unused", "not called")]
    assert "'unused': not called" in str(found)
    assert "unused/channel_variance" not in found.scalars()
    found.figure()
    assert [row.name for row in channel_moments_by_depth(Skips(), batch(), include=["act"]).layers] == ["act"]
    norms = gradient_norms_by_depth(Skips(), F.cross_entropy, batch())
    assert [(row.name, row.weight > 0) for row in norms.layers] == [("used", True), ("unused", False)]
    assert "the output of 'unused' was not measured: no gradient came back" in str(norms)
    norms.figure()


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = perceptron()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.network(batch["x"]), batch["y"])


def test_a_lightning_module_by_its_training_step():
    pair, module = batch(), Module()
    given = {"x": pair[0], "y": pair[1]}

    def step(module, batch):
        return module.training_step(batch, 0)

    moments, norms = (
        channel_moments_by_depth(module, given, step=step),
        gradient_norms_by_depth(module, None, given, step=step),
    )
    plain = channel_moments_by_depth(perceptron(), pair), gradient_norms_by_depth(perceptron(), F.cross_entropy, pair)
    assert [row.mean for row in moments.layers] == [row.mean for row in plain[0].layers]
    assert [row.output for row in norms.layers] == [row.output for row in plain[1].layers]


@pytest.mark.parametrize("name", ["resnet18", "resnetv2_50"])
def test_zoo_networks_under_autocast_and_with_variants(name):
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=4)
    pair = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    norm = "norm" if name == "resnetv2_50" else "bn"
    convert_batch_norm(network, "noisy", include=(f"*.0.{norm}1",))
    convert_batch_norm(network, "renorm", include=(f"*.1.{norm}2",))
    with torch.autocast("cpu", torch.bfloat16):
        moments = channel_moments_by_depth(network, pair)
        norms = gradient_norms_by_depth(network, F.cross_entropy, pair)
    layers = [each for each, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert sorted(row.name for row in moments.layers) == sorted(row.name for row in norms.layers) == sorted(layers)
    assert all(math.isfinite(row.mean_variance) and row.reason is None for row in moments.layers)
    assert all(math.isfinite(row.output) and row.reason is None for row in norms.layers)


@pytest.mark.parametrize(
    "probe", [channel_moments_by_depth, lambda network, pair: gradient_norms_by_depth(network, F.cross_entropy, pair)]
)
def test_it_takes_one_pass_and_gives_the_network_back_also_after_an_error(probe):
    network, calls = perceptron(dropout=0.2).eval(), []
    network.register_forward_hook(lambda *_: calls.append(1))
    state = State(network)
    probe(network, batch())
    state.assert_back()
    assert calls == [1]
    broken = nn.Sequential(network, FailsAt(0))
    state = State(broken)
    with pytest.raises(ArithmeticError, match="stop"):
        probe(broken, batch())
    state.assert_back()


def test_refuses_what_has_no_layers_and_shows_itself():
    with pytest.raises(BatchNormError, match="no convolution or linear layer to measure"):
        channel_moments_by_depth(nn.Sequential(nn.BatchNorm1d(6)), batch())
    with pytest.raises(BatchNormError, match="step=lambda"):
        channel_moments_by_depth(perceptron(), {"x": 1})
    for found in (
        channel_moments_by_depth(perceptron(), batch()),
        gradient_norms_by_depth(perceptron(), F.cross_entropy, batch()),
    ):
        assert "<table>" in found._repr_html_()
        assert found.to_dict()["layers"][0]["name"] == "0"
        assert all(isinstance(value, float) for value in found.scalars().values())
        assert len(found.figure().axes) == 2
