"""Moving averages against Algorithm 2 by batch size: a slow second way, and the noise of an average in closed form."""

import copy
import math

import lightning.pytorch as pl
import pytest
import timm
import torch
import torch.nn.functional as F
from probes.probed import State, batch, perceptron
from torch import nn

from bn_lightning.errors import BatchNormError
from bn_lightning.layers import convert_batch_norm
from bn_lightning.probes import population_gap
from bn_lightning.recalibration import recalibrate_batch_norm


def normal(count, *shape):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("momentum", [0.1, 0.3])
def test_of_independent_normal_values_it_is_the_noise_of_a_moving_average(momentum):
    layer = nn.BatchNorm1d(400, momentum=momentum)
    found = population_gap(layer, [normal(8192, 400)], batch_sizes=(16, 64), steps=60)
    for size in (16, 64):
        assert found.median_gap(size) == pytest.approx(math.sqrt(1.5 * momentum / (2 - momentum) / size), rel=0.1)
    assert found.layers[0].variance_error > 1.5 * found.layers[1].variance_error


def slow_gap(network, x, size, steps):
    """Recalibrate a copy, let it train on, recalibrate another copy of that and read the gap there."""
    slow = copy.deepcopy(network).train()
    ordered = x[: len(x) // size * size].split(size)
    recalibrate_batch_norm(slow, ordered, tolerance=None)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        slow(x[torch.randperm(len(x), generator=generator)[:size]])
    return [(row.name, row.gap) for row in recalibrate_batch_norm(slow, ordered, tolerance=None).rows]


@pytest.mark.parametrize("training", [True, False])
def test_it_is_that_of_a_network_that_trains_on_and_is_recalibrated(training):
    network, x = perceptron().train(training), 2 + normal(70, 6)
    found = population_gap(network, [(x[:30], torch.zeros(30)), (x[30:], torch.ones(40))], batch_sizes=[16, 4], steps=7)
    assert found.batch_sizes == (4, 16)
    assert [(row.name, row.gap) for row in found.layers] == [
        (name, pytest.approx(gap, rel=1e-4)) for size in (4, 16) for name, gap in slow_gap(network, x, size, 7)
    ]


def test_passes_are_as_stated_and_the_network_comes_back_also_after_an_error():
    network, calls = perceptron(dropout=0.2).eval(), []
    network.register_forward_hook(lambda *_: calls.append(1))
    state = State(network)
    population_gap(network, [normal(40, 6)], batch_sizes=(4, 16), steps=5)
    state.assert_back()
    assert len(calls) == (5 + 10) + (5 + 2)
    for call in (1, 12):
        calls.clear()

        def fail(module, args, calls=calls, call=call):
            if len(calls) == call:
                raise ArithmeticError("stop")

        handle = network.register_forward_pre_hook(fail)
        state = State(network)
        with pytest.raises(ArithmeticError, match="stop"):
            population_gap(network, [normal(40, 6)], batch_sizes=(4,), steps=5)
        state.assert_back()
        handle.remove()


def test_layers_that_are_not_measured_have_their_reason():
    network = perceptron().train()
    network[1].eval()
    network.unused = nn.Sequential(nn.BatchNorm1d(8))
    found = population_gap(network, [normal(40, 6)], batch_sizes=(8,), step=lambda model, x: model[:9](x))
    reasons = {row.name: row.reason for row in found.layers}
    assert reasons["1"].startswith("frozen")
    assert reasons == {"1": reasons["1"], "5": None, "unused.0": "never reached"}
    assert "'unused.0' was not measured: never reached" in str(found)
    convert_batch_norm(network, "lp", include=("5",))
    network[5].running_mean = network[5].running_var = None
    alone = population_gap(
        network, [normal(40, 6)], batch_sizes=(8,), include=["5"], step=lambda model, x: model[:9](x)
    )
    assert alone.layers[0].reason == "it has no running statistics"
    assert math.isnan(alone.median_gap(8))
    alone.figure()


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = perceptron()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.network(batch["x"]), batch["y"])


def test_a_lightning_module_by_its_training_step():
    pair, module = batch(n=40), Module()
    data = [{"x": pair[0][:20], "y": pair[1][:20]}, {"x": pair[0][20:], "y": pair[1][20:]}]
    found = population_gap(
        module, data, batch_sizes=(8,), steps=5, step=lambda module, batch: module.training_step(batch, 0)
    )
    plain = population_gap(perceptron(), [pair], batch_sizes=(8,), steps=5)
    assert [row.gap for row in found.layers] == [row.gap for row in plain.layers]


@pytest.mark.parametrize("name", ["resnet18", "resnetv2_50"])
def test_zoo_networks_under_autocast_and_with_variants(name):
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=4)
    norm = "norm" if name == "resnetv2_50" else "bn"
    convert_batch_norm(network, "ghost", include=(f"*.0.{norm}1",), virtual_batch_size=2)
    convert_batch_norm(network, "renorm", include=(f"*.1.{norm}2",))
    with torch.autocast("cpu", torch.bfloat16):
        found = population_gap(network, [normal(8, 3, 32, 32)], batch_sizes=(4,), steps=2)
    assert all(0 <= row.gap < 10 for row in found.layers if row.reason is None)
    assert sum(row.reason is None for row in found.layers) > 10


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ([normal(8, 6)], {"batch_sizes": (16,)}, "from 1 to the 8 examples"),
        ([normal(8, 6)], {"batch_sizes": (4,), "steps": 0}, "steps ≥ 1"),
        ([], {}, "got 0 batches whose tensors together have no entries"),
        ([(normal(8, 6), torch.zeros(7))], {}, r"together have \[7, 8\] entries"),
        ([normal(8, 6), (normal(8, 6),) * 2], {}, "cannot be put together"),
        ([{"x": normal(8, 6)}], {"batch_sizes": (4,)}, "step=lambda model, batch"),
    ],
)
def test_what_makes_no_sense_is_refused(data, options, message):
    with pytest.raises(BatchNormError, match=message):
        population_gap(perceptron(), data, **options)
    with pytest.raises(BatchNormError, match="no BatchNorm layer"):
        population_gap(nn.Linear(6, 6), data, **options)


def test_shows_itself():
    found = population_gap(perceptron(), [normal(40, 6)], batch_sizes=(4, 16), steps=5)
    assert "gap, output σ" in str(found)
    assert "<table>" in found._repr_html_()
    assert found.scalars() == {f"population_gap/batch_size_{size}": found.median_gap(size) for size in (4, 16)}
    assert found.to_dict()["steps"] == 5
    assert len(found.figure().axes) == 1
