"""Small networks with BatchNorm whose state is not fresh, and what has to come back of them."""

import random

import numpy as np
import torch
from torch import nn


def batch(n=16, features=6, classes=3, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, features, generator=generator), torch.randint(classes, (n,), generator=generator)


def perceptron(seed=0, features=6, classes=3, dropout=0.0):
    """Build linear-BN-ReLU twice and a head, with random statistics, γ and β."""
    torch.manual_seed(seed)
    layers = []
    for width_in, width in ((features, 8), (8, 8)):
        layers += [nn.Linear(width_in, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(dropout)]
    network = nn.Sequential(*layers, nn.Linear(8, classes))
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm1d):
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias)
            layer.num_batches_tracked.fill_(7)
    return network


class State:
    """Everything of a network and of the random states that a probe has to give back."""

    def __init__(self, network):
        self.network = network
        self.tensors = {
            name: (each, each.data_ptr(), each.clone()) for name, each in network.state_dict(keep_vars=True).items()
        }
        self.gradients = {
            name: (each.grad, None if each.grad is None else each.grad.clone())
            for name, each in network.named_parameters()
        }
        self.modes = [module.training for module in network.modules()]
        self.hooks = [(len(each._forward_hooks), len(each._forward_pre_hooks)) for each in network.modules()]
        self.momenta = [getattr(module, "momentum", None) for module in network.modules()]
        self.random = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()

    def assert_back(self):
        now = self.network.state_dict(keep_vars=True)
        assert now.keys() == self.tensors.keys()
        for name, (tensor, place, value) in self.tensors.items():
            assert now[name] is tensor, name
            assert now[name].data_ptr() == place, name
            assert torch.equal(now[name], value), name
        for name, parameter in self.network.named_parameters():
            gradient, value = self.gradients[name]
            assert parameter.grad is gradient, name
            assert gradient is None or torch.equal(gradient, value), name
        assert self.modes == [module.training for module in self.network.modules()]
        assert self.hooks == [
            (len(each._forward_hooks), len(each._forward_pre_hooks)) for each in self.network.modules()
        ]
        assert self.momenta == [getattr(module, "momentum", None) for module in self.network.modules()]
        assert torch.equal(self.random[0], torch.get_rng_state())
        assert self.random[1] == random.getstate()
        assert np.array_equal(self.random[2], np.random.get_state()[1])


class FailsAt(nn.Module):
    """Raises at the given forward call, counted from 0; else an identity."""

    def __init__(self, call, error=ArithmeticError):
        super().__init__()
        self.call, self.error = call, error
        self.calls = [0]

    def forward(self, x):
        self.calls[0] += 1
        if self.calls[0] - 1 == self.call:
            raise self.error("stop")
        return x
