"""GroupNorm in BatchNorm's place: scale and shift stay, running statistics go."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.errors import BatchNormError, ConversionError
from bn_lightning.layers.act import GroupNormAct
from bn_lightning.layers.kinds import has_activation, plain_class_of
from bn_lightning.layers.swap import forget_variant

__all__ = ["build_group_norm", "check_num_groups", "refuse_single_values", "to_group_norm", "why_no_group_norm"]


def check_num_groups(num_groups: int) -> None:
    """Check the option.

    Raises:
        ConversionError: If it is not a positive integer.
    """
    if not isinstance(num_groups, int) or isinstance(num_groups, bool) or num_groups < 1:
        raise ConversionError(
            f"num_groups counts the groups of channels, got {num_groups!r}; 32 is usual, 1 is layer norm over (C, *)."
        )


def why_no_group_norm(layer: _BatchNorm, num_groups: int) -> str | None:
    """Say why a layer cannot become a GroupNorm; ``None`` if it can."""
    if layer.num_features % num_groups:
        fits = math.gcd(layer.num_features, num_groups)
        return f"{layer.num_features} channels do not divide into {num_groups} groups; num_groups={fits} would fit"
    if layer.weight is None and layer.bias is not None:
        return "torch's group norm cannot go backward through a shift without a scale"
    return None


def to_group_norm(layer: _BatchNorm, num_groups: int) -> str:
    """Turn a BatchNorm layer into ``torch.nn.GroupNorm`` in place, and say what that means.

    ``weight`` and ``bias`` stay the Parameters they are, ``eps`` stays; the running statistics leave the state_dict.
    """
    plain, with_act, one_value = plain_class_of(layer), has_activation(layer), num_groups == layer.num_features
    attributes = layer.__dict__
    forget_variant(layer)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        layer._buffers.pop(name, None)
    for name in ("momentum", "track_running_stats", "process_group"):
        attributes.pop(name, None)
    attributes |= {"num_groups": num_groups, "num_channels": attributes.pop("num_features"), "converted_from": plain}
    layer.__class__ = GroupNormAct if with_act else nn.GroupNorm  # type: ignore[assignment]
    if not one_value:
        return "its running statistics are gone, and the network needs training"
    layer.register_forward_pre_hook(refuse_single_values)
    flat = ", and refuses (N, C) inputs" if plain is nn.BatchNorm1d else ""
    return f"its running statistics are gone, and the network needs training; it is instance norm{flat}"


def build_group_norm(
    num_features: int,
    eps: float = 1e-5,
    momentum: float | None = None,
    affine: bool = True,
    track_running_stats: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    num_groups: int = 32,
    bias: bool = True,
) -> nn.GroupNorm:
    """Build a GroupNorm from BatchNorm's arguments, for networks that take ``norm_layer=``.

    ``momentum`` and ``track_running_stats`` have no meaning for it.

    Raises:
        ConversionError: If the channels do not divide into the groups.

    Example:
        >>> build_group_norm(64).num_groups
        32
    """
    check_num_groups(num_groups)
    if num_features % num_groups:
        raise ConversionError(
            f"{num_features} channels do not divide into {num_groups} groups. Choose a num_groups that divides the "
            "channels of every layer."
        )
    keywords: dict[str, Any] = {"device": device, "dtype": dtype}
    layer = nn.GroupNorm(num_groups, num_features, eps, affine, **keywords)
    if not bias:
        layer.register_parameter("bias", None)
    if num_groups == num_features:
        layer.register_forward_pre_hook(refuse_single_values)
    return layer


def refuse_single_values(module: nn.GroupNorm, args: tuple[Tensor, ...]) -> None:
    """Refuse an input that has one value in a group; torch would return the shift alone, without a word.

    A forward pre-hook of GroupNorm layers with as many groups as channels.

    Raises:
        BatchNormError: With the shape and the cure.
    """
    x = args[0]
    if x.dim() >= 2 and x.numel() == x.shape[0] * module.num_groups > 0:
        raise BatchNormError(
            f"GroupNorm({module.num_groups}, {module.num_channels}) would normalize groups of one value in an input of "
            f"shape {tuple(x.shape)}, which leaves nothing of it. Use fewer groups."
        )
