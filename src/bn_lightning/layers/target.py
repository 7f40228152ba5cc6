"""What layers are to become: a name or a class with options, checked once, applied to one layer after the other."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.errors import ConversionError
from bn_lightning.layers.act import ThenActivation, with_activation
from bn_lightning.layers.base import BatchNormVariant, require_options
from bn_lightning.layers.cross_replica import CrossReplicaBatchNorm
from bn_lightning.layers.domain import DomainBatchNorm
from bn_lightning.layers.frozen import FrozenBatchNorm
from bn_lightning.layers.group import build_group_norm, check_num_groups, to_group_norm, why_no_group_norm
from bn_lightning.layers.kinds import has_activation, is_converted_group_norm, plain_class_of
from bn_lightning.layers.registry import GROUP, find_variant
from bn_lightning.layers.swap import forget_variant

__all__ = ["Target", "batch_norm_layer", "resolve_target"]


class Target(Protocol):
    """A conversion with its options."""

    name: str
    constructor: Callable[..., nn.Module]

    def why_not(self, layer: nn.Module) -> str | None:
        """Say why a layer, which may take another class, cannot take this one; ``None`` if it can."""

    def is_reached(self, layer: nn.Module) -> bool:
        """Whether the layer is that already, with these options."""

    def apply(self, layer: nn.Module) -> str:
        """Convert one layer in place; return what else there is to say, or nothing."""


def batch_norm_layer(variant: str | type[nn.Module], **options: Any) -> Callable[..., nn.Module]:
    """Return a constructor of a variant, for networks that take ``norm_layer=``; it takes torch's own arguments.

    Args:
        variant: A name, as in `convert_batch_norm`, or a class.
        **options: The variant's settings.

    Raises:
        ConversionError: If the name, an option or its value is unknown.

    Example:
        >>> batch_norm_layer("ghost", virtual_batch_size=16)(64).virtual_batch_size
        16
    """
    return resolve_target(variant, options).constructor


def resolve_target(variant: str | type[nn.Module], options: dict[str, Any]) -> Target:
    """Find what is meant and check its options.

    Raises:
        ConversionError: If the name, an option or its value is unknown, with the nearest one there is.
    """
    if variant in (GROUP, nn.GroupNorm):
        return _GroupTarget(**require_options(GROUP, options, ["num_groups"]))
    kind = find_variant(variant) if isinstance(variant, str) else variant
    if not (isinstance(kind, type) and issubclass(kind, BatchNormVariant) and kind is not BatchNormVariant):
        raise ConversionError(
            f"layers are converted to a name such as 'ghost', to a subclass of BatchNormVariant or to "
            f"torch.nn.GroupNorm, got {kind!r}; back to plain ones with revert_batch_norm."
        )
    if issubclass(kind, ThenActivation):
        raise ConversionError(
            f"{kind.__name__} is what layers with an activation become; say {kind.__bases__[-1].__name__}."
        )
    known, required = kind.option_names(), inspect.signature(kind.configure).parameters
    missing = [name for name in known if required[name].default is inspect.Parameter.empty and name not in options]
    if missing:
        raise ConversionError(f"{kind.__name__} needs {', '.join(missing)}.")
    return _VariantTarget(kind, require_options(kind.__name__, options, known))


class _VariantTarget:
    def __init__(self, kind: type[BatchNormVariant], options: dict[str, Any]) -> None:
        self.kind, self.options, self.name = kind, options, kind.__name__
        # Built once for the checks of the values, and for what an option that is not given comes to.
        self.settings = kind(1, **options).options()
        self.constructor: Callable[..., nn.Module] = partial(kind, **options)

    def why_not(self, layer: nn.Module) -> str | None:
        if is_converted_group_norm(layer):
            return "it became a GroupNorm and has no running statistics; only undo() leads back"
        if isinstance(layer, DomainBatchNorm) and not issubclass(self.kind, DomainBatchNorm):
            return "the statistics of its domains would be lost; select_domain or revert_batch_norm first"
        if self._kind_for(layer) is None:
            return f"no class does {self.name} and then drop and activation; make one: (ThenActivation, {self.name})"
        return None

    def is_reached(self, layer: nn.Module) -> bool:
        if not isinstance(layer, BatchNormVariant) or type(layer) is not self._kind_for(layer):
            return False
        return layer.options() == {**self.settings, **self._inherited(layer)}

    def apply(self, layer: nn.Module) -> str:
        kind, plain, notes = self._kind_for(layer), plain_class_of(layer), []
        assert kind is not None
        assert isinstance(layer, _BatchNorm)
        options = {**self.options, **self._inherited(layer)}
        if isinstance(layer, nn.SyncBatchNorm | CrossReplicaBatchNorm) and not issubclass(kind, CrossReplicaBatchNorm):
            notes.append("batch statistics are each process's own from now on")
        before = layer.options() if type(layer) is kind and isinstance(layer, BatchNormVariant) else {}
        if not before:
            forget_variant(layer)
        layer.__class__ = kind
        assert isinstance(layer, BatchNormVariant)
        if plain is not None:
            layer.converted_from = plain
        if "process_group" not in options and not (plain and issubclass(plain, nn.SyncBatchNorm)):
            layer.__dict__.pop("process_group", None)  # it would keep the layer from being copied or pickled
        layer.configure(**options)
        changed = {name: value for name, value in layer.options().items() if before and before[name] != value}
        notes += [f"{name} {before[name]} → {value}" for name, value in changed.items()]
        notes.append(layer.adopt_statistics() or "")
        parameters = list(layer.parameters(recurse=False))
        if parameters and not any(p.requires_grad for p in parameters) and not issubclass(kind, FrozenBatchNorm):
            notes.append("scale and shift are not trainable")
        return "; ".join(filter(None, notes))

    def _inherited(self, layer: nn.Module) -> dict[str, Any]:
        """Return the processes a layer shares its statistics with, unless others are asked for."""
        own = isinstance(layer, nn.SyncBatchNorm | CrossReplicaBatchNorm) and "process_group" in self.settings
        return {"process_group": layer.process_group} if own and "process_group" not in self.options else {}

    def _kind_for(self, layer: nn.Module) -> type[BatchNormVariant] | None:
        return with_activation(self.kind) if has_activation(layer) else self.kind


class _GroupTarget:
    def __init__(self, num_groups: int = 32) -> None:
        check_num_groups(num_groups)
        self.num_groups, self.name = num_groups, "GroupNorm"
        self.constructor: Callable[..., nn.Module] = partial(build_group_norm, num_groups=num_groups)

    def why_not(self, layer: nn.Module) -> str | None:
        if isinstance(layer, nn.GroupNorm):
            return (
                None if self.is_reached(layer) else f"it is a GroupNorm of {layer.num_groups} groups; undo() that one"
            )
        if isinstance(layer, DomainBatchNorm):
            return "the statistics of its domains would be lost; select_domain or revert_batch_norm first"
        assert isinstance(layer, _BatchNorm)
        return why_no_group_norm(layer, self.num_groups)

    def is_reached(self, layer: nn.Module) -> bool:
        return isinstance(layer, nn.GroupNorm) and layer.num_groups == self.num_groups

    def apply(self, layer: nn.Module) -> str:
        assert isinstance(layer, _BatchNorm)
        return to_group_norm(layer, self.num_groups)
