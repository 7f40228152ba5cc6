"""Small trainings whose inputs differ, between training and evaluation or from feature to feature."""

import torch
import torch.nn.functional as F
from auditing.faults.catalogue_batches import perceptron
from auditing.faults.digits_training import digits, fit, network

from bn_lightning.auditing import audit_batch_norm

__all__ = ["FAULTS", "in_other_units", "unseen"]


def unseen():
    """Return digits that `digits` leaves out by default."""
    return digits(batches=28)[20:]


def evaluation_shift():
    """Forget to standardize the evaluation images: pixels from 0 to 1."""
    model = network()
    fit(model, digits())
    raw = [((x - x.min()) / (x.max() - x.min()), y) for x, y in unseen()]
    return audit_batch_norm(model.eval(), digits(), val_batches=raw, loss=F.cross_entropy)


def in_other_units():
    """Give every column of the flat images units of its own, over two decades."""
    units = torch.logspace(-1, 1, 8).view(1, 1, 1, 8)
    return [(x * units, y) for x, y in digits()]


def unstandardized_input():
    """Train on them as they are."""
    model, batches = perceptron(), in_other_units()
    fit(model, batches, lr=0.01)
    return audit_batch_norm(model.eval(), batches, loss=F.cross_entropy)


FAULTS = {"evaluation-shift": evaluation_shift, "unstandardized-input": unstandardized_input}
