"""A small network, and its loss under the audit's five readings written out in plain loops, without the library."""

import torch
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    """Two BatchNorms, one of them before dropout, in networks whose loss has no kinks."""

    def __init__(self, dropout=0.3):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.bn1 = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(4, 5, 3)
        self.bn2 = nn.BatchNorm2d(5, eps=1e-3)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        x = self.dropout(torch.tanh(self.bn1(self.conv1(x))))
        return self.head(F.gelu(self.bn2(self.conv2(x))).mean((2, 3)))


def net(dropout=0.3, dtype=torch.float64, drift=0.3, batches=None):
    """Random weights, and running statistics that are off those of the batches by about ``drift`` σ."""
    source = torch.Generator().manual_seed(0)
    model = Net(dropout).to(dtype)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("tracked"):
                tensor.fill_(500)
            elif "running" not in name:
                tensor.copy_(torch.randn(tensor.shape, generator=source, dtype=torch.float64) * 0.5)
        for bn in (model.bn1, model.bn2):
            bn.weight.abs_().add_(0.5)
        for bn, (mean, var) in zip(
            (model.bn1, model.bn2), population(model, batches or labelled(dtype=dtype)), strict=True
        ):
            noise = torch.randn(2, len(mean), generator=source, dtype=torch.float64)
            bn.running_mean.copy_(mean + drift * noise[0] * var.sqrt())
            bn.running_var.copy_(var * (drift * noise[1]).exp())
    return model


def labelled(sizes=(8, 12, 5), seed=1, offset=0.0, dtype=torch.float64):
    source = torch.Generator().manual_seed(seed)
    return [
        (
            (offset + torch.randn(n, 3, 7, 7, generator=source, dtype=torch.float64)).to(dtype),
            torch.randint(3, (n,), generator=source),
        )
        for n in sizes
    ]


def population(model, batches):
    """Each BN's input over all batches, by batch statistics and without dropout: mean and variance, correction=1."""
    inputs = [[], []]
    with torch.no_grad():
        for x, _ in batches:
            inputs[0].append(model.conv1(x))
            hidden = torch.tanh(by_batch(model.bn1, inputs[0][-1]))
            inputs[1].append(model.conv2(hidden))
    whole = [torch.cat(each) for each in inputs]
    return [(each.mean((0, 2, 3)), each.var((0, 2, 3), correction=1)) for each in whole]


def by_batch(bn, x):
    return F.batch_norm(x, None, None, bn.weight, bn.bias, training=True, eps=bn.eps)


def by_statistics(bn, x, mean, var):
    return F.batch_norm(x, mean, var, bn.weight, bn.bias, training=False, eps=bn.eps)


def losses(model, batches, statistics, dropout=False):
    """A loss for each batch; ``statistics`` ``None`` normalizes by the batch, else there are those of either layer."""
    found = []
    for index, (x, target) in enumerate(batches):
        torch.manual_seed(index)
        hidden = [model.conv1, model.conv2]
        for place, bn in enumerate((model.bn1, model.bn2)):
            x = hidden[place](x)
            x = by_batch(bn, x) if statistics is None else by_statistics(bn, x, *statistics[place])
            if place == 0:
                x = torch.tanh(x)
                x = F.dropout(x, model.dropout.p, training=dropout)
        found.append(F.cross_entropy(model.head(F.gelu(x).mean((2, 3))), target))
    return torch.stack(found)


def running(model):
    return [(bn.running_mean, bn.running_var) for bn in (model.bn1, model.bn2)]


def mean(values, batches):
    sizes = torch.tensor([float(len(x)) for x, _ in batches])
    return float((values * sizes).sum() / sizes.sum())


def readings(model, batches, val_batches=None):
    """All of them, each a loss a batch."""
    read = batches if val_batches is None else val_batches
    with torch.no_grad():
        found = {
            "full_training": losses(model, read, None, dropout=True),
            "batch_statistics": losses(model, read, None),
            "recalibrated": losses(model, read, population(model, batches)),
            "deployed": losses(model, read, running(model)),
        }
        if val_batches is not None:
            found["evaluation_statistics"] = losses(model, read, population(model, val_batches))
    return found
