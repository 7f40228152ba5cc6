"""A small training with a BN layer that is wrong in one memory format."""

import torch
import torch.nn.functional as F
from auditing.faults.digits_training import digits, fit, network
from torch import nn

from bn_lightning.auditing import audit_batch_norm

__all__ = ["FAULTS", "FlatBatchNorm", "flattened"]


class FlatBatchNorm(nn.BatchNorm2d):
    """Lays (C, H·W) over the memory without asking how it is laid out."""

    def forward(self, x):
        images, channels, *sides = x.shape
        size = torch.Size(sides).numel()
        flat = x.as_strided((images, channels, size), (channels * size, size, 1))
        normalized = F.batch_norm(
            flat, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )
        return normalized.as_strided(x.shape, (channels * size, size, sides[1], 1))


def flattened():
    """Build the network with it in second place."""
    model = network()
    model[0][4] = FlatBatchNorm(16)
    return model


def device_mismatch():
    """Run it in channels_last memory."""
    model = flattened().to(memory_format=torch.channels_last)
    batches = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in digits()]
    fit(model, batches)
    return audit_batch_norm(model.eval(), batches, loss=F.cross_entropy)


FAULTS = {"device-mismatch": device_mismatch}
