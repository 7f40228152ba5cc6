"""Small trainings on batches that are too small, leave one example over, come in order, or are padded."""

from contextlib import suppress

import torch
import torch.nn.functional as F
from auditing.faults.digits_training import digits, fit, network
from torch import nn

from bn_lightning.auditing import TrainingSettings, audit_batch_norm

__all__ = ["FAULTS", "in_order", "perceptron", "sequence_network", "sequences"]


def perceptron():
    """Build linear-BN-ReLU and a linear head on flat pixels; the BN is ``2``."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))


def small_batch():
    """Train with 4 examples a forward pass and 8 of those an optimizer step."""
    model, batches = perceptron(), digits(batches=320, batch_size=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for index, (x, y) in enumerate(batches, 1):
        (F.cross_entropy(model(x), y) / 8).backward()
        if index % 8 == 0:
            optimizer.step()
            optimizer.zero_grad()
    training = TrainingSettings(batch_size=4, accumulate_grad_batches=8)
    return audit_batch_norm(model.eval(), batches, loss=F.cross_entropy, training=training)


def single_value_batch():
    """Keep the last batch, in which one example is left over: the first epoch ends in torch's error."""
    model, batches = perceptron(), digits()
    (x, y) = digits(batches=21)[-1]
    batches = [*batches, (x[:1], y[:1])]
    with suppress(ValueError):
        fit(model, batches)
    return audit_batch_norm(model.eval(), batches, loss=F.cross_entropy)


def in_order():
    """Sort the digits by what they show."""
    x, y = (torch.cat(part) for part in zip(*digits(), strict=True))
    order = torch.argsort(y, stable=True)
    return list(zip(x[order].split(64), y[order].split(64), strict=True))


def ordered_batches():
    """Forget shuffle=True with data that are stored class by class."""
    model, batches = network(), in_order()
    fit(model, batches)
    return audit_batch_norm(model.eval(), batches, loss=F.cross_entropy)


def sequences(padded=True):
    """Return rows of one to four digits side by side, (N, 8, 8·4), read by column; zeros after the last one."""
    found = []
    for index, (x, y) in enumerate(digits(batches=16)):
        number = torch.randint(1, 5, (16,), generator=torch.Generator().manual_seed(index))
        lines = x.view(16, 4, 8, 8).transpose(1, 2).reshape(16, 8, 32).clone()
        if padded:
            lines[(torch.arange(32) >= 8 * number[:, None])[:, None].expand_as(lines)] = 0.0
        found.append((lines, y.view(16, 4)[:, 0]))
    return found


def sequence_network():
    """Build two convolutions along the sequence with BN behind, ``1`` and ``4``, and a head on their average."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv1d(8, 16, 3, padding=1), nn.BatchNorm1d(16), nn.ReLU()),
        *(nn.Conv1d(16, 16, 3, padding=1), nn.BatchNorm1d(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(16, 10)),
    )


def padding():
    """Pad sequences of different length with zeros, and let BN take them for data."""
    model, batches = sequence_network(), sequences()
    fit(model, batches)
    return audit_batch_norm(model.eval(), batches, loss=F.cross_entropy)


FAULTS = {
    "small-batch": small_batch,
    "single-value-batch": single_value_batch,
    "ordered-batches": ordered_batches,
    "padding": padding,
}
