"""The loss along its gradient, against copies of the network that are really moved, and against quadratic losses."""

import copy

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from probes.probed import FailsAt, State, batch, perceptron
from torch import nn

from bn_lightning.errors import BatchNormError
from bn_lightning.probes import effective_smoothness, gradient_predictiveness, loss_landscape, objective_of

STEPS = pytest.mark.parametrize("probe", [loss_landscape, gradient_predictiveness])


def loss_and_gradient(network, pair):
    network.zero_grad()
    loss = F.cross_entropy(network(pair[0]), pair[1])
    loss.backward()
    return loss.item(), torch.cat([each.grad.flatten() for each in network.parameters()]).double()


def slow_line(network, pair, steps):
    """Copy the network for every step, move it with torch's own SGD, and measure it there."""
    loss, start = loss_and_gradient(copy.deepcopy(network).train(), pair)
    losses, changes = [loss], []
    for distance in steps:
        moved = copy.deepcopy(network).train()
        loss_and_gradient(moved, pair)
        torch.optim.SGD(moved.parameters(), lr=distance).step()
        loss, gradient = loss_and_gradient(moved, pair)
        losses.append(loss)
        changes.append((gradient - start).norm().item())
    return losses, changes, start.norm().item()


def test_losses_and_gradients_are_those_of_networks_that_are_really_moved():
    network, pair = perceptron(), batch()
    found = gradient_predictiveness(network, F.cross_entropy, pair, learning_rate=0.3, points=5)
    losses, changes, norm = slow_line(network, pair, found.landscape.steps)
    assert found.landscape.steps == pytest.approx([0.15, 0.15 * 8**0.25, 0.15 * 8**0.5, 0.15 * 8**0.75, 1.2])
    assert [found.landscape.loss, *found.landscape.losses] == pytest.approx(losses, rel=1e-5)
    assert found.changes == pytest.approx(changes, rel=1e-4)
    assert found.landscape.gradient_norm == pytest.approx(norm, rel=1e-6)
    assert found.landscape.width == pytest.approx(max(losses[1:]) - min(losses[1:]), rel=1e-4)
    assert found.predictiveness == pytest.approx((min(changes), max(changes)), rel=1e-4)
    ratios = [change / (step * norm) for change, step in zip(changes, found.landscape.steps, strict=True)]
    assert found.smoothness == pytest.approx(max(ratios), rel=1e-4)


def test_the_landscape_alone_has_the_same_losses():
    network, pair = perceptron(), batch()
    alone = loss_landscape(network, F.cross_entropy, pair, learning_rate=0.3)
    assert alone == gradient_predictiveness(network, F.cross_entropy, pair, learning_rate=0.3).landscape


@pytest.mark.parametrize("curvature", [0.25, 3.0])
def test_of_a_quadratic_loss_beta_is_the_curvature_and_the_change_is_linear(curvature):
    network = nn.Linear(1, 4, bias=False).double()  # L(w) = c/2 · ‖w‖²

    def step(model, batch):
        return curvature / 2 * model(batch).square().sum()

    found = effective_smoothness(network, None, torch.ones(1, 1, dtype=torch.float64), step=step)
    assert found.smoothness == pytest.approx(curvature, rel=1e-9)
    norm = network.weight.norm().item()
    steps = found.landscape.steps
    assert (steps[0], steps[-1]) == pytest.approx((0.05, 0.4))
    assert found.changes == pytest.approx([curvature**2 * each * norm for each in steps], rel=1e-9)
    assert found.landscape.losses == pytest.approx(
        [curvature / 2 * (norm * (1 - each * curvature)) ** 2 for each in steps]
    )


@STEPS
@pytest.mark.parametrize("training", [True, False])
def test_the_network_comes_back_bit_for_bit(probe, training):
    network, pair = perceptron(dropout=0.3).train(training), batch()
    network[0].weight.grad = torch.ones_like(network[0].weight)
    network[4].eval()
    state = State(network)
    probe(network, F.cross_entropy, pair, learning_rate=0.1)
    state.assert_back()


@STEPS
@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
def test_the_network_comes_back_after_an_error_at_every_forward_call(probe, error):
    for call in range(4):
        network = nn.Sequential(perceptron(), FailsAt(call, error))
        state = State(network)
        with pytest.raises(error, match="stop"):
            probe(network, F.cross_entropy, batch(), learning_rate=0.1, points=3)
        state.assert_back()
    probe(nn.Sequential(perceptron(), FailsAt(4)), F.cross_entropy, batch(), learning_rate=0.1, points=3)  # no fifth


