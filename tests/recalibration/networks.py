"""The network that recalibration is tested with, its data, and all that can be told about it."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    """A BN on the raw input, one after a convolution, one that runs twice a pass, dropout, and one on (N, C)."""

    def __init__(self):
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 5, 3)
        self.middle = nn.BatchNorm2d(5)
        self.mix = nn.Conv2d(5, 5, 1)
        self.shared = nn.BatchNorm2d(5)
        self.drop = nn.Dropout(0.5)
        self.linear = nn.Linear(5, 4)
        self.last = nn.BatchNorm1d(4, affine=False)

    def forward(self, x):
        x = F.relu(self.middle(self.conv(self.first(x))))
        x = self.shared(self.mix(F.relu(self.shared(x))))
        return self.last(self.linear(self.drop(x).mean((2, 3))))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def spoiled(model, seed=1):
    """Random weights, biases and running statistics: a fresh BN (0, 1) hides bugs."""
    g = seeded(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                if module.running_mean is not None:
                    module.running_mean.normal_(generator=g)
                    module.running_var.uniform_(0.5, 2.0, generator=g)
                    module.num_batches_tracked.fill_(7)
                if module.weight is not None:
                    module.weight.uniform_(0.5, 1.5, generator=g)
                    module.bias.normal_(generator=g)
    return model


def net():
    torch.manual_seed(0)
    return spoiled(Net())


def data(sizes, mean=1.0, std=2.0, seed=2):
    g = seeded(seed)
    return [mean + std * torch.randn(n, 3, 6, 6, generator=g) for n in sizes]


def double(tensor):
    return tensor.detach().double().numpy()


def fingerprint(model):
    """Everything that a borrower has to give back: bits, identities, modes, hooks, gradients, settings."""
    return [
        (
            name,
            module.training,
            len(module._forward_pre_hooks),
            len(module._forward_pre_hooks_with_kwargs),
            len(module._forward_hooks),
            getattr(module, "momentum", None),
            [(key, id(value), value.numpy().tobytes()) for key, value in module._buffers.items() if value is not None],
            [(key, id(value), value.requires_grad, value.detach().numpy().tobytes(), id(value.grad),
              None if value.grad is None else value.grad.numpy().tobytes())
             for key, value in module._parameters.items() if value is not None],
        )
        for name, module in model.named_modules()
    ] + [torch.get_rng_state().numpy().tobytes(), str(np.random.get_state())]  # fmt: skip
