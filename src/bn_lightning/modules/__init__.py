"""LightningModules and data modules."""

from bn_lightning.modules.channel_statistics import ChannelStatistics
from bn_lightning.modules.classifier import ImageClassifier
from bn_lightning.modules.digits import DigitsDataModule
from bn_lightning.modules.parameter_groups import decay_groups

__all__ = ["ChannelStatistics", "DigitsDataModule", "ImageClassifier", "decay_groups"]
