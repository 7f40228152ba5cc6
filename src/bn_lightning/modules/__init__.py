"""LightningModules and data modules."""

from bn_lightning.modules.channel_statistics import ChannelStatistics
from bn_lightning.modules.cifar10 import CIFAR10DataModule
from bn_lightning.modules.classifier import ImageClassifier
from bn_lightning.modules.digits import DigitsDataModule
from bn_lightning.modules.image_folder import ImageFolderDataModule
from bn_lightning.modules.parameter_groups import decay_groups
from bn_lightning.modules.segmentation import SegmentationModule

__all__ = [
    "CIFAR10DataModule",
    "ChannelStatistics",
    "DigitsDataModule",
    "ImageClassifier",
    "ImageFolderDataModule",
    "SegmentationModule",
    "decay_groups",
]
