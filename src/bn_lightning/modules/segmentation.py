"""Train any network to give every pixel a class."""

from typing import Any

from torch import nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex
from typing_extensions import override

from bn_lightning.modules.network_module import NetworkModule

__all__ = ["SegmentationModule"]


class SegmentationModule(NetworkModule):
    """Train a network on images and the class of each pixel: cross-entropy, mean intersection over union.

    The network returns logits (N, num_classes, H, W): a tensor, ``.logits``, or ``"out"`` of a mapping, as
    torchvision's FCN, DeepLabv3 and LR-ASPP do; the logits that they give as ``"aux"`` add to the loss with 0.5.

    Args:
        model: As for `ImageClassifier`, such as ``torchvision:lraspp_mobilenet_v3_large``.
        num_classes: K, the background included.
        ignore_index: The label of pixels that add to no loss and no metric; 255 in VOC, Cityscapes and COCO-Stuff.
        **options: Every other argument of `ImageClassifier`.

    Shape:
        Batches are (N, C, H, W) images and (N, H, W) int64 labels.

    Logs ``train/loss``, and under ``val/`` and ``test/`` ``loss``, the mean cross-entropy in nats over all labelled
    pixels; ``mean_iou``, the mean over the classes that occur, in labels or predictions, of their intersection over
    union; and ``accuracy``, the share of pixels classified right.

    Raises:
        BatchNormError: As `ImageClassifier`.
        ConversionError: As `bn_lightning.convert_batch_norm`.

    Example:
        >>> import torch
        >>> module = SegmentationModule(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), num_classes=4)
        >>> module(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 4, 8, 8])

    Reference:
        Everingham et al., IJCV 88, 2010, §4.4 (intersection over union).
    """

    def __init__(
        self, model: str | dict[str, Any] | nn.Module | None, num_classes: int, ignore_index: int = 255, **options: Any
    ) -> None:
        super().__init__(model, num_classes, ignore_index=ignore_index, **options)

    @override
    def metrics(self, num_classes: int, ignore_index: int) -> dict[str, Metric]:
        return {
            "mean_iou": MulticlassJaccardIndex(num_classes, ignore_index=ignore_index),
            "accuracy": MulticlassAccuracy(num_classes, average="micro", ignore_index=ignore_index),
        }
