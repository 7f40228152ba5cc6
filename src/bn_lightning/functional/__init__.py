"""Tensors in, tensors out: the arithmetic of Batch Normalization."""

from bn_lightning.functional.affine import (
    absorb_into_conv_weights,
    absorb_into_linear_weights,
    eval_affine,
    fold_conv_weights,
    fold_linear_weights,
)
from bn_lightning.functional.gap import channel_gap, layer_gap
from bn_lightning.functional.moments import ChannelMoments, accumulation_dtype, batch_moments

__all__ = [
    "ChannelMoments",
    "absorb_into_conv_weights",
    "absorb_into_linear_weights",
    "accumulation_dtype",
    "batch_moments",
    "channel_gap",
    "eval_affine",
    "fold_conv_weights",
    "fold_linear_weights",
    "layer_gap",
]
