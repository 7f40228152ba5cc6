"""Train any network to classify images."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassAccuracy

from bn_lightning.errors import BatchNormError
from bn_lightning.modules.parameter_groups import decay_groups
from bn_lightning.networks import build_network

__all__ = ["ImageClassifier"]


class ImageClassifier(pl.LightningModule):
    """Cross-entropy, SGD with Nesterov momentum, one learning-rate cycle; accuracy by torchmetrics.

    Hyperparameters hold names and plain values only, so a checkpoint loads under ``weights_only``. A network given
    as an object is not one of them: ``ImageClassifier.load_from_checkpoint(path, model=network)``.

    Args:
        model: A network's name (see `bn_lightning.networks.build_network`), or any network from images
            (N, C, H, W) to logits (N, num_classes).
        num_classes: Number of classes.
        learning_rate: The peak of the cycle, per optimizer step.
        momentum: Of SGD (not of BatchNorm).
        weight_decay: For weights; norm parameters and biases do not decay.
        network_options: For the constructor of a network given by name.

    Logs ``train/loss``, and ``loss`` and ``accuracy`` under ``val/`` and ``test/``: mean cross-entropy in nats, and
    the share of images classified right.

    Raises:
        BatchNormError: If the checkpoint was trained with a network object and none is given.

    Example:
        >>> module = ImageClassifier("residual", network_options={"widths": (8,), "blocks": 1})
        >>> module(torch.zeros(1, 1, 8, 8)).shape
        torch.Size([1, 10])
    """

    def __init__(
        self,
        model: str | nn.Module | None = "residual",
        num_classes: int = 10,
        learning_rate: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        network_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if model is None:
            raise BatchNormError(
                "this classifier was trained with a network object, which a checkpoint does not hold; "
                "pass it: ImageClassifier.load_from_checkpoint(path, model=network)"
            )
        named = isinstance(model, str)
        if network_options and not named:
            raise BatchNormError("network_options= are for a network given by name; got a network object")
        self.save_hyperparameters(
            {
                "model": model if named else None,
                "num_classes": num_classes,
                "learning_rate": learning_rate,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "network_options": network_options,
            }
        )
        options = {"num_classes": num_classes, **(network_options or {})}
        self.model = build_network(model, **options) if isinstance(model, str) else model
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, (N, num_classes)."""
        return self.model(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of the batch."""
        images, labels = batch
        loss = cross_entropy(self(images), labels)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy."""
        self._evaluate("val", self.val_accuracy, batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy."""
        self._evaluate("test", self.test_accuracy, batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the class of each image, (N,)."""
        images = batch[0] if isinstance(batch, tuple | list) else batch
        return self(images).argmax(1)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """SGD with one learning-rate cycle over the whole training run."""
        hparams = self.hparams
        optimizer = torch.optim.SGD(
            decay_groups(self.model, hparams["weight_decay"]),
            lr=hparams["learning_rate"],
            momentum=hparams["momentum"],
            nesterov=hparams["momentum"] > 0,
        )
        # The cycle's own momentum schedule would overrule the hyperparameter.
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            hparams["learning_rate"],
            total_steps=int(self.trainer.estimated_stepping_batches),
            cycle_momentum=False,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _evaluate(self, stage: str, accuracy: MulticlassAccuracy, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        logits = self(images)
        accuracy(logits, labels)
        self.log(f"{stage}/loss", cross_entropy(logits, labels), prog_bar=True)
        self.log(f"{stage}/accuracy", accuracy, prog_bar=True)
