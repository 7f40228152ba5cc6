"""Samples written down by hand, for the tests of alerts."""

import torch

from bn_lightning.monitoring import ActivationSnapshot, RunningSnapshot
from bn_lightning.monitoring.running_snapshot import RunningRow

__all__ = ["HALF", "block", "norms", "reading", "relu", "sample"]

HALF = 65504.0


def block(*, std=1.0, largest=None, count=400, channels=10, dead=0, smallest=None, nonfinite=0):
    """Write the statistics of a layer down: its channels' count, mean, m2, min, max, zeros and nonfinite."""
    alive = [count, 0.0, count * std**2, -3 * std if smallest is None else smallest, largest or 3 * std, 0, 0]
    columns = [[count, 0, 0, 0, 0, count, 0]] * dead + [alive] * (channels - dead)
    found = torch.tensor(columns, dtype=torch.float64).mT.contiguous()
    found[-1, 0] = nonfinite
    if nonfinite:
        found[1:5, 0] = torch.nan
    return found


def sample(step=None, limits=None, **blocks):
    return ActivationSnapshot(blocks, {}, step=step, limits=limits or {})


def relu(share):
    return sample(fc=block(channels=1000, dead=round(1000 * share), smallest=0.0))


def norms(*values, limits=None):
    """Gradients of layers "0", "1", … with these norms."""
    return sample(limits=limits, **{str(i): block(count=4, channels=1, std=norm / 2) for i, norm in enumerate(values)})


def reading(**fields):
    usual = {"drift": 0.01, "noise": 0.01, "resolution": 1e-6, "steps": 50, "batches": 10_000, "momentum": 0.1}
    return RunningSnapshot((RunningRow("bn", 8, **(usual | fields)),), 50, {}, {})
