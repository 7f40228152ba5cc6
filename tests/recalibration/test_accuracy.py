"""A residual network of timm against pooled float64 statistics of what each layer was given."""

import pytest
import torch
from population_truth import batch_norms, pooled_float64

from bn_lightning import recalibrate_batch_norm

timm = pytest.importorskip("timm")
SIZES = [32] * 7 + [8]
ULP = 2**-10  # of float32 at 1e4


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = timm.create_model("resnet18")
    with torch.no_grad():
        for layer in batch_norms(model).values():
            layer.weight.uniform_(0.5, 1.5)
            layer.bias.normal_()
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    return model


def data(mean, std, layout=torch.contiguous_format, channels=3, size=64):
    g = torch.Generator().manual_seed(1)
    return [(mean + std * torch.randn(n, channels, size, size, generator=g)).to(memory_format=layout) for n in SIZES]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_every_layer_of_a_resnet18(network, layout):
    batches = data(1, 2, layout)
    truth = pooled_float64(network, batches)
    result = recalibrate_batch_norm(network, batches)
    assert len(truth) == 20
    for name, layer in batch_norms(network).items():
        count, mean, var = truth[name]
        assert next(row.count for row in result.rows if row.name == name) == count
        assert float(((layer.running_mean.double() - mean) / var.sqrt()).abs().max()) <= 1e-5, name
        assert float((layer.running_var.double() / var - 1).abs().max()) <= 1e-5, name


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_its_first_layer_on_its_own_inputs_far_from_zero(network, layout):
    batches = data(1e4, 0.1, layout, channels=64, size=16)
    recalibrate_batch_norm(network, batches, include=["bn1"], forward=lambda model, x: model.bn1(x))
    values = torch.cat(batches).double()
    assert float((network.bn1.running_mean.double() - values.mean((0, 2, 3))).abs().max()) <= ULP / 2
    error = (network.bn1.running_var.double() / values.var((0, 2, 3)) - 1).abs().max()
    assert float(error) <= 1e-6
