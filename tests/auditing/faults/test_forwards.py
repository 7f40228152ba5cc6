"""Layers that run more than once in a step are told apart: shared, run in addition, computed again."""

import pytest
import torch
import torch.nn.functional as F
from auditing.faults.catalogue_forwards import FAULTS, Checkpointed, audit_of_step, beside, with_targets
from auditing.faults.digits_training import digits, fit, network
from torch import nn
from torch.utils.checkpoint import checkpoint

from bn_lightning import paused_statistics
from bn_lightning.auditing import LayerHistory, TrainingHistory, TrainingSettings, audit_batch_norm

SLUGS = tuple(FAULTS)


def of_rule(report, slug):
    return {finding.layer: finding for finding in report.findings if finding.rule == slug}


@pytest.mark.parametrize(
    ("slug", "layers"),
    [
        # The first layer takes the other light away.
        pytest.param("shared-layer", {"0.1": "warning", "0.4": "info"}, id="shared-layer"),
        pytest.param("extra-forward", {"0.1": "warning", "0.4": "warning"}, id="extra-forward"),
        pytest.param("checkpoint-recompute", {"body.1": "warning", "body.4": "warning"}, id="checkpoint-recompute"),
    ],
)
def test_a_training_with_the_fault_is_found_at_its_layers(slug, layers):
    report = FAULTS[slug]()
    assert {name: f.severity for name, f in of_rule(report, slug).items()} == layers
    others = {finding.rule for finding in report.findings if finding.severity != "info"}
    assert not others & (set(SLUGS) - {slug})


def evaluated(model, batch):
    """Compute targets as evaluation does."""
    x, y = batch
    model.eval()
    with torch.no_grad():
        target = model(x.roll(1, dims=3)).softmax(1)
    model.train()
    output = model(x)
    return F.cross_entropy(output, y) + 0.1 * F.cross_entropy(output, target)


def paused(model, batch):
    return with_targets(model, batch, lambda: paused_statistics(model))


def alike(model, batch):
    """Learn two noisy views of each picture."""
    return beside(model, batch, 1.0, 0.01)


@pytest.mark.parametrize("step", [paused, evaluated, alike], ids=lambda step: step.__name__)
def test_a_careful_step_is_left_in_peace(step):
    report = audit_of_step(step)
    assert [f.rule for f in report.findings if f.rule in SLUGS and f.severity != "info"] == []
    if step is alike:
        assert of_rule(report, "shared-layer")["0.1"].evidence["distance"] < 0.05


def test_paused_statistics_in_the_second_pass_of_checkpointing():
    model, batches = Checkpointed(network(), pause=True), digits()
    fit(model, batches)
    report = audit_batch_norm(model.eval(), batches, loss=F.cross_entropy)
    assert not of_rule(report, "checkpoint-recompute")


class Reentrant(nn.Module):
    """Checkpoints what is behind the first block in torch's older way, whose forward pass runs without gradient."""

    def __init__(self):
        super().__init__()
        whole = network()
        self.stem, self.body, self.head = whole[0][:3], whole[0][3:], whole[1:]

    def forward(self, x):
        return self.head(checkpoint(self.body, self.stem(x), use_reentrant=True))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(
    ("step", "extra"),
    [
        pytest.param(lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), [], id="once"),
        pytest.param(with_targets, ["stem.1", "body.4"], id="and-once-without-gradient"),
    ],
)
def test_reentrant_checkpoints_are_computed_again_and_are_no_extra_pass(step, extra):
    torch.manual_seed(0)
    model = Reentrant()
    report = audit_batch_norm(model, digits()[:4], step=step)
    assert {name: f.evidence["backward_updates"] for name, f in of_rule(report, "checkpoint-recompute").items()} == {
        "body.4": 1.0
    }
    assert sorted(of_rule(report, "extra-forward")) == sorted(extra)


