"""Networks as people have them: twelve architectures of different families, and what is left to compute."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from bn_lightning import fold_batch_norm

timm = pytest.importorskip("timm")

# What is folded of each, and why the rest is not.
ARCHITECTURES = {
    "resnet18": {"folded-backward": 20},
    "mobilenetv3_small_050": {"folded-backward": 34},
    "efficientnet_lite0": {"folded-backward": 49},
    "regnety_002": {"folded-backward": 44},
    "densenet121": {"folded-backward": 59, "nonlinear_between": 7, "multi_user": 55},
    "levit_128s": {"folded-backward": 50, "folded-forward": 2},
    "repvgg_a0": {"folded-backward": 44, "nonlinear_between": 17},
    "ghostnet_050": {"folded-backward": 80},
    "hrnet_w18_small": {"folded-backward": 91},
    "inception_v3": {"folded-backward": 94},
    "dpn48b": {"folded-backward": 33, "nonlinear_between": 2, "multi_user": 19},
    "mobilevit_xxs": {"folded-backward": 32},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_twelve_families(randomize, name):
    torch.manual_seed(0)
    net = randomize(timm.create_model(name))
    size = net.default_cfg["input_size"] if net.default_cfg.get("fixed_input_size") else (3, 96, 96)
    x, held_out = torch.randn(2, *size), torch.randn(3, *size)
    with torch.no_grad():
        exact = copy.deepcopy(net).double()(held_out.double())
    state = {key: value.clone() for key, value in net.state_dict().items()}
    result = fold_batch_norm(net, x)
    counted = {}
    for row in result.report.rows:
        counted[row.reason or row.action] = counted.get(row.reason or row.action, 0) + 1
    assert counted == ARCHITECTURES[name]
    assert result.report.error <= 1e-9
    with torch.no_grad():
        assert (net(held_out).double() - exact).abs().max() <= 1e-4 * exact.abs().max()
    result.undo()
    assert list(net.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    result = fold_batch_norm(net, x, standalone="affine")
    assert result.report.error <= 1e-9
    assert not [module for module in net.modules() if isinstance(module, _BatchNorm)]


class Kernels(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def kernels(net, x):
    with torch.no_grad(), Kernels() as seen:
        net(x)
    return seen.names


def without_batch_norm(net):
    """The same network as if it had never had one: drop and activation stay where they are."""
    for parent in list(net.modules()):
        for key, child in list(parent.named_children()):
            if isinstance(child, _BatchNorm):
                setattr(parent, key, nn.Sequential(*child.children()))
    return net


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenetv3_large_100", "efficientnet_b0", "regnety_004"])
def test_what_is_left_runs_the_kernels_of_a_network_without_batch_norm(randomize, name):
    net = randomize(timm.create_model(name))
    x = torch.randn(1, 3, 64, 64)
    bare = without_batch_norm(copy.deepcopy(net))
    before = kernels(net, x)
    fold_batch_norm(net, x)
    found = kernels(net, x)
    assert found == kernels(bare, x)
    assert len(before) - len(found) >= 20
    assert not [name for name in found if "batch_norm" in name]
