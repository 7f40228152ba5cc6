"""Small trainings whose step runs a layer more than once."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from auditing.faults.digits_training import digits, fit, network
from torch import nn
from torch.utils.checkpoint import checkpoint

from bn_lightning import paused_statistics
from bn_lightning.auditing import audit_batch_norm

__all__ = ["FAULTS", "Checkpointed", "audit_of_step", "beside", "with_targets"]


def beside(model, batch, factor=0.3, offset=-2.0):
    """Learn pictures and the same in another light, in a forward pass each."""
    x, y = batch
    return F.cross_entropy(model(x), y) + F.cross_entropy(model(factor * x + offset), y)


def with_targets(model, batch, context=nullcontext):
    """Learn to say of a picture shifted by one pixel what is said of it unshifted, without gradient."""
    x, y = batch
    with torch.no_grad(), context():
        target = model(x.roll(1, dims=3)).softmax(1)
    output = model(x)
    return F.cross_entropy(output, y) + 0.1 * F.cross_entropy(output, target)


def audit_of_step(step):
    """Train by a step, and audit with it."""
    model, batches = network(), digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        for batch in batches:
            optimizer.zero_grad()
            step(model, batch).backward()
            optimizer.step()
    return audit_batch_norm(model.eval(), batches, step=step)


def shared_layer():
    """Let one BN serve two domains, each in batches of its own."""
    return audit_of_step(beside)


def extra_forward():
    """Compute targets in training mode."""
    return audit_of_step(with_targets)


class Checkpointed(nn.Module):
    """Runs a network in two segments that are computed again in the backward pass.

    Args:
        network: In ``network.0`` and the rest.
        pause: Whether BN counts once, as `paused_statistics` tells how.
    """

    def __init__(self, network, pause=False):
        super().__init__()
        self.body, self.head = network[0], network[1:]
        self.pause = pause

    def forward(self, x):
        options = {"context_fn": lambda: (nullcontext(), paused_statistics(self.body))} if self.pause else {}
        return self.head(checkpoint(self.body, x, use_reentrant=False, **options))


def checkpoint_recompute():
    """Checkpoint the convolutions."""
    model, batches = Checkpointed(network()), digits()
    fit(model, batches)
    return audit_batch_norm(model.eval(), batches, loss=F.cross_entropy)


FAULTS = {
    "shared-layer": shared_layer,
    "extra-forward": extra_forward,
    "checkpoint-recompute": checkpoint_recompute,
}