@pytest.mark.parametrize("size", [256, 4096], ids="examples={}".format)
def test_distance_of_a_shared_layers_inputs(size):
    """Two calls whose inputs are N(0, 1) and N(2, 1): the mixture is N(1, 2)."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.bn(x) + self.bn(x + 2)

    x = torch.randn(4096, 3, generator=torch.Generator().manual_seed(0)).split(size)
    found = of_rule(audit_batch_norm(Twice(), x), "shared-layer")["bn"]
    # Evaluation gives (z ∓ 1)/√2 for z of each: an error of √((1/√2 - 1)² + 1/2).
    assert found.evidence["distance"] == pytest.approx(((0.5**0.5 - 1) ** 2 + 0.5) ** 0.5, rel=0.03)
    assert found.evidence["calls"] == 2


@pytest.mark.parametrize(
    ("forward", "backward", "expected"),
    [
        pytest.param(1.0, 0.0, set(), id="once"),
        pytest.param(2.0, 0.0, {"extra-forward"}, id="twice"),
        pytest.param(1.5, 0.0, {"extra-forward"}, id="every-other-batch"),
        pytest.param(1.0, 1.0, {"checkpoint-recompute"}, id="recomputed"),
        pytest.param(None, None, set(), id="unknown"),
    ],
)
@pytest.mark.parametrize("recorded", [True, False], ids="recorded={}".format)
def test_what_was_seen_while_training_tells_without_data(forward, backward, expected, recorded):
    seen = LayerHistory(forward_updates=forward, backward_updates=backward)
    history = TrainingHistory(batches=100, layers={"0.1": seen})
    report = audit_batch_norm(network(), example_inputs=torch.randn(2, 1, 8, 8) if recorded else None, history=history)
    found = {finding.rule: finding for finding in report.findings if finding.rule in SLUGS}
    assert {(slug, finding.layer) for slug, finding in found.items()} == {(slug, "0.1") for slug in expected}
    if "extra-forward" in found:  # they may all be meant: two views, or the parts of a GAN
        assert found["extra-forward"].severity == "info"
        assert "cannot be told without a loss reading" in found["extra-forward"].message
        assert "step=" in found["extra-forward"].fix


def with_views(model, batch):
    """Learn two views of each picture, both with gradient."""
    x, y = batch
    return F.cross_entropy(model(x), y) + F.cross_entropy(model(x + 0.1), y)


@pytest.mark.parametrize(
    ("by_hand", "severity"), [pytest.param(True, "info", id="by-hand"), pytest.param(False, "warning", id="automatic")]
)
def test_more_than_the_step_shows_is_sure_only_if_it_is_the_step_that_trains(by_hand, severity):
    history = TrainingHistory(100, {"0.1": LayerHistory(forward_updates=3.0)})
    settings = TrainingSettings(manual_optimization=by_hand)
    report = audit_batch_norm(network(), digits()[:4], step=with_views, history=history, training=settings)
    assert {name: f.severity for name, f in of_rule(report, "extra-forward").items()} == {"0.1": severity}


@pytest.mark.parametrize("losses", [True, False], ids="losses={}".format)
def test_passes_between_batches_are_extra_without_a_loss_too(losses):
    history = TrainingHistory(100, {"0.1": LayerHistory(forward_updates=1.0, between_updates=100)})
    given = {"train_batches": digits()[:4], "loss": F.cross_entropy} if losses else {}
    found = of_rule(audit_batch_norm(network(), history=history, **given), "extra-forward")
    assert {name: f.severity for name, f in found.items()} == {"0.1": "warning"}
    assert found["0.1"].evidence == {"between_updates": 100}


def test_a_teacher_whose_statistics_move_is_told_once():
    both = nn.ModuleDict({"student": network(), "teacher": network().requires_grad_(False)})

    def step(model, batch):
        with torch.no_grad():
            target = model["teacher"](batch[0])
        return F.mse_loss(model["student"](batch[0]), target)

    report = audit_batch_norm(both, digits()[:4], step=step)
    assert sorted(of_rule(report, "frozen-weights-moving-statistics")) == ["teacher.0.1", "teacher.0.4"]
    assert not of_rule(report, "extra-forward")


def test_what_one_forward_pass_explains_is_not_extra():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.bn(x) + self.bn(2 * x)

    for updates, expected in ((2.0, []), (3.0, ["bn"])):
        history = TrainingHistory(100, {"bn": LayerHistory(forward_updates=updates)})
        report = audit_batch_norm(Twice(), example_inputs=torch.randn(8, 3), history=history)
        assert list(of_rule(report, "extra-forward")) == expected


def test_momentum_that_makes_two_updates_one():
    found = of_rule(FAULTS["checkpoint-recompute"](), "checkpoint-recompute")["body.1"]
    assert "momentum=0.0513" in found.fix
    assert pytest.approx(0.1, abs=1e-4) == 1 - (1 - 0.0513) ** 2
