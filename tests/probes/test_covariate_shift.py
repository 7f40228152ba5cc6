"""The gradients of layers whose predecessors took a step, against copies that are really stepped, layer by layer."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from probes.probed import FailsAt, State, batch, perceptron
from torch import nn

from bn_lightning.errors import BatchNormError
from bn_lightning.probes import internal_covariate_shift


def slow_shifts(network, pair, learning_rate, modules):
    """For each weight in a list of modules in order, step the parameters of all modules before it in a copy."""
    network = copy.deepcopy(network).train()
    F.cross_entropy(network(pair[0]), pair[1]).backward()
    found = []
    for index, name in enumerate(modules):
        if network.get_submodule(name).weight.dim() < 2:
            continue
        stepped = copy.deepcopy(network)
        for earlier in modules[:index]:
            for parameter in network.get_submodule(earlier)._parameters:
                ours = getattr(stepped.get_submodule(earlier), parameter)
                ours.data -= learning_rate * getattr(network.get_submodule(earlier), parameter).grad
        stepped.zero_grad()
        F.cross_entropy(stepped(pair[0]), pair[1]).backward()
        before = network.get_submodule(name).weight.grad.double().flatten()
        after = stepped.get_submodule(name).weight.grad.double().flatten()
        found.append(
            (
                name,
                before.norm().item(),
                (before - after).norm().item(),
                F.cosine_similarity(before, after, dim=0).item(),
            )
        )
    return found


def test_every_layer_is_that_of_copies_that_are_really_stepped():
    network, pair = perceptron(), batch()
    found = internal_covariate_shift(network, F.cross_entropy, pair, learning_rate=0.5)
    slow = slow_shifts(network, pair, 0.5, ["0", "1", "4", "5", "8"])
    assert [row.name for row in found.layers] == ["0", "4", "8"] == [row[0] for row in slow]
    for row, (_, norm, shift, cosine) in zip(found.layers, slow, strict=True):
        assert row.gradient_norm == pytest.approx(norm, rel=1e-5)
        assert row.shift == pytest.approx(shift, rel=1e-4, abs=1e-12)
        assert row.cosine == pytest.approx(cosine, rel=1e-6)
    assert found.layers[1].shift > 0.01 * found.layers[1].gradient_norm


class Backwards(nn.Module):
    """Calls its layers in another order than that of their registration."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.last, self.first = nn.Linear(8, 3), nn.Linear(6, 8)

    def forward(self, x):
        return self.last(self.first(x).tanh())


def test_layers_come_in_the_order_of_their_calls():
    network, pair = Backwards(), batch()
    found = internal_covariate_shift(network, F.cross_entropy, pair, learning_rate=0.5)
    slow = slow_shifts(network, pair, 0.5, ["first", "last"])
    assert [(row.name, row.shift) for row in found.layers] == [
        (name, pytest.approx(shift, rel=1e-4)) for name, _, shift, _ in slow
    ]


def test_of_a_linear_network_it_is_the_closed_form():
    # L = (w₂w₁)²/2: G₂ = w₂w₁², and with w₁' = w₁ − η·w₁w₂² it is w₂w₁'².
    network = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
    w1, w2, rate = 1.5, -0.8, 0.1
    nn.init.constant_(network[0].weight, w1)
    nn.init.constant_(network[1].weight, w2)
    found = internal_covariate_shift(
        network,
        None,
        torch.ones(1, 1, dtype=torch.float64),
        learning_rate=rate,
        step=lambda model, x: model(x).square().sum() / 2,
    )
    moved = w1 - rate * w1 * w2**2
    assert found.layers[1].shift == pytest.approx(abs(w2 * w1**2 - w2 * moved**2), rel=1e-12)
    assert found.layers[1].cosine == 1.0


def test_include_measures_some_while_all_take_their_step():
    network, pair = perceptron(), batch()
    whole = internal_covariate_shift(network, F.cross_entropy, pair, learning_rate=0.5)
    one = internal_covariate_shift(network, F.cross_entropy, pair, learning_rate=0.5, include=("8",))
    assert one.layers == whole.layers[2:]


def test_it_takes_one_pass_a_layer_and_gives_the_network_back_also_after_an_error():
    for call in range(3):
        network = nn.Sequential(perceptron(dropout=0.2), FailsAt(call))
        network.eval()
        state = State(network)
        with pytest.raises(ArithmeticError, match="stop"):
            internal_covariate_shift(network, F.cross_entropy, batch(), learning_rate=0.5)
        state.assert_back()
    network = nn.Sequential(perceptron(), FailsAt(3))  # there is no fourth pass
    state = State(network)
    internal_covariate_shift(network, F.cross_entropy, batch(), learning_rate=0.5)
    state.assert_back()


@pytest.mark.parametrize(
    ("name", "include"),
    [("resnet18", ["conv1", "*.0.conv1", "fc"]), ("resnetv2_50", ["stem.conv", "*.0.conv1", "*fc"])],
)
def test_zoo_networks(name, include):
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=4, zero_init_last=False)
    pair = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    found = internal_covariate_shift(network, F.cross_entropy, pair, learning_rate=0.1, include=include)
    assert len(found.layers) > 4
    assert found.layers[0].shift == 0
    assert all(row.shift > 0 for row in found.layers[1:])
    assert found.layers[-1].name in ("fc", "head.fc")


def test_refuses_what_has_no_layers_and_shows_itself():
    with pytest.raises(BatchNormError, match="no layer to measure"):
        internal_covariate_shift(nn.BatchNorm1d(6), F.cross_entropy, batch(), learning_rate=0.5)
    with pytest.raises(BatchNormError, match="learning_rate must be positive"):
        internal_covariate_shift(perceptron(), F.cross_entropy, batch(), learning_rate=0)
    found = internal_covariate_shift(perceptron(), F.cross_entropy, batch(), learning_rate=0.5)
    assert "cosine" in str(found)
    assert found.scalars()["4/gradient_cosine"] == found.layers[1].cosine
    assert len(found.figure().axes) == 2
    assert found.to_dict()["layers"][0]["shift"] == 0
