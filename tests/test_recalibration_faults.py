"""What goes wrong while recalibrating leaves the model as it was, and says where."""

import pytest
import torch
from torch import nn

from bn_lightning import recalibrate_batch_norm, recalibration
from bn_lightning.errors import RecalibrationError


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)))


def test_an_interrupt_between_two_layers_writes_neither(model, monkeypatch):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls = []
    write = recalibration._write

    def interrupted(layer, mean, var):
        calls.append(layer)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(layer, mean, var)

    monkeypatch.setattr(recalibration, "_write", interrupted)
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
