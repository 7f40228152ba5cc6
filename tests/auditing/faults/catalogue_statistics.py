"""Small trainings whose running statistics are missing, unusable or too coarse."""

import math

import torch
import torch.nn.functional as F
from auditing.faults.digits_training import digits, fit, network
from torch import nn

from bn_lightning.auditing import audit_batch_norm

__all__ = ["FAULTS", "loaded_without_statistics"]


def nonfinite_statistics():
    """Let one picture with one infinite pixel through, in a training that leaves out steps of infinite loss."""
    model, batches = network(), digits()
    poisoned = batches[7][0].clone()
    poisoned[3, 0, 4, 4] = math.inf
    fit(model, [*batches[:7], (poisoned, batches[7][1]), *batches[8:]], epochs=2)
    return audit_batch_norm(model.eval(), batches, loss=F.cross_entropy)


def loaded_without_statistics():
    """Load what ``named_parameters`` gave, with strict=False: the buffers are not in it."""
    trained = network()
    fit(trained, digits())
    torch.manual_seed(1)
    model = network()
    model.load_state_dict(dict(trained.named_parameters()), strict=False)
    return model.eval()


def fresh_statistics():
    """Evaluate a checkpoint whose buffers were lost."""
    return audit_batch_norm(loaded_without_statistics(), digits(), loss=F.cross_entropy)


def no_statistics():
    """Train without running statistics, a well-known remedy for bad evaluation."""
    model, batches = network(track_running_stats=False), digits()
    fit(model, batches)
    return audit_batch_norm(model.eval(), batches, loss=F.cross_entropy)


def low_precision_statistics():
    """Train wholly in bfloat16, as Lightning's precision="bf16-true" does, with a momentum of 0.01."""
    model = network(momentum=0.01).bfloat16()
    batches = [(x.bfloat16(), y) for x, y in digits()]
    optimizer = fit(model, batches)
    return audit_batch_norm(
        model.eval(), batches, loss=lambda output, y: F.cross_entropy(output.float(), y), optimizer=optimizer
    )


def tiny_variance():
    """Let a BN standardize inputs given in kilometres where metres would be about 1: it divides by sqrt(eps)."""
    model, batches = nn.Sequential(nn.BatchNorm2d(1), network()), digits(scale=1e-3)
    fit(model, batches)
    return audit_batch_norm(model.eval(), batches, loss=F.cross_entropy)


FAULTS = {
    "nonfinite-statistics": nonfinite_statistics,
    "fresh-statistics": fresh_statistics,
    "no-statistics": no_statistics,
    "low-precision-statistics": low_precision_statistics,
    "tiny-variance": tiny_variance,
}
