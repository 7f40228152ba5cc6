"""Small trainings with something beside a BN layer that works against it."""

import torch
import torch.nn.functional as F
from auditing.faults.digits_training import digits, fit, network

from bn_lightning.auditing import audit_batch_norm

__all__ = ["FAULTS"]


def decayed_affine():
    """Let weight decay shrink every parameter alike."""
    model, batches = network(), digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    fit(model, batches, optimizer=optimizer)
    return audit_batch_norm(model.eval(), batches, loss=F.cross_entropy, optimizer=optimizer)


def redundant_bias():
    """Keep the convolutions' biases."""
    model, batches = network(bias=True), digits()
    fit(model, batches)
    return audit_batch_norm(model.eval(), batches, loss=F.cross_entropy)


def dropout_before_norm():
    """Drop half of the activations in front of the second BN."""
    model, batches = network(dropout=0.5), digits()
    fit(model, batches)
    return audit_batch_norm(model.eval(), batches, loss=F.cross_entropy)


FAULTS = {
    "decayed-affine": decayed_affine,
    "redundant-bias": redundant_bias,
    "dropout-before-norm": dropout_before_norm,
}
