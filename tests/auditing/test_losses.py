"""The loss under five readings, against the same written out in plain loops, and what it costs."""

import copy
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from auditing import slow_readings as slow
from torch import nn

from bn_lightning.auditing import audit_batch_norm
from bn_lightning.auditing.losses import compare_losses
from bn_lightning.layers import FrozenBatchNorm


def audit(model, batches, **options):
    return audit_batch_norm(model, batches, **{"loss": F.cross_entropy, **options})


@pytest.mark.parametrize("training", [True, False], ids=["in-training", "in-evaluation"])
@pytest.mark.parametrize("val", [None, (9, 6)], ids=["training-data", "evaluation-data"])
def test_readings_are_those_of_plain_loops(training, val):
    model, batches = slow.net().train(training), slow.labelled()
    val_batches = None if val is None else slow.labelled(val, seed=5, offset=0.7)
    read = batches if val is None else val_batches
    expected = slow.readings(model, batches, val_batches)
    found = audit(model, batches, val_batches=val_batches).losses
    assert found.source == ("training" if val is None else "evaluation")
    assert found.batches == len(read)
    assert set(found.readings()) == set(expected)
    for name, reading in found.readings().items():
        assert reading.mean == pytest.approx(slow.mean(expected[name], read), rel=1e-10), name
        assert reading.low <= reading.mean <= reading.high
    pairs = {
        "dropout": ("batch_statistics", "full_training"),
        "batch dependence": ("recalibrated", "batch_statistics"),
        "stale statistics": ("deployed", "recalibrated"),
    }
    if val is not None:
        pairs["domain shift"] = ("recalibrated", "evaluation_statistics")
    assert {each.name: (each.higher, each.lower) for each in found.differences} == pairs
    for each in found.differences:
        difference = expected[each.higher] - expected[each.lower]
        assert each.mean == pytest.approx(slow.mean(difference, read), abs=1e-10)
        assert abs(each.mean) > 1e-4, "none of these is zero in this network"


def test_the_loss_of_full_training_keeps_frozen_layers_as_training_does():
    batches = slow.labelled()
    model = slow.net(dropout=0.0).train()
    model.bn1.eval()
    statistics = slow.running(model)
    with torch.no_grad():
        expected = []
        for x, target in batches:
            x = torch.tanh(slow.by_statistics(model.bn1, model.conv1(x), *statistics[0]))
            x = F.gelu(slow.by_batch(model.bn2, model.conv2(x))).mean((2, 3))
            expected.append(F.cross_entropy(model.head(x), target))
    expected = slow.mean(torch.stack(expected), batches)
    assert audit(model, batches).losses.full_training.mean == pytest.approx(expected)
    by_class = slow.net(dropout=0.0).eval()
    by_class.bn1.__class__ = FrozenBatchNorm
    assert audit(by_class, batches).losses.full_training.mean == pytest.approx(expected)


def test_layers_that_are_not_selected_move_nothing_and_matter_as_in_training():
    model, batches = slow.net().train(), slow.labelled()
    expected = slow.mean(slow.readings(model, batches)["full_training"], batches)
    model.bn1.running_var[1] = math.nan  # whatever the running statistics say
    model.bn1.momentum = 1.0
    assert audit(model, batches, include=("bn2",)).losses.full_training.mean == pytest.approx(expected)


def test_one_cause_is_named_alone():
    batches = slow.labelled((64,) * 8)
    stale = audit(slow.net(dropout=0.0, drift=0.5, batches=batches), batches)
    assert evident(stale) == {"stale statistics"}
    same = stale.losses.difference("dropout")
    assert max(map(abs, (same.mean, same.low, same.high))) < 1e-12, "nothing but rounding"
    dropping = sharpened(slow.net(dropout=0.8, drift=0.0, batches=batches))
    report = audit(dropping, taught(dropping, batches))
    assert "dropout" in evident(report)
    assert report.losses.difference("dropout").mean < 0, "which training suffers from and evaluation does not"
    assert "stale statistics" not in evident(report)
    small = slow.labelled((3,) * 100)
    alone = sharpened(slow.net(dropout=0.0, drift=0.0, batches=small))
    assert evident(audit(alone, taught(alone, small), max_batches=100)) == {"batch dependence"}
    shifted = audit(
        slow.net(dropout=0.0, drift=0.0, batches=batches), batches, val_batches=slow.labelled((64,) * 8, 9, offset=2.0)
    )
    assert "domain shift" in evident(shifted)
    assert "stale statistics" not in evident(shifted)


def sharpened(model):
    model.head.weight.data.mul_(30)
    return model


def taught(model, batches):
    """Targets that evaluation is right about."""
    model.eval()
    return [(x, model(x).argmax(1)) for x, _ in batches]


def evident(report):
    return {each.name for each in report.losses.differences if each.is_evident}


def test_one_batch_is_no_evidence():
    report = audit(slow.net(drift=1.0), slow.labelled((64,)))
    assert evident(report) == set()
    assert report.losses.deployed.low == -math.inf
    assert report.losses.difference("stale statistics").mean != 0
    assert '"-inf"' in report.to_json()


