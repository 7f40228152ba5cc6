"""The largest stable learning rate: 2/λ of a quadratic loss, and runs of copies that torch's own SGD trains."""

import copy
import math

import lightning.pytorch as pl
import pytest
import timm
import torch
import torch.nn.functional as F
from probes.probed import FailsAt, State, batch, perceptron
from torch import nn

from bn_lightning.errors import BatchNormError
from bn_lightning.layers import convert_batch_norm
from bn_lightning.probes import max_stable_learning_rate


@pytest.mark.parametrize("curvatures", [(1.0, 8.0), (0.01, 0.3)])
def test_of_a_quadratic_loss_it_is_two_by_the_largest_curvature(curvatures):
    network = nn.Linear(2, 1, bias=False).double()
    nn.init.ones_(network.weight)

    def step(model, batch):
        return (torch.tensor(curvatures, dtype=torch.float64) * model.weight.square()).sum() / 2

    found = max_stable_learning_rate(
        network, None, [torch.zeros(1)], low=1e-3, high=1e3, ratio=1.005, steps=400, diverged=10, step=step
    )
    assert found.learning_rate == pytest.approx(2 / max(curvatures), rel=0.02)
    assert found.learning_rate < found.diverging < 1.005 * found.learning_rate
    stable = next(run for run in found.runs if run.learning_rate == found.learning_rate)
    assert stable.losses[1] == pytest.approx(
        sum(c / 2 * (1 - found.learning_rate * c) ** 2 for c in curvatures), rel=1e-9
    )


def slow_losses(network, batches, rate, steps):
    network = copy.deepcopy(network).train()
    optimizer, losses = torch.optim.SGD(network.parameters(), lr=rate), []
    for index in range(steps):
        x, y = batches[index % len(batches)]
        optimizer.zero_grad()
        loss = F.cross_entropy(network(x), y)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    return losses


def test_every_run_is_that_of_a_copy_that_is_really_trained():
    network, batches = perceptron(), [batch(seed=seed) for seed in (1, 2, 3)]
    found = max_stable_learning_rate(
        network, F.cross_entropy, iter(batches), low=0.01, high=100, ratio=2, steps=5, diverged=3
    )
    assert len({run.diverged_at is None for run in found.runs}) == 2
    for run in found.runs:
        slow = slow_losses(network, batches, run.learning_rate, 5)
        assert run.losses == pytest.approx(slow[: len(run.losses)], rel=1e-3)
        above = [index + 1 for index, value in enumerate(slow) if not math.isfinite(value) or value > 3 * slow[0]]
        assert run.diverged_at == (above[0] if above else None)
        assert len(run.losses) == (run.diverged_at or 5)
    assert found.learning_rate < found.diverging <= 2 * found.learning_rate


def test_the_ends_of_what_was_tried():
    def find(**limits):
        return max_stable_learning_rate(perceptron(), F.cross_entropy, [batch()], steps=5, **limits)

    calm = find(low=1e-4, high=1e-2)
    assert (calm.learning_rate, calm.diverging, len(calm.runs)) == (1e-2, None, 2)
    assert "none diverges, up to 0.01" in str(calm)
    wild = find(low=1e7, high=1e8, diverged=1.01)
    assert (wild.learning_rate, wild.diverging, len(wild.runs)) == (None, 1e7, 1)
    assert "even 1e+07 diverges" in str(wild)
    assert wild.scalars() == {"max_stable_learning_rate": 0.0}
    wild.figure()


def test_passes_are_as_stated_and_the_network_comes_back_also_after_an_error():
    network, calls = perceptron(dropout=0.2).eval(), []
    network.register_forward_hook(lambda *_: calls.append(1))
    network[0].weight.grad = torch.ones_like(network[0].weight)
    state = State(network)
    found = max_stable_learning_rate(network, F.cross_entropy, [batch()], steps=6)
    state.assert_back()
    assert len(calls) == sum(len(run.losses) for run in found.runs)
    assert len(found.runs) <= 2 + math.ceil(math.log2(math.log(1e5) / math.log(1.1))) == 9
    for call in (0, 1, 6):
        broken = nn.Sequential(network, FailsAt(call))
        state = State(broken)
        with pytest.raises(ArithmeticError, match="stop"):
            max_stable_learning_rate(broken, F.cross_entropy, [batch()], steps=6)
        state.assert_back()


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = perceptron()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.network(batch["x"]), batch["y"])


def test_a_lightning_module_by_its_training_step():
    pair, module = batch(), Module()
    found = max_stable_learning_rate(
        module,
        None,
        [{"x": pair[0], "y": pair[1]}],
        steps=3,
        step=lambda module, batch: module.training_step(batch, 0),
    )
    assert found == max_stable_learning_rate(perceptron(), F.cross_entropy, [pair], steps=3)


def test_under_autocast_as_training_is():
    network, pair = perceptron(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        found = max_stable_learning_rate(network, F.cross_entropy, [pair], low=0.1, high=0.2, steps=4)
        slow = slow_losses(network, [pair], 0.1, 4)
    assert found.runs[0].losses == pytest.approx(slow, rel=1e-3)


@pytest.mark.parametrize("name", ["resnet18", "resnetv2_50"])
def test_zoo_networks_and_variants(name):
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=4)
    convert_batch_norm(network, "renorm", include=("*.0.norm1" if name == "resnetv2_50" else "*.0.bn1",))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    pair = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    found = max_stable_learning_rate(network, F.cross_entropy, [pair], low=1e-5, high=1e6, ratio=1e12, steps=2)
    assert found.learning_rate in (1e-5, 1e6)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": 1.0, "high": 0.5}, "0 < low < high"),
        ({"ratio": 1.0}, "ratio > 1"),
        ({"diverged": 1.0}, "diverged > 1"),
        ({"batches": []}, "gave no data"),
        ({"batches": batch()[0]}, "iterable of batches"),
        ({"loss": None}, "needs a loss"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(BatchNormError, match=message):
        max_stable_learning_rate(perceptron(), **{"loss": F.cross_entropy, "batches": [batch()], "steps": 5, **options})


def test_shows_itself():
    found = max_stable_learning_rate(perceptron(), F.cross_entropy, [batch()], high=1e4, steps=3, diverged=2)
    assert f"stable at {found.learning_rate:.3g}, diverging at {found.diverging:.3g}" in str(found)
    assert "diverged: a loss above 2 times the first" in str(found)
    assert "<table>" in found._repr_html_()
    assert found.scalars() == {"max_stable_learning_rate": found.learning_rate}
    assert found.to_dict()["diverging"] == found.diverging
    assert 2 <= len(found.figure().axes[0].lines) <= 4
