"""Small fine-tunings that freeze by half, or leave a layer in the wrong mode."""

import torch
import torch.nn.functional as F
from auditing.faults.digits_training import batch_norms, digits, fit, network

from bn_lightning.auditing import audit_batch_norm

__all__ = ["FAULTS", "fine_tuned", "shifted"]


def shifted():
    """Return the digits darker and with more contrast, for the fine-tuning."""
    return [(1.5 * x - 1, y) for x, y in digits()]


def fine_tuned():
    """Pretrain, freeze all but the head by requires_grad=False, and train the head in training mode."""
    model = network()
    fit(model, digits())
    model[0].requires_grad_(False)
    return model, fit(model, shifted(), epochs=2)


def frozen_weights_moving_statistics():
    """Freeze weights only."""
    model, optimizer = fine_tuned()
    return audit_batch_norm(model, shifted(), loss=F.cross_entropy, optimizer=optimizer)


def untracked_freeze():
    """Freeze BN by track_running_stats=False, and go on training all the rest."""
    model = network()
    fit(model, digits())
    for layer in batch_norms(model).values():
        layer.track_running_stats = False
    fit(model, shifted(), epochs=2)
    return audit_batch_norm(model.eval(), shifted(), loss=F.cross_entropy)


def wrong_mode():
    """Call .train() on a part of a network that is evaluated."""
    model = network()
    fit(model, digits())
    model.eval()[0][4].train()
    with torch.no_grad():
        for x, _ in digits(batches=5):
            model(x)
    return audit_batch_norm(model, digits(), loss=F.cross_entropy)


FAULTS = {
    "frozen-weights-moving-statistics": frozen_weights_moving_statistics,
    "untracked-freeze": untracked_freeze,
    "wrong-mode": wrong_mode,
}
