"""Momentum under gradient accumulation: the arithmetic, the rows, undo, and that it does not compound."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bn_lightning.errors import BatchNormError
from bn_lightning.layers import FrozenBatchNorm, GhostBatchNorm, accumulation_momentum, adjust_momentum


def network():
    return nn.Sequential(
        nn.Linear(3, 3),
        nn.BatchNorm1d(3),
        nn.BatchNorm1d(3, momentum=None),
        GhostBatchNorm(3, momentum=0.01, virtual_batch_size=2),
        nn.BatchNorm1d(3, track_running_stats=False),
        FrozenBatchNorm(3),
    )


def momenta(model):
    return [layer.momentum for layer in model[1:]]


@settings(deadline=None, max_examples=30, derandomize=True)
@given(momentum=st.floats(0, 1), k=st.integers(1, 64))
def test_k_updates_leave_as_much_of_the_old_value_as_one_did(momentum, k):
    adjusted = accumulation_momentum(momentum, k)
    assert 0 <= adjusted <= momentum
    assert (1 - adjusted) ** k == pytest.approx(1 - momentum, rel=1e-12, abs=1e-12)


def test_a_small_momentum_keeps_its_digits():
    assert accumulation_momentum(1e-17, 4) == pytest.approx(2.5e-18, rel=1e-12)


@pytest.mark.parametrize("k", [0, -1, 2.0, "4", None])
def test_refuses_what_is_no_number_of_batches(k):
    model = network()
    for call in (lambda: accumulation_momentum(0.1, k), lambda: adjust_momentum(model, accumulate_grad_batches=k)):
        with pytest.raises(BatchNormError, match="accumulate_grad_batches counts the micro-batches"):
            call()


def test_micro_batches_of_equal_statistics_move_as_one_large_batch():
    large = nn.BatchNorm1d(2, momentum=0.3)
    small = copy.deepcopy(large)
    adjust_momentum(small, accumulate_grad_batches=3)
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0)) + 4
    large(x)
    for _ in range(3):
        small(x)
    torch.testing.assert_close(small.running_mean, large.running_mean)
    torch.testing.assert_close(small.running_var, large.running_var)


def test_every_layer_is_a_row_and_undo_restores():
    model = network()
    before = momenta(model)
    result = adjust_momentum(model, accumulate_grad_batches=4)
    adjusted, other = 1 - 0.9**0.25, 1 - 0.99**0.25
    assert momenta(model) == [pytest.approx(adjusted), None, pytest.approx(other), 0.1, 0.1]
    reasons = [row.reason for row in result.rows]
    assert [row.name for row in result.rows] == ["1", "2", "3", "4", "5"]
    assert reasons[0] is reasons[2] is None
    assert "cumulative average" in reasons[1]
    assert "no running statistics" in reasons[3]
    assert "never moves" in reasons[4]
    assert [row.after for row in result.rows] == momenta(model)
    assert [row.before for row in result.rows] == before
    result.undo()
    assert momenta(model) == before
    assert all(layer.__dict__.keys() == new.__dict__.keys() for layer, new in zip(model, network(), strict=True))


def test_the_report_carries_the_warning():
    result = adjust_momentum(network(), accumulate_grad_batches=4)
    text = str(result)
    assert "2 of 5 BatchNorm layers to accumulate_grad_batches=4" in text
    for shown in (text, result._repr_html_(), json.dumps(result.to_dict())):
        assert "repairs the running average only" in shown
    assert result.to_dict()["layers"][0]["before"] == 0.1


def test_applied_again_it_does_not_compound():
    model = network()
    first = adjust_momentum(model, accumulate_grad_batches=4)
    after = momenta(model)
    again = adjust_momentum(model, accumulate_grad_batches=4)
    assert momenta(model) == after
    assert again.rows[0].reason == "its momentum is that already"
    second = adjust_momentum(copy.deepcopy(model), accumulate_grad_batches=2)
    assert second.rows[0].after == accumulation_momentum(0.1, 2)
    adjust_momentum(model, accumulate_grad_batches=2)
    assert momenta(model)[0] == accumulation_momentum(0.1, 2)
    back = adjust_momentum(model, accumulate_grad_batches=1)
    assert momenta(model) == momenta(network())
    back.undo()
    assert momenta(model)[0] == accumulation_momentum(0.1, 2)
    again.undo()
    assert momenta(model) == after
    adjust_momentum(model, accumulate_grad_batches=2)
    assert momenta(model)[0] == accumulation_momentum(0.1, 2)
    first.undo()
    assert momenta(model) == momenta(network())


def test_a_momentum_set_since_is_the_new_beginning():
    layer = nn.BatchNorm1d(3)
    adjust_momentum(layer, accumulate_grad_batches=4)
    layer.momentum = 0.5
    adjust_momentum(layer, accumulate_grad_batches=2)
    assert layer.momentum == accumulation_momentum(0.5, 2)


def test_nothing_changes_after_an_error():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, momentum=-1.0))
    with pytest.raises(BatchNormError, match=r"layer '1' \(BatchNorm1d\): momentum is the weight of the new batch"):
        adjust_momentum(model, accumulate_grad_batches=4)
    assert model[0].momentum == 0.1


def test_picks_layers_by_name():
    model = network()
    result = adjust_momentum(nn.DataParallel(model), accumulate_grad_batches=4, include=("1", "3"), exclude=("3",))
    assert [row.name for row in result.rows] == ["1"]
    assert model[3].momentum == 0.01
    with pytest.raises(BatchNormError, match="matches none"):
        adjust_momentum(model, accumulate_grad_batches=4, include=("nothing",))
    with pytest.raises(BatchNormError, match="no BatchNorm layer"):
        adjust_momentum(nn.Linear(2, 2), accumulate_grad_batches=4)


def test_a_shared_layer_is_adjusted_once():
    layer = nn.BatchNorm1d(3)
    assert len(adjust_momentum(nn.Sequential(layer, layer), accumulate_grad_batches=4).rows) == 1
    assert layer.momentum == accumulation_momentum(0.1, 4)
