"""Networks as people have them."""

import copy

import pytest
import torch

from bn_lightning import fold_batch_norm

timm = pytest.importorskip("timm")


@pytest.mark.parametrize(
    ("name", "reasons"),
    [
        pytest.param("resnet18", {"": 20}, id="resnet18"),
        pytest.param("mobilenetv3_small_050", {"": 34}, id="mobilenetv3"),
    ],
)
def test_timm(randomize, fingerprint, name, reasons):
    net = randomize(timm.create_model(name))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        exact = copy.deepcopy(net).double()(x.double())
    state = {key: value.clone() for key, value in net.state_dict().items()}
    result = fold_batch_norm(net, x)
    counted = {}
    for row in result.report.rows:
        counted[row.reason] = counted.get(row.reason, 0) + 1
    assert counted == reasons
    assert result.report.error <= 1e-9
    with torch.no_grad():
        assert (net(x).double() - exact).abs().max() <= 1e-4 * exact.abs().max()
    result.undo()
    assert list(net.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