class Backward(torch.autograd.Function):
    count = 0

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        Backward.count += 1
        return gradient


@pytest.mark.parametrize(
    ("options", "train", "val", "backwards"),
    [
        pytest.param({"loss": True}, 4, 0, 1, id="loss"),
        pytest.param({"loss": True, "val": True}, 1, 5, 1, id="loss-and-evaluation"),
        pytest.param({}, 1, 0, 0, id="no-loss"),
        pytest.param({"val": True}, 1, 1, 0, id="evaluation"),
    ],
)
def test_passes_are_as_many_as_promised(options, train, val, backwards):
    model, batches = slow.net(), slow.labelled()
    val_batches = slow.labelled((7, 7), seed=4) if "val" in options else None
    seen = []
    handle = model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    Backward.count = 0
    loss = (lambda output, target: Backward.apply(F.cross_entropy(output, target))) if "loss" in options else None
    report = audit_batch_norm(
        model, batches, val_batches=val_batches, loss=loss, example_inputs=torch.zeros(3, 3, 7, 7, dtype=torch.float64)
    )
    handle.remove()
    confirmed = sum(row.confirmed_loss_change is not None for row in report.layers)
    assert confirmed == (2 if loss else 0)
    if val_batches is None:
        train += confirmed
    else:
        val += confirmed
    assert {n: seen.count(n) for n in set(seen)} == {
        3: 1,
        **dict.fromkeys((8, 12, 5), train),
        **({7: 2 * val} if val else {}),
    }
    assert Backward.count == backwards * (len(batches) if val_batches is None else len(val_batches))
    if loss is None:
        told = {each.what: each.reason for each in report.not_looked}
        assert "loss=" in told["loss readings"]
        assert "step=" in told["loss readings"]
        assert report.losses is None


def test_every_batch_begins_with_the_same_random_numbers_in_every_pass():
    """And dropout, which draws in one of the passes only, does not shift what the next batch draws."""
    model, batches = slow.net(), slow.labelled()
    drawn = []

    def step(network, batch):
        draw = (float(torch.rand(1)), float(np.random.rand()), random.random())
        drawn.append((len(batch[0]), draw))
        return F.cross_entropy(network(batch[0]), batch[1])

    audit_batch_norm(model, batches, step=step)
    by_size = {n: {draw for size, draw in drawn if size == n} for n in (8, 12, 5)}
    assert [len(draws) for draws in by_size.values()] == [1, 1, 1]
    assert len(set.union(*by_size.values())) == 3, "each batch has its own"


def test_batches_of_wrong_kinds_are_left_out_of_every_reading():
    """One value per channel in training, no examples, and what a step skips."""
    flat = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    source = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(n, 4, generator=source, dtype=torch.float64), torch.randint(2, (n,), generator=source))
        for n in (6, 1, 8, 0, 7)
    ]

    def step(network, batch):
        output = network(batch[0])
        return None if len(batch[0]) == 8 else {"loss": F.cross_entropy(output, batch[1]), "extra": 1}

    report = audit_batch_norm(flat, batches, step=step)
    assert report.losses.batches == 2
    kept = [batches[0], batches[4]]
    with torch.no_grad():
        expected = [F.cross_entropy(copy.deepcopy(flat).eval()(x), y) for x, y in kept]
    assert report.losses.deployed.mean == pytest.approx(float((6 * expected[0] + 7 * expected[1]) / 13))
    told = {each.what: each.reason for each in report.not_looked}
    assert told["losses of some batches"].startswith("3 of 5 batches are left out of all readings")


def test_a_loss_that_is_not_finite_is_told_and_names_no_cause():
    model, batches = slow.net(), slow.labelled()
    model.bn2.running_var[1] = math.nan
    report = audit(model, batches)
    assert math.isnan(report.losses.deployed.mean)
    assert math.isfinite(report.losses.recalibrated.mean)
    assert not report.losses.difference("stale statistics").is_evident
    told = {each.what: each.reason for each in report.not_looked}
    assert told["finite losses"].startswith("the loss is not finite under deployed")
    reasons = {row.name: (row.predicted_loss_change, row.reason) for row in report.layers}
    assert reasons["bn2"][0] is None
    assert "not finite" in reasons["bn2"][1]
    assert reasons["bn1"][0] is None
    assert "the gradient of the loss is not finite" in reasons["bn1"][1]
    assert ("nonfinite-statistics", "bn2") in {(found.rule, found.layer) for found in report.findings}


def test_no_loss_in_any_batch_is_a_reason():
    report = audit_batch_norm(slow.net(), slow.labelled(), step=lambda model, batch: (model(batch[0]), None)[1])
    assert report.losses is None
    told = {each.what: each.reason for each in report.not_looked}
    assert "the step returned none" in told["loss readings"]


def test_batches_weigh_by_their_examples():
    names = ("full_training", "batch_statistics", "recalibrated", "deployed")
    readings = compare_losses("training", {name: [1.0, 4.0, None] for name in names}, [3, 1, 100])
    assert readings.deployed.mean == 1.75
    assert readings.batches == 2
    assert compare_losses("training", {name: [None] for name in names}, [3]) is None
