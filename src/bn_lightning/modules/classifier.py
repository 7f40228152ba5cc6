"""Train any network to classify images."""

from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from bn_lightning.modules.network_module import NetworkModule

__all__ = ["ImageClassifier"]


class ImageClassifier(NetworkModule):
    """Train a network on images and their classes: cross-entropy, optimizer and schedule by name, accuracy.

    Hyperparameters hold names and plain values only, so ``ImageClassifier.load_from_checkpoint(path)`` rebuilds a named
    network, under ``weights_only`` too and without fetching the zoo's weights again. A network given as an object is
    not one of them: ``ImageClassifier.load_from_checkpoint(path, model=network)``.

    The network returns logits: a tensor, or ``.logits`` or ``"out"`` of a mapping or record. Auxiliary logits, as
    torchvision's GoogLeNet and Inception-v3 have them in training, add to the loss with 0.3 and 0.4.

    Args:
        model: A zoo's network (``timm:resnet50``, ``torchvision:resnet50``, ``package.module:callable``, see
            `bn_lightning.zoo.load_zoo_model`), one of `bn_lightning.networks.build_network`,
            ``{"class_path": "package.module.Class", "init_args": {…}}``, or any network from images (N, C, H, W) to
            logits (N, num_classes).
        num_classes: Number of classes; a named network is built with so many outputs.
        norm: A variant for `bn_lightning.convert_batch_norm`, which its BatchNorm layers become, in place; ``None``
            leaves them.
        norm_options: For the conversion: the variant's settings, ``include`` and ``exclude``.
        optimizer: A class of ``torch.optim`` by name, in any case: ``sgd``, ``adam``, ``adamw``, ….
        optimizer_options: Of its constructor. SGD has Nesterov momentum of 0.9 unless they say otherwise.
        learning_rate: Per optimizer step; of ``one_cycle`` the peak.
        weight_decay: For weights; norm parameters and biases do not decay.
        schedule: ``one_cycle`` or ``cosine`` (over the whole run, by steps), ``step`` (a tenth after each third of the
            epochs), ``constant`` or ``none``, or a class of ``torch.optim.lr_scheduler``, which advances by epochs.
        schedule_options: Of the schedule's constructor.
        network_options: For a network of `bn_lightning.networks`.
        pretrained: Load the zoo's own weights.
        checkpoint: A file of weights to start from.
        ignore_index: A label that says that there is none: it adds to no loss and no metric.

    Logs ``train/loss``, and under ``val/`` and ``test/`` ``loss``, the mean cross-entropy in nats over all labels;
    ``accuracy``, the share of images classified right; and of more than five classes ``accuracy_top5``, the share whose
    class is among the five likeliest.

    Raises:
        BatchNormError: If a name or an option is unknown or does not fit, or the checkpoint was trained with a network
            object and none is given.
        ConversionError: As `bn_lightning.convert_batch_norm`.

    Example:
        >>> import torch
        >>> module = ImageClassifier(
        ...     "residual", norm="ghost", norm_options={"virtual_batch_size": 32}, optimizer="adamw",
        ...     learning_rate=1e-3, schedule="cosine", network_options={"widths": (8,), "blocks": 1})
        >>> images = torch.zeros(2, 1, 8, 8)
        >>> module(images).shape
        torch.Size([2, 10])
        >>> module.folded(images).report.error < 1e-9
        True
    """

    @override
    def metrics(self, num_classes: int, ignore_index: int) -> dict[str, Metric]:
        measured = {"accuracy": 1, "accuracy_top5": 5} if num_classes > 5 else {"accuracy": 1}
        return {
            name: MulticlassAccuracy(num_classes, top_k=k, average="micro", ignore_index=ignore_index)
            for name, k in measured.items()
        }
