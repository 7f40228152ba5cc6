"""Trainings whose bug leaves no trace in the network, only in how often its statistics moved."""

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from auditing.faults.trainings import Digits, audited
from torch.utils.checkpoint import checkpoint

__all__ = ["FAULTS", "HeadOnly", "LeftInTraining", "Recomputing", "TwoViews"]


class TwoViews(Digits):
    """A target without gradients from an augmented view, by the same network in training mode."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        with torch.no_grad():
            target = self(x + 0.3 * torch.randn_like(x)).softmax(1)
        logits = self(x)
        return F.cross_entropy(logits, y) + 0.1 * F.cross_entropy(logits, target)


class Recomputing(Digits):
    """Activation checkpointing of the second convolution and its BN."""

    def forward(self, x):
        features = self.net[0]
        x = checkpoint(features[3:], features[:3](x), use_reentrant=False)
        return self.net[1:](x)


class LeftInTraining(Digits):
    """Monte Carlo dropout gone wrong: validation puts the network into training mode."""

    def on_validation_model_eval(self):
        super().on_validation_model_eval()
        self.net[0][3:].train()


class HeadOnly(Digits):
    """Fine-tuning that freezes by requires_grad alone."""

    def configure_optimizers(self):
        self.net[0].requires_grad_(False)
        return torch.optim.SGD(self.net[1:].parameters(), lr=0.05)


def extra_forward():
    """Run the network a second time under no_grad in each step."""
    return audited(TwoViews())


def checkpoint_recompute():
    """Checkpoint activations of a block with BN in it."""
    return audited(Recomputing())


def wrong_mode_in_validation():
    """Validate in training mode."""
    return audited(LeftInTraining())


def frozen_weights_in_training():
    """Train a head on a frozen backbone in training mode."""
    return audited(HeadOnly())


class LikeEvaluation(pl.Callback):
    """Forgets .train() after a validation of its own."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 10:
            pl_module.eval()


# Slugs that other catalogues have too are found here by the passive stage.
FAULTS = {
    "extra-forward": extra_forward,
    "checkpoint-recompute": checkpoint_recompute,
    "wrong-mode": wrong_mode_in_validation,
    "frozen-weights-moving-statistics": frozen_weights_in_training,
}
