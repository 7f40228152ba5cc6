"""What goes wrong while recalibrating leaves the model as it was, and says where."""

import pytest
import torch
from recalibration.networks import data, fingerprint, net
from torch import nn

from bn_lightning import recalibrate_batch_norm
from bn_lightning.errors import BatchNormError, RecalibrationError
from bn_lightning.recalibration import recalibrate


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)))


def test_an_interrupt_between_two_layers_writes_neither(model, monkeypatch):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls = []
    write = recalibrate.write_statistics

    def interrupted(layer, mean, var):
        calls.append(layer)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(layer, mean, var)

    monkeypatch.setattr(recalibrate, "write_statistics", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recalibrate_batch_norm(model, [torch.randn(8, 3)])
    assert calls[0] is model[1]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_an_input_that_does_not_fit_names_shape_layer_and_cure(model):
    with pytest.raises(RecalibrationError, match=r"shape \(8, 5\).*layer '0'.*forward=lambda") as raised:
        recalibrate_batch_norm(model, [torch.randn(8, 5)])
    assert isinstance(raised.value.__cause__, RuntimeError)
    model[2][0] = nn.Identity()
    with pytest.raises(RecalibrationError, match=r"layer '2\.1'"):
        recalibrate_batch_norm(model, [torch.randn(8, 3)])


@pytest.mark.parametrize(
    ("spoil", "batches", "options", "message"),
    [
        pytest.param(None, [], {}, "gave no data", id="empty"),
        pytest.param(None, iter(()), {}, "gave no data", id="exhausted"),
        pytest.param(None, torch.ones(4, 3, 6, 6), {}, r"got a Tensor.*\[batch\]", id="bare-tensor"),
        pytest.param(None, 3, {}, "got a int", id="no-iterable"),
        pytest.param(None, [{"x": 1}], {}, "got a dict.*forward=", id="dict-batch"),
        pytest.param(None, [({"x": 1}, 2)], {}, "tuple whose first element is a dict.*forward=", id="nested-batch"),
        pytest.param(None, data([8, 1]), {}, r"'last' \(BatchNorm1d\).*\(1, 4\).*drop_last", id="one-value"),
        pytest.param(None, data([8]), {"max_batches": 0}, "positive whole number, got 0", id="max_batches"),
        pytest.param("untracked", data([8]), {}, "'last' .*track_running_stats=False.*exclude=", id="untracked"),
        pytest.param("untracked", data([8, 1]), {"exclude": ("last",)}, r"'last'.*\(1, 4\)", id="one-value-untracked"),
        pytest.param(None, [torch.full((4, 3, 6, 6), torch.nan)], {}, "'first' .*3 of 3 channels.*nan", id="nan"),
        pytest.param("half", [1e3 * x for x in data([8])], {}, "'first'.*as torch.float16", id="overflows-half"),
    ],
)  # fmt: skip
def test_refusals_name_the_layer_and_the_cure_and_change_nothing(spoil, batches, options, message):
    model = net().train()
    if spoil == "untracked":
        model.last = nn.BatchNorm1d(4, track_running_stats=False)
    if spoil == "half":
        model.first.running_var = model.first.running_var.half()
        options = {
            "include": ("first",),
            "forward": lambda model, x: model.middle(model.conv(x)) + model.first(x).sum(),
        }
        model.first.forward = lambda x: x
    before = fingerprint(model)
    with pytest.raises(RecalibrationError, match=message):
        recalibrate_batch_norm(model, batches, **options)
    assert fingerprint(model) == before


def test_no_batch_norm_and_a_pattern_that_matches_nothing():
    with pytest.raises(RecalibrationError, match="Linear has no BatchNorm layer"):
        recalibrate_batch_norm(nn.Linear(2, 2), data([4]))
    with pytest.raises(BatchNormError, match=r"'layer9\.\*' matches none"):
        recalibrate_batch_norm(net(), data([4]), include=("layer9.*",))


def test_nothing_is_written_when_a_late_layer_is_refused():
    model = net()
    before = fingerprint(model)
    with torch.no_grad():
        model.linear.weight[0, 0] = torch.inf
    with pytest.raises(RecalibrationError, match="'last'"):
        recalibrate_batch_norm(model, data([8]))
    assert fingerprint(model)[1] == before[1]
