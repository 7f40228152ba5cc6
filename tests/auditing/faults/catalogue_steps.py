"""Trainings that run the network where or as they should not: between batches, by .eval(), without learning."""

import torch
from auditing.faults.trainings import Digits, audited

__all__ = ["FAULTS", "AfterTheBatch", "AfterTheEpoch", "InEvaluation", "Standing"]


class AfterTheBatch(Digits):
    """Runs pictures through in training mode to look at what comes out."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        with torch.no_grad():
            self(3 * batch[0])


class AfterTheEpoch(Digits):
    """Does so once an epoch, right before validation."""

    def on_train_epoch_end(self):
        with torch.no_grad():
            self(3 * torch.randn(8, 1, 8, 8))


class InEvaluation(Digits):
    """Trains in evaluation mode, and leaves no trace of it."""

    def training_step(self, batch, batch_idx):
        self.eval()
        loss = super().training_step(batch, batch_idx)
        self.train()
        return loss


class Standing(Digits):
    """Freezes all but the head by a learning rate of 0; the head's goes to 0 at the end, as many a schedule does."""

    def configure_optimizers(self):
        groups = [{"params": self.net[0].parameters(), "lr": 0.0}, {"params": self.net[3].parameters()}]
        optimizer = torch.optim.SGD(groups, lr=0.05)
        epochs = self.trainer.max_epochs
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: max(0, 1 - epoch / epochs))]


def extra_forward():
    """Run the network in a hook."""
    return audited(AfterTheBatch(), max_epochs=2)


def wrong_mode():
    """Call .eval() inside the step."""
    return audited(InEvaluation(), max_epochs=2)


def frozen_weights_moving_statistics():
    """Freeze by the learning rate."""
    return audited(Standing(), max_epochs=2)


FAULTS = {
    "extra-forward": extra_forward,
    "wrong-mode": wrong_mode,
    "frozen-weights-moving-statistics": frozen_weights_moving_statistics,
}
