"""Batches that give a layer one value per channel: named, or left out whole."""

import pytest
import torch
from torch import nn

from bn_lightning.errors import SingleValueError
from bn_lightning.recalibration import population_statistics


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(3))
    for layer in (net[0], net[4]):
        nn.init.normal_(layer.running_mean)
        nn.init.normal_(layer.weight)
    return net


def batches(*sizes):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(size, 2, 5, 5, generator=g) for size in sizes]


def test_the_error_tells_layer_and_shape(model):
    with pytest.raises(SingleValueError, match=r"'4' \(BatchNorm1d\).*\(1, 3\).*drop_last") as raised:
        population_statistics(model, batches(8, 1))
    assert raised.value.layer == "4"
    assert raised.value.shape == (1, 3)


def test_the_batch_is_left_out_of_every_layer(model):
    told = []
    eight, one, four = batches(8, 1, 4)
    measured = population_statistics(model, iter([eight, one, four]), on_single_value=told.append)
    expected = population_statistics(model, [eight, four])
    assert [error.layer for error in told] == ["4"]
    for name, layer in expected.items():
        assert (measured[name].moments.count, measured[name].calls) == (layer.moments.count, layer.calls)
        assert torch.equal(measured[name].moments.mean, layer.moments.mean)
        assert torch.equal(measured[name].moments.m2, layer.moments.m2)
        assert measured[name].batches == 2


def test_nothing_else_is_an_error(model):
    with pytest.raises(SingleValueError):
        population_statistics(model, batches(1, 1), on_single_value=lambda error: None)