def test_dropout_draws_the_same_at_every_point():
    network = perceptron(dropout=0.5)
    with objective_of(network, F.cross_entropy, batch(), None) as objective:
        assert objective.value() == objective.value() == objective.gradient()[0]
        assert objective.passes == 3


def test_batch_norm_in_evaluation_is_probed_by_the_batch_and_frozen_modules_of_a_training_network_stay_so():
    pair = batch()
    alike = loss_landscape(perceptron().eval(), F.cross_entropy, pair, learning_rate=0.1)
    assert alike == loss_landscape(perceptron().train(), F.cross_entropy, pair, learning_rate=0.1)
    frozen = perceptron().train()
    frozen[1].eval()
    assert loss_landscape(frozen, F.cross_entropy, pair, learning_rate=0.1).loss != alike.loss


def test_parameters_that_take_no_gradient_and_shared_ones():
    network = perceptron()
    network[0].requires_grad_(False)
    network[5].weight = network[1].weight
    with objective_of(network, F.cross_entropy, batch(), None) as objective:
        _, gradient = objective.gradient()
    assert not {"0.weight", "0.bias", "5.weight"} & gradient.keys()
    F.cross_entropy(network(batch()[0]), batch()[1]).backward()
    torch.testing.assert_close(gradient["1.weight"], network[1].weight.grad)


def test_under_autocast_as_training_is():
    network, pair = perceptron(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.cross_entropy(network(pair[0]), pair[1])
        found = gradient_predictiveness(network, F.cross_entropy, pair, learning_rate=0.1)
    assert found.landscape.loss == expected.item()


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = perceptron()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.network(batch["x"]), batch["y"])


def test_a_lightning_module_by_its_training_step():
    pair, module = batch(), Module()
    found = loss_landscape(
        module,
        None,
        {"x": pair[0], "y": pair[1]},
        learning_rate=0.1,
        step=lambda module, batch: module.training_step(batch, 0),
    )
    assert found == loss_landscape(perceptron(), F.cross_entropy, pair, learning_rate=0.1)


def test_a_loss_that_becomes_nan_is_told():
    def step(model, batch):
        loss = model(batch).square().sum()
        return loss if loss > 1e-3 else loss * torch.nan

    network = nn.Linear(1, 1, bias=False)
    found = gradient_predictiveness(
        network, None, torch.ones(1, 1), learning_rate=0.5, factors=(0.5, 1.0), points=2, step=step
    )
    assert all(value != value for value in (found.landscape.high, found.landscape.low, found.predictiveness[0]))
    assert found.smoothness != found.smoothness
    found.figure()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, "positive learning_rate"),
        ({"learning_rate": 0.1, "points": 1}, "points"),
        ({"learning_rate": 0.1, "factors": (2.0, 1.0)}, r"factors\[0\]"),
        ({"learning_rate": 0.1, "step": lambda model, batch: 0}, "both step= and loss="),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(BatchNormError, match=message):
        loss_landscape(perceptron(), F.cross_entropy, batch(), **options)


def test_refuses_what_has_no_loss_or_no_gradient():
    network = perceptron()
    with pytest.raises(BatchNormError, match="give loss="):
        loss_landscape(network, None, batch(), learning_rate=0.1)
    with pytest.raises(BatchNormError, match="carries no gradient"):
        loss_landscape(network.requires_grad_(False), F.cross_entropy, batch(), learning_rate=0.1)
    with pytest.raises(BatchNormError, match="returned None"):
        loss_landscape(network, None, batch(), learning_rate=0.1, step=lambda model, batch: None)


@pytest.mark.parametrize("given", [{"x": batch()[0]}, (torch.ones(2, 5), torch.tensor([0, 1]))], ids=["dict", "width"])
def test_a_batch_that_the_network_cannot_be_run_on_is_told_with_the_option_that_there_is(given):
    with pytest.raises(BatchNormError, match="step=lambda model, batch: …, which returns the batch's loss") as told:
        loss_landscape(perceptron(), F.cross_entropy, given, learning_rate=0.1)
    assert "forward=" not in str(told.value)


def test_results_show_themselves():
    found = gradient_predictiveness(perceptron(), F.cross_entropy, batch(), learning_rate=0.1, points=3)
    assert "effective β" in str(found)
    assert "range" in str(found.landscape)
    assert "<table>" in found._repr_html_()
    assert found.to_dict()["landscape"]["loss"] == found.landscape.loss
    assert set(found.scalars()) == {"gradient_change_low", "gradient_change_high", "effective_smoothness"}
    assert len(found.figure().axes[0].lines[0].get_xdata()) == 3
    assert found.landscape.figure().axes[0].get_ylabel() == "loss"
