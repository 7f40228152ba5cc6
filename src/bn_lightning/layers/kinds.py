"""Which layers may take another class: those whose behaviour is known, by their exact class."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from bn_lightning.layers.act import ThenActivation
from bn_lightning.layers.base import BatchNormVariant
from bn_lightning.layers.registry import VARIANTS

__all__ = [
    "has_activation",
    "is_candidate",
    "is_converted_group_norm",
    "is_plain",
    "plain_class_of",
    "scripted_batch_norm",
    "why_not",
]

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# Told by name: neither package is imported for it. Lightning's is what it makes of SyncBatchNorm after training.
_PLAIN_ELSEWHERE = {
    ("lightning.pytorch.plugins.layer_sync", "_BatchNormXd"),
    ("pytorch_lightning.plugins.layer_sync", "_BatchNormXd"),
}
_WITH_ACTIVATION = {
    (module, name)
    for module in ("timm.layers.norm_act", "timm.models.layers.norm_act")
    for name in ("BatchNormAct2d", "SyncBatchNormAct")
}


def is_candidate(module: nn.Module) -> bool:
    """Whether a conversion has a word to say about it: a BatchNorm of any kind, or what one was converted to."""
    return isinstance(module, _BatchNorm) or is_converted_group_norm(module) or scripted_batch_norm(module) is not None


def is_converted_group_norm(module: nn.Module) -> bool:
    """Whether it is a GroupNorm that was a BatchNorm before conversion."""
    return isinstance(module, nn.GroupNorm) and "converted_from" in module.__dict__


def is_plain(module: nn.Module) -> bool:
    """Whether it is a BatchNorm just as torch, Lightning or timm make it."""
    name = (type(module).__module__, type(module).__name__)
    return type(module) in _PLAIN or name in _PLAIN_ELSEWHERE or name in _WITH_ACTIVATION


def has_activation(module: nn.Module) -> bool:
    """Whether a drop and an activation follow the normalization."""
    name = (type(module).__module__, type(module).__name__)
    return isinstance(module, ThenActivation) or name in _WITH_ACTIVATION


def plain_class_of(module: nn.Module) -> type[_BatchNorm] | None:
    """Return the plain class it has, or had before its first conversion; ``None`` if it was built as a variant."""
    if is_plain(module):
        assert isinstance(module, _BatchNorm)
        return type(module)
    return getattr(module, "converted_from", None)


def why_not(module: nn.Module) -> str | None:
    """Say why a layer cannot take another class; ``None`` if it can."""
    kind, scripted = type(module), scripted_batch_norm(module)
    if scripted is not None:
        return f"TorchScript has compiled this {scripted}, which has no class to change; convert before scripting"
    if isinstance(module, LazyModuleMixin):
        return f"{kind.__name__} has not seen data; run one forward pass first"
    if "forward" in module.__dict__:
        return "its forward was replaced on the object itself, and another class's would never run"
    known = isinstance(module, BatchNormVariant) and (kind in VARIANTS.values() or "converted_from" in module.__dict__)
    if is_plain(module) or known or isinstance(module, ThenActivation) or is_converted_group_norm(module):
        return None
    return (
        f"{kind.__module__}.{kind.__qualname__} is a class of its own, and conversion would lose what it does; "
        "build the network with a plain BatchNorm in its place"
    )


def scripted_batch_norm(module: nn.Module) -> str | None:
    """Return the name of the BatchNorm class that was scripted or traced into a module."""
    name = getattr(module, "original_name", None)
    return name if isinstance(name, str) and "BatchNorm" in name and hasattr(module, "running_mean") else None
