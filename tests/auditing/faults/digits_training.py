"""A small network trained on real digits in under a second, in which the fixtures put their bugs."""

from functools import cache

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["batch_norms", "digits", "fit", "network"]


@cache
def _data():
    images, labels = load_digits(return_X_y=True)
    x = torch.as_tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order], torch.as_tensor(labels)[order]


def digits(batches=20, batch_size=64, scale=1.0):
    """Return batches of images about mean 0 and standard deviation 1 times the scale, and their labels."""
    x, y = _data()
    x = (x - x.mean()) / x.std() * scale
    return list(zip(x.split(batch_size), y.split(batch_size), strict=True))[:batches]


def network(momentum=0.1, bias=False, dropout=None, **options):
    """Build conv-BN-ReLU twice, which is ``features.0`` to ``.5``, and a linear head."""
    torch.manual_seed(0)
    between = [] if dropout is None else [nn.Dropout(dropout)]
    return nn.Sequential(
        nn.Sequential(
            *(nn.Conv2d(1, 8, 3, bias=bias), nn.BatchNorm2d(8, momentum=momentum, **options), nn.ReLU(), *between),
            *(nn.Conv2d(8, 16, 3, bias=bias), nn.BatchNorm2d(16, momentum=momentum, **options), nn.ReLU()),
        ),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
    )


def batch_norms(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def fit(model, batches, epochs=5, lr=0.05, optimizer=None, after_step=None):
    """Train; steps of a loss that is not finite are left out, as a gradient scaler does. Return the optimizer."""
    optimizer = optimizer or torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=0.9)
    for _ in range(epochs):
        for x, y in batches:
            loss = F.cross_entropy(model(x).float(), y)
            if torch.isfinite(loss):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            if after_step is not None:
                after_step()
    return optimizer
