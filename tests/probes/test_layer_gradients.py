"""Tails and coherence of weight gradients, against sums over every example and place, one by one, in float64."""

import copy
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from probes.probed import FailsAt, State, batch, perceptron
from torch import nn

from bn_lightning.errors import BatchNormError
from bn_lightning.probes import gradient_coherence, gradient_tails, relative_loss


def slow_tail(gradient):
    g = gradient.double().numpy().ravel()
    centred = g - g.mean()
    return np.linalg.norm(g), g.std(), np.abs(g).max(), (centred**4).mean() / (centred**2).mean() ** 2 - 3


def test_tails_are_those_of_numpy():
    network, pair = perceptron(), batch()
    found = gradient_tails(network, F.cross_entropy, pair)
    F.cross_entropy(network(pair[0]), pair[1]).backward()
    assert [row.name for row in found.layers] == ["0", "4", "8"]
    for row in found.layers:
        gradient = network.get_submodule(row.name).weight.grad
        assert (row.norm, row.std, row.largest, row.kurtosis) == pytest.approx(slow_tail(gradient), rel=1e-5)
        edges = np.linspace(-row.largest, row.largest, 42)
        expected, _ = np.histogram(gradient.numpy().astype(np.float64), edges)
        assert sum(row.counts) == gradient.numel()
        assert np.abs(np.cumsum(row.counts) - np.cumsum(expected)).max() <= 1  # an element at an edge
    assert found.median_kurtosis == sorted(row.kurtosis for row in found.layers)[1]


def test_a_heavy_tail_has_a_large_kurtosis_and_no_gradient_has_none():
    heavy = nn.Linear(1000, 1, bias=False)
    x = torch.ones(1, 1000)
    x[0, 0] = 100.0
    row = gradient_tails(heavy, None, x, step=lambda model, x: model(x).sum()).layers[0]
    assert row.kurtosis == pytest.approx(996, abs=1)  # one of n apart from the rest: n − 6 + …
    still = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    found = gradient_tails(still, None, torch.ones(1, 2), step=lambda model, x: model[0](x).sum(), include=("1",))
    assert math.isnan(found.layers[0].kurtosis)
    assert found.layers[0].norm == 0
    found.figure()


CONVOLUTIONS = [
    pytest.param(lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (3, 4, 7, 7), id="grouped"),
    pytest.param(lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (3, 4, 5, 5), id="circular"),
    pytest.param(lambda: nn.Conv1d(4, 5, 3, dilation=2, bias=False), (3, 4, 9), id="dilated"),
    pytest.param(lambda: nn.ConvTranspose2d(4, 3, 3, stride=2), (2, 4, 3, 3), id="transposed"),
    pytest.param(lambda: nn.Linear(4, 5), (3, 2, 4), id="linear-on-sequences"),
]


def slow_sums(layer, x, coefficients):
    """Add up d and |d| over every example and every output, one backward pass for each."""
    layer, x = copy.deepcopy(layer).double(), x.double()
    total, sizes = torch.zeros_like(layer.weight), torch.zeros_like(layer.weight)
    inputs = [(n, place) for n in range(len(x)) for place in np.ndindex(*x.shape[1:])]
    if isinstance(layer, nn.ConvTranspose2d):  # each product of one input value and one output's gradient is one d
        for n, place in inputs:
            one = torch.zeros_like(x[n : n + 1])
            one[(0, *place)] = x[(n, *place)]
            output = layer(one)
            for where in np.ndindex(*output.shape[1:]):
                (d,) = torch.autograd.grad(
                    output[(0, *where)] * coefficients[(n, *where)], layer.weight, retain_graph=True
                )
                total += d
                sizes += d.abs()
        return sizes, total
    for n in range(len(x)):
        output = layer(x[n : n + 1])
        for where in np.ndindex(*output.shape[1:]):
            (d,) = torch.autograd.grad(output[(0, *where)] * coefficients[(n, *where)], layer.weight, retain_graph=True)
            total += d
            sizes += d.abs()
    return sizes, total


@pytest.mark.parametrize(("build", "shape"), CONVOLUTIONS)
def test_coherence_is_that_of_every_product_one_by_one(build, shape):
    torch.manual_seed(1)
    layer, x = build(), torch.randn(shape)
    coefficients = torch.randn(layer(x).shape).double()
    row = gradient_coherence(layer, None, x, step=lambda model, x: (model(x) * coefficients).sum()).layers[0]
    sizes, total = slow_sums(layer, x, coefficients)
    assert row.sum_of_sizes == pytest.approx(sizes.mean().item(), rel=1e-5)
    assert row.size_of_sum == pytest.approx(total.abs().mean().item(), rel=1e-5)
    assert row.coherence == pytest.approx((total.abs().mean() / sizes.mean()).item(), rel=1e-5)


