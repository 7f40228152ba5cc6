"""SkipInit: one factor, trained, in the input's dtype; at 0 a deep residual network starts as the identity."""

import pytest
import torch
from torch import nn

from bn_lightning.layers.skip_init import SkipInit


class Residual(nn.Module):
    def __init__(self, width, *end):
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), *end)

    def forward(self, x):
        return x + self.branch(x)


def test_output_and_gradients():
    layer = SkipInit(0.3, dtype=torch.float64)
    x = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    torch.testing.assert_close(layer(x), 0.3 * x)

    def scaled(x, alpha):
        return torch.func.functional_call(layer, {"alpha": alpha}, (x,))

    assert torch.autograd.gradcheck(scaled, (x, layer.alpha))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(4,), (2, 3, 4, 5)], ids=str)
def test_keeps_shape_and_dtype(shape, dtype):
    y = SkipInit(0.5)(torch.ones(shape, dtype=dtype))
    assert (y.shape, y.dtype) == (shape, dtype)


@pytest.mark.parametrize("initial", [0.0, 50**-0.5], ids=["0", "1/√d"])
def test_a_deep_residual_network_starts_near_the_identity_and_trains(initial):
    torch.manual_seed(0)
    blocks = [Residual(16, SkipInit(initial)) for _ in range(50)]
    net = nn.Sequential(*blocks)
    x, target = torch.randn(64, 16), torch.randn(64, 16)
    start = net(x)
    assert (start - x).std() <= 1.5 * initial * 50**0.5
    optimizer = torch.optim.SGD(net.parameters(), 0.5)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (net(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(block.branch[-1].alpha != initial for block in blocks)


def test_one_parameter_that_can_be_sharded_and_reset():
    layer = SkipInit(0.25)
    assert {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()} == {"alpha": (1,)}
    layer.load_state_dict({"alpha": torch.tensor([3.0])})
    layer.reset_parameters()
    assert layer.alpha == 0.25
    assert repr(layer) == "SkipInit(initial=0.25)"


def test_compiles_whole():
    layer, x = SkipInit(0.3), torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
