"""Small trainings whose running statistics do not follow: momentum, too few updates, averaged weights."""

import torch.nn.functional as F
from auditing.faults.digits_training import digits, fit, network
from torch.optim.swa_utils import AveragedModel

from bn_lightning.auditing import audit_batch_norm

__all__ = ["FAULTS", "averaged_network"]


def momentum_convention():
    """Take momentum=0.99 from TensorFlow, where it weighs the old value."""
    model, batches = network(momentum=0.99), digits()
    fit(model, batches)
    return audit_batch_norm(model.eval(), batches, loss=F.cross_entropy)


def momentum_zero():
    """Set momentum=0 to hold the statistics, in a network that is trained from scratch."""
    model, batches = network(momentum=0.0), digits()
    fit(model, batches)
    return audit_batch_norm(model.eval(), batches, loss=F.cross_entropy)


def not_converged():
    """Train for 60 steps with momentum=0.01: (0, 1) still weighs 55 %."""
    model, batches = network(momentum=0.01), digits()
    fit(model, batches, epochs=3)
    return audit_batch_norm(model.eval(), batches, loss=F.cross_entropy)


def averaged_network(lr=0.3, batches=None):
    """Average the weights over the last three epochs at a high learning rate; the statistics are the last network's."""
    model, batches = network(), batches or digits()
    fit(model, batches, epochs=2, lr=lr)
    averaged = AveragedModel(model)
    fit(model, batches, epochs=3, lr=lr, after_step=lambda: averaged.update_parameters(model))
    return averaged.eval()


def averaged_weights():
    """Evaluate averaged weights without update_bn."""
    return audit_batch_norm(averaged_network(), digits(), loss=F.cross_entropy)


FAULTS = {
    "momentum-convention": momentum_convention,
    "momentum-zero": momentum_zero,
    "not-converged": not_converged,
    "averaged-weights": averaged_weights,
}
