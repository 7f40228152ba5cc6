import pytest
import torch

from bn_lightning.errors import BatchNormError
from bn_lightning.networks import ResidualNetwork, build_network
from bn_lightning.selection import named_batch_norms


def test_shapes_and_one_bn_a_convolution():
    net = ResidualNetwork(in_channels=3, num_classes=7, widths=(4, 8), blocks=2)
    convs = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
    assert net(torch.zeros(2, 3, 16, 16)).shape == (2, 7)
    assert len(named_batch_norms(net)) == len(convs) == 1 + 4 * 2 + 1


def test_the_skip_carries_the_input():
    """With the last γ of a block at zero, the block is ReLU of its skip."""
    block = ResidualNetwork(widths=(4,), blocks=1).stages[0][0].eval()
    torch.nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 4, 5, 5)
    torch.testing.assert_close(block(x), x)


def test_unknown_names_get_the_nearest_one():
    with pytest.raises(BatchNormError, match="did you mean 'residual'"):
        build_network("resdual")
    with pytest.raises(BatchNormError, match="there are 'residual'"):
        build_network("xyz")
