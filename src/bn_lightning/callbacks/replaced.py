"""Notice that BatchNorm variants were taken out of a model behind the user's back."""

from collections.abc import Mapping

from torch import nn

from bn_lightning.errors import ConversionError
from bn_lightning.layers.base import BatchNormVariant
from bn_lightning.selection import describe

__all__ = ["require_same_classes", "variant_classes"]


def variant_classes(model: nn.Module) -> dict[str, type]:
    """Record the class of every BatchNorm variant, by name."""
    return {name: type(module) for name, module in model.named_modules() if isinstance(module, BatchNormVariant)}


def require_same_classes(model: nn.Module, recorded: Mapping[str, type]) -> None:
    """Refuse to train a model whose variants are no longer what they were.

    Raises:
        ConversionError: Naming the layers, what they were and what they are.
    """
    modules = dict(model.named_modules())
    changed = {name: modules[name] for name in recorded if isinstance(modules.get(name), nn.SyncBatchNorm)}
    if not changed:
        return
    first, after = next(iter(changed.items()))
    raise ConversionError(
        f"{len(changed)} BatchNorm variants were replaced before training began ({describe(changed)}): {first!r} was "
        f"{recorded[first].__name__} and is {type(after).__name__}. Trainer(sync_batchnorm=True) turns every BatchNorm "
        "into torch.nn.SyncBatchNorm, whatever it did. Set sync_batchnorm=False; for statistics over all processes, "
        "convert to 'cross_replica' (renorm=True for Batch Renormalization)."
    )