def test_an_activation_in_place_and_a_layer_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(6, 6)

        def forward(self, x):
            return F.relu(self.layer(F.relu(self.layer(x), inplace=True)), inplace=True)

    network, x = Twice(), batch()[0]
    row = gradient_coherence(network, None, x, step=lambda model, x: model(x).sum()).layers[0]
    first = F.linear(x, network.layer.weight, network.layer.bias).detach()
    second = F.linear(first.relu(), network.layer.weight, network.layer.bias).detach()
    behind = (second > 0).float()
    before = (behind @ network.layer.weight.detach()) * (first > 0)
    sizes = behind.abs().T @ first.relu().abs() + before.abs().T @ x.abs()
    total = behind.T @ first.relu() + before.T @ x
    assert row.sum_of_sizes == pytest.approx(sizes.mean().item(), rel=1e-5)
    assert row.size_of_sum == pytest.approx(total.abs().mean().item(), rel=1e-5)


def test_layers_that_are_no_sum_of_products_are_rows_with_the_reason():
    network = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 3))
    found = gradient_coherence(network, F.cross_entropy, (torch.tensor([[0, 1], [2, 3]]), torch.tensor([0, 1])))
    assert "Embedding is neither" in found.layers[0].reason
    assert found.mean_coherence == found.layers[1].coherence
    assert "'0' was not measured" in str(found)
    assert "0/gradient_coherence" not in found.scalars()


@pytest.mark.parametrize("probe", [gradient_tails, gradient_coherence, relative_loss])
def test_the_network_comes_back_bit_for_bit_also_after_an_error(probe):
    network, pair = perceptron(dropout=0.2).eval(), batch()
    state = State(network)
    probe(network, F.cross_entropy, pair)
    state.assert_back()
    broken = nn.Sequential(network, FailsAt(0))
    state = State(broken)
    with pytest.raises(ArithmeticError):
        probe(broken, F.cross_entropy, pair)
    state.assert_back()


@pytest.mark.parametrize("name", ["resnet18", "resnetv2_50"])
@pytest.mark.parametrize("autocast", [False, True])
def test_zoo_networks_also_under_autocast(name, autocast):
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=4, zero_init_last=False)
    pair = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = gradient_coherence(network, F.cross_entropy, pair)
        tails = gradient_tails(network, F.cross_entropy, pair)
    assert all(0 < row.coherence <= 1 + 1e-6 for row in found.layers)
    assert [row.name for row in found.layers] == [row.name for row in tails.layers]
    assert len(tails.layers) == sum(isinstance(each, nn.Conv2d | nn.Linear) for each in network.modules())


def test_relative_loss_is_the_loss_of_networks_that_are_really_moved():
    network, pair = perceptron(), batch()
    found = relative_loss(network, F.cross_entropy, pair, steps=(1e-2, 1e2), points=5)
    before = F.cross_entropy(network(pair[0]), pair[1])
    before.backward()
    for step, relative in zip((1e-2, 1e-1, 1.0, 1e1, 1e2), found.relative, strict=True):
        moved = copy.deepcopy(network)
        for ours, theirs in zip(moved.parameters(), network.parameters(), strict=True):
            ours.data -= step * theirs.grad
        assert relative == pytest.approx((F.cross_entropy(moved(pair[0]), pair[1]) / before).item(), rel=1e-4)
    assert found.best_step == found.landscape.steps[found.relative.index(min(found.relative))]


def test_a_loss_that_is_no_number_has_diverged_and_one_that_is_not_positive_is_refused():
    def step(model, batch):
        loss = model(batch).square().sum()
        return loss * (torch.nan if loss > 100 else 1)

    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, 1.0)
    found = relative_loss(layer, None, torch.ones(1, 1), steps=(0.5, 50.0), points=3, step=step)
    assert found.relative == (0.0, 81.0, math.inf)
    assert found.divergence_step == 50.0
    assert "diverges at 50" in str(found)
    calm = relative_loss(layer, None, torch.ones(1, 1), steps=(0.1, 0.5), points=2, step=step)
    assert calm.divergence_step is None
    assert calm.scalars()["divergence_step"] == math.inf
    assert "no step diverges" in str(calm)
    with pytest.raises(BatchNormError, match="positive loss"):
        relative_loss(layer, None, torch.ones(1, 1), step=lambda model, x: -model(x).square().sum())


def test_results_show_themselves():
    network, pair = perceptron(), batch()
    for probe, axes in ((gradient_tails, 3), (gradient_coherence, 2), (relative_loss, 1)):
        found = probe(network, F.cross_entropy, pair)
        assert len(found.figure().axes) == axes
        assert "<table>" in found._repr_html_()
        assert all(isinstance(value, float) for value in found.scalars().values())
        assert found.to_dict()
